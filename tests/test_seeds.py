"""Rows that differ in the seed alone: their means, what a difference of them is worth, and where they are a line."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from rich.console import Console
from scipy.stats import ttest_ind
from test_report import Page, stored

from orchestrator import report as verb
from orchestrator import status
from orchestrator.api import load_results
from orchestrator.experiment.metrics import NLL
from orchestrator.experiment.records import Variant
from orchestrator.measuring.seeds import compare_groups, compare_over_seeds, group_rows
from orchestrator.output import curves, figures, findings, page
from orchestrator.output.table import make_footnote, make_frame, make_markdown, make_table
from orchestrator.state.rows import Found, Row, join_repetitions, rank_rows
from workers.config import DataConfig, TrainingConfig, Trial
from workers.layout import RowId

TRIAL = Trial(data=DataConfig(source="digits"), training=TrainingConfig(steps=10))
DISTANCE = "eval/fd_classifier"
SPACE = {"diffusion.T": {"grid": [20, 50]}, "seed": {"grid": [0, 1, 2]}}
# Two settings of three seeds: the first is better by 0.1 on every image, and its seeds are as far apart as that.
SIX = {i: [2.0 + x + y for x in (0.0, 0.4, 0.9)] for i, y in enumerate((0.0, 0.12, 0.24, 0.1, 0.22, 0.34))}


def row(T: int, seed: int | None, per_image: list[float] | None, state: str = "finished", distance: float = 1.0) -> Row:
    params = {"diffusion.T": T} | ({} if seed is None else {"seed": seed})
    status = {"state": state, "step": 10, "images_per_s": 100.0 + (seed or 0)}
    found = Found(status, "c" if state == "finished" else None, None, steps=10)
    if per_image is not None:
        error = float(np.std(per_image, ddof=1) / len(per_image) ** 0.5)
        metrics = {NLL: float(np.mean(per_image)), f"{NLL}_se": error, DISTANCE: distance, f"{DISTANCE}_se": 0.3}
        passports = {"nll": {"protocol": {"data": "d1"}}, "samples": {"protocol": {"samples": 1000}}}
        summary = {"metrics": metrics, "passports": passports, "nll_per_image": per_image}
        found = Found(status, "c", summary, steps=10)
    return Row(RowId(f"{T:04}-{seed}-abcdef"), Variant(params=params, trial=TRIAL), found)


def table_text(rows: list[Row], **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=150).print(make_table(rows, NLL, 150, **options))
    return stream.getvalue()


# ---- Groups ----------------------------------------------------------------------------------------------------


def test_only_rows_that_differ_in_the_seed_alone_are_taken_together() -> None:
    rows = [row(20, 0, None), row(50, 0, None), row(20, 1, None)]
    groups = group_rows(rows)
    assert [[r.digest for r in g.rows] for g in groups] == [["0020-0-abcdef", "0020-1-abcdef"], ["0050-0-abcdef"]]
    assert [g.name for g in groups] == ["T=20", "T=50"] and all(g.over_seeds for g in groups)
    assert [g.name for g in group_rows(rows, each=True)] == ["T=20 seed=0", "T=50 seed=0", "T=20 seed=1"]
    assert [g.name for g in group_rows(rows[:2])] == ["T=20 seed=0", "T=50 seed=0"]  # no two to take together
    alike = [row(20, None, None), row(20, None, None)]  # where no seed is searched nothing is
    assert join_repetitions((RowId(name), row.variant) for name, row in zip("ab", alike, strict=True)) == [["a"], ["b"]]


def test_the_errors_are_those_of_the_mean() -> None:
    """Over seeds, of n numbers; over images, of the per-image means, which is sigma^2 / K of all that images share."""
    random = np.random.RandomState(0)
    hard = random.randn(50)
    values = [2 + hard + 0.1 * seed + 0.01 * random.randn(50) for seed in range(3)]
    [group] = group_rows([row(20, seed, v.tolist(), distance=1.0 + seed) for seed, v in enumerate(values)])
    means = [v.mean() for v in values]
    assert group.metrics[NLL] == pytest.approx(np.mean(means))
    assert group.seed_errors[NLL] == pytest.approx(np.std(means, ddof=1) / 3**0.5)
    covariances = np.cov(np.array(values)) / 50  # of the means of the three seeds, over the images
    assert group.metrics[f"{NLL}_se"] == pytest.approx(covariances.sum() ** 0.5 / 3)
    assert group.metrics[f"{NLL}_se"] == pytest.approx(hard.std(ddof=1) / 50**0.5, rel=0.01)  # not less by sqrt(3)
    assert group.metrics[DISTANCE] == 2.0 and group.metrics[f"{DISTANCE}_se"] == pytest.approx(0.3 / 3**0.5)
    assert group.images_per_s == 101.0


def test_without_values_by_image_the_error_over_images_is_the_largest_that_it_can_be() -> None:
    rows = [row(20, seed, [2.0, 3.0]) for seed in range(2)]
    for r in rows:
        assert isinstance(r.found.summary, dict)
        del r.found.summary["nll_per_image"]
    assert group_rows(rows)[0].metrics[f"{NLL}_se"] == pytest.approx(rows[0].metrics[f"{NLL}_se"])


def test_seeds_that_failed_or_diverged_are_counted_and_in_no_mean() -> None:
    rows = [row(20, 0, [1.0, 2.0]), row(20, 1, None, "diverged"), row(20, 2, [2.0, 3.0])]
    [group] = group_rows(rows)
    assert group.metrics[NLL] == 2.0 and group.count_seeds(NLL) == "2 of 3" and group.state == "2 done, 1 diverged"
    [alone] = group_rows([rows[0], rows[1]])
    assert alone.count_seeds(NLL) == "1 of 2" and alone.seed_errors == {}
    assert "2 of 3" in table_text(rows) and "1.500 ± - / 0.500" in table_text(rows[:2])


def test_settings_are_ranked_by_their_means_and_stay_together() -> None:
    """The luckiest seed of all belongs to the worse setting."""
    rows = [row(20, 0, [1.0, 1.0]), row(20, 1, [4.0, 4.0]), row(50, 0, [2.1, 2.1]), row(50, 1, [2.0, 2.0])]
    unmeasured = row(80, 0, None, "diverged")
    ranked = rank_rows([unmeasured, *rows], NLL)
    assert [r.digest[:6] for r in ranked] == ["0050-1", "0050-0", "0020-0", "0020-1", "0080-0"]
    assert [r.digest[:6] for r in rank_rows(rows, NLL, each=True)] == ["0020-0", "0050-1", "0050-0", "0020-1"]
    assert [g.name for g in group_rows(ranked)] == ["T=50", "T=20", "T=80"]


# ---- What a difference is worth --------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_welch_s() -> None:
    a, b = [2.0, 2.3, 2.1], [2.6, 2.5, 2.9, 2.2]
    found, expected = compare_over_seeds(a, b), ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found and (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.standard_error == pytest.approx((np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 4) ** 0.5)
    one = compare_over_seeds(a, [2.6])  # whose spread is taken to be that of the other side
    student = ttest_ind(a, [2.6], equal_var=True).confidence_interval(0.95)
    assert one and (one.low, one.high) == pytest.approx((student.low, student.high))
    assert compare_over_seeds([1.0], [2.0]) is None
    same = compare_over_seeds([1.0, 1.0], [2.0, 2.0])
    assert same and same.low == same.high == -1.0


def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.RandomState(1)
    draws = [compare_over_seeds(list(0.3 + random.randn(3)), list(3 * random.randn(5))) for _ in range(2000)]
    share = np.mean([d.low <= 0.3 <= d.high for d in draws if d])
    assert abs(share - 0.95) < 0.02


def test_what_is_clear_on_the_images_is_not_clear_where_seeds_differ_as_much() -> None:
    rows = [row(T, seed, SIX[3 * i + seed]) for i, T in enumerate((20, 50)) for seed in range(3)]
    best, differences = compare_groups(group_rows([rows[0], rows[3]], each=True), NLL)
    assert best == rows[0].digest and differences[rows[3].digest].clear
    best, differences = compare_groups(group_rows(rows), NLL)
    difference = differences[rows[3].digest]
    assert best == rows[0].digest and difference.mean == pytest.approx(0.1) and not difference.clear
    assert "T=20 in bits/dim (95 % each, paired over 3 images, and over seeds by Welch's test)" in make_footnote(rows)
    assert "≈" in table_text(rows) and "≈" not in table_text([rows[0], rows[3]])


# ---- Where they are one line -----------------------------------------------------------------------------------


def test_without_a_search_over_seeds_the_table_is_as_it_was() -> None:
    rows = [row(20, None, [2.0, 2.5]), row(50, None, [2.1, 2.7]), row(80, None, None, "diverged")]
    text = (
        "trial      T     NLL bits/dim  fd_classifier  images/s  state   \n"
        "0020-Non  20    2.250 ± 0.250  1.000 ± 0.300       100  done    \n"
        "0050-Non  50  2.400 ± 0.300 ≈  1.000 ± 0.300       100  done    \n"
        "0080-Non  80                -              -       100  diverged\n"
    )
    assert table_text(rows) == text
    assert table_text(rows, each=True) == text and make_frame(rows).equals(make_frame(rows, collapse_seeds=True))


def test_a_line_has_the_mean_both_errors_and_the_count() -> None:
    rows = [row(T, seed, SIX[3 * i + seed]) for i, T in enumerate((20, 50)) for seed in range(3)]
    head, _, first, second = make_markdown(rows).splitlines()
    assert head == "| T | seeds | NLL bits/dim | fd_classifier | images/s | state |"
    assert first == "| 20 | 3 | 2.553 ± 0.069 / 0.260 | 1.000 ± 0.000 / 0.173 | 101 | done |"
    assert second == "| 50 | 3 | 2.653 ± 0.069 / 0.260 ≈ | 1.000 ± 0.000 / 0.173 | 101 | done |"
    assert len(make_markdown(rows, each=True).splitlines()) == 2 + 6 and "seed" in make_markdown(rows, each=True)
    assert make_footnote(rows).startswith("means over seeds ± their standard errors over seeds / over images")


@pytest.fixture
def six(tmp_path: Path) -> Path:
    stored(tmp_path, SIX, space=SPACE)
    return tmp_path


def said_by(command: Any, *arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        assert command.main(list(arguments)) == 0
    return stream.getvalue()


def test_status_shows_settings_and_with_a_flag_the_trials(six: Path) -> None:
    text = said_by(status, "small", "--storage", str(six))
    assert "2.553 ± 0.069 / 0.260" in text and "60" in text and "--rows" in text and "6 done" in text
    assert len(re.findall(r"10/10", text)) == 0 and len(re.findall(r"30/30", text)) == 2
    each = said_by(status, "small", "--rows", "--storage", str(six))
    assert len(re.findall(r"10/10", each)) == 6 and "± 0.069" not in each
    [sweep] = json.loads(said_by(status, "small", "--json", "--storage", str(six)))["sweeps"]
    assert len(sweep["trials"]) == 6 and [s["params"] for s in sweep["settings"]] == [{"T": "20"}, {"T": "50"}]
    assert sweep["settings"][0]["standard_errors_over_seeds"][NLL] == pytest.approx(0.12 / 3**0.5)
    assert "2.553 eval/nll_bpd" in said_by(status, "--storage", str(six))


def test_the_page_shows_settings_and_each_seed_in_what_opens(six: Path) -> None:
    report = findings.gather(stored(six, SIX, space=SPACE)[0], "small")
    content = page.render_report(report)
    read = Page(content)
    assert [entry.mark for entry in page.list_entries(report)] == ["best", "same"]
    assert "Each seed by itself (6 trials)" in content and content.count('class="l mono"><span class="dot"') == 2 + 6
    text = " ".join(" ".join(read.text).split())
    assert "Best of 2 settings by the mean over seeds (6 measured trials): T=20" in text
    assert "it cannot be told from one other setting" in text and "By these seeds and images" in text
    assert content.count("data:image/png") == 2  # samples of a seed of each setting
    assert {report.rank[r.digest] for r in report.groups[1].rows} == {1}  # a colour for all seeds of a setting
    each = page.render_report(findings.gather(stored(six, SIX, space=SPACE)[0], "small", each=True))
    assert "Each seed by itself" not in each and each.count("data:image/png") == 6 and "6 measured trials" in each


def test_markdown_shows_settings_and_each_seed_in_what_opens(six: Path) -> None:
    text = said_by(verb, "small", "--markdown", "--storage", str(six))
    assert "<details><summary>Each seed by itself" in text and text.count("| done |") == 2 + 6
    each = said_by(verb, "small", "--markdown", "--rows", "--storage", str(six))
    assert "Each seed by itself" not in each and each.count("| done |") == 6


def test_results_keep_the_single_rows_unless_asked(six: Path) -> None:
    frame = load_results("small", six)
    assert (
        len(frame) == 6 and list(frame["seed"]) == [0, 1, 2] * 2 and list(frame["diffusion.T"]) == [20] * 3 + [50] * 3
    )
    means = load_results("small", six, collapse_seeds=True)
    assert list(means["seeds"]) == [3, 3] and list(means["diffusion.T"]) == [20, 50] and "seed" not in means
    assert means[NLL][0] == pytest.approx(frame[NLL][:3].mean())
    assert means[f"{NLL}_se_seeds"][0] == pytest.approx(0.12 / 3**0.5) and list(means[f"{NLL}_seeds"]) == [3, 3]
    assert means["trials"][0] == list(frame["trial"][:3]) and means["nll_above_best_low"][1] < 0


def test_each_figure_is_built_once_for_the_page_and_for_mlflow(six: Path) -> None:
    report = findings.gather(stored(six, SIX, space=SPACE)[0], "small")
    files = curves.draw_png_files(report)
    assert set(files) == {"nll_and_distance.png", "nll_by_t.png", "schedules.png"}
    assert all(content[:4] == b"\x89PNG" for content in files.values())
    assert curves.draw_png_files(findings.gather(stored(six / "new", {}, space=SPACE)[0], "small")).keys() == {
        "schedules.png"
    }


# ---- One table of metrics, one palette -------------------------------------------------------------------------


def test_a_png_has_the_colours_of_the_page_in_light() -> None:
    style = (ROOT / "orchestrator/output/templates/base.html").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w{6});", style[: style.index("@media")]))
    assert (
        figures.Palette(
            light["ink-2"], light["line"], light["rest"], tuple(light[f"c{i}"] for i in range(figures.PALETTE))
        )
        == figures.LIGHT
    )
