"""Trials of several workers under Ray Train: an early stop gives the cores back, a killed worker is replaced."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Started, state_of, statuses, sweep, title, trials_of, undisturbed

pytestmark = pytest.mark.faults
TWO = ["training.workers=2", "search.max_concurrent=1", "evaluation={nll: {images: 25}, fid: null}"]


def test_an_early_stop_gives_the_cores_back_to_the_trials_that_follow_of_whatever_size(
    tiny: Path, tmp_path: Path
) -> None:
    result = sweep(
        tiny, "--storage", tmp_path / "runs", *TWO[1:], "search.space.loss.weighting=null",
        "search.space.training.grid=[{lr: 2.0e-3}, {lr: 4.0e-3, workers: 2}, {lr: 1.0e-6, workers: 2}]",
        "search.metric=valid/nll_bpd",
        "search.scheduler={kind: asha, grace: 20, reduction: 2}", "training.steps=60", "training.validate_every=20",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    states = [state for state, _ in state_of(tmp_path / "runs").values()]
    trained = [line for line in result.stdout.splitlines() if "  training  " in line]
    assert "lr=0.004 workers=2" in trained[0] and "lr=0.002" in trained[-1]  # the bigger ones came first
    assert states.count("pruned") >= 1 and states.count("finished") >= 1, states


def test_two_workers_one_of_them_killed_end_where_plain_python_does(tiny: Path, tmp_path: Path) -> None:
    """The same digest, hosted by Ray Train with two workers over gloo; the group is replaced from its last checkpoint.

    Losses and bounds are equal up to rounding.
    """
    storage = tmp_path / "runs"
    settings = [*TWO, "search.space={}", "training.steps=200", "training.validate_every=100",
                "training.checkpoint_every=50"]  # fmt: skip
    started = Started(tiny, "--storage", storage, *settings)
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        [victim, *_] = [pid for pid in started.family() if "RayTrainWorker" in title(pid)]
        os.kill(victim, signal.SIGKILL)
        assert started.process.wait(timeout=600) == 0, started.read_output()
    finally:
        started.end()
    [(digest, trial)] = trials_of(tiny, *settings).items()
    assert state_of(storage) == {digest: ("finished", trial.training.steps)}
    undisturbed(trial, tmp_path / "plain")
    ours = _metrics(storage / f"trials/{digest}/journal.jsonl")
    theirs = _metrics(tmp_path / "plain/simple/journal.jsonl")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_trials_of_one_size_are_trained_by_the_same_workers_until_one_dies(tiny: Path, tmp_path: Path) -> None:
    """Ray Train's start, many seconds, is taken once. A death costs its trial the steps since the checkpoint alone."""
    storage = tmp_path / "runs"
    settings = [*TWO, "training.steps=60", "training.validate_every=20", "training.checkpoint_every=10",
                "search.space={training.lr: {grid: [1.0e-3, 2.0e-3, 3.0e-3]}}"]  # fmt: skip
    started = Started(tiny, "--storage", storage, *settings)
    groups: dict[str, set[int]] = {}
    before: dict[str, bytes] = {}

    def look() -> str:
        """Notes who trains, and returns the trial."""
        time.sleep(0.5)  # to look at all processes takes a core
        running = [id for id, status in statuses(storage).items() if status["state"] == "running"]
        if len(running) == 1:
            workers = {pid for pid in started.family() if "RayTrainWorker" in title(pid)}
            groups.setdefault(running[0], set()).update(workers)
        return running[0] if len(running) == 1 else ""

    def read_files(trial: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (storage / "trials" / trial).glob("*") if file.is_file()}

    def is_in_the_second() -> bool:
        trial = look()
        return len(groups) == 2 and any((storage / f"trials/{trial}").glob("checkpoints/step-*10/manifest.json"))

    try:
        started.wait_until(is_in_the_second)
        first, second = groups
        before = read_files(first)
        assert groups[first] == groups[second] and len(groups[first]) == 2
        os.kill(min(groups[second]), signal.SIGKILL)
        started.wait_until(lambda: bool(look()) and len(groups) == 3 and len(groups[look() or second]) >= 2)
        assert started.process.wait(timeout=600) == 0, started.read_output()
    finally:
        started.end()
    _, _, third = groups
    assert len(groups[second]) > 2 and not groups[third] & groups[second], groups
    assert read_files(first) == before
    trials = trials_of(tiny, *settings)
    assert state_of(storage) == {id: ("finished", trial.training.steps) for id, trial in trials.items()}
    assert started.read_output().count("died") == 1, started.read_output()


def _metrics(journal: Path) -> dict[tuple[int, str], float]:
    points = map(json.loads, journal.read_text().splitlines())
    pairs = ((p["step"], n, v) for p in points for n, v in p.get("metrics", {}).items())
    return {(step, name): value for step, name, value in pairs if name != "train/images_per_s"}
