"""Every experiment file runs: small, by its own `smoke` section, on the digits, all of them on one Ray."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from orchestrator.execution.session import open_session
from orchestrator.experiment.load import load
from orchestrator.sweep import main

pytestmark = pytest.mark.filterwarnings("ignore")
FILES = [f for f in sorted((ROOT / "experiments").glob("*.yaml")) if "orchestrator.nightly" not in f.read_text()]
# Each takes half a minute of the 30 that the tests may take: what others run as well waits for the longer tests.
LIKE_OTHERS = {
    "beta_schedule", "celeba64", "cifar10", "cifar10_speedrun", "cifar10_students", "ddpm_table2", "digits",
    "ema_width", "formulations", "formulations_cifar10", "guidance", "latent", "learned_variance", "loss_weighting",
    "pareto", "samplers", "scaling", "t_sweep",
}  # fmt: skip
EACH = [pytest.param(f, id=f.stem, marks=[pytest.mark.faults] if f.stem in LIKE_OTHERS else []) for f in FILES]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A storage for all of them, while a Ray of this process is up."""
    with open_session(None):
        yield tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("file", EACH)
def test_an_experiment_file_runs_small(file: Path, storage: Path) -> None:
    small = load(file, smoke=True)
    assert small.data.source == "digits" and small.name == f"{load(file).name}-smoke"
    assert main([str(file), "--smoke", "--storage", str(storage), "-q"]) == 0
    frame = pd.read_parquet(storage / "sweeps" / small.name / "results.parquet")
    assert set(frame["state"]) == {"done"} and frame[small.search.metric].notna().all()
    searched = [c for c in frame.columns if c in small.search.space]
    assert len(frame) == 1 or any(frame[c].astype(str).nunique() > 1 for c in searched), "the search is still one"
    assert (storage / "sweeps" / small.name / "report.html").stat().st_size > 10_000
