"""What lies at a source: one function a format, from a path to `Files`, nothing decoded.

To add a format, write a function from a path to `Files` (None where the path holds something else) and list it in
`FORMATS`; the first that finds its own is taken. `workers.data` decodes what they give, and keeps it.
"""

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from workers.config import Mistake

CHUNK = 128  # encoded images in memory at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST_NAMES = ("test", "validation")  # of the held-out split; the first that is there is taken
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
GAUSSIAN_SHA256 = "f1df631486df9f08144835587ecb45fbe11f06b659dfeba209c4645379ddc467"
GAUSSIAN_SD = 0.2  # of the source `gaussian`, on the [-1, 1] scale
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)

Pixels = NDArray[np.uint8]


class DataError(Mistake):
    """The data are not what the configuration says; the message tells what was found and what to do."""


class Item(NamedTuple):
    """One image as its source holds it."""

    name: str  # for messages: the file, or the file and row
    image: bytes | Path | Pixels  # encoded, or pixels: uint8 HWC
    label: int | None = None


@dataclass(frozen=True)
class Split:
    """A part of a source, nothing decoded. `read` streams its `count` items in the source's own order."""

    count: int
    labelled: bool
    read: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Files:
    """What lies at a source. `held_out` is its test split, or how many images to hold out, or None: a fraction."""

    paths: list[tuple[str, Path]]  # what of each file's name counts for the address, and the file; none if built in
    train: Split
    held_out: Split | int | None = None
    levels: int = 256
    like: Pixels | None = None  # an image of the size and channels of all, where they are known without decoding
    sha256: str | None = None  # of a built-in source's bytes: its address needs no reading


@contextmanager
def whole(name: str) -> Iterator[None]:
    """What PIL, pyarrow and gzip raise on damaged content becomes a message that names the file or row."""
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        reason = str(error).split(" <_io.")[0]  # PIL shows the address of the stream
        raise DataError(f"{name} is damaged or cut off ({reason}); copy it again or remove it") from error


def _digits() -> Files:
    """scikit-learn's embedded 1,797 handwritten digits, 8x8 in 17 levels; 300 are held out."""

    def read() -> Iterator[Item]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != DIGITS_SHA256:
            raise DataError("this version of scikit-learn ships other digits; install scikit-learn 1.9")
        for row, image in enumerate(images):
            yield Item(f"digit {row}", image[:, :, None], int(labels[row]))

    like = np.zeros((8, 8, 1), np.uint8)
    return Files([], Split(1797, True, read), held_out=300, levels=17, like=like, sha256=DIGITS_SHA256)


def _gaussian() -> Files:
    """2,500 images of 8x8 independent pixels from N(0, GAUSSIAN_SD^2) on [-1, 1], in 256 levels; 500 held out.

    Their best denoiser and its bound are known exactly (`workers.diffusion.gaussian`). The ends of the scale lie five
    standard deviations away: a pixel would pass them with probability 5.7e-7, and none of these does.
    """

    def read() -> Iterator[Item]:
        x = GAUSSIAN_SD * np.random.RandomState(0).standard_normal((2500, 8, 8, 1))  # frozen, as in `_rows`
        images = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        if hashlib.sha256(images.tobytes()).hexdigest() != GAUSSIAN_SHA256:
            raise DataError("this version of NumPy draws other normal numbers from RandomState; install NumPy 2")
        for row, image in enumerate(images):
            yield Item(f"gaussian {row}", image)

    like = np.zeros((8, 8, 1), np.uint8)
    return Files([], Split(2500, False, read), held_out=500, like=like, sha256=GAUSSIAN_SHA256)


def _parquet(path: Path) -> Files | None:
    """The Hugging Face layout: a struct column `img` or `image` of (bytes, path) and, perhaps, an integer `label`.

    In a folder, train-*.parquet and test-*.parquet (else validation-*.parquet) are the splits; where no name says
    so, all files are one split.
    """
    if path.is_file():
        with path.open("rb") as file:
            ours = path.suffix == ".parquet" or file.read(4) == b"PAR1"
        return Files([("train", path)], _parquet_split([path])) if ours else None
    paths = sorted(path.glob("*.parquet"))
    named = {name: [p for p in paths if p.name.startswith(name)] for name in ("train", *TEST_NAMES)}
    train, test = named["train"] or paths, next((named[name] for name in TEST_NAMES if named[name]), None)
    if test and not named["train"]:
        raise DataError(f"there is {test[0].name} but no train-*.parquet; add it, or give the path of that one file")
    if not train:
        return None
    names = [("train", p) for p in train] + [("held_out", p) for p in test or []]
    return Files(names, _parquet_split(train), _parquet_split(test) if test else None)


def _parquet_split(paths: list[Path]) -> Split:
    from pyarrow import parquet, types

    columns, labelled, count = [], True, 0
    for path in paths:
        with whole(path.name), parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, count + file.metadata.num_rows
        images = [field.name for field in schema if field.name in ("img", "image") and types.is_struct(field.type)]
        if not images:
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(f"{path.name} has no column img or image of struct<bytes, path>; its columns: {found}")
        columns.append(images[0])
        labelled = labelled and "label" in schema.names and types.is_integer(schema.field("label").type)

    def read() -> Iterator[Item]:
        for path, column in zip(paths, columns, strict=True):
            wanted = [f"{column}.bytes", "label"] if labelled else [f"{column}.bytes"]
            with whole(path.name), parquet.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches(CHUNK, columns=wanted) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    name, image, label = f"{path.name} row {number}", (row[column] or {}).get("bytes"), row.get("label")
                    if not image or (labelled and label is None):
                        raise DataError(f"{name} has no {'label' if image else wanted[0]}; every row needs one")
                    yield Item(name, image, label)

    return Split(count, labelled, read)


def _cifar10(path: Path) -> Files | None:
    """CIFAR-10's binary version: records of a label byte and 3x32x32 pixel bytes, channel first."""
    train, test = sorted(path.glob("data_batch_*.bin")), sorted(path.glob("test_batch.bin"))
    if not train:
        return None
    held_out = _cifar10_split(test) if test else None
    names = [(p.name, p) for p in train + test]
    return Files(names, _cifar10_split(train), held_out, like=np.zeros((32, 32, 3), np.uint8))


def _cifar10_split(paths: list[Path]) -> Split:
    sizes = {path: path.stat().st_size for path in paths}
    for path, size in sizes.items():
        if size == 0 or size % 3073:
            raise DataError(f"{path.name} has {size:,} bytes, not a multiple of 3,073: cut off; download it again")

    def read() -> Iterator[Item]:
        for path in paths:
            for row, record in enumerate(np.memmap(path, np.uint8, "r").reshape(-1, 3073)):
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)  # CHW -> HWC
                yield Item(f"{path.name} record {row}", image, int(record[0]))

    return Split(sum(sizes.values()) // 3073, True, read)


def _idx(path: Path) -> Files | None:
    """The MNIST family: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each gzipped or not."""
    train, test = _idx_files(path, "train"), _idx_files(path, "t10k")
    if not train:
        return None
    like = np.zeros((*_idx_sizes(train["images"], 3)[1:], 1), np.uint8)
    names = [(f"{split} {what}", p) for split, found in (("train", train), ("t10k", test)) for what, p in found.items()]
    return Files(names, _idx_split(**train), _idx_split(**test) if test else None, like=like)


def _idx_files(folder: Path, split: str) -> dict[str, Path]:
    found = {what: sorted(folder.glob(f"{split}-{what}?idx*-ubyte*")) for what in ("images", "labels")}
    return {what: paths[0] for what, paths in found.items() if paths and found["images"]}


def _idx_split(images: Path, labels: Path | None = None) -> Split:
    count, *size = _idx_sizes(images, 3)
    if labels and _idx_sizes(labels, 1) != (count,):
        raise DataError(f"{images.name} has {count:,} images but {labels.name} {_idx_sizes(labels, 1)[0]:,} labels")

    def read() -> Iterator[Item]:
        targets = [int(label[0]) for label in _idx_records(labels, 1)] if labels else repeat(None, count)
        for row, (pixels, label) in enumerate(zip(_idx_records(images, 3), targets, strict=True)):
            yield Item(f"{images.name} image {row}", pixels.reshape(*size, 1), label)

    return Split(count, labels is not None, read)


@contextmanager
def _idx_open(path: Path) -> Iterator[BinaryIO]:
    with whole(path.name), path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with cast(BinaryIO, gzip.GzipFile(fileobj=file) if zipped else file) as stream:
            yield stream


def _idx_sizes(path: Path, dimensions: int) -> tuple[int, ...]:
    """The header: 0, 0, 8 (for bytes), the number of dimensions, then each size as a big-endian 32-bit integer."""
    with _idx_open(path) as stream:
        header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path.name} is not an IDX file of bytes in {dimensions} dimensions; download it again")
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    if not all(0 < size <= 4096 for size in sizes[1:]):
        raise DataError(f"the header of {path.name} tells impossible sizes, {sizes}; download it again")
    return sizes


def _idx_records(path: Path, dimensions: int) -> Iterator[Pixels]:
    count, *size = _idx_sizes(path, dimensions)
    length = int(np.prod(size))
    with _idx_open(path) as stream:
        stream.read(4 + 4 * dimensions)
        for row in range(count):
            content = stream.read(length)
            if len(content) < length:
                raise DataError(f"{path.name} is cut off: it ends in record {row:,} of {count:,}; download it again")
            yield np.frombuffer(content, np.uint8)
        if stream.read(1):
            raise DataError(f"{path.name} goes on after the {count:,} records its header tells; download it again")


def _images(path: Path) -> Files | None:
    """Images at any depth. Sub-folders `train` and `test` (else `validation`) are the splits where both are there.

    Within a split the first folder of each path is the class, where there are at least two and every image has one.
    """
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    named = ((p.relative_to(path).as_posix(), p) for p in found if p.suffix.lower() in SUFFIXES)
    paths = sorted((name, p) for name, p in named if not f"/{name}".count("/."))  # hidden files are no data
    tops = {name.split("/")[0] for name, _ in paths if "/" in name}
    test = next((name for name in TEST_NAMES if {"train", name} <= tops), None)
    if not paths or test is None:
        return Files(paths, _image_split(paths, _classes(paths, 0), 0)) if paths else None
    train, held_out = ([(name, p) for name, p in paths if name.startswith(f"{top}/")] for top in ("train", test))
    classes = _classes(train + held_out, 1)
    return Files(train + held_out, _image_split(train, classes, 1), _image_split(held_out, classes, 1))


def _classes(paths: list[tuple[str, Path]], depth: int) -> list[str]:
    """The sorted names of the folders at `depth`; empty where the images have no classes."""
    names = {name.split("/")[depth] if name.count("/") > depth else "" for name, _ in paths}
    return sorted(names) if len(names) > 1 and "" not in names else []


def _image_split(paths: list[tuple[str, Path]], classes: list[str], depth: int) -> Split:
    labels = {name: label for label, name in enumerate(classes)}

    def read() -> Iterator[Item]:
        for name, path in paths:
            yield Item(name, path, labels[name.split("/")[depth]] if classes else None)

    return Split(len(paths), bool(classes), read)


BUILT_IN: dict[str, Callable[[], Files]] = {"digits": _digits, "gaussian": _gaussian}
FORMATS: dict[str, Callable[[Path], Files | None]] = {
    "parquet": _parquet,
    "cifar10-binary": _cifar10,
    "idx": _idx,
    "images": _images,
}
CHOICES = (
    f"Give {', '.join(map(repr, BUILT_IN))} or a path: a Parquet file or a folder of them, with a column img or image; "
    f"a folder of images ({', '.join(SUFFIXES)}); a folder with CIFAR-10's data_batch_*.bin and test_batch.bin; or "
    "one with train-images-idx3-ubyte.gz and its companions. Unpack archives first."
)
