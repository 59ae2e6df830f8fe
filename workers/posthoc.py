"""Averages of the weights whose width is chosen after the training (Karras et al. 2024, section 3 and appendix C).

A power-function average of exponent gamma weighs theta(tau) at time t by its profile (gamma + 1) tau^gamma /
t^(gamma + 1). Its width sigma_rel is the standard deviation of that profile as a part of t. Averages of two widths,
kept at intervals, nearly span the profiles of all others: one of another width is the combination of them whose profile
is nearest to its own. In float64 and without torch; `workers.network.averages` combines the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

import numpy as np
from jaxtyping import Float64
from pydantic import AfterValidator, Field

from workers.sections import Record

NARROWEST, WIDEST = 0.005, 0.28  # gamma = 0, by which all steps weigh alike, has the width 1 / sqrt(12)
MOST_KEPT = 500  # times that averages are kept of a trial
APART = 1.2  # the least ratio of two widths that are kept
TOLERATED = 0.1  # how far a profile may be from what it should be, in parts of that, without a warning
Products = Float64[np.ndarray, "some others"]


def _check_apart(widths: tuple[float, ...]) -> tuple[float, ...]:
    """Of averages that are nearly the same, others would be small differences of large multiples."""
    if any(wide < APART * narrow for narrow, wide in pairwise(sorted(widths))):
        raise ValueError(
            f"{list(widths)} has widths that say nearly the same; take each {APART:g} times the one before, or more"
        )
    return widths


Width = Annotated[float, Field(ge=NARROWEST, le=WIDEST)]


class PosthocConfig(Record):
    """What is kept of a training so that averages of its weights can be made after it."""

    every: int = Field(ge=1, le=10**9, description="steps from one time that the averages are kept to the next")
    widths: Annotated[tuple[Width, ...], AfterValidator(_check_apart)] = Field(
        default=(0.05, 0.1),
        strict=False,
        min_length=2,
        max_length=4,
        description="sigma_rel of the averages that are kept: the part of the training that each is spread over",
    )

    def list_profiles(self, steps: int) -> "list[Profile]":
        """What there is to combine after so many steps: what was kept before, and the averages as they are then."""
        return [Profile(step, w) for step in (*range(self.every, steps, self.every), steps) for w in self.widths]


@dataclass(frozen=True)
class Profile:
    """How an average of some width, as it is after `step` steps, weighs the weights of these steps."""

    step: int
    width: float


def compute_width(gamma: float) -> float:
    """sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), eq. (123)."""
    return float(np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)))


@lru_cache(maxsize=1024)
def compute_gamma(width: float) -> float:
    """The exponent of the average of a width: eq. (123) is a cubic in gamma, of which this is the largest root."""
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def compute_decay(gamma: float, step: int) -> float:
    """beta(t) = (1 - 1 / t)^(gamma + 1), section 3.1: what the average of before counts at step t, at the first
    nothing."""
    return float((1 - 1 / step) ** (gamma + 1))


def compute_products(some: Sequence[Profile], others: Sequence[Profile]) -> Products:
    """The integral over tau of each of some profiles times each of others: appendix C.

    For t_i <= t_j it is (gamma_i + 1)(gamma_j + 1) (t_i / t_j)^gamma_j / ((gamma_i + gamma_j + 1) t_j).
    """
    t_i, t_j = (np.array([p.step for p in profiles], np.float64) for profiles in (some, others))
    g_i, g_j = (np.array([compute_gamma(p.width) for p in profiles]) for profiles in (some, others))
    t_i, g_i = t_i[:, None], g_i[:, None]
    later, exponent = np.maximum(t_i, t_j), np.where(t_i <= t_j, g_j, g_i)
    ratio = np.minimum(t_i, t_j) / later
    return np.asarray((g_i + 1) * (g_j + 1) * ratio**exponent / ((g_i + g_j + 1) * later))


@dataclass(frozen=True)
class Combination:
    """What each of some averages counts in one that is made of them. `error` is how far its profile is from what it
    should be: the norm of the difference over that of the profile."""

    coefficients: tuple[float, ...]
    error: float


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of the kept profiles that is nearest to the wanted one, by least squares: section 3.2.

    Unlike there the coefficients add up to 1, as those of an average do: where little was kept, weights would else be
    smaller than all that they are made of.
    """
    n, gram, right = len(kept), compute_products(kept, kept), compute_products(kept, [wanted])[:, 0]
    length = np.sqrt(np.diag(gram))  # the profiles of early steps are longer by orders of magnitude
    system = np.zeros((n + 1, n + 1))  # of x and the multiplier of the condition that it adds up to 1
    system[:n, :n], system[n, :n], system[:n, n] = gram / np.outer(length, length), 1 / length, 1 / length
    x = np.linalg.solve(system, np.append(right / length, 1.0))[:n] / length
    own = float(compute_products([wanted], [wanted])[0, 0])
    left = own - 2 * float(x @ right) + float(x @ gram @ x)
    return Combination(tuple(x.tolist()), float(np.sqrt(max(left, 0.0) / own)))


def describe_doubt(kept: Sequence[Profile], wanted: Profile) -> str:
    """That what is kept is too little for an average of the wanted width; empty where it is enough."""
    error = combine(kept, wanted).error
    if error <= TOLERATED:
        return ""
    widths = ", ".join(f"{width:g}" for width in dict.fromkeys(profile.width for profile in kept))
    return (
        f"evaluation.ema_width: {wanted.width:g} after {wanted.step:,} steps can't be made well of averages of widths "
        f"{widths}, kept {len({profile.step for profile in kept})} times: its profile is off by {error:.0%} of "
        "itself; keep them more often (training.posthoc.every), or take a width between theirs"
    )
