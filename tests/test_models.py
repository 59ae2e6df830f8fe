"""A registered model gives the images that the evaluation measured, wherever it is loaded, and holds no pickle."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import small_evaluation as small
import torch
from click.testing import CliRunner
from conftest import ROOT
from diffusers import DDPMPipeline
from mlflow import MlflowClient
from mlflow.cli import gc
from mlflow_server import Server

from orchestrator.tracking import models
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.server import make_database
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import ComparisonView
from workers.config import FIDConfig, Mistake, SamplerConfig
from workers.data.cache import find_default_cache
from workers.evaluation import blocks
from workers.evaluation.make import read_block
from workers.storage import Storage

SAMPLER = SamplerConfig(kind="ddim", steps=3)
FID = FIDConfig(sampler=SAMPLER)


def candidate(storage: Storage, weights: str = "a") -> Candidate:
    checkpoint = small.checkpoint_in(storage, weights)
    return Candidate(trial=weights, checkpoint=checkpoint, levels=small.LEVELS, fid=FID)


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow makes a database in the working directory where it is asked without an address: nothing here does so."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models.save(candidate(Storage(folder / "runs")), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Any:
    return mlflow.pyfunc.load_model(str(saved))


def asked(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({name: [value] for name, value in columns.items()})


def test_the_images_are_those_of_the_evaluation(loaded: Any, tmp_path: Path) -> None:
    """For the same seed and sampler, of whole blocks and of a part of one."""
    torch.set_num_threads(1)
    for sampler in (SAMPLER, SamplerConfig(kind="ancestral"), SamplerConfig(kind="ddim", steps=7)):
        m = small.measurement(seed=5, samples=150, sampler=sampler)
        bench = small.bench(tmp_path, m)
        wanted = blocks.list_sample_blocks(m, bench.checkpoint.digest, small.IMAGES)
        small.make_all(bench, wanted)
        images = [row for block in wanted for row in read_block(bench.storage, block)["image"].to_pylist()]
        measured = np.stack([np.frombuffer(image, np.uint8) for image in images]).reshape(-1, small.SIDE, small.SIDE, 1)
        request = asked(n=200, seed=5, sampler=sampler.kind, steps=sampler.steps or small.T)
        given = loaded.predict(request)
        assert given.dtype == np.uint8 and np.array_equal(given, measured)
        assert np.array_equal(loaded.predict(request.assign(n=130)), measured[:130])


def test_the_variance_is_the_one_that_is_measured(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    m = small.measurement(seed=5, samples=100, sampler=SamplerConfig(kind="ancestral"))
    m = m.model_copy(update={"evaluation": m.evaluation.model_copy(update={"variance": "fixed_small"})})
    bench = small.bench(tmp_path, m)
    assert bench.model.process.variance == "fixed_large"
    [block] = blocks.list_sample_blocks(m, bench.checkpoint.digest, small.IMAGES)
    small.make_all(bench, [block])
    measured = [np.frombuffer(image, np.uint8) for image in read_block(bench.storage, block)["image"].to_pylist()]
    models.save(replace(candidate(bench.storage), variance="fixed_small"), tmp_path / "model")
    given = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(
        asked(n=100, seed=5, sampler="ancestral", steps=small.T)
    )
    assert np.array_equal(given.reshape(100, -1), np.stack(measured)[:100])


def test_a_row_is_a_request(loaded: Any) -> None:
    """The rows' images follow each other; the evaluation's sampler and steps are those of a row without."""
    two = loaded.predict(pd.DataFrame({"n": [2, 3], "seed": [0, 1]}))
    assert two.shape == (5, small.SIDE, small.SIDE, 1) and two.max() < small.LEVELS
    assert np.array_equal(two[2:], loaded.predict(asked(n=3, seed=1)))
    assert np.array_equal(two[:2], loaded.predict(asked(n=2, seed=0, sampler="ddim", steps=3)))
    assert not np.array_equal(two[:2], loaded.predict(asked(n=2, seed=0, sampler="ddim", steps=9)))
    assert loaded.predict(asked(n=0, seed=0)).shape == (0, small.SIDE, small.SIDE, 1)


@pytest.mark.parametrize(
    "columns",
    [
        {"n": 1},
        {"n": 1.5, "seed": 0},
        {"n": -1, "seed": 0},
        {"n": 1, "seed": 0, "sampler": "magic"},
        {"n": 1, "seed": 0, "steps": 0},
        {"n": 1, "seed": 0, "steps": small.T + 1},
    ],
)
def test_a_request_that_means_nothing_is_refused(loaded: Any, columns: dict[str, Any]) -> None:
    with pytest.raises((ValueError, mlflow.MlflowException)):
        loaded.predict(asked(**columns))


def test_what_lies_in_it(saved: Path, loaded: Any) -> None:
    files = {str(path.relative_to(saved)): path for path in saved.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".py", ".typed", ".json", ".yaml", ".txt", ".safetensors", ""}
    assert not [name for name, path in files.items() if path.read_bytes()[:1] == b"\x80"]  # as a pickle begins
    assert "model_code.py" in files and "code/workers/network/unet.py" in files
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["n", "seed", "sampler", "steps"]
    assert signature.inputs.required_input_names() == ["n", "seed"]
    assert signature.outputs.inputs[0].shape == (-1, small.SIDE, small.SIDE, 1)
    example = loaded.metadata.load_input_example(str(saved))
    assert len(loaded.predict(example)) == example["n"][0]


def test_diffusers_opens_its_folder(saved: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(saved / "artifacts/diffusers")
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, small.SIDE, small.SIDE, 1)


def test_a_damaged_model_is_refused(saved: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    other = candidate(storage, "b")
    models.save(replace(other, checkpoint=replace(other.checkpoint, digest="0" * 16)), tmp_path / "model")
    with pytest.raises(Mistake, match="is damaged"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


LOAD = """
import json, sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
images = model.predict(pd.DataFrame({"n": [3], "seed": [0]}))
print(json.dumps({"images": images.tolist(),
                  "workers": {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "workers"},
                  "unused": [n for n in ("ray", "sklearn", "orchestrator") if n in sys.modules]}))
"""


def test_it_brings_its_own_code_and_names_all_that_it_imports(saved: Path, loaded: Any, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(saved)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    message = json.loads(result.stdout.splitlines()[-1])
    assert np.array_equal(np.array(message["images"], np.uint8), loaded.predict(asked(n=3, seed=0)))
    assert message["unused"] == []
    files = [Path(file) for file in message["workers"].values() if file]
    assert files and all(file.is_relative_to(saved / "code") for file in files)
    imported = {name for file in [*files, saved / "model_code.py"] for name in _imported_at_once(file)}
    named = {line.partition("==")[0] for line in (saved / "requirements.txt").read_text().splitlines()}
    packages = {"PIL": "pillow"}
    assert {packages.get(name, name) for name in imported - sys.stdlib_module_names - {"workers"}} <= named


def _imported_at_once(file: Path) -> set[str]:
    """The top-level names that a file imports when it is imported itself."""
    nodes = ast.parse(file.read_text()).body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


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


@pytest.mark.parametrize("n", [-1, 100_001, 10**12])
def test_a_request_for_more_images_than_can_be_sent_is_refused(n: int) -> None:
    from orchestrator.tracking.model_code import ImageModel

    model = ImageModel()
    model.shape, model.fid = (8, 8, 1), FIDConfig()
    model.model = SimpleNamespace(process=SimpleNamespace(T=10))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"n = {n} images were asked for; give 0 to 100,000"):
        model.predict(None, pd.DataFrame({"n": [n], "seed": [0]}))
