"""The ready-made comparison of a sweep in MLflow: shared views of its runs page, as pure functions of data.

A shared view is a tag of the experiment that MLflow's page reads. Its format is internal to MLflow 3.17, to which the
project is pinned; tests/browser opens the views in a real browser. Each is one of

    the comparison       every trial: parallel coordinates, NLL against distance, validation, samples, settings
    over seeds           where seeds were searched, and then the first: means over trials that differ in the seed alone
    the Pareto front     the trials that no other beats in all that was measured
    samples <n>-<m>      of more than ten trials: the images of ten at a time, which is all that MLflow shows at once
    by <setting>         means over the trials that share a value of one searched setting
"""

import base64
import colorsys
import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from orchestrator.state.rows import SEED, find_pareto_front

PARENT = "mlflow.parentRunId"
PARETO, COLOUR, PART = "pareto", "mlflow.runColor", "orchestrator.part"  # tags of a trial's run
SETTING = "orchestrator.setting"  # and, where seeds are searched, what it shares with those of other seeds
ALL, OVER_SEEDS = "all trials", "over seeds"  # titles of views
FRONT, BEATEN = "front", "beaten"
SETTINGS = 12  # more searched settings than these get no charts and views of their own: a tag holds 5,000 characters
IMAGE_TRIALS, IMAGES_A_ROW = 10, 3  # MLflow shows images of the first ten runs; so many abreast on a usual screen
PARTS = 20  # more parts of ten trials get no views of their own
GENERATED = ("eval", "train", "valid")  # sections that MLflow fills with a chart for every metric

Chart = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ComparisonView:
    """What the views show: `params` against `metrics`, smaller being better and the first ranking the trials."""

    params: tuple[str, ...]
    metrics: tuple[str, ...]
    curve: str = ""  # a metric that is logged as the training goes on
    images: tuple[str, ...] = ()
    trials: int = 0  # how many there are: the panel of images is made high enough for them
    front: int = 0  # how many of them are on the Pareto front
    best: str = ""  # the id of the row that the others are held against
    over_seeds: bool = False  # whether trials differ in the seed alone, and have the tag SETTING

    @property
    def title(self) -> str:
        """Of the view that is shown first."""
        return OVER_SEEDS if self.over_seeds else ALL


@dataclass(frozen=True, kw_only=True)
class View:
    title: str
    state: Mapping[str, Any]


def make_views(compare: ComparisonView, parent_id: str, image_step: int, best_id: str) -> list[View]:
    """All views of the sweep whose own run is `parent_id`, the one that is shown first in front.

    `image_step` is the step whose images are shown, `best_id` the run that differences are taken from, if known.
    """
    everything = _make_page(compare, filter_children(parent_id), _make_sections(compare, image_step, best_id))
    result = [View(title=OVER_SEEDS, state=_group_over_seeds(compare, parent_id))] if compare.over_seeds else []
    result.append(View(title=ALL, state=everything))
    if len(compare.metrics) > 1:
        chosen = f"{filter_children(parent_id)} and tags.{PARETO} = '{FRONT}'"
        sections = _make_sections(replace(compare, trials=compare.front), image_step, best_id)
        result.append(View(title="the Pareto front", state=_make_page(compare, chosen, sections)))
    if compare.images and compare.trials > IMAGE_TRIALS:
        for first in range(0, min(compare.trials, PARTS * IMAGE_TRIALS), IMAGE_TRIALS):
            last = min(first + IMAGE_TRIALS, compare.trials)
            chosen = f"{filter_children(parent_id)} and tags.`{PART}` = '{name_part(first)}'"
            state = _make_page(compare, chosen, [_make_samples(compare, last - first, image_step)])
            result.append(View(title=f"samples {first + 1}-{last}", state=state))
    settings = [param for param in compare.params[:SETTINGS] if not (compare.over_seeds and param == SEED)]
    return result + [
        View(title=f"by {param}", state=_group_by_setting(compare, parent_id, param)) for param in settings
    ]


def filter_children(parent_id: str) -> str:
    """The filter of a sweep's trials."""
    return f"tags.`{PARENT}` = '{parent_id}'"


def name_part(number: int) -> str:
    """The part of ten trials that a trial belongs to, by its number in the experiment, from 0 on."""
    return str(number // IMAGE_TRIALS + 1)


def make_tag(name: str, state: Mapping[str, Any], time_ms: int) -> str:
    """The value of an experiment's tag `mlflow.sharedViewState.<key>`."""
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": packed})


def address_page(experiment_id: str, key: str = "", parent_id: str = "") -> str:
    """The address, behind the server's, of a view by its key, or else of the trials' charts as MLflow makes them.

    A filter in the address would switch the view off: the view holds the same filter.
    """
    choice = f"viewStateShareKey={key}" if key else f"searchFilter={quote(filter_children(parent_id))}"
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&{choice}&compareRunsMode=CHART"


def make_pareto_tags(
    groups: Sequence[Sequence[str]], points: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, str]]:
    """The tags that make the front readable: a trial keeps its hue, and turns pale when another beats it.

    `groups` has the ids of all rows, those that differ in the seed alone together: they share their hue, and
    their point, which is at the first of them. `points` has what is measured; what is not is as vivid as the front.
    """
    front = find_pareto_front(points)
    tags: dict[str, dict[str, str]] = {}
    for number, (first, *others) in enumerate(groups):
        beaten = first in points and first not in front
        own = {COLOUR: choose_colour(number, pale=beaten)}
        if first in points:
            own[PARETO] = BEATEN if beaten else FRONT
        tags |= {row: dict(own) for row in (first, *others)}
    return tags


def choose_colour(number: int, pale: bool = False) -> str:
    """Of a trial by its number. Hues of neighbouring numbers lie far apart: a golden section of the circle."""
    hue = (0.6 + number * 0.381966) % 1
    lightness, saturation = (0.82, 0.45) if pale else (0.42, 0.85)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


def find_common_step(images: Iterable[Collection[int]]) -> int:
    """The last step at which every trial that has images has one; the last of all where there is none."""
    steps = [set(own) for own in images if own]
    if not steps:
        return 0
    return max(set.intersection(*steps) or set.union(*steps))


def _make_sections(compare: ComparisonView, image_step: int, best_id: str) -> list[tuple[str, int, int, list[Chart]]]:
    """(title, columns, height in pixels, charts) of the comparison, from the top of the page to its end."""
    first, *others = compare.metrics
    settings = compare.params[:SETTINGS]
    trade_off = [_make_scatter(_make_metric(first), _make_metric(other)) for other in others]
    if compare.curve:
        trade_off.append(_make_line(compare.curve))
    return [
        ("Settings and results", 1, 330, [_make_parallel(compare)]),
        ("Pareto front (vivid), validation", max(2, min(len(trade_off), 3)), 400, trade_off),
        _make_samples(compare, compare.trials, image_step),
        (
            "By setting",
            max(2, min(len(settings), 3)),
            330,
            [_make_scatter(_make_param(p), _make_metric(m)) for m in compare.metrics for p in settings],
        ),
        ("Differences from the best", 1, 400, [_make_difference(best_id)]),
    ]


def _make_samples(compare: ComparisonView, trials: int, image_step: int) -> tuple[str, int, int, list[Chart]]:
    """The section of the images: those of the first ten runs on the page, which are the best of it."""
    rows = math.ceil(min(trials, IMAGE_TRIALS) / IMAGES_A_ROW)
    charts = [
        {"type": "IMAGE", "displayName": key, "imageKeys": [key], "step": image_step, "showRunParams": False}
        for key in compare.images
    ]
    title = "Samples, the best trial last" if trials <= IMAGE_TRIALS else "Samples of the ten best, the best last"
    return title, 1, max(450, 160 + 290 * rows), charts


def _group_by_setting(compare: ComparisonView, parent_id: str, param: str) -> dict[str, Any]:
    """Means over the trials that share the value of a setting."""
    return _make_means(compare, parent_id, "param", param, title=f"Means by {param}", more=[])


def _group_over_seeds(compare: ComparisonView, parent_id: str) -> dict[str, Any]:
    """Means over the trials that share a tag, which MLflow lists under it, each a click away.

    MLflow groups by tags as by params, and shows means alone: the errors over seeds stand in the note of the sweep.
    Parallel coordinates, images and differences are not to be had of groups.
    """
    first, *others = compare.metrics
    trade_off = [_make_scatter(_make_metric(first), _make_metric(other)) for other in others]
    return _make_means(compare, parent_id, "tag", SETTING, title="Means over seeds", more=trade_off)


def _make_means(
    compare: ComparisonView, parent_id: str, mode: str, by: str, *, title: str, more: Sequence[Chart]
) -> dict[str, Any]:
    bars = [{"type": "BAR", "metricKey": metric} for metric in compare.metrics]
    curve = [_make_line(compare.curve)] if compare.curve else []
    sections = [(title, 2, 400, [*bars, *more, *curve])]
    group = {"aggregateFunction": "average", "groupByKeys": [{"mode": mode, "groupByData": by}]}
    return {
        **_make_page(compare, filter_children(parent_id), sections),
        "groupBy": group,
        "useGroupedValuesInCharts": True,
    }


def _make_page(
    compare: ComparisonView, chosen: str, sections: Sequence[tuple[str, int, int, Sequence[Chart]]]
) -> dict[str, Any]:
    charts, heads = [], []
    for number, (name, columns, height, own) in enumerate(sections):
        section = f"section-{number}"
        common = {"runsCountToCompare": 100, "metricSectionId": section, "deleted": False, "isGenerated": False}
        charts += [{"uuid": f"{section}-{i}", **common, **chart} for i, chart in enumerate(own)]
        if own:
            heads.append({"uuid": section, "name": name, "display": True, "columns": columns, "cardHeight": height})
    heads += [{"uuid": name, "name": name, "display": False} for name in GENERATED]  # folded, below all else
    first = compare.metrics[0]
    return {
        "searchFilter": chosen,
        "orderByKey": f"metrics.`{first}`",
        "orderByAsc": True,
        "selectedColumns": [f"params.`{p}`" for p in compare.params] + [f"metrics.`{m}`" for m in compare.metrics],
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunCharts": charts,
        "compareRunSections": [{"isReordered": True, "isGenerated": False, **head} for head in heads],
    }


def _make_metric(key: str) -> dict[str, str]:
    return {"key": key, "type": "METRIC", "dataAccessKey": key}


def _make_param(key: str) -> dict[str, str]:
    return {"key": key, "type": "PARAM"}


def _make_scatter(x: Mapping[str, str], y: Mapping[str, str]) -> Chart:
    return {"type": "SCATTER", "displayName": f"{y['key']} against {x['key']}", "xaxis": x, "yaxis": y}


def _make_parallel(compare: ComparisonView) -> Chart:
    """The last metric colours the lines: it is the one that ranks the trials."""
    return {
        "type": "PARALLEL",
        "displayName": f"{compare.metrics[0]} by what was searched",
        "selectedParams": list(compare.params),
        "selectedMetrics": list(reversed(compare.metrics)),
        "showAllRuns": True,
    }


def _make_line(metric: str) -> Chart:
    return {
        "type": "LINE",
        "displayName": metric,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
    }


def _make_difference(best_id: str) -> Chart:
    return {
        "type": "DIFFERENCE",
        "displayName": "Differences from the best",
        "chartName": "Differences from the best",
        "compareGroups": ["Parameters", "Model metrics"],
        "showChangeFromBaseline": True,
        "showDifferencesOnly": True,
        "baselineColumnUuid": best_id,
    }
