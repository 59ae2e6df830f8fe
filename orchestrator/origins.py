"""What trials start from, found before anything is made: checkpoints by their content, trials of the sweep by id.

A checkpoint from outside of the sweep is copied into the storage, `starts/<digest>/`, when training begins: nothing
that happens to it later changes a trial, and every node of a cluster finds it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from orchestrator.experiment.expand import expand
from orchestrator.experiment.needs import find_sources, list_named, list_sources, sort_needs
from orchestrator.experiment.records import Experiment, ExperimentError
from orchestrator.experiment.starts import make_pin
from orchestrator.state.saved import list_sweeps
from workers.config import Mistake, Trial
from workers.data.sources import describe
from workers.identity import compute_trial_id
from workers.layout import name_start_folder
from workers.network.manifest import find_newest
from workers.storage import Storage
from workers.warm_start import list_models, split_pin

if TYPE_CHECKING:
    from workers.first_weights import Offer
    from workers.network.manifest import Checkpoint


def pin_starts(experiment: Experiment, root: str) -> Experiment:
    """The experiment with all that its trials start from pinned. Raises ExperimentError with all that is not found, is
    ambiguous or does not fit."""
    needs = experiment.needs
    slots = [*list_sources(experiment), *(one for overrides in needs.values() for one in find_sources(overrides))]
    if not slots:
        return experiment
    from workers import first_weights  # torch takes seconds: what starts from nothing does without

    storage, problems = Storage(root), list[str]()
    pins: dict[str, str] = {}
    offers: dict[str, Offer] = {}

    def pin() -> Experiment:
        return experiment.pin(pins, {name: offer.latents for name, offer in offers.items() if offer.latents})

    for source, slot in {source: slot for slot, source in reversed(slots)}.items():
        try:
            if source in needs:
                _check_unambiguous(source, storage)
                continue
            checkpoint = find_checkpoint(source, storage, experiment.tracking.uri)
            pins[source] = first_weights.digest_content(checkpoint)
            offers[source] = first_weights.describe_checkpoint(checkpoint)
        except Mistake as mistake:
            known = f". The names of needs are {', '.join(needs)}" if needs and source not in needs else ""
            problems.append(f"{slot}.source: {mistake}{known}")
    for name in () if problems else sort_needs(needs):
        trial = list_named(pin())[name]
        data = describe(trial.data)
        pins[name] = make_pin(compute_trial_id(trial, data.digest), trial.training.steps)
        try:
            offers[name] = first_weights.describe_trial(trial, data)
        except ValueError as error:  # of a network that cannot be built; what needs it is not known then
            problems += [f"needs.{name}: {line}" for line in str(error).splitlines()]
            break
    pinned = pin()
    if problems := problems or _list_misfits(pinned, offers):
        raise ExperimentError(problems, experiment.name)
    return pinned


def _check_unambiguous(name: str, storage: Storage) -> None:
    from orchestrator.measuring.subjects import is_there

    other = f"a sweep in {storage.root}" if name in list_sweeps(storage) else "a folder here" if is_there(name) else ""
    if other:
        raise Mistake(f"{name} is a name of needs, and also {other}; give it another name in needs")


def _list_misfits(experiment: Experiment, offers: Mapping[str, "Offer"]) -> list[str]:
    """What of the checkpoints does not go with the trials that start from them, as far as these are known by now."""
    from workers.first_weights import find_misfits

    found: dict[str, None] = {}
    named = [(f"needs.{name}: ", trial) for name, trial in list_named(experiment).items()]
    checked = set[object]()
    for where, trial in [*named, *(("", variant.trial) for variant in expand(experiment))]:
        for slot, model in list_models(trial).items():
            key = where, trial.data, trial.model, trial.diffusion, trial.loss, trial.training.label_dropout, slot, model
            if key in checked:
                continue
            checked.add(key)
            source, _ = split_pin(model.source)
            for text in find_misfits(slot, trial, describe(trial.data), offers[source]):
                found[f"{where}{slot}.source: {source}: {text}"] = None
    return list(found)


def find_checkpoint(source: str, storage: Storage, tracking_uri: str | None) -> "Checkpoint":
    """The checkpoint that a source names, which is none of the sweep itself. Raises Mistake where there is none."""
    from orchestrator.measuring import subjects

    if (registered := re.fullmatch(r"([A-Za-z0-9._-]+)@([A-Za-z0-9._-]+)", source)) is None:
        return subjects.find_model(source, storage)
    from orchestrator.tracking.registry import list_versions  # MLflow loads here

    name, alias = registered.groups()
    versions = [version for version in list_versions(storage, tracking_uri) if version.sweep == name]
    found = [version for version in versions if alias in (str(version.number), *version.aliases)]
    if not found:
        there = ", ".join(f"{name}@{end}" for v in versions for end in (v.number, *v.aliases)) or "none of that name"
        raise Mistake(f"{source} is no registered model; there are {there}")
    if not found[0].path:
        raise Mistake(f"{source} does not say which checkpoint it is (orchestrator.path)")
    return subjects.open_at(found[0].path, storage, ()).checkpoint


def keep_copies(experiment: Experiment, trials: Iterable[Trial], storage: Storage) -> None:
    """Copies what the trials start from outside of the sweep into the storage, where it is not there yet.

    Raises Mistake where it is no longer what it was.
    """
    from workers import first_weights

    for source, slot in {model.source: slot for t in trials for slot, model in list_models(t).items()}.items():
        name, pin = split_pin(source)
        if name in experiment.needs or find_newest(storage, name_start_folder(pin)):
            continue
        checkpoint = find_checkpoint(name, storage, experiment.tracking.uri)
        if first_weights.digest_content(checkpoint) != pin:
            raise Mistake(f"{slot}.source: {name} has changed since the command began; run it again")
        first_weights.keep_copy(storage, name_start_folder(pin), checkpoint)
