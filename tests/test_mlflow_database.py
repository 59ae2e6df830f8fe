"""MLflow's database: made once, never over another; what cannot be used is told."""

import re
import resource
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from sqlalchemy.engine import make_url
from tracked_sweep import DIGITS, PARAMS, history_of, points_of, run_sweep, runs_of, write_journal

from orchestrator import ui
from orchestrator.tracking import registry
from orchestrator.tracking.moves import list_left_places
from orchestrator.tracking.server import check_database, find_database, make_database, make_database_uri
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import ComparisonView
from workers.config import Mistake
from workers.data.cache import find_default_cache
from workers.storage import Storage


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
        "tracker = Tracker(Storage(sys.argv[1]), 'kept'); print(tracker.is_missing(['r0'], None))\n"
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


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_storage_that_was_moved_or_copied_has_its_artifacts_where_it_is_now(tmp_path: Path, is_copied: bool) -> None:
    """MLflow would look for those of before where the storage was, and write those of new runs there."""

    def ship(root: Path, name: str) -> None:
        storage = Storage(root)
        write_journal(storage, name, 3)
        tracker = Tracker(storage, "kept")
        tracker.check()
        tracker.open_sweep({}, {})
        tracker.open_trial(name, name, {}, {})
        tracker.log_artifact(name, f"of {name}".encode(), "trial.yaml")
        tracker.close_sweep("FINISHED")
        assert tracker.flush(120).complete

    before, after = tmp_path / "r\u00fcns", tmp_path / "other place"
    ship(before, "r0")
    shutil.copytree(before, after)
    if not is_copied:
        shutil.rmtree(before)
    there = sorted(before.rglob("*"))
    ship(after, "r1")
    assert sorted(before.rglob("*")) == there
    client = MlflowClient(make_database_uri(after / "mlflow.db"))
    experiment = client.get_experiment_by_name("kept")
    assert experiment
    for name in ("r0", "r1"):
        [run] = client.search_runs([experiment.experiment_id], f"tags.`orchestrator.row` = '{name}'")
        assert Path(client.download_artifacts(run.info.run_id, "trial.yaml")).read_text() == f"of {name}"
        assert run.info.artifact_uri.startswith((after / "mlartifacts").as_uri())
    (tmp_path / "link").symlink_to(after)
    assert list_left_places(tmp_path / "link/mlflow.db") == [], "by another name it is the same place"
