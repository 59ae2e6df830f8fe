"""A storage and a data source on S3: the same behaviour as on a disk, over HTTP, with requests that get lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import aws
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_evaluation
from pyarrow import fs
from small_evaluation import checkpoint_in

from orchestrator import ui
from orchestrator.measuring import subjects
from orchestrator.nights.shift import _lock_suite
from workers import locks, remote
from workers.config import DataConfig, Mistake
from workers.data import mirror
from workers.data.dataset import prepare
from workers.data.locate import make_absolute
from workers.data.sources import compute_fingerprint, describe
from workers.data.splits import DataError
from workers.disk import StorageError
from workers.journal import Journal, read_points
from workers.locks import Leases, lock
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.storage import Storage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with aws.moto() as url:
        aws.client("s3", url).create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": aws.REGION}
        )
        yield url


@pytest.fixture(params=["environment", "uri"])
def storage(request, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """One whose address is in the environment, and one with all of it in the URI."""
    prefix = f"s3://bucket/{abs(hash(request.node.name))}"
    if request.param == "environment":
        return Storage(prefix)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = endpoint.removeprefix("http://")
    return Storage(f"{prefix}/?endpoint_override={host}&scheme=http&region={aws.REGION}")


@pytest.fixture
def own(endpoint: str, request) -> Storage:
    return Storage(f"s3://bucket/{abs(hash(request.node.name))}")


@pytest.fixture
def proxy(endpoint: str) -> Iterator[aws.Proxy]:
    made = aws.Proxy(int(endpoint.rpartition(":")[2]))
    yield made
    made.close()


def through(proxy: aws.Proxy, storage: Storage) -> Storage:
    return Storage(f"{storage.root}?endpoint_override=127.0.0.1:{proxy.port}&scheme=http")


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


# ---- One driver a sweep ----------------------------------------------------------------------------------------

HOLD = """
import sys
from workers import locks
from workers.storage import Storage
locks.BEAT_S, locks.SETTLE_S = 0.2, 0.1
with locks.lock(Storage(sys.argv[1]), "sweeps/a/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT_S": 0.2, "STALE_S": 3.0, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(locks, name, value)


def test_a_lease_refuses_a_second_process_until_the_first_dies(own: Storage, brisk: None) -> None:
    command = [sys.executable, "-c", HOLD, own.root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Mistake, match=f"in use by process {holder.pid} on "), lock(own, "sweeps/a/lock"):
            pass
        with lock(own, "sweeps/b/lock"):
            pass
        holder.kill()
    assert own.exists("sweeps/a/lock")
    with lock(own, "sweeps/a/lock"):  # abandoned: taken over
        pass
    assert not own.exists("sweeps/a/lock")
    with lock(own, "sweeps/a/lock"):  # freed at the end of the `with`
        pass


def test_a_lease_that_a_process_before_this_one_left_to_its_owner_is_taken_at_once(
    own: Storage, brisk: None, caplog
) -> None:
    left = {"holder": "another", "who": "process 1 on h (sweep x)", "owner": "sweep x", "beat": 7}
    own.write_sealed("locks/a", left)
    leases = Leases(own)
    assert leases.find_holder("locks/a") == left["who"] and leases.find_holder("locks/a", "sweep x") == ""
    with lock(own, "locks/a", "sweep x"):
        assert leases.find_holder("locks/a", "sweep y").startswith(f"process {os.getpid()} on ")
    assert leases.find_holder("locks/a") == "" and "seeing for" not in caplog.text


def test_two_nights_of_one_suite_are_not_run_beside_each_other(own: Storage, brisk: None) -> None:
    with _lock_suite(own, "nightly/small", date(2026, 3, 1)):
        refused = pytest.raises(Mistake, match="2026-03-02 is skipped: that of 2026-03-01 is still running")
        with refused, _lock_suite(own, "nightly/small", date(2026, 3, 2)):
            pass
    with _lock_suite(own, "nightly/small", date(2026, 3, 2)):
        assert own.read_sealed("nightly/small/running.json")["day"] == "2026-03-02"


def test_of_two_that_take_a_lease_in_the_same_moment_one_gets_it(own: Storage, brisk: None) -> None:
    got, together = [], threading.Barrier(2)

    def take(name: str) -> str:
        together.wait()
        try:
            with lock(Storage(own.root), "lock"):
                got.append(name)
                together.wait()
        except Mistake as mistake:
            together.wait()
            return str(mistake)
        return ""

    with ThreadPoolExecutor(2) as pool:
        output = list(pool.map(take, "ab"))
    assert len(got) == 1 and sum("in use by" in text for text in output) == 1


def test_a_damaged_lease_is_taken_over_where_nobody_writes_it_again(own: Storage, brisk: None, caplog) -> None:
    own.write("lock", b'{"holder": ')
    with lock(own, "lock"):
        assert own.read_sealed("lock")["who"].startswith("process ")
    assert "lock is damaged" in caplog.text and "is held by somebody" in caplog.text


def test_a_holder_that_lost_its_lease_is_interrupted(own: Storage, brisk: None, caplog) -> None:
    with pytest.raises(KeyboardInterrupt), lock(own, "lock"):
        own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
        threading.Event().wait(60)
    assert "taken over by process 1 on elsewhere" in caplog.text
    assert own.read_sealed("lock")["holder"] == "another"


def test_a_holder_in_another_thread_is_interrupted_there(own: Storage, brisk: None) -> None:
    came = []

    def hold() -> None:
        try:
            with lock(own, "lock"):
                own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    time.sleep(0.05)
        except KeyboardInterrupt:
            came.append("interrupt")

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert came == ["interrupt"]


@pytest.mark.parametrize("inherited", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_holder_that_inherited_sigint_as_ignored_is_interrupted_too(own: Storage, brisk: None, inherited) -> None:
    before = signal.signal(signal.SIGINT, inherited)
    try:
        with pytest.raises(KeyboardInterrupt), lock(own, "lock"):
            own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
            threading.Event().wait(60)
        assert signal.getsignal(signal.SIGINT) is inherited
    finally:
        signal.signal(signal.SIGINT, before)


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


# ---- Data ------------------------------------------------------------------------------------------------------


def parquet_of(folder: Path, seed: int = 0, count: int = 40) -> Path:
    """Colour images of 8 x 8 as PNG in the Hugging Face layout."""
    from io import BytesIO

    from PIL import Image

    rows = []
    for pixels in np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 3)).astype(np.uint8):
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    path = folder / "train-0.parquet"
    pq.write_table(pa.table({"image": rows, "label": list(range(count))}), path)
    return path


def test_data_on_s3_are_those_of_the_local_file(storage: Storage, tmp_path: Path) -> None:
    path = parquet_of(tmp_path)
    storage.write("data/images/train-0.parquet", path.read_bytes())
    here = describe(DataConfig(source=str(path)), tmp_path / "a")
    for url in (storage.find_url("data/images/train-0.parquet"), storage.find_url("data/images")):
        config = DataConfig(source=url)
        assert make_absolute(config) == config
        assert describe(config, tmp_path / "b").digest == here.digest
        dataset = prepare(config, tmp_path / "b")
        assert len(dataset.train) + len(dataset.held_out) == 40
    assert describe(DataConfig(source=storage.find_url("data/images")), tmp_path / "b").name == "images"


def test_a_folder_of_images_on_s3(own: Storage, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(10):
        file = tmp_path / f"images/{i % 2}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(file)
        own.write(f"images/{i % 2}/{i}.png", file.read_bytes())
    found = describe(DataConfig(source=own.find_url("images")), tmp_path / "cache")
    assert found.labelled and found.digest == compute_fingerprint(DataConfig(source=str(tmp_path / "images")))


PREPARE = """
import sys
from pathlib import Path
from workers.config import DataConfig
from workers.data.dataset import prepare
print(prepare(DataConfig(source=sys.argv[1]), Path(sys.argv[2])).digest)
"""


def test_a_node_copies_and_decodes_once(own: Storage, tmp_path: Path) -> None:
    """Four processes at once, and one later; then the file changes."""
    own.write("images.parquet", parquet_of(tmp_path).read_bytes())
    command = [sys.executable, "-c", PREPARE, own.find_url("images.parquet"), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    digests = {process.communicate()[0].strip() for process in started}
    assert len(digests) == 1 and all(process.returncode == 0 for process in started)
    [copy] = (tmp_path / "cache/sources").rglob("*.parquet")
    [decoded] = (tmp_path / "cache/data").glob("*/images.npy")
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in (decoded, copy)]
    config = DataConfig(source=own.find_url("images.parquet"))
    assert prepare(config, tmp_path / "cache").digest in digests
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in (decoded, copy)] == before
    own.write("images.parquet", parquet_of(tmp_path, seed=1, count=41).read_bytes())
    assert prepare(config, tmp_path / "cache").digest not in digests
    own.delete("images.parquet")
    with pytest.raises(DataError, match=r"data\.source = .*there is nothing at s3://"):
        describe(config, tmp_path / "cache")


def test_a_copy_that_was_touched_and_an_object_that_was_replaced_are_noticed(own: Storage, tmp_path: Path) -> None:
    """Each of the same size and time: what somebody wrote into the copy, and what was put within the same second."""
    contents = [parquet_of(tmp_path, seed).read_bytes() for seed in range(20)]
    first, second = next((a, b) for a in contents for b in contents if a < b and len(a) == len(b))
    cache, config = tmp_path / "cache", DataConfig(source=own.find_url("images.parquet"))
    own.write("images.parquet", first)
    digest = compute_fingerprint(config, cache)
    [copy] = (cache / "sources").rglob("*.parquet")
    stat = copy.stat()
    copy.write_bytes(second)
    os.utime(copy, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert compute_fingerprint(config, cache) == digest and copy.read_bytes() == first
    store, path = remote.open_uri(own.find_url("images.parquet"))
    for _ in range(50):
        own.write("images.parquet", first)
        assert compute_fingerprint(config, cache) == digest
        before = store.get_file_info(path).mtime_ns
        own.write("images.parquet", second)
        if store.get_file_info(path).mtime_ns == before:
            assert compute_fingerprint(config, cache) != digest and copy.read_bytes() == second
            return
    raise AssertionError("never twice in the same second")


def test_a_name_that_leads_out_of_the_copy_is_refused(own: Storage, tmp_path: Path) -> None:
    info = fs.FileInfo("bucket/images/../../../x.parquet", fs.FileType.File, size=1, mtime_ns=1)
    top = fs.FileInfo("bucket/images", fs.FileType.Directory)
    store = SimpleNamespace(get_file_info=lambda what: top if isinstance(what, str) else [info])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match="lead out of the folder"):
        patch.setattr(mirror, "open_uri", lambda uri: (store, "bucket/images"))
        mirror.mirror_uri("s3://bucket/images", tmp_path / "copies")


def test_a_copy_cut_off_is_made_again(own: Storage, proxy: aws.Proxy, tmp_path: Path, monkeypatch) -> None:
    path = parquet_of(tmp_path, count=400)
    own.write("images.parquet", path.read_bytes())
    url = through(proxy, own).find_url("images.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        remote._open_s3.cache_clear()
        proxy.to_drop, proxy.after = 100, 20_000
        with pytest.raises(DataError, match=r"data\.source"):
            describe(DataConfig(source=url), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    proxy.to_drop = 0
    remote._open_s3.cache_clear()
    assert describe(DataConfig(source=url), tmp_path / "cache").digest == compute_fingerprint(
        DataConfig(source=str(path))
    )
