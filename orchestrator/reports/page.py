"""The report of a sweep: what there is to tell of it, as one self-contained HTML page and as Markdown.

Everything comes from the storage's files: no Ray, no torch.
"""

import base64
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from orchestrator.comparing import BY_IMAGE, Difference
from orchestrator.reports import archive, results
from orchestrator.reports.archive import Driver, Event, Kept, Use
from orchestrator.reports.importance import Forest, Share, forest, importance
from orchestrator.reports.results import Row
from orchestrator.settings import write_yaml
from orchestrator.terminal import clock
from workers.diffusion.schedules import betas, log_snrs
from workers.storage import Storage

GRIDS = 12  # trials whose samples and parts of the bound are shown
EVENTS = 400  # events that are listed
Z = 1.96  # standard errors of an interval that holds the true mean in 95 % of cases


def path(sweep: str) -> str:
    return f"sweeps/{sweep}/report.html"


# ---- What there is to tell -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A sweep as its storage holds it at one moment. `rows` are ranked, the best first."""

    kept: Kept
    rows: Sequence[Row]
    happened: Sequence[Event]
    driver: Driver
    journals: Mapping[str, Sequence[Mapping[str, Any]]]
    grids: Mapping[str, tuple[int, bytes]]  # by trial: the step of its last grid of samples, and the PNG
    made_ms: int

    @cached_property
    def measured(self) -> list[Row]:
        """The trials with the metric that the sweep ranks on."""
        return [row for row in self.rows if self.kept.metric in row.metrics]

    @cached_property
    def rank(self) -> dict[str, int]:
        return {row.digest: i for i, row in enumerate(self.rows)}

    @cached_property
    def distance(self) -> str:
        """The Fréchet distance that most trials have; empty where none has."""
        names = [name for row in self.rows for name in row.metrics if results.is_distance(name)]
        return max(dict.fromkeys(names), key=names.count, default="")

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        """What the front is a trade-off of: the search's own objectives where it has several, else bits/dim and the
        distance."""
        return (self.kept.metric, *self.kept.also) if self.kept.also else ("eval/nll_bpd", self.distance)

    @cached_property
    def traded(self) -> list[tuple[Row, tuple[float, ...]]]:
        """The trials that have all objectives."""
        return [
            (row, tuple(row.metrics[name] for name in self.objectives))
            for row in self.rows
            if all(name in row.metrics for name in self.objectives)
        ]

    @cached_property
    def compared(self) -> str:
        """The metric in which the trials are held against the best."""
        return results.compared(self.kept.metric)

    @cached_property
    def against_best(self) -> tuple[str | None, Mapping[str, Difference]]:
        return results.against_best(self.rows, self.kept.metric)

    @cached_property
    def use(self) -> Use:
        return archive.use(self.happened)


def gather(storage: Storage, sweep: str) -> Report:
    """Reads all that the report of a sweep needs. Raises Mistake where there is no such sweep."""
    kept = archive.open_sweep(storage, sweep)
    happened, made_ms = archive.events(storage, kept.name), time.time_ns() // 1_000_000
    rows = results.ranked(archive.rows(storage, kept, happened), kept.metric, kept.mode)
    locked = storage.locked(f"{kept.folder}/lock")
    journals = archive.journals(storage, kept.trials)
    grids: dict[str, tuple[int, bytes]] = {}
    for row in rows[:GRIDS]:
        images = [p for p in journals[row.digest] if p.get("image") == "samples" and storage.exists(p["path"])]
        if images:
            grids[row.digest] = images[-1]["step"], storage.read(images[-1]["path"])
    return Report(
        kept,
        rows,
        happened,
        archive.driver(happened, locked, [row.found.status or {} for row in rows], made_ms),
        journals,
        grids,
        made_ms,
    )


def shares(report: Report) -> list[Share]:
    """How much each searched setting explains of the metric's variance; see `orchestrator.reports.importance`."""
    values = [row.metrics[report.kept.metric] for row in report.measured]
    return importance([results.short_values(row.variant) for row in report.measured], values)


def trees(report: Report) -> Forest | None:
    """The same by a random forest, where settings were drawn and the trials are enough."""
    values = [row.metrics[report.kept.metric] for row in report.measured]
    return forest([results.short_values(row.variant) for row in report.measured], values) if report.kept.drawn else None


def front(report: Report) -> list[Row]:
    """The trials that no other is at least as good as in all objectives, and better in one."""
    from orchestrator.reports.plots import pareto

    best = pareto([point for _, point in report.traded])
    return [row for row, point in report.traded if point in best]


def protocols(rows: Iterable[Row]) -> list[tuple[str, Mapping[str, Any], list[Row]]]:
    """(what was measured, how, of which trials) for every different way of measuring."""
    found: dict[str, tuple[str, Mapping[str, Any], list[Row]]] = {}
    for row in rows:
        for kind, passport in (row.found.summary or {}).get("passports", {}).items():
            how = {**passport["protocol"], **{f"also {k}": v for k, v in passport.get("also", {}).items()}}
            key = json.dumps([kind, how], sort_keys=True)
            found.setdefault(key, (kind, how, []))[2].append(row)
    return sorted(found.values(), key=lambda one: one[0])


def faults(happened: Sequence[Event]) -> list[Event]:
    """What went wrong, and what was done about it."""
    wrong = ("restarted", "retried", "failed", "interrupted")
    return [
        e
        for e in happened
        if e["event"] in wrong or (e["event"] == "trained" and e["state"] == "diverged")
        or (e["event"] == "decided" and "resumes" in e["why"])
    ]  # fmt: skip


def verdict(report: Report) -> str:
    """What the sweep found, in a sentence or two."""
    if not report.measured:
        return "No trial is measured yet."
    best, metric = report.measured[0], report.kept.metric
    value = results.with_error(metric, best.metrics)
    said = f"Best of {len(report.measured)} measured trials: {best.name}, {_metric(metric)} {value}."
    first, differences = report.against_best
    if first != best.digest or not differences:
        return said
    paired = report.compared in BY_IMAGE
    same = [d for d in differences.values() if not d.clear]
    if same:
        others = "one other trial" if len(same) == 1 else f"{len(same)} other trials"
        return f"{said} {'On these images' if paired else 'By their error bars'} it cannot be told from {others}."
    return f"{said} All others are clearly worse (95 % each, {'paired over images' if paired else 'by error bars'})."


def _metric(name: str) -> str:
    return (results.HEADS | {"valid/nll_bpd": "validation bits/dim"}).get(name, name.removeprefix("eval/"))


# ---- As Markdown -----------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """For a pull request: the verdict, the table, what matters, the cost, the faults, how it was measured."""
    use, lines = report.use, [f"## Sweep `{report.kept.name}`", "", verdict(report), ""]
    lines.append(results.markdown(report.rows, report.kept.metric))
    if note := results.footnote(report.rows, report.kept.metric):
        lines += ["", note.replace("\n", "  \n")]
    if found := shares(report):
        lines += ["", f"Variance of {_metric(report.kept.metric)} over {len(report.measured)} trials explained by each "
                  "setting alone (in brackets, by chance):", ""]  # fmt: skip
        lines += [f"- `{s.name}` {s.share:.0%} ({s.chance:.0%}): " + _levels(s) for s in found]
    if grown := trees(report):
        lines += ["", f"{_forest(grown)} What it loses of that when one is shuffled:", ""]
        lines += [f"- `{name}` {round(100 * weight)}%" for name, weight in grown.weights.items()]
    if len(best := front(report)) > 1:
        names = "; ".join(
            f"{row.name} ({', '.join(f'{row.metrics[name]:.4g}' for name in report.objectives)})" for row in best
        )
        lines += ["", f"Front of {', '.join(map(_metric, report.objectives))}: {names}."]
    if use.capacity:
        lines += ["", f"Cost: {hours(use.busy)} {use.slot}-hours in {clock(use.wall_s)}; {use.utilisation:.0%} of "
                  f"{use.slots:g} {use.slot}s held."]  # fmt: skip
    wrong = faults(report.happened)
    lines += ["", f"Faults and retries: {len(wrong) or 'none'}.", ""]
    lines += [
        f"- {_utc(e['time_ms'])} {t.trial} {t.event}: {t.text}".replace("  ", " ") for e in wrong for t in [_told(e)]
    ]
    lines += ["<details><summary>How it was measured</summary>", ""]
    for kind, how, rows in protocols(report.rows):
        told = ", ".join(f"{name} {results.plain(value)}" for name, value in how.items())
        lines.append(f"- **{kind}** of {len(rows)} trials: {told}")
    return "\n".join([*lines, "", "</details>", ""])


def _forest(grown: Forest) -> str:
    return (
        f"A random forest explains {grown.explained:.0%} of the variance of trials that it has not seen by their "
        "settings together."
    )


def _levels(share: Share) -> str:
    return ", ".join(f"{level.label}: {level.mean:.3f}" for level in share.levels)


def hours(seconds: float) -> str:
    """Slot-hours to three digits, whatever their size."""
    return f"{seconds / 3600:.3g}"


def _utc(time_ms: int | None) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if time_ms else "-"


# ---- As a page -------------------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """A page from a file in templates/, all that is put into it escaped; `base.html` holds the style of all pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from orchestrator.reports.plots import colour

    loader = PackageLoader("orchestrator.reports")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "clock": clock, "utc": _utc, "hours": hours, "plain": results.plain, "metric": _metric, "zip": zip,
    }  # fmt: skip
    environment.globals |= {"colour": colour}
    return environment.get_template(template).render(**values)


def page(report: Report) -> str:
    """The whole report as one HTML file."""
    return render(
        "report.html",
        report=report,
        verdict=verdict(report),
        experiment=write_yaml(report.kept.experiment),
        table=_table(report),
        footnote=results.footnote(report.rows, report.kept.metric).splitlines(),
        shown=results.measured_names(report.rows),
        paired=report.compared in BY_IMAGE,
        searched=list(dict.fromkeys(n for row in report.rows for n in results.short_params(row.variant))),
        shares=shares(report),
        front=front(report),
        trees=trees(report),
        forest=_forest,
        plots={name: draw(report) for name, draw in PLOTS.items()},
        parts=_parts(report),
        grids=[
            (row, step, base64.b64encode(png).decode())
            for row in report.rows
            if row.digest in report.grids
            for step, png in [report.grids[row.digest]]
        ],
        cost=[_cost(report, row) for row in report.rows],
        faults=[_told(e) for e in faults(report.happened)],
        events=[_told(e) for e in report.happened[-EVENTS:]],
        protocols=protocols(report.rows),
        warnings=sorted({text for row in report.rows for p in (row.found.summary or {}).get("passports", {}).values()
                         for text in p.get("warnings", ())}),
    )  # fmt: skip


@dataclass(frozen=True)
class Told:
    """An event for a person."""

    time_ms: int
    trial: str
    event: str
    text: str


def _told(event: Event) -> Told:
    left_out = {"time_ms", "trial", "event", "why", *(() if event["event"] == "cluster" else ("cpus", "gpus"))}
    rest = {name: value for name, value in event.items() if name not in left_out}
    words = [str(rest.pop("action"))] if "action" in rest else []
    words += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in rest.items()]
    name = "diverged" if event.get("state") == "diverged" else event["event"]
    text = "; ".join(filter(None, [", ".join(words), event.get("why")]))
    return Told(event["time_ms"], event.get("trial", "")[:8], name, text)


@dataclass(frozen=True)
class Whisker:
    """An interval on a common axis, in percent of its width."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """A row of the page's table."""

    row: Row
    params: Mapping[str, str]
    measured: Sequence[str]  # what was, in the order of `results.measured_names`
    whisker: Whisker | None
    behind: str  # the difference from the best
    mark: str  # best, same, apart, or nothing


def _table(report: Report) -> list[Entry]:
    (best, differences), metric = report.against_best, report.compared
    bounds = {
        row.digest: (m[metric], m[metric] - Z * m[f"{metric}_se"], m[metric] + Z * m[f"{metric}_se"])
        for row in report.rows
        if f"{metric}_se" in (m := row.metrics)
    }
    low = min((b[1] for b in bounds.values()), default=0.0)
    high = max((b[2] for b in bounds.values()), default=1.0)
    entries = []
    for row in report.rows:
        d, b = differences.get(row.digest), bounds.get(row.digest)
        mark = "best" if row.digest == best and len(bounds) > 1 else "same" if d and not d.clear else ""
        if b and best and row.digest != best and d is None:
            mark = "apart"
        entries.append(
            Entry(
                row,
                results.short_params(row.variant),
                [results.with_error(name, row.metrics, "–") for name in results.measured_names(report.rows)],
                Whisker(*(100 * (x - low) / ((high - low) or 1) for x in b)) if b else None,
                f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" if d else "",
                mark,
            )
        )
    return entries


def _parts(report: Report) -> list[tuple[Row, list[tuple[str, float]], float]]:
    """(trial, the parts of its bound in bits/dim, the largest bound of all) of the best GRIDS with an NLL."""
    names = {"prior": "L_T", "diffusion": "steps", "decoder": "L_0"}
    most = max((row.metrics["eval/nll_bpd"] for row in report.rows if "eval/nll_bpd" in row.metrics), default=1.0)
    return [
        (row, [(label, row.metrics[f"eval/nll_{name}_bpd"]) for name, label in names.items()], most)
        for row in report.rows
        if "eval/nll_prior_bpd" in row.metrics
    ][:GRIDS]


@dataclass(frozen=True)
class Cost:
    row: Row
    training_s: float  # slots x seconds held
    stepping_s: float  # of one worker, in training steps alone
    evaluation_s: float  # slots x seconds
    restarts: int
    retried: int  # pieces of its evaluation


def _cost(report: Report, row: Row) -> Cost:
    status, training = row.found.status or {}, row.variant.trial.training
    rate = row.images_per_s
    return Cost(
        row,
        report.use.of(row.digest, "training"),
        status.get("step", 0) * training.batch_size / rate if rate else 0.0,
        report.use.of(row.digest, "evaluation"),
        archive.times(report.happened, "restarted")[row.digest],
        archive.times(report.happened, "retried")[row.digest],
    )


# ---- The curves ------------------------------------------------------------------------------------------------


def _bits_by_t(report: Report) -> str:
    from orchestrator.reports.plots import Series, curves

    series = []
    for row in report.rows:
        if by_t := (row.found.summary or {}).get("nll_by_t"):
            T = len(by_t) - 1
            t = [i / T for i in range(1, T + 1)]
            series.append(Series(row.name, t, [max(b, 1e-9) * T for b in by_t[:-1]], report.rank[row.digest]))
    return curves("bits-by-t", series, "t / T", "T × Lₜ₋₁ (bits/dim)", log_y=True) if series else ""


def _schedules(report: Report) -> str:
    """log SNR = log(alpha_bar / (1 - alpha_bar)) of every different schedule of the sweep."""
    import numpy as np

    from orchestrator.reports.plots import Series, curves

    series: dict[str, Series] = {}
    for row in report.rows:
        diffusion = row.variant.trial.diffusion
        content = diffusion.model_dump(mode="json")
        key = json.dumps([content["T"], content["schedule"]], sort_keys=True)
        if key not in series:
            snr = log_snrs(betas(diffusion))
            t = (np.arange(len(snr)) + 1) / len(snr)
            t, snr = t[np.isfinite(snr)], snr[np.isfinite(snr)]  # jsd ends at -inf
            names = {n: v for n, v in results.short_params(row.variant).items() if n in _scheduling(row)}
            label = " ".join(f"{n}={v}" for n, v in names.items()) or f"{diffusion.schedule.kind} T={diffusion.T}"
            series[key] = Series(label, t.tolist(), snr.tolist(), len(series))
    return curves("schedules", list(series.values()), "t / T", "log SNR", legend=len(series) <= 10)


def _scheduling(row: Row) -> set[str]:
    """The short names of the searched settings that shape the noise."""
    found: set[str] = set()
    for name, value in row.variant.params.items():
        if name == "diffusion.T" or name.startswith("diffusion.schedule"):
            found |= (
                {str(n).rpartition(".")[2] for n in value} if isinstance(value, Mapping) else {name.rpartition(".")[2]}
            )
    return found


def _rate_distortion(report: Report) -> str:
    from orchestrator.reports.plots import Series, curves

    series = [
        Series(row.name, curve["rate_bpd"], curve["rmse_255"], report.rank[row.digest])
        for row in report.rows
        if (curve := (row.found.summary or {}).get("rate_distortion"))
    ]
    return curves("rate-distortion", series, "rate (bits/dim)", "distortion (RMSE, 0–255)") if series else ""


def _by_steps(report: Report) -> str:
    from orchestrator.reports.plots import Series, curves

    series = []
    for row in report.rows:
        if chains := (row.found.summary or {}).get("ledger", {}).get("optimal"):
            x, y, e = zip(*((c["steps"], c["bpd"], c["bpd_se"]) for c in chains), strict=True)
            low, high = [[b + s * Z * d for b, d in zip(y, e, strict=True)] for s in (-1, 1)]
            series.append(Series(row.name, x, y, report.rank[row.digest], low, high))
    label = "bits/dim, optimal variance"
    return curves("by-steps", series, "steps of the chain", label, log_x=True, markers=True) if series else ""


def _validation(report: Report) -> str:
    from orchestrator.reports.plots import Series, curves

    series: list[Series] = []
    for row in report.rows:
        points = [
            (p["step"], m["valid/nll_bpd"], m.get("valid/nll_bpd_se", 0.0))
            for p in report.journals[row.digest]
            if "valid/nll_bpd" in (m := p.get("metrics", {}))
        ]
        if points:
            x, y, e = zip(*sorted(points), strict=True)
            low, high = ([b + s * d for b, d in zip(y, e, strict=True)] for s in (-1, 1))
            series.append(Series(row.name, x, y, report.rank[row.digest], low, high))
    label = "valid/nll_bpd (± its standard error)"
    return curves("validation", series, "step", label, log_y=True, markers=True) if series else ""


def _scatter(report: Report) -> str:
    """Each further objective against the first. Of two the front is a line; of more, what is beaten is hollow."""
    from orchestrator.reports.plots import Series, pareto, scatter

    if not report.traded:
        return ""
    best, (first, *others) = pareto([point for _, point in report.traded]), report.objectives
    hollow = [row.name for row, point in report.traded if len(others) > 1 and point not in best]
    drawn = []
    for other in others:
        points = []
        for row, _ in report.traded:
            m = row.metrics
            one = Series(row.name, [m[first]], [m[other]], report.rank[row.digest])
            points.append((one, m.get(f"{first}_se", 0.0), m.get(f"{other}_se", 0.0)))
        values = [row.metrics[other] for row, _ in report.traded]
        log_y = min(values) > 0 and max(values) / min(values) > 5
        name = "pareto" if len(others) == 1 else f"pareto-{other.removeprefix('eval/')}"
        line = best if len(others) == 1 else []
        drawn.append(scatter(name, points, line, _axis(first), _axis(other), log_y, hollow))
    return "\n".join(drawn)


def _axis(name: str) -> str:
    return "NLL (bits/dim)" if name == "eval/nll_bpd" else _metric(name)


PLOTS: dict[str, Callable[[Report], str]] = {
    "pareto": _scatter,
    "bits_by_t": _bits_by_t,
    "schedules": _schedules,
    "rate_distortion": _rate_distortion,
    "by_steps": _by_steps,
    "validation": _validation,
}
