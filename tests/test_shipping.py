"""Each point and run is in MLflow once, however often a command is killed, moved or given again."""

import json
import math
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tracked_sweep
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tracked_sweep import PARAMS, client_of, history_of, image_files, points_of, run_sweep, runs_of, write_journal

from orchestrator.tracking.server import find_database
from orchestrator.tracking.shipper import is_of_another_training
from orchestrator.tracking.tracker import Tracker
from workers.storage import Storage

storage = tracked_sweep.storage
done = tracked_sweep.done


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
    journal.add_metrics(step, {"valid/nll_bpd": 3 + 1 / (step + 1), "train/images_per_s": 1.0 + step})
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
