"""What is refused or warned about before anything starts, what a trial costs, and the table of a dry run."""

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.experiment.dry_run import format_count, format_dry_run
from orchestrator.experiment.effort import Cost, count_cost, count_costs
from orchestrator.experiment.expand import expand, group_by_row
from orchestrator.experiment.load import parse
from orchestrator.experiment.preflight import check_before_start, describe_data, list_source_warnings, measure_chain
from orchestrator.experiment.records import ExperimentError, Variant
from orchestrator.experiment.settings import merge
from workers.config import SAMPLE_GRID, DiffusionConfig, LossConfig, ScheduleConfig, Trial
from workers.data.sources import Source
from workers.diffusion.objectives import weights
from workers.diffusion.process import Process
from workers.diffusion.schedules import betas, log_snrs
from workers.layout import RowId

DIGITS = Source("d" * 16, "digits", "digits", 1497, 300, True, 17, (8, 8, 1))
SMALL = {
    "name": "e",
    "data": {"source": "digits"},
    "model": {"channels": 8, "multipliers": [1, 2], "attention": [4]},
    "training": {"steps": 1000, "batch_size": 64, "validate_every": 400},
}


def check(source: Source = DIGITS, **sections: Any) -> list[str]:
    e = parse(merge(SMALL, sections))
    variants = expand(e)
    return check_before_start(e, variants, {v.trial.data: source for v in variants})


def refused(source: Source = DIGITS, **sections: Any) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        check(source, **sections)
    return caught.value.problems


def trial(**sections: Any) -> Trial:
    return parse(merge(SMALL, sections)).trial


def linear(T: int, scale: Any = "absolute", **more: Any) -> DiffusionConfig:
    return DiffusionConfig(T=T, schedule=ScheduleConfig(scale=scale, **more))


# ---- The chain


@pytest.mark.parametrize(("T", "gap"), [(100, 0.129), (250, 0.0168), (500, 0.00116), (1000, 7.3e-6)])
def test_the_prior_gap_of_a_short_chain(T: int, gap: float) -> None:
    assert measure_chain(linear(T)).photographs_bpd == pytest.approx(gap, rel=0.01)


def test_the_bound_on_the_gap_is_above_that_of_photographs() -> None:
    for T in (1, 10, 100, 1000):
        ends = measure_chain(linear(T))
        closed_form = -0.5 * math.log2(1 - ends.alpha_bar_T)  # at E[x_0^2] = 1 the other terms cancel
        assert ends.photographs_bpd < ends.prior_bpd == pytest.approx(closed_form, rel=1e-6)


def test_a_chain_that_is_long_enough_passes_in_silence() -> None:
    assert check() == []


def test_a_gap_above_the_limit_is_refused_with_the_numbers_and_the_remedy() -> None:
    (problem,) = refused(diffusion={"T": 100})
    for part in ("0.326 bits/dim (at E[x_0^2] = 1", "0.129 at 0.25", "max_prior_bpd = 0.1", "scale: per_1000"):
        assert part in problem
    assert check(diffusion={"T": 100, "schedule": {"scale": "per_1000"}}) == []


def test_the_remedy_is_one_that_works() -> None:
    (problem,) = refused(diffusion={"T": 20})  # x 1000/T makes beta_T = 1 there
    assert "per_1000" not in problem and "a larger beta_end or T" in problem


def test_a_gap_above_a_tenth_of_the_limit_is_a_warning() -> None:
    (warning,) = check(diffusion={"T": 250})
    assert "0.0599 bits/dim" in warning and "not far below" in warning
    (warning,) = check(diffusion={"T": 100}, preflight={"max_prior_bpd": 0.4})
    assert "0.326" in warning


@pytest.mark.parametrize(("T", "beta_end", "first"), [(10, 0.02, 21), (20, 0.02, 21), (100, 0.29, 291), (1, 0.02, 21)])
def test_scaled_betas_that_leave_the_unit_interval(T: int, beta_end: float, first: int) -> None:
    schedule = {"kind": "constant", "scale": "per_1000", "beta_end": beta_end}
    (problem,) = refused(diffusion={"T": T, "schedule": schedule})
    assert "outside (0, 1)" in problem and f"works from T = {first} on" in problem
    assert measure_chain(linear(first, "per_1000", kind="constant", beta_end=beta_end)).beta_max < 1
    assert measure_chain(linear(first - 1, "per_1000", kind="constant", beta_end=beta_end)).beta_max >= 1 - 1e-12


def test_chains_that_underflow() -> None:
    (problem,) = refused(diffusion={"schedule": {"kind": "constant", "beta_end": 0.9}})
    assert "alpha_bar_T = 0 in float64" in problem
    (warning,) = check(diffusion={"schedule": {"kind": "constant", "beta_end": 0.2}})
    assert "zero in float32" in warning
    (problem,) = refused(diffusion={"schedule": {"beta_start": 1e-20}})
    assert "too small for float64" in problem


def test_jsd_works_where_x_0_is_what_the_network_says() -> None:
    jsd = {"kind": "jsd"}
    (problem,) = refused(diffusion={"schedule": jsd})
    assert "alpha_bar_T = 0" in problem and "take prediction: x_0 or v" in problem
    for prediction in ("x_0", "v", "mu"):
        assert check(diffusion={"schedule": jsd, "prediction": prediction}) == []


@pytest.mark.parametrize("T", [10, 20])
@pytest.mark.parametrize("kind", ["linear", "quadratic", "warmup10", "warmup50", "constant"])
def test_a_range_for_1000_steps_is_too_large_for_20(kind: str, T: int) -> None:
    (problem,) = refused(diffusion={"T": T, "schedule": {"kind": kind, "scale": "per_1000"}})
    assert "works from T = 21 on" in problem


def test_a_gap_of_a_schedule_without_a_scale_has_a_remedy_of_its_own() -> None:
    (problem,) = refused(diffusion={"schedule": {"kind": "log_snr", "log_snr_end": 0.0}})
    assert "smaller log_snr_end" in problem and "per_1000" not in problem
    (problem,) = refused(diffusion={"T": 2, "schedule": {"kind": "list", "betas": [0.1, 0.1]}})
    assert "larger betas" in problem


def test_the_ends_of_a_chain_are_those_of_its_schedule() -> None:
    straight = trial(diffusion={"T": 5, "schedule": {"kind": "log_snr", "log_snr_start": 4, "log_snr_end": -4}})
    jsd = trial(diffusion={"T": 4, "schedule": {"kind": "jsd"}, "prediction": "x_0"})
    assert log_snrs(betas(straight.diffusion)) == pytest.approx([4, 2, 0, -2, -4])
    assert log_snrs(betas(jsd.diffusion)) == pytest.approx([math.log(3), 0, math.log(1 / 3), -math.inf])
    for one, ends in ((straight, (4, -4)), (jsd, (math.log(3), -math.inf))):
        found = measure_chain(one.diffusion)
        assert (found.log_snr_1, found.log_snr_T) == pytest.approx(ends)


def test_all_variants_are_checked_and_named() -> None:
    space = {"diffusion.T": {"grid": [50, 100, 1000]}, "loss.weighting": {"grid": ["simple", "vlb"]}}
    short, longer = refused(search={"space": space})
    assert short.endswith("(2 of 6 variants; first: diffusion.T=50, loss.weighting='simple')")
    assert longer.endswith("(2 of 6 variants; first: diffusion.T=100, loss.weighting='simple')")


# ---- The data


def test_the_network_must_fit_the_images() -> None:
    found = refused(model={"multipliers": [1, 1, 1, 1, 1], "channels": 7})
    assert {p.split(":")[0] for p in found} == {"model.channels", "model.multipliers"}
    (problem,) = refused(model={"attention": [16]})
    assert "model.attention" in problem and "[8, 4]" in problem


def test_the_data_must_have_what_the_evaluation_asks_for() -> None:
    unlabelled = Source("d", "photos", "images", 10, 5, False, 256, (8, 8, 3))
    found = refused(unlabelled, evaluation={"nll": {"images": 6}})
    assert ["6 is more than the 5" in found[0], "no labels" in found[1]] == [True, True]
    (warning,) = check(unlabelled, evaluation={"fid": None, "nll": {"images": 5}})
    assert "64 is more than the 10 training images" in warning


def test_a_weighting_that_leaves_noise_alone_is_warned_about() -> None:
    loss: dict[str, Any] = {"objective": "mse", "weighting": "truncated_snr"}
    (warning,) = check(loss=loss)
    assert "truncated_snr counts the error of eps by max(1, 1 / SNR_t), at t = T 2.48e+04 times" in warning
    assert not check(loss=loss, diffusion={"prediction": "v"}) and not check(loss={"weighting": "snr"})
    w = weights(Process.of(linear(1000)), LossConfig(**loss)).numpy()
    assert w[-1] / w[0] == pytest.approx(2.48e4, rel=0.01) and w[-100:].sum() > 0.6 * w.sum()


def test_a_search_that_stops_nothing_early_is_warned_about() -> None:
    (warning,) = check(search={"scheduler": {"kind": "asha", "grace": 1000}})
    assert "stopped early" in warning


# ---- Cost


def test_the_cost_of_a_trial_by_hand() -> None:
    t = trial(
        diffusion={"T": 200},
        evaluation={"nll": {"images": 100, "timesteps": 20}, "fid": {"samples": 50, "sampler": {"steps": 10}}},
    )
    assert count_cost(t, DIGITS) == Cost(
        training_evaluations=1000 * 64,
        validation_evaluations=4 * (128 * 17 + SAMPLE_GRID * 50),  # steps 0, 400, 800 and 1000
        nll_evaluations=100 * 20,
        sampling_evaluations=50 * 10,
    )


def test_all_means_every_held_out_image_and_every_timestep() -> None:
    t = trial(diffusion={"T": 10}, evaluation={"fid": {"samples": 7}})
    measured = count_cost(t, DIGITS)
    assert (measured.nll_evaluations, measured.sampling_evaluations) == (300 * 10, 7 * 10)
    assert measured.validation_evaluations == 4 * (128 * 10 + 25 * 10)


@pytest.mark.parametrize(
    ("sampler", "count"),
    [
        ({"kind": "heun", "steps": 18}, 35),
        ({"kind": "dpmpp", "steps": 10}, 10),
        ({"kind": "langevin", "steps": 10, "repeats": 3}, 31),
        ({"kind": "euler_maruyama"}, 200),
        ({"kind": "ode"}, 52),
        ({"kind": "ode", "tolerance": 0.01}, 22),  # 27 were measured
    ],
)
def test_a_sample_costs_what_its_sampler_takes(sampler: dict[str, Any], count: int) -> None:
    t = trial(
        diffusion={"T": 200},
        evaluation={"nll": None, "fid": {"samples": 50, "sampler": sampler}, "ode_nll": {"images": 20}},
    )
    found = count_cost(t, DIGITS)
    assert found.sampling_evaluations == 50 * count
    assert found.ode_nll_evaluations == 20 * 104
    tight = trial(evaluation={"ode_nll": {"images": 20, "tolerance": 1e-5}})
    assert count_cost(tight, DIGITS).ode_nll_evaluations == 20 * 244


def test_what_is_off_costs_nothing_and_validation_stops_at_the_data() -> None:
    few = Source("d", "few", "images", 100, 3, False, 256, (8, 8, 3))
    t = trial(diffusion={"T": 1}, evaluation={"nll": None, "fid": None}, training={"validate_every": 1000})
    assert count_cost(t, few) == Cost(training_evaluations=64_000, validation_evaluations=2 * (3 + 25))


def test_costs_add_up() -> None:
    one = count_cost(trial(), DIGITS)
    assert one + Cost() == one
    assert sum([one, one], Cost()).training_evaluations == 2 * one.training_evaluations


# ---- The table


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *[(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.2k"), (9_960, "10k"), (999_499, "999k"), (999_500, "1M")],
        *[(1_200_000, "1.2M"), (102_400_000, "102M"), (3 * 10**15, "3,000T")],
    ],
)
def test_counts_are_readable(n: int, text: str) -> None:
    assert format_count(n) == text


def table(**sections: Any) -> tuple[dict[RowId, Variant], list[str]]:
    variants = expand(parse(merge(SMALL, sections)))
    trials, _ = group_by_row(variants, {v.trial.data: DIGITS.digest for v in variants})
    return trials, format_dry_run(trials, {v.trial.data: DIGITS for v in variants}).splitlines()


def test_the_table_has_a_row_for_each_trial_and_totals() -> None:
    space = {
        "diffusion.T": {"grid": [500, 1000]},
        "loss": {"grid": [{"weighting": "min_snr", "gamma": 3}, {"weighting": "vlb"}]},
    }
    trials, lines = table(search={"space": space})
    assert lines[0].split()[:3] == ["trial", "diffusion.T", "loss"]
    assert [line.split()[0] for line in lines[2:6]] == list(trials)
    assert "weighting=min_snr gamma=3" in lines[2] and "6.4e-03" in lines[2] and "0.0046" in lines[2]
    assert "9.2..-5.1" in lines[2]
    assert lines[7].split() == ["4", "trials", "256k", "55k", "900k", "3M"]
    assert len({len(line) for line in lines[:8]}) == 1


def test_the_table_of_one_trial_and_of_none() -> None:
    assert table()[1][4].startswith("1 trial ")
    assert "0 trials" in format_dry_run({}, {})


def test_what_rows_share_is_counted_once() -> None:
    space = {
        "evaluation.fid.sampler": {"grid": [{"kind": "ddim"}, {"kind": "heun"}]},
        "evaluation.nll.images": {"grid": [20, 30]},
    }
    content = {"name": "x", "data": {"source": "digits"}, "training": {"steps": 100}, "search": {"space": space}}
    variants = expand(parse({**content, "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}}}))
    trials, _ = group_by_row(variants, {v.trial.data: DIGITS.digest for v in variants})
    found = count_costs(trials, {v.trial.data: DIGITS for v in variants})
    assert [c.training_evaluations > 0 for c in found] == [True, False, False, False]
    assert [c.nll_evaluations for c in found] == [20 * 50, 30 * 50, 0, 0]
    assert [c.sampling_evaluations for c in found] == [1000 * 50, 0, 1000 * 99, 0]
    text = format_dry_run(trials, {v.trial.data: DIGITS for v in variants})
    assert "1 trial, 4 rows" in text and "ode_nll" not in text


# ---- The data


def test_the_line_of_each_data_set_and_its_warnings() -> None:
    guessed = replace(DIGITS, name="d", warnings=("left out: 2 .gif (a.gif, b.gif)",))
    assert [line.split(":")[0] for line in describe_data([DIGITS, guessed, DIGITS])] == [
        "data        digits",
        "data        d",
    ]
    assert list_source_warnings([DIGITS, guessed]) == ["d: left out: 2 .gif (a.gif, b.gif)"]
    assert check(guessed) == ["d: left out: 2 .gif (a.gif, b.gif)"]


def test_held_out_that_nothing_reads_is_told_where_it_is_said() -> None:
    own = replace(DIGITS, own_split=True)
    assert check(own) == [] == check(data={"source": "digits", "held_out": 0.1})
    (warning,) = check(own, data={"source": "digits", "held_out": 0.1})
    assert warning == "digits: data.held_out = 0.1 is without effect: the data have a split of their own"


def test_a_background_is_three_levels() -> None:
    for value in ([0, 0, 256], [0, 0], "black"):
        with pytest.raises(
            ExperimentError, match=r"a list of 3 values, each a whole number of at least 0 and at most 255"
        ):
            parse(merge(SMALL, {"data": {"source": "digits", "background": value}}))


def test_a_bound_of_one_image_has_no_error() -> None:
    (warning,) = check(evaluation={"nll": {"images": 1}})
    assert warning.startswith("evaluation.nll: the bound of a single image of digits has no standard error")
    (warning,) = check(replace(DIGITS, held_out=1))
    assert warning.startswith("evaluation.nll: the bound of a single image")
