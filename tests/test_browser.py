"""What a person sees of a finished sweep in MLflow's pages, in a real browser. The shared views are MLflow's internal
format: an update of MLflow that reads them otherwise shows here."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the extra `dev` brings playwright")

import browsing
from browsing import Browser, Recorded

from orchestrator.tracking.views import BEATEN, FRONT

pytestmark = pytest.mark.skipif(
    not browsing.CHROMIUM, reason="there is no chromium; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def recorded(finished: tuple[Path, Path, str]) -> Recorded:
    return Recorded.of(finished[1], "tiny")


@pytest.fixture(scope="module")
def base(finished: tuple[Path, Path, str]) -> Iterator[str]:
    with browsing.served(finished[1]) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


def test_the_link_that_a_sweep_prints_opens_the_comparison(
    finished: tuple[Path, Path, str], recorded: Recorded, base: str, chromium: Browser
) -> None:
    links = re.findall(r"comparison +\S+?/(#\S+)", finished[2])
    assert len(links) == 2 and len(set(links)) == 1  # at the start and at the end
    trials = len(recorded.trials)
    with chromium.page(base, links[0]) as page:
        browsing.texts(page, *recorded.names())
        assert browsing.axes(page) == ["loss.weighting", "eval/fd_classifier", "eval/nll_bpd"]
        for x, y in (
            ("eval/nll_bpd", "eval/fd_classifier"),
            ("loss.weighting", "eval/nll_bpd"),
            ("loss.weighting", "eval/fd_classifier"),
        ):
            assert len(browsing.plot(page, x, y)["x"]) == trials, (x, y)
        [curves] = browsing.plots(page, 1, x_title="Step")
        assert sorted(curves["traces"]) == sorted(recorded.names())
        assert browsing.images(page, trials) == trials
        browsing.texts(page, "Differences from the best", "baseline")


def test_the_front_is_vivid(recorded: Recorded, base: str, chromium: Browser) -> None:
    """The points of the scatter have the colours of the runs' tags."""
    with chromium.page(base, recorded.view("all trials")) as page:
        plot = browsing.plot(page, "eval/nll_bpd", "eval/fd_classifier")
        tags = {run.data.metrics["eval/nll_bpd"]: run.data.tags["mlflow.runColor"] for run in recorded.trials}
        assert dict(zip(plot["x"], plot["colours"], strict=True)) == tags


def test_the_view_of_the_front_has_the_front_alone(recorded: Recorded, base: str, chromium: Browser) -> None:
    front, beaten = recorded.names(pareto=FRONT), recorded.names(pareto=BEATEN)
    assert front and sorted(front + beaten) == sorted(recorded.names())
    with chromium.page(base, recorded.view("the Pareto front")) as page:
        browsing.texts(page, *front)
        assert len(browsing.plot(page, "eval/nll_bpd", "eval/fd_classifier")["x"]) == len(front)


def test_a_view_groups_by_a_setting(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.view("by loss.weighting")) as page:
        browsing.texts(page, "Group: simple", "Group: vlb")
        assert {len(plot["y"]) for plot in browsing.plots(page, 2, kind="bar")} == {2}


def test_the_note_of_the_experiment_leads_to_the_views(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.view("all trials")) as page:
        for title in ("all trials", "the Pareto front", "by loss.weighting"):
            page.locator(f"a[href='{recorded.view(title)}']").first.wait_for(state="attached")
        page.locator("[data-component-id='mlflow.experiment.metadata_editor.expand_button']").click()
        with page.expect_popup() as opened:  # MLflow opens a note's links beside
            page.get_by_role("link", name="by loss.weighting").click()
        browsing.texts(opened.value, "Group: simple", "Group: vlb")
        opened.value.close()


def test_the_older_page_of_comparison_has_all_trials(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.compare_page()) as page:
        browsing.texts(page, f"Comparing {len(recorded.trials)} Runs", *recorded.names())


def test_the_page_of_a_trial_has_its_note_and_model(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.run_page(recorded.trials[0])) as page:
        browsing.texts(page, "What the numbers are", "loss.weighting", "eval/fd_classifier")


def test_the_page_of_models_has_the_candidate(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.model_page()) as page:
        browsing.texts(page, "tiny", "Version 1", "candidate")
