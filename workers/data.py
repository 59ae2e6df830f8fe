"""Images in: any source becomes one memory-mapped array of bytes, decoded once and addressed by its content.

    DataConfig -> _locate: what lies there -> fingerprint: its address -> prepare: decode into the cache, open

`describe` and `fingerprint` answer the dry run: they read names, headers and bytes, and import neither torch nor ray
nor scikit-learn. `prepare` decodes on the first call and opens instantly on every later one. Both splits are stored
in a fixed shuffled order, so any prefix of either is a fair sample.

A source on an object store (s3://...) is copied into the cache first, once on each node (`workers.mirror`), and is then
read like any other path.
"""

import difflib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from workers.config import DataConfig, digest
from workers.formats import BUILT_IN, CHOICES, CHUNK, FORMATS, DataError, Files, Item, Pixels, Split, whole

SPLIT_SEED = 20_200_619  # of every shuffle and split: each trial holds out the same images
VERSION = 1  # of the decoding below: raise it when the same files would give other bytes, and caches are rebuilt
PROBE = 64  # images that decide between greyscale and colour
log = logging.getLogger(__name__)


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


# ---- What lies at a source ------------------------------------------------------------------------------------


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
    with whole(item.name):
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
    with whole(f"the prepared folder {folder}"):
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
