"""Feature spaces: from images to the vectors between whose distributions a distance is taken.

`classifier` is a small perceptron that scikit-learn trains once, with a fixed seed, on the training split; its hidden
layer is the space. `inception` is the network that FID is defined by. Any other is a network that an entry of `SPACES`
builds, and may have trained once. A distance means nothing without its space, so its name carries it.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from workers.code import describe_error, drop_pin
from workers.config import FIDConfig
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.entries import load
from workers.evaluation.blocks import name_space_folder
from workers.evaluation.inception import Inception, find_weights, load_inception
from workers.kinds import SPACES
from workers.layout import name_reference_file
from workers.precision import compute_in, list_precisions
from workers.seals import open_bytes, seal_bytes
from workers.shapes import NHWC, Features
from workers.storage import Storage

HIDDEN = 64  # features of the classifier
EPOCHS = 60  # at most
SEEN = 300_000  # images, over all epochs: beyond, the epochs get fewer, down to 5
TAUGHT = SEEN // 5  # images at most: the first ones, which are in a shuffled order
READ = 1_000  # of them at once, so that of a stream no more shards are kept than its room is for
AT_ONCE = 100  # images that a network is called with, always as many


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
    levels: int | None  # None: not discrete
    accuracy: float  # on the held-out split, as a share

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.weights.tobytes() + self.bias.tobytes()).hexdigest()[:16]

    def compute_features(self, images: NHWC) -> Float64[np.ndarray, "n hidden"]:
        """The hidden layer's activations."""
        return np.maximum(_flatten(images, self.levels) @ self.weights + self.bias, 0)

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, weights=self.weights, bias=self.bias, levels=self.levels or 0, accuracy=self.accuracy)
        return stream.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "Classifier":
        a = np.load(io.BytesIO(content))
        return Classifier(a["weights"], a["bias"], int(a["levels"]) or None, float(a["accuracy"]))


def train_classifier(dataset: Dataset) -> Classifier:
    """Raises ValueError where the data set has no labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    if dataset.train_labels is None or dataset.held_out_labels is None:
        raise ValueError("evaluation.fid.features: the classifier needs labels, and the data set has none")
    count = min(TAUGHT, len(dataset.train))
    images = np.concatenate([dataset.train[k : min(k + READ, count)] for k in range(0, count, READ)])
    epochs = max(5, min(EPOCHS, SEEN // count))
    model = MLPClassifier((HIDDEN,), max_iter=epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is the recipe
        model.fit(_flatten(images, dataset.levels), dataset.train_labels[:count])
    accuracy = model.score(_flatten(dataset.held_out, dataset.levels), dataset.held_out_labels)
    return Classifier(model.coefs_[0], model.intercepts_[0], dataset.levels, float(accuracy))


def load_classifier(storage: Storage, dataset: Dataset, device: torch.device, tf32: bool) -> Classifier:
    path = name_classifier(dataset)
    if (content := storage.read_checked(path, open_bytes, "it is trained again")) is not None:
        return Classifier.from_bytes(content)
    trained = train_classifier(dataset)
    storage.write(path, seal_bytes(trained.to_bytes(), path))
    return trained


def name_classifier(dataset: Dataset) -> str:
    taught = f"-{TAUGHT}" * (len(dataset.train) > TAUGHT)
    return name_reference_file(f"{dataset.digest}-classifier{taught}.npz")


def load_inception_space(storage: Storage, dataset: Dataset, device: torch.device, tf32: bool) -> Inception:
    return load_inception(dataset.levels, device=device, tf32=tf32)


@dataclass(frozen=True)
class NetworkSpace:
    """What a network makes of images, float32 on [-1, 1] in batches of AT_ONCE, the last one filled up with copies."""

    name: str  # of its entry, with what pins its code
    network: nn.Module
    levels: int | None  # None: not discrete
    device: torch.device
    tf32: bool = False  # whether a GPU may compute in TF32

    @cached_property
    def digest(self) -> str:
        """Of its weights and its code."""
        state = {name: w.cpu().contiguous() for name, w in self.network.state_dict().items()}
        content = self.name.encode() + safetensors.torch.save(state)
        return hashlib.sha256(content).hexdigest()[:16] + ("-tf32" if self.tf32 else "")

    def compute_features(self, images: NHWC) -> Features:
        precision = "tf32" if self.tf32 and "tf32" in list_precisions(self.device) else "float32"
        found = [np.empty((0, SPACES[self.name].dimensions), np.float32)]
        for start in range(0, len(images), AT_ONCE):
            batch = images[start : start + AT_ONCE]
            filled = np.concatenate([batch, np.repeat(batch[-1:], AT_ONCE - len(batch), axis=0)])
            with torch.inference_mode(), compute_in(precision, self.device):
                y: Tensor = self.network(to_model(torch.from_numpy(filled).to(self.device), self.levels))
            found.append(y[: len(batch)].float().cpu().numpy())
        return np.concatenate(found)


def _load_network(name: str, storage: Storage, dataset: Dataset) -> nn.Module:
    """The network of a space, taught the data where its entry says how: once, as the storage keeps its weights."""
    entry, path = SPACES[name], name_reference_file(f"{dataset.digest}-{name_space_folder(name)}.safetensors")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        network = _build_network(name, dataset.shape)
        if entry.train and (content := storage.read_checked(path, open_bytes, "it is trained again")) is not None:
            network.load_state_dict(safetensors.torch.load(content))
        elif entry.train:
            load(entry.train)(network, dataset)
            state = {part: w.detach().contiguous() for part, w in network.state_dict().items()}
            storage.write(path, seal_bytes(safetensors.torch.save(state), path))
    return network.eval().requires_grad_(False)


def _build_network(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """With first weights by PyTorch's global generator, which is everywhere at the same seed."""
    torch.manual_seed(0)
    network: nn.Module = SPACES[name].load()(*shape)
    return network


@lru_cache
def find_space_mistakes(name: str, shape: tuple[int, int, int]) -> list[str]:
    """What keeps the network of a space from being called for images of this shape (height, width, channels)."""
    height, width, channels = shape
    of = f"{drop_pin(name)}, built for {height} x {width} images of {channels} channels,"
    expected = SPACES[name].dimensions
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = _build_network(name, shape).eval()(torch.zeros(2, channels, height, width))
    except Exception as error:  # noqa: BLE001 somebody's own code
        return [f"{of} fails: {describe_error(error, drop_pin(name))}"]
    if isinstance(found, Tensor) and found.shape == (2, expected) and found.is_floating_point():
        return []
    made = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    return [f"{of} makes {made} of two, where its entry says {expected} dimensions, so floats of {(2, expected)}"]


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
    tf32 = precision != "float32"
    if SPACES[name].form == "whole":
        space: FeatureSpace = SPACES[name].load()(storage, dataset, device, tf32)
        return space
    return NetworkSpace(name, _load_network(name, storage, dataset).to(device), dataset.levels, device, tf32)


def _flatten(images: NHWC, levels: int | None) -> Float64[np.ndarray, "n pixels"]:
    """In [0, 1]."""
    if levels is None:
        return (images.reshape(len(images), -1).astype(np.float64) + 1) / 2
    return images.reshape(len(images), -1).astype(np.float64) / (levels - 1)
