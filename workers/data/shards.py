"""Shards: the files of a source of which each holds many images, and what their headers tell, which is remembered."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from workers.data.cache import is_settled
from workers.data.decoding import Item
from workers.data.splits import SPLIT_SEED, DataError, list_names
from workers.data.tree import Files, Shard, Split, Tree
from workers.memos import read_state, recall, remember

HEADERS = 1  # the version of what a header tells
SHARDS = (".parquet", ".tar")  # the ends of their names
THREADS = 8  # headers that are read at once, of files that are not on this machine
log = logging.getLogger(__name__)


class Header(NamedTuple):
    """What there is to know of a shard before its images are read: plain data, as JSON has them."""

    images: int
    labels: list[int] | None  # of each image, where it has them and they were read
    about: dict[str, Any]  # what its format has to know


def read_headers(tree: Tree, names: Sequence[str], read: Callable[[str], Header]) -> list[Header]:
    """The headers of these files. Those that are remembered, and whose files are as they were, are not read again."""
    known = (recall(tree.memo) if tree.memo else None) or {}
    there = tree.store and tree.store.versions
    states = {name: [there[name]] if there else read_state(tree.get_path(name)) for name in names}
    missing = [name for name in names if name not in known or known[name][0] != states[name]]
    if missing and there:
        log.info("reading the headers of %d files, the first of them %s", len(missing), missing[0])
    with ThreadPoolExecutor(THREADS if tree.store else 1) as pool:
        made = dict(zip(missing, pool.map(read, missing), strict=True))
    found = {name: made.get(name) or Header(*known[name][1]) for name in names}
    if missing and tree.memo:
        settled = [name for name in names if there or is_settled(states[name])]
        kept = {name: [states[name], list(found[name])] for name in settled}
        remember(tree.memo, known | kept)
    return [found[name] for name in names]


def join_shards(shards: Sequence[Shard]) -> Split:
    """A split of all their images."""

    def read() -> Iterator[Item]:
        for shard in shards:
            yield from shard.read()

    return Split(sum(shard.images for shard in shards), all(shard.labelled for shard in shards), read)


def arrange_by_shards(files: Files, fraction: float) -> Files:
    """The files with their training shards in a fixed shuffled order: the first images are then of any of them.

    Where the source has no split of its own, whole shards are held out, so that what is trained on is known before any
    is read. Raises DataError where there is one shard.
    """
    order = np.random.RandomState(SPLIT_SEED).permutation(len(files.shards)).tolist()
    if isinstance(files.held_out, Split):
        shards = tuple(files.shards[k] for k in order)
        return replace(files, train=join_shards(shards), shards=shards)
    count = len(order)
    if count < 2:
        raise DataError(
            "data.shuffle: whole files are held out, and there is one; add another called test, or cut it in several, "
            "or leave data.shuffle out"
        )
    drawn = min(max(round(fraction * count), 1), count - 1)
    parts = [[files.shards[k] for k in some] for some in (order[drawn:], order[:drawn])]
    tagged = [("held_out" if k in order[:drawn] else tag, path) for k, (tag, path) in enumerate(files.paths)]
    where = [list_names(sorted(shard.name for shard in part), 2) for part in parts]
    return replace(
        files,
        paths=sorted(tagged, key=lambda pair: pair[0] == "held_out"),
        train=join_shards(parts[0]),
        held_out=join_shards(parts[1]),
        shards=tuple(parts[0]),
        where=(where[0], where[1]),
        drawn=True,
    )
