"""A discriminator of patches: one number for each piece of an image, real above 0 (Isola et al. 2017, section 3.2).

Without batch norm, which theirs has: what it says of an image depends on no other, so that any number of workers
computes the same.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from workers.network.autoencoder import initialise
from workers.shapes import NCHW

Patches = Float[Tensor, "n 1 rows columns"]
WIDEST = 8  # times its first channels


class Discriminator(nn.Module):
    """`layers` convolutions of stride 2, each twice as wide as the one before, and two of stride 1.

    Its first weights come from `generator`.
    """

    def __init__(self, in_channels: int, channels: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [in_channels, *(channels * min(2**k, WIDEST) for k in range(layers))]
        self.halving = nn.ModuleList(nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in pairwise(widths))
        self.conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)
        initialise(self, generator, zero=())

    def forward(self, x: NCHW) -> Patches:
        for conv in (*self.halving, self.conv):
            x = F.leaky_relu(conv(x), 0.2)
        y: Tensor = self.conv_out(x)
        return y
