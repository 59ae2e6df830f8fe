"""Files under one root: a local path or any pyarrow filesystem URI (s3://bucket/prefix).

A file is written whole or not at all: to a temporary name, then renamed (an object store's put is atomic by itself).
Paths are relative to the root, with forward slashes. A URI may have options behind a question mark, such as
s3://bucket/prefix?region=eu-central-1; a store that is not Amazon's is named by the environment variable
AWS_ENDPOINT_URL or by ?endpoint_override=host:port&scheme=http. Keys come from the environment or the machine's role.
"""

import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from workers.config import Mistake

ATTEMPTS = 10  # of a request to S3, with growing pauses: some 25 s until a store that does not answer is given up
S3_OPTIONS = ("region", "endpoint_override", "scheme")
BEAT_S, STALE_S = 5.0, 20.0  # a lease is written anew so often; after so long without it, it is nobody's
SETTLE_S = 1.0  # longer than a small write takes
log = logging.getLogger(__name__)


class StorageError(Mistake, OSError):
    """A remote store does not answer, or refuses."""


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem at a URI, and the path in it. Raises Mistake where there can be none."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise Mistake(
            f"{parts.scheme}://...@{parts.hostname}{parts.path} holds a key, which would end up in logs and files; "
            "leave it out: keys come from the environment (AWS_ACCESS_KEY_ID, ...) or from the machine's role"
        )
    try:
        if parts.scheme != "s3":
            return fs.FileSystem.from_uri(uri)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := sorted(options.keys() - set(S3_OPTIONS)):
            raise Mistake(f"{uri}: no option {', '.join(unknown)}; valid: {', '.join(S3_OPTIONS)}")
        if not parts.netloc:
            raise Mistake(f"{uri} names no bucket; give s3://bucket/path")
        return _s3(parts.netloc, **(_s3_endpoint() | options)), parts.netloc + unquote(parts.path).rstrip("/")
    except (pa.ArrowInvalid, OSError) as error:
        raise Mistake(f"{uri} cannot be opened ({error}); give a folder, or a URI such as s3://bucket/path") from error


def _s3_endpoint() -> dict[str, str]:
    """The address of a store that is not Amazon's, from the environment: what botocore and Arrow read there."""
    if not (url := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")):
        return {}
    parts = urlsplit(url if "://" in url else f"https://{url}")
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme}


@lru_cache
def _s3(bucket: str, **options: str) -> fs.FileSystem:
    """S3 as a URI opens it, only more patient. Amazon is asked once for the bucket's region."""
    if "region" not in options:
        here = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options["region"] = here if "endpoint_override" in options else fs.resolve_s3_region(bucket)
    patience = fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS)
    return fs.S3FileSystem(**options, retry_strategy=patience, allow_delayed_open=True)


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Python's handlers of SIGINT and SIGTERM are called at the end of the block.

    A stream that an exception closes in the middle would put what it has until then. In other threads than the main
    one no handler runs.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in found.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class Storage:
    """Read and write bytes and JSON below `root`. It pickles as its root, so that it travels to Ray tasks.

    Of a remote root, every method raises StorageError where the store does not answer or refuses.
    """

    def __init__(self, root: str | Path) -> None:
        name = str(root).removeprefix("file://")
        self.is_local = "://" not in name
        self.root = str(Path(name).expanduser().absolute()) if self.is_local else name
        self._base: str
        self._fs, self._base = (fs.LocalFileSystem(), self.root) if self.is_local else open_uri(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root,)

    def _at(self, path: str) -> str:
        assert ".." not in path.split("/") and not path.startswith("/"), path
        return f"{self._base.rstrip('/')}/{path}".rstrip("/")

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What goes wrong with a remote store, in words; of the machine's own files the system's errors say enough."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.is_local or isinstance(error, StorageError):
                raise
            raise StorageError(
                f"{self.url(path)} cannot be reached ({str(error).split('; Details')[0]}). Look whether the bucket is "
                "there, this machine may use it (AWS_ACCESS_KEY_ID, ... or its role), and the address is right"
            ) from error

    def url(self, path: str = "") -> str:
        """Where a person finds `path`: a local path or a URI, which `Storage` opens again."""
        root, mark, options = self.root.partition("?") if not self.is_local else (self.root, "", "")
        return f"{root.rstrip('/')}/{path}".rstrip("/") + mark + options

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._told(path), self._fs.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        target = self._at(path)
        if not self.is_local:
            with self._told(path), _signals_put_off(), self._fs.open_output_stream(target) as stream:
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
        with self._told(path):
            return bool(self._fs.get_file_info(self._at(path)).type != fs.FileType.NotFound)

    def list(self, path: str) -> list[str]:
        """Names in the folder `path`, sorted; empty where there is no such folder. Unfinished writes are left out."""
        selector = fs.FileSelector(self._at(path), allow_not_found=True)
        with self._told(path):
            return sorted(i.base_name for i in self._fs.get_file_info(selector) if not i.base_name.endswith(".tmp"))

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; no error where there is none."""
        with self._told(path):
            kind = self._fs.get_file_info(self._at(path)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self._at(path))
            elif kind == fs.FileType.File:
                self._fs.delete_file(self._at(path))

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """Holds the file `path` against other processes. Raises Mistake where another one holds it.

        On a machine's own disk the kernel keeps it. On a remote store it is a lease (see `_lease`).
        """
        if not self.is_local:
            with self._lease(path):
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

    def locked(self, path: str) -> bool | None:
        """Whether a process holds the lock `path`, not taking it; None of a remote storage: a lease may be old."""
        if not self.is_local:
            return None
        try:
            with Path(self._at(path)).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    @contextmanager
    def _lease(self, path: str) -> Iterator[None]:
        """A file that says whose it is, written anew every BEAT_S seconds and removed at the end.

        One that is there is watched for STALE_S seconds, so nobody's clock matters: if it changes, its holder is alive
        and Mistake is raised; if not, it is taken over. An object store knows no exclusive write that pyarrow offers:
        of two that take a lease in the same moment the later write wins, which both see when they look again. A holder
        that was stopped for long and lost its lease meanwhile is interrupted as by ctrl-C. All that a sweep writes can
        be written twice, so between the two moments nothing is lost but time.
        """
        who = f"process {os.getpid()} on {socket.gethostname()}"
        mine = {"holder": uuid.uuid4().hex, "who": who}
        found = self._other(path)
        if found:
            log.warning("%s is held by %s; seeing for %g s whether it is alive", self.url(path), found["who"], STALE_S)
            deadline = time.monotonic() + STALE_S
            while found and time.monotonic() < deadline:
                time.sleep(min(BEAT_S, 1.0))
                if (now := self._other(path)) and now != found:
                    raise Mistake(f"{self.url(path)} is in use by {now['who']}; wait for it, or stop it")
                found = now
        self.write_json(path, {**mine, "beat": 0})
        time.sleep(SETTLE_S)
        if (now := self._other(path, mine["holder"])) is not None:
            raise Mistake(f"{self.url(path)} is in use by {now['who']}; wait for it, or stop it")
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, mine, ended), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            try:
                if self._other(path, mine["holder"]) is None:
                    self.delete(path)
            except StorageError as error:  # it will be found abandoned
                log.warning("the lease could not be removed: %s", error)

    def _other(self, path: str, holder: str = "") -> dict[str, Any] | None:
        """The lease at `path`, unless it is `holder`'s own; None where there is none."""
        found = self.read_json(path)
        return None if not found or found["holder"] == holder else found

    def _beat(self, path: str, mine: dict[str, Any], ended: threading.Event) -> None:
        beat = 0
        while not ended.wait(BEAT_S):
            try:
                if other := self._other(path, mine["holder"]):
                    log.error("%s was taken over by %s while this process did not run", self.url(path), other["who"])
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self.write_json(path, {**mine, "beat": (beat := beat + 1)})
            except StorageError as error:
                log.warning("%s: %s; tried again", path, error)

    def read_json(self, path: str) -> Any | None:
        """None where there is no such file. Raises Mistake where its content is no JSON."""
        try:
            content = self.read(path)
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise Mistake(f"{self.url(path)} is damaged ({error}); remove it and run the same command again") from error

    def write_json(self, path: str, content: Any) -> None:
        self.write(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def read_sealed(self, path: str) -> dict[str, Any] | None:
        """What `write_sealed` wrote; None where there is nothing, or where it is damaged: it is to be made again."""
        try:
            sealed = self.read(path)
        except FileNotFoundError:
            return None
        try:
            content = json.loads(sealed)
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
