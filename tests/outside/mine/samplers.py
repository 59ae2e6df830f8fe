"""A sampler of one's own."""

import torch

from workers.config import SamplerConfig
from workers.diffusion.samplers import Ladder
from workers.shapes import NCHW


def adams_bashforth(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """The flow dy / dsigma = eps by the rule of Adams and Bashforth, of the first or the second order."""
    order: int = getattr(config, "order")  # noqa: B009 (no type checker knows a setting of an installed package)
    sigma, before, step_before = [0.0, *ladder.sigma.tolist()], None, 0.0
    for level in range(len(ladder.sigma), 0, -1):
        eps, step = ladder.eps(y, level), sigma[level - 1] - sigma[level]
        rise = 0 if before is None or order == 1 else (eps - before) * step / (2 * step_before)
        y, before, step_before = y + step * (eps + rise), eps, step
    return y
