"""The Fréchet distance between samples and training images, in a named feature space.

FD^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})  (Dowson & Landau 1982; Heusel et al. 2017).
The number means nothing without its features, so it is called `fd_<features>`. `classifier` is a small perceptron
that scikit-learn trains once, with a fixed seed, on the training split; its hidden layer is the feature space.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from workers.data import Dataset
from workers.storage import Storage

HIDDEN = 64  # features of the classifier
EPOCHS = 60  # at most
SEEN = 300_000  # images, over all epochs: beyond, the epochs get fewer, down to 5
CHUNK = 1000  # images featurised at a time


@dataclass(frozen=True)
class Moments:
    """n, the mean and the sum of squares about it, float64: what a Gaussian fit to features (n, d) needs."""

    n: int
    mean: np.ndarray  # (d,)
    scatter: np.ndarray  # (d, d): sum of (f - mean)(f - mean)^T

    @staticmethod
    def of(features: np.ndarray) -> "Moments":
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
    def covariance(self) -> np.ndarray:
        """Unbiased, (d, d)."""
        return np.asarray(self.scatter / (self.n - 1))


def merged(blocks: list[np.ndarray]) -> Moments:
    """The moments of all blocks of features, merged in the order given."""
    return reduce(Moments.merge, (Moments.of(block) for block in blocks))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians, as FID reports it."""
    root = _symmetric_root(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(np.square(a.mean - b.mean).sum() + trace)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


@dataclass(frozen=True)
class Reference:
    """The feature space of a data set and the moments of its training split in it."""

    weights: np.ndarray  # float64 (pixels, HIDDEN)
    bias: np.ndarray  # float64 (HIDDEN,)
    levels: int
    accuracy: float  # of the classifier on the held-out split, as a share
    moments: Moments

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 NHWC -> float64 (N, HIDDEN): the hidden layer's activations."""
        return np.maximum(_flat(images, self.levels) @ self.weights + self.bias, 0)

    @property
    def digest(self) -> str:
        """The address of the feature space."""
        return hashlib.sha256(self.weights.tobytes() + self.bias.tobytes()).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        m = self.moments
        np.savez(stream, weights=self.weights, bias=self.bias, levels=self.levels, accuracy=self.accuracy, n=m.n,
                 mean=m.mean, scatter=m.scatter)  # fmt: skip
        return stream.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "Reference":
        a = np.load(io.BytesIO(content))
        moments = Moments(int(a["n"]), a["mean"], a["scatter"])
        return Reference(a["weights"], a["bias"], int(a["levels"]), float(a["accuracy"]), moments)


def reference_path(data_digest: str, features: str) -> str:
    return f"references/{data_digest}-{features}.npz"


def prepare_reference(storage: Storage, dataset: Dataset, features: str) -> Reference:
    """The reference of `dataset`, made and stored on the first call and read on later ones."""
    path = reference_path(dataset.digest, features)
    if not storage.exists(path):
        storage.write(path, FEATURES[features](dataset).to_bytes())
    return Reference.from_bytes(storage.read(path))


def classifier(dataset: Dataset) -> Reference:
    """Trains the perceptron. Raises ValueError where the data set has no labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    if dataset.train_labels is None or dataset.held_out_labels is None:
        raise ValueError("evaluation.fid.features: the classifier needs labels, and the data set has none")
    epochs = max(5, min(EPOCHS, SEEN // len(dataset.train)))
    model = MLPClassifier((HIDDEN,), max_iter=epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is the recipe
        model.fit(_flat(dataset.train, dataset.levels), dataset.train_labels)
    accuracy = model.score(_flat(dataset.held_out, dataset.levels), dataset.held_out_labels)
    space = Reference(model.coefs_[0], model.intercepts_[0], dataset.levels, float(accuracy), Moments(0, *_empty()))
    chunks = range(0, len(dataset.train), CHUNK)
    moments = merged([space.features(dataset.train[k : k + CHUNK]) for k in chunks])
    return Reference(space.weights, space.bias, space.levels, space.accuracy, moments)


FEATURES: dict[str, Any] = {"classifier": classifier}


def _empty() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(HIDDEN), np.zeros((HIDDEN, HIDDEN))


def _flat(images: np.ndarray, levels: int) -> np.ndarray:
    """uint8 NHWC -> float64 (N, pixels) in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / (levels - 1)
