"""Feature spaces: from images to the vectors between whose distributions a distance is taken.

`classifier` is a small perceptron that scikit-learn trains once, with a fixed seed, on the training split; its hidden
layer is the space. `inception` is the network that FID is defined by. A distance means nothing without its space, so
its name carries it.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64

from workers.config import FIDConfig
from workers.data.dataset import Dataset
from workers.evaluation.inception import Inception, find_weights, load_inception
from workers.layout import name_reference_file
from workers.seals import open_bytes, seal_bytes
from workers.shapes import NHWC, Features
from workers.storage import Storage

HIDDEN = 64  # features of the classifier
EPOCHS = 60  # at most
SEEN = 300_000  # images, over all epochs: beyond, the epochs get fewer, down to 5


@runtime_checkable
class FeatureSpace(Protocol):
    """Where images become vectors. The same images give the same vectors however many a call has."""

    @property
    def digest(self) -> str:
        """The id of the space: of the extractor's weights."""
        ...

    def compute_features(self, images: NHWC) -> Features: ...


@dataclass(frozen=True)
class Classifier:
    weights: Float64[np.ndarray, "pixels hidden"]
    bias: Float64[np.ndarray, "hidden"]
    levels: int
    accuracy: float  # on the held-out split, as a share

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.weights.tobytes() + self.bias.tobytes()).hexdigest()[:16]

    def compute_features(self, images: NHWC) -> Float64[np.ndarray, "n hidden"]:
        """The hidden layer's activations."""
        return np.maximum(_flatten(images, self.levels) @ self.weights + self.bias, 0)

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, weights=self.weights, bias=self.bias, levels=self.levels, accuracy=self.accuracy)
        return stream.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "Classifier":
        a = np.load(io.BytesIO(content))
        return Classifier(a["weights"], a["bias"], int(a["levels"]), float(a["accuracy"]))


def train_classifier(dataset: Dataset) -> Classifier:
    """Raises ValueError where the data set has no labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    if dataset.train_labels is None or dataset.held_out_labels is None:
        raise ValueError("evaluation.fid.features: the classifier needs labels, and the data set has none")
    epochs = max(5, min(EPOCHS, SEEN // len(dataset.train)))
    model = MLPClassifier((HIDDEN,), max_iter=epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is the recipe
        model.fit(_flatten(dataset.train, dataset.levels), dataset.train_labels)
    accuracy = model.score(_flatten(dataset.held_out, dataset.levels), dataset.held_out_labels)
    return Classifier(model.coefs_[0], model.intercepts_[0], dataset.levels, float(accuracy))


def _load_classifier(storage: Storage, dataset: Dataset, device: torch.device, tf32: bool) -> Classifier:
    path = name_classifier(dataset.digest)
    if (content := storage.read_checked(path, open_bytes, "it is trained again")) is not None:
        return Classifier.from_bytes(content)
    trained = train_classifier(dataset)
    storage.write(path, seal_bytes(trained.to_bytes(), path))
    return trained


def name_classifier(data: str) -> str:
    return name_reference_file(f"{data}-classifier.npz")


def _load_inception(storage: Storage, dataset: Dataset, device: torch.device, tf32: bool) -> Inception:
    return load_inception(dataset.levels, device=device, tf32=tf32)


SPACES: dict[str, Callable[[Storage, Dataset, torch.device, bool], FeatureSpace]] = {
    "classifier": _load_classifier,
    "inception": _load_inception,
}


def check_spaces(wanted: Iterable[FIDConfig | None]) -> None:
    """Raises Mistake where what these measurements need of the Inception network is not installed."""
    fids = [fid for fid in wanted if fid and fid.features == "inception"]
    if any("inception_score" in fid.also for fid in fids):
        load_inception().compute_logits(np.zeros((1, Inception.dimensions), np.float32))
    elif fids:
        find_weights()


def load_feature_space(
    storage: Storage, dataset: Dataset, name: str, device: torch.device, precision: str = "float32"
) -> FeatureSpace:
    """The space `name` for `dataset`: trained and stored on the first call where it is learned from the data.

    The classifier computes in float64. A network computes in float32, and where the evaluation's `precision` is a lower
    one in TF32 on GPUs that have it; bfloat16 would move features by some percent, and distances with them.

    Raises Mistake where the Inception weights are missing.
    """
    return SPACES[name](storage, dataset, device, precision != "float32")


def _flatten(images: NHWC, levels: int) -> Float64[np.ndarray, "n pixels"]:
    """In [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / (levels - 1)
