"""The rows of a sweep as a table: in the terminal, as Markdown, and as the frame that results.parquet holds.

Rows that differ in the seed alone are one line of it, unless `each` of them is asked for; see `measuring.seeds`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.experiment.records import Variant
from orchestrator.measuring.differences import BY_IMAGE, Difference
from orchestrator.measuring.seeds import Group, are_over_seeds, compare_groups, group_rows
from orchestrator.output.speed_table import format_share
from orchestrator.output.terminal import make_columns_table

if TYPE_CHECKING:  # a table of results needs neither Ray nor pandas
    import pandas as pd
from orchestrator.experiment.metrics import DENSITY, EVALUATIONS, NLL, head_metric
from orchestrator.state.rows import SPEED, Row, is_distance, shorten_params

SAME = " ≈"  # after the number of a trial that cannot be told from the best
OVER_SEEDS = (
    "means over seeds ± their standard errors over seeds / over images (of a distance: over samples); "
    "status and report show each seed with --rows"
)


def make_frame(rows: Sequence[Row], collapse_seeds: bool = False) -> "pd.DataFrame":
    """A row a trial: digest, state, the searched params by dotted path, the metrics, the cost, the speeds (`perf/`).

    With `collapse_seeds`, and where seeds were searched, a row for those that differ in the seed alone: `trials` has
    their digests, `seeds` how many there are; of a metric `m` there are the mean `m`, the standard errors over seeds
    `m_se_seeds` and over images or samples `m_se`, and `m_seeds`, how many of the seeds have it.
    """
    import pandas as pd

    groups = group_rows(rows, each=not collapse_seeds)
    over_seeds = are_over_seeds(groups)
    behind = {name: compare_groups(groups, name)[1] for name in (NLL, DENSITY)}
    params = make_columns([group.variant for group in groups])
    return pd.DataFrame(
        {
            **({"trials": [row.digest for row in g.rows], "seeds": len(g.rows)} if over_seeds else {"trial": g.digest}),
            "state": g.state,
            **{path: values[i] for path, values in params.items()},
            **g.metrics,
            **(_make_seed_columns(g) if over_seeds else {}),
            **_list_behind(g, behind),
            **_make_cost_columns(g),
            **{name: value for name, value in g.speeds.items() if name != f"{SPEED}images_per_s"},  # which is above
        }
        for i, g in enumerate(groups)
    )


def _make_seed_columns(group: Group) -> dict[str, float]:
    names = [name for name in group.metrics if not name.endswith("_se")]
    counts = {f"{name}_seeds": float(len(group.values(name))) for name in names}
    return {**{f"{name}_se_seeds": error for name, error in group.seed_errors.items()}, **counts}


def _make_cost_columns(group: Group) -> dict[str, Any]:
    """How far the rows came, the fewest steps of several; their rate; and remarks on them."""
    statuses = [row.found.status or {} for row in group.rows]
    steps = [row.found.step for row in group.rows if row.found.status]
    details = [row.error or status.get("detail") or "" for row, status in zip(group.rows, statuses, strict=True)]
    return {
        "step": min(steps, default=None),
        "images_per_s": group.images_per_s,
        "detail": "; ".join(filter(None, details)),
    }


def make_columns(variants: Sequence[Variant]) -> dict[str, list[Any]]:
    """The searched values by path, as a table's columns take them: each a number, a truth value, a text or a list.

    Where the values of a path are of several kinds, all are texts.
    """
    paths = dict.fromkeys(path for variant in variants for path in variant.params)
    return {path: _make_column([variant.params.get(path) for variant in variants]) for path in paths}


def _make_column(values: Sequence[Any]) -> list[Any]:
    kinds = {_choose_kind(value) for value in values if value is not None}
    if len(kinds) > 1 and all(kind.startswith("list") for kind in kinds):
        kinds.discard("list")  # one without anything in it goes with any other
    if len(kinds) == 1 and "text" not in kinds:
        return list(values)
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]


def _choose_kind(value: Any) -> str:
    match value:
        case bool():
            return "truth value"
        case float():
            return "number"
        case int():
            return "number" if abs(value) < 2**63 else "text"
        case list() | tuple() if len(inside := {_choose_kind(v) for v in value}) < 2 and "text" not in inside:
            return f"list {''.join(inside)}" if inside else "list"
    return "text"


def _list_behind(group: Group, behind: Mapping[str, Mapping[str, Difference]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, differences in behind.items():
        if d := differences.get(group.digest):
            name = metric.removeprefix("eval/").removesuffix("_bpd")
            found |= {f"{name}_above_best_{end}": x for end, x in (("bpd", d.mean), ("low", d.low), ("high", d.high))}
    return found


def make_table(rows: Sequence[Row], metric: str = NLL, width: int | None = None, each: bool = False) -> Table:
    """What a sweep that ranks on `metric` ends with, in a window of a `width`.

    A missing number is a dash, and the state says why.
    """
    groups = group_rows(rows, each)
    shown, over_seeds = list_measured(groups), are_over_seeds(groups)
    _, differences = compare_groups(groups, choose_compared_metric(metric))
    names = list(dict.fromkeys(name for group in groups for name in shorten_params(group.variant)))
    counts = {g.metrics.get(EVALUATIONS) for g in groups} - {None}  # of the network, a sample: told where they differ
    shares = any(g.of_peak is not None for g in groups)
    cells, all_clear = [], all(d.clear for d in differences.values())
    for group in groups:
        params, metrics = shorten_params(group.variant), group.metrics
        evaluations = f"{metrics[EVALUATIONS]:.0f}" if EVALUATIONS in metrics else "-"
        cells.append(
            {
                **({} if over_seeds else {"trial": group.digest[:8]}),
                **{name: params.get(name, "-") for name in names},
                **({"seeds": group.count_seeds(metric)} if over_seeds else {}),
                **{
                    head_metric(name): format_means(name, group)
                    + (
                        _format_mark(group, differences)
                        if name == choose_compared_metric(metric) and not all_clear
                        else ""
                    )
                    for name in shown
                },
                **({"evaluations": evaluations} if len(counts) > 1 else {}),
                "images/s": f"{group.images_per_s:,.0f}" if group.images_per_s else "-",
                **({"of peak": format_share(group.of_peak)} if shares else {}),
                "state": group.state,
            }
        )
    return make_columns_table(cells, width, spare=("of peak", "images/s"))


def list_measured(rows: Sequence[Row | Group]) -> list[str]:
    """The metrics that a table of the trials shows: the bound, whatever was measured, then what else was."""
    found = {name for row in rows for name in row.metrics if is_distance(name) or name in BY_IMAGE}
    return sorted(found or {NLL}, key=lambda name: (name not in (NLL, DENSITY), name not in BY_IMAGE, name))


def format_metric(name: str, metrics: Mapping[str, float], missing: str = "-", digits: int = 3) -> str:
    """A metric ± its standard error, where it has one."""
    if name not in metrics:
        return missing
    error = metrics.get(f"{name}_se")
    return f"{metrics[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def format_means(name: str, group: Group, missing: str = "-") -> str:
    """As `format_metric`; of a mean over seeds, as `format_mean`."""
    if not group.over_seeds:
        return format_metric(name, group.metrics, missing)
    return format_mean(name, group.metrics, group.seed_errors, missing)


def format_mean(name: str, metrics: Mapping[str, float], seed_errors: Mapping[str, float], missing: str = "-") -> str:
    """A mean over seeds ± its standard error over seeds / over images."""
    if name not in metrics:
        return missing
    errors = seed_errors.get(name), metrics.get(f"{name}_se")
    return f"{metrics[name]:.3f} ± " + " / ".join(missing if error is None else f"{error:.3f}" for error in errors)


def describe_row(row: Row) -> str:
    """What was measured of a trial, in a line: `NLL bits/dim 2.559 ± 0.014, fd_classifier 0.570 ± 0.041`."""
    names = [name for name in list_measured([row]) if name in row.metrics]
    return ", ".join(f"{head_metric(name)} {format_metric(name, row.metrics)}" for name in names)


def choose_compared_metric(metric: str) -> str:
    """The metric by whose error bars trials are held against the best, in a sweep that ranks on `metric`."""
    return {"valid/nll_bpd": NLL, "valid/density_bpd": DENSITY}.get(metric, metric)


def _format_mark(group: Group, differences: Mapping[str, Difference]) -> str:
    """The mark, or as much space, as another trial has it."""
    return SAME if group.digest in differences and not differences[group.digest].clear else " " * len(SAME)


def make_footnote(rows: Sequence[Row], metric: str = NLL, each: bool = False) -> str:
    """What the numbers and the mark in the table mean, and which trials were measured otherwise; empty where there is
    nothing to say."""
    groups, compared = group_rows(rows, each), choose_compared_metric(metric)
    best, differences = compare_groups(groups, compared)
    labels: dict[str, str] = {group.digest: group.label for group in groups}
    over_seeds = are_over_seeds(groups)
    name, same = labels.get(str(best), ""), [d for d in differences.values() if not d.clear]
    remarks = [OVER_SEEDS] if over_seeds else []
    also = ", and over seeds by Welch's test" if over_seeds else ""
    what, how = head_metric(compared), "by the errors of both"
    if compared in BY_IMAGE:
        what, how = "bits/dim", f"paired over {same[0].n if same else 0} images"
    if same:
        remarks.append(f"≈ not distinguishable from {name} in {what} (95 % each, {how}{also})")
    measured = [g.digest for g in groups if compared in g.metrics and g.summary]
    if apart := [labels[digest] for digest in measured if best and digest != best and digest not in differences]:
        remarks.append(f"measured by another protocol than {name}, and not held against it: {', '.join(apart)}")
    return "\n".join(remarks)


def make_markdown(rows: Sequence[Row], metric: str = NLL, each: bool = False) -> str:
    """The table for MLflow's notes."""
    result = make_table(rows, metric, each=each)
    columns = [str(column.header) for column in result.columns]
    cells = zip(*(column.cells for column in result.columns), strict=True)
    lines = [columns, ["---"] * len(columns), *([str(cell).strip() for cell in line] for line in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items() if v is not None)
    return str(value)
