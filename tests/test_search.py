"""The searches: Sobol's strata, rounds as pure functions of what was measured, early stops, mistakes, forests."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.execution.early_stopping import make_scheduler
from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse, resolve
from orchestrator.experiment.preflight import check_trial
from orchestrator.experiment.records import Axis, Experiment, ExperimentError, SchedulerConfig, SearchConfig, Variant
from orchestrator.output.importance import compute_importance, grow_forest
from orchestrator.planning.decide import make_scheduler_key
from orchestrator.planning.search import (
    HeardTrial,
    describe_rounds,
    group_round_by_row,
    make_heard,
    suggest_points,
    suggest_round,
)
from orchestrator.state.saved import forget_asked, keep_asked, read_asked
from workers.data.sources import Source
from workers.storage import Storage

SOURCE = Source(
    digest="d" * 16, name="digits", format="digits", train=1497, held_out=300, labelled=True, levels=17, shape=(8, 8, 1)
)
SPACE: dict[str, Any] = {
    "training.lr": {"loguniform": [1e-4, 1e-2]},
    "model.dropout": {"uniform": [0.0, 0.5]},
    "diffusion.T": {"int_uniform": [200, 999]},
    "loss.weighting": {"choice": ["simple", "vlb"]},
}
Values = tuple[float, ...]


def experiment(
    seed: int = 0, space: Mapping[str, Any] = SPACE, preflight: Mapping[str, Any] | None = None, **search: Any
) -> Experiment:
    return parse(
        {
            "name": "x", "seed": seed, "data": {"source": "digits"}, "training": {"steps": 5},
            "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
            "evaluation": {"fid": {"sampler": {"kind": "ddim", "steps": 5}}},
            "preflight": dict(preflight or {}),
            "search": {"space": dict(space), "algorithm": "optuna", "samples": 24, **search},
        }
    )  # fmt: skip


def source(_: object) -> Source:
    return SOURCE


# ---- Sobol -----------------------------------------------------------------------------------------------------


def sobol(samples: int, seed: int = 0) -> tuple[Variant, ...]:
    return expand(experiment(seed, algorithm="sobol", samples=samples))


def test_a_sobol_search_has_one_draw_in_each_stratum_of_every_axis() -> None:
    trials = [v.trial for v in sobol(32)]
    for u in (
        [math.log(t.training.lr / 1e-4) / math.log(100) for t in trials],
        [t.model.dropout / 0.5 for t in trials],
        [(t.diffusion.T - 200 + 0.5) / 800 for t in trials],
    ):
        assert sorted(int(32 * x) for x in u) == list(range(32))
    assert [t.loss.weighting for t in trials].count("vlb") == 16


def test_a_sobol_search_depends_on_the_seed_and_keeps_its_draws_as_it_grows() -> None:
    assert sobol(7) == sobol(40)[:7] == expand(experiment(samples=7))
    assert not {str(v) for v in sobol(16)} & {str(v) for v in sobol(16, seed=1)}
    assert [v.params for v in sobol(1)] == [v.params for v in sobol(2)[:1]]


# ---- Suggestions -----------------------------------------------------------------------------------------------


def measured(variants: Sequence[Variant], f: Callable[[Variant], Values | None]) -> list[HeardTrial]:
    return [HeardTrial(v.params, f(v)) for v in variants]


def test_the_same_history_gives_the_same_suggestions_and_any_difference_others() -> None:
    e = experiment(also=["eval/fd_classifier"])

    def ask(f: Callable[[Variant], Values | None], seed: int = 1) -> list[dict[str, Any]]:
        return list(itertools.islice(suggest_points(e.search.space, 2, measured(expand(e), f), seed), 8))

    def f(v: Variant) -> Values:
        return v.trial.training.lr, v.trial.model.dropout

    one = ask(f)
    assert one == ask(f) and len({str(params) for params in one}) == 8
    assert one != ask(f, seed=2) and one != ask(lambda v: (-f(v)[0], f(v)[1]))
    for params in one:
        assert 1e-4 <= params["training.lr"] <= 1e-2 and 0 <= params["model.dropout"] <= 0.5
        assert type(params["diffusion.T"]) is int and 200 <= params["diffusion.T"] <= 999
        assert params["loss.weighting"] in ("simple", "vlb")


def test_where_trials_diverge_fewer_are_asked_for() -> None:
    """Above lr = 1e-3 all diverge, which is half of the axis; what is left is equally good everywhere."""
    e = experiment(samples=16, batch=16)
    history = measured(expand(e), lambda v: None if v.trial.training.lr > 1e-3 else (2.0 + v.trial.model.dropout,))
    assert sum(told.values is None for told in history) == 8
    asked = list(itertools.islice(suggest_points(e.search.space, 1, history, 0), 32))
    assert sum(params["training.lr"] > 1e-3 for params in asked) <= 8
    nothing = list(itertools.islice(suggest_points(e.search.space, 1, measured(expand(e), lambda v: None), 0), 4))
    assert len(nothing) == 4


def test_what_the_searcher_hears_of_a_trial() -> None:
    search = experiment(also=["eval/network_evaluations"]).search
    variant = expand(experiment())[0]
    metrics = {"eval/nll_bpd": 2.5, "eval/network_evaluations": 5.0, "valid/nll_bpd": 2.0}
    assert make_heard(search, variant, "done", metrics) == HeardTrial(variant.params, (2.5, 5.0))
    for state in ("diverged", "pruned"):
        assert make_heard(search, variant, state, metrics) == HeardTrial(variant.params, None)
    assert make_heard(search, variant, "done", {**metrics, "eval/nll_bpd": math.nan}) == HeardTrial(
        variant.params, None
    )
    for state in ("failed", "new", "running", "finished"):
        assert make_heard(search, variant, state, metrics) is None


# ---- Rounds ----------------------------------------------------------------------------------------------------


def searched(e: Experiment, f: Callable[[Variant], Values | None], until: int = 10**9) -> list[Variant]:
    """All rounds of a search whose trials are measured by `f`."""

    def hear(v: Variant) -> HeardTrial:
        return HeardTrial(v.params, f(v))

    asked = list(expand(e))
    while len(asked) < until and (new := suggest_round(e, asked, hear, source)):
        asked += new
    return asked


def bowl(v: Variant) -> Values:
    return ((math.log10(v.trial.training.lr) + 3.2) ** 2 + (v.trial.model.dropout - 0.1) ** 2,)


def test_rounds_come_until_the_samples_are_there_and_are_the_same_wherever_they_were_cut_off() -> None:
    e = experiment(samples=20)
    whole = searched(e, bowl)
    assert len(whole) == 20 and len({str(v) for v in whole}) == 20
    assert whole[:8] == list(expand(e)) and e.search.first == 8
    for cut in (8, 11, 16, 19):  # a file that is edited to fewer samples, and back
        rest = suggest_round(e, whole[:cut], lambda v: HeardTrial(v.params, bowl(v)), source)
        assert rest == whole[cut : min(20, 8 * (cut // 8) + 8)]
    assert suggest_round(e, whole, lambda v: None, source) == []
    assert searched(experiment(samples=30), bowl)[:20] == whole


def test_only_whole_rounds_count_and_what_failed_says_nothing() -> None:
    """So the order in which the trials of a round end cannot matter: none is asked for before all have ended."""
    e = experiment(samples=24)
    whole = searched(e, bowl)
    heard: list[str] = []

    def hear(v: Variant) -> HeardTrial | None:
        heard.append(str(v))
        return None if v == best else HeardTrial(v.params, bowl(v))

    best = min(whole[:8], key=bowl)
    assert suggest_round(e, whole[:12], hear, source) != whole[12:16]
    assert heard == [str(v) for v in whole[:8]]


def test_later_rounds_find_more_than_as_many_draws() -> None:
    found = [min(map(bowl, searched(experiment(seed, samples=40), bowl))) for seed in range(3)]
    drawn = [min(map(bowl, expand(experiment(seed, algorithm="random", samples=40)))) for seed in range(3)]
    assert sum(f[0] for f in found) < sum(d[0] for d in drawn)


def area(points: Sequence[Values], corner: Values) -> float:
    """What the points dominate of the rectangle below the corner."""
    total, height = 0.0, corner[1]
    for x, y in sorted(p for p in points if p[0] < corner[0]):
        if y < height:
            total, height = total + (corner[0] - x) * (height - y), y
    return total


def test_several_objectives_find_more_of_a_known_front_than_as_many_draws() -> None:
    """f = (x, 1 - sqrt(x)) + g with g = 0 on the front (as ZDT1); random draws are far from g = 0."""

    def f(v: Variant) -> Values:
        x, g = v.trial.model.dropout / 0.5, abs(math.log10(v.trial.training.lr) + 3.5) / 1.5
        return x + g, 1 - math.sqrt(x) + g

    areas = {"optuna": 0.0, "random": 0.0}
    for seed in range(3):
        e = experiment(seed, samples=40, also=["eval/fd_classifier"])
        areas["optuna"] += area([f(v) for v in searched(e, f)], (1.0, 1.0))
        areas["random"] += area([f(v) for v in expand(experiment(seed, algorithm="random", samples=40))], (1.0, 1.0))
    assert areas["optuna"] > areas["random"], areas


def test_nothing_is_asked_for_twice_and_a_small_space_ends_the_search() -> None:
    space = {"loss.weighting": {"choice": ["simple", "vlb", "snr"]}, "diffusion.T": {"int_uniform": [500, 502]}}
    asked = searched(experiment(space=space, samples=40, batch=4), lambda v: (v.trial.diffusion.T,))
    rows, repeats = group_round_by_row(experiment(space=space), asked, source)
    assert len(rows) == 9 and len(asked) <= 9 + 4, "only the draws of the first round may repeat each other"
    assert all(v.trial == rows[a].trial for a, v in rows.items()) and (not repeats) == (len(asked) == 9)


def test_what_the_preflight_refuses_or_the_file_leaves_out_is_not_asked_for() -> None:
    """Where beta_end is small, chains below some T stop short of noise."""
    space = {
        "diffusion.T": {"int_uniform": [200, 999]},
        "diffusion.schedule.beta_end": {"uniform": [0.005, 0.02]},
        "loss.weighting": {"choice": ["simple", "vlb"]},
    }
    e = experiment(space=space, samples=16, batch=4, without=[{"loss.weighting": "vlb"}])
    free = experiment(space=space, samples=16, batch=4, preflight={"max_prior_bpd": 9.0})
    asked = searched(e, lambda v: (v.trial.diffusion.T,))  # which draws it towards the chains that are too short
    later = asked[e.search.first :]
    assert later and all(v.params["loss.weighting"] == "simple" for v in asked)
    assert not any(f.refused for v in later for f in check_trial(e, v.trial, SOURCE))
    asked = searched(free, lambda v: (v.trial.diffusion.T,))
    assert any(f.refused for v in asked[free.search.first :] for f in check_trial(e, v.trial, SOURCE))


def test_rows_that_share_a_trial_keep_their_addresses_in_later_rounds() -> None:
    space = {"evaluation.fid.sampler.steps": {"int_uniform": [2, 50]}}
    e = experiment(space=space, samples=12, batch=4)
    asked = searched(e, lambda v: (float(v.params["evaluation.fid.sampler.steps"]),))
    first, all_ = group_round_by_row(e, asked[:1], source)[0], group_round_by_row(e, asked, source)[0]
    assert len(all_) == 12 and list(first) == list(all_)[:1] and len({a.partition("-")[0] for a in all_}) == 1


def test_what_was_asked_for_stands_until_the_search_is_another(tmp_path: Path) -> None:
    storage, e = Storage(tmp_path), experiment(samples=16)
    asked = searched(e, bowl)
    assert read_asked(storage, e) == []
    keep_asked(storage, e, asked)
    assert read_asked(storage, e) == asked
    assert read_asked(storage, experiment(samples=12)) == asked[:12]
    assert read_asked(storage, experiment(samples=99, max_failures=1)) == asked
    for other in (
        experiment(1, samples=16),
        experiment(samples=16, batch=4),
        experiment(samples=16, metric="valid/nll_bpd"),
    ):
        assert read_asked(storage, other) == []
    forget_asked(storage, e)
    assert read_asked(storage, e) == []


def test_a_dry_run_says_what_is_to_come() -> None:
    assert "Round 1 of 3: 8 of 20 trials" in describe_rounds(experiment(samples=20).search)
    assert describe_rounds(experiment(samples=8).search) == describe_rounds(SearchConfig()) == ""


# ---- Mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"samples": None}, "search.samples: missing; algorithm: optuna needs a number of draws"),
        ({"samples": 0}, "0 is an empty search"),
        ({"samples": 4, "batch": 5}, "search.batch: 5 a round are more than search.samples = 4 in all"),
        ({"batch": 0}, "search.batch: 0 is not a whole number of at least 1 or null"),
        ({"algorithm": "random", "batch": 4}, "search.batch: 4 is without effect on algorithm: random"),
        ({"algorithm": "optunna"}, "search.algorithm: 'optunna'"),
        ({"metric": "eval/nll"}, "search.metric: 'eval/nll'"),
        ({"also": ["eval/nll"]}, "search.also[0]: 'eval/nll'"),
        ({"also": ["train/loss_simple"]}, "not comparable across weightings"),
        ({"also": ["eval/nll_bpd"]}, "search.also: eval/nll_bpd is an objective already"),
        ({"also": ["eval/fid"]}, "these settings of evaluation.fid make eval/fd_classifier"),
        ({"metric": "eval/network_evaluations"}, "search.metric: 'eval/network_evaluations'"),
        ({"space": {**SPACE, "seed": {"grid": [0, 1]}}}, "search.space.seed: grid would cross each draw"),
        ({"space": {"seed": {"grid": [0, 1]}}}, "algorithm: optuna has nothing to draw"),
        ({"algorithm": "sobol", "samples": None}, "search.samples: missing; algorithm: sobol"),
        ({"algorithm": "grid", "samples": None}, "is drawn; set search.algorithm: random, sobol or optuna"),
        ({"scheduler": {"kind": "median", "reduction": 3}}, "reduction: 3 is without effect on kind: median"),
        ({"scheduler": {"kind": "asha", "others": 2}}, "others: 2 is without effect on kind: asha"),
        ({"scheduler": {"others": 2}}, "others: 2 is without effect on kind: none; leave it out, or take kind: median"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(search: dict[str, Any], text: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        experiment(**search)
    assert any(text in problem for problem in caught.value.problems), caught.value.problems


def test_the_resolved_file_is_the_same_search() -> None:
    for scheduler in ({"kind": "median", "others": 2, "grace": 5}, {"kind": "asha", "reduction": 2}, {}):
        e = experiment(also=["eval/fd_classifier", "eval/network_evaluations"], batch=4, scheduler=scheduler)
        assert parse(resolve(e)) == e


# ---- Early stops -----------------------------------------------------------------------------------------------


def test_a_setting_of_the_median_leaves_what_asha_has_pruned_pruned() -> None:
    asha = [SchedulerConfig(kind="asha", grace=20, reduction=2, others=n) for n in (2, 3)]
    median = [SchedulerConfig(kind="median", others=n) for n in (2, 3)]
    assert len({make_scheduler_key(scheduler) for scheduler in (*median, *asha)}) == 3


@dataclass(eq=False)
class Reporting:
    """What a scheduler wants of one of Tune's trials."""

    trial_id: str
    config: dict[str, Any]


def decisions(values: Mapping[str, Sequence[float]], **settings: Any) -> dict[str, list[str]]:
    """What the median rule says of trials that report side by side, at steps 10, 20, ..., by the trial's name."""
    trial = experiment().trial.model_dump_json()
    rule = make_scheduler(SearchConfig(scheduler=SchedulerConfig(kind="median", grace=20, **settings)), 1000)
    trials = {name: Reporting(name, {"job": {"digest": name, "trial": trial}}) for name in values}
    controller = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    message: dict[str, list[str]] = {name: [] for name in values}
    for step in range(len(next(iter(values.values())))):
        for name, own in values.items():
            if "STOP" not in message[name]:
                result = {"step": 10 * (step + 1), "validation_bpd": own[step], "state": "running"}
                message[name].append(rule.on_trial_result(controller, trials[name], result))
    for t in trials.values():  # the last result of a program's fault has no step
        rule.on_trial_complete(controller, t, {"validation_bpd": 100.0, "state": "failed"})
    return message


def test_the_median_rule_ends_whoever_was_never_below_the_others_mean() -> None:
    values: dict[str, list[float]] = {
        "a": [4, 3, 2, 2],
        "b": [4, 3.1, 2.1, 2],
        "c": [4, 3.2, 2.2, 2],
        "bad": [4, 3.9, 3.9, 3.9],
    }
    message = decisions(values)
    assert message["bad"] == ["CONTINUE", "STOP"] and all(message[n] == ["CONTINUE"] * 4 for n in "abc")
    # One that was good once goes on: its best counts, and no trial is ever paused.
    assert "STOP" not in decisions({**values, "bad": [4, 1.5, 3.9, 3.9]})["bad"]
    assert all(set(s) == {"CONTINUE"} for s in decisions(values, others=4).values())


# ---- What matters ----------------------------------------------------------------------------------------------


def drawn_trials(n: int) -> list[dict[str, Any]]:
    return [v.params for v in expand(experiment(algorithm="random", samples=n))]


def test_a_forest_finds_the_settings_that_count_on_trials_it_has_not_seen() -> None:
    params = drawn_trials(60)
    values = [(math.log10(p["training.lr"]) + 3) ** 2 + (p["loss.weighting"] == "vlb") for p in params]
    grown = grow_forest(params, values)
    assert grown and grown.explained > 0.7
    first, second, *others = grown.weights
    assert {first, second} == {"training.lr", "loss.weighting"}
    assert all(abs(grown.weights[name]) < 0.05 < grown.weights[second] for name in others)
    assert grow_forest(params, values) == grown
    # A valley in lr: the one-way analysis sees its ranges too, but draws of dropout get a share by chance.
    assert {share.name for share in compute_importance(params, values)} == set(SPACE)


def test_a_forest_that_has_learned_by_heart_gets_nothing_for_it() -> None:
    params = drawn_trials(30)
    values = [hash_ / 97 for hash_ in ((i * 61) % 97 for i in range(30))]
    grown = grow_forest(params, values)
    assert grown and grown.explained < 0.2 and max(grown.weights.values()) < 0.3


def test_a_forest_says_nothing_of_few_trials_or_of_no_difference() -> None:
    assert grow_forest(drawn_trials(19), list(map(float, range(19)))) is None
    assert grow_forest(drawn_trials(30), [1.0] * 30) is None


def test_an_axis_of_one_value_is_taken() -> None:
    space = {"training.lr": Axis(uniform=(1e-3, 1e-3)), "seed": Axis(int_uniform=(3, 3)), "b": Axis(choice=(None,))}
    params = {"training.lr": 1e-3, "seed": 3, "b": None}
    assert next(suggest_points(space, 1, [HeardTrial(params, (1.0,))], 0)) == params
