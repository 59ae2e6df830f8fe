"""What is sent to another machine as a job: its name, and what must not be in it. Neither Ray nor torch is imported."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.experiment.load import resolve
from orchestrator.experiment.records import Experiment
from workers.config import hide_secrets
from workers.identity import compute_digest


def name_job(experiment: Experiment, storage: str) -> str:
    """Says what the job makes and where: the same command has the same name."""
    suffix = compute_digest([resolve(experiment), storage.rstrip("/")])[:8]
    return f"sweep-{experiment.name}-{suffix}"


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
