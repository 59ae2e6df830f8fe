"""A denoiser that is loaded of a checkpoint, with all that drawing and measuring by it take."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64

from workers.classes import Vectors
from workers.data.dataset import Dataset
from workers.diffusion.formulations import AnyProcess
from workers.diffusion.guidance import take_rows, tell
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model, Prediction
from workers.network import checkpoint as checkpoints
from workers.network.latent_space import PIXELS, PixelSpace, load_space
from workers.network.manifest import Checkpoint
from workers.precision import compute_in
from workers.shapes import NCHW, Conditions, RealTimes

Ints = Int64[np.ndarray, "n"]
N = TypeVar("N", bound=torch.nn.Module)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint on its device."""

    network: Denoiser
    process: AnyProcess
    device: torch.device
    precision: str = "float32"
    space: PixelSpace = PIXELS  # of what it diffuses

    def predict(self, x_t: NCHW, t: RealTimes, told: Conditions | None = None) -> Prediction:
        """In the dtype of x_t, whatever the network computes in."""
        with compute_in(self.precision, self.device):
            prediction: Prediction = self.network(x_t, t, told)
        return prediction

    def tell(self, told: np.ndarray | None, guidance: float | None = None) -> Model:
        """The model of a batch that is told of so: labels, int64 (n,), or vectors, float32 (n, length, width)."""
        assert self.network.told is None or told is not None, "the network is told something of each image"
        if self.network.told is None or told is None:
            return self.predict
        return tell(self.predict, torch.from_numpy(np.array(told)).to(self.device), guidance)

    def tell_held_out(self, dataset: Dataset, rows: Ints) -> Model:
        """The model of held-out images, each told of as it is."""
        told = self.network.told
        values = dataset.get_told(told.KIND, "held_out") if told else None
        images, places = np.unique(rows, return_inverse=True)
        return take_rows(self.tell(None if values is None else values[images]), torch.from_numpy(places))

    def assign_told(self, samples: Ints, dataset: Dataset | None = None) -> np.ndarray | None:
        """What the network is told of the samples with these numbers: labels by `Classes.assign`, or the vectors of the
        training images, one after the other, which are in a shuffled order; None where it is told nothing."""
        if isinstance(self.network.told, Vectors):
            assert dataset and dataset.train_vectors is not None, "the network is told vectors, and the data have none"
            return np.array(dataset.train_vectors[samples % len(dataset.train_vectors)])
        return self.network.classes.assign(samples) if self.network.classes else None


def load_model(checkpoint: Checkpoint, device: torch.device, precision: str = "float32") -> LoadedModel:
    """Raises CheckpointError as `checkpoints.load` does."""
    network, process = checkpoints.load(checkpoint)
    space = load_space(checkpoint, device)
    return LoadedModel(move_to_device(network, device), process, device, precision, space)


def move_to_device(network: N, device: torch.device) -> N:
    """The network there, its weights in the order in which the convolutions take them, which those of volumes lack."""
    flat = all(weights.dim() < 5 for weights in network.parameters())
    layout = torch.channels_last if flat else torch.preserve_format
    moved: N = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    return moved
