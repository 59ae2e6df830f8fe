"""Files and folders of this machine: written whole or not at all, locked by the kernel, and what to say where they
cannot be. `workers.storage` builds on it."""

import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from workers.config import Mistake

LOOKS, LOOK_S = 10, 0.02  # at a lock that another process has, before it is believed to be held
PROBE_BYTES = 64 * 2**10  # written to see whether anything can be
LEFTOVER = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # a file that was not written to its end


class StorageError(Mistake, OSError):
    """A remote store does not answer or refuses, or a file of this machine cannot be read."""


class Unwritable(StorageError):
    """A folder of this machine cannot be written: its disk is full, broken or read-only, or others may not write it.

    Whatever is tried next would fail in the same way, so that nothing goes on after it.
    """

    @staticmethod
    def of(path: str | Path, error: OSError) -> "Unwritable":
        """What to say where writing the file or folder at `path` raised `error`."""
        what = f"{path} cannot be written: {error.strerror or error}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return Unwritable(f"{what}. Make it writable, or name another place; then run the same command again")
        free = ""
        with suppress(OSError):  # of a disk that does not answer even this
            folder = next(p for p in (Path(path), *Path(path).parents) if p.is_dir())
            free = f", of which {shutil.disk_usage(folder).free / 2**20:,.1f} MB are free"
        return Unwritable(f"{what}{free}. Make room there; the same command then goes on where this one stopped")


def resolve_folder(name: str) -> str:
    """The absolute path of a folder of this machine that is there or can be. Raises Mistake."""
    try:
        path = Path(name).expanduser().absolute()
        if not name or not stat.S_ISDIR(path.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except FileNotFoundError:  # not yet
        return str(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, an unknown user's home
        why = getattr(error, "strerror", None) or error
        raise Mistake(f"{name[:200]!r} is no folder ({why}); give one, or a URI such as s3://bucket/path") from error
    return str(path)


def check_writable(folder: Path) -> None:
    """Raises Unwritable where nothing can be written to a folder of this machine, which is made where it is not there.

    It is tried, as neither a full disk nor a read-only one shows in the folder's permissions.
    """
    probe = folder / "probe"
    try:
        replace(probe, bytes(PROBE_BYTES))
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise Unwritable.of(folder, error) from error
    for path in folder.glob(f"{probe.name}.*"):
        remove_leftover(path)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "a file is where its folder should be") from None


def replace(target: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary name, which is locked as long as its writer lives."""
    make_folder(target.parent)
    temporary = Path(f"{target}.{uuid.uuid4().hex[:8]}.tmp")  # LEFTOVER
    try:
        with temporary.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:  # it was taken for a leftover in the moment before
                return replace(target, content)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftover(path: Path) -> None:
    """Removes a temporary file of `replace` whose writer died; no other file."""
    if not LEFTOVER.search(path.name):
        return
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):  # its writer is alive, or has just ended
        return
    except OSError as error:
        raise Unwritable.of(path, error) from error


def remove(path: Path) -> None:
    """Removes a file or a folder, which others may be removing, or writing to for the last time."""
    while True:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            return
        except FileNotFoundError:
            if not path.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise


def open_locked(target: Path) -> BinaryIO | None:
    """The file opened and locked, as long as it is open; None where another process has it."""
    for _ in range(LOOKS):
        file = target.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            time.sleep(LOOK_S)  # who only asks for the holder has it for a moment
            continue
        except OSError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder has just removed it
    return None
