"""Of a single image there is no standard error: none is written, rather than one of 0."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_evaluation import evaluated, measurement, small_blocks

from orchestrator.output.table import format_metric
from workers.config import ODENLLConfig
from workers.diffusion.ledger import Bound


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def test_the_bounds_of_one_image_have_no_errors_and_of_two_they_have(tmp_path: Path) -> None:
    for images, count in ((1, 0), (2, 3)):
        ode = ODENLLConfig(images=images, tolerance=0.1)
        summary = evaluated(tmp_path / str(images), measurement(images, ode_nll=ode))
        metrics = summary["metrics"]
        bounds = {name for name in metrics if name.endswith("nll_bpd") or name.endswith("variance_bpd")}
        assert bounds == {"eval/nll_bpd", "eval/ode_nll_bpd", "eval/nll_optimal_variance_bpd"}
        assert sum(f"{name}_se" in metrics for name in bounds) == count
        assert all((c["bpd_se"] is None) == (images == 1) for chains in summary["ledger"].values() for c in chains)
        assert ("±" in format_metric("eval/nll_bpd", metrics)) == (images == 2)


def test_an_error_of_zero_is_one() -> None:
    """Two images of the same bound: here 0 is what was measured."""
    same = np.array([1.0, 1.0])
    assert Bound(same, same, same).standard_error == 0
    assert replace(Bound(same, same, same), prior=same[:1], diffusion=same[:1], decoder=same[:1]).standard_error is None
