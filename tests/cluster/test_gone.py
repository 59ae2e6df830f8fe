"""A file that a finished sweep keeps is deleted: the same command has it there again, and trains nothing."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import run, sweep

KEPT = ("sweep.json", "published.json", "mlflow.json", "experiment.yaml", "results.parquet")


@pytest.mark.faults
def test_each_file_of_a_sweep_may_be_gone(own: tuple[Path, Path]) -> None:
    file, storage = own
    folder = storage / "sweeps/tiny"
    before = pd.read_parquet(folder / "results.parquet")
    for name in KEPT:
        (folder / name).unlink()
        again = sweep(file, "--storage", storage)
        output = again.stdout + again.stderr
        assert again.returncode == 0 and "older version" not in output and "Traceback" not in output, (name, output)
        assert "training    step" not in output and (folder / name).stat().st_size > 0, name
        after = pd.read_parquet(folder / "results.parquet")
        assert list(after["trial"]) == list(before["trial"]), name
        assert after["eval/nll_bpd"].equals(before["eval/nll_bpd"]), name


def test_a_sweep_whose_sweep_json_is_gone_is_told_by_all_that_read_it(own: tuple[Path, Path]) -> None:
    _, storage = own
    (storage / "sweeps/tiny/sweep.json").unlink()
    for command in (("status",), ("status", "tiny"), ("report", "tiny"), ("evaluate", "tiny")):
        done = run(f"orchestrator.{command[0]}", *command[1:], "--storage", storage)
        output = done.stdout + done.stderr
        assert done.returncode == (0 if command == ("status",) else 2), (command, output)
        assert "tiny/sweep.json is gone; run the same sweep command again" in output, (command, output)
        assert "older version" not in output and "Traceback" not in output, (command, output)


def test_a_sweep_whose_events_are_gone_is_not_called_cut_off(own: tuple[Path, Path]) -> None:
    """What happened cannot be made again, and nothing rests on it."""
    file, storage = own
    (storage / "sweeps/tiny/events.jsonl").unlink()
    again = sweep(file, "--storage", storage)
    assert again.returncode == 0 and "training    step" not in again.stdout, again.stdout + again.stderr
    seen = run("orchestrator.status", "--storage", storage).stdout
    assert "2 done" in seen and "or its events are gone" in seen and "command is gone" not in seen, seen
