"""What a finished sweep keeps is damaged or deleted: the same command says so and makes it again, the same numbers."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import run, runs, statuses, sweep

from orchestrator.api import load_results
from workers.journal import read_points
from workers.storage import Storage

RESULTS = ["experiment.yaml", "results.parquet", "results.csv", "nll_and_distance.png", "report.html"]


def numbers(storage: Path) -> list[Any]:
    """What was measured, in the order of the results; the speed is not of that kind."""
    return json.loads(without_speeds(load_results("tiny", storage)).to_json(orient="records"))


def without_speeds(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[name for name in map(str, frame) if name == "images_per_s" or name.startswith("perf/")])


def points(storage: Path) -> dict[str, list[Any]]:
    """Each trial's journal but for what clocks say."""
    found = {d: read_points(Storage(storage), f"trials/{d}") for d in statuses(storage)}
    for point in (p for all_ in found.values() for p in all_):
        del point["time_ms"]
        point.get("metrics", {}).pop("train/images_per_s", None)
    return found


def flip(file: Path, place: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


@pytest.mark.faults
def test_the_files_of_a_sweep_are_written_again_without_ray(own: tuple[Path, Path]) -> None:
    file, storage = own
    before, of_before = numbers(storage), points(storage)
    folder, (a, b) = storage / "sweeps/tiny", sorted(statuses(storage))
    frame = pd.read_parquet(folder / "results.parquet")
    (folder / "results.parquet").write_bytes((folder / "results.parquet").read_bytes()[:-9])
    (folder / "results.csv").unlink()
    (folder / "report.html").write_text("")
    flip(folder / "sweep.json", 300)
    (folder / "events.jsonl").write_bytes(b"\x00\xff" * 99)
    (storage / f"trials/{a}/trial.yaml").unlink()
    flip(storage / f"trials/{b}/trial.yaml", 40)
    journal = storage / f"trials/{a}/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])

    broken = run("orchestrator.status", "--storage", storage)
    assert broken.returncode == 0 and "sweep.json is damaged" in broken.stdout and "Traceback" not in broken.stderr
    assert run("orchestrator.report", "tiny", "--storage", storage).returncode == 2

    again = sweep(file, "--storage", storage)
    assert again.returncode == 0 and "Traceback" not in again.stdout + again.stderr, again.stdout + again.stderr
    assert "training    step" not in again.stdout  # it is all there
    for path in ("sweeps/tiny/sweep.json", "sweeps/tiny/events.jsonl", f"trials/{b}/trial.yaml", journal.name):
        assert f"{path} is damaged" in again.stdout, path
    assert "sweeps/tiny/results.parquet has changed; it is written again" in again.stdout
    assert "sweeps/tiny/results.csv is gone; it is written again" in again.stdout
    assert numbers(storage) == before and points(storage) == of_before
    assert without_speeds(pd.read_parquet(folder / "results.parquet")).equals(without_speeds(frame))
    assert all((folder / name).stat().st_size > 0 for name in RESULTS)
    for command in (("evaluate", a), ("compare", a, b), ("status", "tiny"), ("report", "tiny")):
        result = run(f"orchestrator.{command[0]}", *command[1:], "--storage", storage)
        assert result.returncode == 0 and "damaged" not in result.stdout + result.stderr, (command, result.stderr)
    quiet = sweep(file, "--storage", storage)
    assert quiet.returncode == 0 and "damaged" not in quiet.stdout


@pytest.mark.faults
def test_what_results_rest_on_is_made_again_to_the_same_numbers(own: tuple[Path, Path]) -> None:
    file, storage = own
    before, of_before = numbers(storage), points(storage)
    hashes = {p.name: json.loads(p.read_text())["hash"] for p in storage.glob("evaluations/*/summary-*.json")}
    parent, children = runs(storage)
    a, b = sorted(statuses(storage))
    [classifier] = storage.glob("references/*-classifier.npz")
    flip(classifier, 69, 0x20)
    checkpoint = statuses(storage)[a]["checkpoint"]
    for features in storage.glob(f"evaluations/{checkpoint}/samples-*-classifier-*"):
        for block in features.iterdir():
            block.unlink()
    [summary] = storage.glob(f"evaluations/{checkpoint}/summary-*.json")
    summary.write_text(summary.read_text().replace("2.", "3.", 1))
    (storage / f"trials/{a}/journal.jsonl").unlink()
    (storage / f"trials/{b}/status.json").write_text("{")

    again = sweep(file, "--storage", storage)
    assert again.returncode == 0 and "Traceback" not in again.stdout + again.stderr, again.stdout + again.stderr
    for words in (
        f"{summary.name} is damaged",
        f"trials/{a}/journal.jsonl was deleted",
        f"trials/{b}/status.json is damaged",
        f"{classifier.name} is damaged",
    ):
        assert words in again.stdout, (words, again.stdout)
    assert numbers(storage) == before and points(storage) == of_before
    assert {p.name: json.loads(p.read_text())["hash"] for p in storage.glob("evaluations/*/summary-*.json")} == hashes
    again_parent, again_children = runs(storage)
    assert again_parent.info.run_id == parent.info.run_id  # and the trials' runs with their curves are the same
    assert {r.info.run_id for r in again_children} == {r.info.run_id for r in children}


@pytest.mark.faults
def test_a_checkpoint_that_cannot_be_read_holds_up_no_other_trial(own: tuple[Path, Path]) -> None:
    file, storage = own
    a, b = sorted(statuses(storage))
    [manifest] = storage.glob(f"trials/{a}/checkpoints/*/manifest.json")
    flip(manifest, 30)
    (storage / f"trials/{b}/status.json").unlink()
    result = sweep(file, "--storage", storage)
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    assert f"{manifest} is damaged" in result.stdout and f"{b[:8]}" in result.stdout
    assert statuses(storage)[b]["state"] == "finished"
    fresh = sweep(file, "--storage", storage, "--fresh")
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    assert set(state for state in (s["state"] for s in statuses(storage).values())) == {"finished"}


def test_every_json_file_of_a_storage_is_sealed(finished: tuple[Path, Path, str]) -> None:
    ours = [p for top in ("sweeps", "trials", "evaluations", "speeds") for p in (finished[1] / top).rglob("*.json")]
    files = [p for p in ours if not {"unet", "scheduler", "state"} & set(p.parts) and p.name != "model_index.json"]
    assert len(files) > 5 and [p for p in files if "seal" not in json.loads(p.read_text())] == []
