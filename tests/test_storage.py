"""Files whole or not at all, and one holder of a lock."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import needs_root, on_small_disk, sent

from orchestrator import compare, evaluate, report, sample, status
from workers.config import Mistake
from workers.disk import Unwritable
from workers.locks import STALE_S, Held, Leases, is_locked, lock
from workers.storage import Storage


@pytest.fixture(params=["path", "uri"])
def storage(request, tmp_path) -> Storage:
    """A folder by its path and by its URI: the second takes the way of an object store."""
    (tmp_path / "root").mkdir()
    return Storage(tmp_path / "root" if request.param == "path" else (tmp_path / "root").as_uri())


def test_what_is_written_is_read_and_listed(storage):
    if not storage.is_local:
        Path(storage.root.removeprefix("file://"), "a/b").mkdir(parents=True)  # an object store has no folders to make
    storage.write("a/b/c.bin", b"\x00\xff" * 1000)
    assert storage.read("a/b/c.bin") == b"\x00\xff" * 1000
    assert storage.list("a/b") == ["c.bin"] and storage.list("a") == ["b"] and storage.list("nowhere") == []
    assert storage.exists("a/b/c.bin") and storage.exists("a") and not storage.exists("a/c.bin")
    assert storage.find_url("a/b/c.bin").endswith("root/a/b/c.bin")


def test_json_round_trip_and_nothing_where_nothing_is(storage):
    storage.write_sealed("b.json", {"x": [1, 2.5, None], "a": "é"})
    assert storage.read_sealed("b.json") == {"x": [1, 2.5, None], "a": "é"}
    assert storage.read_sealed("c.json") is None
    with pytest.raises(FileNotFoundError):
        storage.read("c.json")


def test_delete_takes_files_and_folders_and_forgives(storage):
    storage.write("a.bin", b"1")
    storage.delete("a.bin")
    storage.delete("a.bin")
    assert storage.list("") == []


def test_it_crosses_processes(storage):
    storage.write("a.bin", b"1")
    copy = sent(storage)
    assert copy.read("a.bin") == b"1" and copy.root == storage.root


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/a"])
def test_paths_stay_below_the_root(storage, path):
    with pytest.raises(AssertionError):
        storage.write(path, b"")


def test_a_write_cut_off_leaves_the_old_file_and_nothing_listed(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write("a/b.bin", b"old")

    def cut_off(*_):
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", cut_off)
        with pytest.raises(OSError, match="no power"):
            storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"old" and storage.list("a") == ["b.bin"]
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new" and storage.list("a") == ["b.bin"]


def test_a_folder_is_deleted_whole(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a/b/c.bin", b"1")
    storage.delete("a")
    assert not storage.exists("a") and storage.list("") == []


ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from workers.locks import lock
from workers.storage import Storage
with lock(Storage(sys.argv[1]), "sweeps/a/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_refuses_a_second_process_until_the_first_dies(tmp_path):
    storage = Storage(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        in_use = f"sweeps/a is in use by process {holder.pid} on "
        with pytest.raises(ValueError, match=in_use), lock(storage, "sweeps/a/lock"):
            pass
        with lock(storage, "sweeps/b/lock"):
            pass
        holder.kill()
    with lock(storage, "sweeps/a/lock"):
        pass
    with lock(storage, "sweeps/a/lock"):  # freed at the end of the `with`
        pass


def test_a_sealed_result_with_any_byte_changed_is_as_good_as_none(tmp_path):
    storage = Storage(tmp_path)
    content = {"metrics": {"eval/nll_bpd": 2.5, "n": 3}, "nll_per_image": [1.25, 2.0], "none": None, "text": "ε"}
    storage.write_sealed("a.json", content)
    whole = storage.read("a.json")
    assert storage.read_sealed("a.json") == content and storage.read_sealed("b.json") is None
    assert json.loads(storage.read("a.json")).keys() == content.keys() | {"seal"}  # plain JSON to everybody else
    believed = []
    for i in range(len(whole)):
        for changed in (whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :], whole[:i]):
            storage.write("a.json", changed)
            if (found := storage.read_sealed("a.json")) is not None:
                believed.append(found)
    assert all(found == content for found in believed)  # a space for a line's end changes nothing
    storage.write("a.json", b"[1, 2]")
    assert storage.read_sealed("a.json") is None


FILL = """
import shutil
import sys
from pathlib import Path
from workers.disk import Unwritable
from workers.storage import Storage
storage = Storage(sys.argv[1])
storage.check_writable()
storage.write("a/b.bin", b"old")
Path(sys.argv[1], "filler").write_bytes(bytes(900_000))
for call in (lambda: storage.write("a/b.bin", bytes(500_000)), lambda: storage.write("new/c.bin", bytes(500_000))):
    try:
        call()
    except Unwritable as error:
        print(error)
Path(sys.argv[1], "more").write_bytes(bytes(shutil.disk_usage(sys.argv[1]).free - 8192))
try:
    storage.check_writable()
except Unwritable as error:
    print(error)
assert storage.read("a/b.bin") == b"old"
print(sorted(path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file()))
"""


@needs_root
def test_a_full_disk_is_told_in_a_line_and_leaves_no_half_file(tmp_path):
    place = tmp_path / "small"
    done = subprocess.run(on_small_disk(place, "1m", sys.executable, "-c", FILL, place), capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    replaced, new, probe, left = done.stdout.splitlines()
    assert replaced.startswith(f"{place}/a/b.bin cannot be written: No space left on device, of which 0.1 MB are free")
    assert new.startswith(f"{place}/new/c.bin cannot be written") and "the same command then goes on" in new
    assert probe.startswith(f"{place} cannot be written: No space left on device")
    assert left == "['b.bin', 'filler', 'more']"


def test_a_storage_that_cannot_be_written_is_refused_in_a_line():
    place = Path("/proc/nowhere")
    for call in (Storage(place).check_writable, lambda: Storage(place).write("a", b"1")):
        with pytest.raises(Unwritable, match=f"^{place}.* cannot be written: "):
            call()
    with pytest.raises(Unwritable, match="cannot be written"), lock(Storage(place), "lock"):
        pass


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a/b/c.bin", b"1")
    dead, living, theirs = (tmp_path / "a/b" / f"c.bin.{name}tmp" for name in ("0123abcd.", "4567abcd.", ""))
    for path in (dead, living, theirs):
        path.write_bytes(b"half")
    with living.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        storage.remove_leftovers("a")
        assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["c.bin", living.name, theirs.name]
    storage.remove_leftovers()
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["c.bin", theirs.name]
    storage.remove_leftovers("nowhere")


def test_a_lock_says_who_holds_it_and_leaves_nothing(tmp_path):
    storage = Storage(tmp_path)
    with lock(storage, "locks/a", "sweep x"):
        assert is_locked(storage, "locks/a") and Leases(storage).find_holder("locks/a", "sweep x").endswith(
            " (sweep x)"
        )
        with pytest.raises(Held, match=r"in use by process \d+ on .* \(sweep x\)"), lock(storage, "locks/a"):
            pass
    assert (
        storage.list("locks") == []
        and not is_locked(storage, "locks/a")
        and Leases(storage).find_holder("locks/a") == ""
    )
    (tmp_path / "locks/a").write_bytes(b"\xff")  # of a holder that died while it wrote
    with lock(storage, "locks/a"):
        pass


def test_a_lease_is_nobodys_when_it_has_stayed_the_same(monkeypatch):
    """On a remote storage, which keeps no locks, the holder writes the lease anew every few seconds."""
    lease, now = {"holder": "a", "who": "process 1 on h (sweep x)", "owner": "sweep x", "beat": 0}, 100.0
    storage: Any = SimpleNamespace(
        is_local=False, read_sealed=lambda path, then: dict(lease), exists=lambda path: False
    )
    monkeypatch.setattr(time, "monotonic", lambda: now)
    leases = Leases(storage)
    assert leases.find_holder("a") == "process 1 on h (sweep x)"  # believed at first
    assert leases.find_holder("a", "sweep x") == ""  # what a command before this one has left
    now += STALE_S
    lease["beat"] = 1
    assert leases.find_holder("a")
    now += STALE_S - 1
    assert leases.find_holder("a")
    now += 2
    assert leases.find_holder("a") == ""
    lease["beat"] = 2
    assert leases.find_holder("a")
    lease.clear()
    assert leases.find_holder("a") == ""


ODD = [
    "",
    "..",
    ".",
    "/",
    "a/b",
    "../..",
    "\0",
    "a\0b",
    "x" * 300,
    "x" * 5000,
    "\u202e",
    "é" * 200,
    "*",
    "-",
    "~nobody",
]


@pytest.mark.parametrize("name", ODD)
def test_no_command_falls_over_an_odd_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sweeps").mkdir(parents=True)
    (tmp_path / "runs/trials").mkdir()
    for main, *words in (
        (status.main, "--", name),
        (report.main, "--", name),
        (sample.main, "--", name),
        (evaluate.main, "--", name),
        (compare.main, "--", name, name),
    ):
        assert main(words) == 2
        output = capsys.readouterr().err
        assert output.strip() and "Traceback" not in output


@pytest.mark.parametrize(
    "root", ["", "\0", "x" * 300, "/" + "x/" * 3000, "~nosuchuser/runs", "/dev/zero", "/dev/null/runs"]
)
def test_a_root_that_can_be_no_folder_is_a_mistake(root: str) -> None:
    with pytest.raises(Mistake, match="is no folder"):
        Storage(root)
