"""The functions of `from orchestrator import ...`, by the very lines that the package and docs/python.md show."""

import asyncio
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import orchestrator
from orchestrator import load_results, open_model, preview, run_sweep
from workers.config import Mistake

LINES = textwrap.dedent(str(orchestrator.__doc__).split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
SMALL = ["training.steps=4", "training.batch_size=16", "training.warmup=2", "training.validate_every=4",
         "evaluation.nll.images=10", "evaluation.fid.samples=100", "evaluation.fid.sampler.steps=2",
         "model.channels=8", "search.space.diffusion.schedule.beta_end=null"]  # fmt: skip


def test_the_page_about_python_shows_these_lines() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.MULTILINE)
    assert [block.strip() for block in blocks if block.startswith("from orchestrator")] == [LINES.strip()]


def test_the_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    small = LINES.replace('"training.steps=100"', ", ".join(map(repr, SMALL)))
    assert small != LINES and LINES.count("\n") < 12
    names: dict[str, Any] = {}
    exec(small, names)  # the test is of these very lines
    output = capfd.readouterr().out
    assert "NLL bits/dim" in output and "[4 rows x" in output and "  train  " not in output, output

    file, changes, done, trials, model = (names[n] for n in ("file", "changes", "done", "trials", "model"))
    storage = tmp_path / "runs"
    assert done.ok and done.exit_status == 0 and Path(done.report).stat().st_size > 20_000
    assert list(trials["state"]) == ["done"] * 4 and trials["eval/nll_bpd"].is_monotonic_increasing
    assert set(trials["trial"]) == set(preview(file, *changes)["trial"])

    images = names["images"]
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8
    assert (images == model.sample(16, seed=0, steps=25)).all() and (images != model.sample(16, seed=1, steps=25)).any()
    x_t = torch.randn(3, 1, 8, 8)
    assert model(x_t, torch.tensor([1, 2, model.process.T])).shape == x_t.shape

    again = run_sweep(file, *changes, storage=storage)
    assert again.ok and load_results("try", storage=storage).equals(trials) and again.results().equals(trials)

    folder = next((storage / "trials" / trials["trial"][0] / "checkpoints").glob("step-*"))
    for other in (open_model(trials["trial"][0][:8], storage=storage), open_model(folder)):
        assert other.checkpoint.digest == model.checkpoint.digest
    for call in (
        lambda: model.sample(0),
        lambda: model.sample(2, steps=model.process.T + 1),
        lambda: open_model("nothing", storage=storage),
        lambda: load_results("tr", storage=storage),
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


@pytest.mark.faults
def test_sweeps_run_in_any_thread_and_within_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook, whose cells run within a loop, or a server: of two at once one waits for the other's Ray."""
    (tmp_path / "small.yaml").write_text(TINY)

    def run(name: str) -> orchestrator.Outcome:
        small = ["training.steps=2", "evaluation.fid=null", "evaluation.nll.images=4"]
        small += ["search.space.loss.weighting=null", f"name={name}"]
        return run_sweep(tmp_path / "small.yaml", *small, f"seed={len(name)}", storage=tmp_path / "runs")

    async def both() -> list[orchestrator.Outcome]:
        other = asyncio.create_task(asyncio.to_thread(run, "thread"))
        await asyncio.sleep(0.1)
        return [run("loop"), await other]

    assert [done.ok for done in asyncio.run(both())] == [True, True]
    assert [len(load_results(name, tmp_path / "runs")) for name in ("loop", "thread")] == [1, 1]
