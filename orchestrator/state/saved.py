"""What a storage keeps of a sweep, written as it goes and read by anyone: without torch, Ray, MLflow or the data.

    sweeps/<name>/sweep.json      what the sweep is: its trials by id, what they search, how they are measured
    sweeps/<name>/asked.json      of an adaptive search: the points that were asked for, in order
    sweeps/<name>/events.jsonl    what happened: see `state.events`
    trials/<trial>/trial.yaml     the settings of a trial

Together with the trials' own files they say how a sweep stands, while it runs and after it, from any machine that
reaches the storage.
"""

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from orchestrator.experiment.expand import expand, find_starting_rows, make_variants
from orchestrator.experiment.load import resolve
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.experiment.settings import read_yaml, suggest_choice, write_yaml
from orchestrator.state.events import Event, list_failures, read_events, sum_evaluation_seconds
from orchestrator.state.rows import Found, Row
from workers import consent
from workers.bits import VALIDATIONS, find_validation
from workers.bundles import collect_bundles, keep_bundle
from workers.config import DataConfig, Measurement, Mistake, Trial
from workers.data.locate import make_absolute
from workers.data.sources import Source
from workers.disk import StorageError
from workers.evaluation.blocks import Images, make_protocol_key
from workers.identity import PLACING, collect_settings_read, compute_digest, list_outside
from workers.journal import read_points
from workers.layout import (
    SWEEPS,
    RowId,
    get_trial_of_row,
    name_checkpoints_folder,
    name_published_file,
    name_report_file,
    name_status_file,
    name_summary_file,
    name_sweep_file,
    name_sweep_folder,
    name_trial_file,
    name_trial_folder,
)
from workers.network import manifest
from workers.seals import open_text, seal_text
from workers.sections import Record
from workers.storage import Storage
from workers.warm_start import INIT, TRUNK

SWEEP, IDS = "sweep.json", 2  # the file, and the kind of the ids that it names: 1 counted training.steps
RERUN = "run the same sweep command again, which makes it again"
READERS = 16  # files read at once: a remote storage answers each in its own time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedSweep:
    """A sweep as `sweep.json` keeps it. `protocols` name how each row is measured (`make_protocol_key`)."""

    name: str
    metric: str
    also: tuple[str, ...]  # further objectives
    drawn: bool  # whether settings were drawn, and are no full grid
    trials: Mapping[RowId, Variant]
    starts: Mapping[RowId, Mapping[str, RowId]]  # the rows that each starts from, by slot
    protocols: Mapping[str, str]
    experiment: Mapping[str, Any]  # the file, with every setting

    @property
    def folder(self) -> str:
        return name_sweep_folder(self.name)


class SavedCode(NamedTuple):
    """Of each variant of a sweep the pinned names from outside by setting, and of each pin the digests of its files."""

    variants: Sequence[tuple[Mapping[str, Any], Mapping[str, Sequence[str]]]]  # each with its values by path
    files: Mapping[str, Mapping[str, str]]


def keep_sweep(
    storage: Storage, experiment: Experiment, trials: Mapping[RowId, Variant], sources: Mapping[DataConfig, Source]
) -> None:
    """Writes `sweep.json`, unless it says the same already; its trials and their settings in the file's order."""
    bundles = collect_bundles(variant.trial for variant in trials.values())
    for bundle in bundles.values():
        keep_bundle(storage, bundle)
    consent.remember(bundles)
    content: dict[str, Any] = {
        "ids": IDS,
        "name": experiment.name,
        "metric": experiment.search.metric,
        "experiment": resolve(experiment),
        "trials": {
            row: {
                "params": v.params,
                "trial": v.trial.model_dump(mode="json"),
                "protocol": make_protocol_key(Measurement.of(v.trial), Images.of(sources[v.trial.data])),
            }
            for row, v in trials.items()
        },
        **({"code": {digest: bundle.digests for digest, bundle in bundles.items()}} if bundles else {}),
    }
    starts = find_starting_rows(trials, lambda config: sources[config].digest)
    for row, v in trials.items():
        more = {"role": v.role, "starts": starts.get(row, {})}
        content["trials"][row] |= {name: value for name, value in more.items() if value}
    path = name_sweep_file(experiment.name, SWEEP)
    if json.dumps(storage.read_sealed(path)) != json.dumps(content):
        storage.write_sealed(path, content, sort=False)


def read_code(storage: Storage, name: str) -> SavedCode:
    """The code from outside that a sweep had when it was begun last; none where there is no such sweep."""
    content = storage.read_sealed(name_sweep_file(name, SWEEP), RERUN) or {}
    trials = content.get("trials", {}).values()
    return SavedCode([(kept["params"], list_outside(kept["trial"])) for kept in trials], content.get("code", {}))


def keep_asked(storage: Storage, experiment: Experiment, asked: Sequence[Variant]) -> None:
    """Writes down what an adaptive search has asked for: it stands, even if another version of Optuna would now ask
    for something else, or if a trial that failed is made after all."""
    content = {"search": _digest_search(experiment), "asked": [v.params for v in asked]}
    storage.write_sealed(name_sweep_file(experiment.name, "asked.json"), content, sort=False)


def read_asked(storage: Storage, experiment: Experiment) -> list[Variant]:
    """What the same search asked for before, up to its `samples`; nothing where it was another one."""
    content = storage.read_sealed(
        name_sweep_file(experiment.name, "asked.json"), "the search asks again, by what was measured"
    )
    if content is None or content["search"] != _digest_search(experiment):
        return []
    return list(make_variants(experiment, content["asked"][: experiment.search.samples]))


def forget_asked(storage: Storage, experiment: Experiment) -> None:
    storage.delete(name_sweep_file(experiment.name, "asked.json"))


def _digest_search(experiment: Experiment) -> str:
    """A digest of all that suggestions depend on."""
    trial, search = (collect_settings_read(part, only_set=True) for part in (experiment.trial, experiment.search))
    trial["training"] = {name: value for name, value in trial["training"].items() if name not in PLACING}
    pins = sorted({name for v in expand(experiment) for names in list_outside(v.trial).values() for name in names})
    search = {n: v for n, v in search.items() if n not in ("samples", "max_concurrent", "max_failures", "hang_s")}
    return compute_digest([trial, {**search, "batch": experiment.search.first}, *pins])


def list_sweeps(storage: Storage) -> list[str]:
    """The sweeps of a storage, those of older kinds among them, and those whose `sweep.json` is gone."""
    return [
        name for name in storage.list(SWEEPS) if storage.exists(name_sweep_file(name, SWEEP)) or _is_gone(storage, name)
    ]


def list_sharing(storage: Storage, name: str) -> dict[str, list[str]]:
    """The other sweeps than `name` that name each trial, by its id."""
    found: dict[str, list[str]] = {}
    for other in (n for n in list_sweeps(storage) if n != name):
        content = storage.read_sealed(name_sweep_file(other, SWEEP), RERUN) or {"trials": {}}
        for trial in dict.fromkeys(map(get_trial_of_row, content["trials"])):
            found.setdefault(trial, []).append(other)
    return found


def list_older(storage: Storage) -> list[str]:
    """The sweeps whose trials have ids of an older kind, or that a version before `sweep.json` has left."""
    found = []
    for name in storage.list(SWEEPS):
        with suppress(StorageError):  # whoever opens that one is told; it hides no other
            found += [name] if is_older(storage, name) else []
    return found


def is_older(storage: Storage, name: str) -> bool:
    if storage.exists(name_sweep_file(name, SWEEP)):
        content = storage.read_sealed(name_sweep_file(name, SWEEP), RERUN)
        return content is not None and content.get("ids") != IDS
    there = any(storage.exists(name_sweep_file(name, file)) for file in ("experiment.yaml", "results.parquet"))
    return there and not _is_gone(storage, name)


def _is_gone(storage: Storage, name: str) -> bool:
    """Whether `sweep.json` was there: a version that keeps none seals nothing beside it either."""
    files = (name_sweep_file(name, file) for file in ("published.json", "mlflow.json"))
    return any(storage.read_sealed(file, RERUN) for file in files) or bool(read_events(storage, name))


def explain_opening(name: str) -> str:
    """What to do about a sweep that an older version has left."""
    return (
        f"{name}: made by an older version. Its trials have ids of an older kind, and are not read. Nothing of them is "
        f"deleted; their numbers are in sweeps/{name}/results.parquet. Run the sweep command with --fresh to "
        "make it anew beside them, or with another --storage."
    )


def set_aside_older(storage: Storage, name: str) -> None:
    """Copies the files of a sweep that an older version made into its folder `older`, before it is made anew."""
    for file in storage.list(name_sweep_folder(name)):
        if file != "lock" and "." in file:
            storage.write(name_sweep_file(name, f"older/{file}"), storage.read(name_sweep_file(name, file)))
    for file in ("published.json", "mlflow.json", "asked.json", SWEEP):  # the last says that this is still to be done
        storage.delete(name_sweep_file(name, file))


def open_sweep(storage: Storage, name: str) -> SavedSweep:
    """The sweep of that name. Raises Mistake where there is none."""
    path = name_sweep_file(name, SWEEP)
    content = storage.read_sealed(path, RERUN) if name in storage.list(SWEEPS) else None
    if (content is None or content.get("ids") != IDS) and name in (older := list_older(storage)):
        raise Mistake(explain_opening(name))
    if content is None and name in list_sweeps(storage):
        raise Mistake(f"{storage.find_url(path)} is {'damaged' if storage.exists(path) else 'gone'}; {RERUN}")
    if content is None:
        there = dict.fromkeys([*list_sweeps(storage), *older])
        raise Mistake(
            f"{name!r} is no sweep in {storage.root}{suggest_choice(name, there) or '.'} Sweeps there: "
            f"{', '.join(there) or 'none; run one first, or give its --storage'}"
        )
    sections, trials = dict[str, Any](), dict[RowId, Variant]()
    for row, kept in content["trials"].items():
        trial = _share_sections(_open_trial(storage, path, kept["trial"]), kept["trial"], sections)
        trials[row] = Variant(params=kept["params"], trial=trial, role=kept.get("role", ""))
    protocols = {row: kept["protocol"] for row, kept in content["trials"].items()}
    search = content["experiment"]["search"]
    also, drawn = tuple(search.get("also", ())), search["algorithm"] != "grid"
    of = content["name"], content["metric"]
    starts = {row: found for row, kept in content["trials"].items() if (found := _read_starts(kept, trials[row].trial))}
    return SavedSweep(*of, also, drawn, trials, starts, protocols, content["experiment"])


def _read_starts(kept: Mapping[str, Any], trial: Trial) -> Mapping[str, RowId]:
    """What a row of `sweep.json` starts from, by slot; before there were several slots it was one `start`."""
    if "start" not in kept:
        return kept.get("starts", {})
    return {TRUNK if trial.training.trunk_steps else INIT: kept["start"]}


def _open_trial(storage: Storage, path: str, content: Mapping[str, Any]) -> Trial:
    """The trial that a file of the storage describes. Raises Mistake, as where code from outside is gone."""
    consent.look_in(storage)
    try:
        return TypeAdapter(Trial).validate_json(json.dumps(content))
    except ValidationError as error:
        found = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise Mistake(f"{storage.find_url(path)} cannot be read: {'; '.join(found)}") from error


def _share_sections(trial: Trial, content: Mapping[str, Any], known: dict[str, Any]) -> Trial:
    """The trial, with the very sections of earlier ones that it has as well: of thousands, which differ in a setting or
    two, all others would be in memory as often."""
    own = {name: section for name, section in trial if isinstance(section, Record)}
    of = {name: known.setdefault(f"{name} {json.dumps(content.get(name))}", section) for name, section in own.items()}
    return trial.model_copy(update={name: section for name, section in of.items() if section == own[name]})


def keep_report(storage: Storage, name: str, content: bytes) -> None:
    """Writes the report of a sweep anew. One that is published stays so: its report differs, and is not damaged."""
    path, note = name_report_file(name), name_published_file(name)
    storage.write(path, content)
    if published := storage.read_sealed(note):
        sums = {**published["files"], Path(path).name: hashlib.sha256(content).hexdigest()}
        storage.write_sealed(note, {**published, "files": sums})


def keep_trial(storage: Storage, trial_id: str, trial: Trial) -> None:
    """Writes trial.yaml, the settings of a trial, unless it is there and whole. Its evaluation is that of the sweep
    which began it; how others measure the trial is theirs to say."""
    path = name_trial_file(trial_id, "trial.yaml")
    if storage.read_checked(path, open_text, "it is written again") is None:
        trial = trial.model_copy(update={"data": make_absolute(trial.data)})
        storage.write(path, seal_text(write_yaml(trial.model_dump(mode="json")), path))


def open_trial(storage: Storage, trial_id: str) -> Trial:
    """The settings of a trial as a sweep has them: of the first, by name, that measures something. Where others
    measure it in other ways, that is told. Raises Mistake where neither a sweep nor its trial.yaml knows them."""
    asked: dict[str, Trial] = {}
    for name in list_sweeps(storage):
        with suppress(Mistake):  # another sweep that is damaged, which is told
            trials = open_sweep(storage, name).trials
            if rows := [row for row in trials if get_trial_of_row(row) == trial_id]:
                asked[name] = trials[min(rows, key=lambda row: bool(trials[row].role))].trial
    measuring = {name: trial for name, trial in asked.items() if trial.evaluation.measures} or asked
    ways = {trial.evaluation for trial in measuring.values()}
    if len(ways) > 1:
        first, *others = measuring
        log.warning("%s is measured as the sweep %s asks; otherwise ask %s", trial_id[:8], first, ", ".join(others))
    if measuring:
        return next(iter(measuring.values()))
    path = name_trial_file(trial_id, "trial.yaml")
    content = storage.read_checked(path, open_text, RERUN)
    if content is None:
        raise Mistake(f"{storage.find_url(path)} is {'damaged' if storage.exists(path) else 'not there'}; {RERUN}")
    return _open_trial(storage, path, read_yaml(content)[0])


def read_rows(storage: Storage, kept: SavedSweep, happened: Sequence[Event] = ()) -> list[Row]:
    """The trials as they stand, in the order of the experiment; `happened` says why the last command failed some."""
    errors, used = list_failures(happened), sum_evaluation_seconds(happened)
    found = _map_at_once(lambda row: _find_by_status(storage, kept, RowId(row)), kept.trials)
    return [
        Row(row, variant, f, errors.get(row, ""), used.get(row, {}))
        for (row, variant), f in zip(kept.trials.items(), found, strict=True)
    ]


def find(storage: Storage, row: RowId, trial: Trial, protocol: str, status: Mapping[str, Any] | None) -> Found:
    """What the storage holds of a row whose trial has this `status`, and which is measured by that protocol."""
    of, steps = get_trial_of_row(row), trial.training.steps
    try:
        checkpoint = manifest.find_at_step(storage, name_checkpoints_folder(of), steps)
        measured = manifest.choose_weights(checkpoint, Measurement.of(trial).evaluation) if checkpoint else None
    except manifest.CheckpointError as error:
        return Found(status, unread=str(error), steps=steps)
    summary = storage.read_sealed(name_summary_file(measured.digest, protocol), RERUN) if measured else None
    names = {name.replace("/", "_"): name for name in VALIDATIONS}  # as the status has them
    valid = {names[key]: value for key, value in (status or {}).items() if key in names and value is not None}
    if status and status["step"] > steps:  # the trial has gone on
        points = read_points(storage, name_trial_folder(of))
        earlier = [p for p in points if p["step"] <= steps and find_validation(p.get("metrics", {}))]
        last = max(earlier, key=lambda point: point["step"], default={})
        valid = {name: value for name, value in last.get("metrics", {}).items() if name in VALIDATIONS}
    before, packed = None, None if summary is None else pack_numbers(summary)
    if not checkpoint:
        with suppress(manifest.CheckpointError):  # which its training tells, that goes on from it
            before = manifest.find_newest(storage, name_checkpoints_folder(of), up_to=steps)
    found = Found(status, checkpoint.digest if checkpoint else None, packed, steps=steps, validation=valid)
    found = replace(found, resumes_at=before.step if before else None, is_measured=trial.evaluation.measures)
    return replace(found, is_kept=bool(checkpoint and checkpoint.kept))


def pack_numbers(content: Any) -> Any:
    """The content of a JSON file with each list of real numbers as an array, which takes a quarter of the memory: a
    summary has one of all images. `json.dumps` writes the same text with `default=list`."""
    if isinstance(content, dict):
        return {name: pack_numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        numbers = bool(content) and all(type(value) is float for value in content)
        return array("d", content) if numbers else [pack_numbers(value) for value in content]
    return content


def _find_by_status(storage: Storage, kept: SavedSweep, row: RowId) -> Found:
    status = storage.read_sealed(name_status_file(get_trial_of_row(row)), RERUN)
    if status is None:
        return Found(steps=kept.trials[row].trial.training.steps)
    return find(storage, row, kept.trials[row].trial, kept.protocols[row], status)


def read_journals(storage: Storage, variants: Mapping[RowId, Variant]) -> dict[RowId, list[dict[str, Any]]]:
    """The points of each row: those of its trial's journal, as `workers.journal` writes them, up to the row's step."""
    points = _map_at_once(lambda row: read_points(storage, name_trial_folder(get_trial_of_row(row))), variants)
    return {
        row: [point for point in found if point["step"] <= variants[row].trial.training.steps]
        for row, found in zip(variants, points, strict=True)
    }


def _map_at_once(call: Callable[[str], Any], items: Iterable[str]) -> list[Any]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(call, items))
