"""Decoded images are kept, proven and made again, whoever prepares them and whatever is damaged."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import image_files
import numpy as np
import pytest
from image_files import CIFAR, COLOUR, GREY, LABELS, RANDOM, check, fails, write_cifar, write_images, write_parquet

from workers import memos
from workers.config import DataConfig
from workers.data import cache as cache_folder
from workers.data import dataset as data_module
from workers.data import proofs
from workers.data.dataset import prepare
from workers.data.decoding import decode
from workers.data.sources import compute_fingerprint, describe

cache = image_files.cache


def test_a_prepared_set_is_opened_not_decoded_again(tmp_path, cache, monkeypatch):
    config = DataConfig(source=str(write_images(tmp_path / "d", COLOUR, LABELS)))
    first = prepare(config)
    monkeypatch.setattr(data_module, "decode", None)  # would fail if it were called
    second = prepare(config)
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable
    assert np.array_equal(second.train, first.train)
    assert {p.name for p in (cache / "data" / first.digest).iterdir()} == {"images.npy", "labels.npy", "meta.json"}


def damages(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0x20
    return {
        "a flipped bit": bytes(flipped),
        "cut": content[:-7],
        "empty": b"",
        "foreign": b"[1, 2]",
        "binary": b"\xff\0",
    }


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "foreign", "binary", "gone"])
def test_a_prepared_set_is_proven_whole_or_made_again(tmp_path, cache, caplog, name, damage):
    """Also where size and time stay, and also in the process that had it open before."""
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    path = cache / "data" / prepare(config).digest / name
    stat, content = path.stat(), path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(damages(content)[damage])
    if damage != "gone":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check(prepare(config), CIFAR)
    if name != "meta.json" or damage != "gone":
        assert [str(path) in record.getMessage() for record in caplog.records] == [True], "told once, by its name"
    caplog.clear()
    check(prepare(config), CIFAR)
    assert not caplog.records


@pytest.mark.parametrize("what", ["hashes", "surveys"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "foreign", "binary"])
def test_a_damaged_memo_is_made_again(tmp_path, cache, caplog, monkeypatch, what, damage):
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    config = DataConfig(source=str(write_images(tmp_path / "d", GREY, LABELS)))
    found = describe(config)
    [memo] = (cache / what).glob("*.json")
    content = memo.read_bytes()
    memo.write_bytes(damages(content)[damage])
    assert describe(config) == found
    assert str(memo) in caplog.text and memo.read_bytes() == content
    caplog.clear()
    assert describe(config) == found and not caplog.records


def test_a_prepared_set_under_the_name_of_another_is_not_believed(tmp_path, cache, caplog):
    ours, other = DataConfig(source=str(write_cifar(tmp_path / "d"))), DataConfig(source="gaussian")
    folder = cache / "data" / prepare(ours).digest
    shutil.copytree(folder, cache / "data" / compute_fingerprint(other))
    assert prepare(other).shape == (8, 8, 1) and "is that of another data set" in caplog.text


def test_a_big_set_is_read_through_once_on_a_machine(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(proofs, "BIG", 1)
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    folder = cache / "data" / prepare(config).digest
    proofs._proven.clear()  # as in another process
    read: list[Path] = []
    monkeypatch.setattr(proofs, "hash_file", lambda path: read.append(path) or memos.hash_file(path))
    prepare(config)
    assert not [path for path in read if path.suffix == ".npy"]
    stored = np.load(folder / "images.npy", mmap_mode="r+")
    stored[0, 0, 0, 0] ^= 1
    stored.flush()
    check(prepare(config), CIFAR)
    monkeypatch.setattr(proofs, "_read_boot_id", lambda: "another")
    proofs._proven.clear()
    read.clear()
    prepare(config)
    assert [p.name for p in read if p.suffix == ".npy"] == ["images.npy", "labels.npy"], "read through after a boot"


def test_a_folder_without_its_commit_mark_is_built_again(tmp_path, cache):
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    folder = cache / "data" / prepare(config).digest
    (folder / "meta.json").unlink()
    (folder / "images.npy").write_bytes(b"cut off")
    check(prepare(config), CIFAR)


def _prepare_in_a_process(source: str, barrier, results) -> None:
    barrier.wait()
    data = prepare(DataConfig(source=source))
    assert isinstance(data.train, np.memmap)
    built = Path(str(data.train.filename)).stat()
    sums = int(data.train.sum()), int(data.held_out.sum())
    results.put((data.digest, *sums, data.train_labels.tolist(), built.st_ino, built.st_mtime_ns))


def test_several_processes_preparing_at_once(tmp_path, cache):
    source, spawn = str(write_images(tmp_path / "d", COLOUR, LABELS)), multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_prepare_in_a_process, args=(source, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(f == found[0] for f in found), "one file, built once, the same for all"
    assert sorted(p.name for p in (cache / "data").iterdir()) == [found[0][0], f"{found[0][0]}.lock"]
    data = prepare(DataConfig(source=source))
    assert (int(data.train.sum()), int(data.held_out.sum())) == found[0][1:3]


def test_a_process_killed_while_it_decodes_leaves_nothing_that_counts(tmp_path, cache):
    images = RANDOM.integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    config = DataConfig(source=str(write_parquet(tmp_path / "d.parquet", images, None)))
    code = f"""
import itertools, os, signal
from workers.data import dataset as data
calls, decode = itertools.count(), data.decode
data.decode = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 400 else decode(*a)
data.prepare(data.DataConfig(source={config.source!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert list(cache.glob("data/*.partial")) and not list(cache.glob("data/*/meta.json"))
    data = prepare(config)
    stored = Counter(i.tobytes() for i in (*data.train, *data.held_out))
    assert stored == Counter(i.tobytes() for i in images) and not list(cache.glob("data/*.partial"))


def test_files_that_change_while_they_are_decoded_are_not_believed(tmp_path, cache, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", COLOUR)

    def decode_and_change(item, *settings):
        if item.name.endswith("row 20"):
            write_parquet(path, COLOUR[::-1])
        return decode(item, *settings)

    monkeypatch.setattr(data_module, "decode", decode_and_change)
    fails(path, "its files changed while they were decoded")
    assert [p.suffix for p in (cache / "data").iterdir()] == [".lock"]


NO_ROOM = """
import resource, sys
from workers.config import DataConfig
from workers.data.splits import DataError
from workers.data.dataset import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    prepare(DataConfig(source=sys.argv[1]))
except DataError as error:
    print(error)
"""


def test_no_room_for_the_decoded_images(tmp_path, cache):
    source = write_cifar(tmp_path / "d")
    done = subprocess.run([sys.executable, "-c", NO_ROOM, source], capture_output=True, text=True, check=True)
    assert "for which there is no room in" in done.stdout and "ORCHESTRATOR_CACHE" in done.stdout
    assert [p.suffix for p in (cache / "data").iterdir()] == [".lock"] and done.stderr == ""
