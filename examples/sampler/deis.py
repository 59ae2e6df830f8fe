"""DEIS: Zhang & Chen 2022, with the polynomials in log sigma of diffusers' DEISMultistepScheduler."""

import numpy as np
import torch

from workers.config import SamplerConfig
from workers.diffusion.samplers import Ladder
from workers.shapes import NCHW


def weigh(nodes: list[float], start: float, end: float) -> list[float]:
    """The integral over sigma, from start to end > 0, of each Lagrange polynomial in log sigma on the nodes."""
    x, w = np.polynomial.legendre.leggauss(16)
    span = (np.log(end) - np.log(start)) / 2
    u = np.log(start) + span * (x + 1)
    logs = np.log(nodes)
    ratios = [[(u - logs[k]) / (logs[j] - logs[k]) for k in range(len(logs)) if k != j] for j in range(len(logs))]
    return [float(np.sum(w * span * np.exp(u) * np.prod(ratio, axis=0))) for ratio in ratios]


def deis(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """The flow dy = eps d sigma, with eps extrapolated from the last `order` levels; an Euler step to sigma = 0."""
    sigma, order = ladder.sigma.tolist(), config.order  # type: ignore[attr-defined]
    nodes, found = list[float](), list[torch.Tensor]()
    for level in range(len(sigma), 0, -1):
        start, end = sigma[level - 1], sigma[level - 2] if level > 1 else 0.0
        nodes, found = [start, *nodes][:order], [ladder.eps(y, level), *found][:order]
        weights = weigh(nodes, start, end) if end else [-start]
        y = y + sum(weight * eps for weight, eps in zip(weights, found, strict=False))
    return y
