"""What trials start from: of which other trial, trained how far.

Trials that only differ in how long they are trained, and whose learning rate falls at the end (`training.cooldown`),
have a trunk in common: the trial whose rate does not fall. `training.init` names others. Pure functions of trials.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.records import Variant
from workers.config import EvaluationConfig, Record, Trial
from workers.identity import compute_digest
from workers.layout import TrialId
from workers.warm_start import split_pin

TRUNK = "trunk"
UNMEASURED = EvaluationConfig(nll=None, fid=None)


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a trial starts from: that of the last step of `trial`, which is not measured."""

    trial: Trial
    role: str  # what it is to those that start from it


def make_pin(trial: TrialId, steps: int) -> str:
    """What a source is pinned to that is a trial of the same sweep, trained so far."""
    return compute_digest([trial, steps])


def find_start(trial: Trial, named: Mapping[str, Trial]) -> Origin | None:
    """What a trial starts from, of the same sweep; None where nothing. `named` are the trials of `needs`."""
    if steps := trial.training.trunk_steps:
        training = trial.training.model_copy(update={"steps": steps, "cooldown": 0})
        return Origin(trial.model_copy(update={"training": training, "evaluation": UNMEASURED}), TRUNK)
    name = split_pin(trial.training.init.source)[0] if trial.training.init else ""
    if name in named:
        return Origin(named[name].model_copy(update={"evaluation": UNMEASURED}), name)
    return None


def list_needed(variants: Iterable[Variant], named: Mapping[str, Trial]) -> list[Variant]:
    """What the variants start from, and what that starts from, each once and before those that need it."""
    found: dict[Trial, Variant] = {}

    def add(variant: Variant) -> None:
        if (start := find_start(variant.trial, named)) and start.trial not in found:
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
    if isinstance(like, Mapping):
        return {name: _read(content, name, value) for name, value in like.items()}
    return content.model_dump(mode="json") if isinstance(content, Record) else content
