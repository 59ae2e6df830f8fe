"""Where MLflow is: the tracking URI, the local database, the client, and what its failures mean."""

import os
import re
import socket
import sqlite3
import tempfile
import uuid
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.tracking.provenance import without_secrets
from workers.config import Mistake
from workers.storage import Storage

# Failures that say nothing about the call itself: it is made again. Any other answer is a refusal of this call.
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}


def resolve_uri(storage: Storage, uri: str | None) -> tuple[str, str | None]:
    """The tracking URI, and where its artifacts go (None: the server decides). Raises Mistake, which teaches."""
    if uri is None and not storage.is_local:
        raise Mistake(
            f"tracking.uri is null, and the storage {storage.root} is remote: MLflow's database cannot lie in it. "
            "Give the address of an MLflow server: tracking.uri=http://HOST:5000"
        )
    uri = uri or f"sqlite:///{storage.root}/mlflow.db"
    if uri.startswith("sqlite:////"):
        return uri, (database_of(uri).parent / "mlartifacts").as_uri()
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


def origin(storage: Storage) -> str:
    """What names a storage in MLflow, where others may record as well."""
    return without_secrets(f"{socket.gethostname()}:{storage.root}" if storage.is_local else storage.root)


def client(storage: Storage, uri: str | None) -> Any:
    """MLflow's own client, for questions that are asked once. Raises Mistake where the URI cannot be used."""
    from mlflow import MlflowClient

    settle()
    return MlflowClient(tracking_uri=resolve_uri(storage, uri)[0])


def settle() -> None:
    """MLflow's settings that a user may replace."""
    for variable, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),  # repeating is this module's business, and interruptible
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("DO_NOT_TRACK", "true"),
    ):
        os.environ.setdefault(variable, value)


def database_of(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def make_database(path: Path, cache: Path) -> None:
    """An empty MLflow database at `path`, unless one is there.

    MLflow takes 8 s of CPU to run all its migrations, so that is done once for each of its versions, in the cache.
    """
    if path.exists():
        return
    template = cache / "mlflow" / f"{metadata.version('mlflow')}.db"
    if not template.exists():
        from mlflow import MlflowClient

        with tempfile.TemporaryDirectory() as temporary:
            fresh = Path(temporary, "mlflow.db")
            MlflowClient(f"sqlite:///{fresh}").search_experiments(max_results=1)
            # The default experiment holds this folder's name: MLflow makes another where it finds none.
            with closing(sqlite3.connect(fresh)) as database, database:
                database.execute("DELETE FROM experiments")
            _copy_database(fresh, template)
    _copy_database(template, path)


def _copy_database(source: Path, target: Path) -> None:
    """Whole or not at all, and never over one that another process has put there meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(temporary)) as write:
        read.backup(write)
    with suppress(FileExistsError):
        os.link(temporary, target)
    temporary.unlink()


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: nobody answered, or somebody who was not well."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):  # most network errors, too, arrive as INTERNAL_ERROR
        return error.error_code in PASSING
    if isinstance(error, HTTPError) and error.response is not None:
        return bool(error.response.status_code >= 500 or error.response.status_code == 429)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)  # requests' errors are OSErrors


def reason(error: Exception) -> str:
    """One line: what the system said, where requests wraps it in four layers."""
    found = re.search(r"\[Errno -?\d+\] [^\"')]+", str(error))
    return found[0] if found else f"{type(error).__name__}: {error}"
