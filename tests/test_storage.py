"""Files whole or not at all, and one holder of a lock."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sent

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
    assert storage.url("a/b/c.bin").endswith("root/a/b/c.bin")


def test_json_round_trip_and_nothing_where_nothing_is(storage):
    storage.write_json("b.json", {"x": [1, 2.5, None], "a": "é"})
    assert storage.read_json("b.json") == {"x": [1, 2.5, None], "a": "é"}
    assert storage.read_json("c.json") is None
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
from workers.storage import Storage
with Storage(sys.argv[1]).lock("sweeps/a/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_refuses_a_second_process_until_the_first_dies(tmp_path):
    storage = Storage(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another process"), storage.lock("sweeps/a/lock"):
            pass
        with storage.lock("sweeps/b/lock"):
            pass
        holder.kill()
    with storage.lock("sweeps/a/lock"):
        pass
    with storage.lock("sweeps/a/lock"):  # freed at the end of the `with`
        pass


def test_a_sealed_result_with_any_byte_changed_is_as_good_as_none(tmp_path):
    storage = Storage(tmp_path)
    content = {"metrics": {"eval/nll_bpd": 2.5, "n": 3}, "nll_per_image": [1.25, 2.0], "none": None, "text": "ε"}
    storage.write_sealed("a.json", content)
    whole = storage.read("a.json")
    assert storage.read_sealed("a.json") == content and storage.read_sealed("b.json") is None
    assert storage.read_json("a.json").keys() == content.keys() | {"sha256"}  # plain JSON to everybody else
    believed = []
    for i in range(len(whole)):
        for changed in (whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :], whole[:i]):
            storage.write("a.json", changed)
            if (found := storage.read_sealed("a.json")) is not None:
                believed.append(found)
    assert all(found == content for found in believed)  # a space for a line's end changes nothing
    storage.write("a.json", b"[1, 2]")
    assert storage.read_sealed("a.json") is None
