"""MLflow holds what the journals hold, once, whatever dies in between."""

import base64
import json
import math
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow_server import Between, Server, answer
from PIL import Image
from sqlalchemy.engine import make_url

from orchestrator import ui
from orchestrator.tracking import registry
from orchestrator.tracking.provenance import collect_provenance
from orchestrator.tracking.server import (
    check_database,
    connect,
    find_database,
    find_unused,
    make_database,
    make_database_uri,
    resolve_uri,
    say_unused,
)
from orchestrator.tracking.shipment import LoggedDataset, format_param
from orchestrator.tracking.shipper import is_of_another_training
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import ComparisonView
from workers.config import Mistake
from workers.data.cache import find_default_cache
from workers.storage import Storage

PARAMS: dict[str, Any] = {
    "diffusion.T": 50,
    "training.lr": 1e-4,
    "model.multipliers": [1, 2],
    "loss.weighting": "simple",
}
DIGITS = LoggedDataset(name="digits", digest="d" * 64, source="digits", shape=(8, 8, 1), profile={"training": 1617})
START_MS = 1_764_000_000_000


def write_journal(
    storage: Storage, digest: str, steps: int, name: str = "a", images_every: int = 3, best: float = 3.5
) -> list[dict[str, Any]]:
    """`steps` lines of metrics and an image at every third step; returns the lines. Times and speeds go by `name`."""
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        at = START_MS + 10 * step + ord(name)
        metrics = {"train/loss_simple": 1 / (step + 1), "valid/nll_bpd": best, "train/images_per_s": at % 997}
        lines.append({"step": step, "time_ms": at, "metrics": metrics})
        if step % images_every == 0:
            png = BytesIO()
            Image.new("RGB", (300, 200), (step, 0, 200)).save(png, format="PNG")
            path = f"trials/{digest}/samples/step-{step:08d}.png"
            storage.write(path, png.getvalue())
            lines.append({"step": step, "time_ms": at, "image": "eval/samples", "path": path})
    storage.write(f"trials/{digest}/journal.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines


def points_of(lines: list[dict[str, Any]], key: str) -> list[tuple[int, int, float]]:
    return [(line["step"], line["time_ms"], line["metrics"][key]) for line in lines if key in line.get("metrics", {})]


def client_of(tracker: Tracker) -> Any:
    return MlflowClient(tracking_uri=tracker.uri)


def runs_of(tracker: Tracker) -> dict[str, list[Any]]:
    """The active runs of the sweep's experiment by their address."""
    client = client_of(tracker)
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([client.get_experiment_by_name(tracker.name).experiment_id]):
        found.setdefault(run.data.tags.get("orchestrator.row", ""), []).append(run)
    return found


def history_of(tracker: Tracker, run: Any, key: str) -> list[tuple[int, int, float]]:
    points = client_of(tracker).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def run_sweep(storage: Storage, name: str, digests: tuple[str, ...], uri: str | None = None) -> Tracker:
    tracker = Tracker(storage, name, uri)
    tracker.open_sweep({"search.algorithm": "grid"}, {"note": "of the sweep"}, "# A sweep")
    for digest in digests:
        tracker.open_trial(digest, f"T=50 {digest}", PARAMS, {"kind": "trial"}, [DIGITS])
        tracker.log_metrics(digest, {"eval/nll_bpd": 3.25}, step=9)
        tracker.close_trial(digest, "FINISHED", "**3.25** bits/dim")
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert left.complete, str(left)
    return tracker


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """One database for the module, a sweep's name for a test: making the database takes seconds.

    Its path has all that a URI would take for something else.
    """
    root = tmp_path_factory.mktemp("runs") / "a%20b?c=d#e ü"
    yield Storage(root)
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # MLflow made nothing elsewhere


@pytest.fixture(scope="module")
def done(storage: Storage) -> tuple[Tracker, dict[str, list[dict[str, Any]]]]:
    lines = {digest: write_journal(storage, digest, 70) for digest in ("d0", "d1")}
    return run_sweep(storage, "done", ("d0", "d1")), lines


def test_a_sweep_is_a_parent_and_its_trials_children(done: Any) -> None:
    tracker, _ = done
    runs = runs_of(tracker)
    assert sorted(runs) == ["d0", "d1", "sweep"] and all(len(same) == 1 for same in runs.values())
    (sweep,) = runs.pop("sweep")
    assert sweep.info.run_name == "done" and sweep.info.status == "FINISHED"
    for (run,) in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.note.content"] == "**3.25** bits/dim"
    assert client_of(tracker).get_experiment_by_name("done").tags["mlflow.note.content"] == "# A sweep"


def test_params_are_texts_that_a_chart_reads_as_numbers(done: Any) -> None:
    (run,) = runs_of(done[0])["d0"]
    assert run.data.params == {
        "diffusion.T": "50",
        "training.lr": "0.0001",
        "model.multipliers": "[1, 2]",
        "loss.weighting": "simple",
    }
    assert [format_param(value) for value in (1e-5, True, None, 0.1 + 0.2)] == [
        "1e-05",
        "true",
        "null",
        "0.30000000000000004",
    ]


def test_metrics_are_those_of_the_journal(done: Any) -> None:
    tracker, lines = done
    for digest, expected in lines.items():
        (run,) = runs_of(tracker)[digest]
        for key in ("train/loss_simple", "valid/nll_bpd"):
            assert history_of(tracker, run, key) == points_of(expected, key)
        assert run.info.start_time == START_MS + ord("a")


def image_files(tracker: Tracker, run: Any) -> list[str]:
    return sorted(file.path for file in client_of(tracker).list_artifacts(run.info.run_id, "images"))


def test_images_lie_at_their_steps_under_the_names_of_log_image(done: Any) -> None:
    tracker, lines = done
    (run,) = runs_of(tracker)["d0"]
    files = image_files(tracker, run)
    steps = [line["step"] for line in lines["d0"] if "image" in line]
    for kind in (".png", "+compressed.webp"):
        # Compared with what MLflow writes itself: images/<key>+step+<n>+timestamp+<ms>+<uuid>[+compressed].<ext>
        parts = [file.removesuffix(kind).split("+") for file in files if file.endswith(kind)]
        assert sorted(int(part[2]) for part in parts) == steps
        assert {(part[0], part[1], part[3], len(part[5])) for part in parts} == {
            ("images/eval~samples", "step", "timestamp", 36)
        }
    assert run.data.tags["mlflow.loggedImages"] == "True"
    scratch = client_of(tracker).create_run(run.info.experiment_id)
    client_of(tracker).log_image(scratch.info.run_id, Image.new("RGB", (300, 200)), key="eval/samples", step=6)
    client_of(tracker).set_terminated(scratch.info.run_id)
    theirs = [file.split("+") for file in image_files(tracker, scratch)]
    client_of(tracker).delete_run(scratch.info.run_id)
    ours = [file.split("+") for file in files if "+step+6+" in file]
    assert [[len(p), p[:4], p[6:]] for p in ours] == [[len(p), p[:4], p[6:]] for p in theirs]


def test_the_data_set_is_an_input_of_the_run(done: Any) -> None:
    (run,) = runs_of(done[0])["d0"]
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", "d" * 36)
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}
    assert json.loads(used.dataset.profile) == {"training": 1617}
    assert "[-1, 8, 8, 1]" in json.loads(used.dataset.schema)["mlflow_tensorspec"]["features"]


@pytest.mark.parametrize("lost", ["nothing", "shipped", "all", "readable"])
def test_the_same_command_again_leaves_nothing_twice(done: Any, storage: Storage, lost: str) -> None:
    tracker, lines = done
    path = "sweeps/done/mlflow.json"
    before = {digest: [run.info.run_id for run in runs] for digest, runs in runs_of(tracker).items()}
    images = image_files(tracker, runs_of(tracker)["d0"][0])
    if lost == "shipped":
        state = storage.read_sealed(path)
        assert state
        for entry in state["mlflow.db"].values():
            entry["lines"] = 0
        storage.write_sealed(path, state)
    if lost == "readable":
        storage.write(path, storage.read(path).replace(b"lines", b"lanes"))
    if lost == "all":
        storage.delete(path)
    again = run_sweep(storage, "done", ("d0", "d1"))
    after = runs_of(again)
    assert {digest: [run.info.run_id for run in runs] for digest, runs in after.items()} == before
    assert {run.info.status for runs in after.values() for run in runs} == {"FINISHED"}
    for digest, expected in lines.items():
        assert history_of(again, after[digest][0], "valid/nll_bpd") == points_of(expected, "valid/nll_bpd")
        assert len(history_of(again, after[digest][0], "eval/nll_bpd")) == 1
    assert image_files(again, after["d0"][0]) == images


def test_a_killed_sweep_is_continued_in_its_own_runs(storage: Storage) -> None:
    write_journal(storage, "k0", 4)
    write_journal(storage, "k1", 4)
    killed = Tracker(storage, "killed")
    killed.open_sweep({}, {})
    killed.open_trial("k0", "k0", PARAMS, {})
    killed.open_trial("k1", "k1", PARAMS, {})
    assert killed.flush(120).complete
    before = {digest: runs[0].info.run_id for digest, runs in runs_of(killed).items()}
    assert {runs[0].info.status for runs in runs_of(killed).values()} == {"RUNNING"}

    lines = write_journal(storage, "k0", 9)  # k1 is no longer part of the sweep
    run_sweep(storage, "killed", ("k0",))
    after = runs_of(killed)
    assert {digest: runs[0].info.run_id for digest, runs in after.items()} == before
    assert {digest: runs[0].info.status for digest, runs in after.items()} == {
        "sweep": "FINISHED",
        "k0": "FINISHED",
        "k1": "KILLED",
    }
    assert history_of(killed, after["k0"][0], "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")


def restored(storage: Storage) -> list[dict[str, Any]]:
    """The journal was lost from the sixth step on, and made again: the same values, at other times and speeds."""
    return write_journal(storage, "j0", 5) + write_journal(storage, "j0", 12, name="q")[-9:]


def begun_again(storage: Storage) -> list[dict[str, Any]]:
    return write_journal(storage, "j0", 12, name="q")


def shorter(storage: Storage) -> list[dict[str, Any]]:
    return write_journal(storage, "j0", 4, name="q")


def deleted(storage: Storage) -> list[dict[str, Any]]:
    storage.delete("trials/j0/journal.jsonl")
    return []


@pytest.mark.parametrize("forgotten", [False, True], ids=["", "mlflow.json is lost"])
@pytest.mark.parametrize("change", [restored, begun_again, shorter, deleted])
def test_a_journal_of_the_same_training_goes_on_in_its_run(
    storage: Storage, change: Callable[[Storage], list[dict[str, Any]]], forgotten: bool
) -> None:
    name = f"same_{change.__name__}_{forgotten}"
    before = write_journal(storage, "j0", 9)
    tracker = run_sweep(storage, name, ("j0",))
    [old] = runs_of(tracker)["j0"]
    lines = change(storage)
    storage.write("trials/j0/journal.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    if forgotten:
        storage.delete(f"sweeps/{name}/mlflow.json")
    run_sweep(storage, name, ("j0",))
    begun_again(storage)  # where it was deleted, it comes back while the run is open
    run_sweep(storage, name, ("j0",))
    runs = runs_of(tracker)
    assert sorted(runs) == ["j0", "sweep"] and [run.info.run_id for run in runs["j0"]] == [old.info.run_id]
    for key in ("train/loss_simple", "valid/nll_bpd", "train/images_per_s"):
        points = history_of(tracker, old, key)
        assert [step for step, _, _ in points] == list(range(12))  # each once
        assert points[:9] == points_of(before, key)  # the first stand
    steps = [int(file.split("+")[2]) for file in image_files(tracker, old) if file.endswith(".png")]
    assert sorted(steps) == [0, 3, 6, 9]


def test_each_point_is_in_mlflow_once_whenever_the_command_is_killed(storage: Storage) -> None:
    """Killed between a call and the note of it; the journal goes on at other times, as a trial that resumes."""
    write_journal(storage, "y0", 9)
    killed = Tracker(storage, "once")
    killed.open_sweep({}, {})
    assert killed.flush(120).complete
    noted = storage.read("sweeps/once/mlflow.json")  # the trial has no run yet in it
    killed.open_trial("y0", "y0", PARAMS, {})
    assert killed.flush(120).complete
    storage.write("sweeps/once/mlflow.json", noted)
    write_journal(storage, "y0", 12, name="q")
    run_sweep(storage, "once", ("y0",))
    [run] = runs_of(killed)["y0"]
    for key in ("train/loss_simple", "train/images_per_s"):
        assert [step for step, _, _ in history_of(killed, run, key)] == list(range(12))


SHIPS = """
import sys
from orchestrator.tracking.tracker import Tracker
from workers.journal import Journal
from workers.storage import Storage

storage = Storage(sys.argv[1])
journal, tracker = Journal(storage, "trials/k"), Tracker(storage, "killed_often")
tracker.open_sweep({}, {})
tracker.open_trial("k", "k", {"T": 5}, {})
for step in range(300):  # those that are there stand, as in a trial that resumes
    journal.metrics(step, {"valid/nll_bpd": 3 + 1 / (step + 1), "train/images_per_s": 1.0 + step})
    journal.flush()
    tracker.ship("k")
    if step % 30 == 9:
        tracker.log_metrics("k", {"eval/nll_bpd": 3.0}, step=400)
tracker.close_trial("k", "FINISHED")
tracker.close_sweep("FINISHED")
left = tracker.flush(300)
assert left.complete, str(left)
"""


@pytest.mark.faults
def test_each_point_is_there_once_after_kills_at_any_moment(tmp_path: Path) -> None:
    """kill -9 while it ships, each time after some more points have come, and the last time not at all."""
    database = tmp_path / "mlflow.db"

    def count() -> int:
        if not database.exists():
            return 0
        with closing(sqlite3.connect(database, timeout=60)) as opened:
            return int(opened.execute("SELECT count(*) FROM metrics").fetchone()[0])

    for more in (1, 30, 40, None):
        wanted = count() + (more or 0)
        process = subprocess.Popen([sys.executable, "-c", SHIPS, str(tmp_path)], cwd=ROOT)
        try:
            while more and count() < wanted:
                assert process.poll() is None
            if more:
                process.kill()
            assert process.wait() == (-signal.SIGKILL if more else 0)
        finally:
            process.kill()
    with closing(sqlite3.connect(database)) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    tracker = Tracker(Storage(tmp_path), "killed_often")
    runs = runs_of(tracker)
    assert {a: [run.info.status for run in same] for a, same in runs.items()} == {
        "k": ["FINISHED"],
        "sweep": ["FINISHED"],
    }
    for key, steps in (("valid/nll_bpd", range(300)), ("train/images_per_s", range(300)), ("eval/nll_bpd", [400])):
        assert [step for step, _, _ in history_of(tracker, runs["k"][0], key)] == list(steps)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the run is open"])
def test_a_journal_of_another_training_gets_a_run_of_its_own(storage: Storage, late: bool) -> None:
    name = f"fresh_{late}"
    write_journal(storage, "f0", 5)
    tracker = run_sweep(storage, name, ("f0",))
    (old,) = runs_of(tracker)["f0"]
    if late:
        storage.delete("trials/f0/journal.jsonl")
        again = Tracker(storage, name)
        again.open_sweep({}, {})
        again.open_trial("f0", "f0", PARAMS, {})
        assert again.flush(120).complete and len(runs_of(tracker)["f0"]) == 1
        lines = write_journal(storage, "f0", 6, name="b", best=3.25)
        again.ship("f0")
        assert again.flush(120).complete
    else:
        lines = write_journal(storage, "f0", 6, name="b", best=3.25)
        run_sweep(storage, name, ("f0",))
    runs = runs_of(tracker)
    (new,), (aside,) = runs["f0"], runs[""]
    assert aside.info.run_id == old.info.run_id and aside.data.tags["superseded"] == "true"
    assert "mlflow.parentRunId" not in aside.data.tags
    assert history_of(tracker, new, "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")


@pytest.mark.parametrize(
    "value, same", [(3.5, True), (3.5 * (1 + 1e-15), True), (3.6, False), (math.nan, True), (None, True)]
)
def test_what_is_another_training(value: float | None, same: bool) -> None:
    entries = [{"step": 1, "metrics": {"valid/nll_bpd": value, "train/images_per_s": 7}}, {"step": 1, "image": "x"}]
    assert is_of_another_training(entries, {(1, "valid/nll_bpd"): 3.5, (1, "train/images_per_s"): 9}) is not same
    assert not is_of_another_training(entries, {(2, "valid/nll_bpd"): 1.0})


def test_a_run_that_has_all_is_not_opened_again(storage: Storage) -> None:
    """As `evaluate` looks at a finished trial after the map of runs was lost: nobody would end the run again."""
    write_journal(storage, "q0", 5)
    tracker = run_sweep(storage, "whole", ("q0",))
    storage.delete("sweeps/whole/mlflow.json")
    again = Tracker(storage, "whole")
    again.open_trial("q0", "q0", {}, {})
    again.log_metrics("q0", {"eval.other/nll_bpd": 3.0}, 4)
    assert again.flush(120).complete
    assert {run.info.status for [run] in runs_of(tracker).values()} == {"FINISHED"}


def test_a_storage_that_was_moved_finds_its_runs_by_their_addresses(tmp_path: Path) -> None:
    before = Storage(tmp_path / "before")
    write_journal(before, "w0", 3)
    old = runs_of(run_sweep(before, "moved", ("w0",)))
    Path(before.root).rename(tmp_path / "after")
    after = Storage(tmp_path / "after")
    after.write("sweeps/moved/mlflow.json", b"not what it was")
    new = runs_of(run_sweep(after, "moved", ("w0",)))
    assert {a: [r.info.run_id for r in runs] for a, runs in new.items()} == {
        a: [r.info.run_id for r in runs] for a, runs in old.items()
    }


def test_a_measurement_of_a_trial_whose_sweep_was_deleted_is_recorded(storage: Storage) -> None:
    """As `evaluate` records it: it opens the trial alone. The sweep's next command ends the runs."""
    write_journal(storage, "u0", 3)
    tracker = run_sweep(storage, "emptied", ("u0",))
    for [run] in runs_of(tracker).values():
        client_of(tracker).delete_run(run.info.run_id)
        storage.delete("sweeps/emptied/mlflow.json")
    with closing(sqlite3.connect(find_database(tracker.uri))) as database, database:
        own = "run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = ?)"  # the database is the other tests', too
        experiment = client_of(tracker).get_experiment_by_name(tracker.name).experiment_id
        database.execute(f"DELETE FROM tags WHERE key = 'orchestrator.row' AND {own}", (int(experiment),))
    again = Tracker(storage, "emptied")
    again.open_trial("u0", "u0", {}, {})
    again.log_metrics("u0", {"eval.other/nll_bpd": 3.0}, 2)
    left = again.flush(120)
    assert left.complete, str(left)
    runs = runs_of(tracker)
    [trial], [sweep] = runs["u0"], runs["sweep"]
    assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert trial.data.metrics["eval.other/nll_bpd"] == 3.0 and trial.data.metrics["valid/nll_bpd"] == 3.5
    run_sweep(storage, "emptied", ("u0",))
    assert {run.info.status for [run] in runs_of(tracker).values()} == {"FINISHED"}


def test_what_mlflow_would_spoil_is_kept_in_other_ways(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    storage.write(
        "trials/n0/journal.jsonl",
        b'{"step": 7, "time_ms": 1764000000000, "metrics": {"train/loss_simple": Infinity, "valid/nll_bpd": 3.0}}\n'
        b'{"step": 8, "time_ms": 1764000000001, "metrics": {"train/loss_simple": NaN}}\n',
    )
    tracker = Tracker(storage, "spoiled")
    tracker.open_sweep({}, {})
    tracker.open_trial("n0", "n0", {"T": 50, "long": "x" * 7000}, {})
    tracker.log_artifact("n0", b"a report", "reports/report.txt")
    tracker.close_trial("n0", "FAILED", "y" * 9000)
    assert tracker.flush(120).complete
    (run,) = runs_of(tracker)["n0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["nonfinite.train/loss_simple"] == "inf at step 7"
    assert list(run.data.metrics) == ["valid/nll_bpd"] and all(map(math.isfinite, run.data.metrics.values()))
    client = client_of(tracker)
    for path, text in (
        ("long/long.txt", "x" * 7000),
        ("long/mlflow.note.content.txt", "y" * 9000),
        ("reports/report.txt", "a report"),
    ):
        assert Path(client.download_artifacts(run.info.run_id, path)).read_text() == text
    assert "artifact long/long.txt" in run.data.params["long"] and len(run.data.params["long"]) < 200
    assert len(run.data.tags["mlflow.note.content"]) <= 8000

    again = Tracker(storage, "spoiled")
    again.open_sweep({}, {})
    again.open_trial("n0", "n0", {"T": 200}, {})
    again.close_sweep("FINISHED")
    assert again.flush(120).complete
    (run,) = runs_of(tracker)["n0"]
    assert run.data.params["T"] == "50" and run.data.tags["changed.T"] == "200"
    assert "MLflow keeps T=50; it is now 200" in caplog.text


def test_params_of_any_type_and_metrics_that_are_not_finite(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """As a search over `evaluation.nll.timesteps` of [all, 10] has them: another type in each trial."""
    values: list[Any] = [
        "all",
        10,
        None,
        True,
        [1, "a"],
        {"b": None},
        1e-5,
        math.inf,
        math.nan,
        "x" * 6001,
        ["y" * 6000],
        "é" * 6000,
    ]
    for _ in range(2):
        tracker = Tracker(storage, "mixed")
        tracker.open_sweep({}, {})
        for number, value in enumerate(values):
            tracker.open_trial(f"t{number}", f"t{number}", {"evaluation.nll.timesteps": value}, {})
            odd = {"eval/a": math.inf, "eval/b": -math.inf, "eval/c": math.nan, "eval/d": 1.5}
            tracker.log_metrics(f"t{number}", odd, step=3)
            tracker.close_trial(f"t{number}", "FINISHED")
        tracker.close_sweep("FINISHED")
        left = tracker.flush(120)
        assert left.complete, str(left)
    runs = runs_of(tracker)
    texts = {
        address: run.data.params["evaluation.nll.timesteps"] for address, [run] in runs.items() if address != "sweep"
    }
    assert [texts[f"t{n}"] for n in range(9)] == [format_param(value) for value in values[:9]]
    assert (
        all("artifact long/evaluation.nll.timesteps.txt" in texts[f"t{n}"] for n in (9, 10))
        and texts["t11"] == values[11]
    )
    for [run] in (same for address, same in runs.items() if address != "sweep"):
        assert run.data.metrics == {"eval/d": 1.5} and len(history_of(tracker, run, "eval/d")) == 1
        tags = {key: text for key, text in run.data.tags.items() if key.startswith(("nonfinite", "changed"))}
        assert tags == {
            "nonfinite.eval/a": "inf at step 3",
            "nonfinite.eval/b": "-inf at step 3",
            "nonfinite.eval/c": "nan at step 3",
        }
    assert "MLflow keeps" not in caplog.text


def test_a_refused_call_is_told_and_the_others_go_on(storage: Storage) -> None:
    tracker = Tracker(storage, "refused")
    tracker.open_sweep({}, {})
    tracker.log_metrics(None, {"a#b": 1.0})  # not a name that MLflow takes
    tracker.log_metrics(None, {"good": 2.0})
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert not left.complete and left.calls == 0
    assert "is without metrics a#b" in str(left)
    (run,) = runs_of(tracker)["sweep"]
    assert run.data.metrics == {"good": 2.0} and run.info.status == "FINISHED"


def test_a_server_that_refuses_all_is_told_in_a_few_lines(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    tracker = Tracker(storage, "forbidden")
    monkeypatch.setattr(MlflowClient, "create_run", refuse)
    tracker.open_sweep({}, {})
    for number in range(20):
        tracker.open_trial(f"p{number}", f"p{number}", PARAMS, {})
    left = tracker.flush(120)
    assert left.calls == 0 and len(left.refused) > 20
    assert "opening the sweep: MlflowException: Permission denied" in str(left).splitlines()[0]
    assert len(str(left).splitlines()) == 5
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "is without" in r.getMessage()]) == 3


def test_what_a_user_deleted_and_the_sweep_no_longer_has_stays_deleted(storage: Storage) -> None:
    for name in ("z0", "z1"):
        write_journal(storage, name, 3)
    tracker = run_sweep(storage, "edited", ("z0", "z1"))
    for address in ("z0", "z1"):
        [run] = runs_of(tracker)[address]
        client_of(tracker).delete_run(run.info.run_id)
    assert sorted(runs_of(run_sweep(storage, "edited", ("z0",)))) == ["sweep", "z0"]


def test_a_run_whose_making_was_answered_by_an_error_is_not_made_twice(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_journal(storage, "l0", 3)
    make = MlflowClient.create_run
    answers = iter(["lost", "lost"])

    def make_and_lose_the_answer(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        if next(answers, ""):
            raise MlflowException("timed out")
        return made

    monkeypatch.setattr(MlflowClient, "create_run", make_and_lose_the_answer)
    runs = runs_of(run_sweep(storage, "lost_answers", ("l0",)))
    assert {address: len(same) for address, same in runs.items()} == {"sweep": 1, "l0": 1}


def test_a_missing_image_is_told_and_holds_nothing_back(storage: Storage) -> None:
    lines = write_journal(storage, "m0", 5)
    storage.delete("trials/m0/samples/step-00000000.png")
    tracker = Tracker(storage, "missing")
    tracker.open_sweep({}, {})
    tracker.open_trial("m0", "m0", {}, {})
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert not left.complete and "image trials/m0/samples/step-00000000.png: it is gone or damaged" in str(left)
    (run,) = runs_of(tracker)["m0"]
    assert history_of(tracker, run, "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")
    assert len(image_files(tracker, run)) == 2


def test_a_database_is_made_once_and_copied_and_never_over_another(tmp_path: Path) -> None:
    make_database(tmp_path / "a/mlflow.db", tmp_path)
    [template] = (tmp_path / "mlflow").iterdir()
    made = template.stat().st_mtime_ns
    make_database(tmp_path / "b/mlflow.db", tmp_path)
    assert template.stat().st_mtime_ns == made
    for folder in ("a", "b"):
        client = MlflowClient(f"sqlite:///{tmp_path}/{folder}/mlflow.db")
        client.create_experiment(f"of {folder}")
        assert {e.name for e in client.search_experiments()} == {"Default", f"of {folder}"}
        assert str(template.parent) not in str(client.get_experiment("0").artifact_location)
    make_database(tmp_path / "b/mlflow.db", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/b/mlflow.db")
    assert client.get_experiment_by_name("of b") is not None


def test_a_folder_that_cannot_be_written_is_told_and_a_finished_sweep_is_read_there(tmp_path: Path) -> None:
    """Read-only, as another computer's snapshot is: bound so in a mount namespace of the process."""
    storage = Storage(tmp_path / "runs")
    write_journal(storage, "r0", 3)
    tracker = Tracker(storage, "kept")
    tracker.open_sweep({}, {}, compare=ComparisonView(params=("T",), metrics=("valid/nll_bpd",)))
    tracker.log_artifact(None, b"a: 1", "experiment.yaml")
    tracker.open_trial("r0", "r0", {}, {})
    tracker.close_sweep("FINISHED")
    assert tracker.flush(120).complete
    code = (
        "import sys; from orchestrator.tracking.tracker import Tracker; from workers.storage import Storage\n"
        "tracker = Tracker(Storage(sys.argv[1]), 'kept'); print(tracker.lacks(['r0'], None))\n"
        "try: tracker.check()\nexcept ValueError as error: print(error)"
    )
    folder = shlex.quote(str(tmp_path / "runs"))
    bound = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "
    command = bound + shlex.join([sys.executable, "-c", code, str(tmp_path / "runs")])
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    first, *rest = done.stdout.splitlines()
    assert first == "False", done.stderr
    assert len(rest) == 1 and "mlflow.db cannot be written: [Errno 30] Read-only file system" in rest[0]


@pytest.mark.parametrize("name", ["plain", "a b", "a%20b", "a?b", "a#b", "ü", "100%", "a%3Fb", "?uri=true", "a;b&c=d"])
def test_a_database_lies_where_the_path_says(name: str) -> None:
    path = Path("/somewhere", name, "mlflow.db")
    assert make_url(make_database_uri(path)).database == str(path) and find_database(make_database_uri(path)) == path


def _garbage(path: Path) -> None:
    path.write_text("not a database, whatever its name says " * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(byte ^ 0x20 for byte in content[4096:8192])
    path.write_bytes(content)


def _of_somebody_else(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE invoices (number INTEGER)")


def _of_another_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0123456789ab'")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage, told",
    [
        (_garbage, "is damaged (file is not a database)"),
        (_cut, "is damaged ("),
        (_flipped, "is damaged ("),
        (_of_somebody_else, "none of MLflow's: it has tables such as invoices"),
        (_of_another_version, "has the schema 0123456789ab, MLflow 3"),
        (_folder, "is damaged (unable to open database file)"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_and_another_one_gets_everything(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    storage, path = Storage(tmp_path), tmp_path / "mlflow.db"
    lines = write_journal(storage, "h0", 4)
    run_sweep(storage, "damaged", ("h0",))
    damage(path)
    with pytest.raises(Mistake, match=re.escape(told)) as mistake:
        Tracker(storage, "damaged").check()
    assert str(path) in str(mistake.value) and "\n" not in str(mistake.value)
    with pytest.raises(Mistake, match=re.escape(told)):
        ui.make_server_command(tmp_path, 0)
    with pytest.raises(Mistake, match=re.escape(told)):
        registry.list_versions(storage, None)
    path.rename(tmp_path / "mlflow.db.old")
    tracker = run_sweep(storage, "damaged", ("h0",))
    assert history_of(tracker, runs_of(tracker)["h0"][0], "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")


def test_a_database_that_is_damaged_meanwhile_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    write_journal(storage, "g0", 4)
    tracker = Tracker(storage, "meanwhile")
    tracker.open_sweep({}, {})
    assert tracker.flush(120).complete
    _garbage(tmp_path / "mlflow.db")
    caplog.clear()
    tracker.open_trial("g0", "g0", {}, {})
    tracker.close_sweep("FINISHED")
    left = tracker.flush(3600)  # and does not wait for what does not come
    assert not left.complete and left.points == 14 and not left.refused
    assert "takes nothing (the file is damaged (file is not a database)); 3 calls wait" in str(left)
    assert "mend that, then run the same command again" in str(left)
    assert [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()] == [
        f"MLflow at {tracker.uri}: the file is damaged (file is not a database); tried again, the journals keep every "
        "point meanwhile",
    ]


def test_a_journal_of_sqlite_that_a_kill_left_spoils_no_new_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    make_database(path, find_default_cache())
    (tmp_path / "kept").mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN")
        database.execute("DELETE FROM alembic_version")
        database.execute("CREATE TABLE filler AS SELECT hex(randomblob(100000)) AS text")
        shutil.copy(f"{path}-journal", tmp_path / "kept")  # as the process is killed here
    path.unlink()
    shutil.copy(tmp_path / "kept/mlflow.db-journal", tmp_path)
    make_database(path, find_default_cache())
    check_database(path, find_default_cache())
    assert [file.name for file in tmp_path.glob("mlflow*")] == ["mlflow.db"]


def test_a_database_on_a_full_disk_is_told_in_one_line_and_gets_the_rest_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    lines = write_journal(storage, "o0", 2000, images_every=500)
    tracker = Tracker(storage, "full")
    tracker.open_sweep({}, {})
    assert tracker.flush(120).complete
    caplog.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "mlflow.db").stat().st_size, hard))
    try:
        tracker.open_trial("o0", "o0", PARAMS, {}, [DIGITS])
        tracker.close_trial("o0", "FINISHED")
        tracker.close_sweep("FINISHED")
        left = tracker.flush(3600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not left.complete and left.points > 0 and not left.refused and "takes nothing (" in str(left)
    assert len([r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]) == 1, caplog.text
    assert "Traceback" not in caplog.text
    left = tracker.flush(120)  # or in the next command
    assert left.complete, str(left)
    assert history_of(tracker, runs_of(tracker)["o0"][0], "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.stop()


def test_a_server_that_dies_in_the_middle_gets_everything_in_the_end(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(tmp_path)
    server.start()
    tracker = Tracker(storage, "served", server.uri)
    tracker.check()
    write_journal(storage, "s0", 4)
    tracker.open_sweep({}, {})
    tracker.open_trial("s0", "s0", PARAMS, {}, [DIGITS])
    assert tracker.flush(120).complete
    assert tracker.find_link().startswith(f"{server.uri}/#/experiments/")

    server.stop()
    lines = write_journal(storage, "s0", 8)
    tracker.ship("s0")
    tracker.log_metrics("s0", {"eval/nll_bpd": 3.25}, step=8)
    tracker.close_trial("s0", "FINISHED")
    tracker.close_sweep("FINISHED")
    left = tracker.flush(2)
    while not left.failing:  # the first attempt may still be under way
        left = tracker.flush(2)
    assert not left.complete and left.calls > 0 and left.points >= 8
    assert server.uri in str(left) and "safe in the journal" in str(left)

    server.start()
    left = tracker.flush(120)
    assert left.complete, str(left)
    runs = runs_of(tracker)
    assert {key: [run.info.status for run in same] for key, same in runs.items()} == {
        "sweep": ["FINISHED"],
        "s0": ["FINISHED"],
    }
    assert history_of(tracker, runs["s0"][0], "train/loss_simple") == points_of(lines, "train/loss_simple")
    assert [value for _, _, value in history_of(tracker, runs["s0"][0], "eval/nll_bpd")] == [3.25]
    steps = [int(file.split("+")[2]) for file in image_files(tracker, runs["s0"][0]) if file.endswith(".png")]
    assert sorted(steps) == [0, 3, 6]

    # Another tracking URI is another copy: all of it is replayed there, and this one is left alone.
    moved = run_sweep(storage, "served", ("s0",))
    assert history_of(moved, runs_of(moved)["s0"][0], "train/loss_simple") == points_of(lines, "train/loss_simple")
    assert sorted(storage.read_sealed("sweeps/served/mlflow.json") or {}) == [server.uri, "mlflow.db"]
    server.stop()
    assert capfd.readouterr() == ("", "")  # MLflow and alembic write nothing between the sweep's own lines


CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"  # and ends in the middle


def test_a_server_that_stumbles_at_first_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.start()
    with Between([b"", answer("500 Internal Server Error", "<html>oops</html>"), CUT], server) as between:
        storage = Storage(tmp_path)
        lines = write_journal(storage, "e0", 4)
        tracker = Tracker(storage, "stumbles", between.uri)
        tracker.check()
        assert between.left == []
        tracker = run_sweep(storage, "stumbles", ("e0",), between.uri)
        assert history_of(tracker, runs_of(tracker)["e0"][0], "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")
    with Between([b"", CUT], server) as between:
        assert registry.list_versions(storage, between.uri) == [] and between.left == []
    server.stop()


@pytest.mark.parametrize(
    "always, told",
    [
        (b"", "Remote end closed connection without response"),
        (CUT, "IncompleteRead"),
        (answer("500 Internal Server Error", "<html>oops</html>"), "HTTP 500"),
        (answer("502 Bad Gateway", "<html>nginx</html>"), "HTTP 502"),
        (answer("503 Service Unavailable", "{}", "text/json"), "INTERNAL_ERROR"),
        (answer("429 Too Many Requests", "slower"), "HTTP 429"),
    ],
    ids=["dropped", "cut", "500", "502", "503", "429"],
)
def test_what_may_pass_is_waited_for(tmp_path: Path, always: bytes, told: str) -> None:
    with Between([always]) as between:
        tracker = Tracker(Storage(tmp_path), "x", between.uri)
        with pytest.raises(Mistake, match=rf"No MLflow server answers at tracking.uri={between.uri} for 1 s: .*{told}"):
            tracker.check(timeout_s=1)


@pytest.mark.parametrize(
    "always, told",
    [
        (answer("401 Unauthorized", "You are not authenticated."), "HTTP 401.*MLFLOW_TRACKING_USERNAME"),
        (answer("200 OK", "<html>Sign in to the hotel's network</html>"), "no MLflow server, or a page before it"),
        (answer("404 Not Found", "<html>nothing here</html>"), "HTTP 404"),
        (answer("404 Not Found", '{"detail": "Not Found"}', "application/json"), "HTTP 404, ..detail"),
        (answer("403 Forbidden", "<html>proxy</html>"), "HTTP 403"),
        (answer("403 Forbidden", "Invalid Host header"), "HTTP 403, Invalid Host header"),
    ],
    ids=["401", "page", "404", "another API", "403", "host"],
)
def test_what_no_waiting_mends_is_told_at_once(tmp_path: Path, always: bytes, told: str) -> None:
    with Between([always]) as between:
        tracker = Tracker(Storage(tmp_path), "x", between.uri)
        with pytest.raises(Mistake, match=rf"(?s)tracking.uri={between.uri} cannot be used: .*{told}"):
            tracker.check(timeout_s=3600)


def test_an_address_where_nobody_listens_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can start to
        taken.bind(("127.0.0.1", 0))
        tracker = Tracker(Storage(tmp_path), "dead", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            Mistake, match=r"(?s)No MLflow server answers at tracking.uri=http.*refused.*mlflow server --host"
        ):
            tracker.check(timeout_s=2)
    tracker = Tracker(Storage(tmp_path), "dead", "http://no-such-host.invalid:5000")
    with pytest.raises(Mistake, match="no-such-host"):
        tracker.check(timeout_s=2)


def test_addresses_of_the_environment_are_not_used_and_that_is_said(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:1")
    say_unused.cache_clear()
    write_journal(storage, "v0", 2)
    tracker = run_sweep(storage, "environment", ("v0",))
    assert "v0" in runs_of(tracker)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        output = f"{name}=http://***@127.0.0.1:1 of the environment is not used: runs and models go to {tracker.uri},"
        assert caplog.text.count(output) == 1
    assert connect(tracker.uri)._registry_uri == tracker.uri and "secret" not in caplog.text


def test_an_address_of_the_environment_that_is_the_same_is_not_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = make_database_uri(tmp_path / "runs/mlflow.db")
    for named in (uri, "sqlite:///runs/mlflow.db"):
        assert find_unused(uri, {"MLFLOW_TRACKING_URI": named}) == []
    assert find_unused("http://host:5000", {"MLFLOW_REGISTRY_URI": "http://host:5000/"}) == []
    assert len(find_unused(uri, {"MLFLOW_TRACKING_URI": "http://host", "MLFLOW_REGISTRY_URI": "databricks-uc"})) == 2


@pytest.mark.parametrize(
    "uri", ["./mlruns", "mlruns", "/absolute/mlruns", "file:///mlruns", "sqlite:///relative.db", "http://", "http:/x"]
)
def test_an_address_that_mlflow_cannot_use_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot be used.*http://HOST:5000"):
        Tracker(Storage(tmp_path), "x", uri)


def test_where_runs_go(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert resolve_uri(storage, None) == (f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "mlartifacts").as_uri())
    assert resolve_uri(storage, "http://host:5000/") == ("http://host:5000", None)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        resolve_uri(storage, "https://me:secret@host")
    storage.is_local = False
    with pytest.raises(ValueError, match=r"tracking\.uri=http"):
        resolve_uri(storage, None)


def test_the_link_shows_the_trials_of_the_sweep_side_by_side(done: Any) -> None:
    tracker, _ = done
    page, _, query = tracker.find_link().partition("?")
    experiment = client_of(tracker).get_experiment_by_name("done")
    assert page == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    options = {key: value for key, (value,) in parse_qs(query).items()}
    assert options["workflowType"] == "machine_learning" and options["compareRunsMode"] == "CHART"
    children = client_of(tracker).search_runs([experiment.experiment_id], unquote(options["searchFilter"]))
    assert sorted(run.data.tags["orchestrator.row"] for run in children) == ["d0", "d1"]


def views_of(tracker: Tracker) -> dict[str, Any]:
    """The states of the shared views by their titles."""
    tags = client_of(tracker).get_experiment_by_name(tracker.name).tags
    found = (json.loads(text) for key, text in tags.items() if key.startswith("mlflow.sharedViewState."))
    return {
        view["name"]: json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
        for view in found
    }


def test_the_ready_made_comparison_goes_along_with_the_sweep(storage: Storage) -> None:
    """Its link is the same from the beginning; the step of the images and the best trial are those of the moment."""
    compare = ComparisonView(
        params=("diffusion.T",), metrics=("eval/nll_bpd", "eval/fd_classifier"), images=("eval/samples",)
    )
    tracker = Tracker(storage, "compared")
    tracker.open_sweep({}, {}, "# A sweep", compare)
    link = tracker.find_link()
    assert tracker.is_open and tracker.flush(120).complete
    options = parse_qs(link.partition("?")[2])
    assert "searchFilter" not in options  # it would switch the shared view off
    experiment = client_of(tracker).get_experiment_by_name("compared")
    assert f"mlflow.sharedViewState.{options['viewStateShareKey'][0]}" in experiment.tags
    note = experiment.tags["mlflow.note.content"]
    assert note.startswith("# A sweep") and f"(#{link.partition('#')[2]})" in note

    def image_step() -> int:
        state = views_of(tracker)["compared: all trials"]
        [image] = [chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"]
        return int(image["step"])

    assert image_step() == 0
    for name, steps in (("c0", 7), ("c1", 4)):
        write_journal(storage, name, steps)
        tracker.open_trial(name, name, {}, {})
    assert tracker.flush(120).complete
    assert image_step() == 3  # c0 has images of 0, 3 and 6
    write_journal(storage, "c1", 7)
    tracker.close_trial("c1", "FINISHED")
    tracker.show(replace(compare, best="c1"))
    assert tracker.flush(120).complete
    assert image_step() == 6 and tracker.find_link() == link
    state = views_of(tracker)["compared: all trials"]
    [difference] = [chart for chart in state["compareRunCharts"] if chart["type"] == "DIFFERENCE"]
    (best,) = runs_of(tracker)["c1"]
    assert difference["baselineColumnUuid"] == best.info.run_id
    children = client_of(tracker).search_runs([experiment.experiment_id], state["searchFilter"])
    assert len(children) == 2


def test_provenance_says_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "orchestrator.sweep", "--storage", "s3://key:secret@bucket"])
    tags = collect_provenance()
    assert tags["command"] == "-m orchestrator.sweep --storage s3://***@bucket"
    assert tags["mlflow.source.name"] == "orchestrator.sweep"
    assert {"mlflow.user", "host", "hardware.cpu", "hardware.cores", "version.python", "version.mlflow"} <= tags.keys()
    assert all(isinstance(value, str) for value in tags.values())


def test_the_ui_says_what_is_wrong(tmp_path: Path, storage: Storage, done: Any, capsys: Any) -> None:
    assert ui.main(["--storage", str(tmp_path)]) == 2
    assert "has no mlflow.db" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.main(["--storage", storage.root, "--port", str(port)]) == 2
        assert f"--port {port + 1}" in capsys.readouterr().err


def test_the_ui_shows_the_storage_and_ends_on_ctrl_c(storage: Storage, done: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.ui", "--storage", storage.root, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout and f"http://127.0.0.1:{port}/#/" in process.stdout.readline()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 100}',
            headers={"Content-Type": "application/json"},
        )
        reply: dict[str, Any] = {}
        while not reply:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    reply = json.load(answer)
            except urllib.error.HTTPError:
                raise
            except OSError:
                continue
        assert "done" in {experiment["name"] for experiment in reply["experiments"]}
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(request, timeout=5)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
