"""The Fréchet distance between samples and training images, in a named feature space.

FD^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})  (Dowson & Landau 1982; Heusel et al. 2017).
The number means nothing without its features (see `features`), so it is called `fd_<features>`; only with
Inception's it is FID. Nor does it mean much without n: few samples look farther from the data than they are.
`extrapolate_distance` takes that away to first order, and `estimate_sampling_error` says how far another draw of
samples would move the number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float, Float64

from workers.shapes import Features

Mean = Float64[np.ndarray, "d"]
Square = Float64[np.ndarray, "d d"]

POINTS = 5  # of a fit over 1 / n, where n allows it
LEAST_POINTS = 3  # a line through two has no residual
LEAST_SIZE = 1.5  # times d: below, the distance is no longer linear in 1 / n


@dataclass(frozen=True)
class Moments:
    """n, the mean and the sum of squares about it: what a Gaussian fit to features needs."""

    n: int
    mean: Mean
    scatter: Square  # sum of (f - mean)(f - mean)^T

    @staticmethod
    def of(features: Features) -> "Moments":
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return Moments(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan et al. 1979)."""
        n = self.n + other.n
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def covariance(self) -> Square:
        """Unbiased."""
        return np.asarray(self.scatter / (self.n - 1))

    @property
    def singular(self) -> bool:
        """Whether n <= d, so that no covariance of n features can have full rank.

        A distance from such moments is computed, but most of it may be the smallness of n.
        """
        return self.n <= len(self.mean)


def merge_moments(blocks: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
    """The moments of all blocks of features, merged in the order given."""
    return reduce(Moments.merge, (Moments.of(block) for block in blocks))


def compute_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians, as FID reports it."""
    return _compute_distance(_compute_symmetric_root(a.covariance), a, b)


def _compute_distance(root: Square, a: Moments, b: Moments) -> float:
    """`root` is that of a's covariance."""
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(np.square(a.mean - b.mean).sum() + trace)


def estimate_sampling_error(features: Features, reference: Moments) -> float:
    """The standard error of the distance of features to `reference`, over draws of the features.

    The delta method. One feature f, with c = f - mu, moves the distance in proportion to
    2 c.(mu - mu_r) + c^T (I - T) c, where T = S_r^{1/2} (S_r^{1/2} S S_r^{1/2})^{-1/2} S_r^{1/2} is the optimal map
    between the two Gaussians and I - T the derivative by S. The reference counts as exact. Raises ValueError for
    n <= d, as T does not exist there.
    """
    moments = Moments.of(features)
    if moments.singular:
        raise ValueError(f"a standard error in {features.shape[1]} dimensions takes more features than {len(features)}")
    root = _compute_symmetric_root(reference.covariance)
    values, vectors = np.linalg.eigh(root @ moments.covariance @ root)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps  # a direction without variance has no map
    half = root @ (vectors[:, kept] / values[kept] ** 0.25)
    centred = features - moments.mean
    moved = np.square(centred).sum(axis=1) - np.square(centred @ half).sum(axis=1)
    influence = 2 * centred @ (moments.mean - reference.mean) + moved
    return float(influence.std() / np.sqrt(len(features)))


@dataclass(frozen=True)
class Extrapolation:
    """A line through distances at several n: distance + slope / n."""

    distance: float  # at infinite n
    standard_error: float  # of `distance`, over draws of the features
    slope: float
    sizes: tuple[float, ...]  # features in a subset, on average
    distances: tuple[float, ...]  # the mean over the subsets of that size


def extrapolate_distance(features: Features, reference: Moments, *, seed: int = 0) -> Extrapolation:
    """The distance of infinitely many features to `reference`, from the n there are (Chong & Forsyth 2020).

    The distance is linear in 1 / n to first order. The features, in an order drawn from `seed`, are cut into k = 1..5
    disjoint parts, whose mean distance is a point, and a line is fitted by least squares. Every point has all features
    in it, so the draw moves all of them alike: the standard error is `estimate_sampling_error` and the fit's own, added
    in squares. The reference counts as exact; it has an n of its own, which is not extrapolated.

    Raises ValueError where n is too small for three sizes of 1.5 d or more.
    """
    n, d = features.shape
    points = min(POINTS, int(n / (LEAST_SIZE * d)))
    if points < LEAST_POINTS:
        least = find_least_to_extrapolate(d)
        raise ValueError(f"extrapolating in {d} dimensions takes {least} features or more, but there are {n}")
    shuffled = features[np.random.RandomState(seed).permutation(n)]
    root = _compute_symmetric_root(reference.covariance)
    inverse_n = np.arange(1, points + 1) / n
    distances = np.array([
        np.mean([_compute_distance(root, reference, Moments.of(part)) for part in np.array_split(shuffled, k)])
        for k in range(1, points + 1)
    ])  # fmt: skip
    design = np.stack([np.ones(points), inverse_n], axis=1)
    line = np.linalg.lstsq(design, distances, rcond=None)[0]
    residual_variance = np.square(distances - design @ line).sum() / (points - 2)
    fit_variance = residual_variance * np.linalg.inv(design.T @ design)[0, 0]
    error = np.sqrt(estimate_sampling_error(features, reference) ** 2 + fit_variance)
    return Extrapolation(
        float(line[0]), float(error), float(line[1]), tuple((1 / inverse_n).tolist()), tuple(distances.tolist())
    )


def find_least_to_extrapolate(d: int) -> int:
    """The smallest n of which `extrapolate_distance` makes something."""
    return int(np.ceil(LEAST_POINTS * LEAST_SIZE * d))


def _compute_symmetric_root(matrix: Square) -> Square:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)
