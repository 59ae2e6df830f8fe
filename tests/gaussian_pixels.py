"""The data set of Gaussian pixels, processes for it, and its best denoiser."""

from typing import Any

import pytest
import torch

from workers.config import DataConfig, DiffusionConfig, ScheduleConfig
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import Dataset, prepare
from workers.diffusion.gaussian import GaussianDenoiser, make_denoiser_config
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process

S = GAUSSIAN_SD


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return prepare(DataConfig(source="gaussian"), tmp_path_factory.mktemp("cache"))


def process(T: int, variance: Any = "fixed_large") -> Process:
    return Process.of(DiffusionConfig(T=T, schedule=ScheduleConfig(scale="per_1000"), variance=variance))


def short(T: int, variance: Any = "fixed_large") -> Process:
    """A process that reaches noise in a few steps."""
    schedule = ScheduleConfig(beta_start=0.001, beta_end=0.5)
    return Process.of(DiffusionConfig(T=T, schedule=schedule, variance=variance))


def network(p: Process, s: float = S, scale: float = 1.0):
    denoiser = GaussianDenoiser(make_denoiser_config(s, 8, 1), p)
    return lambda x, t: scale * denoiser(x, t - 1)


def with_head(p: Process, head: float) -> Denoiser:
    """The best denoiser, with a second head that says the same of every pixel."""
    best = GaussianDenoiser(make_denoiser_config(S, 8, 1), p)

    class Heads(torch.nn.Module):
        def forward(self, x, t):
            return torch.cat([best(x, t), torch.full_like(x, head)], dim=1)

    return Denoiser(Heads(), p, "eps")
