"""A look at MLflow's database file without MLflow, whose import would be a third of a command that does nothing.

It sees whether all that a sweep has shipped is there, by the tables of the MLflow that the project is pinned to. What
it does not see need not be missing: `Tracker.lacks` then asks MLflow itself.
"""

import sqlite3
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

RUNS = """
    SELECT runs.run_uuid, runs.artifact_uri FROM runs JOIN experiments USING (experiment_id)
    WHERE experiments.name = ? AND experiments.lifecycle_stage = 'active'
    AND runs.lifecycle_stage = 'active' AND runs.status != 'RUNNING'
"""
VIEWS = "SELECT key FROM experiment_tags JOIN experiments USING (experiment_id) WHERE experiments.name = ?"
ALIASED = """
    SELECT version, source FROM registered_model_aliases JOIN model_versions USING (name, version)
    JOIN logged_models ON logged_models.artifact_location = source AND logged_models.lifecycle_stage = 'active'
    WHERE registered_model_aliases.name = ? AND alias = ?
"""
TAGS = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"


def sees_all(
    database: Path,
    name: str,
    runs: Collection[str],
    parent: str,
    *,
    view: str,
    alias: str,
    tags: Mapping[str, str] | None,
) -> bool:
    """Whether the experiment `name` has these runs, ended, the files of the run `parent`, and the tag `view`; and,
    unless `tags` is None, whether `alias` of the registered model leads to a version with these tags and its files."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            places = dict(opened.execute(RUNS, (name,)).fetchall())
            if not set(runs) <= places.keys() or not _has_files(places[parent]):
                return False
            if (view,) not in opened.execute(VIEWS, (name,)).fetchall():
                return False
            if tags is None:
                return True
            [(version, source)] = opened.execute(ALIASED, (name, alias)).fetchall() or [("", "")]
            found = dict(opened.execute(TAGS, (name, version)).fetchall())
            return tags.items() <= found.items() and _has_files(source)
    except (sqlite3.Error, ValueError):  # locked, or other tables than these
        return False


def _has_files(uri: str) -> bool:
    folder = Path(unquote(urlsplit(uri).path))
    return folder.is_dir() and any(folder.iterdir())
