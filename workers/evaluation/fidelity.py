"""Measures of samples against data in a feature space, beside the Fréchet distance: KID, precision and recall, and the
Inception score, which needs no data.

Pure functions of features, in float64. What is drawn at random is drawn from a seed of its own, so equal
features give equal numbers. The default seed is torch-fidelity's, and so are the subsets it leads to.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Float64
from numpy.random import RandomState

from workers.shapes import Features

# Two sets of features, which may differ in number.
Others = Float[np.ndarray, "m d"]
X = Float64[np.ndarray, "n d"]
Y = Float64[np.ndarray, "m d"]
Pairs = Float64[np.ndarray, "n m"]
Logits = Float[np.ndarray, "n classes"]

SEED = 2020
PARTS = 10  # of the sets, for the error of KID
MOST = 1000  # of a part that are taken: the cost grows with the square


@dataclass(frozen=True)
class KID:
    """The mean of the subsets' estimates and their standard deviation.

    The deviation is that of one subset. It is no standard error of the mean: subsets share images.
    """

    mean: float
    subset_std: float
    subsets: int
    subset_size: int


def compute_kid(a: Features, b: Others, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED) -> KID:
    """The kernel distance of two sets of features: squared MMD with the kernel (x.y / d + 1)^3.

    Unbiased at any n, so it may be negative where the distributions are close (Binkowski et al. 2018, section 4).
    A subset has `subset_size` of each set, or as many as the smaller set has. Raises ValueError for fewer than 2.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"KID needs 2 features or more in each set, but they have {len(a)} and {len(b)}")
    if size == len(a) == len(b):
        subsets = 1  # all others would be this one, in another order
    random = RandomState(seed)
    estimates = []
    for _ in range(subsets):
        of_a, of_b = (random.choice(len(x), size, replace=False) for x in (a, b))
        estimates.append(compute_mmd2(a[of_a].astype(np.float64), b[of_b].astype(np.float64)))
    return KID(float(np.mean(estimates)), float(np.std(estimates)), subsets, size)


def estimate_kid_error(a: Features, b: Others) -> float | None:
    """A standard error of KID over draws of both sets: that of the mean over PARTS disjoint parts of them.

    The parts are independent, and each is an unbiased estimate by fewer images than there are, so it is no less than
    the error of the whole. None where a part would have fewer than 2.
    """
    if min(len(a), len(b)) < 2 * PARTS:
        return None
    parts = zip(np.array_split(a, PARTS), np.array_split(b, PARTS), strict=True)
    estimates = [compute_mmd2(x[:MOST].astype(np.float64), y[:MOST].astype(np.float64)) for x, y in parts]
    return float(np.std(estimates, ddof=1) / PARTS**0.5)


def compute_mmd2(a: X, b: Y) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, equation 3)."""
    n, m = len(a), len(b)
    within_a, within_b = _compute_kernel(a, a), _compute_kernel(b, b)
    mean_a = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    mean_b = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(mean_a + mean_b - 2 * _compute_kernel(a, b).mean())


def _compute_kernel(x: X, y: Y) -> Pairs:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in 0..1: of samples that lie where data are, and of data that lie where samples are."""

    precision: float
    recall: float


def compute_precision_recall(samples: Features, data: Others, *, k: int = 3, rows: int = 500) -> PrecisionRecall:
    """Improved precision and recall of two sets of features (Kynkäänniemi et al. 2019, equation 2).

    A set's manifold is the union of balls about its points, each out to the point's k-th nearest neighbour in the set.
    Distances are made for `rows` points at a time, rows x max(n, m) of them. The result does not depend on `rows`, nor
    on threads or libraries: features are rounded to whole numbers (one part in a million of the largest), small
    enough that float64 holds every sum exactly. Raises ValueError for a set of k points or fewer.
    """
    if min(len(samples), len(data)) <= k:
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} features in each set, "
            f"but they have {len(samples)} and {len(data)}"
        )
    x, y = _make_whole(samples, data)
    return PrecisionRecall(_measure_covered(x, y, k, rows), _measure_covered(y, x, k, rows))


def _make_whole(a: Features, b: Others) -> tuple[X, Y]:
    """Both in the same units, as whole numbers in float64, such that |x|^2 + |y|^2 - 2 x.y is exact in any order.

    With |x_i| <= 2^p no partial sum is above 4 d 2^(2p), which must be at most 2^53.
    """
    largest = max(np.abs(a).max(), np.abs(b).max())
    power = int((51 - np.log2(a.shape[1])) // 2)
    scale = 2.0**power / float(largest) if largest else 1.0
    return np.rint(a.astype(np.float64) * scale), np.rint(b.astype(np.float64) * scale)


def _measure_covered(points: X, manifold: Y, k: int, rows: int) -> float:
    """The share of `points` inside a ball of `manifold`."""
    blocks = [manifold[i : i + rows] for i in range(0, len(manifold), rows)]
    # The nearest of all is the point itself, at distance 0.
    radii = np.concatenate([np.partition(_compute_squared(block, manifold), k, axis=1)[:, k] for block in blocks])
    inside = [
        (_compute_squared(points[i : i + rows], manifold) <= radii).any(axis=1) for i in range(0, len(points), rows)
    ]
    return float(np.concatenate(inside).mean())


def _compute_squared(x: X, y: Y) -> Pairs:
    """Squared distances of whole numbers."""
    return np.asarray(np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T))


@dataclass(frozen=True)
class InceptionScore:
    """The mean over splits and the standard deviation over them, as papers print it."""

    mean: float
    std: float


def compute_inception_score(logits: Logits, *, splits: int = 10, seed: int = SEED) -> InceptionScore:
    """exp E KL(p(y|x) || p(y)), from a classifier's logits (Salimans et al. 2016, section 4).

    Images are shuffled first, as each split must hold of everything; p(y) is the split's own mean. In 1..classes,
    and biased downwards at small n: at most n / splits. Raises ValueError for fewer images than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"the Inception score needs 1 to {len(logits)} splits of {len(logits)} images, not {splits}")
    log_p = logits[RandomState(seed).permutation(len(logits))].astype(np.float64)
    log_p -= log_p.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_compute_score(log_p[start:end]) for start, end in pairwise(edges)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _compute_score(log_p: Logits) -> float:
    """exp E KL of one split's log-probabilities."""
    p = np.exp(log_p)
    # Where a class's probability underflows in every image, its summand is 0 and must not be 0 times infinity.
    log_q = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_q)).sum(axis=1).mean()))
