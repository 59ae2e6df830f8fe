"""Images in: any source becomes one memory-mapped array, decoded once and addressed by its content.

    DataConfig -> `locate`: what lies there -> `survey`: of its files and all headers -> `sources.describe`: a Source
    -> prepare: decode into the cache, prove it whole (`proofs`), open

`prepare` decodes on the first call and opens on every later one. Both splits are stored in a fixed shuffled order, so
any prefix of either is a fair sample.

A source on an object store (s3://...) is copied into the cache first, once on each node (`workers.data.mirror`), and
is then read like any other path.

What is kept, under the cache folder; all of it can be made again, and is where it is not proven whole:

    hashes/<source>.json     sha256 of the source's files, by path and by what the file system says of each
    surveys/<files>.json     what all headers and labels say
    ranges/<digest>.json     between which values data that are not discrete lie
    data/<digest>/           images.npy, labels.npy, and meta.json, which is written last and holds their sha256
    proofs/<digest>.json     of a big data set: that its files were read through and found whole since the boot
    sources/<source>/        copies of an object store's files, and a memo beside them

The kinds of JSON are sealed (`workers.memos`). The files of data/<digest>/ are read through when a
process first opens them (0.8 s a GB), those of a big data set once on each machine until they change or it boots.
"""

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers import memos
from workers.classes import Classes
from workers.config import DataConfig
from workers.data.cache import find_default_cache, lock_cache
from workers.data.decoding import Item, Pixels, check_size, choose_type, decode, explain_damage
from workers.data.locate import find_name, name_source
from workers.data.order import number_rows
from workers.data.proofs import is_whole, note_whole
from workers.data.ranges import Span, scale_to_unit
from workers.data.sources import Source, describe_with_files
from workers.data.splits import DataError
from workers.data.tree import CHUNK, PIECE, Files, Split
from workers.memos import hash_file, read_state, recall

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A decoded data set, mapped read-only from disk: it takes memory only where it is read.

    Give tasks the `DataConfig` and let them `prepare` it: pickling this record would copy every image.
    """

    digest: str
    name: str
    levels: int | None  # pixels take the values 0 .. levels - 1; None: they are not discrete
    shape: tuple[int, int, int]  # H, W, C
    train: Pixels  # uint8 or uint16 NHWC [0, levels - 1]; float32 [-1, 1] where they are not discrete
    held_out: Pixels  # the same
    train_labels: NDArray[np.int64] | None  # int64 N
    held_out_labels: NDArray[np.int64] | None  # int64 N
    class_names: tuple[str, ...] = ()  # by label, where the source has names
    span: Span | None = None  # of data that are not discrete: the values that are -1 and 1 here
    sides: tuple[int, ...] = ()  # of signals and volumes, which are folded into `shape` (`workers.sides`)

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of its labels; None without labels."""
        if self.train_labels is None or self.held_out_labels is None:
            return None
        count = int(max(self.train_labels.max(), self.held_out_labels.max())) + 1
        return Classes.of(np.asarray(self.train_labels), self.class_names, count)


def prepare(config: DataConfig, cache: Path | None = None) -> Dataset:
    """Opens the data set, decoding it into the cache folder first where it is not there yet, or not whole.

    Safe to call from any number of processes: one decodes, the others wait for it. Raises DataError.
    """
    cache = cache or find_default_cache()
    with name_source(config):
        source, files = describe_with_files(config, cache)
        folder = cache / "data" / source.digest
        if not is_whole(folder, tell=False):
            with lock_cache(cache / "data" / f"{source.digest}.lock"):
                if not is_whole(folder):
                    _build(config, files, source, folder, cache)
        return _open(folder, find_name(config), source)


# ---- Decoding --------------------------------------------------------------------------------------------------


def _build(config: DataConfig, files: Files, source: Source, folder: Path, cache: Path) -> None:
    """Decodes into a temporary folder, a chunk at a time, and renames it. Called under the lock of `folder`."""
    log.info("decoding %s into %s", config.source, folder)
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        _decode_all(config, files, source, temporary)
        if describe_with_files(config, cache)[0].digest != source.digest:
            raise DataError("its files changed while they were decoded; run it again when they are complete")
        sums = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
        states = {name: read_state(temporary / name) for name in sums}
        memos.write(temporary / "meta.json", {**asdict(source), "files": sums})
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of a process that was killed
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note_whole(folder, states, sums)


def _decode_all(config: DataConfig, files: Files, source: Source, folder: Path) -> None:
    """Writes images.npy and, where there are labels, labels.npy. Raises DataError."""
    test = files.held_out if isinstance(files.held_out, Split) else None
    items = chain(test.read(), files.train.read()) if test else files.train.read()
    rows = number_rows(source.held_out, source.train, test is not None)
    file = _reserve_file(folder / "images.npy", (len(rows), *source.shape), choose_type(source.levels))
    images = np.asarray(file)  # the same memory, twice as quick to write into
    labels = np.zeros(len(rows), np.int64)

    def store(part: list[tuple[np.int64, Item]]) -> None:
        for row, item in part:
            pixels = decode(item, source.shape[2], config.resolution, config.background)
            check_size(item.name, pixels.shape, source.shape)
            images[row] = _fit_into_type(pixels, source)
            labels[row] = item.label or 0

    threads = min(8, os.cpu_count() or 1)  # Pillow frees the GIL while it decodes
    with ThreadPoolExecutor(threads) as pool:
        for chunk in _split_into_chunks(zip(rows, items, strict=True)):
            list(pool.map(store, (chunk[i::threads] for i in range(threads))))
    file.flush()
    if source.labelled:
        np.save(folder / "labels.npy", labels)


def _fit_into_type(pixels: Pixels, source: Source) -> Pixels:
    if source.levels is None:
        assert source.span
        return scale_to_unit(pixels, source.span)
    return np.minimum(pixels, source.levels - 1)  # LANCZOS overshoots the digits' 17 levels


def _reserve_file(path: Path, shape: tuple[int, ...], kind: type[np.generic]) -> np.memmap:
    """A new file of an array to write into. Its room on the disk is taken first: a map that finds none dies of it."""
    needed, free = math.prod(shape) * np.dtype(kind).itemsize, shutil.disk_usage(path.parent).free
    remedy = "make room, or set the environment variable ORCHESTRATOR_CACHE to a folder on a larger disk"
    if free < needed:
        raise DataError(
            f"decoded it takes {needed / 1e9:.1f} GB, and {path.parent.parent} has {free / 1e9:.1f} GB free; {remedy}"
        )
    try:
        images = np.lib.format.open_memmap(path, "w+", kind, shape)
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise DataError(
            f"decoded it takes {needed / 1e9:.3g} GB, for which there is no room in {path.parent.parent} "
            f"({error.strerror}); {remedy}"
        ) from error
    return images


def _split_into_chunks(pairs: Iterable[tuple[np.int64, Item]]) -> Iterator[list[tuple[np.int64, Item]]]:
    """So many at a time that their encoded bytes fit into memory."""
    chunk, size = list[tuple[np.int64, Item]](), 0
    for row, item in pairs:
        chunk.append((row, item))
        size += len(item.image) if isinstance(item.image, bytes) else 0
        if len(chunk) == CHUNK or size >= PIECE:
            yield chunk
            chunk, size = [], 0
    yield chunk


# ---- What is prepared ------------------------------------------------------------------------------------------


def _open(folder: Path, name: str, source: Source) -> Dataset:
    meta = recall(folder / "meta.json")
    n, shape = meta["held_out"], tuple(meta["shape"])
    with explain_damage(f"the prepared folder {folder}"):
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r") if meta["labelled"] else None
    assert images.shape == (n + meta["train"], *shape), f"{folder}: {images.shape}"
    train_labels, held_out_labels = (None, None) if labels is None else (labels[n:], labels[:n])
    splits = images[n:], images[:n]
    return Dataset(
        folder.name, name, meta["levels"], shape, *splits, train_labels, held_out_labels,
        class_names=source.class_names, span=source.span, sides=source.sides,
    )  # fmt: skip
