"""The figures of a sweep: from its report to `Plot`s, which the page has as SVG and MLflow as PNG."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from orchestrator.experiment.metrics import DENSITY, EVALUATIONS, NLL, head_metric
from orchestrator.experiment.records import Variant
from orchestrator.measuring.seeds import Group
from orchestrator.output.figures import Plot, Series, draw_curves, draw_scatter, to_png
from orchestrator.output.findings import CURVES, Report
from orchestrator.output.graph import draw_graph
from orchestrator.state.rows import Row, shorten_params
from workers.bits import STUDENT, VALIDATIONS
from workers.code import drop_pin
from workers.config import DiffusionConfig
from workers.diffusion.schedules import betas, log_snrs
from workers.entries import load
from workers.identity import collect_settings_read
from workers.kinds import FORMULATIONS

SHARES = 200  # of the t of a continuous law, that its curve has points at
Z = 1.96  # standard errors of an interval that holds the true mean in 95 % of cases


def draw_bits(report: Report) -> list[Plot]:
    """Where the bits go: L_1, ..., L_{T-1} of each trial, against t / T; nothing where t was sampled."""
    series = []
    for row in report.with_curves:
        if by_t := (row.found.summary or {}).get("nll_by_t"):
            T = len(by_t) - 1
            first = DENSITY in row.metrics  # whose L_0 may be below 0, where the axis has no place for it
            t = [i / T for i in range(1 + first, T + 1)]
            series.append(_make_series(report, row, t, [max(b, 1e-9) * T for b in by_t[first:-1]]))
    return [draw_curves("bits-by-t", series, "t / T", "T × Lₜ₋₁ (bits/dim)", log_y=True)] if series else []


def draw_schedules(report: Report) -> list[Plot]:
    """log SNR = log(alpha_bar / (1 - alpha_bar)) of every different schedule of the sweep.

    Over t / T, which is the share of the training's t that have as much signal or more, as of a continuous law.
    """
    series: dict[str, Series] = {}
    for row in report.rows:
        diffusion = row.variant.trial.diffusion
        if not row.variant.trial.diffuses:
            continue
        read = collect_settings_read(diffusion)
        key = json.dumps({n: v for n, v in read.items() if n not in ("prediction", "variance")}, sort_keys=True)
        if key not in series and len(series) < CURVES:
            t, snr = _find_log_snrs(diffusion)
            t, snr = t[np.isfinite(snr)], snr[np.isfinite(snr)]  # jsd ends at -inf
            names = shorten_params(_keep_schedule(row.variant))
            label = " ".join(f"{n}={v}" for n, v in names.items()) or _name_noise(diffusion)
            series[key] = Series(label, t.tolist(), snr.tolist(), len(series))
    of = list(series.values()), "share of the t trained on (t / T of a chain)", "log SNR"
    return [draw_curves("schedules", *of, legend=len(series) <= 10)] if series else []


def _name_noise(diffusion: DiffusionConfig) -> str:
    """Of a schedule its kind and T, of a continuous formulation what is set of it."""
    if not diffusion.continuous:
        return f"{drop_pin(diffusion.schedule.kind)} T={diffusion.T}"
    name, *settings = collect_settings_read(diffusion, only_set=True).items()
    return " ".join([drop_pin(name[1]), *(f"{n}={v}" for n, v in settings)])


def _find_log_snrs(diffusion: DiffusionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the t of a training, and log SNR there."""
    if diffusion.continuous:
        shares = (np.arange(SHARES) + 0.5) / SHARES
        return shares, load(FORMULATIONS[diffusion.formulation].log_snrs)(diffusion, shares.tolist())
    snr = log_snrs(betas(diffusion))
    return (np.arange(len(snr)) + 1) / len(snr), snr


def _keep_schedule(variant: Variant) -> Variant:
    """What the search says of the noise alone."""
    params = variant.params.items()
    noise = r"diffusion\.(?!(prediction|variance)$)"
    return replace(variant, params={n: v for n, v in params if re.match(noise, n)})


def draw_rates(report: Report) -> list[Plot]:
    """Progressive coding: the error of the best guess against the bits sent."""
    series = [
        _make_series(report, row, curve["rate_bpd"], curve["rmse_255"])
        for row in report.with_curves
        if (curve := (row.found.summary or {}).get("rate_distortion"))
    ]
    return [draw_curves("rate-distortion", series, "rate (bits/dim)", "distortion (RMSE, 0–255)")] if series else []


def draw_chains(report: Report) -> list[Plot]:
    """The bound of shorter chains with the optimal variance."""
    series = []
    for row in report.with_curves:
        if chains := (row.found.summary or {}).get("ledger", {}).get("optimal"):
            x, y, e = zip(*((c["steps"], c["bpd"], c["bpd_se"] or 0.0) for c in chains), strict=True)
            low, high = [[b + s * Z * d for b, d in zip(y, e, strict=True)] for s in (-1, 1)]
            series.append(_make_series(report, row, x, y, low=low, high=high))
    label = f"{head_metric(report.bound)}, optimal variance" if report.bound != NLL else "bits/dim, optimal variance"
    return [draw_curves("by-steps", series, "steps of the chain", label, log_x=True, markers=True)] if series else []


def draw_validation(report: Report) -> list[Plot]:
    """The quick estimate of the bound while training, which is what schedulers see: a figure of each kind there is."""
    drawn = []
    for name in VALIDATIONS:
        series: list[Series] = []
        for row in report.with_curves:
            points = [
                (p["step"], m[name], m.get(f"{name}_se", 0.0))
                for p in report.journals[row.digest]
                if name in (m := p.get("metrics", {}))
            ]
            if points:
                x, y, e = zip(*sorted(points), strict=True)
                low, high = ([b + s * d for b, d in zip(y, e, strict=True)] for s in (-1, 1))
                series.append(_make_series(report, row, x, y, low=low, high=high))
        label, log_y = f"{name} (± its standard error)", name in (VALIDATIONS[0], STUDENT)  # others may be below 0
        of = f"validation-{name.rpartition('/')[2]}".removesuffix("_bpd").removesuffix("-nll")
        drawn += [draw_curves(of, series, "step", label, log_y=log_y, markers=True)] if series else []
    return drawn


def draw_front(report: Report) -> list[Plot]:
    """Each further objective against the first. Of two the front is a line; of more, what is beaten is hollow."""
    if not report.traded:
        return []
    front, (first, *others) = report.front, report.objectives
    on_front = {group.digest for group in front}
    beaten = [group for group in report.traded if group.digest not in on_front]
    hollow = {group.name for group in beaten} if len(others) > 1 else set()
    named = {group.digest for group in (*front, *beaten)[:CURVES]}
    ordered = sorted(report.traded, key=lambda group: group.digest not in named)
    drawn = []
    for other in others:
        points = [
            (
                Series(group.name, [group.metrics[first]], [group.metrics[other]], report.rank[group.digest]),
                _get_error(group, first),
                _get_error(group, other),
            )
            for group in ordered
        ]
        values = [group.metrics[other] for group in report.traded]
        log_y = min(values) > 0 and max(values) / min(values) > 5
        name = "pareto" if len(others) == 1 else f"pareto-{other.removeprefix('eval/')}"
        steps = sorted({(group.metrics[first], group.metrics[other]) for group in front})
        line = steps if len(others) == 1 else []
        drawn.append(
            draw_scatter(
                name, points, line, _label_axis(first), _label_axis(other), log_y=log_y, named=CURVES, hollow=hollow
            )
        )
    return drawn


def draw_evaluations(report: Report) -> list[Plot]:
    """The distance against network evaluations, a line for each other setting; nothing where all took as many."""
    sampler = r"evaluation\.fid\.sampler(\.steps|\.tolerance)?$"
    series = _make_lines(report, report.distance, lambda group: group.metrics.get(EVALUATIONS), sampler)
    labels = "evaluations of the network a sample", f"{head_metric(report.distance)} (± its standard error)"
    drawn = draw_curves("evaluations", series, *labels, log_x=True, log_y=True, markers=True, legend=len(series) > 1)
    return [drawn] if series else []


def draw_training_steps(report: Report) -> list[Plot]:
    """bits/dim and the distance over training, a line for each other setting, where several `training.steps` were
    measured."""
    drawn = []
    for metric in filter(None, (report.bound, report.distance)):
        steps = r"training(\.steps)?$"
        series = _make_lines(report, metric, lambda group: float(group.variant.trial.training.steps), steps)
        labels = "training steps", f"{_label_axis(metric)} (± its standard error)"
        name = f"training-steps-{metric.removeprefix('eval/')}"
        if series:
            drawn.append(draw_curves(name, series, *labels, log_x=True, markers=True, legend=len(series) > 1))
    return drawn


def draw_guidance(report: Report) -> list[Plot]:
    """The distance, precision and recall by the scale of guidance, a line for each other setting, where it was
    searched."""
    path = "evaluation.fid.sampler.guidance"
    if not any(path in group.variant.params for group in report.groups):
        return []
    measured = {name: None for group in report.groups for name in group.metrics}
    drawn = []
    for metric in filter(None, [report.distance, *(n for n in measured if re.match(r"eval/(precision|recall)", n))]):
        series = _make_lines(report, metric, _get_guidance, path.replace(".", r"\.") + "$")
        name = f"guidance-{metric.removeprefix('eval/')}"
        if series:
            labels = "scale of guidance (1: by the label alone)", _label_axis(metric)
            drawn.append(draw_curves(name, series, *labels, markers=True, legend=len(series) > 1))
    return drawn


def _get_guidance(group: Group) -> float | None:
    """The scale that the samples of a group were drawn with."""
    fid = group.variant.trial.evaluation.fid
    return None if fid is None else 1.0 if fid.sampler.guidance is None else fid.sampler.guidance


def draw_widths(report: Report) -> list[Plot]:
    """bits/dim and the distance by the width of the average that is measured, a line for each other setting."""
    path = r"evaluation\.ema_width$"
    drawn = []
    for metric in filter(None, (report.bound, report.distance)):
        series = _make_lines(report, metric, lambda group: group.variant.trial.evaluation.ema_width, path)
        labels = "width of the average, sigma_rel", f"{_label_axis(metric)} (± its standard error)"
        name = f"widths-{metric.removeprefix('eval/')}"
        if series:
            drawn.append(draw_curves(name, series, *labels, markers=True, legend=len(series) > 1))
    return drawn


def _make_lines(report: Report, metric: str, x_of: Callable[[Group], float | None], along: str) -> list[Series]:
    """A metric against `x_of`, a line for all that differ in settings `along` it alone (a pattern of their paths).

    Nothing where all have the same x.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for group in report.groups:
        if metric in group.metrics and (place := x_of(group)) is not None:
            others = {path: value for path, value in group.variant.params.items() if not re.match(along, path)}
            names = shorten_params(replace(group.variant, params=others)).items()
            point = place, group.metrics[metric], _get_error(group, metric)
            lines.setdefault(" ".join(f"{name}={value}" for name, value in names), []).append(point)
    if len({point[0] for points in lines.values() for point in points}) < 2:
        return []
    series: list[Series] = []
    for label, points in itertools.islice(lines.items(), CURVES):
        x, y, e = zip(*sorted(points), strict=True)
        low, high = ([b + s * d for b, d in zip(y, e, strict=True)] for s in (-1, 1))
        series.append(Series(label or head_metric(metric), x, y, len(series), low, high))
    return series


def _make_series(
    report: Report,
    row: Row,
    x: Sequence[float],
    y: Sequence[float],
    *,
    low: Sequence[float] = (),
    high: Sequence[float] = (),
) -> Series:
    """The curve of a row, in the colour of its group and by its own name."""
    rank = report.rank[row.digest]
    return Series(row.name, x, y, rank, low, high, report.groups[rank].name)


def _get_error(group: Group, metric: str) -> float:
    """The standard error that a point's bar shows: over seeds where there are several, else over images or samples."""
    own = group.metrics.get(f"{metric}_se", 0.0)
    return group.seed_errors.get(metric, own) if group.over_seeds else own


def _label_axis(name: str) -> str:
    return {NLL: "NLL (bits/dim)", DENSITY: "density (bits/dim)"}.get(name) or head_metric(name)


PLOTS: dict[str, Callable[[Report], list[Plot]]] = {
    "pareto": draw_front,
    "bits_by_t": draw_bits,
    "schedules": draw_schedules,
    "rate_distortion": draw_rates,
    "by_steps": draw_chains,
    "validation": draw_validation,
    "evaluations": draw_evaluations,
    "training_steps": draw_training_steps,
    "guidance": draw_guidance,
    "widths": draw_widths,
    "graph": draw_graph,
}
# Those that lie beside a sweep's results as files, and in MLflow.
FILES = {
    "pareto": "nll_and_distance",
    "bits_by_t": "nll_by_t",
    "evaluations": "distance_by_evaluations",
    "schedules": "schedules",
}


def draw_png_files(report: Report) -> dict[str, bytes]:
    """The files by their names. The front of a search with objectives of its own is `pareto` in the name of each."""
    own = {name: file for name, file in FILES.items() if name != "pareto" or not report.kept.also}
    drawn = {file: plot for name, file in own.items() for plot in PLOTS[name](report)}
    drawn |= {plot.name: plot for plot in draw_front(report)} if report.kept.also else {}
    drawers = draw_training_steps, draw_guidance, draw_widths, draw_graph
    drawn |= {plot.name: plot for draw in drawers for plot in draw(report)}
    return {f"{name.replace('/', '_')}.png": to_png(plot) for name, plot in drawn.items()}
