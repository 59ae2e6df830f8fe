"""Disks that are full or read-only: a line says what and where, nothing half-written stays, and the rerun goes on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, needs_root, on_small_disk, statuses, trials_of, undisturbed

from orchestrator.execution.local_ray import SOCKET, SOCKET_BYTES, find_folder

pytestmark = [pytest.mark.faults, needs_root]
SWEEP = f"{sys.executable} -m orchestrator.sweep"


def inside(place: Path, size: str, script: str) -> list[str]:
    """What a shell script prints that sees a disk of that size at `place`; `$PLACE` is that."""
    command = on_small_disk(place, size, "sh", "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900,
                          env={**environment(""), "PLACE": str(place)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_sweep_whose_disk_is_full_says_so_once_and_ends_in_the_same_bits_when_there_is_room(
    tiny: Path, tmp_path: Path
) -> None:
    """The temporary folder of the second run is too long a path for Ray's sockets, besides."""
    place, out, long = tmp_path / "small", tmp_path / "out", tmp_path / ("x" * 100)
    long.mkdir()
    sweep = f"{SWEEP} {tiny} --storage $PLACE/runs"
    output = inside(
        place,
        "3300k",  # holds what is written first, and not two checkpoints of each trial beside it
        f"{sweep} 2>&1; echo status $?; echo left $(find $PLACE -name '*.tmp');"
        f"mount -o remount,size=64m $PLACE; TMPDIR={long} {sweep} 2>&1; echo status $?;"
        f"echo left $(find $PLACE -name '*.tmp'); cp -r $PLACE/runs {out}",
    )
    assert [line for line in output if line.startswith(("status", "left"))] == ["status 2", "left", "status 0", "left"]
    full = [line for line in output if "cannot be written" in line]
    assert len(full) == 1 and full[0].startswith(f"{place}/runs/") and "No space left on device, of which" in full[0]
    assert "Traceback" not in "\n".join(output)
    [moved] = [line for line in output if "too long for the sockets of Ray" in line]
    assert moved.endswith("Ray uses /tmp/ray instead")
    for digest, trial in trials_of(tiny).items():
        assert statuses(out)[digest]["checkpoint"] == undisturbed(trial, tmp_path / "plain")


def test_an_evaluation_whose_disk_is_full_says_so_once(own: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "small"
    evaluate = f"{sys.executable} -m orchestrator.evaluate tiny seed=1 --storage $PLACE/runs"
    fill = "head -c $(( $(df --output=avail -B1 $PLACE | tail -1) - 102400 )) /dev/zero > $PLACE/filler"
    output = inside(
        place,
        "16m",
        f"cp -r {own[1]} $PLACE/runs && {fill}; {evaluate} 2>&1; echo status $?;"
        f"echo left $(find $PLACE -name '*.tmp');"
        f"rm $PLACE/filler; {evaluate} 2>&1; echo status $?",
    )
    assert [line for line in output if line.startswith(("status", "left"))] == ["status 2", "left", "status 0"]
    full = [line for line in output if "cannot be written" in line]
    assert len(full) == 1 and full[0].startswith(f"{place}/runs/evaluations/") and "Traceback" not in "\n".join(output)


def test_a_storage_that_cannot_be_written_is_refused_before_any_work(own: tuple[Path, Path], tmp_path: Path) -> None:
    file, storage = own
    first, second = sorted(statuses(storage))
    commands = {
        "sweep": f"{file} name=new",
        "evaluate": f"{first} seed=1",
        "sample": first,
        "canary": "",
        "nightly": "experiments/nightly.yaml",
        "compare": f"{first} {second}",
    }
    script = "".join(
        f"echo {name}; {sys.executable} -m orchestrator.{name} {words} --storage $PLACE/runs 2>&1; echo status $?;"
        for name, words in commands.items()
    )
    output = inside(tmp_path / "small", "16m", f"cp -r {storage} $PLACE/runs; mount -o remount,ro $PLACE; {script}")
    for name in commands:
        told = output[output.index(name) + 1 :]
        told = told[: next(i for i, line in enumerate(told) if line.startswith("status ")) + 1]
        if name == "compare":  # which writes nothing
            assert told[-1] == "status 0" and "95 % of 30 pairs of images" in "\n".join(told)
            continue
        refused = [line for line in told if "cannot be written: Read-only file system" in line]
        assert told[-1] == "status 2" and len(refused) == 1, (name, told)
        assert "Traceback" not in "\n".join(told) and not any("samples by" in line for line in told)


def test_the_first_folder_that_ray_can_work_in_is_taken(tmp_path: Path) -> None:
    good, blocked, long = tmp_path / "ray", tmp_path / "file/ray", tmp_path / ("x" * 100)
    (tmp_path / "file").write_text("")
    folder, unfit = find_folder([long, blocked, good])
    if len(str(good / SOCKET)) <= SOCKET_BYTES:
        assert folder == good and len(unfit) == 2
        assert "bytes too long for the sockets of Ray" in unfit[0] and "cannot be written" in unfit[1]
    assert find_folder([long])[0] is None
    shutil.rmtree(tmp_path / "ray", ignore_errors=True)
