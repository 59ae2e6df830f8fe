"""Trials of several workers under Ray Train: an early stop gives the cores back, a killed worker is replaced."""

import os
import signal
from pathlib import Path

from conftest import Started, sweep
from test_sweep import _title, state_of

TWO = ["training.workers=2", "search.max_concurrent=1", "evaluation={nll: {images: 25}, fid: null}"]


def test_an_early_stop_gives_the_cores_back_to_the_trials_that_follow(tiny: Path, tmp_path: Path) -> None:
    result = sweep(
        tiny, "--storage", tmp_path / "runs", *TWO, "search.space.loss.weighting=null",
        "search.space.training.lr.grid=[4.0e-3, 1.0e-6, 2.0e-3]", "search.metric=valid/nll_bpd",
        "search.scheduler={kind: asha, grace: 20, reduction: 2}", "training.steps=60", "training.validate_every=20",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    states = [state for state, _ in state_of(tmp_path / "runs").values()]
    assert states.count("pruned") >= 1 and states.count("finished") >= 1, states


def test_a_killed_worker_of_a_group_is_replaced_from_the_last_checkpoint(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    started = Started(
        tiny, "--storage", storage, *TWO, "search.space={}", "training.steps=600", "training.validate_every=200"
    )
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        [victim, *_] = [pid for pid in started.family() if "RayTrainWorker" in _title(pid)]
        os.kill(victim, signal.SIGKILL)
        assert started.process.wait(timeout=300) == 0
        assert set(state_of(storage).values()) == {("finished", 600)}
    finally:
        started.end()
