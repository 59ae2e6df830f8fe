"""An adaptive search: rounds of trials, each asked of Optuna by what the rounds before it were measured at.

    first round (a Sobol sequence: `experiment.expand`) -> measured -> `suggest_round` -> measured -> ... `samples`

A round is a pure function of the experiment and of the outcomes of whole rounds before it, in the order in which they
were asked for, whatever the order they ended in. So the trials are the same at any size of the cluster, after a kill
and on a rerun. Optuna holds no state between rounds; it is imported here alone, when a second round is asked for.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.check import find_trial_mistakes
from orchestrator.experiment.expand import draw_uniform, group_by_row, is_left_out, make_variants
from orchestrator.experiment.needs import list_named
from orchestrator.experiment.preflight import check_trial
from orchestrator.experiment.records import Axis, Experiment, SearchConfig, Variant
from workers.config import DataConfig
from workers.data.sources import Source
from workers.layout import RowId

TRIES = 50  # suggestions for each trial that is wanted, most of them refused or known: then the space is used up


@dataclass(frozen=True)
class HeardTrial:
    """What the searcher hears of a trial: the objectives, lower being better; None, worse than all that has any."""

    params: Mapping[str, Any]
    values: tuple[float, ...] | None


def make_heard(search: SearchConfig, variant: Variant, state: str, metrics: Mapping[str, float]) -> HeardTrial | None:
    """What it hears of a trial in this state. Nothing (None) of one that failed: that says nothing of its settings."""
    if state not in ("done", "diverged", "pruned"):
        return None
    first, *others = (metrics.get(name, math.nan) for name in search.objectives)
    values = (first, *others)
    return HeardTrial(variant.params, values if state == "done" and all(map(math.isfinite, values)) else None)


def suggest_round(
    experiment: Experiment,
    asked: Sequence[Variant],
    hear: Callable[[Variant], HeardTrial | None],
    source: Callable[[DataConfig], Source],
) -> list[Variant]:
    """The trials to make next, after those `asked` for: up to the end of their round, or of the next one.

    Empty where `samples` are there, or where the space has nothing new. What the preflight refuses, what
    `search.without` leaves out and what would be one and the same as an earlier trial is not asked for.
    """
    search = experiment.search
    whole = len(asked) // search.first * search.first
    wanted = min(whole + search.first, search.samples or 0) - len(asked)
    if search.algorithm != "optuna" or wanted <= 0:
        return []
    history = [told for variant in asked[:whole] if (told := hear(variant))]
    seed = int(draw_uniform(experiment.seed, "round", whole) * 2**32)
    found, known = list(asked), len(group_round_by_row(experiment, asked, source)[0])
    ideas = suggest_points(search.space, len(search.objectives), history, seed)
    for params in itertools.islice(ideas, TRIES * search.first):
        [variant] = make_variants(experiment, [params])
        refused = any(finding.refused for finding in check_trial(experiment, variant.trial, source(variant.trial.data)))
        if is_left_out(search, params) or refused or find_trial_mistakes(variant.trial):
            continue
        if (count := len(group_round_by_row(experiment, [*found, variant], source)[0])) > known:
            found, known = [*found, variant], count
        if len(found) == len(asked) + wanted:
            break
    return found[len(asked) :]


def group_round_by_row(
    experiment: Experiment, variants: Sequence[Variant], source: Callable[[DataConfig], Source]
) -> tuple[dict[RowId, Variant], list[str]]:
    """`experiment.by_row`, with ids that a later round does not change."""
    named = list_named(experiment)
    trials = [*named.values(), *(variant.trial for variant in variants)]
    digests = {config: source(config).digest for config in dict.fromkeys(trial.data for trial in trials)}
    measured = any(
        path.startswith("evaluation") or path in ("training", "training.steps") for path in experiment.search.space
    )
    always = measured and experiment.search.algorithm == "optuna"
    return group_by_row(variants, digests, always, named)


def suggest_points(
    space: Mapping[str, Axis], objectives: int, history: Sequence[HeardTrial], seed: int
) -> Iterator[dict[str, Any]]:
    """Points of the space, one after the other and without end, each a value by path.

    By Optuna's tree-structured Parzen estimator (Bergstra et al. 2011; of several objectives, Ozaki et al. 2022), which
    learns from tens of trials where an evolution such as NSGA-II takes generations of them. All settings are modelled
    together, and what was suggested before is taken to be bad (the constant liar), so that a round spreads out.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ways = {path: _make_distribution(axis) for path, axis in space.items()}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
    measured = [told.values for told in history if told.values]
    penalty = [max(values, default=0.0) + 1 for values in zip(*measured, strict=True)] or [0.0] * objectives
    for told in history:
        params = {path: _find_index(axis, told.params[path]) for path, axis in space.items()}
        values = told.values or penalty
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ways, values=list(values)))
    while True:
        asked = study.ask(ways).params
        yield {path: axis.values[asked[path]] if axis.kind == "choice" else asked[path] for path, axis in space.items()}


def _make_distribution(axis: Axis) -> Any:
    """Of a choice, Optuna sees the places of its values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice":
        return CategoricalDistribution(tuple(range(len(axis.values))))
    low, high = axis.values
    if axis.kind == "int_uniform":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=axis.kind == "loguniform")


def _find_index(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if axis.kind == "choice" else value


def describe_rounds(search: SearchConfig) -> str:
    """What is to come after the trials that are known, for a person; empty where these are all."""
    samples = search.samples or 1
    if search.first == samples:
        return ""
    rounds = math.ceil(samples / search.first)
    return (
        f"Round 1 of {rounds}: {search.first} of {samples} trials, and their costs. The others are asked of Optuna, "
        f"round by round, by {', '.join(search.objectives)} of those before them."
    )
