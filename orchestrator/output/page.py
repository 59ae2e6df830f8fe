"""The report of a sweep as one self-contained HTML page.

Everything comes from the storage's files: no Ray, no torch.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.metrics import NLL, head_metric
from orchestrator.experiment.settings import write_yaml
from orchestrator.measuring.differences import BY_IMAGE, compute_student_reach
from orchestrator.measuring.seeds import Group, compare_groups, group_rows
from orchestrator.measuring.slowness import find_slow_trials
from orchestrator.output.findings import (
    CURVES,
    GRIDS,
    Report,
    compute_shares,
    describe_forest,
    format_hours,
    format_utc,
    grow_trees,
    list_averages,
    list_faults,
    list_protocols,
    list_starts,
    tell_event,
    write_verdict,
)
from orchestrator.output.speed_table import describe_peaks, list_kinds, list_speed_lines
from orchestrator.output.table import format_means, format_value, list_measured, make_footnote
from orchestrator.output.terminal import format_clock
from orchestrator.state.events import count_events
from orchestrator.state.rows import Row, shorten_params

EVENTS = 400  # events that are listed
Z = 1.96  # standard errors of an interval that holds the true mean in 95 % of cases


def render(template: str, **values: Any) -> str:
    """A page from a file in templates/, all that is put into it escaped; `base.html` holds the style of all pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from orchestrator.output.figures import name_colour

    loader = PackageLoader("orchestrator.output")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "clock": format_clock, "utc": format_utc, "hours": format_hours, "plain": format_value,
        "metric": head_metric, "zip": zip,
    }  # fmt: skip
    environment.globals |= {"colour": name_colour}
    return environment.get_template(template).render(**values)


def render_report(report: Report) -> str:
    """The whole report as one HTML file."""
    from orchestrator.output.curves import PLOTS
    from orchestrator.output.figures import to_svg

    return render(
        "report.html",
        report=report,
        verdict=write_verdict(report),
        experiment=write_yaml(report.kept.experiment),
        table=list_entries(report),
        rows=list_entries(report, each=True) if report.over_seeds else [],
        footnote=make_footnote(report.rows, report.kept.metric, report.each).splitlines(),
        shown=list_measured(report.rows),
        curves=CURVES,
        list_searched=list_searched,
        paired=report.compared in BY_IMAGE,
        shares=compute_shares(report),
        trees=grow_trees(report),
        forest=describe_forest,
        plots={name: "\n".join(map(to_svg, draw(report))) for name, draw in PLOTS.items()},
        parts=_list_parts(report),
        grids=[
            (group.rows[0], step, base64.b64encode(png).decode())
            for group in report.groups
            if group.digest in report.grids
            for step, png in [report.grids[group.digest]]
        ],
        starts=list_starts(report),
        cost=_list_costs(report),
        speeds=list_speed_lines(report.groups),
        kinds=list_kinds(report.rows),
        peaks=describe_peaks(report.rows),
        slow=find_slow_trials(report.rows),
        faults=[tell_event(e) for e in list_faults(report.happened)],
        events=[tell_event(e) for e in report.happened[-EVENTS:]],
        protocols=list_protocols(report.rows),
        averages=list_averages(report.rows),
        warnings=sorted({text for row in report.rows for p in (row.found.summary or {}).get("passports", {}).values()
                         for text in p.get("warnings", ())}),
    )  # fmt: skip


@dataclass(frozen=True)
class Whisker:
    """An interval on a common axis, in percent of its width."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class PageRow:
    """A line of the page's table."""

    group: Group
    params: Mapping[str, str]
    seeds: str  # how many its means are of
    measured: Sequence[str]  # what was, in the order of `list_measured`
    whisker: Whisker | None
    behind: str  # the difference from the best
    mark: str  # best, same, apart, or nothing


def list_entries(report: Report, each: bool = False) -> list[PageRow]:
    """The lines of the table; `each`, those of the single rows although they are taken together."""
    groups = group_rows(report.rows, each=True) if each else report.groups
    best, differences = compare_groups(groups, report.compared) if each else report.against_best
    bounds = {group.digest: b for group in groups if (b := _compute_interval(group, report.compared))}
    low = min((b[1] for b in bounds.values()), default=0.0)
    high = max((b[2] for b in bounds.values()), default=1.0)
    entries, shown = [], list_measured(report.rows)
    for group in groups:
        d, b = differences.get(group.digest), bounds.get(group.digest)
        mark = "best" if group.digest == best and len(bounds) > 1 else "same" if d and not d.clear else ""
        if b and best and group.digest != best and d is None:
            mark = "apart"
        entries.append(
            PageRow(
                group,
                shorten_params(group.variant),
                group.count_seeds(report.kept.metric),
                [format_means(name, group, "–") for name in shown],
                Whisker(*(100 * (x - low) / ((high - low) or 1) for x in b)) if b else None,
                f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" if d else "",
                mark,
            )
        )
    return entries


def list_searched(entries: Sequence[PageRow]) -> list[str]:
    """The settings that have a column."""
    return list(dict.fromkeys(name for entry in entries for name in entry.params))


def _compute_interval(group: Group, metric: str) -> tuple[float, float, float] | None:
    """(value, low, high) of a whisker: Z of its standard errors, or where it is wider Student's interval over seeds."""
    if f"{metric}_se" not in group.metrics:
        return None
    value, reach = group.metrics[metric], Z * group.metrics[f"{metric}_se"]
    if metric in group.seed_errors:
        reach = max(reach, compute_student_reach(len(group.values(metric)) - 1) * group.seed_errors[metric])
    return value, value - reach, value + reach


def _list_parts(report: Report) -> list[tuple[Group, list[tuple[str, float]], float]]:
    """(trial, the parts of its bound in bits/dim, the largest bound of all) of the best GRIDS with an NLL.

    The parts of a density are no shares of it, nor of the bound by latents, as L_0 may be below 0.
    """
    names = {"prior": "L_T", "diffusion": "steps", "decoder": "L_0"}
    most = max((group.metrics[NLL] for group in report.groups if NLL in group.metrics), default=1.0)
    return [
        (group, [(label, group.metrics[f"eval/nll_{name}_bpd"]) for name, label in names.items()], most)
        for group in report.groups
        if "eval/nll_prior_bpd" in group.metrics and "eval/nll_posterior_bpd" not in group.metrics
    ][:GRIDS]


@dataclass(frozen=True)
class RowCost:
    """Of a group: the sum over its rows."""

    group: Group
    training_s: float  # slots x seconds held
    stepping_s: float  # of one worker, in training steps alone
    evaluation_s: float  # slots x seconds
    restarts: int
    retried: int  # pieces of its evaluation


def _list_costs(report: Report) -> list[RowCost]:
    held = report.use.by_trial
    restarted, retried = (count_events(report.happened, name) for name in ("restarted", "retried"))

    def sum_stepping(row: Row) -> float:
        training = row.variant.trial.training
        images = (row.found.step - training.trunk_steps) * training.batch_size
        return images / row.images_per_s if row.images_per_s else 0.0

    def make_cost(group: Group) -> RowCost:
        names = [row.digest for row in group.rows]
        return RowCost(
            group,
            sum(held[name, "training"] for name in names),
            sum(map(sum_stepping, group.rows)),
            sum(held[name, "evaluation"] for name in names),
            sum(restarted[name] for name in names),
            sum(retried[name] for name in names),
        )

    return [make_cost(group) for group in report.groups]
