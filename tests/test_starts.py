"""Trials that start from others: what they share, in which order, and that it changes no bit of them."""

from pathlib import Path
from typing import Any

import pytest
from experiment_files import digests, experiment, problems, search

from orchestrator.experiment.effort import count_costs
from orchestrator.experiment.expand import expand, find_starting_rows
from orchestrator.experiment.records import Variant
from workers.config import TrainingConfig, Trial
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.identity import compute_trial_id
from workers.layout import RowId, get_trial_of_row
from workers.learner import compute_learning_rate
from workers.network import manifest
from workers.speed import name_training_kind
from workers.storage import Storage
from workers.training import train

SMALL = {
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}},
    "training": {
        "batch_size": 32, "lr": 2e-3, "warmup": 3, "ema": 0.9, "averages": [0.5], "precision": "float32",
        "timesteps": "importance", "validate_every": 6, "checkpoint_every": 3,
    },
}  # fmt: skip


def rows_of(**sections: Any) -> dict[RowId, Variant]:
    return digests(expand(experiment(**sections)))[0]


def starts_of(rows: dict[RowId, Variant]) -> dict[RowId, RowId]:
    return find_starting_rows(rows, lambda config: "d")


# ---- The learning rate


def test_the_rate_is_constant_and_then_falls_linearly_to_zero() -> None:
    training = TrainingConfig(steps=10, cooldown=4, lr=2.0, warmup=2)
    rates = [compute_learning_rate(training, step) for step in range(10)]
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    trunk = TrainingConfig(steps=6, lr=2.0, warmup=2)
    assert rates[:6] == [compute_learning_rate(trunk, step) for step in range(6)]


def test_a_part_of_the_steps_is_so_many_steps() -> None:
    def identify(**training: Any) -> str:
        return compute_trial_id(experiment(training=training).trial, "d")

    assert identify(steps=40, cooldown=0.2) == identify(steps=40, cooldown=8) != identify(steps=40, cooldown=9)
    assert identify(steps=40, cooldown=0.01) == identify(steps=40) == identify(steps=50)  # it is no step at all
    assert identify(steps=40, cooldown=8) != identify(steps=50, cooldown=8)


# ---- What is shared


def test_branches_of_all_lengths_share_one_trunk() -> None:
    rows = rows_of(training={"cooldown": 4}, search=search({"training.steps": {"grid": [10, 30, 20]}}))
    plain = compute_trial_id(experiment(training={"steps": 99}).trial, "d")
    trunks = {row: v for row, v in rows.items() if v.role}
    assert list(rows)[:3] == list(trunks) and {get_trial_of_row(row) for row in trunks} == {plain}
    assert [v.params for v in trunks.values()] == [{"training.steps": n} for n in (6, 26, 16)]
    assert not any(v.trial.evaluation.measures for v in trunks.values())
    starts = starts_of(rows)
    branches = [row for row in rows if row not in trunks]
    assert [starts[row] for row in branches] == list(trunks) and len(starts) == 3


def test_a_trunk_that_is_asked_for_itself_is_no_other_row() -> None:
    space = {"training": {"grid": [{"steps": 6}, {"steps": 10, "cooldown": 4}]}}
    rows = rows_of(search=search(space))
    plain, branch = rows
    assert not rows[plain].role and starts_of(rows) == {branch: plain}


def test_a_sweep_over_steps_costs_the_longest_trunk_and_the_cooldowns() -> None:
    e = experiment(**SMALL, search=search({"training.steps": {"grid": [20, 40, 80]}, "seed": {"grid": [0, 1]}}))
    with_fall = e.model_copy(update={"training": e.training.model_copy(update={"cooldown": 0.25})})
    rows = digests(expand(with_fall))[0]
    prices = count_costs(rows, {e.data: describe(e.data)})
    assert sum(price.training_evaluations for price in prices) == 2 * 32 * (60 + 5 + 10 + 20)


@pytest.mark.parametrize(("steps", "start"), [(18, 12), (17, 11)])
def test_a_branch_ends_in_the_bits_of_a_run_alone(tmp_path: Path, steps: int, start: int) -> None:
    trial = experiment(**SMALL).trial
    branch = trial.model_copy(update={"training": trial.training.model_copy(update={"steps": steps, "cooldown": 6})})
    trunk = trial.model_copy(update={"training": trial.training.model_copy(update={"steps": start})})
    storage, dataset = Storage(tmp_path), prepare(trial.data)

    def run(trial: Trial, folder: str, **more: Any) -> list[int]:
        return [progress.step for progress in train(trial, dataset, storage, folder, **more)]

    assert run(branch, "trials/alone")[0] == 0
    run(trunk, "trials/trunk")
    place = f"trials/trunk/checkpoints/{manifest.name_step(start)}"
    assert run(branch, "trials/branch", start=place)[-1] == steps
    alone, made = (
        manifest.open_committed(storage, f"trials/{name}/checkpoints/{manifest.name_step(steps)}")
        for name in ("alone", "branch")
    )
    assert dict(alone.sums)[manifest.STATE] == dict(made.sums)[manifest.STATE]
    assert manifest.list_models(alone)[1].digest == manifest.list_models(made)[1].digest
    assert alone.digest == made.digest
    status = storage.read_sealed("trials/branch/status.json")
    assert status and status["state"] == "finished" and status["spent"][name_training_kind(trial.training)][0] == 6 * 32


# ---- What does not go together


def test_mistakes_of_a_cooldown() -> None:
    assert problems(training={"cooldown": 4, "decay": "cosine"}) == [
        "training.cooldown: 4 steps of a falling learning rate beside training.decay: cosine, in which it falls all "
        "the time; leave one out"
    ]
    assert problems(training={"cooldown": 11}) == [
        "training.cooldown: 11 is more than training.steps = 10; at most as many"
    ]
    space = {"training.lr": {"grid": [1e-3, 2e-3]}}
    [found] = problems(training={"cooldown": 4}, search=search(space, scheduler={"kind": "asha"}))
    assert found.startswith("search.scheduler.kind: asha would stop trials that others start from")
