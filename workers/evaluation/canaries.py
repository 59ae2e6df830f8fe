"""Canaries: small measurements whose results are known beforehand, to be taken before any other is believed.

A canary of the *mathematics* has an exact value, by a closed form or an integral; what the code measures is compared
with it within what chance allows. One that fails says that the code measures wrongly. A canary of the *dependencies*
has a recorded value, which nothing but the code and its libraries decide; one that fails says that numbers from before
and after the change are not comparable, although both may be right.

`measure` takes all measurements in seconds, on the CPU and in this process; `judge` compares. The exact values are
written down here as numbers, and tests/test_canaries.py derives them again: so a change of the derivation shows too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from workers.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    NLLConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
    Trial,
)
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import prepare
from workers.data.pixels import to_model
from workers.diffusion.gaussian import GaussianDenoiser, make_denoiser_config
from workers.diffusion.likelihood import estimate
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process
from workers.diffusion.samplers import sample
from workers.evaluation.features import train_classifier
from workers.evaluation.frechet import Moments, compute_distance
from workers.noise import make_generator

# What is measured of the Gaussian pixels. A checkpoint of DENOISER, evaluated as this trial says, has the
# `eval/nll_bpd` of the canary gaussian/nll_bpd wherever its blocks run; only the noise is other. T is small because
# a network asked for the wrong t then costs 7 standard errors, and at T = 200 only 1.
GAUSSIAN = Trial(
    data=DataConfig(source="gaussian"),
    diffusion=DiffusionConfig(T=50, schedule=ScheduleConfig(scale="per_1000"), variance="fixed_large"),
    training=TrainingConfig(steps=1),
    evaluation=EvaluationConfig(nll=NLLConfig(images="all", timesteps="all"), fid=None),
)
DENOISER = make_denoiser_config(GAUSSIAN_SD, size=8, channels=1)
SAMPLED_T = 16  # timesteps per image, besides t = 1, of the canary with sampled timesteps
SAMPLES = 4000  # Gaussian images a sampler
SAMPLERS = {
    "ancestral": SamplerConfig(kind="ancestral"),
    "ddim": SamplerConfig(kind="ddim", steps=10, eta=0.5),
}
PAPER = DiffusionConfig()  # T = 1000, linear from 1e-4 to 0.02


@dataclass(frozen=True)
class Canary:
    name: str
    of: Literal["mathematics", "dependencies"]
    expected: float
    tolerance: float  # largest distance from `expected`, in its unit
    reason: str  # what is expected, and why the tolerance is what it is


CANARIES = [
    Canary(
        "gaussian/nll_bpd",
        "mathematics",
        expected=6.927826717228,
        tolerance=0.0307,
        reason="The bound of the 500 held-out images under their best denoiser, every t measured, against its closed "
        "form and one integral. The tolerance is 4 exact standard errors over the noise.",
    ),
    Canary(
        "gaussian/nll_bpd_through_ray",
        "mathematics",
        expected=6.927826717228,
        tolerance=0.0307,
        reason="The same bound once more, from a checkpoint in the storage by the blocks of an evaluation, as Ray's "
        "tasks make them. The tolerance is the same.",
    ),
    Canary(
        "gaussian/nll_bpd_sampled_t",
        "mathematics",
        expected=6.927826717228,
        tolerance=0.028,
        reason="The same bound from t = 1 and 16 sampled timesteps per image, as in a validation. The tolerance is 4 "
        "standard errors over noise and timesteps, from the spread of repeated estimates.",
    ),
    Canary(
        "gaussian/ancestral_variance",
        "mathematics",
        expected=0.048786425042,
        tolerance=0.000545,
        reason="The variance of the pixels of 4,000 samples by all 50 ancestral steps, against the steps' product. "
        "The tolerance is 4 standard errors of a mean of 256,000 squares, sqrt(2 / 256,000) of the variance each.",
    ),
    Canary(
        "gaussian/ddim_variance",
        "mathematics",
        expected=0.013820250027,
        tolerance=0.000154,
        reason="The same by 10 of the 50 steps and DDIM with eta = 0.5. The tolerance is 4 such standard errors.",
    ),
    Canary(
        "schedule/log_alpha_bar_T",
        "mathematics",
        expected=-10.11771354241310,
        tolerance=1e-12,
        reason="log alpha_bar_T of the paper's schedule, T = 1000 and beta from 1e-4 to 0.02, against a product of "
        "fractions. The tolerance is that of a thousand factors with a few roundings of 1.1e-16 each.",
    ),
    Canary(
        "gaussian/nll_bpd_recorded",
        "dependencies",
        expected=6.9238508,
        tolerance=2e-6,
        reason="gaussian/nll_bpd once more, as it was recorded with the noise at its address: PyTorch's generator and "
        "kernels. Other noise moves it by 0.008 bits/dim, another processor's vector units by 1e-8.",
    ),
    Canary(
        "digits/classifier_accuracy",
        "dependencies",
        expected=286 / 300,
        tolerance=1.5 / 300,
        reason="The share of the 300 held-out digits that the classifier behind fd_classifier knows, as recorded: "
        "scikit-learn's training and NumPy's generator. One digit on the border may fall to the other side.",
    ),
    Canary(
        "digits/fd_classifier_halves",
        "dependencies",
        expected=0.13803484,
        tolerance=2e-5,
        reason="fd_classifier of one half of the training digits against the other, as recorded: the floor for so "
        "many samples. Rounding moves it by 1e-7, another initialisation by 4e-4 to 2e-2.",
    ),
]


@dataclass(frozen=True)
class Verdict:
    canary: Canary
    measured: float | None  # None where it was not measured, which is no pass

    @property
    def passed(self) -> bool:
        c = self.canary
        return self.measured is not None and abs(self.measured - c.expected) <= c.tolerance  # False for NaN

    def __str__(self) -> str:
        c = self.canary
        measured = "not measured" if self.measured is None else f"{self.measured:.10g}"
        line = f"{c.name}: {measured}, expected {c.expected:.10g} +- {c.tolerance:.2g}: "
        return line + ("passed" if self.passed else f"FAILED. {ADVICE[c.of]} {c.reason}")


ADVICE = {
    "mathematics": "The code measures what is known exactly, and finds something else: believe no metric of this build "
    "until the cause is found.",
    "dependencies": "The code or a library computes other numbers than when this was recorded: metrics from before and "
    "after do not compare. Install the versions of requirements.lock; if the change is meant, record the new value.",
}


def judge(measured: Mapping[str, float]) -> list[Verdict]:
    """A verdict on every canary, in order. A name in `measured` that is no canary's is a ValueError."""
    names = [c.name for c in CANARIES]
    if unknown := sorted(set(measured) - set(names)):
        raise ValueError(f"no canary is called {', '.join(unknown)}; choose from {', '.join(names)}")
    return [Verdict(c, measured.get(c.name)) for c in CANARIES]


def measure(cache: Path | None = None) -> dict[str, float]:
    """What `judge` asks for, by canary, but for gaussian/nll_bpd_through_ray, which the driver measures.

    `cache` is the folder of decoded data, as in `prepare`.
    """
    return {**measure_gaussian(cache), **measure_digits(cache), **measure_schedule()}


@torch.no_grad()
def measure_gaussian(cache: Path | None = None) -> dict[str, float]:
    """Bounds and samples under the best denoiser of the Gaussian pixels."""
    process = Process.of(GAUSSIAN.diffusion)
    model = Denoiser(GaussianDenoiser(DENOISER, process), process, "eps")
    dataset = prepare(GAUSSIAN.data, cache)
    x_0 = to_model(torch.from_numpy(np.array(dataset.held_out)), dataset.levels)
    every = estimate(process, model, x_0, process.T - 1, dataset.levels, "canary", "every t").mean
    sampled = estimate(process, model, x_0, SAMPLED_T, dataset.levels, "canary", "sampled t").mean
    measured = {
        "gaussian/nll_bpd": every,
        "gaussian/nll_bpd_recorded": every,
        "gaussian/nll_bpd_sampled_t": sampled,
    }
    shape = (SAMPLES, *x_0.shape[1:])
    for name, sampler in SAMPLERS.items():
        x = sample(process, model, sampler, shape, make_generator("canary", name))
        measured[f"gaussian/{name}_variance"] = float(x.double().square().mean())  # the mean is 0 by symmetry
    return measured


def measure_digits(cache: Path | None = None) -> dict[str, float]:
    """The classifier of the digits, and the Fréchet distance of their training split's halves in its features."""
    dataset = prepare(DataConfig(source="digits"), cache)
    space = train_classifier(dataset)
    features = space.compute_features(dataset.train)
    first, second = np.split(features, [len(features) // 2])  # fair halves: the split is stored shuffled
    distance = compute_distance(Moments.of(first), Moments.of(second))
    return {"digits/classifier_accuracy": space.accuracy, "digits/fd_classifier_halves": distance}


def measure_schedule() -> dict[str, float]:
    """The end of the paper's schedule."""
    return {"schedule/log_alpha_bar_T": math.log(float(Process.of(PAPER).alpha_bar[-1]))}
