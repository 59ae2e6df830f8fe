"""A row of a sweep: a trial measured in one way, as it stands."""

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.experiment.records import Variant
from orchestrator.experiment.settings import show
from workers.layout import RowId

SPEED = "perf/"  # how the names of what clocks say begin
SEED = "seed"  # the path of a search space along which rows are repetitions of each other


@dataclass(frozen=True)
class Found:
    """What the storage holds of a row: of a trial at a step, measured in one way."""

    status: Mapping[str, Any] | None = None  # status.json of the trial, which may stand beyond the row's step
    checkpoint: str | None = None  # the digest of the complete checkpoint at the row's step
    summary: Mapping[str, Any] | None = None  # of the evaluation that is asked for, of that checkpoint
    is_measured: bool = True  # whether anything is asked for of its checkpoint
    unread: str = ""  # why its checkpoint cannot be read
    unfinished: bool = False  # whether the trial's journal lacks the validation at the row's step
    steps: int = 0  # the row's
    is_kept: bool = False  # whether the checkpoint stays, however far its trial is trained
    resumes_at: int | None = None  # the step of the checkpoint that it goes on from, where it is not done
    validation: Mapping[str, float] = field(default_factory=dict)  # by its name: at the row's step, or the last before

    @property
    def state(self) -> str:
        """finished where the row's checkpoint is there; what ended its trial before; running, or new."""
        if self.checkpoint:
            return "finished"
        if not self.status:
            return "new"
        state = str(self.status["state"])
        if state in ("diverged", "pruned"):
            return state if self.status["step"] <= self.steps else "running"
        return "running" if state == "finished" else state

    @property
    def step(self) -> int:
        """How far the row's trial is, up to the row's step."""
        told = int((self.status or {}).get("step", 0))  # at its last validation
        return self.steps if self.checkpoint else min(max(told, self.resumes_at or 0), self.steps)


@dataclass(frozen=True)
class Row:
    """One trial's outcome."""

    digest: RowId
    variant: Variant
    found: Found
    error: str = ""  # why this run could not finish it
    evaluation_s: Mapping[str, float] = field(default_factory=dict)  # what its blocks used, by kind, where it is known

    @property
    def state(self) -> str:
        """done, or what kept it from being done."""
        if self.error:
            return "failed"
        is_made = self.found.summary is not None or not self.found.is_measured
        return "done" if self.found.state == "finished" and is_made else self.found.state

    @property
    def metrics(self) -> dict[str, float]:
        """Measured values under MLflow's names."""
        values = dict(self.found.summary["metrics"]) if self.found.summary else {}
        return {**values, **self.found.validation}

    @property
    def images_per_s(self) -> float | None:
        return (self.found.status or {}).get("images_per_s")

    @property
    def peak(self) -> Mapping[str, Any] | None:
        """What its device's matrix product makes, as `workers.peak` has measured it; None in a storage of before."""
        return (self.found.status or {}).get("peak")

    @property
    def of_peak(self) -> float | None:
        """The share of the peak of its devices that training reaches: operations per image x images/s over theirs."""
        if not self.peak or not self.images_per_s:
            return None
        reached = self.peak["flops_per_image"] * self.images_per_s
        return float(reached / (self.peak["workers"] * self.peak["flops_per_s"]))

    @property
    def seconds(self) -> dict[str, float]:
        """By kind of work: of its trial's training on the clock, and what the blocks of its evaluation used."""
        return {**(self.found.status or {}).get("seconds", {}), **self.evaluation_s}

    @property
    def speeds(self) -> dict[str, float]:
        """All of it as numbers, under the names that MLflow and the results have them by. Nothing is ranked on them."""
        known = {"images_per_s": self.images_per_s, "of_peak": self.of_peak}
        if self.peak:
            known["peak_tflops"] = self.peak["flops_per_s"] / 1e12
            known["gflops_per_image"] = self.peak["flops_per_image"] / 1e9
        known |= {f"seconds_{kind}": seconds for kind, seconds in self.seconds.items()}
        return {f"{SPEED}{name}": float(value) for name, value in known.items() if value is not None}

    @property
    def name(self) -> str:
        """The searched values in short, such as `T=50 beta_end=0.02 weighting=vlb`; the same in table and MLflow."""
        return name_variant(self.variant)


def name_variant(variant: Variant) -> str:
    values = [f"{key}={value}" for key, value in shorten_params(variant).items()]
    return " ".join([variant.role, *values] if variant.role else values) or "base"


def shorten_params(variant: Variant) -> dict[str, str]:
    """The searched values by the last name of their path; a section's values by theirs."""
    return {name: _shorten_path(value) for name, value in shorten_values(variant).items()}


def _shorten_path(value: Any) -> str:
    if isinstance(value, list | tuple):
        return show(value)  # cut to a readable length
    return f"{value:g}" if isinstance(value, float) else str(value)


def shorten_values(variant: Variant) -> dict[str, Any]:
    """The same as they are, not as text. Paths that end alike go by as much of them as tells them apart."""
    flat: dict[str, Any] = {}
    for path, value in variant.params.items():
        flat |= {f"{path}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {path: value}

    def name(path: str) -> str:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in flat) == 1), path)

    return {name(path): value for path, value in flat.items()}


def drop_seed(variant: Variant) -> Variant:
    """The same without the searched seed: what rows that are repetitions of each other share."""
    return replace(variant, params={path: value for path, value in variant.params.items() if path != SEED})


def join_repetitions(variants: Iterable[tuple[RowId, Variant]]) -> list[list[RowId]]:
    """The digests of rows, those that differ in the searched seed alone together, in the order of the first of each.

    Where no seed is searched every row is by itself.
    """
    found: dict[str, list[RowId]] = {}
    for digest, variant in variants:
        shared = json.dumps([drop_seed(variant).params, variant.role], sort_keys=True, default=str)
        found.setdefault(shared if SEED in variant.params else digest, []).append(digest)
    return list(found.values())


def rank_rows(rows: Sequence[Row], metric: str, each: bool = False) -> list[Row]:
    """Best first; trials without the metric last, in their order.

    Rows that differ in the seed alone stand together, at the place of the mean of those of them that have the metric;
    `each` ranks every row by itself.
    """
    values = {row.digest: row.metrics.get(metric, math.inf) for row in rows}
    groups = [[row.digest] for row in rows] if each else join_repetitions((row.digest, row.variant) for row in rows)
    places: dict[str, tuple[float, int]] = {}  # the number keeps together what has no value, or an equal mean
    for number, group in enumerate(groups):
        known = [values[digest] for digest in group if values[digest] != math.inf]
        mean = sum(known) / len(known) if known else math.inf
        places |= dict.fromkeys(group, (mean, number))
    return sorted(rows, key=lambda row: (places[row.digest], values[row.digest]))


def list_asked(rows: Iterable[Row]) -> list[Row]:
    """Those of the search itself, without what is made as others start from it."""
    return [row for row in rows if not row.variant.role]


def find_pareto_front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """The names of the points that no other beats: is nowhere larger and somewhere smaller."""
    front: list[tuple[float, ...]] = []
    for p in sorted({tuple(values) for values in points.values()}):  # what beats one comes before it
        if not any(all(map(operator.le, q, p)) for q in front):
            front.append(p)
    unbeaten = set(front)
    return {name for name, values in points.items() if tuple(values) in unbeaten}


def is_distance(name: str) -> bool:
    """Whether a metric is a Fréchet distance at the n that was asked for."""
    starts = "eval/fd_", "eval/fid", "eval/reconstruction_fd_"
    return name.startswith(starts) and not name.endswith(("_se", "_infinity"))
