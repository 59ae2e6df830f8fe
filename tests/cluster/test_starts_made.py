"""A graph of trials: made once and in order, resumed after a kill to the same bits, and failing with its reason."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Started, run, statuses, sweep
from mlflow import MlflowClient

from orchestrator.experiment.load import load
from orchestrator.origins import pin_starts
from orchestrator.state.events import read_events
from orchestrator.sweep import list_trials
from workers.data.dataset import prepare
from workers.layout import get_trial_of_row, name_checkpoints_folder
from workers.network import manifest
from workers.storage import Storage
from workers.training import train
from workers.warm_start import INIT, TRUNK

pytestmark = pytest.mark.faults

# A base, which two widths of a cooldown fine-tune: base -> trunk -> three branches.
GRAPH = """
name: graph
data: {source: digits}
model: {channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 50, schedule: {kind: linear, scale: per_1000}}
training:
  {steps: 60, cooldown: 10, batch_size: 32, lr: 2.0e-3, ema: 0.9, precision: float32, validate_every: 60,
   checkpoint_every: 20, init: {source: base, weights: raw}}
evaluation: {nll: {images: 30, timesteps: all}, fid: null}
needs:
  base: {training.steps: 200, training.cooldown: 0, diffusion.T: 40}
search: {space: {training.steps: {grid: [30, 60, 90]}}}
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (file := tmp_path / "graph.yaml").write_text(GRAPH)
    return file


def digests(storage: Path, trial: str) -> dict[int, str]:
    place, folder = Storage(storage), name_checkpoints_folder(trial)
    found = [manifest.open_committed(place, f"{folder}/{name}") for name in place.list(folder)]
    return {checkpoint.step or 0: checkpoint.digest for checkpoint in found}


def test_a_graph_that_is_cut_off_ends_in_the_same_bits(graph: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    arguments = (graph, "--storage", storage)
    started = Started(*arguments)
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        started.kill()
    finally:
        started.end()
    resumed = sweep(*arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rows = list_trials(pin_starts(load(graph), str(storage)))[0]
    base, *trunks = [row for row, variant in rows.items() if variant.role]
    branches = [row for row, variant in rows.items() if not variant.role]
    [trunk] = {get_trial_of_row(row) for row in trunks}
    assert [event["trial"] for event in read_events(Storage(storage), "graph") if event["event"] == "trained"]
    # The same by itself: the base, and each branch from it in one go.
    torch.set_num_threads(rows[base].trial.training.cpus)  # as in a sweep: other sums have other bits
    plain, dataset = Storage(tmp_path / "plain"), prepare(rows[base].trial.data)
    list(train(rows[base].trial, dataset, plain, "base"))
    place = f"base/checkpoints/{manifest.name_step(200)}"
    assert digests(storage, base)[200] == manifest.open_committed(plain, place).digest
    alone = rows[branches[-1]].trial
    whole = alone.model_copy(update={"training": alone.training.model_copy(update={"cooldown": 0, "steps": 80})})
    list(train(whole, dataset, plain, "trunk", starts={INIT: place}, also_keep=(20, 50)))
    assert list(digests(storage, trunk)) == [20, 50, 80]
    for row, step in zip(branches, (20, 50, 80), strict=True):
        trial, end = rows[row].trial, rows[row].trial.training.steps
        list(train(trial, dataset, plain, f"{end}", starts={TRUNK: f"trunk/checkpoints/{manifest.name_step(step)}"}))
        newest = manifest.find_newest(plain, f"{end}/checkpoints")
        assert newest and digests(storage, row)[end] == newest.digest
    frame = pd.read_parquet(storage / "sweeps/graph/results.parquet")
    assert sorted(frame["trial"]) == sorted(branches) and set(frame["state"]) == {"done"}
    found = json.loads(run("orchestrator.status", "graph", "--json", "--storage", storage).stdout)["sweeps"][0]
    assert found["starts"] == {trunk: {INIT: base} for trunk in trunks} | {
        branch: {TRUNK: trunk} for branch, trunk in zip(branches, trunks, strict=True)
    }
    assert "What starts from what" in (storage / "sweeps/graph/report.html").read_text()
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("graph")
    assert experiment
    tags = [told.data.tags for told in client.search_runs([experiment.experiment_id])]
    assert {tag["trial.starts_from.init"] for tag in tags if "trial.starts_from.init" in tag} == {base}
    assert {tag["trial.starts_from.trunk"] for tag in tags if "trial.starts_from.trunk" in tag} == {*trunks}
    again = sweep(*arguments)
    assert again.returncode == 0 and "train " not in again.stdout


def test_a_start_that_diverges_fails_those_that_need_it_and_no_other(graph: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    arguments = (
        graph, "--storage", storage, "needs={base: {training.steps: 20, training.cooldown: 0, training.lr: 1.0e+30}}",
        "search.space={training.init: {grid: [null, {source: base}]}}", "training.cooldown=0", "training.steps=10",
    )  # fmt: skip
    for _ in range(2):  # the second time nothing is trained, and the reason is told again
        ended = sweep(*arguments)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        frame = pd.read_parquet(storage / "sweeps/graph/results.parquet")
        assert sorted(frame["state"]) == ["done", "failed"]
        assert "it starts from" in ended.stdout and "diverged by step" in ended.stdout
    assert sorted(status["state"] for status in statuses(storage).values()) == ["diverged", "finished"]
