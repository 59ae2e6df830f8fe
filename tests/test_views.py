"""The shared views as data: what they ask MLflow to show. That it does so is for test_browser.py to see."""

import base64
import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.state.rows import find_pareto_front
from orchestrator.tracking import views
from orchestrator.tracking.views import ComparisonView, View

COMPARE = ComparisonView(
    params=("diffusion.T", "loss.weighting"),
    metrics=("eval/nll_bpd", "eval/fd_classifier"),
    curve="valid/nll_bpd",
    images=("samples",),
)


def state_of(found: list[View], title: str) -> Any:
    [view] = [view for view in found if view.title == title]
    return view.state


def charts(state: Any, kind: str) -> list[Any]:
    return [chart for chart in state["compareRunCharts"] if chart["type"] == kind]


def test_the_comparison_has_a_chart_for_everything_that_was_searched_and_measured() -> None:
    found = views.make_views(COMPARE, "parent", 300, "best")
    state = state_of(found, "all trials")
    [parallel] = charts(state, "PARALLEL")
    assert set(parallel["selectedParams"]) == set(COMPARE.params)
    assert parallel["selectedMetrics"][-1] == "eval/nll_bpd"  # the last one colours the lines
    axes = {(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in charts(state, "SCATTER")}
    by_setting = {(param, metric) for param in COMPARE.params for metric in COMPARE.metrics}
    assert axes == by_setting | {("eval/nll_bpd", "eval/fd_classifier")}
    [line], [image], [difference] = (charts(state, kind) for kind in ("LINE", "IMAGE", "DIFFERENCE"))
    assert line["metricKey"] == "valid/nll_bpd"
    assert (image["imageKeys"], image["step"], image["showRunParams"]) == (["samples"], 300, False)
    assert difference["baselineColumnUuid"] == "best"
    sections = [section["uuid"] for section in state["compareRunSections"]]
    assert len(sections) == len(set(sections))
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= set(sections)
    uuids = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert len(uuids) == len(set(uuids))


def test_one_view_for_the_front_and_one_for_each_setting() -> None:
    found = views.make_views(COMPARE, "parent", 0, "")
    assert [v.title for v in found] == ["all trials", "the Pareto front", "by diffusion.T", "by loss.weighting"]
    assert all("tags.`mlflow.parentRunId` = 'parent'" in view.state["searchFilter"] for view in found)
    assert "tags.pareto = 'front'" in state_of(found, "the Pareto front")["searchFilter"]
    group = state_of(found, "by loss.weighting")["groupBy"]
    assert group["groupByKeys"] == [{"mode": "param", "groupByData": "loss.weighting"}]


def test_where_seeds_are_searched_the_means_over_them_come_first() -> None:
    compare = replace(COMPARE, params=("diffusion.T", "seed"), over_seeds=True)
    found = views.make_views(compare, "parent", 0, "")
    assert [v.title for v in found] == ["over seeds", "all trials", "the Pareto front", "by diffusion.T"]
    assert compare.title == "over seeds" and COMPARE.title == "all trials"
    state = state_of(found, "over seeds")
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": views.SETTING}]
    assert {chart["type"] for chart in state["compareRunCharts"]} == {"BAR", "SCATTER", "LINE"}


def test_what_was_not_measured_has_no_chart() -> None:
    alone = ComparisonView(params=("diffusion.T",), metrics=("eval/nll_bpd",))
    view, by_setting = views.make_views(alone, "parent", 0, "")
    assert [chart["type"] for chart in by_setting.state["compareRunCharts"]] == ["BAR"]
    assert [chart["type"] for chart in view.state["compareRunCharts"]] == ["PARALLEL", "SCATTER", "DIFFERENCE"]
    assert len(view.state["compareRunSections"]) == 3 + len(views.GENERATED)


def test_the_panel_of_images_grows_with_the_trials() -> None:
    def height(trials: int) -> int:
        [view, *_] = views.make_views(replace(COMPARE, trials=trials), "parent", 0, "")
        [section] = [s for s in view.state["compareRunSections"] if s["name"].startswith("Samples")]
        assert ("ten best" in section["name"]) == (trials > 10)
        return int(section["cardHeight"])

    assert height(2) < height(8) < height(10) == height(50)  # MLflow shows no more than ten


def test_more_than_ten_trials_get_a_view_for_the_images_of_each_ten() -> None:
    assert not [v for v in views.make_views(replace(COMPARE, trials=10), "parent", 0, "") if "samples" in v.title]
    found = [v for v in views.make_views(replace(COMPARE, trials=23), "parent", 300, "") if "samples" in v.title]
    assert [v.title for v in found] == ["samples 1-10", "samples 11-20", "samples 21-23"]
    for number, view in zip((0, 10, 22), found, strict=True):
        assert view.state["searchFilter"].endswith(f" and tags.`orchestrator.part` = '{views.name_part(number)}'")
        assert [(chart["type"], chart["step"]) for chart in view.state["compareRunCharts"]] == [("IMAGE", 300)]


def test_a_view_fits_into_a_tag() -> None:
    many = ComparisonView(params=tuple(f"section.setting_{i}" for i in range(100)), metrics=("a", "b", "c"))
    for view in views.make_views(many, "f" * 32, 100_000, "f" * 32):
        text = views.make_tag("a name", view.state, 0)
        assert len(text) < 5000  # what a tag holds in every database
        packed = json.loads(text)["state"].removeprefix("deflate;")
        assert json.loads(zlib.decompress(base64.b64decode(packed))) == view.state


@pytest.mark.parametrize(
    "points, front",
    [
        ({}, set()),
        ({"a": (1, 1)}, {"a"}),
        ({"a": (1, 2), "b": (2, 1), "c": (2, 2), "d": (1.5, 1.5)}, {"a", "b", "d"}),
        ({"a": (1, 2), "b": (1, 2), "c": (1, 3)}, {"a", "b"}),  # equal points do not beat each other
        ({"a": (1,), "b": (2,), "c": (1,)}, {"a", "c"}),
    ],
)
def test_the_pareto_front(points: dict[str, tuple[float, ...]], front: set[str]) -> None:
    assert find_pareto_front(points) == front


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_is_what_no_other_beats(objectives: int) -> None:
    drawn = np.random.default_rng(objectives).integers(0, 6, (60, objectives)).tolist()
    points = {f"p{i}": tuple(map(float, values)) for i, values in enumerate(drawn)}
    beaten = {
        name
        for name, p in points.items()
        if any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points.values())
    }
    assert find_pareto_front(points) == points.keys() - beaten


def test_the_front_is_vivid_the_beaten_are_pale_and_a_trial_keeps_its_hue() -> None:
    names = [f"t{i}" for i in range(12)]
    alone = [[name] for name in names]
    before = views.make_pareto_tags(alone, {})
    assert all(set(tags) == {views.COLOUR} for tags in before.values())
    assert len({tags[views.COLOUR] for tags in before.values()}) == len(names)
    after = views.make_pareto_tags(alone, {"t0": (1, 1), "t1": (2, 2)})
    assert after["t0"] == {views.COLOUR: before["t0"][views.COLOUR], "pareto": "front"}
    assert after["t1"]["pareto"] == "beaten" and after["t1"][views.COLOUR] != before["t1"][views.COLOUR]
    assert after["t2"] == before["t2"]
    seeds = views.make_pareto_tags([["t0", "t1"], ["t2", "t3"]], {"t0": (1, 1), "t2": (2, 2)})
    assert seeds["t0"] == seeds["t1"] == after["t0"] and seeds["t2"] == seeds["t3"] != seeds["t0"]


@pytest.mark.parametrize(
    "images, step",
    [
        ([], 0),
        ([{0, 10, 20}, {0, 10}], 10),
        ([{0, 10, 20}, set(), {0, 10, 20}], 20),  # one that has not begun holds nobody back
        ([{0, 10}, {0, 15}], 0),
        ([{10}, {15}], 15),
    ],
)
def test_the_images_shown_are_of_the_last_step_that_all_have(images: list[set[int]], step: int) -> None:
    assert views.find_common_step(images) == step
