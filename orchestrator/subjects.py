"""What to measure: a checkpoint, a trial or a sweep, given as a person gives it, and how, by overrides and profiles.

A folder of diffusers says nothing of data, so `data.source` is given with it; everything of ours knows its own.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import TypeAdapter

from orchestrator.experiment import (
    ExperimentError,
    Variant,
    assignment,
    evaluation_mistakes,
    flow_mistakes,
)
from orchestrator.preflight import evaluation_findings
from orchestrator.profiles import PROFILES
from orchestrator.settings import invalid, meant, meant_path, paths, put, read_yaml
from workers import checkpoint as checkpoints
from workers.checkpoint import Checkpoint
from workers.config import DataConfig, Measurement, Mistake, Trial, trained_by
from workers.data import Source, describe
from workers.storage import Storage

SETTINGS = [path for path in paths(Measurement) if path.split(".")[0] in ("seed", "data", "evaluation")]


@dataclass(frozen=True)
class Subject:
    """A checkpoint, what is measured of it, and whose it is."""

    name: str
    m: Measurement
    checkpoint: Checkpoint
    trial: str | None = None  # the address of the trial that made it
    own: Measurement | None = None  # what its trial's experiment asks for


def find(target: str, storage: Storage, overrides: Sequence[str], profile: str | None) -> list[Subject]:
    """The subjects that `target` names. Raises Mistake with all that is wrong with it, the overrides or the profile.

    `target` is a sweep (its name or folder), a trial (its address, the start of one, or its folder), or a folder with
    a checkpoint of ours or of diffusers.
    """
    update, name, known = Update(overrides, profile), _inside(target, storage), storage.list("trials")
    if name and storage.exists(f"sweeps/{name}/sweep.json"):
        return _of_sweep(name, storage, update)
    if matches := [digest for digest in known if digest.startswith(name) and len(name) >= 4]:
        if len(matches) > 1:
            raise Mistake(f"{target} is the start of several trials: {', '.join(matches)}; give more of it")
        return [_of_trial(matches[0], storage, update)]
    if not Path(target).exists() and "://" not in target:
        sweeps = storage.list("sweeps")
        raise Mistake(
            f"{target!r} is no folder, and neither a sweep nor a trial in {storage.root}"
            f"{meant(name, [*sweeps, *known]) or '.'} Give a sweep's name, a trial's address, or "
            "the folder of a checkpoint of ours or of diffusers. "
            f"Sweeps here: {', '.join(sweeps) or 'none'}"
        )
    return [_of_folder(target, update)]


def at(path: str, storage: Storage, overrides: Sequence[str]) -> Subject:
    """The checkpoint in trials/<address>/checkpoints/<step> of the storage. Raises Mistake where it is not there."""
    match path.split("/"):
        case ["trials", address, "checkpoints", _] if storage.exists(f"trials/{address}/trial.yaml"):
            return _of_trial(address, storage, Update(overrides, None), checkpoints.committed(storage, path))
    raise Mistake(f"{path} is no trial's checkpoint in {storage.root}")


def _inside(target: str, storage: Storage) -> str:
    """The name that a bare word is, or a folder sweeps/<name> or trials/<digest> of the storage; else empty."""
    if "/" not in target:
        return target
    with suppress(ValueError):
        match PurePath(_place(target)[0]).relative_to(_place(storage.root)[0]).parts:
            case ("sweeps" | "trials", name):
                return name
    return ""


def _place(target: str) -> tuple[str, str]:
    """An absolute path or a URI, and the URI's options with their question mark."""
    if "://" not in target:
        return str(Path(target).absolute()), ""
    place, mark, options = target.partition("?")
    return place.rstrip("/"), mark + options


class Update:
    """What a profile and overrides make of the settings of a measurement. Raises Mistake with all that is wrong."""

    def __init__(self, overrides: Sequence[str], profile: str | None) -> None:
        if profile is not None and profile not in PROFILES:
            close = meant(profile, PROFILES)
            raise Mistake(f"--profile {profile}: there is no such profile{close}; valid: {', '.join(PROFILES)}")
        self.profile = PROFILES[profile] if profile else {}
        self.settings = _assignments(overrides)

    def of(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The profile replaces whole sections of the evaluation, as they belong together; then the overrides."""
        changed = {**content, "evaluation": {**content.get("evaluation", {}), **self.profile}}
        for path, value in self.settings.items():
            changed = put(changed, path.split("."), value)
        return changed


def _assignments(overrides: Sequence[str]) -> dict[str, Any]:
    settings, problems = {}, []
    for text in overrides:
        try:
            path, value = assignment(text)
            if path not in SETTINGS:
                raise ValueError(f"unknown path{meant_path(path, SETTINGS)}; of a checkpoint one sets "
                                 "seed, data... and evaluation...")  # fmt: skip
            settings[path] = value
        except ValueError as mistake:
            problems.append(f"override {text!r}: {mistake}")
    if problems:
        raise ExperimentError(problems, "evaluation")
    return settings


def _of_sweep(name: str, storage: Storage, update: Update) -> list[Subject]:
    """All trained trials of a sweep."""
    kept = (storage.read_json(f"sweeps/{name}/sweep.json") or {})["trials"]
    validate = TypeAdapter(Trial).validate_json
    trials = {a: Variant(params=of["params"], trial=validate(json.dumps(of["trial"]))) for a, of in kept.items()}
    folders = {a: f"trials/{trained_by(a)}" for a in trials}
    ended = [a for a, f in folders.items() if (storage.read_json(f"{f}/status.json") or {}).get("state") == "finished"]
    found = [(a, checkpoints.newest(storage, f"{folders[a]}/checkpoints")) for a in ended]
    subjects = [_subject(str(trials[a]), trials[a].trial, c, a, update) for a, c in found if c]
    if not subjects:
        raise Mistake(f"the sweep {name} has no trained trial yet; run it first: python -m orchestrator.sweep ...")
    return subjects


def _of_trial(address: str, storage: Storage, update: Update, checkpoint: Checkpoint | None = None) -> Subject:
    newest = checkpoint or checkpoints.newest(storage, f"trials/{address}/checkpoints")
    if newest is None:
        raise Mistake(f"the trial {address} has no checkpoint yet")
    content, _ = read_yaml(storage.read(f"trials/{address}/trial.yaml").decode())
    trial = Trial.model_validate(content)
    return _subject(address, trial, newest, address, update)


def _of_folder(folder: str, update: Update) -> Subject:
    """A folder that holds a checkpoint; one in a trial's folder belongs to the trial."""
    place, options = _place(folder)
    match place.split("/"):
        case [*above, "trials", address, "checkpoints", _]:
            storage = Storage(("/".join(above) or "/") + options)
            if storage.exists(f"trials/{address}/trial.yaml"):
                return _of_trial(address, storage, update, checkpoints.open_folder(place + options))
    checkpoint = checkpoints.open_folder(folder)
    content = update.of({"T": checkpoints.describe(checkpoint).T})
    if "source" not in content.get("data", {}):
        raise Mistake(f"{folder}: it does not say which images it was trained on; give data.source=...")
    return _checked(place.rpartition("/")[2], content, checkpoint, None, None)


def _subject(name: str, trial: Trial, checkpoint: Checkpoint, address: str, update: Update) -> Subject:
    own = Measurement.of(trial)
    return _checked(name, update.of(own.model_dump()), checkpoint, address, own)


def _checked(name: str, content: Any, checkpoint: Checkpoint, trial: str | None, own: Measurement | None) -> Subject:
    if problems := [f"{path}: {text}" for path, text in invalid(Measurement, content)]:
        raise ExperimentError(problems, name)
    m = Measurement.model_validate(content)
    if problems := evaluation_mistakes(m.evaluation, m.T):
        raise ExperimentError(problems, name)
    return Subject(name, m, checkpoints.averaged(checkpoint, m.evaluation.ema), trial, own)


def check(subjects: Sequence[Subject]) -> tuple[dict[DataConfig, Source], list[str]]:
    """The data of the subjects, and warnings. Raises Mistake where data and checkpoint do not go together."""
    sources = {config: describe(config) for config in dict.fromkeys(s.m.data for s in subjects)}
    problems: list[str] = []
    warnings: list[str] = []
    for subject in subjects:
        described = checkpoints.describe(subject.checkpoint)
        source, shape = sources[subject.m.data], described.shape
        problems += flow_mistakes(subject.m.evaluation, described.prediction)
        if shape != source.shape:
            problems.append(
                f"{subject.name}: the model makes images of {_size(shape)}, {source.name} has {_size(source.shape)}; "
                "give the data it was trained on, or set data.resolution"
            )
        for finding in evaluation_findings(subject.m.evaluation, source):
            (problems if finding.refused else warnings).append(finding.text)
    if problems:
        raise ExperimentError(dict.fromkeys(problems), "evaluation")
    return sources, list(dict.fromkeys(warnings))


def _size(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{width}x{height} in {channels} channel{'s' * (channels > 1)}"
