"""The trials of an experiment that others start from by name: `needs`.

Each is the file's own settings, some of them replaced, and names no other model (`workers.warm_start.SLOTS`) except in
the replaced ones. The search does not change them: all its variants share them. Pure functions of the experiment.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.experiment.expand import make_variants
from orchestrator.experiment.records import Axis, Experiment, Variant
from orchestrator.experiment.settings import find_invalid, list_leaves, list_paths, merge, put, suggest_path
from orchestrator.experiment.starts import UNMEASURED, find_origins
from workers.config import TrainingConfig, Trial
from workers.warm_start import SLOTS, list_models, replace_models, split_pin

LEAST_TRIAL = {"data": {"source": "digits"}, "training": {"steps": 1}}  # in which any one setting can be tried


def list_named(experiment: Experiment) -> dict[str, Trial]:
    """The trial that each name of `needs` means, which is not measured."""
    plain = replace_models(experiment, dict.fromkeys(list_models(experiment)))
    plain = plain.model_copy(update={"evaluation": UNMEASURED})
    variants = make_variants(plain, experiment.needs.values()) if experiment.needs else ()
    return dict(zip(experiment.needs, (variant.trial for variant in variants), strict=True))


def list_sources(experiment: Experiment) -> list[tuple[str, str]]:
    """What the trials of a search start from, as the file says it: each slot, and a source that it takes."""
    own = [(slot, model.source) for slot, model in list_models(experiment).items()]
    axes = [{path: value} for path, axis in experiment.search.space.items() for value in axis.values]
    return list(dict.fromkeys([*own, *(one for values in axes for one in find_sources(values))]))


def find_sources(overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The slots that settings by their paths fill, such as those of a trial of `needs`, each with its source."""
    found = {leaf: v for path, value in overrides.items() for leaf, v in list_leaves(path, value).items()}
    return [(slot, source) for slot in SLOTS if isinstance(source := found.get(f"{slot}.source"), str)]


def _list_used(sources: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(source for _, source in sources))


def sort_needs(needs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names, each after those that it starts from; those of a circle are left out."""
    order: list[str] = []
    for _ in needs:
        left = needs.keys() - order
        order += [n for n in needs if n in left and not left.intersection(_list_used(find_sources(needs[n])))]
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
    used = _list_used(list_sources(experiment))
    for name in used:  # grows
        used += [source for source in _list_used(find_sources(needs.get(name, {}))) if source not in used]
    found = [
        f"needs.{name}: nothing starts from it, but from {', '.join(used) or 'random weights'}; name it in "
        f"{_list_settings()}, or leave it out"
        for name in needs
        if name not in used
    ]
    named = list_named(experiment)
    found += [f"needs.{name}: {text}" for name, trial in named.items() for text in check(trial)]
    stopper = experiment.search.scheduler.kind
    if stopper != "none" and any(find_origins(variant.trial, named) for variant in variants):
        found.append(
            f"search.scheduler.kind: {stopper} would stop trials that others start from (training.cooldown, "
            f"{', '.join(SLOTS)}); take none, or leave those out"
        )
    return found


def find_sourceless(trial: Trial, axes: Mapping[str, Axis]) -> list[str]:
    """Axes of how trials start from others, where nothing says from which."""
    leaves = [list_leaves(path, value) for path, axis in axes.items() for value in axis.values]
    return [
        f"search.space.{path}: nothing to start from; set {slot}.source, or leave it out"
        for slot in SLOTS
        if slot not in list_models(trial) and not any(f"{slot}.source" in found for found in leaves)
        for path in axes
        if path.startswith(f"{slot}.")
    ]


def _list_settings() -> str:
    """The settings that can name a trial of `needs`, in words."""
    return " or ".join(f"{slot}.source" for slot in SLOTS)


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


def find_encoder_mistakes(trial: Trial) -> Iterator[str]:
    """What does not go with diffusion of latents."""
    data = trial.data
    if data.encoder is None:
        return
    if not trial.diffuses:
        yield (
            f"data.encoder: model.kind: {trial.model.kind} diffuses nothing and learns from images; leave it out, or "
            "take a network that does, such as unet"
        )
    if data.encoder.latents and not split_pin(data.encoder.source)[1]:
        yield f"data.encoder.latents: {data.encoder.latents} is found by the program; leave it out"
    if data.flip:
        yield (
            "data.flip: latents are made once, and those of a mirrored image are no mirrored latents; leave it out, or "
            "train the autoencoder alone with it"
        )
    if data.stream is not None:
        yield "data.stream: latents of all training images are made before they are needed; leave one of the two out"
    if data.dimensions != 2:
        yield f"data.dimensions: {data.dimensions} is of signals or volumes, and an autoencoder takes images; take 2"
