"""The address of a data set: of its content and of what changes the decoded result, and of nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import image_files
import numpy as np
import pytest
from image_files import COLOUR, LABELS, WRITERS, write_cifar, write_idx, write_images, write_parquet

from workers import memos
from workers.config import DataConfig
from workers.data import cache as cache_folder
from workers.data import sources
from workers.data.dataset import prepare
from workers.data.sources import compute_fingerprint, describe

cache = image_files.cache


@pytest.mark.parametrize("kind", WRITERS)
def test_the_address_follows_the_content_not_the_path(tmp_path, monkeypatch, kind):
    here, there = WRITERS[kind](tmp_path / "here"), tmp_path / "other" / "there"
    address = compute_fingerprint(DataConfig(source=str(here)))
    assert len(address) == 16 and int(address, 16) >= 0
    assert describe(DataConfig(source=str(here))).digest == prepare(DataConfig(source=str(here))).digest == address
    assert describe(DataConfig(source=str(here))).format == kind
    there.parent.mkdir()
    here.rename(there)
    assert compute_fingerprint(DataConfig(source=str(there))) == address
    monkeypatch.chdir(there.parent)
    assert compute_fingerprint(DataConfig(source="there")) == address, "relative to the current directory"
    monkeypatch.setenv("HOME", str(there.parent))
    assert compute_fingerprint(DataConfig(source="~/there")) == address


@pytest.mark.parametrize("kind", WRITERS)
def test_one_changed_byte_changes_the_address(tmp_path, kind):
    folder = WRITERS[kind](tmp_path / "d")
    addresses = {compute_fingerprint(DataConfig(source=str(folder)))}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # size and, within a clock tick, time stay as they were
        path.write_bytes(content)
        addresses.add(compute_fingerprint(DataConfig(source=str(folder))))
    assert len(addresses) == 1 + sum(p.is_file() for p in folder.rglob("*"))


def test_the_address_follows_what_changes_the_decoded_result(tmp_path):
    whole, split = write_images(tmp_path / "whole", COLOUR), write_cifar(tmp_path / "split")

    def address(source, **settings):
        return compute_fingerprint(DataConfig(source=str(source), **settings))

    assert len({address(whole), address(whole, resolution=2), address(whole, held_out=0.5)}) == 3
    assert address(whole) == address(whole, held_out=0.101), "3 of 30 either way"
    assert address(whole) == address(whole, flip=True), "mirroring is done while training"
    assert address(split) == address(split, held_out=0.5), "it has its own test split"
    (whole / "000.png").rename(whole / "renamed.png")
    assert address(whole) != address(write_images(tmp_path / "again", COLOUR)), "names carry the order and the classes"


def test_hashes_are_remembered_until_a_file_changes(tmp_path, cache, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", COLOUR)
    config = DataConfig(source=str(path))
    address = compute_fingerprint(config)
    assert not list(cache.glob("hashes/*")), "a file this young may change again unseen"
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    assert compute_fingerprint(config) == address
    (memo,) = cache.glob("hashes/*.json")
    entries = json.loads(memo.read_text())["content"]
    entries[str(path)][-1] = "remembered"
    memos.remember(memo, entries)
    assert compute_fingerprint(config) != address, "the memo is used: the file was not read again"
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert compute_fingerprint(config) == address, "another time of change: read again"


@pytest.mark.parametrize("how", ["replaced", "written over", "linked elsewhere", "in a folder linked elsewhere"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path, monkeypatch, kind, how):
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    WRITERS[kind](tmp_path / "real")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "real", other)
    file = max((p for p in other.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1 if kind in ("idx", "cifar10-binary") else len(content) // 2] ^= 1
    file.write_bytes(content)
    for folder in (tmp_path / "real", other):
        for path in folder.rglob("*"):
            os.utime(path, ns=(10**18, 10**18))
    there = tmp_path / "real" / file.relative_to(other)
    here = tmp_path / "here"
    if "linked" in how:
        here.symlink_to(tmp_path / "real")
        if how == "linked elsewhere":
            here.unlink()
            shutil.copytree(tmp_path / "real", here)
            (here / file.relative_to(other)).unlink()
            (here / file.relative_to(other)).symlink_to(there)
    else:
        here = tmp_path / "real"
    config = DataConfig(source=str(here))
    first = compute_fingerprint(config)
    assert compute_fingerprint(config) == first
    if how == "replaced":
        file.replace(there)
    elif how == "written over":
        there.write_bytes(content)
        os.utime(there, ns=(10**18, 10**18))
    elif how == "linked elsewhere":
        (here / file.relative_to(other)).unlink()
        (here / file.relative_to(other)).symlink_to(file)
    else:
        here.unlink()
        here.symlink_to(other)
    assert (here / file.relative_to(other)).stat().st_mtime_ns == 10**18
    assert compute_fingerprint(config) != first


def test_the_addresses_of_cifar10_and_idx_are_what_they_always_were(tmp_path):
    """Recorded: a change of these would orphan every stored trial and evaluation."""
    images = np.arange(30 * 3072, dtype=np.uint32).astype(np.uint8).reshape(30, 32, 32, 3)
    assert compute_fingerprint(DataConfig(source=str(write_cifar(tmp_path / "c", images)))) == "3dbb916c205ce09a"
    idx = write_idx(tmp_path / "i", images[:, :4, :4, :1], zipped=False)
    assert compute_fingerprint(DataConfig(source=str(idx))) == "0193c01da3efc38c"
    assert compute_fingerprint(DataConfig(source=str(idx), resolution=2)) == "9afe0c5fd06a00f1"


def test_the_addresses_and_bits_of_images_and_parquet_are_what_they_always_were(tmp_path, monkeypatch):
    """Recorded. BMP, as its encoder has no choice; and the sha256 of a Parquet file is its writer's, so it is given."""
    images = (np.arange(30 * 48, dtype=np.uint32) * 37 % 251).astype(np.uint8).reshape(30, 4, 4, 3)
    folder = write_images(tmp_path / "d", images, LABELS, "bmp")
    parquet = write_parquet(tmp_path / "d.parquet", images)

    def record(source, **settings):
        data = prepare(DataConfig(source=str(source), **settings))
        return data.digest, hashlib.sha256(data.train.tobytes() + data.held_out.tobytes()).hexdigest()[:16]

    assert record(folder) == ("d70c3ae62bf0f5ad", "006548a3408a7c89")
    assert record(folder, resolution=2, held_out=0.2) == ("290929501925a8a2", "17417c6bb12ecd28")
    monkeypatch.setattr(sources, "hash_files", lambda *_: [("train", 64 * "0")])
    assert record(parquet) == ("24b758d5896a5f31", "58498b770d0240cf")
    assert record(parquet, resolution=2) == ("6dea2fb73e1c6259", "5a2423a13fbfa547")


def test_the_dry_run_imports_neither_torch_nor_ray_nor_sklearn():
    code = """
import sys
from workers.config import DataConfig
from workers.data.sources import describe
describe(DataConfig(source="digits"))
print(sorted({"torch", "ray", "sklearn", "pyarrow"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
