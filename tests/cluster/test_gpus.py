"""Trials that share a GPU: a sweep on a real Ray, whose one GPU is a logical one, as the machine has none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, environment

pytestmark = pytest.mark.clusters

# The sweep command within a session of Ray that has a GPU.
COMMAND = """
import os, sys
import ray
from orchestrator.execution.local_ray import QUIET, WORKERS
os.environ.update(QUIET | WORKERS)
ray.init("local", num_cpus=6, num_gpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
from orchestrator.sweep import main
sys.exit(main(sys.argv[1:]))
"""
FOUR = TINY.replace("grid: [simple, vlb]", "grid: [simple, vlb, snr, p2]")


def sweep_on_one_gpu(tmp_path: Path, in_each_process: str, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """(events, output) of a sweep of four trials; `in_each_process` is what every Python process does first."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(in_each_process)
    (tmp_path / "four.yaml").write_text(FOUR)
    arguments = [tmp_path / "four.yaml", "--storage", tmp_path / "runs", *overrides]
    python_path = f"{tmp_path / 'python'}:{ROOT}"
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        env={**environment(""), "PYTHONPATH": python_path},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / "runs/sweeps/tiny/events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], run.stdout


def named(events: list[dict[str, Any]], *names: str) -> list[tuple[str, str]]:
    return [(event["event"], event["trial"]) for event in events if event.get("event") in names]


@pytest.mark.parametrize("gpus", ["1", "0.25"])
def test_on_one_gpu_the_first_trial_is_measured_before_the_last_one_begins(gpus: str, tmp_path: Path) -> None:
    events, _ = sweep_on_one_gpu(tmp_path, "", f"training.gpus={gpus}")
    happened = [name for name, _ in named(events, "began", "measured")]
    assert happened.count("began") == happened.count("measured") == 4
    last_began = len(happened) - 1 - happened[::-1].index("began")
    assert happened.index("measured") < last_began
    first = 1 if gpus == "1" else 3  # so many at once: a block of evaluation has room beside three quarters
    assert happened[: first + 1] == ["began"] * first + ["measured"]
    assert {event["gpus"] for event in events if event.get("event") == "began"} == {float(gpus)}


def test_trials_that_take_turns_with_evaluation_are_pruned_against_each_other(tmp_path: Path) -> None:
    """Tune's run ends at each turn; what its scheduler knows of the trials before stays."""
    events, _ = sweep_on_one_gpu(
        tmp_path, "", "training.gpus=1", "search.scheduler={kind: asha, grace: 10, reduction: 2}"
    )
    states = [event["state"] for event in events if event.get("event") == "trained"]
    assert len(states) == 4 and states[0] == "finished" and "pruned" in states


# The first backward pass of a process that Ray gave a part of a GPU raises what CUDA's allocator does, once in all.
OUT_OF_MEMORY = """
import os, pathlib
FIRST = pathlib.Path({first!r})

def patch():
    import torch
    backward = torch.Tensor.backward
    def once(*arguments, **named):
        try:
            FIRST.touch(exist_ok=False)
        except FileExistsError:
            return backward(*arguments, **named)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
    torch.Tensor.backward = once

import importlib.abc, sys

class AfterHosts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "workers.training":
            sys.meta_path.remove(self)
            patch()

sys.meta_path.insert(0, AfterHosts())
"""


def test_a_trial_that_runs_out_of_memory_beside_others_goes_on_with_twice_the_part(tmp_path: Path) -> None:
    events, output = sweep_on_one_gpu(
        tmp_path, OUT_OF_MEMORY.format(first=str(tmp_path / "first")), "training.gpus=0.25"
    )
    [again] = [event for event in events if event.get("event") == "restarted"]
    assert again["why"] == "ran out of GPU memory beside others; goes on with half a GPU"
    assert f"{again['trial'][:8]}  ran out of GPU memory beside others; goes on with half a GPU" in output
    began = [event["gpus"] for event in events if event.get("event") == "began" and event["trial"] == again["trial"]]
    assert began == [0.25, 0.5]
    assert len(named(events, "measured")) == 4 and not named(events, "failed")


def test_out_of_memory_with_a_whole_gpu_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="OutOfMemoryError: CUDA out of memory"):
        sweep_on_one_gpu(tmp_path, OUT_OF_MEMORY.format(first=str(tmp_path / "first")), "training.gpus=1")


# As on a GPU of which a trial of this kind takes 0.2 of the memory, and 0.3 of the time.
MEASURED = """
import workers.sharing
workers.sharing.read_peak_memory = lambda device: (2**30, 10 * 2**30)
workers.sharing.read_utilisation = lambda device: 0.3
"""


def test_auto_measures_the_first_trial_and_packs_the_others(tmp_path: Path) -> None:
    events, output = sweep_on_one_gpu(tmp_path, MEASURED, "training.steps=40", "training.gpus=auto")
    began = [(event["trial"], event["gpus"]) for event in events if event.get("event") == "began"]
    first = began[0][0]
    assert began[0] == (first, 1) and [gpus for _, gpus in began[1:]] == [0.3333] * 4
    names = [(name, trial) for name, trial in named(events, "began", "resized", "measured")]
    assert names[:2] == [("began", first), ("resized", first)], "the others wait for no more than the measuring"
    assert {name for name, _ in names[2:5]} == {"began"}, "three at once"
    assert f"{first[:8]}  needs a third of a GPU, as its first steps show" in output
    [note] = (tmp_path / "runs/shares").glob("*.json")
    [noted] = [value for value in json.loads(note.read_text()).values() if isinstance(value, dict)]
    assert noted["share"] == 0.3333 and noted["use"] == pytest.approx(0.3) and noted["said_by"] == first[:8]


def test_auto_knows_from_an_earlier_sweep_and_corrects_what_was_too_little(tmp_path: Path) -> None:
    sweep_on_one_gpu(tmp_path, MEASURED, "training.steps=40", "seed=1")
    (tmp_path / "python/sitecustomize.py").unlink()
    (tmp_path / "python").rmdir()
    events, _ = sweep_on_one_gpu(tmp_path, OUT_OF_MEMORY.format(first=str(tmp_path / "first")), "--fresh")
    began = [event["gpus"] for event in events if event.get("event") == "began"]
    assert began[0] == 0.3333 and 0.6666 in began and not named(events, "resized", "failed")
    [note] = (tmp_path / "runs/shares").glob("*.json")
    [noted] = [value for value in json.loads(note.read_text()).values() if isinstance(value, dict)]
    assert noted["share"] == 0.6666 and noted["corrected"]
