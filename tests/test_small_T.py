"""Chains of one, two or three steps are chains: whatever is measured of others is measured of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_evaluation import CONFIG, CPU, DATASET, SPACE, blocks_of, make_all, small_blocks

from orchestrator import sample
from orchestrator.measuring.subjects import Subject
from workers.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    NLLConfig,
    ODENLLConfig,
    SamplerConfig,
    ScheduleConfig,
)
from workers.data import dataset as data
from workers.diffusion.process import Process
from workers.evaluation.make import Bench
from workers.evaluation.summary import summarise
from workers.kinds import SAMPLERS, SCHEDULES
from workers.network import checkpoint as checkpoints
from workers.network.unet import UNet
from workers.noise import make_generator
from workers.seals import seal_bytes
from workers.storage import Storage


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def measured(
    root: Path, diffusion: DiffusionConfig, sampler: SamplerConfig, ode: bool = False
) -> tuple[Subject, dict[str, Any]]:
    """A checkpoint of such a chain, and its summary."""
    storage, process = Storage(root), Process.of(diffusion)
    config = {**CONFIG, "out_channels": 2} if diffusion.learned else CONFIG
    unet = UNet(config, make_generator("unet"))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=make_generator("conv_out"))
    folder = "trials/a/checkpoints"
    checkpoint = checkpoints.save(
        storage,
        folder,
        checkpoints.Snapshot(
            step=1, unet_config=config, process=process, ema=unet.state_dict(), prediction=diffusion.prediction
        ),
    )
    path = "references/d1-classifier.npz"
    storage.write(path, seal_bytes(SPACE.to_bytes(), path))
    evaluation = EvaluationConfig(
        nll=NLLConfig(), fid=FIDConfig(samples=15, sampler=sampler), ode_nll=ODENLLConfig(images=2) if ode else None
    )
    m = Measurement(data=DataConfig(source="digits"), T=diffusion.T, evaluation=evaluation)
    bench = Bench(storage, m, DATASET, checkpoint, CPU)
    make_all(bench, blocks_of(bench))
    summary = summarise(storage, m, DATASET, process, checkpoint.digest, space=bench.space)
    return Subject("a", m, checkpoint), summary


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("kind", [kind for kind, entry in SAMPLERS.items() if entry.suits(continuous=False)])
def test_every_sampler_draws_and_the_bound_adds_up(tmp_path: Path, kind: Any, T: int) -> None:
    chain = DiffusionConfig(T=T, schedule=ScheduleConfig(beta_start=0.3, beta_end=0.9))
    _, summary = measured(tmp_path, chain, SamplerConfig(kind=kind), ode=kind == "ode")
    assert all(map(math.isfinite, summary["metrics"].values()))
    assert len(summary["nll_by_t"]) == T + 1
    assert ("sigma_1^2" in summary["passports"]["nll"]["subject"]) == (T == 1)
    assert sum(summary["nll_by_t"]) == pytest.approx(summary["metrics"]["eval/nll_bpd"])
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_step_of_every_schedule_and_variance_is_measured_and_drawn(
    tmp_path: Path, kind: Any, variance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    betas = (0.9,) if kind == "list" else None
    schedule = ScheduleConfig(kind=kind, betas=betas, beta_start=0.3, beta_end=0.9)
    chain = DiffusionConfig(T=1, schedule=schedule, prediction="x_0", variance=variance)
    subject, summary = measured(tmp_path, chain, SamplerConfig())
    assert all(map(math.isfinite, summary["metrics"].values()))
    if variance == "fixed_small":
        monkeypatch.setattr(data, "prepare", lambda config: DATASET)
        pictures = sample.make_pictures(Storage(tmp_path), subject, 4, (0, 1), [1])
        assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_a_schedule_that_ends_without_any_signal_is_loaded_again(tmp_path: Path) -> None:
    """jsd ends at beta_T = 1: what does not predict eps is measured there."""
    chain = DiffusionConfig(T=5, schedule=ScheduleConfig(kind="jsd"), prediction="v")
    subject, summary = measured(tmp_path, chain, SamplerConfig(kind="ddim"))
    assert checkpoints.load_process(subject.checkpoint).beta[-1] == 1
    assert all(map(math.isfinite, summary["metrics"].values()))
