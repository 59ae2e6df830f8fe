"""A data source on S3: the same data as on a disk, copied and decoded once a node."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import aws
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_storage
from pyarrow import fs
from s3_storage import through

from workers import remote
from workers.config import DataConfig
from workers.data import mirror
from workers.data.dataset import prepare
from workers.data.locate import make_absolute
from workers.data.sources import compute_fingerprint, describe
from workers.data.splits import DataError
from workers.disk import StorageError
from workers.storage import Storage

ROOT = Path(__file__).parent.parent

endpoint = s3_storage.endpoint
storage = s3_storage.storage
own = s3_storage.own
proxy = s3_storage.proxy


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
