"""Two sweeps that share trials: each is trained once, by the sweep that holds it, and the other takes it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Started, statuses, trials_of, undisturbed
from rich.console import Console

from orchestrator.execution.measurements import measure
from orchestrator.experiment.load import load
from orchestrator.measuring import subjects
from orchestrator.output.terminal import Display
from orchestrator.standing import Standing
from orchestrator.state.events import read_events
from orchestrator.state.saved import keep_sweep
from orchestrator.sweep import list_trials as rows_of
from workers.locks import lock
from workers.storage import Storage


def happened(storage: Path, name: str, event: str) -> list[str]:
    return [e["trial"] for e in read_events(Storage(storage), name) if e["event"] == event]


def leftovers(storage: Path) -> list[Path]:
    return [*storage.rglob("*.tmp"), *storage.glob("locks/*")]


@pytest.mark.faults
def test_two_sweeps_of_the_same_trials_train_each_once(tiny: Path, tmp_path: Path) -> None:
    """They start in the same moment, and in the same order."""
    storage = tmp_path / "runs"
    words = ("--storage", storage, "training.steps=200", "training.validate_every=100", "training.checkpoint_every=10")
    both = [Started(tiny, *words, f"name={name}") for name in ("one", "two")]
    try:
        for started in both:
            assert started.process.wait(timeout=600) == 0, started.read_output()
            assert "Traceback" not in started.read_output(), started.read_output()
    finally:
        for started in both:
            started.end()
    trials = trials_of(tiny, *words[2:])
    frames = [pd.read_parquet(storage / f"sweeps/{name}/results.parquet") for name in ("one", "two")]
    for frame in frames:
        assert list(frame["state"]) == ["done", "done"] and set(frame["trial"]) == set(trials)
    assert list(frames[0]["eval/nll_bpd"]) == list(frames[1]["eval/nll_bpd"])
    assert any("was trained by" in started.read_output() or "waits for it" in started.read_output() for started in both)
    for digest, trial in trials.items():
        assert statuses(storage)[digest]["checkpoint"] == undisturbed(trial, tmp_path / "plain")
    assert leftovers(storage) == []


@pytest.mark.faults
def test_a_sweep_takes_over_what_another_one_leaves(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    words = ("--storage", storage, "search.space={}", "training.steps=600", "training.validate_every=100",
             "training.checkpoint_every=20")  # fmt: skip
    one = Started(tiny, *words, "name=one")
    two: Any = None
    try:
        one.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        two = Started(tiny, *words, "name=two")
        two.wait_until(lambda: "(sweep one); waits for it" in two.read_output())
        one.end()
        assert two.process.wait(timeout=600) == 0, two.read_output()
        assert "it is trained here" in two.read_output() and "Traceback" not in two.read_output()
    finally:
        for started in filter(None, (one, two)):
            started.end()
    [(digest, trial)] = trials_of(tiny, *words[2:]).items()
    assert happened(storage, "two", "began") == [digest] and happened(storage, "two", "waits") == [digest]
    assert statuses(storage)[digest]["checkpoint"] == undisturbed(trial, tmp_path / "plain")
    assert leftovers(storage) == []


@pytest.mark.faults
def test_a_checkpoint_that_its_training_removes_is_measured_at_a_later_step(own: tuple[Path, Path]) -> None:
    """As where `evaluate` finds a checkpoint of a trial that trains, and the next one is written before it is read."""
    storage = Storage(own[1])
    trial = storage.list("trials")[0]
    [subject] = subjects.find(trial, storage, ["seed=1", "evaluation.fid=null"], None)
    gone = f"trials/{trial}/checkpoints/step-00000010"
    old = replace(subject, checkpoint=replace(subject.checkpoint, path=gone, step=10, digest="0" * 16))
    sources, _ = subjects.check([subject])
    [found] = measure([old], sources, storage, display=Display({}, Console(quiet=True), quiet=True), ray_address=None)
    assert not found.failed and found.summary and found.subject.checkpoint == subject.checkpoint
    assert found.summary["passports"]["nll"]["subject"]["checkpoint"] == subject.checkpoint.digest


def test_fresh_keeps_what_another_sweep_has_or_trains(own: tuple[Path, Path], capsys: Any) -> None:
    file, storage = own[0], Storage(own[1])

    def forget(*overrides: str) -> list[str]:
        experiment = load(file, overrides)
        trials, sources, _ = rows_of(experiment)
        standing = Standing(experiment, dict(sources), storage, print)
        standing.add(trials)
        standing.forget()
        return storage.list("trials")

    before = storage.list("trials")
    other = load(file, ["name=other", "search.space.loss.weighting.grid=[vlb]"])
    trials, sources, _ = rows_of(other)
    keep_sweep(storage, other, trials, sources)
    [shared] = trials
    assert forget() == [shared]
    assert (
        f"keeps {shared[:8]}: other sweeps share it" in (message := capsys.readouterr().out)
        and "sweeps/other" in message
    )
    shutil.rmtree(own[1] / "sweeps/other")
    with lock(storage, f"locks/{shared}", "sweep other"):
        assert forget() == [shared]
        assert "it is being trained by process" in capsys.readouterr().out
    assert forget() == [] and len(before) == 2
