"""Training images that are taken from their shards as they are needed: an array that no disk has to hold whole.

A shard is read and decoded into a file of the cache before it is needed, by threads in the background, and is mapped
from there; the file is shared by all processes of a machine. Beyond the room that `data.stream` gives, the files that
have not been used for longest are removed, and none that a process is using: of these a trial has two windows.
"""

import fcntl
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from workers.data.cache import lock_cache, reserve_file
from workers.data.tree import Shard

AHEAD = 2  # shards that are read at once
Fill = Callable[[Shard, NDArray[Any]], None]  # decodes the images of a shard into an array of their shape


@dataclass(frozen=True)
class Room:
    """Where decoded shards are kept, and how many bytes of them."""

    folder: Path
    limit: int


@dataclass(frozen=True, eq=False)
class _Mapped:
    """A decoded shard; its file stays as long as this has it open."""

    file: BinaryIO
    images: NDArray[Any]


class Intake:
    """The training images of a stream, N x H x W x C, numbered through its shards: as an array, by rows or a slice."""

    def __init__(
        self, shards: Sequence[Shard], shape: tuple[int, int, int], dtype: type[np.generic], *, fill: Fill, room: Room
    ) -> None:
        self.shards, self.dtype, self.fill, self.room = shards, np.dtype(dtype), fill, room
        self.first = np.concatenate([[0], np.cumsum([shard.images for shard in shards], dtype=np.int64)])
        self.shape = (int(self.first[-1]), *shape)
        self._asked: dict[int, Future[_Mapped]] = {}
        self._expected: tuple[int, ...] = ()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        for _ in range(AHEAD):  # which no process waits for at its end, as it would for those of an executor
            threading.Thread(target=_serve, args=(self._tasks,), name="intake", daemon=True).start()
        finalize(self, _dismiss, self._tasks, self._asked)

    def __len__(self) -> int:
        return self.shape[0]

    def expect(self, shards: Sequence[int]) -> None:
        """These shards are needed next, in this order, and no others: they are read in the background."""
        if self._expected != (wanted := tuple(shards)):
            self._expected = wanted
            self._forget_others(set())
            for shard in wanted:
                self._ask(shard)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        """A copy of these images. Raises DataError where a shard is gone, damaged, or another than it was."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        of = np.searchsorted(self.first, rows, side="right") - 1
        needed = np.unique(of).tolist()
        images = np.empty((len(rows), *self.shape[1:]), self.dtype)
        asked = {shard: self._ask(shard) for shard in needed}
        for shard, mapped in asked.items():
            here = of == shard
            images[here] = mapped.result().images[rows[here] - self.first[shard]]
        self._forget_others(set(needed))
        return images

    def _ask(self, shard: int) -> Future[_Mapped]:
        before = self._asked.get(shard)
        if before is None or (before.done() and before.exception()):  # what failed ahead of time is tried once more
            path = self.room.folder / f"{shard:06}.npy"
            shape = (self.shards[shard].images, *self.shape[1:])
            work = _Work(self.shards[shard], path, shape, self.dtype.type, self.room.limit)
            self._asked[shard] = Future()
            self._tasks.put(_Task(self._asked[shard], work, self.fill))
        return self._asked[shard]

    def _forget_others(self, needed: set[int]) -> None:
        for shard in self._asked.keys() - needed - set(self._expected):
            self._asked.pop(shard).cancel()


@dataclass(frozen=True)
class _Work:
    shard: Shard
    path: Path
    shape: tuple[int, ...]
    dtype: type[np.generic]
    limit: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class _Task(NamedTuple):
    """What a thread is asked for; it does not hold the intake, which could then never be let go."""

    asked: Future[_Mapped]
    work: _Work
    fill: Fill


def _serve(tasks: SimpleQueue[_Task | None]) -> None:
    """A thread: does one task after the other until there is None."""
    while task := tasks.get():
        if task.asked.set_running_or_notify_cancel():
            try:
                task.asked.set_result(_open_or_make(task.work, task.fill))
            except BaseException as error:  # noqa: BLE001 raised again where the images are asked for
                task.asked.set_exception(error)
        del task  # and the shard with it, as long as there is nothing else to do


def _dismiss(tasks: SimpleQueue[_Task | None], asked: dict[int, Future[_Mapped]]) -> None:
    """Ends the threads, after what they are at."""
    for future in asked.values():
        future.cancel()
    for _ in range(AHEAD):
        tasks.put(None)


def _open_or_make(work: _Work, fill: Fill) -> _Mapped:
    """The decoded shard, which one process of a machine makes. Raises DataError."""
    if found := _open(work.path):
        return found
    with lock_cache(work.path.with_suffix(".lock")):
        return _open(work.path) or _make(work, fill)


def _open(path: Path) -> _Mapped | None:
    """None where it is not there, or is removed at this moment."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not os.fstat(file.fileno()).st_nlink:
        file.close()
        return None
    os.utime(path)  # for whoever looks for what was not used for longest
    return _Mapped(file, np.load(path, mmap_mode="r"))


def _make(work: _Work, fill: Fill) -> _Mapped:
    partial = work.path.with_suffix(".partial")
    room = work.path.parent.parent
    with lock_cache(room / "room.lock"):
        _make_room(room, work.limit - work.size)
        images = reserve_file(partial, work.shape, work.dtype)
        file = partial.open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
    try:
        fill(work.shard, np.asarray(images))
        images.flush()
        partial.rename(work.path)
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise
    return _Mapped(file, np.load(work.path, mmap_mode="r"))


def _make_room(room: Path, most: int) -> None:
    """Removes what no process uses, the least recently used first, until at most so many bytes are left."""
    found = []
    for path in (*room.glob("*/*.npy"), *room.glob("*/*.partial")):  # of a process that was killed, too
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path, path.stat().st_size))
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found):
        if total <= most:
            return
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # in use
            path.unlink()
            total -= size
