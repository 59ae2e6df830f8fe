"""Rows that differ in the seed alone, as one: their means, and what a difference of two such means is worth.

A metric of a group has two standard errors, which answer two questions: over seeds, how the mean would move if the
same settings were trained and measured again; over images (of a distance: over samples), how it would move on other
images, the weights being what they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.experiment.records import Variant
from orchestrator.measuring.differences import BY_IMAGE, Difference, compare_with_best, compute_student_reach
from orchestrator.state.rows import Row, drop_seed, join_repetitions, name_variant
from workers.layout import RowId


@dataclass(frozen=True)
class Group:
    """What a table shows in a line: the rows that differ in the seed alone, or one row.

    `variant` has what they share: where `over_seeds`, all that was searched but the seed.
    """

    rows: tuple[Row, ...]
    variant: Variant
    over_seeds: bool = False

    @property
    def digest(self) -> RowId:
        """That of its first row, by which the group is known."""
        return self.rows[0].digest

    @property
    def name(self) -> str:
        return name_variant(self.variant)

    @property
    def label(self) -> str:
        """What a footnote calls it: a row by the start of its digest, several by what they share."""
        return self.name if self.over_seeds else self.digest[:8]

    @property
    def state(self) -> str:
        """That of its rows, counted where they are in several: `2 done, 1 diverged`."""
        states = [row.state for row in self.rows]
        found = dict.fromkeys(states)
        return states[0] if len(found) == 1 else ", ".join(f"{states.count(state)} {state}" for state in found)

    @property
    def images_per_s(self) -> float | None:
        """The mean over the rows that have it."""
        rates = [row.images_per_s for row in self.rows if row.images_per_s]
        return sum(rates) / len(rates) if rates else None

    @property
    def of_peak(self) -> float | None:
        """As `images_per_s`, of the share of the peak."""
        shares = [share for row in self.rows if (share := row.of_peak) is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def speeds(self) -> dict[str, float]:
        """The means of what the rows have, by name."""
        names = dict.fromkeys(name for row in self.rows for name in row.speeds)
        return {name: float(np.mean([row.speeds[name] for row in self.rows if name in row.speeds])) for name in names}

    def values(self, metric: str) -> list[float]:
        """Of the rows that have the metric; those that failed or diverged have none, and count in no mean."""
        return [row.metrics[metric] for row in self.rows if metric in row.metrics]

    def count_seeds(self, metric: str) -> str:
        """How many rows the mean of a metric is of: `3`, or `2 of 3` where not all rows have it."""
        n = len(self.values(metric))
        return str(n) if n == len(self.rows) else f"{n} of {len(self.rows)}"

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """The means of all metrics, with their standard errors over images or samples; of one row, its own."""
        if len(self.rows) == 1:
            return self.rows[0].metrics
        names = dict.fromkeys(name for row in self.rows for name in row.metrics if not name.endswith("_se"))
        means = {name: float(np.mean(self.values(name))) for name in names}
        errors = {f"{name}_se": error for name in names if (error := self._compute_image_error(name)) is not None}
        return {**means, **errors}

    @cached_property
    def seed_errors(self) -> Mapping[str, float]:
        """The standard error over seeds of each mean, s / sqrt(n) with s of n - 1 degrees; without those of n = 1."""
        values = {name: self.values(name) for name in self.metrics if not name.endswith("_se")}
        return {name: float(np.std(v, ddof=1) / len(v) ** 0.5) for name, v in values.items() if len(v) > 1}

    def _compute_image_error(self, metric: str) -> float | None:
        """The standard error over images, or over samples, of the mean over n seeds.

        Of a mean over images: all seeds are measured on the same K images, so their errors go together. With
        x_k = 1/n sum_i x_ik, the mean over seeds of image k, it is std_k(x_k) / sqrt(K), which holds the covariances
        of the seeds. Where the values by image are not there it is 1/n sum_i se_i, as if the seeds' errors were one
        and the same: the largest that it can be. A distance is of samples that each seed draws by noise of its own:
        there it is sqrt(sum_i se_i^2) / n.
        """
        errors = [row.metrics.get(f"{metric}_se") for row in self.rows if metric in row.metrics]
        known = [error for error in errors if error is not None]
        if not known or len(known) < len(errors):
            return None
        if metric not in BY_IMAGE:
            return float(np.linalg.norm(known) / len(known))
        by_image = self._average_by_image(metric)
        if by_image is not None and len(by_image) > 1:
            return float(np.std(by_image, ddof=1) / len(by_image) ** 0.5)
        return float(np.mean(known))

    def _average_by_image(self, metric: str) -> np.ndarray | None:
        """float64 (images,): the mean over the seeds for each image; None where some seed lacks its values."""
        where, _ = BY_IMAGE[metric]
        found = [(row.found.summary or {}).get(where) for row in self.rows if metric in row.metrics]
        if not found or any(values is None or len(values) != len(found[0] or ()) for values in found):
            return None
        return np.mean(np.array(found, np.float64), axis=0)

    @cached_property
    def summary(self) -> Mapping[str, Any] | None:
        """What `compare_with_best` reads of a summary, of the means; of one row, its own summary."""
        summaries = [row.found.summary for row in self.rows if row.found.summary]
        if len(self.rows) == 1 or not summaries:
            return summaries[0] if summaries else None
        by_image = {BY_IMAGE[m][0]: mean for m in BY_IMAGE if (mean := self._average_by_image(m)) is not None}
        return {"metrics": self.metrics, "passports": summaries[0].get("passports", {}), **by_image}


def group_rows(rows: Sequence[Row], each: bool = False) -> list[Group]:
    """The rows by what they share but the seed, in the order of the first of each; `each`, a group for every row.

    Where no two rows differ in the seed alone, nothing is taken together and every variant stays whole.
    """
    known = {row.digest: row for row in rows}
    groups = join_repetitions((row.digest, row.variant) for row in rows)
    if each or len(groups) == len(rows):
        return [Group((row,), row.variant) for row in rows]
    return [Group(tuple(known[d] for d in own), drop_seed(known[own[0]].variant), over_seeds=True) for own in groups]


def are_over_seeds(groups: Sequence[Group]) -> bool:
    return any(group.over_seeds for group in groups)


def compare_groups(groups: Sequence[Group], metric: str) -> tuple[str | None, dict[str, Difference]]:
    """The best group by the means, and the differences of the others from it, by their digests.

    An interval over images says whether these weights differ, and one over seeds whether the settings do. Both have
    the difference of the means in their middle, so the wider one is given: what is clear by it is clear by both.
    """
    known = {group.digest: group for group in groups}
    best, differences = compare_with_best({d: group.summary for d, group in known.items() if group.summary}, metric)
    if best is None:
        return None, {}
    reference = known[best].values(metric)
    return best, {d: _choose_wider(over, known[d].values(metric), reference) for d, over in differences.items()}


def _choose_wider(over_images: Difference, first: Sequence[float], second: Sequence[float]) -> Difference:
    """The interval over images, or the one over seeds where that is wider; `n` stays the number of images."""
    over_seeds = compare_over_seeds(first, second)
    if over_seeds is None or over_seeds.high - over_seeds.low <= over_images.high - over_images.low:
        return over_images
    return replace(over_seeds, n=over_images.n)


def compare_over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """The difference of two means over seeds, with its 95 % interval; None where neither has two seeds.

    By Welch's test, which does not take the two spreads to be equal: settings that train badly also spread more. Its
    degrees of freedom are Satterthwaite's. The seeds are not paired, though equal ones share their noise: what two
    settings make of one seed has little in common, and two or three pairs could not show it. Of a side with a single
    seed nothing is known of the spread, which is then taken to be that of the other side (Student's test).
    """
    sides = [np.array(first, np.float64), np.array(second, np.float64)]
    mean, n = float(sides[0].mean() - sides[1].mean()), sum(map(len, sides))
    spreads = [side.var(ddof=1) for side in sides if len(side) > 1]
    if not spreads:
        return None
    if len(spreads) == 1:
        parts, freedom = [float(spreads[0]) / len(side) for side in sides], float(n - 2)
    else:
        parts = [float(spread) / len(side) for spread, side in zip(spreads, sides, strict=True)]
        total = sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
        freedom = sum(parts) ** 2 / total if total else float(n - 2)
    reach = compute_student_reach(freedom) * sum(parts) ** 0.5
    return Difference(mean, mean - reach, mean + reach, n, freedom)
