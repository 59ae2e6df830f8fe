"""The folder in which Tune and Ray Train note what they do, and which outlives no driver for long."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.execution.local_ray import check_room
from workers.config import Mistake
from workers.disk import Unwritable

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
SCRATCH = "orchestrator-sweep-"  # what names of scratch folders begin with


@contextmanager
def make_scratch_folder() -> Iterator[str]:
    """A folder for what Tune and Ray Train note of the trials, while the block lasts.

    It is locked as long as its driver lives, so that those which killed drivers left are known, and removed here.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError), _lock_folder(left):  # one that is in use, or another user's, stays
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix="orchestrator-"))
    with _lock_folder(made):
        folder = made.rename(made.with_name(made.name.replace("orchestrator-", SCRATCH, 1)))
        try:
            yield str(folder)
        except OSError as error:  # it is in here, or in Ray's folder, that Tune could not write
            if isinstance(error, Mistake) or error.errno not in DISK_ERRORS:
                raise
            check_room()
            raise Unwritable.of(error.filename or folder, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes. Raises BlockingIOError where another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
