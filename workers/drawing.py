"""Drawing a model's images by their address: those that an evaluation measures, and a registered model gives."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from workers import blocks
from workers.config import SamplerConfig
from workers.diffusion.process import Process
from workers.diffusion.samplers import sample
from workers.noise import generator
from workers.pixels import QUANTISERS


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint on its device."""

    network: torch.nn.Module  # eps_theta(x_t, t - 1)
    process: Process
    device: torch.device

    def eps_theta(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.network(x_t, t - 1))


@dataclass(frozen=True)
class Pixels:
    """What an image is: height, width and channels, and how a float becomes one of the `levels`."""

    shape: tuple[int, int, int]
    levels: int
    quantise: str = "round"


def draw(model: Model, sampler: SamplerConfig, pixels: Pixels, seed: int, block: int, n: int) -> np.ndarray:
    """The first n of the SAMPLES images of a block: uint8 (n, H, W, C) in 0..levels-1.

    The noise is that of the whole block whatever n is, so an image does not depend on how many are asked for but by
    the rounding of the network in another batch. The network sees n images only.
    """
    height, width, channels = pixels.shape
    noise, shape = generator(seed, "samples", block), (blocks.SAMPLES, channels, height, width)

    def eps_theta(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        eps = torch.zeros_like(x_t)
        eps[:n] = model.eps_theta(x_t[:n], t[:n])
        return eps

    part = model.eps_theta if n == blocks.SAMPLES else eps_theta
    x = sample(model.process, part, sampler, shape, noise, device=model.device)
    return np.asarray(QUANTISERS[pixels.quantise](x[:n], pixels.levels).cpu().numpy())


def draw_all(model: Model, sampler: SamplerConfig, pixels: Pixels, seed: int, n: int) -> np.ndarray:
    """The first n images at `seed`, block by block, as an evaluation with that seed draws them: uint8 (n, H, W, C)."""
    size = blocks.SAMPLES
    parts = [draw(model, sampler, pixels, seed, k, min(size, n - k * size)) for k in range(math.ceil(n / size))]
    return np.concatenate(parts) if parts else np.zeros((0, *pixels.shape), np.uint8)
