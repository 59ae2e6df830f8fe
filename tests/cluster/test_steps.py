"""A trial is its whole sequence of weights: `training.steps` says how far it is made, and rows name steps of it."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import sweep, trials_of, undisturbed

from orchestrator.state.events import read_events
from workers.layout import get_trial_of_row, name_checkpoints_folder
from workers.network import manifest
from workers.storage import Storage

SHORT = ("search.space.loss.weighting=null", "training.validate_every=10", "training.checkpoint_every=5")


def digests(storage: Path, trial: str) -> dict[int, str]:
    """The checkpoints that are there, by step."""
    place, folder = Storage(storage), name_checkpoints_folder(trial)
    found = [manifest.open_committed(place, f"{folder}/{name}") for name in place.list(folder)]
    return {checkpoint.step or 0: checkpoint.digest for checkpoint in found}


def begun(storage: Path) -> int:
    """How often training began, over all commands."""
    return sum(event["event"] == "began" for event in read_events(Storage(storage), "tiny"))


def results(storage: Path) -> pd.DataFrame:
    return pd.read_parquet(storage / "sweeps/tiny/results.parquet").set_index("step").sort_index()


@pytest.mark.faults
def test_a_sweep_over_steps_trains_once_and_measures_each(tiny: Path, tmp_path: Path) -> None:
    """Then it asks for more, and for fewer: what is there stays, and all ends in the bits of trials by themselves."""
    storage = tmp_path / "runs"

    def run(steps: str) -> str:
        done = sweep(tiny, "--storage", storage, *SHORT, f"search.space.training.steps.grid={steps}")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("[5, 20]")
    first = results(storage)
    [trial] = {get_trial_of_row(row) for row in first["trial"]}
    assert list(first.index) == [5, 20] and list(first["state"]) == ["done", "done"] and begun(storage) == 1
    before = digests(storage, trial)
    assert list(before) == [5, 20]
    output = run("[5, 12, 20, 30]")
    assert (
        "goes on from step 20 to 30" in output and "its checkpoint of step 12 is not there: it is made again" in output
    )
    second, after = results(storage), digests(storage, trial)
    assert list(second.index) == [5, 12, 20, 30] and set(second["state"]) == {"done"} and begun(storage) == 2
    assert {step: after[step] for step in before} == before and list(after) == [5, 12, 20, 30]
    assert list(second.loc[[5, 20], "eval/nll_bpd"]) == list(first["eval/nll_bpd"])
    assert second["eval/nll_bpd"].nunique() == 4
    for step, digest in after.items():
        [alone] = trials_of(tiny, *SHORT, f"training.steps={step}").values()
        assert digest == undisturbed(alone, tmp_path / f"plain-{step}"), step
    output = run("[30]")
    assert begun(storage) == 2 and list(digests(storage, trial)) == [5, 12, 20, 30]


@pytest.mark.faults
def test_a_trial_of_two_workers_goes_on_to_the_bits_of_one_that_was_asked_for_so(tiny: Path, tmp_path: Path) -> None:
    two = (*SHORT, "training.workers=2", "evaluation={nll: {images: 25}, fid: null}", "search.metric=eval/nll_bpd")
    found = []
    for name, all_steps in (("longer", (10, 20)), ("whole", (20,))):
        for steps in all_steps:
            done = sweep(tiny, "--storage", tmp_path / name, *two, f"training.steps={steps}")
            assert done.returncode == 0, done.stdout + done.stderr
        [trial] = trials_of(tiny, *two, "training.steps=20")
        found.append(digests(tmp_path / name, trial))
    longer, whole = found
    assert list(longer) == [10, 20] and longer[20] == whole[20]


@pytest.mark.faults
def test_a_storage_from_before_is_recognised_and_left_alone(tiny: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "runs")
    storage.write_sealed("sweeps/tiny/sweep.json", {"name": "tiny", "trials": {}})
    storage.write("sweeps/tiny/results.parquet", b"numbers")
    before = storage.read("sweeps/tiny/sweep.json")
    refused = sweep(tiny, "--storage", storage.root, *SHORT)
    assert refused.returncode == 2 and "ids of an older kind, and are not read" in refused.stderr
    assert "--fresh" in refused.stderr and "--storage" in refused.stderr and "Traceback" not in refused.stderr
    assert storage.read("sweeps/tiny/sweep.json") == before
    done = sweep(tiny, "--storage", storage.root, *SHORT, "--fresh")
    assert done.returncode == 0, done.stderr
    assert storage.read("sweeps/tiny/older/results.parquet") == b"numbers"
