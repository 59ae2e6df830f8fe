"""What trials start from: of which other trials, trained how far.

Trials that only differ in how long they are trained, and whose learning rate falls at the end (`training.cooldown`),
have a trunk in common: the trial whose rate does not fall. The other slots are the settings that name a model
(`workers.warm_start`). Pure functions of trials.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.records import Variant
from workers.config import EvaluationConfig, Record, Trial
from workers.identity import compute_digest
from workers.layout import RowId, TrialId
from workers.warm_start import INIT, TRUNK, list_models, split_pin

UNMEASURED = EvaluationConfig(nll=None, fid=None)


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a trial starts from: that of the last step of `trial`, which is not measured."""

    trial: Trial
    role: str  # what it is to those that start from it


def make_pin(trial: TrialId, steps: int) -> str:
    """What a source is pinned to that is a trial of the same sweep, trained so far."""
    return compute_digest([trial, steps])


def list_slots(trial: Trial) -> dict[str, str]:
    """The source of each slot of what a trial starts from; that of its trunk is empty, and stands for `training.init`,
    which the trunk begins with."""
    sources = {slot: model.source for slot, model in list_models(trial).items()}
    if not trial.training.trunk_steps:
        return sources
    return {TRUNK: "", **{slot: source for slot, source in sources.items() if slot != INIT}}


def find_origins(trial: Trial, named: Mapping[str, Trial]) -> dict[str, Origin]:
    """What a trial starts from, of the same sweep, by its slot. `named` are the trials of `needs`, unmeasured."""
    found = {}
    for slot, source in list_slots(trial).items():
        name, _ = split_pin(source)
        if slot == TRUNK:
            training = trial.training.model_copy(update={"steps": trial.training.trunk_steps, "cooldown": 0})
            found[slot] = Origin(trial.model_copy(update={"training": training, "evaluation": UNMEASURED}), TRUNK)
        elif name in named:
            found[slot] = Origin(named[name], name)
    return found


def shorten_slot(slot: str) -> str:
    """A slot as tables have it: teacher."""
    return slot.rpartition(".")[2]


def list_ancestors(row: RowId, starts: Mapping[RowId, Mapping[str, RowId]]) -> Iterator[RowId]:
    """The rows that one starts from, and what they start from, each once."""
    todo, seen = [row], {row}
    while todo:
        for start in starts.get(todo.pop(), {}).values():
            if start not in seen:
                seen.add(start)
                todo.append(start)
                yield start


def list_needed(variants: Iterable[Variant], named: Mapping[str, Trial]) -> list[Variant]:
    """What the variants start from, and what that starts from, each once and before those that need it."""
    found: dict[Trial, Variant] = {}

    def add(variant: Variant) -> None:
        for start in find_origins(variant.trial, named).values():
            if start.trial not in found:
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
    if isinstance(like, Mapping) and content is not None:
        return {name: _read(content, name, value) for name, value in like.items()}
    return content.model_dump(mode="json") if isinstance(content, Record) else content
