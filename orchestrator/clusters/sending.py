"""What is sent to another machine as a job: its name, and what must not be in it. Neither Ray nor torch is imported."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import resolve
from orchestrator.experiment.records import Experiment
from workers.bundles import collect_bundles
from workers.config import Record, hide_secrets
from workers.identity import compute_digest


def name_job(experiment: Experiment, storage: str) -> str:
    """Says what the job makes and where: the same command has the same name."""
    code = list(collect_bundles(variant.trial for variant in expand(experiment)))
    suffix = compute_digest([resolve(experiment), storage.rstrip("/"), *code])[:8]
    return f"sweep-{experiment.name}-{suffix}"


def list_code(records: Iterable[Record]) -> dict[str, str]:
    """The text of all modules from outside that trials or suites need, by their place under a folder of `code`."""
    bundles = collect_bundles(records)
    return {module.file: module.text for bundle in bundles.values() for module in bundle.modules.values()}


def write_code(code: Mapping[str, str], folder: Path) -> None:
    """Writes what `list_code` lists, for an experiment file whose `code` is that folder."""
    for name, text in code.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def find_secrets(file: Path, words: Sequence[str]) -> list[str]:
    """What is wrong with words of a command, and the file that goes with it, that show a secret."""
    texts = {word: word for word in words} | {str(file): file.read_text(encoding="utf-8")}
    return [
        f"{name} holds a user's name, a password or a key, which the cluster's logs would show: leave them out and set "
        "them in the environment of the head (MLFLOW_TRACKING_USERNAME, AWS_ACCESS_KEY_ID, ...) or give its machine a "
        "role"
        for name, text in texts.items()
        if hide_secrets(text) != text
    ]
