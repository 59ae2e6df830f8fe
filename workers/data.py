"""Images in: any source becomes one memory-mapped array of bytes, decoded once and addressed by its content.

    DataConfig -> _locate: what lies there -> fingerprint: its address -> prepare: decode into the cache, open

`describe` and `fingerprint` answer the dry run: they read names, headers and bytes, and import neither torch nor ray
nor scikit-learn. `prepare` decodes on the first call and opens instantly on every later one. Both splits are stored
in a fixed shuffled order, so any prefix of either is a fair sample.

A source on an object store (s3://...) is copied into the cache first, once on each node (`workers.mirror`), and is then
read like any other path.

To add a format, write a function from a path to `Files` (None where the path holds something else) and list it in
`FORMATS`; the first that finds its own is taken.
"""

import difflib
import fcntl
import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from workers.config import DataConfig, Mistake, digest

SPLIT_SEED = 20_200_619  # of every shuffle and split: each trial holds out the same images
VERSION = 1  # of the decoding below: raise it when the same files would give other bytes, and caches are rebuilt
CHUNK = 128  # encoded images in memory at a time
PROBE = 64  # images that decide between greyscale and colour
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST_NAMES = ("test", "validation")  # of the held-out split; the first that is there is taken
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
GAUSSIAN_SHA256 = "f1df631486df9f08144835587ecb45fbe11f06b659dfeba209c4645379ddc467"
GAUSSIAN_SD = 0.2  # of the source `gaussian`, on the [-1, 1] scale
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Source:
    """A data set before it is decoded: what the dry run, the preflight and the cost plan need."""

    digest: str
    name: str
    format: str
    train: int
    held_out: int
    labelled: bool
    levels: int
    shape: tuple[int, int, int]  # H, W, C of an image, after data.resolution


@dataclass(frozen=True)
class Dataset:
    """A decoded data set, mapped read-only from disk: it takes memory only where it is read.

    Give tasks the `DataConfig` and let them `prepare` it: pickling this record would copy every image.
    """

    digest: str
    name: str
    levels: int  # pixels take the values 0 .. levels - 1
    shape: tuple[int, int, int]  # H, W, C
    train: Pixels  # uint8 NHWC [0, levels - 1]
    held_out: Pixels  # uint8 NHWC [0, levels - 1]
    train_labels: NDArray[np.int64] | None  # int64 N
    held_out_labels: NDArray[np.int64] | None  # int64 N


def absolute(config: DataConfig) -> DataConfig:
    """`config` with an absolute path, for processes that have another current directory."""
    if config.source in BUILT_IN or _is_remote(config):
        return config
    return config.model_copy(update={"source": str(Path(config.source).expanduser().absolute())})


def fingerprint(config: DataConfig, cache: Path | None = None) -> str:
    """The address of the decoded data set, 16 hex digits: it follows from the bytes at the source, not their path."""
    cache = cache or default_cache()
    with _about(config):
        return _address(config, *_locate(config, cache), cache)


def describe(config: DataConfig, cache: Path | None = None) -> Source:
    """Counts, shape and address, decoding at most the first few images. Raises DataError."""
    cache = cache or default_cache()
    with _about(config):
        kind, files = _locate(config, cache)
        return _describe(config, kind, files, _address(config, kind, files, cache))


def prepare(config: DataConfig, cache: Path | None = None) -> Dataset:
    """Opens the data set, decoding it into the cache folder first where it is not there yet. Raises DataError.

    Safe to call from any number of processes: one decodes, the others wait for it.
    """
    cache = cache or default_cache()
    with _about(config):
        kind, files = _locate(config, cache)
        address = _address(config, kind, files, cache)
        folder = cache / "data" / address
        if not (folder / "meta.json").exists():
            with _lock(cache / "data" / f"{address}.lock"):
                if not (folder / "meta.json").exists():
                    _build(config, files, _describe(config, kind, files, address), folder)
        return _open(folder, _name(config))


def default_cache() -> Path:
    return Path(os.environ.get("ORCHESTRATOR_CACHE") or "~/.cache/diffusion-orchestrator").expanduser().absolute()


@contextmanager
def _about(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except (DataError, OSError) as error:
        raise DataError(f"data.source = {config.source!r}: {error}") from (error.__cause__ or error)


@contextmanager
def _whole(name: str) -> Iterator[None]:
    """What PIL, pyarrow and gzip raise on damaged content becomes a message that names the file or row."""
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        reason = str(error).split(" <_io.")[0]  # PIL shows the address of the stream
        raise DataError(f"{name} is damaged or cut off ({reason}); copy it again or remove it") from error


# ---- What lies at a source: one function a format --------------------------------------------------------------


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
        with _whole(path.name), parquet.ParquetFile(path) as file:
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
            with _whole(path.name), parquet.ParquetFile(path) as file:
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
    with _whole(path.name), path.open("rb") as file:
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


def _is_remote(config: DataConfig) -> bool:
    return "://" in config.source


def _locate(config: DataConfig, cache: Path) -> tuple[str, Files]:
    """The name of the format at `config.source`, and its files."""
    if config.source in BUILT_IN:
        return config.source, BUILT_IN[config.source]()
    if _is_remote(config):
        from workers.mirror import mirror  # with pyarrow, which a dry run on other data does without

        key = digest(config.source)
        with _lock(cache / "sources" / f"{key}.lock"):
            path = mirror(config.source, cache / "sources" / key)
    else:
        path = Path(config.source).expanduser()
    if not config.source:
        raise DataError(f"it is empty. {CHOICES}")
    if not path.exists():
        siblings = {p.name: str(p) for p in path.parent.iterdir()} if path.parent.is_dir() else {}
        close = difflib.get_close_matches(path.name, [*BUILT_IN, *siblings], n=1)
        meant = f"; did you mean {siblings.get(close[0], close[0])!r}?" if close else "."
        raise DataError(f"{path.absolute()} does not exist{meant} {CHOICES}")
    for kind, find in FORMATS.items():
        files = find(path)
        if files and any(s.count == 0 for s in (files.train, files.held_out) if isinstance(s, Split)):
            raise DataError(f"this {kind} source has no images in its training or test split; add some. {CHOICES}")
        if files:
            return kind, files
    if path.is_file():
        raise DataError(f"it is a file of {path.stat().st_size:,} bytes in no format known here. {CHOICES}")
    names = sorted(p.name for p in path.iterdir())
    raise DataError(
        f"no images found in it; it holds {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}. {CHOICES}"
    )


# ---- Address, split, shape -------------------------------------------------------------------------------------


def _name(config: DataConfig) -> str:
    path = absolute(config).source
    return Path(path.partition("?")[0] if _is_remote(config) else path).name.removesuffix(".parquet")


def _counts(config: DataConfig, files: Files) -> tuple[int, int]:
    """How many images are held out, and how many are left to train on."""
    count = files.train.count
    if isinstance(files.held_out, Split):
        return files.held_out.count, count
    if count < 2:
        raise DataError("there is 1 image; at least 2 are needed, as some are held out")
    held_out = files.held_out or min(max(round(config.held_out * count), 1), count - 1)
    return held_out, count - held_out


def _address(config: DataConfig, kind: str, files: Files, cache: Path) -> str:
    hashes = files.sha256 or _hashes(config, files, cache)
    split = "test" if isinstance(files.held_out, Split) else _counts(config, files)[0]
    content = {"version": VERSION, "format": kind, "files": hashes, "held_out": split, "resolution": config.resolution}
    return digest(content)


def _hashes(config: DataConfig, files: Files, cache: Path) -> list[tuple[str, str]]:
    """Names and sha256 of the files, remembered by (path, size, time of change): asking again is a stat a file."""
    memo = cache / "hashes" / f"{digest(absolute(config).source)}.json"
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(memo.read_text())
    entries: dict[str, list[Any]] = {}
    for _, path in files.paths:
        stat, key = path.stat(), str(path.absolute())
        entries[key] = known.get(key, [])
        if entries[key][:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                entries[key] = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
    # A file changed this very moment may change again within one tick of its clock: not remembered yet.
    settled = {key: entry for key, entry in entries.items() if time.time_ns() - entry[1] > 2_000_000_000}
    if settled != known:
        with suppress(OSError):  # a cache that cannot be written costs time, not the answer
            memo.parent.mkdir(parents=True, exist_ok=True)
            temporary = memo.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(settled))
            temporary.replace(memo)
    return [(name, entries[str(path.absolute())][2]) for name, path in files.paths]


def _rows(held_out: int, train: int, own_split: bool) -> NDArray[np.int64]:
    """The row of each item, items being the test split then the training split, or the one undivided split.

    Rows 0 .. held_out - 1 are the held-out images. RandomState's stream is frozen for good (NEP 19), so the split
    is the same under every version of NumPy.
    """
    random = np.random.RandomState(SPLIT_SEED)
    if own_split:
        return np.concatenate([random.permutation(held_out), held_out + random.permutation(train)])
    return random.permutation(held_out + train)


def _describe(config: DataConfig, kind: str, files: Files, address: str) -> Source:
    held_out, train = _counts(config, files)
    labelled = files.train.labelled and (not isinstance(files.held_out, Split) or files.held_out.labelled)
    first = list(islice(files.train.read(), PROBE)) if files.like is None else [Item("an image", files.like)]
    channels = 1 if all(_load(item).mode in ("1", "L", "LA") for item in first) else 3
    height, width, _ = _decode(first[0], channels, config.resolution).shape
    if height != width:
        raise DataError(f"{first[0].name} is {width}x{height}, not square; set data.resolution to crop and resize")
    return Source(address, _name(config), kind, train, held_out, labelled, files.levels, (height, width, channels))


# ---- Decoding --------------------------------------------------------------------------------------------------


def _load(item: Item) -> Image.Image:
    """The image of 8 bits a channel, upright by its EXIF orientation (as Hugging Face's datasets does)."""
    if isinstance(item.image, np.ndarray):
        return Image.fromarray(item.image.squeeze())
    with _whole(item.name):
        image: Image.Image = Image.open(io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{item.name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    return image


def _decode(item: Item, channels: int, resolution: int | None) -> Pixels:
    """uint8 HWC. With `resolution`: centre-cropped to a square, then resized by LANCZOS (as EDM's dataset_tool.py)."""
    if isinstance(item.image, np.ndarray) and resolution is None:
        return item.image
    image, mode = _load(item), "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if resolution is not None:
        side = min(image.size)
        if side < resolution:
            raise DataError(
                f"{item.name} is {image.width}x{image.height}, smaller than data.resolution = {resolution}; "
                f"enlarging adds no detail: set data.resolution to {side} or less, or leave such images out"
            )
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _build(config: DataConfig, files: Files, source: Source, folder: Path) -> None:
    """Decodes into a temporary folder, a chunk at a time, and renames it. Called under the lock of `folder`."""
    test = files.held_out if isinstance(files.held_out, Split) else None
    items = chain(test.read(), files.train.read()) if test else files.train.read()
    rows = _rows(source.held_out, source.train, test is not None)
    needed, free = len(rows) * (int(np.prod(source.shape)) + 8), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise DataError(
            f"decoded it takes {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free; make room, "
            "or set the environment variable ORCHESTRATOR_CACHE to a folder on a larger disk"
        )
    log.info("decoding %s: %d images of %s into %s", config.source, len(rows), source.shape, folder)
    temporary = folder.with_name(f"{folder.name}.partial")
    for leftover in (temporary, folder):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    file = np.lib.format.open_memmap(temporary / "images.npy", "w+", np.uint8, (len(rows), *source.shape))
    images = np.asarray(file)  # the same memory, twice as quick to write into
    labels = np.zeros(len(rows), np.int64)

    def store(part: list[tuple[np.int64, Item]]) -> None:
        for row, item in part:
            pixels = _decode(item, source.shape[2], config.resolution)
            _check_size(item.name, pixels.shape, source.shape)
            images[row] = np.minimum(pixels, source.levels - 1)  # LANCZOS overshoots the digits' 17 levels
            labels[row] = item.label or 0

    threads = min(8, os.cpu_count() or 1)  # Pillow frees the GIL while it decodes
    pairs = zip(rows, items, strict=True)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(pairs, CHUNK)):
            list(pool.map(store, (chunk[i::threads] for i in range(threads))))
    file.flush()
    if source.labelled:
        np.save(temporary / "labels.npy", labels)
    (temporary / "meta.json").write_text(json.dumps(asdict(source), indent=2) + "\n")
    temporary.rename(folder)


def _check_size(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise DataError(
            f"{name} is {found[1]}x{found[0]}, the first image {expected[1]}x{expected[0]}; "
            "set data.resolution to crop and resize all to one size"
        )


def _open(folder: Path, name: str) -> Dataset:
    meta = json.loads((folder / "meta.json").read_text())
    n, shape = meta["held_out"], tuple(meta["shape"])
    with _whole(f"the prepared folder {folder}"):
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r") if meta["labelled"] else None
    assert images.shape == (n + meta["train"], *shape), f"{folder}: {images.shape}"
    targets = (None, None) if labels is None else (labels[n:], labels[:n])
    return Dataset(folder.name, name, meta["levels"], shape, images[n:], images[:n], *targets)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time on a machine; the kernel frees it when its holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        hint = "set the environment variable ORCHESTRATOR_CACHE to a folder that can"
        raise DataError(f"the cache folder {path.parent} cannot be written ({error}); {hint}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
