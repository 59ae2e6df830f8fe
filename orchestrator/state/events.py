"""What happened in a sweep: every decision with its reason, restarts, faults and times, a line each in events.jsonl."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.layout import name_sweep_file
from workers.seals import Lines, open_lines, seal_lines
from workers.storage import Storage, tell_damage

EVENTS = "events.jsonl"
FLUSH_S = 1.0  # at most so often is the file of events written
COUNTED = {"core": "cpus", "GPU": "gpus"}  # where an event says how many slots of each kind
Event = Mapping[str, Any]


class EventLog:
    """The events of a sweep, a line each; the file is rewritten whole, so that a reader never sees half a line."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._path = storage, name_sweep_file(name, EVENTS)
        found = _read_event_lines(storage, self._path)
        if found.damage:  # what is whole of it goes on; the rest may still say something to a person
            storage.write(f"{self._path}.damaged", storage.read(self._path))
        self._events = list(found.whole)
        self._written, self._at = -1 if found.damage else len(self._events), 0.0
        if found.damage:
            self.flush()

    @property
    def events(self) -> Sequence[Event]:
        return self._events

    def add(self, event: str, trial: str = "", **what: Any) -> None:
        of = {"trial": trial} if trial else {}
        self._events.append({"time_ms": time.time_ns() // 1_000_000, "event": event, **of, **what})
        self.flush_when_due()

    def flush_when_due(self) -> None:
        if time.monotonic() - self._at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if len(self._events) != self._written:
            self._storage.write(self._path, seal_lines(self._events, self._path))
            self._written, self._at = len(self._events), time.monotonic()


def read_events(storage: Storage, name: str) -> list[dict[str, Any]]:
    """What happened in a sweep, as far as the file is whole; damage is told."""
    return list(_read_event_lines(storage, name_sweep_file(name, EVENTS)).whole)


def was_begun_by(storage: Storage, name: str, job: str) -> bool:
    """Whether a command within that job of a batch system has begun the sweep."""
    return any(event.get("slurm_job") == job for event in read_events(storage, name))


def _read_event_lines(storage: Storage, path: str) -> Lines:
    try:
        lines = open_lines(storage.read(path), path)
    except FileNotFoundError:
        return Lines([])
    if lines.damage:
        whole = f"{len(lines.whole)} events of it are whole, and no result is lost"
        tell_damage(storage.find_url(path), f"is damaged: {lines.damage}", whole)
    return lines


def list_failures(happened: Sequence[Event]) -> dict[str, str]:
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


def sum_evaluation_seconds(happened: Iterable[Event]) -> dict[str, dict[str, float]]:
    """What the blocks of each row's evaluation used, in seconds by kind, over all commands. Events of before do not
    tell it by kind."""
    found: dict[str, dict[str, float]] = {}
    for event in happened:
        add_evaluation_seconds(found, event)
    return found


def add_evaluation_seconds(found: dict[str, dict[str, float]], event: Event) -> None:
    for kind, seconds in event.get("seconds", {}).items():
        used = found.setdefault(event["trial"], {})
        used[kind] = used.get(kind, 0.0) + seconds


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

    @property
    def by_trial(self) -> Counter[tuple[str, str]]:
        """Slots x seconds of each trial and kind."""
        held: Counter[tuple[str, str]] = Counter()
        for spell in self.held:
            held[spell.trial, spell.kind] += spell.seconds * spell.slots  # type: ignore[assignment]
        return held


def measure_use(happened: Sequence[Event]) -> Use:
    """What the events say about time: pure arithmetic. A trial that began and did not end is counted up to the last
    event of its command."""
    slot, slots, wall_s, capacity = "core", 0.0, 0.0, 0.0
    held: list[Spell] = []
    for command in _split_commands(happened):
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
            if event["event"] in ("began", "restarted", "resized", "trained", "failed") and trial in running:
                held.append(_find_training(running.pop(trial), event["time_ms"], slot))
            if event["event"] == "began":
                running[trial] = event
            if event["event"] in ("measured", "failed") and "core_s" in event:
                held.append(Spell(trial, "evaluation", event[f"{slot.lower()}_s"], 1))
        held += [_find_training(event, end, slot) for event in running.values()]
    return Use(slot, slots, wall_s, tuple(held), capacity)


def _find_training(began: Event, end_ms: int, slot: str) -> Spell:
    return Spell(began["trial"], "training", (end_ms - began["time_ms"]) / 1000, began[COUNTED[slot]])


def _split_commands(happened: Sequence[Event]) -> list[list[Event]]:
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

    state: str  # running, ended, interrupted, refused, gone, silent where it may run on another machine, or unknown
    host: str = ""
    pid: int = 0
    heard_ms: int | None = None


def find_driver(
    happened: Sequence[Event], locked: bool | None, statuses: Iterable[Mapping[str, Any]], now_ms: int
) -> Driver:
    """Whether a command is at work. `locked` is None where the storage cannot say (it is remote)."""
    last = _split_commands(happened)[-1] if happened else []
    if not last:
        return Driver("running" if locked else "unknown")
    heard = max([e["time_ms"] for e in last] + [s["updated_ms"] for s in statuses if "updated_ms" in s])
    ended = last[-1]["event"]
    state = ended if ended in ("ended", "interrupted", "refused") else "running"
    if state == "running" and locked is False:
        state = "gone"
    elif state == "running" and locked is None and now_ms - heard > SILENT_MS:
        state = "silent"
    return Driver(state, last[0].get("host", ""), last[0].get("pid", 0), heard)


SILENT_MS = 10 * 60 * 1000


def count_events(happened: Sequence[Event], name: str) -> Counter[str]:
    """How often it happened to each trial: `restarted` after a fault, or pieces of its evaluation `retried`."""
    return Counter(event["trial"] for event in happened if event["event"] == name)
