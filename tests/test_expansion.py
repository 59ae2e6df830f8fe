"""The trials and rows that a search means, and what they share."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from experiment_files import SAMPLE, content, digests, experiment, load_text, problems, search

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse, resolve
from orchestrator.experiment.records import ExperimentError, Variant
from orchestrator.experiment.settings import merge, put
from workers.config import Measurement, Trial
from workers.identity import compute_trial_id
from workers.layout import get_trial_of_row

# ---- Expanding


def test_a_grid_is_the_product_in_the_order_of_the_file() -> None:
    space: dict[str, list[Any]] = {"loss.weighting": ["simple", "vlb"], "diffusion.T": [10, 20, 30], "seed": [3, 4]}
    variants = expand(experiment(search=search({path: {"grid": values} for path, values in space.items()})))
    assert [tuple(v.params.values()) for v in variants] == list(itertools.product(*space.values()))
    for v in variants:
        assert (v.trial.loss.weighting, v.trial.diffusion.T, v.trial.seed) == tuple(v.params.values())


def test_no_space_is_one_trial() -> None:
    e = experiment()
    assert expand(e) == (Variant(params={}, trial=e.trial),)


def test_joint_settings_merge_into_their_section() -> None:
    values = [{"kind": "linear", "beta_end": 0.03}, {"kind": "cosine"}]
    e = experiment(
        diffusion={"schedule": {"beta_start": 0.001}}, search=search({"diffusion.schedule": {"grid": values}})
    )
    linear, cosine = (v.trial.diffusion.schedule for v in expand(e))
    assert (linear.kind, linear.beta_start, linear.beta_end) == ("linear", 0.001, 0.03)
    assert (cosine.kind, cosine.beta_start, cosine.beta_end) == ("cosine", 0.001, 0.02)


def random_search(samples: int, seed: int = 0, **more: Any) -> tuple[Variant, ...]:
    space = {
        "training.lr": {"loguniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.0, 0.5]},
        "diffusion.T": {"int_uniform": [5, 8]},
        "loss.weighting": {"choice": ["simple", "vlb"]},
        **more,
    }
    return expand(experiment(seed=seed, search=search(space, algorithm="random", samples=samples)))


def test_more_samples_keep_the_earlier_draws() -> None:
    assert random_search(40)[:7] == random_search(7)


def test_another_searched_path_keeps_the_draws() -> None:
    crossed = random_search(5, seed=3, **{"model.blocks": {"grid": [1, 2]}})
    alone = random_search(5, seed=3)
    assert len(crossed) == 10
    for k, v in enumerate(crossed):
        assert v.params == {**alone[k // 2].params, "model.blocks": 1 + k % 2}


def test_draws_differ_by_sample_path_and_seed_and_fill_their_ranges() -> None:
    variants = random_search(400)
    lrs = sorted(v.trial.training.lr for v in variants)
    assert 1e-4 <= lrs[0] < 1.1e-4 and 0.9e-2 < lrs[-1] <= 1e-2
    assert math.isclose(lrs[200], 1e-3, rel_tol=0.3)  # the median of a log-uniform law is its geometric mean
    assert {v.trial.diffusion.T for v in variants} == {5, 6, 7, 8}
    assert {v.trial.loss.weighting for v in variants} == {"simple", "vlb"}
    assert len({v.trial.model.dropout for v in variants}) == 400
    assert random_search(1, seed=1)[0].params != variants[0].params


def test_the_draws_are_those_of_every_machine_and_time() -> None:
    drawn = random_search(1)[0].params
    known = {"training.lr": 0.002912115, "model.dropout": 0.149640332, "diffusion.T": 8, "loss.weighting": "simple"}
    assert {path: v if isinstance(v, str) else round(v, 9) for path, v in drawn.items()} == known


# ---- Variants that are one trial


def test_variants_are_what_validation_makes_of_each_and_share_what_they_have_in_common() -> None:
    grid = {"diffusion.T": [50, 100], "diffusion.schedule": [{"kind": "cosine"}, {"beta_end": 0.01}]}
    e = experiment(
        search={"space": {**{path: {"grid": v} for path, v in grid.items()}, "seed": {"grid": [0, 1]},
                          "training.lr": {"grid": [1, 0.5]}, "loss": {"grid": [{"weighting": "vlb"}, {}]}}},
        evaluation={"nll": {"timesteps": 10}},
    )  # fmt: skip
    variants, base = expand(e), e.trial.model_dump()
    for variant in variants:
        whole = base
        for path, value in variant.params.items():
            whole = merge(whole, put({}, path.split("."), value))
        assert variant.trial == Trial.model_validate(whole)
        assert variant.trial.model_dump_json() == Trial.model_validate(whole).model_dump_json()
    assert len(variants) == 32 and len({id(v.trial.diffusion) for v in variants}) == 4
    assert all(v.trial.evaluation is e.evaluation for v in variants)


def test_variants_of_one_address_are_merged_with_a_warning() -> None:
    space = {
        "diffusion.schedule.kind": {"grid": ["linear", "cosine"]},
        "diffusion.schedule.beta_end": {"grid": [0.01, 0.02, 0.03]},
    }
    variants = expand(experiment(search=search(space)))
    trials, (warning,) = digests(variants)
    assert list(trials.values()) == [*variants[:3], variants[3]]
    assert warning == (
        "6 variants are 4 trials: 2 repeat another one (differ from it only in diffusion.schedule.beta_end, "
        "which their other settings leave without effect)"
    )


def test_equal_draws_are_merged_with_a_warning() -> None:
    e = experiment(search=search({"diffusion.T": {"choice": [5, 6]}}, algorithm="random", samples=9))
    trials, (warning,) = digests(expand(e))
    assert len(trials) == 2 and "9 variants are 2 trials: 7 repeat another one (equal it)" in warning


def test_different_trials_are_not_merged(tmp_path: Path) -> None:
    trials, warnings = digests(expand(load_text(tmp_path, SAMPLE)))
    assert len(trials) == 6 and not warnings


# ---- Rows that share a trial -----------------------------------------------------------------------------------


def test_measurements_of_one_trial_are_rows_that_share_its_address() -> None:
    """What is trained and what is measured cross: a row each, the training's address in front."""
    space = {
        "diffusion.T": {"grid": [50, 60]},
        "evaluation.fid.sampler": {"grid": [{"kind": "ddim"}, {"kind": "heun"}]},
        "evaluation.fid.sampler.steps": {"grid": [5, 10]},
    }
    found, warnings = digests(expand(experiment(search=search(space))))
    assert len(found) == 8 and not warnings
    assert len({get_trial_of_row(row) for row in found}) == 2
    for row, variant in found.items():
        assert get_trial_of_row(row) == compute_trial_id(variant.trial, "d") and row != get_trial_of_row(row)
    alone, _ = digests(expand(experiment(search=search({"diffusion.T": {"grid": [50, 60]}}))))
    assert set(alone) == {get_trial_of_row(row) for row in found}


def test_a_row_keeps_its_address_when_others_come_beside_it() -> None:
    path = "evaluation.fid.sampler.steps"
    few, many = (
        set(digests(expand(experiment(search=search({path: {"grid": steps}}))))[0]) for steps in ([5, 9], [7, 5, 9, 2])
    )
    assert few < many


def test_rows_that_are_measured_alike_are_one() -> None:
    """As many steps as there are is all of them, and the variance of the model itself is no other."""
    space = {
        "evaluation.fid.sampler.steps": {"grid": [None, 1000]},
        "evaluation.variance": {"grid": [None, "fixed_large", "fixed_small"]},
    }
    found, (warning,) = digests(expand(experiment(search=search(space))))
    assert len(found) == 2 and "4 repeat another one" in warning


def test_an_average_that_is_not_kept_is_refused() -> None:
    (problem,) = problems(training={"ema": 0.9, "averages": [0.5]}, evaluation={"ema": 0.99})
    assert "evaluation.ema: 0.99 is no average that is kept in training, which are 0.9, 0.5" in problem
    e = experiment(
        training={"ema": 0.9, "averages": [0.5, 0]}, search=search({"evaluation.ema": {"grid": [0.9, 0.5, 0]}})
    )
    found, _ = digests(expand(e))
    assert [Measurement.of(v.trial).evaluation.ema for v in found.values()] == [None, 0.5, 0]


def test_averages_count_where_there_are_any() -> None:
    plain, kept = (compute_trial_id(experiment(training={"averages": a}).trial, "d") for a in ([], [0.5]))
    assert plain == compute_trial_id(experiment().trial, "d") != kept


# ---- What a search leaves out ----------------------------------------------------------------------------------


def test_a_search_leaves_out_what_it_is_told_to():
    space = {"loss.objective": {"grid": ["kl", "mse"]}, "diffusion.variance": {"grid": ["learned", "fixed_large"]}}
    without = [{"loss.objective": "mse", "diffusion.variance": "learned"}]
    e = parse(content(search={"space": space, "without": without}))
    assert [tuple(v.params.values()) for v in expand(e)] == [
        ("kl", "learned"),
        ("kl", "fixed_large"),
        ("mse", "fixed_large"),
    ]
    assert parse(resolve(e)) == e
    for wrong, text in (
        ([{"loss.objectve": "mse"}], "search.without[0].loss.objectve: not a path of search.space"),
        ([{}], "search.without[0]: {} would leave out every variant"),
        ([{"loss.objective": "kl"}, {"loss.objective": "mse"}], "search.without: leaves out every variant"),
    ):
        with pytest.raises(ExperimentError) as caught:
            parse(content(search={"space": space, "without": wrong}, diffusion={"variance": "fixed_large"}))
        assert any(text in problem for problem in caught.value.problems), caught.value.problems
