"""The generator of a GAN: from noise z ~ N(0, I) to images on [-1, 1] by one pass (Goodfellow et al. 2014).

It is the decoder of the autoencoder of the same settings, with a tanh.
"""

from typing import Any

import torch
from torch import Tensor

from workers.network.autoencoder import FromLatents, Image, ImageDecoder, Latents, check_autoencoder_config, initialise
from workers.network.autoencoder_config import AUTOENCODER_CLASS


class Generator(FromLatents):
    """Initial weights come from `generator` (None: torch's global one). Raises ValueError for a config that asks for
    what is not built here."""

    def __init__(self, config: dict[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        c = check_autoencoder_config({**config, "_class_name": AUTOENCODER_CLASS})
        self.config, self.decoder = dict(config), ImageDecoder(c)
        initialise(self, generator, zero=("conv2", "to_out.0"))

    def decode(self, z: Latents) -> Image:
        y: Tensor = torch.tanh(self.decoder(z))
        return y

    def forward(self, z: Latents) -> Image:
        return self.decode(z)
