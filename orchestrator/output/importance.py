"""How much of a metric's spread over the trials each searched setting explains.

By one-way analysis of variance (`compute_importance`): on a full grid the shares of all settings and what is left
(their interplay) add up to 1. Where settings are drawn they are confounded by chance, and with few trials a share is
large by chance alone: `Share.chance` says how large. There a random forest says more (`grow_forest`): it sees all
settings at once.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BINS = 4  # of a setting whose numbers have fewer than so many trials each; as equal in size as can be
LEAST = 4  # trials with the metric, below which no share is computed
LEAST_DRAWN = 20  # the same for a forest
FOLDS, TREES, SHUFFLES = 5, 100, 10


@dataclass(frozen=True)
class Level:
    """The trials that share a value of a setting, or a range of values."""

    label: str
    mean: float  # of the metric
    trials: int


@dataclass(frozen=True)
class Share:
    """Of one setting. `share` is eta squared, the sum of squares between its levels over the total one."""

    name: str
    share: float
    chance: float  # what a setting without any effect would have on average: (levels - 1) / (trials - 1)
    levels: tuple[Level, ...]


def compute_importance(params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[Share]:
    """The share of each setting in the variance of `values`, the largest first.

    Empty where fewer than LEAST trials have a value or all values are equal. A setting with one level has none.
    """
    n, mean = len(values), sum(values) / max(1, len(values))
    total = sum((v - mean) ** 2 for v in values)
    if n < LEAST or not total:
        return []
    found = []
    for name in dict.fromkeys(name for p in params for name in p):
        settings = [p.get(name) for p in params]
        groups: dict[str, list[float]] = defaultdict(list)
        for label, _, value in sorted(
            zip(_make_levels(settings), _sort_values(settings), values, strict=True), key=lambda x: x[1]
        ):
            groups[label].append(value)
        if len(groups) > 1:
            between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values())
            levels = tuple(Level(label, sum(g) / len(g), len(g)) for label, g in groups.items())
            found.append(Share(name, between / total, (len(groups) - 1) / (n - 1), levels))
    return sorted(found, key=lambda share: -share.share)


@dataclass(frozen=True)
class Forest:
    """What a random forest that has not seen a trial makes of it, from its settings.

    `explained` is the part of the variance that it predicts, 1 - sum of squared errors over the total one: below 0 it
    is worse than the mean. `weights` say by how much that part falls when the values of one setting are shuffled.
    """

    explained: float
    weights: Mapping[str, float]


def grow_forest(params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Forest | None:
    """Permutation importance (Breiman 2001) on trials that the trees were not grown on: five folds, each predicted by
    a forest of the other four, so that what is learned by heart counts nothing. The same for the same trials.

    None where there are fewer than LEAST_DRAWN of them, or all values are equal.
    """
    if len(values) < LEAST_DRAWN or len(set(values)) == 1:
        return None
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    names = list(dict.fromkeys(name for p in params for name in p))
    x, y = np.array([_make_numbers([p.get(name) for p in params]) for name in names]).T, np.array(values)
    error, rise = 0.0, np.zeros(len(names))
    for seen, unseen in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        trees = RandomForestRegressor(TREES, random_state=0).fit(x[seen], y[seen])
        error += float(((trees.predict(x[unseen]) - y[unseen]) ** 2).sum())
        shuffled = permutation_importance(
            trees, x[unseen], y[unseen], scoring="neg_mean_squared_error", n_repeats=SHUFFLES, random_state=0
        )
        rise += shuffled.importances_mean * len(unseen)
    total = float(((y - y.mean()) ** 2).sum())
    weights = sorted(zip(names, (rise / total).tolist(), strict=True), key=lambda one: -one[1])
    return Forest(1 - error / total, dict(weights))


def _make_numbers(values: Sequence[Any]) -> list[float]:
    """Numbers as they are, else the place of each value among all that occur."""
    if all(isinstance(v, int | float) for v in values):
        return [float(v) for v in values]
    places = sorted(set(map(_format_value, values)))
    return [float(places.index(_format_value(v))) for v in values]


def _make_levels(values: Sequence[Any]) -> list[str]:
    """The level of each value: itself, or one of BINS ranges where its numbers have too few trials each."""
    distinct = sorted(set(map(repr, values)))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(distinct) <= max(BINS, len(values) // BINS):
        return [_format_value(v) for v in values]
    order = sorted(range(len(values)), key=lambda i: values[i])
    labels = [""] * len(values)
    for b in range(BINS):
        members = order[math.ceil(b * len(order) / BINS) : math.ceil((b + 1) * len(order) / BINS)]
        for i in members:
            labels[i] = f"{values[members[0]]:.3g} to {values[members[-1]]:.3g}"
    return labels


def _sort_values(values: Sequence[Any]) -> Sequence[Any]:
    """What to list the levels by: the numbers themselves, else the order that they come in."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return values if numbers else range(len(values))


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_format_value(v)}" for k, v in value.items())
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
