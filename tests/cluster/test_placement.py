"""Trials of 1 to 8 GPUs at once on a simulated cluster of 16 nodes and 128 GPUs: all end, each inside of one node."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.clusters


def test_trials_of_mixed_sizes_share_128_gpus_and_one_node_is_lost() -> None:
    """Placement groups, drivers and evaluation tasks are real; trials sleep where they would train."""
    command = [sys.executable, "benchmarks/simulated_cluster.py", "--nodes", "16", "--trials", "60", "--seconds", "6"]
    run = subprocess.run([*command, "--lose-a-node", "--json"], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["ended"] == 60 and not result["failures"]
    assert result["gpus"] == 15 * 8  # after the loss
    assert result["most_nodes_a_trial"] == 1  # STRICT_PACK
    assert result["most_gpus_at_once"] <= 128
    assert result["blocks"] == 12 and result["blocks_while_others_train"] > 0
    assert result["sizes_at_once"] > 1
    assert "16 nodes of 10 CPUs and 8 GPUs" in result["messages"][0]
