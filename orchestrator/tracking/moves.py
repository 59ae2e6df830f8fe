"""A storage that was moved or copied: MLflow keeps the places of artifacts as whole addresses, which are then others.

Without this it would read the artifacts of runs from where the storage was, and write those of new ones there.
"""

import logging
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"  # the folder beside the database
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
log = logging.getLogger(__name__)


def list_left_places(path: Path) -> list[str]:
    """Where the artifacts beside a database lay before, as MLflow has it in the database; empty where it has them here,
    or where they did not come along."""
    here = path.parent / ARTIFACTS
    if not (path.exists() and here.is_dir()):
        return []
    with closing(_connect(path)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:  # nothing was recorded yet
            return []
        known = {place for (place,) in database.execute("SELECT artifact_location FROM experiments")}
    beside = {place for place in known if place.endswith(f"/{ARTIFACTS}")}
    return sorted(place for place in beside if Path(unquote(urlsplit(place).path)).resolve() != here.resolve())


def follow_artifacts(path: Path, before: Iterable[str]) -> None:
    """Has the database name the artifacts beside it in place of those that lay `before` at these places."""
    here = (path.parent / ARTIFACTS).as_uri()
    with closing(_connect(path)) as database:
        for place in before:
            end = len(place) + 1
            with database:
                for table, column in PLACES:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, end, place, end, f"{place}/"),
                    )
            log.warning("MLflow's artifacts lay at %s before; its database names them where they are now", place)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)
