"""Rows, table and plots of a sweep, from plain data."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from orchestrator.experiment.records import Variant
from orchestrator.measuring.seeds import compare_groups, group_rows
from orchestrator.output.table import make_footnote, make_frame, make_markdown, make_table
from orchestrator.state.rows import Found, Row, rank_rows, shorten_values
from workers.config import DataConfig, TrainingConfig, Trial
from workers.layout import RowId

TRIAL = Trial(data=DataConfig(source="digits"), training=TrainingConfig(steps=10))


def row(digest: str, T: int, nll: float | None, error: str = "") -> Row:
    status = {"state": "finished", "step": 10, "images_per_s": 1234.5, "valid_nll_bpd": 3.0}
    metrics = {"eval/nll_bpd": nll, "eval/nll_bpd_se": 0.01, "eval/fd_classifier": 1.5}
    summary = None if nll is None else {"metrics": metrics, "nll_by_t": [0.1] * T + [0.0]}
    variant = Variant(params={"diffusion.T": T, "diffusion.schedule": {"kind": "cosine"}}, trial=TRIAL)
    return Row(
        RowId(digest), variant, Found(status, "abc", summary, steps=10, validation={"valid/nll_bpd": 3.0}), error
    )


ROWS = [row("aaaa", 50, 2.9), row("bbbb", 100, None, "out of memory"), row("cccc", 200, 2.5)]


def test_ranks_the_best_first_and_the_unmeasured_last() -> None:
    assert [r.digest for r in rank_rows(ROWS, "eval/nll_bpd")] == ["cccc", "aaaa", "bbbb"]


def test_the_frame_keeps_every_trial_and_its_error() -> None:
    frame = make_frame(ROWS)
    assert list(frame["state"]) == ["done", "failed", "done"]
    assert list(frame["diffusion.T"]) == [50, 100, 200]
    assert frame["eval/nll_bpd"].isna().tolist() == [False, True, False]
    assert frame["detail"][1] == "out of memory"


@pytest.mark.parametrize(
    ("values", "column"),
    [
        (["all", 10], ["all", "10"]),
        ([10, None, 20], [10, None, 20]),
        ([None, "all"], [None, "all"]),
        ([True, 1], ["true", "1"]),
        ([True, False], [True, False]),
        ([1, 0.5], [1, 0.5]),
        ([2**70, 1], [str(2**70), "1"]),
        ([[4], []], [[4], []]),
        ([[4], "none"], ["[4]", "none"]),
        ([[1], ["a"]], ["[1]", '["a"]']),
        ([[[1]], [1]], ["[[1]]", "[1]"]),
        ([{"kind": "ddim", "steps": 5}, None], ['{"kind": "ddim", "steps": 5}', None]),
        ([{"kind": "ddim"}, 5, "x", [1], True], ['{"kind": "ddim"}', "5", "x", "[1]", "true"]),
    ],
)
def test_values_of_any_kinds_are_written_and_read_again(values: list[Any], column: list[Any], tmp_path: Path) -> None:
    rows = [
        Row(RowId(f"{i}"), Variant(params={"some.path": value}, trial=TRIAL), Found()) for i, value in enumerate(values)
    ]
    frame = make_frame(rows)
    frame.to_parquet(tmp_path / "results.parquet")
    for read in (frame, pandas.read_parquet(tmp_path / "results.parquet")):
        found = [v.tolist() if isinstance(v, np.ndarray) else v for v in read["some.path"]]
        assert [None if v is None or v != v else v for v in found] == column
    assert len(make_markdown(rows).splitlines()) == 2 + len(rows)


def test_settings_that_end_alike_keep_columns_of_their_own() -> None:
    params = {"evaluation.nll.images": 5, "evaluation.ode_nll.images": "all", "training.steps": 3,
              "evaluation.fid.sampler": {"kind": "ddim", "steps": 9}, "diffusion.T": 50}  # fmt: skip
    assert shorten_values(Variant(params=params, trial=TRIAL)) == {
        "nll.images": 5, "ode_nll.images": "all", "training.steps": 3, "kind": "ddim", "sampler.steps": 9, "T": 50,
    }  # fmt: skip


def test_the_markdown_table_shows_each_trial_with_its_error_bar() -> None:
    lines = make_markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[0] == "| trial | T | kind | NLL bits/dim | fd_classifier | images/s | state |"
    assert lines[2] == "| aaaa | 50 | cosine | 2.900 ± 0.010 | 1.500 | 1,234 | done |"
    assert lines[3] == "| bbbb | 100 | cosine | - | - | 1,234 | failed |"


def measured(digest: str, per_image: list[float], images: str = "d1") -> Row:
    metrics = {"eval/nll_bpd": sum(per_image) / len(per_image), "eval/nll_bpd_se": 0.1}
    passports = {"nll": {"protocol": {"data": images}}}
    summary = {"metrics": metrics, "passports": passports, "nll_per_image": per_image}
    status = {"state": "finished", "step": 10, "images_per_s": 1.0}
    return Row(RowId(digest), Variant(params={}, trial=TRIAL), Found(status, "abc", summary, steps=10))


def test_marks_what_cannot_be_told_from_the_best_on_the_same_images() -> None:
    """Paired: a constant shift is clear however much images differ; a difference of either sign is not."""
    rows = [
        measured("best", [1.0, 2.0, 3.0, 4.0]),
        measured("alike", [1.1, 1.9, 3.2, 3.9]),
        measured("worse", [1.01, 2.01, 3.011, 4.009]),
        measured("others", [1.1, 1.9, 3.2, 3.9], images="d2"),
    ]
    names, bits = (list(column.cells) for column in make_table(rows).columns[:2])
    marked = {str(name): "≈" in str(cell) for name, cell in zip(names, bits, strict=True)}
    assert marked == {"best": False, "alike": True, "worse": False, "others": False}
    assert "best" in make_footnote(rows) and "4 images" in make_footnote(rows)
    assert make_footnote([rows[0], rows[2]]) == ""
    frame = make_frame(rows).set_index("trial")
    low = frame["nll_above_best_low"]
    assert low["worse"] > 0 > low["alike"]


def sampled(digest: str, steps: int, distance: float, error: float | None = 0.1, samples: int = 1000) -> Row:
    """A row of a sweep over samplers: the bound is that of the one trial."""
    row = measured(digest, [1.0, 2.0, 3.0])
    assert row.found.summary
    errors = {} if error is None else {"eval/fd_classifier_se": error}
    row.found.summary["metrics"] |= {"eval/fd_classifier": distance, **errors}
    protocol = {"samples": samples, "sampler": {"kind": "ddim", "steps": steps}}
    row.found.summary["passports"]["samples"] = {"protocol": protocol}
    return row


def test_marks_stand_on_the_metric_that_the_sweep_ranks_on() -> None:
    """Distances by the errors of both: 0.15 apart with 0.1 each is no difference, 0.9 apart is one."""
    rows = [
        sampled("best", 50, 0.50), sampled("alike", 20, 0.65), sampled("worse", 5, 1.4),
        sampled("fewer", 50, 0.6, samples=100), sampled("bare", 5, 2.0, error=None),
    ]  # fmt: skip
    table = make_table(rows, "eval/fd_classifier")
    cells = {str(column.header): [str(cell).strip() for cell in column.cells] for column in table.columns}
    assert cells["NLL bits/dim"] == ["2.000 ± 0.100"] * 5
    assert cells["fd_classifier"] == ["0.500 ± 0.100", "0.650 ± 0.100 ≈", "1.400 ± 0.100", "0.600 ± 0.100", "2.000"]
    note = make_footnote(rows, "eval/fd_classifier")
    assert "not distinguishable from best in fd_classifier" in note and note.endswith("fewer, bare")
    assert compare_groups(group_rows(rows), "eval/ode_nll_bpd") == (None, {})
