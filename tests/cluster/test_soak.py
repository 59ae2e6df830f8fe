"""Two minutes of kills of all that a sweep consists of, after which all is as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import comparison

pytestmark = pytest.mark.clusters
TRIALS = 8  # one of them of two workers


def test_nothing_is_lost_by_two_minutes_of_kills(tmp_path: Path) -> None:
    """And what compares the two sweeps notices a byte, a point and a file."""
    command = [sys.executable, "benchmarks/soak.py", "--seconds", "120", "--trials", str(TRIALS)]
    command += ["--steps", "40", "--storage", str(tmp_path), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr + run.stdout
    verdict = json.loads(run.stdout)
    print(json.dumps(verdict, indent=2))
    assert verdict["problems"] == [] and verdict["faults"] > 5
    assert verdict["equal"]["statuses"] == verdict["equal"]["rows of the results"] == TRIALS

    ours = tmp_path / "disturbed"
    block, *_ = ours.glob("evaluations/*/nll-*/block-*.parquet")
    block.write_bytes(block.read_bytes()[:-1] + b"\0")
    journal, *_ = ours.glob("trials/*/journal.jsonl")
    first, *others = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([first, first, *others]))
    summary, *_ = ours.glob("evaluations/*/summary-*.json")
    summary.unlink()
    equal, problems = comparison.compare(tmp_path)
    lost = {kind: verdict["equal"][kind] - n for kind, n in equal.items() if n != verdict["equal"][kind]}
    assert lost.keys() == {"blocks, summaries and references", "points of journals"} and len(problems) == 2
