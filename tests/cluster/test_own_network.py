"""A network of one's own, the transformer in examples/dit, as a user has it: trained, measured, opened, and edited."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, runs, statuses

from orchestrator.measuring.subjects import find_checkpoint
from orchestrator.state.events import read_events
from orchestrator.state.saved import open_trial
from orchestrator.tracking.models import Candidate, save
from workers.config import FIDConfig, SamplerConfig
from workers.storage import Storage

SMALL = ("training.steps=4", "model.depth=1")
OPENS = """
import sys, torch
from orchestrator import open_model
model = open_model("dit-smoke", sys.argv[1], trust_code="trust" in sys.argv)
print(type(model.network.network).__name__, model.sample(2, steps=2).shape)
"""
SERVES = """
import sys, mlflow, pandas as pd
print(mlflow.pyfunc.load_model(sys.argv[1]).predict(pd.DataFrame({"n": [2], "seed": [0]})).shape)
"""


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.faults
def test_a_network_of_ones_own_is_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, storage = shutil.copytree(ROOT / "examples/dit", tmp_path / "dit"), tmp_path / "runs"

    def sweep() -> str:
        done = run("orchestrator.sweep", folder / "experiment.yaml", "--smoke", "--storage", storage, *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def count_begun() -> int:
        return sum(event["event"] == "began" for event in read_events(Storage(storage), "dit-smoke"))

    assert "my_networks:DIT" in sweep()
    assert [status["state"] for status in statuses(storage).values()] == ["finished"] * 2
    assert any("my_networks:DIT@" in str(found.data.tags) for found in runs(storage, "dit-smoke")[1])

    [of_dit] = [t for t in statuses(storage) if "my_networks" in (storage / f"trials/{t}/trial.yaml").read_text()]
    checkpoint = find_checkpoint(Storage(storage), of_dit, open_trial(Storage(storage), of_dit))
    assert checkpoint
    fid = FIDConfig(sampler=SamplerConfig(kind="ddim", steps=2))
    save(Candidate(trial=of_dit, checkpoint=checkpoint, levels=17, fid=fid), tmp_path / "model")  # as a sweep does

    # What lies in somebody else's storage runs with consent alone, which is remembered.
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    for refused, advice in (
        (run("orchestrator.status", "dit-smoke", "--storage", storage), "--trust-code"),
        (python(OPENS, storage), "trust_code=True"),
    ):
        assert refused.returncode and f"{storage}/code/" in refused.stderr and advice in refused.stderr
    refused = python(SERVES, tmp_path / "model")
    assert refused.returncode and "ORCHESTRATOR_TRUST_CODE=1" in refused.stderr
    served = python(SERVES, tmp_path / "model", ORCHESTRATOR_TRUST_CODE="1")
    assert served.returncode == 0 and served.stdout.endswith("(2, 8, 8, 1)\n"), served.stderr
    shutil.rmtree(tmp_path / "cache")
    opened = python(OPENS, storage, "trust")
    assert opened.returncode == 0 and opened.stdout.endswith(" (2, 8, 8, 1)\n"), opened.stderr
    assert run("orchestrator.status", "dit-smoke", "--storage", storage).returncode == 0

    # An edit trains those trials alone that use it.
    dit = (folder / "dit.py").read_text()
    (folder / "dit.py").write_text(dit.replace('"""Attention between', '"""Now: attention between'))
    sweep()
    assert count_begun() == 2
    (folder / "dit.py").write_text(dit.replace('nn.GELU(approximate="tanh")', "nn.SiLU()"))
    assert "new: dit.py has changed" in sweep()
    assert count_begun() == 3 and len(statuses(storage)) == 3


def test_a_network_that_cannot_be_built_or_called_is_told_before_ray_starts(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "examples/dit", tmp_path / "dit")

    def refuse(*settings: str) -> str:
        done = run("orchestrator.sweep", folder / "experiment.yaml", "--dry-run", *settings)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr + done.stdout

    assert "model.patch: 3 does not divide images of 8 x 8 pixels" in refuse("model.patch=3")
    assert "did you mean 'model.width'" in refuse("model.widht=3")
    dit = (folder / "dit.py").read_text()
    (folder / "dit.py").write_text(dit.replace("self.embed(x)", "self.embed(z)"))
    assert "NameError" in (text := refuse()) and "dit.py:" in text
    (folder / "dit.py").write_text(dit.replace(".contiguous()", "[:, :, 1:]"))
    assert "returns (2, 1, 7, 8) for two images, where (2, 1, 8, 8) is expected" in refuse()
