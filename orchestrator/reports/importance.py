"""How much of a metric's spread over the trials each searched setting explains: one-way analysis of variance, no more.

On a full grid the shares of all settings and what is left (their interplay) add up to 1. Where settings are drawn
they are confounded by chance, and with few trials a share is large by chance alone: `Share.chance` says how large.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BINS = 4  # of a setting whose numbers have fewer than so many trials each; as equal in size as can be
LEAST = 4  # trials with the metric, below which nothing is said


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


def importance(params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[Share]:
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
            zip(_levels(settings), _order(settings), values, strict=True), key=lambda x: x[1]
        ):
            groups[label].append(value)
        if len(groups) > 1:
            between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values())
            levels = tuple(Level(label, sum(g) / len(g), len(g)) for label, g in groups.items())
            found.append(Share(name, between / total, (len(groups) - 1) / (n - 1), levels))
    return sorted(found, key=lambda share: -share.share)


def _levels(values: Sequence[Any]) -> list[str]:
    """The level of each value: itself, or one of BINS ranges where its numbers have too few trials each."""
    distinct = sorted(set(map(repr, values)))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(distinct) <= max(BINS, len(values) // BINS):
        return [_text(v) for v in values]
    order = sorted(range(len(values)), key=lambda i: values[i])
    labels = [""] * len(values)
    for b in range(BINS):
        members = order[math.ceil(b * len(order) / BINS) : math.ceil((b + 1) * len(order) / BINS)]
        for i in members:
            labels[i] = f"{values[members[0]]:.3g} to {values[members[-1]]:.3g}"
    return labels


def _order(values: Sequence[Any]) -> Sequence[Any]:
    """What to list the levels by: the numbers themselves, else the order that they come in."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return values if numbers else range(len(values))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_text(v)}" for k, v in value.items())
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
