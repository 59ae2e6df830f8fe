"""A storage on S3: the same behaviour as on a disk, over HTTP, with requests that get lost."""

import signal
import subprocess
import sys
from pathlib import Path

import aws
import numpy as np
import pytest
import s3_storage
import small_evaluation
from s3_storage import through
from small_evaluation import checkpoint_in

from orchestrator import ui
from orchestrator.measuring import subjects
from workers import remote
from workers.config import Mistake
from workers.disk import StorageError
from workers.journal import Journal, read_points
from workers.locks import lock
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.storage import Storage

ROOT = Path(__file__).parent.parent

endpoint = s3_storage.endpoint
storage = s3_storage.storage
own = s3_storage.own
proxy = s3_storage.proxy


# ---- Files -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    assert storage.list("") == [] and not storage.exists("a")
    storage.write("a/b/c.bin", b"\x00\xff" * 1000)
    storage.write("a/d.bin", b"1")
    storage.write("a/b/empty.bin", b"")
    assert storage.read("a/b/c.bin") == b"\x00\xff" * 1000 and storage.read("a/b/empty.bin") == b""
    assert storage.list("") == ["a"] and storage.list("a") == ["b", "d.bin"] and storage.list("nowhere") == []
    assert storage.exists("a/b/c.bin") and storage.exists("a/b") and not storage.exists("a/c.bin")
    storage.write("a/d.bin", b"2")
    assert storage.read("a/d.bin") == b"2"
    storage.delete("a/b")
    storage.delete("a/b")
    storage.delete("nothing")
    assert storage.list("a") == ["d.bin"] and not storage.exists("a/b/c.bin")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b/c.bin")


def test_what_a_person_is_told_opens_again(storage: Storage) -> None:
    storage.write("a/b.bin", b"1")
    assert Storage(storage.find_url("a")).read("b.bin") == b"1"
    assert storage.find_url("a/b.bin").partition("?")[0].endswith("/a/b.bin")
    assert storage.find_url().partition("?")[2] == storage.root.partition("?")[2]


def test_a_large_file_comes_back_whole(own: Storage) -> None:
    content = np.random.RandomState(0).bytes(12_000_000)  # of several parts
    own.write("large.bin", content)
    assert own.read("large.bin") == content


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://KEY:SECRET@bucket/a", "holds a key"),
        ("s3://bucket/a?endpoint=127.0.0.1", "valid: region, endpoint_override, scheme"),
        ("s3:///a", "names no bucket"),
        ("nothing://bucket/a", "cannot be opened"),
    ],
)
def test_a_uri_that_cannot_be_is_refused_at_once(uri: str, expected: str) -> None:
    with pytest.raises(Mistake, match=expected) as told:
        Storage(uri)
    assert "SECRET" not in str(told.value)


# ---- Faults ----------------------------------------------------------------------------------------------------


def test_lost_answers_are_asked_for_again(own: Storage, proxy: aws.Proxy) -> None:
    content = np.random.RandomState(0).bytes(300_000)
    lossy = through(proxy, own)
    proxy.to_drop, proxy.after = 3, 0
    lossy.write("a.bin", content)
    assert proxy.dropped == 3 and own.read("a.bin") == content
    proxy.to_drop, proxy.after = 3, 100_000  # in the middle of the body
    assert lossy.read("a.bin") == content
    assert proxy.dropped >= 4
    proxy.to_drop, proxy.after = 2, 0
    assert lossy.list("") == ["a.bin"] and lossy.exists("a.bin")


def test_a_store_that_is_not_there_is_told(own: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    remote._open_s3.cache_clear()
    dead = Storage(f"{own.root}?endpoint_override=127.0.0.1:{aws.free_port()}&scheme=http")
    elsewhere = Storage("s3://no-such-bucket/a")
    for call in (dead.list, dead.exists, dead.read, lambda path: dead.write(path, b""), dead.delete):
        with pytest.raises(StorageError, match=r"cannot be reached .*Could not connect"):
            call("a")
    with pytest.raises(Mistake, match="The specified bucket does not exist"):
        elsewhere.write("a", b"")
    with pytest.raises(Mistake, match="cannot be reached"), lock(dead, "lock"):
        pass


class Interrupting:
    """The store's filesystem, which does something in the middle of a write."""

    def __init__(self, inner, action) -> None:
        self.inner, self.action = inner, action

    def open_output_stream(self, path: str):
        stream = self.inner.open_output_stream(path)
        self.action()
        return stream


def test_ctrl_c_in_the_middle_of_a_write_leaves_the_whole_file(own: Storage) -> None:
    own.write("a.bin", b"old")
    interrupted = Storage(own.root)
    interrupted._fs = Interrupting(own._fs, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        interrupted.write("a.bin", b"new")
    assert own.read("a.bin") == b"new"


KILLED = """
import os, sys
from workers.storage import Storage
storage = Storage(sys.argv[1])
class Killing:
    def open_output_stream(self, path):
        stream = inner.open_output_stream(path)
        stream.write(b"x" * 12_000_000)
        stream.flush()
        os.kill(os.getpid(), 9)
inner, storage._fs = storage._fs, Killing()
storage.write("a.bin", b"new")
"""


def test_a_writer_that_is_killed_leaves_the_old_file(own: Storage) -> None:
    own.write("a.bin", b"old")
    result = subprocess.run([sys.executable, "-c", KILLED, own.root], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL
    assert own.read("a.bin") == b"old" and own.list("") == ["a.bin"]


# ---- Checkpoints, journals -------------------------------------------------------------------------------------


def test_a_checkpoint_is_saved_loaded_and_found_damaged(storage: Storage) -> None:
    checkpoint = checkpoint_in(storage)
    found = manifest.find_newest(storage, "trials/a/checkpoints")
    by_url = checkpoints.open_folder(checkpoint.url)
    assert found == checkpoint and by_url.digest == checkpoint.digest
    assert checkpoints.load(by_url)[1].T == small_evaluation.T
    assert storage.list("trials/a/checkpoints") == ["step-00000001"]
    weights = f"{checkpoint.path}/{manifest.WEIGHTS}"
    storage.write(weights, storage.read(weights)[:-1])
    with pytest.raises(manifest.CheckpointError, match="its sha256 differs"):
        checkpoints.load(found)
    storage.delete(weights)
    with pytest.raises(manifest.CheckpointError, match="is missing"):
        checkpoints.load(found)


def test_a_folder_that_is_not_there_is_told(own: Storage) -> None:
    with pytest.raises(manifest.CheckpointError, match="is not a folder, or an empty one"):
        checkpoints.open_folder(own.find_url("nowhere"))


def test_a_journal_goes_on_where_it_was(own: Storage) -> None:
    journal = Journal(own, "trials/a")
    journal.add_metrics(1, {"x": 1.0})
    journal.add_image(1, "samples", b"png")
    journal.flush()
    again = Journal(own, "trials/a")
    again.add_metrics(1, {"x": 2.0})
    again.add_metrics(2, {"x": 3.0})
    again.flush()
    assert again.get(1, "x") == 1.0 and len(read_points(own, "trials/a")) == 3


def test_a_checkpoint_is_found_by_its_uri(storage: Storage) -> None:
    checkpoint = checkpoint_in(storage)
    with pytest.raises(Mistake, match=r"give data\.source"):
        subjects.find(checkpoint.url, storage, [], None)
    [subject] = subjects.find(checkpoint.url, storage, ["data.source=digits"], None)
    assert subject.name == "step-00000001" and subject.checkpoint.digest == checkpoint.digest
    assert subjects._find_inside(storage.find_url("sweeps/tiny"), storage) == "tiny"
    assert subjects._find_inside("s3://bucket/elsewhere/sweeps/tiny", storage) == ""


def test_the_ui_says_where_mlflow_is(own: Storage, capsys) -> None:
    assert ui.main(["--storage", own.root]) == 2
    assert "a server of its own" in capsys.readouterr().err
