"""A network of one's own."""

import torch
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.network.build import Signature
from workers.network.unet import Dropout


class Plain(nn.Module):
    """Three convolutions, the second one told t."""

    def __init__(self, settings: ModelConfig, of: Signature) -> None:
        super().__init__()
        width: int = getattr(settings, "width")  # noqa: B009 (no type checker knows a setting of an installed package)
        self.first, self.second = nn.Conv2d(of.channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.last, self.time = nn.Conv2d(width, of.outputs, 3, padding=1), nn.Linear(1, width)
        self.dropout = Dropout(0.1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time(t[:, None].float() / 100)[:, :, None, None]
        h = torch.relu(self.second(torch.relu(self.first(x)) + told))
        y: Tensor = self.last(self.dropout(h))
        return y
