"""MLflow holds what the journals hold, once, whatever dies in between."""

import base64
import json
import math
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from mlflow import MlflowClient
from mlflow_server import Server
from PIL import Image

from orchestrator import ui
from orchestrator.tracking.provenance import provenance
from orchestrator.tracking.server import make_database, resolve_uri
from orchestrator.tracking.tracker import Dataset, Tracker, param_text
from orchestrator.tracking.views import Comparison
from workers.storage import Storage

PARAMS = {"diffusion.T": 50, "training.lr": 1e-4, "model.multipliers": [1, 2], "loss.weighting": "simple"}
DIGITS = Dataset(name="digits", digest="d" * 64, source="digits", shape=(8, 8, 1), profile={"training": 1617})
START_MS = 1_764_000_000_000


def write_journal(storage: Storage, digest: str, steps: int, name: str = "a") -> list[dict[str, Any]]:
    """`steps` lines of two metrics and an image at every third step; returns the lines."""
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        at = START_MS + 10 * step + ord(name)
        lines.append(
            {"step": step, "time_ms": at, "metrics": {"train/loss_simple": 1 / (step + 1), "valid/nll_bpd": 3.5}}
        )
        if step % 3 == 0:
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
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri)


def runs_of(tracker: Tracker) -> dict[str, list[Any]]:
    """The active runs of the sweep's experiment by their address."""
    client = client_of(tracker)
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([client.get_experiment_by_name(tracker.name).experiment_id]):
        found.setdefault(run.data.tags.get("orchestrator.address", ""), []).append(run)
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
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One database for the module, a sweep's name for a test: making the database takes seconds."""
    return Storage(tmp_path_factory.mktemp("runs"))


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
    assert [param_text(value) for value in (1e-5, True, None, 0.1 + 0.2)] == [
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


@pytest.mark.parametrize("lost", ["nothing", "shipped", "all"])
def test_the_same_command_again_leaves_nothing_twice(done: Any, storage: Storage, lost: str) -> None:
    tracker, lines = done
    path = "sweeps/done/mlflow.json"
    before = {digest: [run.info.run_id for run in runs] for digest, runs in runs_of(tracker).items()}
    images = image_files(tracker, runs_of(tracker)["d0"][0])
    if lost == "shipped":
        state = storage.read_json(path)
        for entry in state["mlflow.db"].values():
            entry["lines"] = 0
        storage.write_json(path, state)
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


def test_deleted_runs_are_made_again_and_replayed(storage: Storage) -> None:
    lines = write_journal(storage, "x0", 5)
    tracker = run_sweep(storage, "deleted", ("x0",))
    (old,) = runs_of(tracker)["x0"]
    client_of(tracker).delete_run(old.info.run_id)
    again = run_sweep(storage, "deleted", ("x0",))
    (new,) = runs_of(again)["x0"]
    assert new.info.run_id != old.info.run_id
    assert history_of(again, new, "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")
    experiment = client_of(again).get_experiment_by_name("deleted")
    client_of(again).delete_experiment(experiment.experiment_id)
    assert "x0" in runs_of(run_sweep(storage, "deleted", ("x0",)))


def test_a_journal_started_anew_gets_a_run_of_its_own(storage: Storage) -> None:
    write_journal(storage, "f0", 5, name="a")
    tracker = run_sweep(storage, "fresh", ("f0",))
    (old,) = runs_of(tracker)["f0"]
    lines = write_journal(storage, "f0", 6, name="b")
    run_sweep(storage, "fresh", ("f0",))
    runs = runs_of(tracker)
    (new,), (aside,) = runs["f0"], runs[""]
    assert aside.info.run_id == old.info.run_id and aside.data.tags["superseded"] == "true"
    assert "mlflow.parentRunId" not in aside.data.tags
    assert history_of(tracker, new, "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")


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


def test_a_run_whose_making_was_answered_by_an_error_is_not_made_twice(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

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
    assert not left.complete and "image trials/m0/samples/step-00000000.png: no such file" in str(left)
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
        assert template.parent.name not in str(client.get_experiment("0").artifact_location)
    make_database(tmp_path / "b/mlflow.db", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/b/mlflow.db")
    assert client.get_experiment_by_name("of b") is not None


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
    assert tracker.link().startswith(f"{server.uri}/#/experiments/")

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
    assert sorted(storage.read_json("sweeps/served/mlflow.json")) == [server.uri, "mlflow.db"]
    server.stop()
    assert capfd.readouterr() == ("", "")  # MLflow and alembic write nothing between the sweep's own lines


def test_an_address_where_nobody_listens_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can start to
        taken.bind(("127.0.0.1", 0))
        tracker = Tracker(Storage(tmp_path), "dead", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            ValueError, match=r"(?s)No MLflow server answers at tracking.uri=http.*refused.*mlflow server --host"
        ):
            tracker.check()


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
    page, _, query = tracker.link().partition("?")
    experiment = client_of(tracker).get_experiment_by_name("done")
    assert page == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    options = {key: value for key, (value,) in parse_qs(query).items()}
    assert options["workflowType"] == "machine_learning" and options["compareRunsMode"] == "CHART"
    children = client_of(tracker).search_runs([experiment.experiment_id], unquote(options["searchFilter"]))
    assert sorted(run.data.tags["orchestrator.address"] for run in children) == ["d0", "d1"]


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
    compare = Comparison(
        params=("diffusion.T",), metrics=("eval/nll_bpd", "eval/fd_classifier"), images=("eval/samples",)
    )
    tracker = Tracker(storage, "compared")
    tracker.open_sweep({}, {}, "# A sweep", compare)
    link = tracker.link()
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
    assert image_step() == 6 and tracker.link() == link
    state = views_of(tracker)["compared: all trials"]
    [difference] = [chart for chart in state["compareRunCharts"] if chart["type"] == "DIFFERENCE"]
    (best,) = runs_of(tracker)["c1"]
    assert difference["baselineColumnUuid"] == best.info.run_id
    children = client_of(tracker).search_runs([experiment.experiment_id], state["searchFilter"])
    assert len(children) == 2


def test_provenance_says_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "orchestrator.sweep", "--storage", "s3://key:secret@bucket"])
    tags = provenance()
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
