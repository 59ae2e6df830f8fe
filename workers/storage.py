"""Files under one root: a local path or any pyarrow filesystem URI (s3://bucket/prefix).

A file is written whole or not at all: to a temporary name, then renamed (an object store's put is atomic by itself).
Paths are relative to the root, with forward slashes.
"""

import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from workers.config import Mistake

log = logging.getLogger(__name__)


class Storage:
    """Read and write bytes and JSON below `root`. It pickles as its root, so that it travels to Ray tasks."""

    def __init__(self, root: str | Path) -> None:
        name = str(root).removeprefix("file://")
        self.is_local = "://" not in name
        self.root = str(Path(name).expanduser().absolute()) if self.is_local else name
        self._base: str
        try:
            local = (fs.LocalFileSystem(), self.root)
            self._fs, self._base = local if self.is_local else fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError) as error:
            raise Mistake(
                f"--storage {name!r} cannot be opened ({error}); give a folder, or a URI such as s3://bucket/path"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root,)

    def _at(self, path: str) -> str:
        assert ".." not in path.split("/") and not path.startswith("/"), path
        return f"{self._base.rstrip('/')}/{path}"

    def url(self, path: str = "") -> str:
        """Where a person finds `path`: a local path or a URI."""
        return f"{self.root.rstrip('/')}/{path}".rstrip("/")

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._fs.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        target = self._at(path)
        if not self.is_local:
            with self._fs.open_output_stream(target) as stream:
                stream.write(content)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{target}.{uuid.uuid4().hex[:8]}.tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(self._at(path)).type != fs.FileType.NotFound)

    def list(self, path: str) -> list[str]:
        """Names in the folder `path`, sorted; empty where there is no such folder. Unfinished writes are left out."""
        selector = fs.FileSelector(self._at(path), allow_not_found=True)
        return sorted(i.base_name for i in self._fs.get_file_info(selector) if not i.base_name.endswith(".tmp"))

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; no error where there is none."""
        kind = self._fs.get_file_info(self._at(path)).type
        if kind == fs.FileType.Directory:
            self._fs.delete_dir(self._at(path))
        elif kind == fs.FileType.File:
            self._fs.delete_file(self._at(path))

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """Holds the file `path` against other processes of this machine; of a remote storage there is no lock.

        Raises Mistake where another process holds it.
        """
        if not self.is_local:
            yield
            return
        target = Path(self._at(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("a")
        except OSError as error:
            raise Mistake(f"--storage {self.root!r} cannot be written: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Mistake(f"{target.parent} is in use by another process; wait for it, or stop it") from error
            yield

    def read_json(self, path: str) -> Any | None:
        """None where there is no such file. Raises Mistake where its content is no JSON."""
        try:
            return json.loads(self.read(path)) if self.exists(path) else None
        except ValueError as error:
            raise Mistake(f"{self.url(path)} is damaged ({error}); remove it and run the same command again") from error

    def write_json(self, path: str, content: Any) -> None:
        self.write(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def read_sealed(self, path: str) -> dict[str, Any] | None:
        """What `write_sealed` wrote; None where there is nothing, or where it is damaged: it is to be made again."""
        if not self.exists(path):
            return None
        try:
            content = json.loads(self.read(path))
            if content.pop(SEAL) == _sum(content):
                return dict(content)
        except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, no seal, no mapping
            log.debug("unreadable", exc_info=True)
        log.warning("%s is damaged: it does not go with the sha256 in it; it is made again", self.url(path))
        return None

    def write_sealed(self, path: str, content: dict[str, Any]) -> None:
        """JSON with a sha256 of itself, for results that can be made again: a changed digit is noticed."""
        self.write_json(path, {**content, SEAL: _sum(content)})


SEAL = "sha256"  # the key of the sum in sealed JSON


def _sum(content: dict[str, Any]) -> str:
    """Of the content as JSON gives it back, whatever its spaces and the order of its keys."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
