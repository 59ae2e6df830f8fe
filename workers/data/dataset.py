"""Images in: any source becomes one memory-mapped array, decoded once and addressed by its content.

    DataConfig -> `locate`: what lies there -> `survey`: of its files and all headers -> `sources.describe`: a Source
    -> prepare: decode into the cache, prove it whole (`proofs`), open

`prepare` decodes on the first call and opens on every later one. Both splits are stored in a fixed shuffled order, so
any prefix of either is a fair sample; with `data.shuffle` the images to train on in that of their shards, which are
shuffled.

A source on an object store (s3://...) is copied into the cache first, once on each node (`workers.data.mirror`), and
is then read like any other path. With `data.stream` only the held-out images are decoded beforehand: those to train on
stay where they are, and come from their shards as they are needed (`workers.data.intake`).

What is kept, under the cache folder; all of it can be made again, and is where it is not proven whole:

    hashes/<source>.json     sha256 of the source's files, by path and by what the file system says of each
    surveys/<files>.json     what all headers and labels say
    ranges/<digest>.json     between which values data that are not discrete lie
    headers/, versions/      what shards tell of themselves, and which they are
    streams/<digest>/        decoded shards of a stream, as many as `data.stream` has room for
    data/<digest>/           images.npy, labels.npy, vectors.npy, and meta.json, which is written last and holds their
                             sha256
    proofs/<digest>.json     of a big data set: that its files were read through and found whole since the boot
    sources/<source>/        copies of an object store's files, and a memo beside them

The kinds of JSON are sealed (`workers.memos`). The files of data/<digest>/ are read through when a
process first opens them (0.8 s a GB), those of a big data set once on each machine until they change or it boots.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from workers import memos
from workers.classes import Classes, Told, Vectors
from workers.config import DataConfig, What
from workers.data.cache import find_default_cache, lock_cache, reserve_file
from workers.data.decoding import Item, Pixels, check_size, choose_type, decode, explain_damage, look
from workers.data.intake import Intake, Room
from workers.data.locate import find_name, name_source
from workers.data.order import number_rows
from workers.data.proofs import is_whole, note_whole
from workers.data.ranges import Span, check_finite, scale_to_unit
from workers.data.sources import LEVELS, Source, describe_with_files
from workers.data.splits import DataError, show_name
from workers.data.tree import CHUNK, PIECE, Files, Shard, Split
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
    train: Pixels  # uint8 or uint16 NHWC [0, levels - 1]; float32 [-1, 1] where not discrete; of a stream the intake
    held_out: Pixels  # the same
    train_labels: NDArray[np.int64] | None  # int64 N
    held_out_labels: NDArray[np.int64] | None  # int64 N
    class_names: tuple[str, ...] = ()  # by label, where the source has names
    span: Span | None = None  # of data that are not discrete: the values that are -1 and 1 here
    sides: tuple[int, ...] = ()  # of signals and volumes, which are folded into `shape` (`workers.sides`)
    shards: tuple[int, ...] = ()  # training images in each file of the source, where `data.shuffle` is of them
    intake: Intake | None = None  # of a stream
    train_vectors: NDArray[np.float32] | None = None  # float32 (N, length, width), where there is data.condition
    held_out_vectors: NDArray[np.float32] | None = None

    def expect(self, shards: Sequence[int]) -> None:
        """Images of these shards are needed next, in this order."""
        if self.intake:
            self.intake.expect(shards)

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of its labels; None without labels."""
        if self.train_labels is None or self.held_out_labels is None:
            return None
        count = int(max(self.train_labels.max(), self.held_out_labels.max())) + 1
        return Classes.of(np.asarray(self.train_labels), self.class_names, count)

    def get_told(self, what: What | None, split: Literal["train", "held_out"]) -> NDArray[Any] | None:
        """What a network that is told `what` is told of the images of a split, a row each; None of nothing."""
        found: NDArray[Any] | None = getattr(self, f"{split}_{what}") if what else None
        return found

    def find_told(self, what: What | None) -> Told | None:
        """The classes of these labels, or what the vectors are like."""
        if what == "vectors":
            return None if self.train_vectors is None else Vectors(*self.train_vectors.shape[1:])
        return self.classes if what else None


def prepare(config: DataConfig, cache: Path | None = None) -> Dataset:
    """Opens the data set, decoding it into the cache folder first where it is not there yet, or not whole.

    Safe to call from any number of processes: one decodes, the others wait for it. Raises DataError.
    """
    cache = cache or find_default_cache()
    with name_source(config):
        source, files = describe_with_files(config, cache)
        kept, decoded = source, files
        if config.stream is not None:  # the held-out images alone
            kept = replace(source, digest=f"{source.digest}-held-out", train=0)
            decoded = replace(files, train=Split(0, source.labelled, lambda: iter(())))
        folder = cache / "data" / kept.digest
        if not is_whole(folder, tell=False):
            with lock_cache(cache / "data" / f"{kept.digest}.lock"):
                if not is_whole(folder):
                    _build(config, decoded, kept, folder, cache)
        dataset = replace(_open(folder, find_name(config), source), digest=source.digest)
    if config.shuffle is not None:
        dataset = replace(dataset, shards=tuple(shard.images for shard in files.shards))
    return dataset if config.stream is None else _open_stream(config, dataset, source, files.shards, cache)


def _open_stream(
    config: DataConfig, held_out: Dataset, source: Source, shards: Sequence[Shard], cache: Path
) -> Dataset:
    assert config.stream is not None
    room = Room(cache / "streams" / source.digest, int(config.stream * 1e9))
    states = {shard.path: read_state(shard.path) for shard in shards if shard.path}
    fill = partial(_decode_shard, config, source, states)
    intake = Intake(shards, source.shape, choose_type(source.levels), fill=fill, room=room)
    labels = [label for shard in shards for label in shard.labels or ()] if source.labelled else None
    train_labels = None if labels is None else np.array(labels, np.int64)
    return replace(held_out, train=cast(Pixels, intake), intake=intake, train_labels=train_labels)


# ---- Decoding --------------------------------------------------------------------------------------------------


def _build(config: DataConfig, files: Files, source: Source, folder: Path, cache: Path) -> None:
    """Decodes into a temporary folder, a chunk at a time, and renames it. Called under the lock of `folder`."""
    log.info("decoding %s into %s", config.source, folder)
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        _decode_all(config, files, source, temporary)
        if not source.digest.startswith(describe_with_files(config, cache)[0].digest):
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
    """Writes images.npy and, where there are any, labels.npy and vectors.npy. Raises DataError."""
    test = files.held_out if isinstance(files.held_out, Split) else None
    items = chain(test.read(), files.train.read()) if test else files.train.read()
    rows = number_rows(source.held_out, source.train, test is not None, config.shuffle is not None)
    file = reserve_file(folder / "images.npy", (len(rows), *source.shape), choose_type(source.levels))
    images = np.asarray(file)  # the same memory, twice as quick to write into
    labels, vectors = np.zeros(len(rows), np.int64), None
    if source.vectors:
        vectors = reserve_file(folder / "vectors.npy", (len(rows), *source.vectors), np.float32)
    _decode(config, source, zip(rows, items, strict=True), images, labels, vectors=vectors)
    file.flush()
    if vectors is not None:
        vectors.flush()
    if source.labelled:
        np.save(folder / "labels.npy", labels)


def _decode_shard(
    config: DataConfig, source: Source, states: Mapping[Path, list[int]], shard: Shard, images: Pixels
) -> None:
    """Decodes a training shard of a stream. Raises DataError where it is not what its header and others say."""
    labels = np.zeros(shard.images, np.int64)
    with name_source(config):
        items = _check_alike(shard, source)
        try:
            _decode(config, source, zip(range(shard.images), items, strict=True), images, labels)
            same = not source.labelled or labels.tolist() == shard.labels
            same = same and (shard.path is None or read_state(shard.path) == states[shard.path])
        except _Unequal:
            same = False
        if not same:
            raise DataError(
                f"{show_name(shard.name)} holds other images than when it was looked at; run the same command again"
            )


class _Unequal(ValueError):
    """A shard holds more images than its header says, or fewer."""


def _check_alike(shard: Shard, source: Source) -> Iterator[Item]:
    """The images of a shard, each looked at as those were that the source is described by."""
    count = 0
    for count, item in enumerate(shard.read(), 1):
        if count > shard.images:
            raise _Unequal
        if not isinstance(item.image, np.ndarray):
            seen = look(item)
            unlike = {
                "in colour": seen.colour and source.shape[2] == 1,
                f"of {seen.depth} a channel": LEVELS.get(seen.depth, 256) != source.levels,
                "transparent": seen.transparent and not source.composited,
            }
            if kinds := [kind for kind, found in unlike.items() if found]:
                raise DataError(
                    f"{show_name(item.name)} is {kinds[0]}, and the held-out images, which a stream goes by, are not; "
                    "convert it, or leave data.stream out"
                )
        yield item
    if count < shard.images:
        raise _Unequal


def _decode(
    config: DataConfig,
    source: Source,
    items: Iterable[tuple[int | np.int64, Item]],
    images: Pixels,
    labels: NDArray[np.int64],
    *,
    vectors: NDArray[np.float32] | None = None,
) -> None:
    """Decodes items into their rows, by several threads. Raises DataError."""

    def store(part: list[tuple[int | np.int64, Item]]) -> None:
        for row, item in part:
            pixels = decode(item, source.shape[2], config.resolution, config.background)
            check_size(item.name, pixels.shape, source.shape)
            if source.levels is None:
                check_finite(item.name, pixels)
            images[row] = _fit_into_type(pixels, source)
            labels[row] = item.label or 0
            if vectors is not None:
                vectors[row] = item.vectors

    threads = min(8, os.cpu_count() or 1)  # Pillow frees the GIL while it decodes
    with ThreadPoolExecutor(threads) as pool:
        for chunk in _split_into_chunks(items):
            list(pool.map(store, (chunk[i::threads] for i in range(threads))))


def _fit_into_type(pixels: Pixels, source: Source) -> Pixels:
    if source.levels is None:
        assert source.span
        return scale_to_unit(pixels, source.span)
    return np.minimum(pixels, source.levels - 1)  # LANCZOS overshoots the digits' 17 levels


def _split_into_chunks(
    pairs: Iterable[tuple[int | np.int64, Item]],
) -> Iterator[list[tuple[int | np.int64, Item]]]:
    """So many at a time that their encoded bytes fit into memory."""
    chunk, size = list[tuple[int | np.int64, Item]](), 0
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
        vectors = np.load(folder / "vectors.npy", mmap_mode="r") if source.vectors else None
    assert images.shape == (n + meta["train"], *shape), f"{folder}: {images.shape}"
    of_labels, of_vectors = ((None, None) if rows is None else (rows[n:], rows[:n]) for rows in (labels, vectors))
    splits = images[n:], images[:n]
    return Dataset(
        folder.name, name, meta["levels"], shape, *splits, of_labels[0], of_labels[1],
        class_names=source.class_names, span=source.span, sides=source.sides,
        train_vectors=of_vectors[0], held_out_vectors=of_vectors[1],
    )  # fmt: skip
