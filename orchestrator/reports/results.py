"""A sweep's results: rows of plain data, the table a person reads, the file pandas reads, and the plots."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator import comparing
from orchestrator.comparing import BY_IMAGE, Difference
from orchestrator.experiment import Variant
from orchestrator.plan import Found
from orchestrator.preflight import log_snr_curves, schedule_name
from orchestrator.settings import show
from orchestrator.terminal import columns
from workers.config import Trial

if TYPE_CHECKING:  # a table of results needs neither Ray nor pandas
    import pandas as pd

    from orchestrator.measuring import Measured


NLL, EVALUATIONS = "eval/nll_bpd", "eval/network_evaluations"
HEADS = {NLL: "NLL bits/dim", "eval/ode_nll_bpd": "ODE NLL bits/dim"}  # of columns
SAME = " ≈"  # after the number of a trial that cannot be told from the best


@dataclass(frozen=True)
class Row:
    """One trial's outcome."""

    digest: str
    variant: Variant
    found: Found
    error: str = ""  # why this run could not finish it

    @property
    def state(self) -> str:
        """done, or what kept it from being done."""
        if self.error:
            return "failed"
        return "done" if self.found.state == "finished" and self.found.summary is not None else self.found.state

    @property
    def metrics(self) -> dict[str, float]:
        """Measured values under MLflow's names."""
        values = dict(self.found.summary["metrics"]) if self.found.summary else {}
        valid = (self.found.status or {}).get("valid_nll_bpd")
        return {**values, **({"valid/nll_bpd": valid} if valid is not None else {})}

    @property
    def images_per_s(self) -> float | None:
        return (self.found.status or {}).get("images_per_s")

    @property
    def name(self) -> str:
        """The searched values in short, such as `T=50 beta_end=0.02 weighting=vlb`; the same in table and MLflow."""
        return " ".join(f"{key}={value}" for key, value in short_params(self.variant).items()) or "base"


def short_params(variant: Variant) -> dict[str, str]:
    """The searched values by the last name of their path; a section's values by theirs."""
    return {name: _short(value) for name, value in short_values(variant).items()}


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return show(value)  # cut to a readable length
    return f"{value:g}" if isinstance(value, float) else str(value)


def short_values(variant: Variant) -> dict[str, Any]:
    """The same as they are, not as text."""
    flat: dict[str, Any] = {}
    for path, value in variant.params.items():
        inner = value if isinstance(value, Mapping) else {path: value}
        flat |= {str(name).rpartition(".")[2]: v for name, v in inner.items()}
    return flat


def ranked(rows: Sequence[Row], metric: str, mode: str) -> list[Row]:
    """Best first; trials without the metric last, in their order."""
    sign = 1 if mode == "min" else -1
    return sorted(rows, key=lambda row: sign * row.metrics[metric] if metric in row.metrics else math.inf)


def frame(rows: Sequence[Row]) -> "pd.DataFrame":
    """A row a trial: digest, state, the searched params by dotted path, the metrics, the cost."""
    import pandas as pd

    _, differences = against_best(rows)
    return pd.DataFrame(
        {
            "trial": row.digest,
            "state": row.state,
            **{
                path: value if not isinstance(value, dict) else str(value) for path, value in row.variant.params.items()
            },
            **row.metrics,
            **_behind(row, differences),
            "step": (row.found.status or {}).get("step"),
            "images_per_s": row.images_per_s,
            "detail": row.error or (row.found.status or {}).get("detail") or "",
        }
        for row in rows
    )


def _behind(row: Row, differences: Mapping[str, Difference]) -> dict[str, float]:
    d = differences.get(row.digest)
    return {"nll_above_best_bpd": d.mean, "nll_above_best_low": d.low, "nll_above_best_high": d.high} if d else {}


def table(rows: Sequence[Row], metric: str = NLL, width: int | None = None) -> Table:
    """What a sweep that ranks on `metric` ends with, in a window of a `width`.

    A missing number is a dash, and the state says why.
    """
    shown = measured_names(rows)
    _, differences = against_best(rows, metric)
    names = list(dict.fromkeys(name for row in rows for name in short_params(row.variant)))
    counts = {row.metrics.get(EVALUATIONS) for row in rows} - {None}  # of the network, a sample: told where they differ
    cells = []
    for row in rows:
        params, metrics = short_params(row.variant), row.metrics
        evaluations = f"{metrics[EVALUATIONS]:.0f}" if EVALUATIONS in metrics else "-"
        cells.append(
            {
                "trial": row.digest[:8],
                **{name: params.get(name, "-") for name in names},
                **{
                    HEADS.get(name, name.removeprefix("eval/")): with_error(name, metrics)
                    + (_mark(row, differences) if name == compared(metric) else "")
                    for name in shown
                },
                **({"evaluations": evaluations} if len(counts) > 1 else {}),
                "images/s": f"{row.images_per_s:,.0f}" if row.images_per_s else "-",
                "state": row.state,
            }
        )
    return columns(cells, width, spare=("images/s",))


def measured_names(rows: Sequence[Row]) -> list[str]:
    """The metrics that a table of the trials shows: the bound, whatever was measured, then what else was."""
    found = {name for row in rows for name in row.metrics if is_distance(name) or name in HEADS}
    return sorted(found or {NLL}, key=lambda name: (name != NLL, name not in HEADS, name))


def with_error(name: str, metrics: Mapping[str, float], missing: str = "-", digits: int = 3) -> str:
    """A metric ± its standard error, where it has one."""
    if name not in metrics:
        return missing
    error = metrics.get(f"{name}_se")
    return f"{metrics[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def in_short(row: Row) -> str:
    """What was measured of a trial, in a line: `NLL bits/dim 2.559 ± 0.014, fd_classifier 0.570 ± 0.041`."""
    names = [name for name in measured_names([row]) if name in row.metrics]
    return ", ".join(f"{HEADS.get(name, name.removeprefix('eval/'))} {with_error(name, row.metrics)}" for name in names)


def compared(metric: str) -> str:
    """The metric by whose error bars trials are held against the best, in a sweep that ranks on `metric`."""
    return NLL if metric == "valid/nll_bpd" else metric


def against_best(rows: Sequence[Row], metric: str = NLL) -> tuple[str | None, dict[str, Difference]]:
    """The best trial by the metric that the sweep ranks on, and the differences of the others from it."""
    summaries = {row.digest: row.found.summary for row in rows if row.found.summary}
    return comparing.against_best(summaries, compared(metric))


def _mark(row: Row, differences: Mapping[str, Difference]) -> str:
    """The mark, or as much space where another trial has it."""
    if all(d.clear for d in differences.values()):
        return ""
    return SAME if row.digest in differences and not differences[row.digest].clear else " " * len(SAME)


def footnote(rows: Sequence[Row], metric: str = NLL) -> str:
    """What the mark in the table means, and which trials were measured otherwise; empty where there is nothing."""
    best, differences = against_best(rows, metric)
    name, same = str(best)[:8], [d for d in differences.values() if not d.clear]
    what, paired = compared(metric).removeprefix("eval/"), compared(metric) in BY_IMAGE
    how = "bits/dim (95 % each, paired over {n} images)" if paired else f"{what} (95 % each, by the errors of both)"
    said = [f"≈ not distinguishable from {name} in {how.format(n=d.n)}" for d in same[:1]]
    measured = [r.digest for r in rows if compared(metric) in r.metrics and r.found.summary]
    if apart := [digest[:8] for digest in measured if best and digest != best and digest not in differences]:
        said.append(f"measured by another protocol than {name}, and not held against it: {', '.join(apart)}")
    return "\n".join(said)


def is_distance(name: str) -> bool:
    """Whether a metric is a Fréchet distance at the n that was asked for."""
    return name.startswith(("eval/fd_", "eval/fid")) and not name.endswith(("_se", "_infinity"))


def markdown(rows: Sequence[Row], metric: str = NLL) -> str:
    """The table for MLflow's notes."""
    result = table(rows, metric)
    columns = [str(column.header) for column in result.columns]
    cells = zip(*(column.cells for column in result.columns), strict=True)
    lines = [columns, ["---"] * len(columns), *([str(cell).strip() for cell in line] for line in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(measured: "Measured") -> dict[str, Any]:
    """All that is known of a measurement, in plain types."""
    subject = measured.subject
    return {
        "name": subject.name,
        "trial": subject.trial,
        "checkpoint": subject.checkpoint.url,
        "blocks": dict(measured.planned),
        "blocks_run": dict(measured.missing),
        "failed": measured.failed,
        **(measured.summary or {}),
    }


def evaluation_text(measured: "Measured") -> str:
    """A measurement for a person: each number with its error, then what the numbers are."""
    subject, summary = measured.subject, measured.summary
    ran = ", ".join(f"{measured.missing[k]} of {n} {k}" for k, n in measured.planned.items())
    lines = [f"{subject.name}  {subject.checkpoint.url}", f"  blocks run      {ran}; the others were there"]
    if measured.failed or summary is None:
        return "\n".join([*lines, f"  failed          {measured.failed}", ""])
    metrics = summary["metrics"]
    lines += [
        f"  {name.removeprefix('eval/'):<28} {with_error(name, metrics, digits=4)}"
        for name in metrics
        if not name.endswith("_se")
    ]
    for variance, chains in summary.get("ledger", {}).items():
        told = ", ".join(f"{c['steps']}: {c['bpd']:.3f} ± {c['bpd_se']:.3f}" for c in chains)
        lines.append(f"  bits/dim by steps, {variance:<12} {told}")
    for kind, passport in summary["passports"].items():
        protocol = ", ".join(f"{name} {plain(value)}" for name, value in passport["protocol"].items())
        lines.append(f"  {kind + ' protocol':<16} {protocol}")
        lines += [f"  warning         {text}" for text in passport.get("warnings", ())]
    return "\n".join([*lines, f"  hash            {summary['hash']}", ""])


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items() if v is not None)
    return str(value)


def comparison_plot(rows: Sequence[Row]) -> bytes | None:
    """NLL against the Fréchet distance, a point a trial, as PNG; None where no trial has both."""
    points = [(row, row.metrics) for row in rows]
    name = next((n for _, m in points for n in m if is_distance(n)), "")
    both = [(row, m) for row, m in points if name in m and "eval/nll_bpd" in m]
    if not both:
        return None
    figure, axes = _figure()
    for row, m in both:
        axes.errorbar(m["eval/nll_bpd"], m[name], xerr=m["eval/nll_bpd_se"], fmt="o", capsize=3, label=row.name)
    axes.set(xlabel="NLL (bits/dim, standard error)", ylabel=f"{name.removeprefix('eval/')}", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def evaluations_plot(rows: Sequence[Row]) -> bytes | None:
    """The distance against network evaluations, a line for each other setting, as PNG; None where all took as many."""
    name = next((n for row in rows for n in row.metrics if is_distance(n)), "")
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if name in row.metrics:
            others = {k: v for k, v in short_params(row.variant).items() if k not in ("steps", "tolerance")}
            point = row.metrics[EVALUATIONS], row.metrics[name], row.metrics.get(f"{name}_se", 0.0)
            lines.setdefault(" ".join(f"{k}={v}" for k, v in others.items()), []).append(point)
    if len({point[0] for points in lines.values() for point in points}) < 2:
        return None
    figure, axes = _figure()
    for label, points in lines.items():
        count, distance, error = zip(*sorted(points), strict=True)
        axes.errorbar(count, distance, yerr=error, fmt="o-", capsize=3, linewidth=1, markersize=4, label=label)
    axes.set(xlabel="evaluations of the network a sample", ylabel=name.removeprefix("eval/"))
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def bits_plot(rows: Sequence[Row]) -> bytes | None:
    """Where the bits go: L_0, L_1, ..., L_T, each trial's against t / T, as PNG; None where t was sampled."""
    curves = [(row, by_t) for row in rows if row.found.summary and (by_t := row.found.summary.get("nll_by_t"))]
    if not curves:
        return None
    import numpy as np

    figure, axes = _figure()
    for row, by_t in curves:
        terms = np.array(by_t[:-1])
        T = len(terms)
        axes.plot(np.arange(1, T + 1) / T, np.maximum(terms, 1e-9) * T, label=row.name, linewidth=1)
    axes.set(xlabel="t / T", ylabel="T × L_{t-1} (bits/dim)", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def schedules_plot(trials: Mapping[str, Trial]) -> bytes | None:
    """The schedules of the trials on one axis, log SNR_t against t / T, as PNG; None where there is no trial."""
    curves = {schedule_name(trials[digest].diffusion): c for digest, c in log_snr_curves(trials).items()}
    if not curves:
        return None
    import numpy as np

    figure, axes = _figure()
    for name, curve in curves.items():
        shown = np.where(np.isfinite(curve), curve, np.nan)
        axes.plot(np.arange(1, len(curve) + 1) / len(curve), shown, label=name, linewidth=1.2)
    axes.set(xlabel="t / T", ylabel="log SNR$_t$")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(fontsize=7, loc="lower left")
    return _png(figure)


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
