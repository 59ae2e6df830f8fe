"""A folder lies where a file belongs: that is told as what it is, and hides nothing else."""

import shutil
from pathlib import Path

import pytest
from conftest import run

from workers.disk import StorageError
from workers.storage import Storage


def test_a_folder_for_a_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    for read in (Storage(tmp_path).read, Storage(tmp_path).read_sealed):
        with pytest.raises(StorageError, match=r"a\.json is a folder, where a file belongs; remove it"):
            read("a.json")


@pytest.mark.parametrize("name", ["sweep.json", "events.jsonl"])
def test_one_sweep_with_such_a_folder_hides_no_other(name: str, own: tuple[Path, Path]) -> None:
    _, storage = own
    shutil.copytree(storage / "sweeps/tiny", storage / "sweeps/spoilt")
    (storage / f"sweeps/spoilt/{name}").unlink()
    (storage / f"sweeps/spoilt/{name}").mkdir()
    seen = run("orchestrator.status", "--storage", storage)
    assert seen.returncode == 0 and "tiny" in seen.stdout and "Traceback" not in seen.stderr, seen.stdout + seen.stderr
    told = (
        "is a folder, where a file belongs" if name == "sweep.json" else "spoilt/sweep.json is damaged"
    )  # it was moved
    assert told in seen.stdout + seen.stderr
