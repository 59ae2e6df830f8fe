"""The folder of the cache, and locks in it: one process of a machine at a time makes what others wait for."""

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from workers.data.splits import DataError

SETTLED_NS = 2_000_000_000  # a file that changed less than this ago may change again within a tick of its clock


def find_default_cache() -> Path:
    return Path(os.environ.get("ORCHESTRATOR_CACHE") or "~/.cache/diffusion-orchestrator").expanduser().absolute()


@contextmanager
def lock_cache(path: Path) -> Iterator[None]:
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


def is_settled(state: Sequence[Any]) -> bool:
    """Whether a file of that `workers.memos.read_state` can't change any more without another state."""
    return time.time_ns() - state[2] > SETTLED_NS


def reserve_file(path: Path, shape: tuple[int, ...], kind: type[np.generic]) -> np.memmap:
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
