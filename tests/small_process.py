"""Processes of a few steps, and what is drawn from them."""

from typing import Any

import numpy as np
import torch

from workers.config import DiffusionConfig, SamplerConfig, ScheduleConfig
from workers.diffusion.ledger import Ledger
from workers.diffusion.likelihood import list_all_times, measure_pairs
from workers.diffusion.predictions import eps_by_x_0, from_eps
from workers.diffusion.process import Model, Prediction, Process
from workers.noise import make_generator

F64 = torch.float64
ANCESTRAL, DDIM = SamplerConfig(kind="ancestral"), SamplerConfig(kind="ddim")


def config(T: int, kind: Any = "linear", scale: Any = "absolute", variance: Any = "fixed_small") -> DiffusionConfig:
    given = tuple(np.linspace(0.001, 0.2, T).tolist()) if kind == "list" else None
    return DiffusionConfig(T=T, schedule=ScheduleConfig(kind=kind, scale=scale, betas=given), variance=variance)


def process(T: int, variance: Any = "fixed_small", kind: Any = "linear", scale: Any = "per_1000") -> Process:
    return Process.of(config(T, kind, scale, variance))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator("test_diffusion", seed), dtype=F64)


def every_t(p: Process) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(t, x_0, x_t, eps): one pair for each t, float64 (T, 1, 2, 3), with x_t drawn from q."""
    t = torch.arange(1, p.T + 1)
    x_0, eps = normal(p.T, 1, 2, 3).clamp(-1, 1), normal(p.T, 1, 2, 3, seed=1)
    return t, x_0, p.q_sample(x_0, t, eps), eps


def denoiser_of_gaussian(p: Process, s: float) -> Model:
    """E[eps | x_t] for x_0 ~ N(0, s^2 I)."""
    slope = (1 - p.alpha_bar).sqrt() / (p.alpha_bar * s**2 + 1 - p.alpha_bar)
    return from_eps(p, lambda x, t: slope[t - 1].reshape(-1, 1, 1, 1) * x)


def measure_all_times(
    p: Process, model: Model, x_0: torch.Tensor, noise: torch.Generator, *, levels: int | None, clip: bool = True
) -> Ledger:
    """Every t of each image."""
    t, weight = list_all_times(p.T, len(x_0))
    image = np.repeat(np.arange(len(x_0)), p.T)
    pairs = x_0[image], image, t.reshape(-1)
    return measure_pairs(p, model, *pairs, weight=weight.reshape(-1), noise=noise, levels=levels, clip=clip)


def make_prediction(p: Process, x_0_hat: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
    """What a network says that takes x_0 for `x_0_hat`."""
    return Prediction(x_0_hat, eps_by_x_0(p, x_t, t, x_0_hat))
