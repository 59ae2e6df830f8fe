"""Which numbers may stand beside each other, and what the difference of two is worth. Pure functions of summaries."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from orchestrator.experiment.metrics import METRICS

CONFIDENCE = 0.95
# Metrics that are means over images: where their values by image are, and what of a summary's passports they are of.
N = TypeVar("N", bound=str)  # the name of what was measured
BY_IMAGE = {name: (metric.by_image, str(metric.part)) for name, metric in METRICS.items() if metric.by_image}
WORDS = {"labels": "label", "vectors": "vectors"}  # of what a network is told, by its name in a passport
DRAWING = ("sampler", "x_0_hat", "times")  # of the protocol of samples: what a search over samplers compares


@dataclass(frozen=True)
class Difference:
    """Of two measurements, the first minus the second, with an interval that holds the true one in 95 % of cases."""

    mean: float
    low: float
    high: float
    n: int
    freedom: float | None = None  # degrees of it in Student's distribution, where they are not n - 1

    @property
    def clear(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return self.low > 0 or self.high < 0

    @property
    def standard_error(self) -> float:
        """Of the mean; the interval is as many of them as Student's distribution says."""
        return float((self.high - self.low) / 2 / compute_student_reach(self.freedom or self.n - 1))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def compute_student_reach(freedom: float) -> float:
    """How many standard errors the interval reaches to either side, by Student's distribution."""
    from scipy.special import stdtrit  # half a second

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def compare_paired(first: Mapping[str, Any], second: Mapping[str, Any], metric: str = "eval/nll_bpd") -> Difference:
    """The difference of two bounds in bits/dim, image by image: what all images have in common drops out of its error.

    Both summaries have the same NLL protocol (`list_protocol_differences` is empty), and so the same images; with
    the same seed and T they share their noise as well. Raises ValueError for a single image.
    """
    values, _ = BY_IMAGE[metric]
    difference = np.array(first[values]) - np.array(second[values])
    n = len(difference)
    if n < 2:
        raise ValueError("a difference with an error takes two images or more")
    reach = float(compute_student_reach(n - 1) * difference.std(ddof=1) / n**0.5)
    mean = float(difference.mean())
    return Difference(mean, mean - reach, mean + reach, n)


def compare_unpaired(first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> Difference:
    """The difference of two distances by their own sampling errors, as if their samples were independent.

    They share their seeds, so the true error may be smaller.
    """
    ours, theirs = first["metrics"], second["metrics"]
    n = int(first["passports"]["samples"]["protocol"]["samples"])
    reach = float(compute_student_reach(n - 1) * np.hypot(ours[f"{metric}_se"], theirs[f"{metric}_se"]))
    mean = float(ours[metric] - theirs[metric])
    return Difference(mean, mean - reach, mean + reach, n)


def list_protocol_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], kind: str, apart_from: Collection[str] = ()
) -> list[str]:
    """How two summaries differ in the way they measured `kind` (nll, ode_nll or samples), `apart_from` some entries.

    Empty where they may be compared.
    """
    one, other = ((s["passports"].get(kind) or {}).get("protocol") for s in (first, second))
    if one is None or other is None:
        return [f"{kind}: not measured of {'both' if one is other else 'the first' if one is None else 'the second'}"]
    # At which t a flow asks its network belongs to the model: its likelihood is exact for any.
    apart_from = (*apart_from, "times") if kind == "ode_nll" else apart_from
    keys = sorted((one.keys() | other.keys()) - set(apart_from))
    return [f"{kind} {k}: {one.get(k)} against {other.get(k)}" for k in keys if one.get(k) != other.get(k)]


def list_differences_of_kind(first: Mapping[str, Any], second: Mapping[str, Any], kind: str) -> list[str]:
    """What to know of two likelihoods that may stand beside each other: whether one is conditional and one is not."""
    subjects = [s["passports"].get(kind, {}).get("subject", {}) for s in (first, second)]
    told = [next((what for what in WORDS if what in subject), None) for subject in subjects]
    if kind == "samples" or told[0] == told[1]:
        return []
    if all(told):
        a, b = (WORDS[what] for what in told if what)
        return [f"{kind}: A was told the {a} of each image and B the {b}: p(x | {a}) against p(x | {b})"]
    one, other = ("A", "B") if told[0] else ("B", "A")
    word = WORDS[told[0] or told[1] or ""]
    return [f"{kind}: {one} was told the {word} of each image and {other} was not: p(x | {word}) against p(x)"]


def compare_with_best(
    summaries: Mapping[N, Mapping[str, Any]], metric: str = "eval/nll_bpd"
) -> tuple[N | None, dict[N, Difference]]:
    """The best by a metric with error bars, and the others' differences from it where the protocols agree."""
    values, kind = BY_IMAGE.get(metric, ("", "samples"))
    measured = {
        name: s
        for name, s in summaries.items()
        if metric in s["metrics"] and (len(s.get(values, ())) > 1 if values else f"{metric}_se" in s["metrics"])
    }
    if not measured:
        return None, {}
    best = min(measured, key=lambda name: measured[name]["metrics"][metric])
    others = {name: s for name, s in measured.items() if name != best}
    return best, {
        name: compare_paired(s, measured[best], metric) if values else compare_unpaired(s, measured[best], metric)
        for name, s in others.items()
        if not list_protocol_differences(s, measured[best], kind, () if values else DRAWING)
    }
