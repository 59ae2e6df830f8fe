"""The folder of the cache, and locks in it: one process of a machine at a time makes what others wait for."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.data.splits import DataError


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
