"""What a person sees of a finished sweep in MLflow's pages, in a real browser. The shared views are MLflow's internal
format: an update of MLflow that reads them otherwise shows here."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the extra `dev` brings playwright")

import browsing
from browsing import Browser, Recorded

from orchestrator.views import BEATEN, FRONT

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
    with chromium.page(base, links[0]) as page:
        browsing.wait_for_texts(page, *recorded.names())
        assert browsing.axes(page) == ["loss.weighting", "eval/fd_classifier", "eval/nll_bpd"]
        scatters = browsing.plots(page, "scatter", 4)
        seen = {tuple(plot["titles"]): plot for plot in scatters}
        for x, y in (("eval/nll_bpd", "eval/fd_classifier"), ("loss.weighting", "eval/nll_bpd")):
            assert len(seen[(x, y)]["x"]) == len(recorded.trials), (x, y)
        assert browsing.pictures(page, len(recorded.trials)) == len(recorded.trials)
        browsing.wait_for_texts(page, "Differences from the best")


def test_the_front_is_vivid(recorded: Recorded, base: str, chromium: Browser) -> None:
    """The points of the scatter have the colours of the runs' tags."""
    with chromium.page(base, recorded.view("all trials")) as page:
        [plot] = [p for p in browsing.plots(page, "scatter", 4) if p["titles"][1] == "eval/fd_classifier"][:1]
        tags = {run.data.metrics["eval/nll_bpd"]: run.data.tags["mlflow.runColor"] for run in recorded.trials}
        assert {round(x, 9): c for x, c in zip(plot["x"], plot["colours"], strict=True)} == {
            round(x, 9): c for x, c in tags.items()
        }


def test_the_view_of_the_front_has_the_front_alone(recorded: Recorded, base: str, chromium: Browser) -> None:
    front, beaten = recorded.names(pareto=FRONT), recorded.names(pareto=BEATEN)
    assert front and sorted(front + beaten) == sorted(recorded.names())
    with chromium.page(base, recorded.view("the Pareto front")) as page:
        browsing.wait_for_texts(page, *front)
        assert len(browsing.plots(page, "scatter", 4)[0]["x"]) == len(front)


def test_a_view_groups_by_a_setting(recorded: Recorded, base: str, chromium: Browser) -> None:
    with chromium.page(base, recorded.view("by loss.weighting")) as page:
        browsing.wait_for_texts(page, "Group: simple", "Group: vlb")
        assert {len(plot["y"]) for plot in browsing.plots(page, "bar", 2)} == {2}
