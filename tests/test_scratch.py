"""The folder in which Tune keeps its notes outlives no driver for long."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from orchestrator.execution.scratch import make_scratch_folder

HOLDER = """
import sys
from orchestrator.execution.scratch import make_scratch_folder
with make_scratch_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_driver_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(2)
    ]
    try:
        killed, alive = (Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout)
        (killed / "notes").mkdir()
        holders[0].kill()
        holders[0].wait()
        assert killed.is_dir() and alive.is_dir()
        with make_scratch_folder() as own:
            assert set(tmp_path.iterdir()) == {alive, Path(own)}
        assert list(tmp_path.iterdir()) == [alive]
        holders[1].communicate("")
        assert list(tmp_path.iterdir()) == []
    finally:
        for holder in holders:
            holder.kill()
