"""Locks of a storage: one process at a time does what a lock stands for, on one machine or on many.

On a machine's own disk the kernel keeps a lock; on a remote store it is a lease, a file that its holder writes anew.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.config import Mistake
from workers.disk import StorageError, Unwritable, make_folder, open_locked
from workers.signals import allow_interrupt
from workers.storage import Storage

BEAT_S, STALE_S = 5.0, 20.0  # a lease is written anew so often; after so long without it, it is nobody's
SETTLE_S = 1.0  # longer than a small write takes
log = logging.getLogger(__name__)


class Held(Mistake):
    """Another process holds a lock. `who` says which."""

    def __init__(self, what: str, who: str) -> None:
        super().__init__(what, who)
        self.what, self.who = what, who

    def __str__(self) -> str:
        return f"{self.what} is in use by {self.who}; wait for it, or stop it"


@contextmanager
def lock(storage: Storage, path: str, owner: str = "") -> Iterator[None]:
    """Holds the file `path` against other processes. Raises Held where another one holds it, StorageError.

    On a machine's own disk the kernel keeps it. On a remote store it is a lease (see `_hold_lease`). The file says who
    holds it, with the `owner` on whose behalf, and is removed at the end.
    """
    who = f"process {os.getpid()} on {socket.gethostname()}{f' ({owner})' if owner else ''}"
    mine = {"who": who, "owner": owner}
    if not storage.is_local:
        with _hold_lease(storage, path, mine):
            yield
        return
    target = Path(storage.resolve(path))
    try:
        make_folder(target.parent)
        file = open_locked(target)
    except OSError as error:
        raise Unwritable.of(target, error) from error
    if file is None:
        raise Held(str(target.parent), (read_holder(storage, path) or _read_lock(b""))["who"])
    with file:
        try:
            file.truncate()
            file.write(json.dumps(mine).encode())
            file.flush()
        except OSError as error:
            raise Unwritable.of(target, error) from error
        try:
            yield
        finally:
            with suppress(OSError):  # the kernel frees the lock in any case; the file alone would stay
                target.unlink()


def is_locked(storage: Storage, path: str) -> bool | None:
    """Whether a process holds the lock `path`, not taking it; None of a remote storage: a lease may be old."""
    return read_holder(storage, path) is not None if storage.is_local else None


def read_holder(storage: Storage, path: str) -> dict[str, Any] | None:
    """What the lock `path` says of its holder, not taking it; None where nobody holds it.

    Of a remote storage it is the lease, which may be old: `Leases` says whether it is alive.
    """
    if not storage.is_local:
        return _read_other(storage, path)
    try:
        with storage.raise_in_words(path), Path(storage.resolve(path)).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read_lock(file.read())
    except FileNotFoundError:
        return None
    return None


@contextmanager
def _hold_lease(storage: Storage, path: str, about: dict[str, str]) -> Iterator[None]:
    """A file that says whose it is, written anew every BEAT_S seconds and removed at the end.

    One that is there is watched for STALE_S seconds, so nobody's clock matters: if it changes, its holder is alive
    and Mistake is raised; if not, it is taken over. An object store knows no exclusive write that pyarrow offers:
    of two that take a lease in the same moment the later write wins, which both see when they look again. A holder
    that was stopped for long and lost its lease meanwhile is interrupted as by ctrl-C. All that a sweep writes can
    be written twice, so between the two moments nothing is lost but time.
    """
    mine = {"holder": uuid.uuid4().hex, **about}
    found = _read_other(storage, path)
    if found and about["owner"] and found.get("owner") == about["owner"]:
        found = None  # of a process before this one, that the same owner had
    if found:
        log.warning(
            "%s is held by %s; seeing for %g s whether it is alive", storage.find_url(path), found["who"], STALE_S
        )
        deadline = time.monotonic() + STALE_S
        while found and time.monotonic() < deadline:
            time.sleep(min(BEAT_S, 1.0))
            if (now := _read_other(storage, path)) and now != found:
                raise Held(storage.find_url(path), now["who"])
            found = now
    storage.write_sealed(path, {**mine, "beat": 0})
    time.sleep(SETTLE_S)
    if (now := _read_other(storage, path, mine["holder"])) is not None:
        raise Held(storage.find_url(path), now["who"])
    ended = threading.Event()
    with allow_interrupt() as interrupt:
        beating = threading.Thread(
            target=_beat, args=(storage, path, mine, ended, interrupt), name="lease", daemon=True
        )
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            try:
                if _read_other(storage, path, mine["holder"]) is None:
                    storage.delete(path)
            except StorageError as error:  # it will be found abandoned
                log.warning("the lease could not be removed: %s", error)


def _read_other(storage: Storage, path: str, holder: str = "") -> dict[str, Any] | None:
    """The lease at `path`, unless it is `holder`'s own; None where there is none. One that is damaged is somebody's
    as long as it changes, like any other."""
    found = storage.read_sealed(path, "whoever holds it writes it again")
    if found is None and storage.exists(path):
        return {"holder": "", "who": "somebody", "content": storage.read(path).hex()}
    return None if not found or found["holder"] == holder else found


def _beat(
    storage: Storage, path: str, mine: dict[str, Any], ended: threading.Event, interrupt: Callable[[], object]
) -> None:
    beat = 0
    while not ended.wait(BEAT_S):
        try:
            if other := _read_other(storage, path, mine["holder"]):
                log.error(
                    "%s was taken over by %s while this process did not run", storage.find_url(path), other["who"]
                )
                interrupt()
                return
            storage.write_sealed(path, {**mine, "beat": (beat := beat + 1)})
        except StorageError as error:
            log.warning("%s: %s; tried again", path, error)


class Leases:
    """Tells who holds the locks of a storage. No call waits: whether a lease is alive is seen from call to call."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[str, tuple[dict[str, Any], float]] = {}  # each lease as it is, and since when it is so

    def find_holder(self, path: str, owner: str = "") -> str:
        """Who holds the lock `path`; empty where nobody does, or only what `owner` has left on a remote storage.

        A lease is believed at first, and is nobody's when it has stayed the same for STALE_S seconds.
        """
        found, now = read_holder(self._storage, path), time.monotonic()
        if found is None:
            self._seen.pop(path, None)
            return ""
        if not self._storage.is_local:
            before, since = self._seen.get(path, (None, now))
            self._seen[path] = found, since if found == before else now
            if now - self._seen[path][1] > STALE_S or (owner and found.get("owner") == owner):
                return ""
        return str(found["who"])


def _read_lock(content: bytes) -> dict[str, Any]:
    """What a lock that is held says; it may be just being written."""
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(content)
        return {"who": str(holder["who"]), "owner": str(holder["owner"])}
    return {"who": "another process", "owner": ""}
