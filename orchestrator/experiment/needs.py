"""The trials of an experiment that others start from by name: `needs`.

Each is the file's own settings, some of them replaced, and begins with random weights unless `training.init` is one of
the replaced. The search does not change them: all its variants share them. Pure functions of the experiment.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.experiment.expand import make_variants
from orchestrator.experiment.records import Axis, Experiment, Variant
from orchestrator.experiment.settings import find_invalid, list_leaves, list_paths, merge, put, suggest_path
from orchestrator.experiment.starts import find_start
from workers.config import TrainingConfig, Trial

SOURCE = "training.init.source"
LEAST_TRIAL = {"data": {"source": "digits"}, "training": {"steps": 1}}  # in which any one setting can be tried


def list_named(experiment: Experiment) -> dict[str, Trial]:
    """The trial that each name of `needs` means."""
    training = experiment.training.model_copy(update={"init": None})
    plain = experiment.model_copy(update={"training": training})
    variants = make_variants(plain, experiment.needs.values()) if experiment.needs else ()
    return dict(zip(experiment.needs, (variant.trial for variant in variants), strict=True))


def list_sources(experiment: Experiment) -> list[str]:
    """What the trials of a search start from, as the file says it."""
    init = experiment.training.init
    leaves = (list_leaves(path, value) for path, axis in experiment.search.space.items() for value in axis.values)
    searched = [found[SOURCE] for found in leaves if isinstance(found.get(SOURCE), str)]
    return list(dict.fromkeys([*([init.source] if init else []), *searched]))


def find_source(overrides: Mapping[str, Any]) -> str:
    """What a trial of `needs` starts from; empty where it begins with random weights."""
    found = {leaf: v for path, value in overrides.items() for leaf, v in list_leaves(path, value).items()}
    return str(found.get(SOURCE) or "")


def sort_needs(needs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names, each after the one that it starts from; those of a circle are left out."""
    order: list[str] = []
    for _ in needs:
        order += [name for name in needs if name not in order and find_source(needs[name]) not in needs.keys() - order]
    return order


def find_need_mistakes(
    experiment: Experiment, variants: Sequence[Variant], check: Callable[[Trial], Iterable[str]]
) -> list[str]:
    """What is wrong with `needs`, and with what trials start from; `check` says what is with a trial by itself."""
    needs = experiment.needs
    if found := [text for name, overrides in needs.items() for text in _find_override_mistakes(name, overrides)]:
        return found
    if circle := [name for name in needs if name not in sort_needs(needs)]:
        return [f"needs: {', '.join(circle)} start from each other in a circle; let one of them begin by itself"]
    used = list_sources(experiment)
    for name in used:  # grows
        used += [source for source in [find_source(needs.get(name, {}))] if source and source not in used]
    found = [
        f"needs.{name}: nothing starts from it, but from {', '.join(used) or 'random weights'}; name it in {SOURCE}, "
        "or leave it out"
        for name in needs
        if name not in used
    ]
    named = list_named(experiment)
    found += [f"needs.{name}: {text}" for name, trial in named.items() for text in check(trial)]
    stopper = experiment.search.scheduler.kind
    if stopper != "none" and any(find_start(variant.trial, named) for variant in variants):
        found.append(
            f"search.scheduler.kind: {stopper} would stop trials that others start from (training.cooldown, "
            "training.init); take none, or leave those out"
        )
    return found


def find_sourceless(trial: Trial, axes: Mapping[str, Axis]) -> list[str]:
    """Axes of how trials begin with the weights of others, where nothing says which."""
    leaves = (list_leaves(path, value) for path, axis in axes.items() for value in axis.values)
    if trial.training.init or any(SOURCE in found for found in leaves):
        return []
    return [
        f"search.space.{path}: nothing to start from; set {SOURCE}, or leave it out"
        for path in axes
        if path.startswith("training.init.")
    ]


def _find_override_mistakes(name: str, overrides: Mapping[str, Any]) -> Iterator[str]:
    known = [path for path in list_paths(Trial, own=True) if not path.startswith("evaluation")]
    for path, value in overrides.items():
        if path not in known:
            yield f"needs.{name}.{path}: no such setting of what is trained{suggest_path(path, known)}"
            continue
        for wrong, text in find_invalid(Trial, merge(LEAST_TRIAL, put({}, path.split("."), value))):
            yield f"needs.{name}.{wrong}: {text}"


def find_cooldown_mistakes(training: TrainingConfig) -> Iterator[str]:
    if training.cooldown and training.decay != "none":
        yield (
            f"training.cooldown: {training.cooldown:g} steps of a falling learning rate beside training.decay: "
            f"{training.decay}, in which it falls all the time; leave one out"
        )
    if training.cooldown_steps > training.steps:
        yield f"training.cooldown: {training.cooldown} is more than training.steps = {training.steps}; at most as many"
