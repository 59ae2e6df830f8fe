"""A copy on this machine of files on an object store, brought up to date by size and time of change, as rsync does."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pyarrow import fs

from workers.storage import StorageError, open_uri

THREADS = 8  # downloads at once
PIECE = 8 * 2**20  # bytes in memory of each
log = logging.getLogger(__name__)


def mirror(uri: str, folder: Path) -> Path:
    """Brings the file or folder at `uri` into `folder` and gives its path there, which has the same last name.

    What is there with the size and time of the original is not read again; what the original no longer has is
    removed. A file appears whole. One process at a time: the caller holds a lock. Raises FileNotFoundError, and
    StorageError where the store does not answer or refuses.
    """
    store, base = open_uri(uri)
    try:
        top = store.get_file_info(base)
        if top.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"there is nothing at {uri}")
        inside = fs.FileSelector(base, recursive=True)
        infos = [top] if top.type == fs.FileType.File else store.get_file_info(inside)
        target = folder / PurePosixPath(base).name
        wanted = {target / info.path[len(base) :].lstrip("/"): info for info in infos if info.type == fs.FileType.File}
        missing = [(path, info) for path, info in wanted.items() if not _is_there(path, info)]
        for path in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
            path.unlink()
        if missing:
            log.info("copying %d files from %s to %s", len(missing), uri, target)
            needed, free = sum(info.size for _, info in missing), shutil.disk_usage(_existing(folder)).free
            if needed > free:
                raise OSError(f"a copy of {needed / 1e9:.1f} GB does not fit {folder}, with {free / 1e9:.1f} GB free")
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda pair: _copy(store, *pair), missing))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(str(error).split("; Details")[0]) from error
    return target


def _is_there(path: Path, info: fs.FileInfo) -> bool:
    return path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns)


def _copy(store: fs.FileSystem, path: Path, info: fs.FileInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    with store.open_input_stream(info.path) as source, temporary.open("wb") as file:
        while piece := source.read(PIECE):
            file.write(piece)
        written = file.tell()
    if written != info.size:
        raise OSError(f"{info.path} has {info.size:,} bytes, of which {written:,} came")
    os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
    temporary.replace(path)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.exists())
