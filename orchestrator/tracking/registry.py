"""MLflow's registry: which checkpoints are models with a name, and moving the alias of the best.

A registered model has the name of its sweep. Each version says by tags which checkpoint it is: `orchestrator.trial`,
`orchestrator.checkpoint` (digests), `orchestrator.path` (the folder, relative to the storage's root) and
`orchestrator.storage` (that storage). The alias `candidate` is the best trial of the newest run of a sweep, `champion`
the one that was promoted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.tracking.server import call_patiently, make_client, shorten_failure
from workers.config import Mistake
from workers.storage import Storage

TRIAL, CHECKPOINT, PATH, STORAGE = (f"orchestrator.{name}" for name in ("trial", "checkpoint", "path", "storage"))
PROMOTED = "orchestrator.promoted"  # why, on a version that became champion


@dataclass(frozen=True)
class Version:
    """A registered checkpoint. `path` is empty where somebody registered it who is not this program."""

    sweep: str
    number: int
    aliases: tuple[str, ...]
    trial: str
    checkpoint: str
    path: str
    storage: str


def list_versions(storage: Storage, uri: str | None) -> list[Version]:
    """All versions of all registered models. Raises Mistake where MLflow does not answer."""
    if uri is None and storage.is_local and not storage.exists("mlflow.db"):
        return []
    mlflow = make_client(storage, uri)
    try:
        models = call_patiently(lambda: list(_read_pages(mlflow.search_registered_models)))
        aliases = {model.name: model.aliases for model in models}
        return sorted(
            (
                _read_version(found, aliases.get(found.name, {}))
                for found in call_patiently(lambda: list(_read_pages(mlflow.search_model_versions)))
            ),
            key=lambda version: (version.sweep, version.number),
        )
    except Exception as error:  # whatever it is, there is no registry to read: told with its reason
        raise Mistake(f"MLflow's registry cannot be read: {shorten_failure(error)}") from error


def promote(storage: Storage, uri: str | None, version: Version, alias: str, why: str) -> None:
    """Moves the alias to the version, and says on the version why. Raises Mistake where MLflow does not take it."""
    mlflow = make_client(storage, uri)
    try:
        call_patiently(lambda: mlflow.set_model_version_tag(version.sweep, str(version.number), PROMOTED, why))
        call_patiently(lambda: mlflow.set_registered_model_alias(version.sweep, alias, str(version.number)))
    except Exception as error:  # as above
        raise Mistake(f"{version.sweep} {version.number} could not be promoted: {shorten_failure(error)}") from error


def _read_version(found: Any, aliases: dict[str, Any]) -> Version:
    tags, number = found.tags, int(found.version)
    own = sorted(alias for alias, points_at in aliases.items() if int(points_at) == number)
    return Version(found.name, number, tuple(own), *(tags.get(key, "") for key in (TRIAL, CHECKPOINT, PATH, STORAGE)))


def _read_pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
