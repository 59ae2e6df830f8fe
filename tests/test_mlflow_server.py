"""MLflow's server: what dies or stumbles is waited for, what no waiting mends is told at once."""

import socket
from pathlib import Path

import pytest
import tracked_sweep
from mlflow_server import Between, Server, answer
from tracked_sweep import DIGITS, PARAMS, history_of, image_files, points_of, run_sweep, runs_of, write_journal

from orchestrator.tracking import registry
from orchestrator.tracking.server import connect, find_unused, make_database_uri, say_unused
from orchestrator.tracking.tracker import Tracker
from workers.config import Mistake
from workers.storage import Storage

storage = tracked_sweep.storage
server = tracked_sweep.server


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
