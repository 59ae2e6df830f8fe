"""Which numbers may stand beside each other, and what the difference of two is worth. Pure functions of summaries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two measurements, the first minus the second, with an interval that holds the true one in 95 % of cases."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return self.low > 0 or self.high < 0

    @property
    def standard_error(self) -> float:
        """Of the mean; the interval is as many of them as Student's distribution says."""
        return float((self.high - self.low) / 2 / stdtrit(self.n - 1, (1 + CONFIDENCE) / 2))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """The difference of two bounds in bits/dim, image by image: what all images have in common drops out of its error.

    Both summaries have the same NLL protocol (`protocol_differences` is empty), and so the same images; with the same
    seed and T they share their noise as well. Raises ValueError for a single image.
    """
    difference = np.array(first["nll_per_image"]) - np.array(second["nll_per_image"])
    n = len(difference)
    if n < 2:
        raise ValueError("a difference with an error takes two images or more")
    reach = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * difference.std(ddof=1) / n**0.5
    mean = float(difference.mean())
    return Difference(mean, mean - float(reach), mean + float(reach), n)


def protocol_differences(first: Mapping[str, Any], second: Mapping[str, Any], kind: str) -> list[str]:
    """How two summaries differ in the way they measured `kind` (nll or samples); empty where they may be compared."""
    one, other = ((s["passports"].get(kind) or {}).get("protocol") for s in (first, second))
    if one is None or other is None:
        return [f"{kind}: not measured of {'both' if one is other else 'the first' if one is None else 'the second'}"]
    keys = sorted(one.keys() | other.keys())
    return [f"{kind} {k}: {one.get(k)} against {other.get(k)}" for k in keys if one.get(k) != other.get(k)]


def indistinguishable(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, dict[str, Difference]]:
    """The best by bits/dim, and the others' paired differences from it where the protocols agree."""
    measured = {name: s for name, s in summaries.items() if len(s.get("nll_per_image", ())) > 1}
    if not measured:
        return None, {}
    best = min(measured, key=lambda name: measured[name]["metrics"]["eval/nll_bpd"])
    others = {name: s for name, s in measured.items() if name != best}
    return best, {
        name: paired(s, measured[best])
        for name, s in others.items()
        if not protocol_differences(s, measured[best], "nll")
    }
