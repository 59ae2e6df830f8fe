"""The functions of `from orchestrator import ...`, by the lines that the README shows."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from orchestrator import load_results, open_model, preview, run_sweep
from workers.config import Mistake

SMALL = ["training.steps=4", "training.batch_size=16", "training.warmup=2", "training.validate_every=4",
         "evaluation.nll.images=10", "evaluation.fid.samples=100", "evaluation.fid.sampler.steps=2",
         "model.channels=8", "search.space.diffusion.schedule.beta_end=null"]  # fmt: skip


def test_the_lines_of_the_readme(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, changes, storage = ROOT / "experiments/beta_schedule.yaml", ["name=try", *SMALL], tmp_path / "runs"
    trials = preview(file, *changes)
    assert len(trials) == 4 and (trials["prior_bpd"] > 0).all() and (trials["nll_evaluations"] > 0).all()
    assert not storage.exists(), "a preview writes nothing"

    done = run_sweep(file, *changes, storage=storage)
    assert done.ok and done.exit_status == 0 and Path(done.report).stat().st_size > 20_000
    said = capfd.readouterr()
    assert "NLL bits/dim" in said.out and "train " not in said.out, "quiet: the result alone"

    frame = load_results("try", storage=storage)
    assert list(frame["state"]) == ["done"] * 4 and set(frame["trial"]) == set(trials["trial"])
    assert frame["eval/nll_bpd"].is_monotonic_increasing and frame.equals(done.results())

    model = open_model("try", storage=storage)
    images = model.sample(16, seed=0, steps=5)
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8
    assert (images == model.sample(16, seed=0, steps=5)).all() and (images != model.sample(16, seed=1, steps=5)).any()
    x_t = torch.randn(3, 1, 8, 8)
    assert model(x_t, torch.tensor([1, 2, model.process.T])).shape == x_t.shape

    again = run_sweep(file, *changes, storage=storage)
    assert again.ok and load_results("try", storage=storage).equals(frame)

    same = open_model(frame["trial"][0][:8], storage=storage)
    folder = next((storage / "trials" / frame["trial"][0] / "checkpoints").glob("step-*"))
    for other in (same, open_model(folder)):
        assert other.checkpoint.digest == model.checkpoint.digest
    for call in (
        lambda: model.sample(0),
        lambda: model.sample(2, steps=model.process.T + 1),
        lambda: open_model("nothing", storage=storage),
        lambda: load_results("tri", storage=storage),
        lambda: preview(file, "training.steps=0"),
        lambda: run_sweep(file, "loss.weighting=simpel", storage=storage),
    ):
        with pytest.raises(Mistake):
            call()


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys; import orchestrator; assert 'preview' in dir(orchestrator); "
        "print(sorted({'torch', 'ray', 'pandas', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr
