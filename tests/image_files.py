"""The same images as files of every format, and what must come of them."""

import gzip
import io
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers.config import DataConfig
from workers.data.dataset import Dataset, prepare
from workers.data.sources import describe
from workers.data.splits import DataError

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)  # random: no two images are equal
GREY = RANDOM.integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
CIFAR = RANDOM.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(30) % 7


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(pixels: np.ndarray, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, kind, **options)
    return stream.getvalue()


def write_parquet(path: Path, images, labels=LABELS, column="img", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(i) if isinstance(i, np.ndarray) else i, "path": None} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {column: pa.array(cells, kind)}
    if labels is not None:
        table["label"] = pa.array([None if v is None else int(v) for v in labels][: len(cells)], pa.int64())
    pq.write_table(pa.table(table), path, **options)
    return path


def write_images(folder: Path, images, classes=None, kind="png") -> Path:
    for row, pixels in enumerate(images):
        path = folder / (f"class{classes[row]}" if classes is not None else "") / f"{row:03}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels, kind, **({"lossless": True} if kind == "webp" else {})))
    return folder


def write_cifar(folder: Path, images=CIFAR, labels=LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(-1, 3072)], 1)
    for name, part in {
        "data_batch_1": records[:10],
        "data_batch_2": records[10:20],
        "test_batch": records[20:],
    }.items():
        (folder / f"{name}.bin").write_bytes(part.tobytes())
    return folder


def write_idx(folder: Path, images=GREY, labels=LABELS, zipped=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if zipped else bytes
    for split, part in {"train": slice(0, 20), "t10k": slice(20, 30)}.items():
        x, y = images[part, :, :, 0], labels[part].astype(np.uint8)
        for name, magic, content in (("images-idx3", 3, x), ("labels-idx1", 1, y)):
            header = bytes([0, 0, 8, magic]) + struct.pack(f">{magic}I", *content.shape)
            path = folder / f"{split}-{name}-ubyte{'.gz' * zipped}"
            path.write_bytes(pack(header + content.tobytes()))
    return folder


def write_arrays(folder: Path, images=COLOUR, labels=LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


def pairs(images, labels) -> Counter:
    return Counter((np.asarray(i).tobytes(), int(label)) for i, label in zip(images, labels, strict=True))


def check(data: Dataset, images: np.ndarray, labels=LABELS, train: int = 20) -> None:
    """Every image is there once, bit for bit, with its own label; where the source has splits, in its own split."""
    assert data.shape == images.shape[1:] and data.levels == 256
    assert data.train.dtype == data.held_out.dtype == np.uint8
    assert data.train_labels.dtype == data.held_out_labels.dtype == np.int64
    assert pairs(data.train, data.train_labels) == pairs(images[:train], labels[:train])
    assert pairs(data.held_out, data.held_out_labels) == pairs(images[train:], labels[train:])
    assert not np.array_equal(data.train, images[:train]), "stored in a shuffled order"


def warnings_of(source: Path | str, **settings) -> str:
    return "\n".join(describe(DataConfig(source=str(source), **settings)).warnings)


WRITERS = {
    "parquet": lambda path: write_parquet(path / "train-0.parquet", COLOUR).parent,
    "images": lambda path: write_images(path, COLOUR),
    "cifar10-binary": write_cifar,
    "idx": lambda path: write_idx(path, zipped=False),
    "arrays": write_arrays,
}


def fails(source: Path | str, *words: str, **settings) -> None:
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(source=str(source), **settings))
    for word in (f"data.source = {str(source)!r}", *words):
        assert word in str(caught.value)
