"""What trials start from: of which other trial, trained how far.

Trials that only differ in how long they are trained, and whose learning rate falls at the end (`training.cooldown`),
have a trunk in common: the trial whose rate does not fall. Pure functions of trials.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.records import Variant
from workers.config import EvaluationConfig, Trial

TRUNK = "trunk"
UNMEASURED = EvaluationConfig(nll=None, fid=None)


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a trial starts from: that of the last step of `trial`, which is not measured."""

    trial: Trial
    role: str  # what it is to those that start from it


def find_start(trial: Trial) -> Origin | None:
    """What a trial starts from; None where it begins by itself."""
    if steps := trial.training.trunk_steps:
        training = trial.training.model_copy(update={"steps": steps, "cooldown": 0})
        return Origin(trial.model_copy(update={"training": training, "evaluation": UNMEASURED}), TRUNK)
    return None


def list_needed(variants: Iterable[Variant]) -> list[Variant]:
    """What the variants start from, and what that starts from, each once and before those that need it."""
    found: dict[Trial, Variant] = {}

    def add(variant: Variant) -> None:
        if (start := find_start(variant.trial)) and start.trial not in found:
            params = {path: _read(start.trial, path, value) for path, value in variant.params.items()}
            needed = Variant(params=params, trial=start.trial, role=start.role)
            add(needed)
            found[start.trial] = needed

    for variant in variants:
        add(variant)
    return list(found.values())


def _read(content: Any, path: str, like: Any) -> Any:
    """The value of a trial at a path of the search space, whose other values are `like` it; None where it has none."""
    for name in path.split("."):
        content = getattr(content, name, None)
    return {name: _read(content, name, value) for name, value in like.items()} if isinstance(like, Mapping) else content
