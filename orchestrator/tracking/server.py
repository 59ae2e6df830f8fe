"""Where MLflow is: the tracking URI, the local database, the client, and what its failures mean."""

import errno
import logging
import os
import re
import socket
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from shlex import quote as quote_word
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from orchestrator.tracking.moves import ARTIFACTS, follow_artifacts, list_left_places
from workers.config import Mistake, hide_secrets
from workers.data.cache import find_default_cache
from workers.storage import Storage

log = logging.getLogger(__name__)

# What an error says of the call that was made. A passing one may succeed in a moment; a standing one is no fault of
# the call: none succeeds until somebody has mended the place, the key or the address; any other is a refusal.
Kind = Literal["passing", "standing", "refusal"]
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}
PASSING |= {"RESOURCE_EXHAUSTED"}  # HTTP 429
DAMAGED = "database disk image is malformed|file is not a database|malformed database schema"
STANDING = (  # pattern of what is raised, and what it means where that does not say enough
    (DAMAGED, "the file is damaged ({0})"),
    ("Detected out-of-date database schema", "its schema is of another version of MLflow"),
    ("no such table: \\w+", "the file was replaced by one that MLflow has not made ({0})"),
    ("database or disk is full", "{0}"),
    ("attempt to write a readonly database", "{0}: it is read-only, or its file was moved or replaced"),
    ("disk I/O error", "{0}"),
    ("unable to open database file", "{0}"),
    (
        "error code 401|UNAUTHENTICATED|not authenticated",
        "it wants a user's name and password (HTTP 401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN, in the environment",
    ),
    ("not in a valid JSON format", "what answers there is no MLflow server, or a page before it: it sends no JSON"),
    ("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|wrong version number", "TLS does not work with it ({0})"),
    ("Name or service not known|nodename nor servname|No address associated with hostname", "no such host ({0})"),
)
DATABASE = "mlflow.db"  # in a storage
PLACES = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
}  # of a disk that takes nothing more
MENDING = (
    "It is a copy: what the sweep measured is in its journals. Move the file away (mv {path} {path}.old) and run the "
    "same command again, which makes another and ships everything of its sweep; what was set in MLflow alone, such as "
    "the alias champion, is to be set again."
)


def resolve_uri(storage: Storage, uri: str | None) -> tuple[str, str | None]:
    """The tracking URI, and where its artifacts go (None: the server decides). Raises Mistake, which teaches."""
    if uri is None and not storage.is_local:
        raise Mistake(
            f"tracking.uri is null, and the storage {storage.root} is remote: MLflow's database cannot lie in it. "
            "Give the address of an MLflow server: tracking.uri=http://HOST:5000"
        )
    uri = uri or make_database_uri(Path(storage.root, DATABASE))
    if is_database(uri) and find_database(uri).is_absolute():
        return uri, (find_database(uri).parent / ARTIFACTS).as_uri()
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc:
        return uri.rstrip("/"), None
    if parts.scheme in ("http", "https") and parts.hostname:
        raise Mistake(
            "tracking.uri holds a user's name or password, which would end up in logs and files: leave them out and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment instead."
        )
    raise Mistake(
        f"tracking.uri={uri!r} cannot be used: MLflow 3 keeps runs in a database or behind a server. Choose one of\n"
        "  null                           the database mlflow.db in the storage (python -m orchestrator.ui shows it)\n"
        "  http://HOST:5000, https://...  an MLflow server\n"
        "  sqlite:////ABSOLUTE/mlflow.db  another database: three slashes, then an absolute path"
    )


def is_database(uri: str) -> bool:
    return uri.startswith(("sqlite:///", "sqlite+pysqlite:///"))


def make_database_uri(path: Path) -> str:
    """The URI of a database file. SQLAlchemy takes what follows a ? for options, and decodes %20.

    With a name to be decoded the driver stands in it, too: from one that begins with `sqlite:` MLflow would make an
    empty folder of the name as it is written.
    """
    text = re.sub("[%?#]", lambda found: quote(found[0]), str(path))
    return f"sqlite:///{text}" if text == str(path) else f"sqlite+pysqlite:///{text}"


def find_database(uri: str) -> Path:
    """The file of a database's URI."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def describe_server(uri: str) -> str:
    """The command that serves a storage's database to this machine; empty where a server has it, or another file is."""
    path = find_database(uri)
    is_ours = is_database(uri) and path.name == DATABASE
    return f"python -m orchestrator.ui --storage {quote_word(str(path.parent))}" if is_ours else ""


def name_origin(storage: Storage) -> str:
    """What names a storage in MLflow, where others may record as well."""
    return hide_secrets(f"{socket.gethostname()}:{storage.root}" if storage.is_local else storage.root)


def make_client(storage: Storage, uri: str | None) -> Any:
    """MLflow's own client, for questions that are asked once. Raises Mistake where the URI cannot be used."""
    place = resolve_uri(storage, uri)[0]
    if is_database(place):
        ready_database(find_database(place))
    say_unused(place)
    return connect(place)


def connect(uri: str) -> Any:
    """MLflow's own client of what is at the URI, its registry too, whatever the environment names."""
    set_defaults()
    from mlflow import MlflowClient

    # It would write a traceback for each error that it raises as well.
    for noisy, level in (
        ("mlflow", logging.WARNING),
        ("mlflow.store.db.utils", logging.CRITICAL),
        ("urllib3.connectionpool", logging.ERROR),
    ):
        logging.getLogger(noisy).setLevel(level)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@lru_cache
def say_unused(uri: str) -> None:
    """Says, once a process, what the environment names and this program does not use."""
    for text in find_unused(uri, os.environ):
        log.warning("%s", text)


def find_unused(uri: str, environment: Mapping[str, str]) -> list[str]:
    """The addresses that the environment names for MLflow, other than that which the file and the command line name."""

    def is_same(named: str) -> bool:
        if is_database(named) and is_database(uri):
            return find_database(named).absolute() == find_database(uri)
        return named.rstrip("/") == uri

    return [
        f"{name}={hide_secrets(named)} of the environment is not used: runs and models go to {uri}, as tracking.uri "
        "(--tracking-uri) says"
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        if (named := environment.get(name)) and not is_same(named)
    ]


def set_defaults() -> None:
    """MLflow's settings that a user may replace."""
    for variable, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),  # repeating is this module's business, and interruptible
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool"),  # a file that was moved away is not written to any more
        ("DO_NOT_TRACK", "true"),
    ):
        os.environ.setdefault(variable, value)


def check_writable(path: Path) -> None:
    """Raises Mistake where MLflow's database cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise Mistake(f"MLflow's database {path} cannot be written: {error}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise Mistake(f"MLflow's database {path} cannot be written: {path.name} is read-only for this user")


def ready_database(path: Path) -> None:
    """What comes before the first use of MLflow's database, where it is there. Raises Mistake."""
    check_database(path, find_default_cache())
    if before := list_left_places(path):
        check_writable(path)
        follow_artifacts(path, before)


def check_database(path: Path, cache: Path) -> None:
    """Raises Mistake where MLflow's database is there, and is none that it can use."""
    if not path.is_dir() and not _has_content(path):
        return
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)) as database:
            [found] = database.execute("PRAGMA quick_check(1)").fetchone()
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            version = _read_schema(database) if "alembic_version" in tables else ""
    except sqlite3.DatabaseError as error:
        if re.search("locked", str(error)):  # by somebody who writes to it: it can be used in a moment
            return
        found, tables, version = str(error), {""}, ""
    if found != "ok":
        raise Mistake(f"MLflow's database {path} is damaged ({' '.join(found.split())}). {MENDING.format(path=path)}")
    if tables and not version:
        raise Mistake(
            f"{path} is a database, but none of MLflow's: it has tables such as {min(tables)}. Move it away, or name "
            "another place by --storage or tracking.uri=sqlite:////ABSOLUTE/mlflow.db"
        )
    with closing(sqlite3.connect(_make_template(cache))) as template:
        wanted = _read_schema(template)
    if tables and version != wanted:
        raise Mistake(
            f"MLflow's database {path} has the schema {version}, MLflow {metadata.version('mlflow')} wants {wanted}. "
            f"Where an older MLflow made it, `mlflow db upgrade {make_database_uri(path)}` brings it up to date "
            f"(copy the file first); where a newer one did, install that. Or begin another. {MENDING.format(path=path)}"
        )


def _read_schema(database: sqlite3.Connection) -> str:
    return ", ".join(sorted(version for (version,) in database.execute("SELECT version_num FROM alembic_version")))


def make_database(path: Path, cache: Path) -> None:
    """An empty MLflow database at `path`, unless one is there.

    MLflow takes 8 s of CPU to run all its migrations, so that is done once for each of its versions, in the cache.
    """
    if _has_content(path):
        return
    template = _make_template(cache)
    if not _has_content(path):
        path.unlink(missing_ok=True)  # empty, as SQLite leaves it where it looks for one that was moved away
        for suffix in ("-journal", "-wal", "-shm"):  # of one that was killed and moved away: they would spoil this one
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    _copy_database(template, path)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _make_template(cache: Path) -> Path:
    """An empty database of this version of MLflow."""
    template = cache / "mlflow" / f"{metadata.version('mlflow')}.db"
    if not template.exists():
        from mlflow import MlflowClient

        with tempfile.TemporaryDirectory() as temporary:
            fresh = Path(temporary, "mlflow.db")
            MlflowClient(make_database_uri(fresh)).search_experiments(max_results=1)
            # The default experiment holds this folder's name: MLflow makes another where it finds none.
            with closing(sqlite3.connect(fresh)) as database, database:
                database.execute("DELETE FROM experiments")
            _copy_database(fresh, template)
    return template


def _copy_database(source: Path, target: Path) -> None:
    """Whole or not at all, and never over one that another process has put there meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(temporary)) as write:
            read.backup(write)
        with suppress(FileExistsError):
            os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def classify_failure(error: Exception) -> Kind:
    """Whether the same call may succeed in a moment, or when somebody has mended something, or not at all."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if any(re.search(pattern, str(error)) for pattern, _ in STANDING):
        return "standing"
    if isinstance(error, MlflowException):  # most network errors, too, arrive as INTERNAL_ERROR
        return "passing" if error.error_code in PASSING else "refusal"
    if isinstance(error, HTTPError) and error.response is not None:
        return "passing" if error.response.status_code >= 500 or error.response.status_code == 429 else "refusal"
    if isinstance(error, OSError) and error.errno in PLACES:
        return "standing"
    # requests' errors are OSErrors
    return "passing" if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else "refusal"


def shorten_failure(error: Exception) -> str:
    """One line: the system's own reason, which requests, SQLAlchemy and MLflow wrap in four layers."""
    text = str(error)
    for pattern, meaning in STANDING:
        if found := re.search(pattern, text):
            return meaning.format(found[0])
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.strerror}: {error.filename}"
    for pattern in (
        r"\[Errno -?\d+\] [^\"')]+",
        r"(?<=\(sqlite3\.)\w+\) [^\n]+",
        r"Remote end closed connection without response",
        r"Read timed out",
    ):
        if found := re.search(pattern, text):
            return found[0].replace(")", ":", 1)
    if found := re.search(r"failed with error code (\d+)(?:.*Response body: '([^<]{1,200})')?", text):
        return f"HTTP {found[1]}" + (f", {' '.join(found[2].split())}" if found[2] else "")
    return f"{type(error).__name__}: {' '.join(text.split())[:500]}"


def call_patiently(call: Callable[[], Any], timeout_s: float = 60) -> Any:
    """What `call` returns, made again while its failures may pass, for so long."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.25
    while True:
        try:
            return call()
        except Exception as error:  # of any kind: what does not pass in time is raised
            if classify_failure(error) != "passing" or time.monotonic() + pause_s > deadline:
                raise
            log.info("MLflow: made again: %s", shorten_failure(error))
        time.sleep(pause_s)
        pause_s = min(5.0, 2 * pause_s)
