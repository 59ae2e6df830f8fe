"""What there is to tell of a sweep: all that its report is made of, as plain data, and what follows from it.

Everything comes from the storage's files: no Ray, no torch.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from orchestrator.experiment.measured_weights import describe_average
from orchestrator.experiment.metrics import BOUNDS, NLL, head_metric
from orchestrator.experiment.starts import shorten_slot
from orchestrator.measuring.differences import BY_IMAGE, Difference
from orchestrator.measuring.seeds import Group, are_over_seeds, compare_groups, group_rows
from orchestrator.output.importance import Forest, Share, compute_importance, grow_forest
from orchestrator.output.table import choose_compared_metric, format_means
from orchestrator.state.events import Driver, Event, Use, find_driver, measure_use, read_events
from orchestrator.state.rows import Row, find_pareto_front, is_distance, list_asked, rank_rows, shorten_values
from orchestrator.state.saved import SavedSweep, open_sweep, read_journals, read_rows
from workers.journal import read_image
from workers.layout import RowId, name_sweep_lock
from workers.locks import is_locked
from workers.storage import Storage

GRIDS = 12  # trials whose samples and parts of the bound are shown
CURVES = 100  # trials that have a curve of their own, or settings where seeds are taken together: more are not seen


@dataclass(frozen=True)
class Report:
    """A sweep as its storage holds it at one moment. `rows` are ranked, the best first; `needed` are those that are
    made as others start from them.

    Those that differ in the seed alone are shown as one, unless `each` of them is asked for. `journals` are those of
    the rows with curves.
    """

    kept: SavedSweep
    rows: Sequence[Row]
    needed: Sequence[Row]
    happened: Sequence[Event]
    driver: Driver
    journals: Mapping[RowId, Sequence[Mapping[str, Any]]]
    grids: Mapping[str, tuple[int, bytes]]  # by row: the step of its last grid of samples, and the PNG
    made_ms: int
    each: bool = False

    @cached_property
    def groups(self) -> list[Group]:
        """What is shown in a line each, the best first."""
        return group_rows(self.rows, self.each)

    @cached_property
    def with_curves(self) -> list[Row]:
        return choose_curves(self.groups)

    @cached_property
    def over_seeds(self) -> bool:
        """Whether rows are taken together."""
        return are_over_seeds(self.groups)

    @cached_property
    def measured(self) -> list[Row]:
        """The trials with the metric that the sweep ranks on."""
        return [row for row in self.rows if self.kept.metric in row.metrics]

    @cached_property
    def measured_groups(self) -> list[Group]:
        return [group for group in self.groups if self.kept.metric in group.metrics]

    @cached_property
    def rank(self) -> dict[str, int]:
        """The place of each row's group, which chooses its colour."""
        return {row.digest: i for i, group in enumerate(self.groups) for row in group.rows}

    @cached_property
    def distance(self) -> str:
        """The Fréchet distance that most trials have; empty where none has."""
        names = [name for row in self.rows for name in row.metrics if is_distance(name)]
        return max(dict.fromkeys(names), key=names.count, default="")

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        """What the front is a trade-off of: the search's own objectives where it has several, else bits/dim and the
        distance."""
        return (self.kept.metric, *self.kept.also) if self.kept.also else (self.bound, self.distance)

    @cached_property
    def bound(self) -> str:
        """The bits/dim that trials have: a bound, and the likelihood that is ranked on where their bounds differ."""
        measured = [row for row in self.rows if any(name in row.metrics for name in BOUNDS)]
        common = [name for name in BOUNDS if measured and all(name in row.metrics for row in measured)]
        if not common and self.kept.metric in BY_IMAGE:
            return self.kept.metric
        return next((name for name in (*common, *BOUNDS) if any(name in row.metrics for row in self.rows)), NLL)

    @cached_property
    def traded(self) -> list[Group]:
        """What has all objectives."""
        return [group for group in self.groups if all(name in group.metrics for name in self.objectives)]

    @cached_property
    def front(self) -> list[Group]:
        """Those that no other is at least as good as in all objectives, and better in one."""
        points: dict[str, list[float]] = {
            group.digest: [group.metrics[name] for name in self.objectives] for group in self.traded
        }
        best = find_pareto_front(points)
        return [group for group in self.traded if group.digest in best]

    @cached_property
    def compared(self) -> str:
        """The metric in which the trials are held against the best."""
        return choose_compared_metric(self.kept.metric)

    @cached_property
    def against_best(self) -> tuple[str | None, Mapping[str, Difference]]:
        return compare_groups(self.groups, self.compared)

    @cached_property
    def use(self) -> Use:
        return measure_use(self.happened)


def gather(storage: Storage, sweep: str, each: bool = False) -> Report:
    """Reads all that the report of a sweep needs. Raises Mistake where there is no such sweep."""
    kept = open_sweep(storage, sweep)
    happened, made_ms = read_events(storage, kept.name), time.time_ns() // 1_000_000
    every = read_rows(storage, kept, happened)
    rows = rank_rows(list_asked(every), kept.metric, each)
    locked = is_locked(storage, name_sweep_lock(kept.name))
    groups = group_rows(rows, each)
    journals = read_journals(storage, {row.digest: kept.trials[row.digest] for row in choose_curves(groups)})
    grids: dict[str, tuple[int, bytes]] = {}
    for group in groups[:GRIDS]:
        images = [point for point in journals[group.digest] if point.get("image") == "samples"]
        if images and (png := read_image(storage, images[-1])) is not None:
            grids[group.digest] = images[-1]["step"], png
    return Report(
        kept,
        rows,
        [row for row in every if row.variant.role],
        happened,
        find_driver(happened, locked, [row.found.status or {} for row in every], made_ms),
        journals,
        grids,
        made_ms,
        each,
    )


def choose_curves(groups: Sequence[Group]) -> list[Row]:
    """The rows of the best CURVES groups."""
    return [row for group in groups[:CURVES] for row in group.rows]


def list_starts(report: Report) -> list[tuple[Row, list[tuple[str, Row]]]]:
    """What rows start from, each with those that do and what it is to them, in the order of the experiment."""
    rows = {row.digest: row for row in (*report.needed, *report.rows)}
    found: dict[RowId, list[tuple[str, Row]]] = {}
    for row, starts in report.kept.starts.items():
        for slot, start in starts.items():
            found.setdefault(start, []).append((shorten_slot(slot), rows[row]))
    return [(rows[start], found[start]) for start in report.kept.trials if start in found]


def compute_shares(report: Report) -> list[Share]:
    """How much each searched setting explains of the metric's variance; see `orchestrator.output.importance`."""
    values = [row.metrics[report.kept.metric] for row in report.measured]
    return compute_importance([shorten_values(row.variant) for row in report.measured], values)


def grow_trees(report: Report) -> Forest | None:
    """The same by a random forest, where settings were drawn and the trials are enough."""
    values = [row.metrics[report.kept.metric] for row in report.measured]
    return grow_forest([shorten_values(row.variant) for row in report.measured], values) if report.kept.drawn else None


def describe_forest(grown: Forest) -> str:
    return (
        f"A random forest explains {grown.explained:.0%} of the variance of trials that it has not seen by their "
        "settings together."
    )


def list_protocols(rows: Iterable[Row]) -> list[tuple[str, Mapping[str, Any], list[Row]]]:
    """(what was measured, how, of which trials) for every different way of measuring."""
    found: dict[str, tuple[str, Mapping[str, Any], list[Row]]] = {}
    for row in rows:
        for kind, passport in (row.found.summary or {}).get("passports", {}).items():
            how = {**passport["protocol"], **{f"also {k}": v for k, v in passport.get("also", {}).items()}}
            key = json.dumps([kind, how], sort_keys=True)
            found.setdefault(key, (kind, how, []))[2].append(row)
    return sorted(found.values(), key=lambda one: one[0])


def list_averages(rows: Iterable[Row]) -> list[str]:
    """How near the averages that were made of others come to stored ones."""
    found = ((row.name, (row.found.summary or {}).get("average")) for row in rows)
    return [f"{name}: width {describe_average(average)}." for name, average in found if average]


def list_faults(happened: Sequence[Event]) -> list[Event]:
    """What went wrong, and what was done about it."""
    wrong = ("restarted", "retried", "failed", "interrupted", "lost", "hangs")
    return [
        e
        for e in happened
        if e["event"] in wrong or (e["event"] == "trained" and e["state"] == "diverged")
        or (e["event"] == "decided" and "resumes" in e["why"])
    ]  # fmt: skip


def write_verdict(report: Report) -> str:
    """What the sweep found, in a sentence or two."""
    if not report.measured:
        return "No trial is measured yet."
    best, metric = report.measured_groups[0], report.kept.metric
    what, value = head_metric(metric), format_means(metric, best)
    finding = f"Best of {len(report.measured)} measured trials: {best.name}, {what} {value}."
    if report.over_seeds:
        n, seeds = len(report.measured_groups), best.count_seeds(metric)
        finding = (
            f"Best of {n} settings by the mean over seeds ({len(report.measured)} measured trials): {best.name}, "
            f"{what} {value} (± over seeds / over {'images' if metric in BY_IMAGE else 'samples'}, {seeds} seeds)."
        )
    first, differences = report.against_best
    if first != best.digest or not differences:
        return finding
    paired, kind = report.compared in BY_IMAGE, "setting" if report.over_seeds else "trial"
    ways = ("by these seeds and images", "over seeds and images") if report.over_seeds else ("on these images", "")
    if same := [d for d in differences.values() if not d.clear]:
        others = f"one other {kind}" if len(same) == 1 else f"{len(same)} other {kind}s"
        return (
            f"{finding} {(ways[0] if paired else 'by their error bars').capitalize()} it cannot be told from {others}."
        )
    how = (ways[1] or "paired over images") if paired else "by error bars"
    return f"{finding} All others are clearly worse (95 % each, {how})."


def format_hours(seconds: float) -> str:
    """Slot-hours to three digits, whatever their size."""
    return f"{seconds / 3600:.3g}"


def format_utc(time_ms: int | None) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if time_ms else "-"


@dataclass(frozen=True)
class ToldEvent:
    """An event for a person."""

    time_ms: int
    trial: str
    event: str
    text: str


def tell_event(event: Event) -> ToldEvent:
    """What happened, in words that are put together of what its journal keeps."""
    left_out = {
        "time_ms",
        "trial",
        "event",
        "why",
        "seconds",
        *(() if event["event"] == "cluster" else ("cpus", "gpus")),
    }
    rest = {name: value for name, value in event.items() if name not in left_out}
    words = [str(rest.pop("action"))] if "action" in rest else []
    words += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in rest.items()]
    words += [f"{kind} {seconds:g} s" for kind, seconds in event.get("seconds", {}).items()]
    name = "diverged" if event.get("state") == "diverged" else event["event"]
    text = "; ".join(filter(None, [", ".join(words), event.get("why")]))
    return ToldEvent(event["time_ms"], event.get("trial", "")[:8], name, text)
