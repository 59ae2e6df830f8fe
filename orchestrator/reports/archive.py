"""What a storage keeps of a sweep, written as it goes and read by anyone: without torch, Ray, MLflow or the data.

    sweeps/<name>/sweep.json      what the sweep is: its trials by address, what they search, how they are measured
    sweeps/<name>/asked.json      of an adaptive search: the points that were asked for, in order
    sweeps/<name>/events.jsonl    what happened: every decision with its reason, restarts, faults, times

Together with the trials' own files they say how a sweep stands, while it runs and after it, from any machine that
reaches the storage.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from orchestrator.experiment import Experiment, Variant, resolved, variants_of
from orchestrator.plan import Found
from orchestrator.reports.results import Row
from orchestrator.settings import meant
from workers.blocks import Images, protocol_key
from workers.config import NOT_ADDRESSED, DataConfig, Measurement, Mistake, Trial, digest, trained_by
from workers.data import Source
from workers.storage import Storage

FLUSH_S = 1.0  # at most so often is the file of events written
COUNTED = {"core": "cpus", "GPU": "gpus"}  # where an event says how many slots of each kind
READERS = 16  # files read at once: a remote storage answers each in its own time
Event = Mapping[str, Any]


# ---- What a sweep is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A sweep as `sweep.json` keeps it. `protocols` name how each trial is measured: `workers.blocks.protocol_key`."""

    name: str
    metric: str
    mode: str
    also: tuple[str, ...]  # further objectives
    drawn: bool  # whether settings were drawn, and are no full grid
    trials: Mapping[str, Variant]
    protocols: Mapping[str, str]
    experiment: Mapping[str, Any]  # the file, with every setting

    @property
    def folder(self) -> str:
        return f"sweeps/{self.name}"


def keep(
    storage: Storage, experiment: Experiment, trials: Mapping[str, Variant], sources: Mapping[DataConfig, Source]
) -> None:
    """Writes `sweep.json`, unless it says the same already; its trials and their settings in the file's order."""
    content = {
        "name": experiment.name,
        "metric": experiment.search.metric,
        "mode": experiment.search.mode,
        "experiment": resolved(experiment),
        "trials": {
            address: {
                "params": v.params,
                "trial": v.trial.model_dump(mode="json"),
                "protocol": protocol_key(Measurement.of(v.trial), Images.of(sources[v.trial.data])),
            }
            for address, v in trials.items()
        },
    }
    path, text = f"sweeps/{experiment.name}/sweep.json", json.dumps(content, indent=2) + "\n"
    if _text(storage, path) != text:
        storage.write(path, text.encode())


def keep_asked(storage: Storage, experiment: Experiment, asked: Sequence[Variant]) -> None:
    """Writes down what an adaptive search has asked for: it stands, even if another version of Optuna would now ask
    for something else, or if a trial that failed is made after all."""
    content = {"search": _searched(experiment), "asked": [v.params for v in asked]}
    storage.write_json(f"sweeps/{experiment.name}/asked.json", content)


def asked_before(storage: Storage, experiment: Experiment) -> list[Variant]:
    """What the same search asked for before, up to its `samples`; nothing where it was another one."""
    content = storage.read_json(f"sweeps/{experiment.name}/asked.json")
    if content is None or content["search"] != _searched(experiment):
        return []
    return list(variants_of(experiment, content["asked"][: experiment.search.samples]))


def forget_asked(storage: Storage, experiment: Experiment) -> None:
    storage.delete(f"sweeps/{experiment.name}/asked.json")


def _searched(experiment: Experiment) -> str:
    """A digest of all that suggestions depend on."""
    trial, search = (part.model_dump(mode="json") for part in (experiment.trial, experiment.search))
    trial["training"] = {name: value for name, value in trial["training"].items() if name not in NOT_ADDRESSED}
    for name in ("samples", "max_concurrent", "max_failures"):
        del search[name]
    return digest([trial, {**search, "batch": experiment.search.first}])


def names(storage: Storage) -> list[str]:
    """The sweeps of a storage."""
    return [name for name in storage.list("sweeps") if storage.exists(f"sweeps/{name}/sweep.json")]


def older(storage: Storage) -> list[str]:
    """The sweeps that a version before `sweep.json` has left."""
    kept = ("experiment.yaml", "results.parquet")
    known = names(storage)
    return [
        name
        for name in storage.list("sweeps")
        if name not in known and any(storage.exists(f"sweeps/{name}/{file}") for file in kept)
    ]


def how_to_open(name: str) -> str:
    """What to do about a sweep that an older version has left."""
    return (
        f"{name}: made by an older version, which kept no sweep.json. Run the sweep command again with its file (or "
        f"sweeps/{name}/experiment.yaml of the storage): it writes that, and trains nothing that is there. Its numbers "
        f"are in sweeps/{name}/results.parquet."
    )


def open_sweep(storage: Storage, name: str) -> Kept:
    """The sweep of that name. Raises Mistake where there is none."""
    content = storage.read_json(f"sweeps/{name}/sweep.json") if "/" not in name and name not in ("", "..") else None
    if content is None and name in (left := older(storage)):
        raise Mistake(how_to_open(name))
    if content is None:
        there = [*names(storage), *left]
        raise Mistake(
            f"{name!r} is no sweep in {storage.root}{meant(name, there) or '.'} Sweeps there: "
            f"{', '.join(there) or 'none; run one first, or give its --storage'}"
        )
    trials = {}
    for address, kept in content["trials"].items():
        trial = TypeAdapter(Trial).validate_json(json.dumps(kept["trial"]))
        trials[address] = Variant(params=kept["params"], trial=trial)
    protocols = {address: kept["protocol"] for address, kept in content["trials"].items()}
    search = content["experiment"]["search"]
    also, drawn = tuple(search.get("also", ())), search["algorithm"] != "grid"
    of = content["name"], content["metric"], content["mode"]
    return Kept(*of, also, drawn, trials, protocols, content["experiment"])


def rows(storage: Storage, kept: Kept, happened: Sequence[Event] = ()) -> list[Row]:
    """The trials as they stand, in the order of the experiment; `happened` says why the last command failed some."""
    errors = failures(happened)
    found = _at_once(lambda address: _found(storage, kept, address), kept.trials)
    return [
        Row(address, variant, f, errors.get(address, ""))
        for (address, variant), f in zip(kept.trials.items(), found, strict=True)
    ]


def _found(storage: Storage, kept: Kept, address: str) -> Found:
    folder, ema = f"trials/{trained_by(address)}", kept.trials[address].trial.evaluation.ema
    status = storage.read_json(f"{folder}/status.json")
    checkpoint = measured = (status or {}).get("checkpoint")
    if ema not in (None, kept.trials[address].trial.training.ema) and checkpoint:
        from workers import checkpoint as checkpoints  # torch takes a second, and only this needs it

        newest = checkpoints.newest(storage, f"{folder}/checkpoints")
        measured = checkpoints.averaged(newest, ema).digest if newest else None
    path = f"evaluations/{measured}/summary-{kept.protocols[address]}.json"
    return Found(status, checkpoint, storage.read_sealed(path) if checkpoint else None)


def journals(storage: Storage, addresses: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The points of each trial's journal, as `workers.journal` writes them."""
    addresses = list(addresses)
    texts = _at_once(lambda address: _text(storage, f"trials/{trained_by(address)}/journal.jsonl"), addresses)
    return {a: [json.loads(line) for line in text.splitlines()] for a, text in zip(addresses, texts, strict=True)}


def _text(storage: Storage, path: str) -> str:
    return storage.read(path).decode() if storage.exists(path) else ""


def _at_once(call: Callable[[str], Any], items: Iterable[str]) -> list[Any]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(call, items))


# ---- What happened ---------------------------------------------------------------------------------------------


class Events:
    """The events of a sweep, a line each; the file is rewritten whole, so that a reader never sees half a line."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._path = storage, f"sweeps/{name}/events.jsonl"
        self._text = _text(storage, self._path)
        self._written, self._at = self._text, 0.0

    def add(self, event: str, trial: str = "", **what: Any) -> None:
        of = {"trial": trial} if trial else {}
        self._text += json.dumps({"time_ms": time.time_ns() // 1_000_000, "event": event, **of, **what}) + "\n"
        self.flush_when_due()

    def flush_when_due(self) -> None:
        if time.monotonic() - self._at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._text != self._written:
            self._storage.write(self._path, self._text.encode())
            self._written, self._at = self._text, time.monotonic()


def events(storage: Storage, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(storage, f"sweeps/{name}/events.jsonl").splitlines()]


def failures(happened: Sequence[Event]) -> dict[str, str]:
    """Why each trial failed that the last command could not finish."""
    failed: dict[str, str] = {}
    for event in happened:
        if event["event"] == "started":
            failed = {}
        elif event["event"] == "failed":
            failed[event["trial"]] = event["why"]
        elif event["event"] in ("began", "measured"):
            failed.pop(event["trial"], None)
    return failed


@dataclass(frozen=True)
class Spell:
    """A time in which a trial held a part of the cluster. An evaluation's is what its blocks used, added up."""

    trial: str
    kind: str  # training or evaluation
    seconds: float
    slots: float


@dataclass(frozen=True)
class Use:
    """What a sweep took of its cluster, over all commands that worked on it. A slot is a GPU where the cluster has
    any, else a core as Ray counts them."""

    slot: str  # GPU or core
    slots: float  # of the cluster, at the last command
    wall_s: float
    held: tuple[Spell, ...]
    capacity: float  # slots x seconds

    @property
    def busy(self) -> float:
        """Slots x seconds that trials held."""
        return sum(spell.seconds * spell.slots for spell in self.held)

    @property
    def utilisation(self) -> float:
        """The part of the cluster's slots that trials held, from the first to the last sign of each command."""
        return self.busy / self.capacity if self.capacity else 0.0

    def of(self, trial: str, kind: str) -> float:
        """Slots x seconds of a trial."""
        return sum(s.seconds * s.slots for s in self.held if (s.trial, s.kind) == (trial, kind))


def use(happened: Sequence[Event]) -> Use:
    """What the events say about time: pure arithmetic. A trial that began and did not end is counted up to the last
    event of its command."""
    slot, slots, wall_s, capacity = "core", 0.0, 0.0, 0.0
    held: list[Spell] = []
    for command in _commands(happened):
        cluster = next((e for e in command if e["event"] == "cluster"), None)
        if cluster is None:
            continue
        slot, slots = ("GPU", cluster["gpus"]) if cluster["gpus"] else ("core", cluster["cpus"])
        end = command[-1]["time_ms"]
        seconds = (end - cluster["time_ms"]) / 1000
        wall_s, capacity = wall_s + seconds, capacity + seconds * slots
        running: dict[str, Event] = {}
        for event in command:
            trial = str(event.get("trial"))
            if event["event"] in ("began", "restarted", "trained", "failed") and trial in running:
                held.append(_training(running.pop(trial), event["time_ms"], slot))
            if event["event"] == "began":
                running[trial] = event
            if event["event"] in ("measured", "failed") and "core_s" in event:
                held.append(Spell(trial, "evaluation", event[f"{slot.lower()}_s"], 1))
        held += [_training(event, end, slot) for event in running.values()]
    return Use(slot, slots, wall_s, tuple(held), capacity)


def _training(began: Event, end_ms: int, slot: str) -> Spell:
    return Spell(began["trial"], "training", (end_ms - began["time_ms"]) / 1000, began[COUNTED[slot]])


def _commands(happened: Sequence[Event]) -> list[list[Event]]:
    """The events of each command that worked on the sweep."""
    commands: list[list[Event]] = []
    for event in happened:
        if event["event"] == "started" or not commands:
            commands.append([])
        commands[-1].append(event)
    return commands


@dataclass(frozen=True)
class Driver:
    """The command that works on a sweep, as far as a reader can tell."""

    state: str  # running, ended, interrupted, gone, or silent where it may run on another machine
    host: str = ""
    pid: int = 0
    heard_ms: int | None = None


def driver(
    happened: Sequence[Event], locked: bool | None, statuses: Iterable[Mapping[str, Any]], now_ms: int
) -> Driver:
    """Whether a command is at work. `locked` is None where the storage cannot say (it is remote)."""
    last = _commands(happened)[-1] if happened else []
    if not last:
        return Driver("running" if locked else "gone")
    heard = max([e["time_ms"] for e in last] + [s["updated_ms"] for s in statuses if "updated_ms" in s])
    ended = last[-1]["event"]
    state = ended if ended in ("ended", "interrupted") else "running"
    if state == "running" and locked is False:
        state = "gone"
    elif state == "running" and locked is None and now_ms - heard > SILENT_MS:
        state = "silent"
    return Driver(state, last[0].get("host", ""), last[0].get("pid", 0), heard)


SILENT_MS = 10 * 60 * 1000


def times(happened: Sequence[Event], name: str) -> Counter[str]:
    """How often it happened to each trial: `restarted` after a fault, or pieces of its evaluation `retried`."""
    return Counter(event["trial"] for event in happened if event["event"] == name)
