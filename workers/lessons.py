"""What a family of trials learns in a step, and how it is validated: all else of a training is common to all families.

The learner draws the images of a step and its noise, goes backward, and keeps weights, averages and the optimizer; the
loop around it keeps the journal and the checkpoints. A `Lesson` is what stands between: a family is one of them, and a
few functions of evaluation (`workers.evaluation`). Its noise comes from the handed generators alone, one for each
sub-batch in their order, so that any number of workers draws the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.bits import name_validation
from workers.config import Trial
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.diffusion.formulations import AnyProcess
from workers.latents import TrainingLatents
from workers.network.build import build_network, make_network_config
from workers.network.latent_space import PIXELS, PixelSpace
from workers.noise import make_generator
from workers.students import Student
from workers.world import World


@dataclass(frozen=True)
class StepBatch:
    """This worker's part of the global batch of a step."""

    step: int
    rows: np.ndarray  # of the training images
    x_0: Tensor  # float32 (n, C, H, W)
    noise: Any  # what the lesson drew for them


@dataclass(frozen=True)
class Losses:
    minimised: Tensor  # (n,): its mean is
    told: Sequence[Tensor]  # means over the images, detached, which the journal has by the names in `Lesson.told`


@dataclass(frozen=True)
class Validation:
    """What is measured of held-out images while training. `values` has the lesson's own measure."""

    values: Mapping[str, float]
    images: Mapping[str, bytes] = field(default_factory=dict)  # PNG, by name


class Lesson(ABC):
    """What a trial of one family learns."""

    told: tuple[str, ...] = ()  # names of what a step tells beside what it minimises
    goes_back_once: bool = True  # whether a step goes backward once, as compiled networks can
    process: AnyProcess | None = None  # of a denoiser, for its checkpoints
    prediction: str = ""
    student: Student | None = None
    teacher: Any = None  # the model that a student learns from, which is handed over before the first step

    def __init__(
        self,
        trial: Trial,
        dataset: Dataset,
        world: World,
        parts: Sequence[int],
        *,
        latents: TrainingLatents | None = None,
    ) -> None:
        """At step 0, of a worker that has these of the sub-batches. Where there are `latents`, they are learned from in
        place of the training images."""
        self.trial, self.dataset, self.world, self.parts = trial, dataset, world, parts
        self.latents, self.space = latents, latents.space if latents else PIXELS
        self.config = self.make_config()
        self.module: nn.Module = build_network(self.config, make_generator(trial.seed, "weights")).to(world.device)

    @property
    def measure(self) -> str:
        """The name of what a validation measures, which has to be finite and which schedulers see."""
        return name_validation(self.dataset.levels)

    def make_config(self) -> dict[str, Any]:
        """The config.json of the network."""
        return make_trial_config(self.trial, self.dataset, self.space)

    def take(self, step: int, rows: np.ndarray) -> Tensor:
        """What is learned from of the training images of these rows, float32 (n, C, H, W).

        Latents are drawn anew at each step, by noise with an address of its own, so that all other noise is as without.
        """
        if self.latents is None:
            images = send(torch.from_numpy(self.dataset.train[rows]), self.world.device)
            return to_model(images, self.dataset.levels)
        posteriors = torch.from_numpy(self.latents.kept[rows])
        high, wide, twice = posteriors.shape[1:]
        size = len(rows) // len(self.parts), twice // 2, high, wide
        noise = [torch.randn(size, generator=make_generator(self.trial.seed, "z", step, part)) for part in self.parts]
        return send(self.latents.draw(posteriors, torch.cat(noise)), self.world.device)

    @abstractmethod
    def draw_noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Any:
        """For so many images (n, C, H, W), in equal parts from each generator."""

    @abstractmethod
    def compute_losses(self, network: nn.Module, batch: StepBatch) -> Losses:
        """`network` is the lesson's module, perhaps compiled or joined with those of other workers."""

    def finish_step(self, rate: float) -> None:  # noqa: B027 most families have nothing more to do
        """After the optimizer's step, at that learning rate."""

    @abstractmethod
    def validate(self, network: nn.Module) -> Validation:
        """By the averaged weights, with noise that all trials of a seed share."""

    def collect_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the training beside weights and the optimizer."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 see `collect_state`
        """Goes on from that; `state` has all that the checkpoint keeps."""


def make_trial_config(trial: Trial, dataset: Dataset, space: PixelSpace = PIXELS) -> dict[str, Any]:
    """The config.json of the trial's network for images of the data set, or what a `space` makes of them."""
    learned, dropout, shape = trial.diffusion.learned, trial.training.label_dropout, space.find_shape(dataset.shape)
    told, sides = dataset.find_told(trial.model.told), dataset.sides
    return make_network_config(trial.model, shape, learned, sides=sides, told=told, label_dropout=dropout)


def send(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; a GPU gets them without anybody waiting until it has done what it was told before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else values
