"""How fast trials were, for a person: the share of the peak, the time by kind of work, and what is odd about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.measuring.seeds import Group
from orchestrator.measuring.slowness import find_slow_trials
from orchestrator.output.terminal import format_clock
from orchestrator.state.rows import Row
from workers.layout import get_trial_of_row
from workers.speed import CORE

# Kinds of work in their order: those of training by the clock, and what the blocks of an evaluation use.
TRAINING_KINDS = ("compiling", "training", "validation", "checkpoints", "waiting")
KINDS = (*TRAINING_KINDS, "nll", "ode_nll", "samples", "features")


@dataclass(frozen=True)
class SpeedLine:
    """A trial, or those that differ in the seed alone: mean speeds, and the sum of the seconds."""

    group: Group
    images_per_s: str
    of_peak: str
    seconds: Sequence[str]  # by `list_kinds`


def list_speed_lines(groups: Sequence[Group]) -> list[SpeedLine]:
    """What is not known is a dash."""
    kinds = list_kinds([row for group in groups for row in group.rows])
    lines = []
    for group in groups:
        rate, seconds = group.images_per_s, add_seconds(group.rows)
        lines.append(
            SpeedLine(
                group,
                f"{rate:,.0f}" if rate else "-",
                format_share(group.of_peak),
                [format_seconds(seconds.get(kind)) for kind in kinds],
            )
        )
    return lines


def list_kinds(rows: Sequence[Row]) -> list[str]:
    """The kinds of work that some row has seconds of, in their order."""
    there = {kind for row in rows for kind in row.seconds}
    return [kind for kind in KINDS if kind in there] + sorted(there - set(KINDS))


def add_seconds(rows: Iterable[Row]) -> dict[str, float]:
    """The seconds of all rows by kind. The training of a trial that several rows share counts once."""
    total, trained = dict[str, float](), set[str]()
    for row in rows:
        of = get_trial_of_row(row.digest)
        for kind, seconds in row.seconds.items():
            if kind not in TRAINING_KINDS or of not in trained:
                total[kind] = total.get(kind, 0.0) + seconds
        trained.add(of)
    return total


def list_closing_lines(rows: Sequence[Row]) -> list[str]:
    """What a sweep says of its speed at its end: where its time went, what the peaks are, and which trials are slow."""
    seconds = add_seconds(rows)
    spent = ", ".join(f"{kind} {format_seconds(seconds[kind])}" for kind in list_kinds(rows))
    lines = [f"work        {spent}"] if spent else []
    lines += [f"peak        {text}" for text in describe_peaks(rows)]
    lines += [f"eager       {text}" for text in describe_uncompiled(rows)]
    return lines + [f"slow        {slow}" for slow in find_slow_trials(rows)]


def describe_peaks(rows: Iterable[Row]) -> list[str]:
    """Each measured peak that a share of the rows is of."""
    return list(dict.fromkeys(_describe_peak(peak) for row in rows if (peak := row.peak)))


def describe_uncompiled(rows: Iterable[Row]) -> list[str]:
    """Why trials were trained without compiling, which were to be; each reason once, with the number of trials."""
    trials: dict[str, set[str]] = {}
    for row in rows:
        if why := (row.found.status or {}).get("uncompiled"):
            trials.setdefault(why, set()).add(get_trial_of_row(row.digest))
    return [f"{len(of)} trial{'s' * (len(of) > 1)} trained without torch.compile: {why}" for why, of in trials.items()]


def _describe_peak(peak: Mapping[str, Any]) -> str:
    """`94.3 GFLOP/s, a matrix product in float32 on 1 thread of Some Processor core`."""
    name, n = str(peak["hardware"]), peak["threads"]
    threads = f"on {n} thread{'s' * (n > 1)} of" if name.endswith(CORE) else "on"
    unit, scale = ("TFLOP/s", 1e12) if peak["flops_per_s"] >= 1e12 else ("GFLOP/s", 1e9)
    return f"{peak['flops_per_s'] / scale:.3g} {unit}, a matrix product in {peak['precision']} {threads} {name}"


def format_share(share: float | None) -> str:
    """0.1234 -> 12 %, and 0.0123 -> 1.2 %."""
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def format_seconds(seconds: float | None) -> str:
    """Seconds below a minute, and then as a clock."""
    return "-" if seconds is None else f"{seconds:.1f} s" if seconds < 60 else format_clock(seconds)
