"""A trial's speed on this hardware, from seconds of its real work: training steps, likelihood, samples, features."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from workers.config import SamplerConfig, Trial
from workers.data.dataset import Dataset, prepare
from workers.data.pixels import to_model
from workers.diffusion.formulations import Continuous, make_process
from workers.diffusion.integral import draw_real_times, find_ends, measure
from workers.diffusion.likelihood import count_pairs_at_once, measure_pairs
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model
from workers.diffusion.samplers import sample
from workers.evaluation.blocks import IMAGES, SAMPLES
from workers.evaluation.features import load_feature_space
from workers.evaluation.loaded import LoadedModel
from workers.learner import repeat_steps
from workers.lessons import make_trial_config
from workers.network.build import build_network, make_inputs
from workers.noise import make_generator
from workers.passes import plan_evaluations
from workers.speed import Meter, Spent, name_training_kind
from workers.storage import Storage
from workers.warm_start import find_latent_shape

ENOUGH_S = 3.0  # of a kind of work
STAND_IN = 1000  # images at most
SAMPLER = SamplerConfig(kind="ddim", steps=5)
CONTINUOUS_SAMPLER = SamplerConfig(kind="euler", steps=5)


def measure_speed(trial: Trial, storage_root: str) -> tuple[str, Spent]:
    """The hardware, and what work of each kind took on it.

    Trains as one worker of the trial does, by itself: what workers tell each other is not in it. Where the feature
    space is to be learned from the data, the storage keeps it.
    """
    torch.set_num_threads(trial.training.cpus)
    device = torch.device("cuda" if torch.cuda.is_available() and trial.training.gpus != 0 else "cpu")
    meter, images = Meter(device), prepare(trial.data)
    dataset = _make_stand_in(images, find_latent_shape(trial.data.encoder, images.shape))
    batch = trial.training.batch_size // trial.training.workers
    alone = trial.training.model_copy(update={"workers": 1, "batch_size": batch})
    training = repeat_steps(trial.model_copy(update={"training": alone}), dataset, device)
    _repeat(meter, name_training_kind(trial.training), batch, lambda: next(training))
    torch.set_num_threads(1)  # as evaluation has it
    if trial.diffuses:
        _measure_denoiser(trial, dataset, meter, device)
    else:
        _measure_passes(trial, dataset, meter, device)
    if fid := trial.evaluation.fid:
        space = load_feature_space(Storage(storage_root), images, fid.features, device, trial.evaluation.precision)
        some = np.array(images.train[:SAMPLES])
        _repeat(meter, f"features-{fid.features}", len(some), lambda: space.compute_features(some))
    return meter.hardware, meter.spent


def _measure_passes(trial: Trial, dataset: Dataset, meter: Meter, device: torch.device) -> None:
    """Of a network that is no denoiser: passes through the whole of it, by which its blocks are counted."""
    config = make_trial_config(trial, dataset)
    network = build_network(config, make_generator(trial.seed, "weights")).to(device).eval()
    inputs = [value.to(device).expand(IMAGES, *value.shape[1:]).contiguous() for value in make_inputs(config)]
    with torch.no_grad():
        for kind in ("nll", "samples"):
            _repeat(meter, kind, IMAGES, lambda: network(*inputs))


def _measure_denoiser(trial: Trial, dataset: Dataset, meter: Meter, device: torch.device) -> None:
    """The bound and samples of a denoiser."""
    process = make_process(trial.diffusion)
    config = make_trial_config(trial, dataset)
    network = build_network(config, make_generator(trial.seed, "weights")).to(device).eval()
    denoiser = Denoiser(network, process, trial.diffusion.prediction)
    loaded = LoadedModel(denoiser, process, device, trial.evaluation.precision)

    def tell_any(count: int) -> Model:
        return loaded.tell(loaded.assign_told(np.arange(count), dataset))

    first = to_model(torch.from_numpy(np.array(dataset.held_out[:1])), dataset.levels).to(device)
    batch = count_pairs_at_once(first)
    rows = np.arange(batch) % len(dataset.held_out)
    x_0 = to_model(torch.from_numpy(np.array(dataset.held_out[rows])), dataset.levels).to(device)
    t, noise = np.arange(batch) % (process.T or 1) + 1, make_generator(0)

    def pairs() -> object:
        model, weight = tell_any(batch), np.ones(batch)
        if isinstance(process, Continuous):  # two pairs of each image
            half = -(-batch // 2)
            drawn = draw_real_times(process, find_ends(process, dataset.levels), (half, 1), noise, "uniform")
            of = tell_any(2 * half), x_0[:half], rows[:half]
            return measure(process, *of, drawn=drawn, noise=noise, levels=dataset.levels)
        return measure_pairs(process, model, x_0, rows, t, weight=weight, noise=noise, levels=dataset.levels)

    _repeat(meter, "nll", batch, pairs)
    if trial.evaluation.fid:
        model, shape = tell_any(SAMPLES), (SAMPLES, dataset.shape[2], *dataset.shape[:2])
        sampler = SAMPLER if process.T else CONTINUOUS_SAMPLER
        made = SAMPLES * plan_evaluations(sampler, process.T)
        with torch.no_grad():
            _repeat(meter, "samples", made, lambda: sample(process, model, sampler, shape, noise, device=device))


def _make_stand_in(images: Dataset, latents: tuple[int, int, int] | None) -> Dataset:
    """The data to diffuse: of an autoencoder that is still to be trained noise in the place of its latents."""
    if latents is None:
        return images
    splits: dict[str, Any] = {}
    for split in ("train", "held_out"):
        count = min(len(getattr(images, split)), STAND_IN)
        splits[split] = np.random.RandomState(0).standard_normal((count, *latents)).astype(np.float32)
        labels = getattr(images, f"{split}_labels")
        splits[f"{split}_labels"] = None if labels is None else labels[:count]
    return replace(images, levels=None, shape=latents, **splits)


def _repeat(meter: Meter, kind: str, count: float, work: Callable[[], object]) -> None:
    """Does the work once to warm up, and then until it has taken long enough."""
    work()
    ends = time.monotonic() + ENOUGH_S
    while True:
        with meter.measure(kind, count):
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        if time.monotonic() > ends:
            return
