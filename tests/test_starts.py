"""Trials that start from others: what they share, in which order, and that it changes no bit of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_files import digests, experiment, problems, search

from orchestrator.experiment.effort import count_costs
from orchestrator.experiment.expand import expand, find_starting_rows
from orchestrator.experiment.records import Experiment, ExperimentError, Variant
from orchestrator.experiment.settings import merge
from orchestrator.origins import keep_copies, pin_starts
from orchestrator.state.saved import keep_sweep, open_sweep
from orchestrator.sweep import list_trials
from workers.config import TrainingConfig, Trial
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.first_weights import compare_shapes, load_first_weights
from workers.identity import compute_trial_id
from workers.layout import RowId, get_trial_of_row, name_start_folder, name_sweep_file
from workers.learner import Learner, compute_learning_rate
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.speed import name_training_kind
from workers.storage import Storage
from workers.training import train
from workers.warm_start import INIT, TRUNK, InitConfig, split_pin
from workers.world import World

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


def starts_of(rows: dict[RowId, Variant], data: str = "d") -> dict[RowId, dict[str, RowId]]:
    return find_starting_rows(rows, lambda config: data)


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
    assert [starts[row] for row in branches] == [{TRUNK: row} for row in trunks] and len(starts) == 3


def test_a_trunk_that_is_asked_for_itself_is_no_other_row() -> None:
    space = {"training": {"grid": [{"steps": 6}, {"steps": 10, "cooldown": 4}]}}
    rows = rows_of(search=search(space))
    plain, branch = rows
    assert not rows[plain].role and starts_of(rows) == {branch: {TRUNK: plain}}


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
    assert run(branch, "trials/branch", starts={TRUNK: place})[-1] == steps
    alone, made = (
        manifest.open_committed(storage, f"trials/{name}/checkpoints/{manifest.name_step(steps)}")
        for name in ("alone", "branch")
    )
    assert dict(alone.sums)[manifest.STATE] == dict(made.sums)[manifest.STATE]
    assert manifest.list_models(alone)[1].digest == manifest.list_models(made)[1].digest
    assert alone.digest == made.digest
    status = storage.read_sealed("trials/branch/status.json")
    assert status and status["state"] == "finished" and status["spent"][name_training_kind(trial.training)][0] == 6 * 32


# ---- Warm starts


def chain(cooldown: int = 0, **init: Any) -> Experiment:
    """Two learning rates of a fine-tuning from `mid`, which starts from `base`."""
    needs = {
        "mid": {"training.steps": 8, "training.init.source": "base", "diffusion.T": 30},
        "base": {"training.steps": 6, "training.lr": 1e-3},
    }
    training = {"init": {"source": "mid", **init}, "cooldown": cooldown}
    space = {"training.lr": {"grid": [1e-3, 2e-3]}}
    return experiment(**merge(SMALL, {"training": training, "needs": needs, "search": search(space)}))


def all_rows(e: Experiment) -> dict[RowId, Variant]:
    return list_trials(e)[0]


def test_a_chain_is_made_once_for_all_that_need_it(tmp_path: Path) -> None:
    rows = all_rows(pin_starts(chain(), str(tmp_path)))
    base, mid, one, other = rows
    assert [rows[row].role for row in (base, mid, one, other)] == ["base", "mid", "", ""]
    starts = starts_of(rows, describe(rows[base].trial.data).digest)
    assert starts == {mid: {INIT: base}, one: {INIT: mid}, other: {INIT: mid}}
    assert rows[base].trial.training.init is None and rows[mid].trial.diffusion.T == 30


def test_a_sweep_of_before_is_read_whose_rows_start_from_one_other(tmp_path: Path) -> None:
    rows = all_rows(pin_starts(cooled := chain(cooldown=4), str(tmp_path)))
    storage, sources = Storage(tmp_path), {cooled.data: describe(cooled.data)}
    keep_sweep(storage, cooled, rows, sources)
    kept = open_sweep(storage, cooled.name)
    assert kept.starts == starts_of(rows, sources[cooled.data].digest) != {}
    content = storage.read_sealed(path := name_sweep_file(cooled.name, "sweep.json"))
    assert content
    for row in content["trials"].values():
        for start in row.pop("starts", {}).values():
            row["start"] = start
    storage.write_sealed(path, content, sort=False)
    assert open_sweep(storage, cooled.name).starts == kept.starts
    keep_sweep(storage, cooled, rows, sources)
    assert "start" not in (storage.read_sealed(path) or {})["trials"][next(reversed(rows))]


def test_the_id_of_what_is_needed_is_in_the_id(tmp_path: Path) -> None:
    def ids(e: Experiment) -> list[RowId]:
        return [*all_rows(pin_starts(e, str(tmp_path)))][-2:]

    first = ids(chain())
    renamed = {"second": chain().needs["mid"] | {"training.init.source": "first"}, "first": chain().needs["base"]}
    training = {"init": {"source": "second"}}
    space = {"training.lr": {"grid": [1e-3, 2e-3]}}
    again = experiment(**merge(SMALL, {"training": training, "needs": renamed, "search": search(space)}))
    assert ids(again) == first, "a name is no part of it"
    for changed in ({"weights": "raw"}, {"fresh": ["conv_out"]}):
        assert not set(ids(chain(**changed))) & set(first)
    further = chain()
    further.needs["base"]["training.steps"] = 7
    assert not set(ids(further)) & set(first), "that of the base changes those of all that come from it"


@pytest.mark.parametrize("weights", ["ema", "raw", 0.5])
def test_a_training_begins_with_the_weights_that_it_names(tmp_path: Path, weights: Any) -> None:
    trial = experiment(**SMALL).trial
    base = trial.model_copy(update={"training": trial.training.model_copy(update={"steps": 3})})
    storage, dataset = Storage(tmp_path), prepare(trial.data)
    list(train(base, dataset, storage, "trials/base"))
    place = f"trials/base/checkpoints/{manifest.name_step(3)}"
    made = manifest.open_committed(storage, place)
    ema, state, _ = checkpoints.load_state(made)
    raw = {name.removeprefix("weights."): w for name, w in state.items() if name.startswith("weights.")}
    expected = {"ema": ema, "raw": raw, 0.5: checkpoints.load_averages(made, [0.5])[0.5]}[weights]
    init = InitConfig(source="base@0123456789abcdef", weights=weights, fresh=("conv_out",))
    tuned = trial.model_copy(update={"training": trial.training.model_copy(update={"init": init, "steps": 6})})
    learner = Learner(tuned, dataset, World())
    random = learner.module.state_dict()["conv_out.weight"].clone()
    learner.begin_with(load_first_weights(made, weights), init.fresh)
    for own in (learner.module.state_dict(), learner.ema, learner.averages[0.5]):
        assert all(torch.equal(own[name], expected[name]) for name in expected if not name.startswith("conv_out"))
        assert torch.equal(own["conv_out.weight"], random) and not torch.equal(random, expected["conv_out.weight"])

    def run(folder: str, stop: bool = False) -> str:
        loop: Any = train(tuned, dataset, storage, folder, starts={INIT: place})
        for _ in range(2 if stop else 100):
            next(loop, None)
        loop.close()
        newest = manifest.find_newest(storage, f"{folder}/checkpoints")
        return newest.digest if newest else ""

    assert run("trials/parts", stop=True) != "" and run("trials/parts") == run("trials/whole")


def test_a_copy_of_a_checkpoint_from_outside_holds_all_its_weights(tmp_path: Path) -> None:
    trial = experiment(**SMALL).trial
    base = trial.model_copy(update={"training": trial.training.model_copy(update={"steps": 3})})
    there, here = Storage(tmp_path / "there"), Storage(tmp_path / "here")
    list(train(base, prepare(trial.data), there, "trials/base"))
    folder = str(tmp_path / "there/trials/base/checkpoints" / manifest.name_step(3))

    def start(**init: Any) -> Experiment:
        return experiment(**merge(SMALL, {"training": {"steps": 6, "init": {"source": folder, **init}}}))

    pinned = pin_starts(start(weights=0.5), here.root)
    [tuned] = [variant.trial for variant in all_rows(pinned).values()]
    assert tuned.training.init
    _, pin = split_pin(tuned.training.init.source)
    keep_copies(pinned, [tuned], here)
    outside, copy = (
        manifest.open_committed(storage, path)
        for storage, path in (
            (there, f"trials/base/checkpoints/{manifest.name_step(3)}"),
            (here, f"{name_start_folder(pin)}/{manifest.name_step(0)}"),
        )
    )
    for choice in ("ema", "raw", 0.5):
        theirs, ours = load_first_weights(outside, choice), load_first_weights(copy, choice)
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = pin_starts(start(weights="raw"), here.root)
    assert again.pins == pinned.pins, "the same content"
    shutil.copytree(folder, moved := tmp_path / "moved")
    assert set(pin_starts(start(source=str(moved)), here.root).pins.values()) == set(pinned.pins.values())
    with pytest.raises(ExperimentError, match=r"has no weights 0\.25; it has ema, raw, 0\.5"):
        pin_starts(start(weights=0.25), here.root)


def test_each_weight_that_does_not_fit_is_named() -> None:
    own = {"conv_in.weight": (8, 1, 3, 3), "conv_out.weight": (1, 8, 3, 3), "conv_out.bias": (1,), "more.scale": ()}
    given = {"conv_in.weight": (8, 3, 3, 3), "conv_out.weight": (2, 8, 3, 3), "conv_out.bias": (1,), "other": (3,)}
    [text] = compare_shapes(own, given, [])
    for each in (
        "conv_in.weight (8x1x3x3 here, 8x3x3x3 there)", "conv_out.weight (1x8x3x3 here, 2x8x3x3 there)",
        "more.scale (a number here, not there)", "other (not here, 3 there)",
    ):  # fmt: skip
        assert each in text
    assert text.startswith("4 of 4 weights do not fit") and "conv_out.bias" not in text
    assert compare_shapes(own, given, ["conv_in", "conv_out", "more", "other"]) == [
        "training.init.fresh: other is no part of the network, which has conv_in, conv_out, more"
    ]
    assert compare_shapes(own, {**own, "conv_out.weight": (2, 8, 3, 3)}, ["conv_out"]) == []


# ---- What does not go together


def test_mistakes_of_needs(tmp_path: Path) -> None:
    def told(needs: Any, **init: Any) -> list[str]:
        return problems(**merge(SMALL, {"training": {"init": {"source": "a", **init}}, "needs": needs}))

    assert told({"a": {"training.init.source": "b"}, "b": {"training.init.source": "a"}}) == [
        "needs: a, b start from each other in a circle; let one of them begin by itself"
    ]
    assert told({"a": {"training.stepps": 3, "training.lr": "x"}, "b": {}}) == [
        "needs.a.training.stepps: no such setting of what is trained; did you mean 'training.steps'?",
        "needs.a.training.lr: 'x' is not a number above 0",
    ]
    [unused] = told({"a": {}, "b": {}})
    assert unused.startswith("needs.b: nothing starts from it, but from a; name it in training.init.source")
    assert told({"a": {"training.cooldown": 11}}) == [
        "needs.a: training.cooldown: 11 is more than training.steps = 10; at most as many"
    ]
    [sourceless] = problems(search=search({"training.init.weights": {"grid": ["ema", "raw"]}}))
    assert sourceless.startswith("search.space.training.init.weights: nothing to start from")


def test_sources_that_are_not_found_are_ambiguous_or_do_not_fit(tmp_path: Path) -> None:
    def told(e: Experiment) -> list[str]:
        with pytest.raises(ExperimentError) as caught:
            pin_starts(e, str(tmp_path))
        return caught.value.problems

    [missing] = told(experiment(training={"init": {"source": "nowhere"}}))
    assert missing.startswith("training.init.source: 'nowhere' is no folder, and neither a sweep nor a trial in")
    of = experiment(**merge(SMALL, {"training": {"init": {"source": "a"}}, "needs": {"a": {"model.channels": 4}}}))
    [misfit] = told(of)
    assert "training.init.source: a: 143 of 144 weights do not fit: conv_in.weight (8x1x3x3 here, 4x1x3x3" in misfit
    Storage(tmp_path).write_sealed("sweeps/a/sweep.json", {"ids": 2, "name": "a", "trials": {}})
    assert told(of) == [
        f"training.init.source: a is a name of needs, and also a sweep in {tmp_path}; give it another name in needs"
    ]


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
