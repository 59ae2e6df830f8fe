"""What a step of training is made of, as functions: which images, which share of them, which rate, which precision."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workers.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainingConfig,
    Trial,
)
from workers.data.dataset import prepare
from workers.learner import Learner, choose_autocast, compute_learning_rate, draw_batch_rows
from workers.noise import make_generator
from workers.world import World, take_share


def test_every_epoch_holds_every_image_once() -> None:
    n, batch_size = 23, 5
    rows = np.concatenate([draw_batch_rows(3, step, batch_size, n, {}) for step in range(n)])
    for epoch in rows.reshape(-1, n):
        assert sorted(epoch) == list(range(n))
    assert not np.array_equal(rows[:n], rows[n : 2 * n])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 90, 127, 128])
def test_a_batch_may_hold_many_epochs(n: int) -> None:
    """Whatever permutations are kept, the rows are those of one step by itself; a loop keeps only those in use."""
    kept: dict[int, np.ndarray] = {}
    steps = [draw_batch_rows(3, step, 128, n, kept) for step in range(n)]
    assert all(np.array_equal(rows, draw_batch_rows(3, step, 128, n, {})) for step, rows in enumerate(steps))
    assert (np.bincount(np.concatenate(steps), minlength=n) == 128).all(), "every image as often"
    assert len(kept) <= 128 // n + 2


def test_the_shares_of_all_workers_are_the_whole_in_order() -> None:
    items = list(range(8))
    for size in (1, 2, 4, 8):
        assert [x for rank in range(size) for x in take_share(items, World(rank, size))] == items


def test_learning_rate_warms_up_and_decays() -> None:
    training = TrainingConfig(steps=100, lr=1.0, warmup=10)
    assert [compute_learning_rate(training, s) for s in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = training.model_copy(update={"decay": "cosine"})
    assert compute_learning_rate(cosine, 50) == pytest.approx(0.5)
    assert compute_learning_rate(cosine, 99) < 0.001


@pytest.mark.parametrize(
    ("amx", "avx512", "channels", "prediction", "is_bf16"),
    [
        (True, False, 32, "eps", True),
        (False, True, 32, "eps", True),
        (False, False, 32, "eps", False),
        (True, True, 31, "eps", False),
        (True, True, 32, "mu", False),
    ],
)
def test_auto_takes_bf16_where_the_processor_has_it_and_it_pays(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, channels: int, prediction: str, is_bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    trial = Trial(
        data=DataConfig(source="digits"), model=ModelConfig(channels=channels), training=TrainingConfig(steps=1),
        diffusion=DiffusionConfig(prediction=prediction),
    )  # fmt: skip
    with choose_autocast(trial, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == is_bf16


META = torch.device("meta")  # computes nothing, so that whatever asks it for a value fails


class OnMeta(torch.Generator):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return META


class Sent(TorchDispatchMode):
    """Notes what is copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        at, to = getattr(args[0], "device", None) if args else None, kwargs.get("device")
        if at and to and to != at and "_like" not in str(function):
            self.copies.append(f"{function}: {tuple(args[0].shape)} from {at} to {to}")
        return function(*args, **kwargs)


@pytest.mark.parametrize("timesteps", ["uniform", "stratified", "antithetic"])
def test_no_step_waits_for_its_device(monkeypatch: pytest.MonkeyPatch, timesteps: str) -> None:
    """It reads nothing of what the device computes, and sends it images and labels by `send` alone, which does not
    wait."""
    trial = Trial.model_validate(
        {
            "data": {"source": "digits", "flip": True},
            "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "labels": True},
            "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}},
            "training": {"steps": 2, "batch_size": 16, "timesteps": timesteps, "label_dropout": 0.2, "averages": [0.5]},
        }
    )
    sent: list[tuple[int, ...]] = []

    def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(tuple(values.shape))
        return torch.empty_like(values, device=device)

    def generator(*words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        return OnMeta() if device == META else make_generator(*words)

    adam = torch.optim.Adam
    for module in ("lessons", "denoising"):
        monkeypatch.setattr(f"workers.{module}.send", send)
    for module in ("learner", "denoising", "lessons"):
        monkeypatch.setattr(f"workers.{module}.make_generator", generator)
    monkeypatch.setattr("workers.learner.choose_autocast", lambda *_: nullcontext())
    monkeypatch.setattr("torch.optim.Adam", lambda weights, lr, fused: adam(weights, lr=lr, foreach=True))
    learner = Learner(trial, prepare(trial.data), World(device=META))
    learner.begin()
    sent.clear()
    with Sent() as found:
        learner.train_step()
        learner.train_step()
    assert learner.step == 2 and learner.sums.device == META
    assert found.copies == [] and sent == [(16, 8, 8, 1), (16,)] * 2
