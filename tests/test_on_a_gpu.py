"""Training and evaluation where the network is on a GPU: what they compute is what they compute on the CPU.

There need not be a GPU: see `pretend_gpu` for what is pretended, and what is not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_evaluation as small
import torch
from experiment_files import experiment
from pretend_gpu import Flags, open_process, pretend_gpu

from orchestrator.experiment.expand import find_starting_rows
from orchestrator.experiment.settings import merge
from orchestrator.origins import pin_starts
from orchestrator.sweep import list_trials
from workers import denoising, peak, studying
from workers.config import Measurement
from workers.data.dataset import prepare
from workers.evaluation import features
from workers.evaluation.blocks import Block, Images, list_blocks
from workers.evaluation.make import Bench, make
from workers.evaluation.rates import Stage
from workers.evaluation.summary import summarise
from workers.kinds import DENOISER
from workers.layout import name_checkpoints_folder, name_trial_folder
from workers.network import manifest
from workers.network.checkpoint import load_process
from workers.storage import Storage
from workers.training import train
from workers.world import World

STEPS = 2
SMALL: dict[str, Any] = {
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1},
    "training": {"steps": STEPS, "batch_size": 8, "ema": 0.9, "precision": "float32", "validate_every": STEPS},
}
CHAIN = merge(SMALL, {"model": {"attention": [4]}, "diffusion": {"T": 8, "schedule": {"kind": "cosine"}}})
VAE = merge(SMALL, {"model": {"kind": "autoencoder"}, "loss": {"objective": "elbo"}})
BASE_CHAIN = {"base": {"loss": {"objective": "mse", "teacher": None}}}
ODE = {"images": 4, "tolerance": 0.05}


def measured(sampler: str = "", timesteps: int | None = 3, **more: Any) -> dict[str, Any]:
    """The section `evaluation`: samples by that sampler in three steps, and bits/dim."""
    options = {"tolerance": 0.05} if sampler == "ode" else {"steps": 3}
    fid = {"samples": 20} | ({"sampler": {"kind": sampler, **options}} if sampler else {})
    return merge({"nll": {"images": 8} | ({"timesteps": timesteps} if timesteps else {}), "fid": fid}, more)


CASES: dict[str, dict[str, Any]] = {
    "importance": {
        **merge(CHAIN, {"model": {"dropout": 0.1}, "training": {"timesteps": "importance", "averages": [0.5]}}),
        "evaluation": measured("ddim"),
    },
    "labels": {
        **merge(CHAIN, {"model": {"labels": True}, "training": {"label_dropout": 0.2, "posthoc": {"every": 1}}}),
        "data": {"flip": True},
        "evaluation": measured("ancestral", fid={"sampler": {"guidance": 2.0}}),
    },
    "learned_range": {
        **merge(CHAIN, {"diffusion": {"variance": "learned_range"}, "loss": {"objective": "hybrid"}}),
        "evaluation": measured("dpmpp"),
    },
    "learned": {
        **merge(CHAIN, {"diffusion": {"variance": "learned", "prediction": "x_0"}, "loss": {"objective": "kl"}}),
        "evaluation": measured("ancestral", timesteps=None),
    },
    "v": {
        **merge(CHAIN, {"diffusion": {"prediction": "v"}, "loss": {"weighting": "min_snr"}}),
        "evaluation": measured("heun", ode_nll=ODE),
    },
    "langevin": {**CHAIN, "evaluation": measured("langevin")},
    "euler_maruyama": {**CHAIN, "evaluation": measured("euler_maruyama")},
    "ode": {**CHAIN, "evaluation": measured("ode")},
    "edm": {
        **merge(SMALL, {"model": {"attention": [4]}, "diffusion": {"formulation": "edm"}}),
        "evaluation": measured("churn"),
        "search": {"metric": "eval/continuous_nll_bpd"},
    },
    "flow": {
        **merge(SMALL, {"model": {"attention": [4]}, "diffusion": {"formulation": "flow"}}),
        "evaluation": measured("ode", ode_nll=ODE),
        "search": {"metric": "eval/ode_nll_bpd"},
    },
    "autoencoder": {**VAE, "evaluation": measured(timesteps=None)},
    "adversarial": {**merge(VAE, {"loss": {"adversarial": 1.0}}), "evaluation": measured(timesteps=None)},
    "generator": {
        **merge(SMALL, {"model": {"kind": "generator"}, "loss": {"objective": "gan", "r1": 0.1}}),
        "evaluation": measured(nll=None),
        "search": {"metric": "eval/fd_classifier"},
    },
    "latents": {
        **merge(CHAIN, {"model": {"multipliers": [1]}, "data": {"encoder": {"source": "base"}}}),
        "evaluation": measured("ddim", ode_nll=ODE),
        "needs": {"base": {key: VAE[key] for key in ("model", "loss")}},
    },
    "progressive": {
        **merge(CHAIN, {"loss": {"objective": "progressive", "student_steps": 2, "teacher": {"source": "base"}}}),
        "evaluation": {"nll": None, "fid": {"samples": 20, "sampler": {"kind": "ddim"}}},
        "needs": BASE_CHAIN,
        "search": {"metric": "eval/fd_classifier"},
    },
    "consistency": {
        **merge(CHAIN, {"loss": {"objective": "consistency", "teacher": {"source": "base"}}}),
        "evaluation": measured("consistency", nll=None),
        "needs": BASE_CHAIN,
        "search": {"metric": "eval/fd_classifier"},
    },
}


def make_work_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small.small_blocks(monkeypatch)
    for module in (denoising, studying):
        monkeypatch.setattr(module, "VALIDATION_IMAGES", 8)
    monkeypatch.setattr(denoising, "VALIDATION_TIMESTEPS", 3)
    monkeypatch.setattr(denoising, "SAMPLE_GRID", 8)
    monkeypatch.setattr(features, "EPOCHS", 1)
    monkeypatch.setitem(peak.SIDE, "gpu", 64)  # of the matrices whose product says how fast it is


def measure_all(
    settings: dict[str, Any], root: Path, device: torch.device, watch: Callable[[], Any] = nullcontext
) -> dict[str, dict[str, float]]:
    """What a sweep measures of each of its rows, in this process: its last validation, and its evaluation, which runs
    in the context that `watch` makes."""
    storage, found = Storage(root), dict[str, dict[str, float]]()
    rows, sources, _ = list_trials(pin_starts(experiment(**settings), str(root)))
    starts = find_starting_rows(rows, lambda config: sources[config].digest)
    for row, variant in sorted(rows.items(), key=lambda item: item[0] in starts):
        trial, dataset = variant.trial, prepare(variant.trial.data)
        folders = {slot: name_checkpoints_folder(at) for slot, at in starts.get(row, {}).items()}
        places = {slot: f"{at}/{manifest.name_step(STEPS)}" for slot, at in folders.items()}
        *_, last = train(trial, dataset, storage, name_trial_folder(row), World(device=device), starts=places)
        checkpoint = manifest.find_at_step(storage, name_checkpoints_folder(row), STEPS)
        assert last.state == "finished" and checkpoint
        m = Measurement.of(trial)
        with watch():
            measured = measure(Bench(storage, m, dataset, manifest.choose_weights(checkpoint, m.evaluation), device))
        found[variant.role or "trial"] = {**last.metrics, **measured}
    return found


def measure(bench: Bench) -> dict[str, float]:
    """The metrics of an evaluation, its blocks made here."""
    m, digest = bench.m, bench.checkpoint.digest
    make_all(bench, list_blocks(m, digest, Images.of(bench.dataset)))
    process = load_process(bench.checkpoint) if m.family == DENOISER else Stage.of(bench.checkpoint)
    space = bench.space if m.evaluation.fid else None
    metrics: dict[str, float] = summarise(bench.storage, m, bench.dataset, process, digest, space=space)["metrics"]
    return metrics


def make_all(bench: Bench, blocks: Iterable[Block]) -> None:
    for block in blocks:
        make_all(bench, block.needs)
        make(bench, block)


def measure_there(settings: dict[str, Any], root: Path) -> tuple[dict[str, dict[str, float]], set[Flags]]:
    """The same on the GPU; and how matrices were multiplied in the evaluation."""
    make_work_small(pytest.MonkeyPatch())  # for good: it is a process of its own
    seen = set[Flags]()
    with pretend_gpu() as (device, mode):
        return measure_all(settings, root, device, lambda: mode.watch_products(seen)), seen


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    """Calls in a process that has the GPU."""
    with open_process() as call:
        yield call


def find_refused() -> set[str]:
    """Which of some ways of joining tensors of both devices are refused there."""
    with pretend_gpu() as (gpu, _):
        x, y, two, place = torch.ones(3, device=gpu), torch.ones(3), torch.tensor(2.0), torch.tensor([0])
        ways: dict[str, Callable[[], object]] = {
            "a sum": lambda: x + y,
            "a number of the CPU": lambda: x * two,
            "a number of the GPU": lambda: y * x[0],
            "a list": lambda: torch.cat([x, y]),
            "a place of the CPU": lambda: x[place],
            "a place of the GPU": lambda: y[place.to(gpu)],
            "into the other": lambda: y.add_(x),
            "a copy": lambda: x.cpu() + y,
            "numpy": lambda: np.log(x),
            "a generator": lambda: torch.randn(3, generator=torch.Generator(), device=gpu),
        }
        refused = set()
        for name, way in ways.items():
            try:
                way()
            except (RuntimeError, TypeError):
                refused.add(name)
        return refused


def test_what_cuda_refuses_to_join_is_refused(there: Callable[..., Any]) -> None:
    refused = {"a sum", "a number of the GPU", "a list", "a place of the GPU", "into the other", "numpy", "a generator"}
    assert there(find_refused) == refused


SHORT = ("labels", "learned_range", "edm", "autoencoder", "generator", "latents", "progressive")  # of each family some
RUN = [name if name in SHORT else pytest.param(name, marks=pytest.mark.faults) for name in CASES]


@pytest.mark.parametrize("name", RUN)
def test_a_gpu_computes_what_the_cpu_does(
    there: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In training, validation and evaluation; and the evaluation multiplies in float32 alone, and alike each time."""
    make_work_small(monkeypatch)
    here = measure_all(CASES[name], tmp_path / "here", torch.device("cpu"))
    found, seen = there(measure_there, CASES[name], tmp_path / "there")
    assert found.keys() == here.keys()
    for row, metrics in here.items():
        assert all(math.isfinite(value) for value in metrics.values())
        assert found[row] == pytest.approx(metrics, rel=1e-3, abs=1e-6), row
    assert "convolution" in {flags.name for flags in seen}
    assert all(flags.cudnn and flags.alike and not flags.tf32 for flags in seen), seen
