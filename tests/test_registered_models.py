"""What a sweep registers in MLflow: once, noticed where it goes, and given back by a server."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import saved_model
import small_evaluation as small
from click.testing import CliRunner
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.cli import gc
from mlflow_server import Server
from saved_model import asked, candidate

from orchestrator.tracking import models
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.server import make_database
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import ComparisonView
from workers.config import FIDConfig, SamplerConfig
from workers.data.cache import find_default_cache
from workers.storage import Storage

nowhere_else = saved_model.nowhere_else
saved = saved_model.saved
loaded = saved_model.loaded


def register(storage: Storage, *wanted: Candidate, uri: str | None = None) -> MlflowClient:
    """As a sweep does it, through the line of calls."""
    tracker = Tracker(storage, "registered", uri)
    tracker.open_sweep({}, {})
    for one in wanted:
        tracker.open_trial(one.trial, one.trial, {}, {})
        tracker.register(one)
    left = tracker.flush(120)
    assert left.complete, str(left)
    return MlflowClient(tracker.uri)


def versions(client: MlflowClient) -> dict[str, str]:
    return {str(v.version): v.tags["orchestrator.trial"] for v in client.search_model_versions("name = 'registered'")}


def test_a_checkpoint_is_registered_once_and_the_best_is_the_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    first, better = candidate(storage, "a"), candidate(storage, "b")
    with monkeypatch.context() as patched:  # a server that dies before it has all of the model: it is made again, whole
        upload, answers = MlflowClient.log_model_artifacts, iter(["dies"])

        def dies_once(self: MlflowClient, *arguments: Any, **named: Any) -> None:
            if next(answers, ""):
                raise mlflow.MlflowException("timed out")
            upload(self, *arguments, **named)

        patched.setattr(MlflowClient, "log_model_artifacts", dies_once)
        client = register(storage, first)
    assert versions(client) == {"1": "a"}
    client = register(storage, first)
    assert versions(client) == {"1": "a"}
    client = register(storage, better)
    assert versions(client) == {"1": "a", "2": "b"}
    assert client.get_model_version_by_alias("registered", "candidate").tags == {
        "orchestrator.trial": "b",
        "orchestrator.checkpoint": better.checkpoint.digest,
        "orchestrator.path": "trials/b/checkpoints/step-00000001",
        "orchestrator.storage": client.get_model_version("registered", "2").tags["orchestrator.storage"],
        "orchestrator.draws": better.draws,
    }
    register(storage, first)
    assert versions(client) == {"1": "a", "2": "b"}
    assert client.get_model_version_by_alias("registered", "candidate").tags["orchestrator.trial"] == "a"
    experiment = client.get_experiment_by_name("registered")
    assert len(client.search_logged_models([experiment.experiment_id])) == 2

    # Another row of the same trial, which differs in its sampler alone, becomes the best: what is drawn is as it says.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    before = mlflow.pyfunc.load_model("models:/registered@candidate").predict(asked(n=2, seed=0))
    assert before.shape == (2, small.SIDE, small.SIDE, 1)
    other = replace(first, fid=FIDConfig(sampler=SamplerConfig(kind="ddim", steps=7)))
    register(storage, other)
    assert versions(client) == {"1": "a", "2": "b", "3": "a"}
    model = mlflow.pyfunc.load_model("models:/registered@candidate")
    images = model.predict(asked(n=2, seed=0))
    assert np.array_equal(images, model.predict(asked(n=2, seed=0, sampler="ddim", steps=7)))
    names = {"mlflow": mlflow, "pandas": pd}
    exec(shown("registered"), names)  # the lines on the page of the model
    assert np.array_equal(names["images"], model.predict(asked(n=16, seed=0)))
    assert not np.array_equal(images, before)
    register(storage, first)  # and back: its version is there
    assert len(versions(client)) == 3
    assert client.get_registered_model("registered").aliases == {"candidate": 1}


def once(storage: Storage, name: str, uri: str | None = None) -> Tracker:
    """A sweep of one trial with two points and a registered model, all of it shipped."""
    storage.write(
        "trials/a/journal.jsonl",
        b'{"step": 1, "time_ms": 1764000000000, "metrics": {"valid/nll_bpd": 3.5}}\n'
        b'{"step": 2, "time_ms": 1764000000001, "metrics": {"valid/nll_bpd": 3.0}}\n',
    )
    tracker = Tracker(storage, name, uri)
    tracker.open_sweep({}, {}, compare=ComparisonView(params=("T",), metrics=("valid/nll_bpd",)))
    tracker.log_artifact(None, b"a: 1", "experiment.yaml")
    tracker.open_trial("a", "a", {"T": 5}, {})
    tracker.log_artifact("a", b"b: 2", "trial.yaml")
    tracker.register(candidate(storage))
    tracker.close_trial("a", "FINISHED")
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert left.complete, str(left)
    return tracker


class Lost:
    """Ways in which what was shipped can go; `gc` is MLflow's own command, which empties its bin."""

    def __init__(self, tracker: Tracker) -> None:
        self.uri, self.name, self.client = tracker.uri, tracker.name, MlflowClient(tracker.uri, tracker.uri)
        self.root = Path(tracker.storage.root)
        self.experiment = self.client.get_experiment_by_name(tracker.name)
        runs = self.client.search_runs([self.experiment.experiment_id])
        self.runs = {run.data.tags["orchestrator.row"]: run.info.run_id for run in runs}

    def gc(self, *arguments: str) -> None:
        result = CliRunner().invoke(
            gc, ["--backend-store-uri", self.uri, *arguments], env={"MLFLOW_TRACKING_URI": self.uri}
        )
        assert result.exit_code == 0, result.output

    def a_run(self) -> None:
        self.client.delete_run(self.runs["a"])

    def the_sweeps_run(self) -> None:
        self.client.delete_run(self.runs["sweep"])

    def the_end_of_a_run(self) -> None:
        self.client.update_run(self.runs["a"], status="RUNNING")

    def a_run_for_good(self) -> None:
        self.a_run()
        self.gc("--run-ids", self.runs["a"])

    def the_experiment(self) -> None:
        self.client.delete_experiment(self.experiment.experiment_id)

    def the_experiment_for_good(self) -> None:
        self.the_experiment()
        self.gc("--experiment-ids", self.experiment.experiment_id)

    def the_comparison(self) -> None:
        for key in self.experiment.tags:
            self.client.delete_experiment_tag(self.experiment.experiment_id, key)

    def the_registered_model(self) -> None:
        self.client.delete_registered_model(self.name)

    def its_version(self) -> None:
        self.client.delete_model_version(self.name, "1")

    def its_alias(self) -> None:
        self.client.delete_registered_model_alias(self.name, "candidate")

    def its_files(self) -> None:
        [model] = self.client.search_logged_models([self.experiment.experiment_id])
        shutil.rmtree(model.artifact_location.removeprefix("file://"))

    def all_files(self) -> None:
        shutil.rmtree(self.root / "mlartifacts")

    def the_database(self) -> None:
        (self.root / "mlflow.db").unlink()

    def another_database(self) -> None:
        self.the_database()
        make_database(self.root / "mlflow.db", find_default_cache())
        MlflowClient(self.uri).create_experiment("of somebody else")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("way", [way for way in vars(Lost) if not way.startswith("_") and way != "gc"])
def test_what_goes_in_mlflow_is_noticed_and_made_again(
    shared: Storage, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = once(shared, way)
    model = candidate(shared)
    seen = Tracker(shared, way)
    assert not seen.is_missing(["a"], model) and seen._catalogue.client is None  # a look at the file is enough
    lost = Lost(tracker)
    getattr(lost, way)()
    caplog.clear()
    assert Tracker(shared, way).is_missing(["a"], model)
    again = once(shared, way)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all("had lost" in text and f"of the sweep {way}: restored" in text for text in told) and len(told) <= 1, told
    assert not Tracker(shared, way).is_missing(["a"], model)
    client = MlflowClient(again.uri, again.uri)
    experiment = client.get_experiment_by_name(way)
    assert experiment.lifecycle_stage == "active"
    assert again.find_link().startswith(f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?")
    runs = {r.data.tags["orchestrator.row"]: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["a", "sweep"] and {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [p.value for p in client.get_metric_history(runs["a"].info.run_id, "valid/nll_bpd")] == [3.5, 3.0]
    assert [f.path for f in client.list_artifacts(runs["a"].info.run_id)] == ["trial.yaml"]
    version = client.get_model_version_by_alias(way, "candidate")
    loaded = mlflow.pyfunc.load_model(version.source)
    assert loaded.predict(asked(n=1, seed=0)).shape == (1, small.SIDE, small.SIDE, 1)
    if "good" not in way and "database" not in way:  # out of the bin: links that were given out lead there again
        assert {address: run.info.run_id for address, run in runs.items()} == lost.runs


def shown(name: str) -> str:
    return (models.USE % name).removeprefix("```python\n").removesuffix("\n```")


def test_the_page_about_mlflow_shows_these_lines() -> None:
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/mlflow.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block.strip().endswith(shown("beta_schedule"))


@pytest.mark.parametrize("direct", [False, True], ids=["through the server", "beside the server"])
def test_a_server_keeps_the_model_and_gives_it_back(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Its files go through the server (--serve-artifacts), or straight to where the server says."""
    server, storage = Server(tmp_path / "server", direct), Storage(tmp_path / "runs")
    try:
        server.start()
        for _ in range(2):
            client = register(storage, candidate(storage), uri=server.uri)
        assert versions(client) == {"1": "a"}
        scheme = "file" if direct else "mlflow-artifacts"
        version = client.get_model_version_by_alias("registered", "candidate")
        assert version.source.startswith((scheme, str(server.folder / "artifacts"))), version.source
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        model = mlflow.pyfunc.load_model("models:/registered@candidate")
        assert np.array_equal(model.predict(asked(n=3, seed=0)), loaded.predict(asked(n=3, seed=0)))
        once(storage, "lost", server.uri)
        assert not Tracker(storage, "lost", server.uri).is_missing(["a"], candidate(storage))
        shutil.rmtree(server.folder / "artifacts")
        assert Tracker(storage, "lost", server.uri).is_missing(["a"], candidate(storage))
        once(storage, "lost", server.uri)
        assert not Tracker(storage, "lost", server.uri).is_missing(["a"], candidate(storage))
    finally:
        server.stop()
