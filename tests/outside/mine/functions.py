"""A schedule, a prediction, a weighting, a way of drawing t and a metric of samples of one's own."""

import numpy as np
import torch

from workers.config import LossConfig, ScheduleConfig
from workers.diffusion.predictions import Target, V
from workers.diffusion.process import Process
from workers.diffusion.schedules import Betas
from workers.diffusion.timesteps import Part
from workers.evaluation.features import FeatureSpace
from workers.evaluation.summary import Blocks, Found
from workers.shapes import Features, PerTime, Times


def cubic(schedule: ScheduleConfig, T: int) -> Betas:
    """The cube root of beta_t linear in t."""
    return np.linspace(schedule.beta_start ** (1 / 3), schedule.beta_end ** (1 / 3), T, dtype=np.float64) ** 3


# -v: what v predicts, with the other sign.
MINUS_V = Target(
    of=lambda process, x_0, x_t, t, eps: -V.of(process, x_0, x_t, t, eps),
    x_0=lambda process, x_t, t, output: V.x_0(process, x_t, t, -output),
    eps=lambda process, x_t, t, output: V.eps(process, x_t, t, -output),
    scale=V.scale,
)


def root_snr(process: Process, loss: LossConfig, own: PerTime) -> PerTime:
    """sqrt(SNR_t) for the error of x_0."""
    return process.snr.sqrt()


def late(T: int, part: Part, noise: torch.Generator, probability: PerTime) -> Times:
    """The larger of two uniform t."""
    return torch.randint(1, T + 1, (2, part.n), generator=noise, device=noise.device).amax(0)


def energy(space: FeatureSpace, samples: Features, real: Blocks) -> Found:
    """The energy distance of the features (Székely & Rizzo 2013): 2 E|x - y| - E|x - x'| - E|y - y'|."""

    def mean_distance(a: Features, b: Features) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=2).mean())

    x, y = samples[:500].astype(np.float64), np.concatenate(real)[:500].astype(np.float64)
    distance = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    return {"energy": (distance, None)}, f"first {len(x)} samples and {len(y)} images"
