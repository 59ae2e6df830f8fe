"""A copy on this machine of files on an object store, brought up to date as rsync does: by size and time of change.

Beside the copy lies a memo of what each file was copied from and the size and times that the copy had
then. So a copy that somebody touched is made again, also where its size and time are as they were. Stores tell times in
seconds: of an object that was young when it was copied its version (S3's ETag) is asked for once more.
"""

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from pyarrow import NativeFile, fs

from workers.data.splits import DataError
from workers.disk import StorageError
from workers.memos import read_state, recall, remember
from workers.remote import open_uri

THREADS = 8  # downloads at once
PIECE = 8 * 2**20  # bytes in memory of each
SETTLED_NS = 5_000_000_000  # an object that changed less than this ago may change again with the same time
log = logging.getLogger(__name__)


class Note(NamedTuple):
    """What a file was copied from, and what the file system says of the copy."""

    size: int
    mtime_ns: int
    version: str  # of the object, where the store tells it; asked for until it has settled
    settled: bool
    state: list[int]


def mirror_uri(uri: str, folder: Path) -> Path:
    """Brings the file or folder at `uri` into `folder`. Returns its path there, which has the same last name.

    What is there as it was copied is not read again; what the original no longer has is removed. A file appears whole.
    One process at a time: the caller holds a lock. Raises FileNotFoundError, and StorageError where the store does not
    answer or refuses, or has names that lead out of the folder.
    """
    store, base = open_uri(uri)
    memo = folder.with_name(f"{folder.name}.json")
    notes = {path: Note(*note) for path, note in (recall(memo) or {}).items()}
    try:
        infos = _list_files(store, base, uri)
        target = folder / PurePosixPath(base).name
        if outside := next((info.path for info in infos if ".." in PurePosixPath(info.path).parts), None):
            raise OSError(f"{outside!r} would lead out of the folder of the copy; rename it")
        wanted = {target / info.path[len(base) :].lstrip("/"): info for info in infos}
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda path: _check_note(store, path, wanted[path], notes.get(str(path))), wanted)
            kept = {str(path): note for path, note in zip(wanted, found, strict=True) if note}
        missing = [(path, info) for path, info in wanted.items() if str(path) not in kept]
        for path in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
            path.unlink()
        if missing:
            log.info("copying %d files from %s to %s", len(missing), uri, target)
            needed, free = sum(info.size for _, info in missing), shutil.disk_usage(_find_existing(folder)).free
            if needed > free:
                raise OSError(f"a copy of {needed / 1e9:.1f} GB does not fit {folder}, with {free / 1e9:.1f} GB free")
            with ThreadPoolExecutor(THREADS) as pool:
                made = pool.map(lambda pair: _copy(store, *pair), missing)
                kept |= {str(path): note for (path, _), note in zip(missing, made, strict=True)}
        if kept != notes:
            remember(memo, kept)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(str(error).split("; Details")[0]) from error
    return target


def _list_files(store: fs.FileSystem, base: str, uri: str) -> list[fs.FileInfo]:
    """The file there, or all in the folder there. Raises FileNotFoundError, and OSError as the store does."""
    top = store.get_file_info(base)
    if top.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is nothing at {uri}")
    inside = fs.FileSelector(base, recursive=True)
    infos = [top] if top.type == fs.FileType.File else store.get_file_info(inside)
    return [info for info in infos if info.type == fs.FileType.File]


def _check_note(store: fs.FileSystem, path: Path, info: fs.FileInfo, note: Note | None) -> Note | None:
    """The note of a copy that is as it was made, of an object that is as it was; else None."""
    if note is None or not path.is_file() or note.state != read_state(path):
        return None
    if (note.size, note.mtime_ns) != (info.size, info.mtime_ns):
        return None
    if note.settled:
        return note
    settled = _is_settled(info)  # before the version is asked for
    with store.open_input_stream(info.path) as source:
        same = note.version and note.version == _read_version(source)
    return note._replace(settled=settled) if same else None


def _is_settled(info: fs.FileInfo) -> bool:
    return time.time_ns() - int(info.mtime_ns) > SETTLED_NS


def _read_version(source: NativeFile) -> str:
    """The ETag of an open object; empty where the store has none."""
    return (source.metadata() or {}).get("ETag", b"").decode(errors="replace")


def _copy(store: fs.FileSystem, path: Path, info: fs.FileInfo) -> Note:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    settled = _is_settled(info)
    with store.open_input_stream(info.path) as source, temporary.open("wb") as file:
        version = _read_version(source)
        while piece := source.read(PIECE):
            file.write(piece)
        written = file.tell()
    if written != info.size:
        raise OSError(f"{info.path} has {info.size:,} bytes, of which {written:,} came")
    os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
    temporary.replace(path)
    return Note(info.size, info.mtime_ns, version, settled, read_state(path))


# ---- Files that stay there -------------------------------------------------------------------------------------


class Remote:
    """Files below a URI: a `workers.data.tree.Store`. Each has the version that it had when they were listed."""

    def __init__(self, uri: str, memo: Path, ends: tuple[str, ...]) -> None:
        """Versions are asked for of files whose names end so: one request each, as long as they do not change.

        Raises FileNotFoundError, and StorageError where the store does not answer or refuses.
        """
        self._uri = uri
        self._store, self._base = open_uri(uri)
        try:
            infos = _list_files(self._store, self._base, uri)
            self.is_file = [info.path for info in infos] == [self._base]
            base = self._base.rpartition("/")[0] if self.is_file else self._base
            self._paths = {info.path[len(base) :].lstrip("/"): info for info in infos}
            self.names = sorted(name for name in self._paths if not _is_hidden(name))
            self.versions = self._find_versions([name for name in self.names if name.lower().endswith(ends)], memo)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(str(error).split("; Details")[0]) from error

    def _find_versions(self, names: list[str], memo: Path) -> dict[str, str]:
        known = recall(memo) or {}
        states = {name: [int(self._paths[name].size), int(self._paths[name].mtime_ns)] for name in names}
        missing = [name for name in names if name not in known or known[name][:-1] != states[name]]
        settled = {name for name in missing if _is_settled(self._paths[name])}
        with ThreadPoolExecutor(THREADS) as pool:
            made = dict(zip(missing, pool.map(self._ask, missing), strict=True))
        if settled:
            remember(memo, known | {name: [*states[name], made[name]] for name in settled})
        return {name: made.get(name) or known[name][-1] for name in names}

    def _ask(self, name: str) -> str:
        with self._store.open_input_file(self._paths[name].path) as file:
            return self._name_version(name, file)

    def _name_version(self, name: str, file: NativeFile) -> str:
        return _read_version(file) or f"{file.size()} bytes of {self._paths[name].mtime_ns}"

    def open(self, name: str) -> IO[bytes]:
        """Raises DataError where it is gone, or another than when the files were listed."""
        try:
            file = self._store.open_input_file(self._paths[name].path)
        except FileNotFoundError as error:
            raise DataError(f"{name} is gone from {self._uri}; put it back, or run the same command again") from error
        except OSError as error:
            raise StorageError(f"{name} of {self._uri}: {str(error).split('; Details')[0]}") from error
        if (version := self._name_version(name, file)) != self.versions.get(name, version):
            file.close()
            raise DataError(
                f"{name} has changed at {self._uri} since it was looked at; run the same command again, which then "
                "takes it for other data"
            )
        return cast(IO[bytes], file)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _find_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.exists())
