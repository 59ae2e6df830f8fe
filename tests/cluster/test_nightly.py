"""Nights over a real finished sweep. A night on which nothing is due starts no Ray; one of these does."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import run, statuses
from mlflow import MlflowClient

from orchestrator.nightly import main
from workers.evaluation import canaries
from workers.locks import lock
from workers.network import manifest
from workers.storage import Storage

# The evaluation is that of the sweep, so that its numbers are there already.
SUITE = """
name: small
models: ["*@champion", "*@candidate", "*@newest"]
evaluation:
  nll: {images: 30, timesteps: all}
  fid: {samples: 100, sampler: {kind: ddim, steps: 5}}
schedule: {at: "02:30", zone: Europe/Berlin}
regression:
  rules:
    - {metric: eval/nll_bpd, standard_errors: 3}
hooks: {webhook: NIGHTLY_HOOK}
"""


@pytest.fixture(autouse=True)
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a server on this machine heard."""
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("NIGHTLY_HOOK", f"http://127.0.0.1:{server.server_port}/hook")
        yield heard
        server.shutdown()
        thread.join()


class Registry:
    """The registered models of a storage, with two versions of `tiny`: the better trial of the sweep, and the worse."""

    def __init__(self, storage: Path) -> None:
        self.storage, self.client = storage, MlflowClient(f"sqlite:///{storage}/mlflow.db")
        if not self.client.search_registered_models("name = 'tiny'"):
            self.client.create_registered_model("tiny")
        by_nll = sorted(statuses(storage), key=self._nll_bpd)
        self.better, self.worse = (self._register(trial) for trial in by_nll)

    def _nll_bpd(self, trial: str) -> float:
        checkpoint = manifest.find_newest(Storage(self.storage), f"trials/{trial}/checkpoints")
        assert checkpoint
        [summary] = self.storage.glob(f"evaluations/{checkpoint.digest}/summary-*.json")
        return float(json.loads(summary.read_text())["metrics"]["eval/nll_bpd"])

    def _register(self, trial: str) -> str:
        checkpoint = manifest.find_newest(Storage(self.storage), f"trials/{trial}/checkpoints")
        assert checkpoint
        tags = {
            "orchestrator.trial": trial,
            "orchestrator.checkpoint": checkpoint.digest,
            "orchestrator.path": checkpoint.path,
            "orchestrator.storage": f"{socket.gethostname()}:{self.storage}",
        }
        return str(self.client.create_model_version("tiny", checkpoint.url, tags=tags).version)

    def set(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias("tiny", alias, version)

    def nights(self) -> dict[str, Any]:
        """MLflow's runs of the suite by name."""
        experiment = self.client.get_experiment_by_name("nightly-small")
        assert experiment
        return {run.info.run_name: run for run in self.client.search_runs([experiment.experiment_id])}


@pytest.fixture
def registry(own: tuple[Path, Path]) -> Registry:
    return Registry(own[1])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    return file


def result(registry: Registry, day: str) -> dict[str, Any]:
    return json.loads((registry.storage / f"nightly/small/{day}/result.json").read_text())


def test_nights_with_a_promotion_a_regression_a_gap_and_repeats(
    registry: Registry, suite: Path, webhook: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def night(day: str, *more: str) -> tuple[int, str]:
        status = main([str(suite), "--date", day, "--storage", str(registry.storage), *more])
        return status, "".join(capsys.readouterr())

    registry.set("champion", registry.worse)
    registry.set("candidate", registry.better)
    status, output = night("2026-03-01")
    assert status == 0 and "all measured already" in output and "promotion was not asked for" in output, output
    assert "CET" in output  # lines of the log are in the suite's zone

    status, output = night("2026-03-02", "--promote")
    assert status == 0 and webhook == [], output
    champion = registry.client.get_model_version_by_alias("tiny", "champion")
    assert str(champion.version) == registry.better
    assert "nightly-small 2026-03-02: clearly better" in champion.tags["orchestrator.promoted"]

    # Somebody registers a worse checkpoint as the candidate, and the machine was off for two nights.
    registry.set("candidate", registry.worse)
    status, output = night("2026-03-05", "--promote")
    assert status == 3 and "webhook called" in output, output
    [message] = webhook
    assert message["date"] == "2026-03-05" and message["status"] == 3 and "tiny@candidate" in message["findings"][0]
    assert str(registry.client.get_model_version_by_alias("tiny", "champion").version) == registry.better
    kept = result(registry, "2026-03-05")
    assert kept["missed"] == ["2026-03-03", "2026-03-04"] and kept["previous"] == "2026-03-02"
    worse = {(c["model"], c["against"]) for c in kept["comparisons"] if c["verdict"] == "worse"}
    assert worse >= {("tiny@candidate", "last night (2026-03-02)"), ("tiny@candidate", "tiny@champion")}
    folder = registry.storage / "nightly/small/2026-03-05"
    assert "2 missed nights" in (folder / "report.md").read_text() and "<svg" in (folder / "report.html").read_text()

    # MLflow: a run a night, and all points on the run of the suite, a day a step.
    runs = registry.nights()
    assert set(runs) == {"nightly-small", "2026-03-01", "2026-03-02", "2026-03-05"}
    assert runs["2026-03-05"].info.status == "FAILED" and runs["2026-03-02"].info.status == "FINISHED"
    trend = "tiny.candidate/nll_bpd"
    points = registry.client.get_metric_history(runs["nightly-small"].info.run_id, trend)
    assert [p.step - points[0].step for p in points] == [0, 1, 4] and points[2].value > points[1].value

    # The same night again, and one of before: nothing happens, and nothing is added.
    before = (folder / "result.json").read_bytes()
    assert night("2026-03-05")[0] == 3 and night("2026-03-01")[0] == 0
    assert "nothing to do" in night("2026-03-05", "--promote")[1]
    assert len(webhook) == 1 and (folder / "result.json").read_bytes() == before
    assert len(registry.client.get_metric_history(runs["nightly-small"].info.run_id, trend)) == 3

    # Another process is at it.
    storage = Storage(registry.storage)
    with lock(storage, "nightly/small/lock"):
        storage.write_sealed(
            "nightly/small/running.json", {"day": "2026-03-06", "started": "now", "process": 7, "host": "there"}
        )
        status, output = night("2026-03-06")
    assert status == 2 and "is skipped: that of 2026-03-06 is still running, since now, as process 7 on there" in output


@pytest.mark.faults
def test_a_canary_that_is_off_stops_the_night_which_can_be_run_again(
    registry: Registry, suite: Path, webhook: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.set("champion", registry.better)
    registry.set("candidate", registry.better)
    words = [str(suite), "--date", "2026-03-01", "--storage", str(registry.storage)]
    with monkeypatch.context() as planted:
        planted.setattr(canaries, "measure_schedule", lambda: {"schedule/log_alpha_bar_T": -10.2})
        assert main(words) == 3
    kept = result(registry, "2026-03-01")
    assert kept["state"] == "not believed" and kept["entries"] == [] and "schedule/log_alpha_bar_T" in str(webhook)
    assert main(words) == 0 and result(registry, "2026-03-01")["state"] == "complete"
    assert registry.nights()["2026-03-01"].info.status == "FINISHED"


@pytest.mark.faults
def test_numbers_that_move_by_themselves_and_checkpoints_that_are_gone_are_told(
    registry: Registry, suite: Path, webhook: list[dict[str, Any]]
) -> None:
    words = [str(suite), "--storage", str(registry.storage), "--date"]
    registry.set("champion", registry.better)
    registry.set("candidate", registry.better)
    assert main([*words, "2026-03-01"]) == 0
    digest = registry.client.get_model_version("tiny", registry.better).tags["orchestrator.checkpoint"]
    [path] = registry.storage.glob(f"evaluations/{digest}/summary-*.json")
    storage, name = Storage(registry.storage), f"evaluations/{digest}/{path.name}"
    summary = storage.read_sealed(name)
    assert summary
    summary["metrics"]["eval/nll_bpd"] *= 1.01  # as if an update of a library had it made again
    storage.write_sealed(name, {**summary, "hash": "0123456789abcdef"})
    assert main([*words, "2026-03-02"]) == 3
    kinds = [(f["kind"], f["model"], f["alarm"]) for f in result(registry, "2026-03-02")["findings"]]
    assert ("drift", "tiny@champion", True) in kinds and "0123456789abcdef" in str(webhook)

    trial = registry.client.get_model_version("tiny", registry.worse).tags["orchestrator.trial"]
    shutil.rmtree(registry.storage / f"trials/{trial}/checkpoints")
    assert main([*words, "2026-03-03"]) == 1  # the newest version is of that trial
    kept = result(registry, "2026-03-03")
    assert kept["state"] == "incomplete" and [bool(e["failed"]) for e in kept["entries"]] == [False, False, True]


def test_what_is_due_is_measured_once_a_checkpoint_after_the_canaries(registry: Registry, suite: Path) -> None:
    registry.set("champion", registry.better)
    registry.set("candidate", registry.better)
    words = (suite, "models=[tiny@champion, tiny@candidate]", "evaluation.nll.images=60", "--date", "2026-03-01")
    first = run("orchestrator.nightly", *words, "--storage", registry.storage)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 due: tiny@champion = tiny@candidate" in first.stdout and "canaries: 9 of 9" in first.stdout
    assert "data        digits: built in, 1,497 to train on" in first.stdout
    entries = result(registry, "2026-03-01")["entries"]
    assert [e["blocks_run"] for e in entries] == [1, 1] and len(entries[0]["nll_per_image"]) == 60
    assert entries[0]["hash"] == entries[1]["hash"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models=[tiny@champion, tinny@candidate, nobody]"], ["no alias 'champion'", "did you mean 'tiny'", "nobody"]),
        (["models=['*@champion', '*@candidate']"], ["nothing to measure", "tiny has no alias 'champion'"]),
        (["schedule.zone=Europe/Berln"], ["did you mean 'Europe/Berlin'"]),
        (["--date", "2026-02-30"], ["not a date"]),
        (["--date", "2999-01-01"], ["in the future", "Europe/Berlin"]),
        (["hooks.webhook=NOT_SET"], ["NOT_SET is not set"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    registry: Registry, suite: Path, arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for alias in registry.client.get_registered_model("tiny").aliases:
        registry.client.delete_registered_model_alias("tiny", alias)
    assert main([str(suite), *arguments, "--storage", str(registry.storage)]) == 2
    output = capsys.readouterr().err
    assert all(text in output for text in expected), output
    assert not list((registry.storage / "nightly").glob("small/*/result.json"))
