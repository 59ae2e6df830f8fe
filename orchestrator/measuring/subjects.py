"""What to measure: a checkpoint, a trial or a sweep, given as a person gives it, and how, by overrides and profiles.

A folder of diffusers says nothing of data, so `data.source` is given with it; everything of ours knows its own.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from orchestrator.experiment.check import (
    find_evaluation_mistakes,
    find_flow_mistakes,
    find_measuring_mistakes,
    find_unread,
)
from orchestrator.experiment.load import list_measurement_settings, parse_assignment
from orchestrator.experiment.preflight import check_evaluation, list_source_warnings
from orchestrator.experiment.profiles import PROFILES
from orchestrator.experiment.records import ExperimentError
from orchestrator.experiment.settings import find_invalid, put, suggest_choice, suggest_path
from orchestrator.experiment.told import find_guidance_mistakes
from orchestrator.state.rows import list_asked, rank_rows
from orchestrator.state.saved import list_sweeps, open_sweep, open_trial, read_rows
from workers import layout
from workers.classes import Told, Vectors
from workers.config import DataConfig, Measurement, Mistake, Trial
from workers.data.sources import Source, describe
from workers.diffusion.process import Process, try_variance
from workers.entries import is_outside
from workers.kinds import DENOISER, GENERATOR, SAMPLERS
from workers.layout import SWEEPS, TRIALS, get_trial_of_row, name_checkpoints_folder, name_trial_file
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.averages import list_profiles
from workers.network.manifest import Checkpoint
from workers.posthoc import Profile, describe_doubt
from workers.remote import explain_download
from workers.storage import Storage
from workers.students import choose_own_sampler, find_drawing_mistakes, find_student_mistakes

SETTINGS = list_measurement_settings()
# What is measured of a folder in continuous time where nothing else is asked for: it has no T times to be all of them.
CONTINUOUS = {"nll": {"timesteps": 50}, "fid": {"sampler": {"kind": "heun", "steps": 18}}}
SAMPLER = "evaluation.fid.sampler.kind"


@dataclass(frozen=True)
class Subject:
    """A checkpoint, what is measured of it, and whose it is."""

    name: str
    m: Measurement
    checkpoint: Checkpoint
    trial: str | None = None  # the id of the trial that made it
    own: Measurement | None = None  # what its trial's experiment asks for


def find(target: str, storage: Storage, overrides: Sequence[str], profile: str | None) -> list[Subject]:
    """The subjects that `target` names. Raises Mistake with all that is wrong with it, the overrides or the profile.

    `target` is a sweep (its name or folder), a trial (its id, the start of one, or its folder), or a folder with
    a checkpoint of ours or of diffusers.
    """
    update, name, known = Update(overrides, profile), _find_inside(target, storage), storage.list(TRIALS)
    if name in list_sweeps(storage):
        return _list_of_sweep(name, storage, update)
    if matches := [digest for digest in known if digest.startswith(name) and len(name) >= 4]:
        if len(matches) > 1:
            raise Mistake(f"{target} is the start of several trials: {', '.join(matches)}; give more of it")
        return [_find_of_trial(matches[0], storage, update)]
    if "://" not in target and not is_there(target):
        sweeps = storage.list(SWEEPS)
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", target):
            raise Mistake(f"{target} is no folder here; {explain_download(target)}")
        raise Mistake(
            f"{target[:200]!r} is no folder, and neither a sweep nor a trial in {storage.root}"
            f"{suggest_choice(name, [*sweeps, *known]) or '.'} Give a sweep's name, a trial's id, or "
            "the folder of a checkpoint of ours or of diffusers. "
            f"Sweeps here: {', '.join(sweeps) or 'none'}"
        )
    return [_open_folder(target, update)]


def find_model(target: str, storage: Storage) -> Checkpoint:
    """The checkpoint of a trial, of a sweep's best trial, or in a folder. Raises Mistake where there is none."""
    if target in list_sweeps(storage):
        kept = open_sweep(storage, target)
        every = list_asked(read_rows(storage, kept))
        rows = [row for row in every if kept.metric in row.metrics]
        if not rows:
            raise Mistake(f"no trial of the sweep {target} has {kept.metric} yet")
        if without := [f"{row.digest[:8]}, {row.found.unread or row.state}" for row in every if row not in rows]:
            reasons = "; ".join(without[:3]) + "; ..." * (len(without) > 3)
            warnings.warn(
                f"{target}: {len(without)} of {len(every)} trials have no {kept.metric} ({reasons}); "
                "this is the best of the others",
                stacklevel=3,
            )
        best = rank_rows(rows, kept.metric)[0]
        found = find_checkpoint(storage, best.digest, best.variant.trial)
        assert found, best.digest
        return manifest.choose_weights(found, Measurement.of(best.variant.trial).evaluation)
    if "://" in target or is_there(target):
        return checkpoints.open_folder(target)
    [subject] = find(target, storage, (), None)
    return subject.checkpoint


def open_at(path: str, storage: Storage, overrides: Sequence[str]) -> Subject:
    """The checkpoint in trials/<trial>/checkpoints/<step> of the storage. Raises Mistake where it is not there."""
    match path.split("/"):
        case [layout.TRIALS, trial_id, "checkpoints", _] if storage.exists(path):
            return _find_of_trial(trial_id, storage, Update(overrides, None), manifest.open_committed(storage, path))
    raise Mistake(f"{path} is no trial's checkpoint in {storage.root}")


def _find_inside(target: str, storage: Storage) -> str:
    """The name that a bare word is, or a folder sweeps/<name> or trials/<digest> of the storage; else empty."""
    if "/" not in target:
        return target
    with suppress(ValueError):
        match PurePath(_split_options(target)[0]).relative_to(_split_options(storage.root)[0]).parts:
            case (layout.SWEEPS | layout.TRIALS, name):
                return name
    return ""


def is_there(path: str) -> bool:
    """Whether there is a file or folder; not where there can be none, of a name that is empty or too long."""
    try:
        return bool(path) and Path(path).exists()
    except OSError:
        return False


def _split_options(target: str) -> tuple[str, str]:
    """An absolute path or a URI, and the URI's options with their question mark."""
    if "://" not in target:
        return str(Path(target).absolute()), ""
    place, mark, options = target.partition("?")
    return place.rstrip("/"), mark + options


class Update:
    """What a profile and overrides make of the settings of a measurement. Raises Mistake with all that is wrong."""

    def __init__(self, overrides: Sequence[str], profile: str | None) -> None:
        if profile is not None and profile not in PROFILES:
            close = suggest_choice(profile, PROFILES)
            raise Mistake(f"--profile {profile}: there is no such profile{close}; valid: {', '.join(PROFILES)}")
        self.profile = PROFILES[profile] if profile else {}
        self.settings = _parse_assignments(overrides)

    def of(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The profile replaces whole sections of the evaluation, as they belong together; then the overrides."""
        changed = {**content, "evaluation": {**content.get("evaluation", {}), **self.profile}}
        for path, value in self.settings.items():
            changed = put(changed if path != SAMPLER else _forget_own(changed), path.split("."), value)
        return changed


def _forget_own(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a measurement without those that its sampler alone has: another one takes its place."""
    fid = content["evaluation"].get("fid") or {}
    sampler = fid.get("sampler") or {}
    if not is_outside(sampler.get("kind", "")):
        return content
    own = SAMPLERS[sampler["kind"]].own_fields
    return dict(put(content, ["evaluation", "fid", "sampler"], {n: v for n, v in sampler.items() if n not in own}))


def _parse_assignments(overrides: Sequence[str]) -> dict[str, Any]:
    settings, problems = {}, []
    for text in overrides:
        try:
            path, value = parse_assignment(text)
            if path not in (known := list_measurement_settings()):
                raise ValueError(f"unknown path{suggest_path(path, known)}; of a checkpoint one sets "
                                 "seed, data... and evaluation...")  # fmt: skip
            settings[path] = value
        except ValueError as mistake:
            problems.append(f"override {text!r}: {mistake}")
    if problems:
        raise ExperimentError(problems, "evaluation")
    return settings


def _list_of_sweep(name: str, storage: Storage, update: Update) -> list[Subject]:
    """All trained trials of a sweep."""
    trials = {row: variant for row, variant in open_sweep(storage, name).trials.items() if not variant.role}
    found = [(a, find_checkpoint(storage, a, variant.trial)) for a, variant in trials.items()]
    subjects = [_make_subject(str(trials[a]), trials[a].trial, c, a, update) for a, c in found if c]
    if not subjects:
        raise Mistake(f"the sweep {name} has no trained trial yet; run it first: python -m orchestrator.sweep ...")
    return subjects


def find_checkpoint(storage: Storage, row: str, trial: Trial) -> Checkpoint | None:
    """The checkpoint that a row of a sweep measures; None where its trial is not trained so far."""
    return manifest.find_at_step(storage, name_checkpoints_folder(get_trial_of_row(row)), trial.training.steps)


def _find_of_trial(trial_id: str, storage: Storage, update: Update, checkpoint: Checkpoint | None = None) -> Subject:
    newest = checkpoint or manifest.find_newest(storage, name_checkpoints_folder(trial_id))
    if newest is None:
        raise Mistake(f"the trial {trial_id} has no checkpoint yet")
    trial = open_trial(storage, trial_id)
    return _make_subject(trial_id, trial, newest, trial_id, update)


def _open_folder(folder: str, update: Update) -> Subject:
    """A folder that holds a checkpoint; one in a trial's folder belongs to the trial."""
    place, options = _split_options(folder)
    match place.split("/"):
        case [*above, layout.TRIALS, trial_id, "checkpoints", step]:
            storage = Storage(("/".join(above) or "/") + options)
            if storage.exists(name_trial_file(trial_id, "trial.yaml")):
                return _find_of_trial(trial_id, storage, update, _open_inside(storage, trial_id, step))
    checkpoint = checkpoints.open_folder(folder)
    described = checkpoints.describe(checkpoint)
    family, what = described.family, described.told.KIND if described.told else None
    evaluation: dict[str, Any] = CONTINUOUS if described.T is None and family == DENOISER else {}
    evaluation = {"nll": None} if family == GENERATOR else evaluation
    if described.student:
        evaluation = {"nll": None, "fid": {"sampler": choose_own_sampler(described.student).model_dump()}}
    of = {"family": family, "T": described.T, "told": what, "latent": described.latent}
    content = update.of({**of, "evaluation": evaluation})
    if "source" not in content.get("data", {}):
        raise Mistake(f"{folder}: it does not say which images it was trained on; give data.source=...")
    return _check_name(place.rpartition("/")[2], content, checkpoint, None, None)


def _open_inside(storage: Storage, trial_id: str, step: str) -> Checkpoint:
    """A trial's checkpoint with its storage as the root, which holds what the trial kept beside it."""
    path = f"{name_checkpoints_folder(trial_id)}/{step}"
    if storage.exists(f"{path}/{manifest.MANIFEST}"):
        return manifest.open_committed(storage, path)
    return checkpoints.open_folder(storage.find_url(path))


def _make_subject(name: str, trial: Trial, checkpoint: Checkpoint, trial_id: str, update: Update) -> Subject:
    own = Measurement.of(trial)
    return _check_name(name, update.of(own.model_dump()), checkpoint, trial_id, own)


def _check_name(name: str, content: Any, checkpoint: Checkpoint, trial: str | None, own: Measurement | None) -> Subject:
    if problems := [f"{path}: {text}" for path, text in find_invalid(Measurement, content)]:
        raise ExperimentError(problems, name)
    m = Measurement.model_validate(content)
    of = m.evaluation
    mistakes = find_evaluation_mistakes(of, m.T) if m.family == DENOISER else find_measuring_mistakes(of)
    if problems := [*find_unread([m]), *mistakes]:
        raise ExperimentError(problems, name)
    if not m.evaluation.measures:
        raise ExperimentError(["evaluation: nll, ode_nll and fid are all null, so nothing would be measured"], name)
    return Subject(name, m, manifest.choose_weights(checkpoint, m.evaluation), trial, own)


def check(subjects: Sequence[Subject]) -> tuple[dict[DataConfig, Source], list[str]]:
    """The data of the subjects, and warnings. Raises Mistake where data and checkpoint do not go together."""
    sources = {config: describe(config) for config in dict.fromkeys(s.m.data for s in subjects)}
    problems: list[str] = []
    warnings = list_source_warnings(sources.values())
    for subject in subjects:
        described = checkpoints.describe(subject.checkpoint)
        source, shape = sources[subject.m.data], described.shape
        evaluation, student = subject.m.evaluation, described.student
        if student:
            problems += find_student_mistakes(student, evaluation)
        elif evaluation.fid:
            problems += find_drawing_mistakes(None, evaluation.fid.sampler)
        if described.T is not None:
            problems += find_flow_mistakes(subject.m.evaluation, described.prediction)
        told, classes = described.told, described.classes
        what = told.KIND if told else None
        problems += find_guidance_mistakes(subject.m.evaluation, what, described.takes_no_label)
        problems += _find_other_vectors(subject.name, told, source)
        if classes and source.largest_label >= len(classes.names):
            problems.append(
                f"{subject.name}: the model knows {len(classes.names)} classes, and the labels of {source.name} go up "
                f"to {source.largest_label}; give the data it was trained on"
            )
        if (shape, described.sides) != (source.shape, source.sides):
            made, there = _describe_size(shape, described.sides), _describe_size(source.shape, source.sides)
            problems.append(
                f"{subject.name}: the model makes images of {made}, {source.name} has {there}; give the data it was "
                "trained on, or set data.resolution"
            )
        if (variance := subject.m.evaluation.variance) and is_outside(variance):
            process = checkpoints.load_process(subject.checkpoint)
            if isinstance(process, Process):
                tried = try_variance(replace(process, variance=variance))
                problems += [f"evaluation.variance: {text}" for text in tried]
        if (width := subject.checkpoint.width) is not None:
            assert subject.checkpoint.step is not None
            wanted = Profile(subject.checkpoint.step, width)
            warnings += filter(None, [describe_doubt(list_profiles(subject.checkpoint), wanted)])
        for finding in check_evaluation(subject.m, source):
            (problems if finding.refused else warnings).append(finding.text)
    if problems:
        raise ExperimentError(dict.fromkeys(problems), "evaluation")
    return sources, list(dict.fromkeys(warnings))


def _find_other_vectors(name: str, told: Told | None, source: Source) -> Iterator[str]:
    """Vectors of the data that are not like those that the model is told."""
    if not isinstance(told, Vectors) or source.vectors is None:
        return
    length, width = source.vectors
    if not told.fits(length, width):
        yield (
            f"{name}: the model is told {told.length or 'any number of'} vectors of {told.width} numbers, and "
            f"data.condition of {source.name} has {length} of {width}; give the data it was trained on"
        )


def _describe_size(shape: tuple[int, int, int], sides: tuple[int, ...]) -> str:
    height, width, channels = shape
    size = "x".join(map(str, sides)) if sides else f"{width}x{height}"
    return f"{size} in {channels} channel{'s' * (channels > 1)}"
