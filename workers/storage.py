"""Files under one root: a local path or any pyarrow filesystem URI (s3://bucket/prefix; see `workers.remote`).

A file is written whole or not at all: to a temporary name, then renamed (an object store's put is atomic by itself).
Paths are relative to the root, with forward slashes.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from workers import disk, seals
from workers.disk import StorageError, Unwritable
from workers.remote import open_uri
from workers.signals import put_off_signals

REMADE = "it is made again"
T = TypeVar("T")
log = logging.getLogger(__name__)


class Storage:
    """Read and write bytes and JSON below `root`. It pickles as its root, so that it travels to Ray tasks.

    Of a remote root, every method raises StorageError where the store does not answer or refuses.
    """

    def __init__(self, root: str | Path) -> None:
        name = str(root).removeprefix("file://")
        self.is_local = "://" not in name
        self.root = disk.resolve_folder(name) if self.is_local else name
        self._base: str
        self._fs, self._base = (fs.LocalFileSystem(), self.root) if self.is_local else open_uri(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root,)

    def resolve(self, path: str) -> str:
        """The path in the filesystem: of a local storage, that of the file."""
        assert ".." not in path.split("/") and not path.startswith("/"), path
        return f"{self._base.rstrip('/')}/{path}".rstrip("/")

    @contextmanager
    def raise_in_words(self, path: str) -> Iterator[None]:
        """What goes wrong with the file `path` in the block is raised in words: FileNotFoundError or StorageError."""
        try:
            yield
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            if self.is_local:
                if Path(self.resolve(path)).is_dir():
                    raise StorageError(f"{self.find_url(path)} is a folder, where a file belongs; remove it") from error
                why = os.strerror(error.errno) if error.errno else str(error)
                raise StorageError(f"{self.find_url(path)} cannot be read: {why}; make it readable") from error
            raise StorageError(
                f"{self.find_url(path)} cannot be reached ({str(error).split('; Details')[0]}). Check that the "
                "bucket is there, that this machine may use it (AWS_ACCESS_KEY_ID, ... or its role), and the address"
            ) from error

    def find_url(self, path: str = "") -> str:
        """Where a person finds `path`: a local path or a URI, which `Storage` opens again."""
        root, mark, options = self.root.partition("?") if not self.is_local else (self.root, "", "")
        return f"{root.rstrip('/')}/{path}".rstrip("/") + mark + options

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self.raise_in_words(path), self._fs.open_input_stream(self.resolve(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        """Raises StorageError, of a folder of this machine `Unwritable`; what was there is then still there."""
        target = self.resolve(path)
        if not self.is_local:
            with self.raise_in_words(path), put_off_signals(), self._fs.open_output_stream(target) as stream:
                stream.write(content)
            return
        try:
            disk.replace(Path(target), content)
        except OSError as error:
            raise Unwritable.of(target, error) from error

    def check_writable(self) -> None:
        """Raises StorageError where nothing can be written: before any work, not after it."""
        if self.is_local:
            disk.check_writable(Path(self.root))
            return
        probe = f"probe-{uuid.uuid4().hex[:8]}"
        self.write(probe, b"")
        self.delete(probe)

    def remove_leftovers(self, folder: str = "") -> None:
        """Removes the temporary files below `folder` whose writers died. Those of living writers are locked."""
        if not self.is_local:
            return
        for place, _, names in os.walk(self.resolve(folder)):
            for name in names:
                disk.remove_leftover(Path(place, name))

    def get_size(self, path: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        with self.raise_in_words(path):
            info = self._fs.get_file_info(self.resolve(path))
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(self.find_url(path))
        return int(info.size or 0)

    def exists(self, path: str) -> bool:
        with self.raise_in_words(path):
            return bool(self._fs.get_file_info(self.resolve(path)).type != fs.FileType.NotFound)

    def list(self, path: str) -> list[str]:
        """Names in the folder `path`, sorted; empty where there is no such folder. Unfinished writes are left out."""
        selector = fs.FileSelector(self.resolve(path), allow_not_found=True)
        with self.raise_in_words(path):
            return sorted(i.base_name for i in self._fs.get_file_info(selector) if not i.base_name.endswith(".tmp"))

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; no error where there is none, or where others remove it meanwhile."""
        if self.is_local:
            try:
                disk.remove(Path(self.resolve(path)))
            except OSError as error:
                raise Unwritable.of(self.resolve(path), error) from error
            return
        with self.raise_in_words(path):
            kind = self._fs.get_file_info(self.resolve(path)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self.resolve(path))
            elif kind == fs.FileType.File:
                self._fs.delete_file(self.resolve(path))

    def read_sealed(self, path: str, then: str = REMADE) -> dict[str, Any] | None:
        """What `write_sealed` wrote at this path; None where there is nothing, or where it is damaged, which is told
        with what follows (`then`)."""
        return self.read_checked(path, seals.open_json, then)

    def write_sealed(self, path: str, content: Mapping[str, Any], sort: bool = True) -> None:
        """JSON with a sha256 of itself: a changed digit is noticed."""
        self.write(path, (json.dumps(seals.seal_json(content, path), indent=2, sort_keys=sort) + "\n").encode())

    def read_checked(self, path: str, open_: Callable[[bytes, str], T], then: str = REMADE) -> T | None:
        """As `read_sealed`, of what another function of `workers.seals` opens."""
        try:
            return open_(self.read(path), path)
        except FileNotFoundError:
            return None
        except seals.Damage as damage:
            tell_damage(self.find_url(path), f"is damaged: {damage}", then)
            return None


@lru_cache(maxsize=10_000)
def tell_damage(url: str, damage: str, then: str) -> None:
    """Logs what is wrong with a file and what follows, once a process: the same files are read again and again."""
    log.warning("%s %s; %s", url, damage, then)
