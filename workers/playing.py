"""What a generator learns: to make images that a discriminator takes for real (Goodfellow et al. 2014, Algorithm 1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from workers.adversarial import Critic
from workers.bits import PIXEL_KID
from workers.config import SAMPLE_GRID, SAMPLE_GRID_COLUMNS, VALIDATION_IMAGES, Trial
from workers.data.dataset import Dataset
from workers.data.pixels import draw_grid, to_data, to_model
from workers.evaluation.fidelity import compute_kid
from workers.lessons import Lesson, Losses, StepBatch, Validation
from workers.network.autoencoder_config import find_latent_size
from workers.noise import make_generator
from workers.world import World


class Playing(Lesson):
    told = ("train/discriminator_loss",)
    measure = PIXEL_KID  # type: ignore[assignment]

    def __init__(self, trial: Trial, dataset: Dataset, world: World, parts: Sequence[int]) -> None:
        super().__init__(trial, dataset, world, parts)
        self.latent_size = find_latent_size(self.config)
        self.critic = Critic(trial.loss, dataset.shape[2], trial.seed, world)
        self.shown: tuple[Tensor, Tensor] | None = None  # real images of the step, and made ones

    def draw_noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        """z, float32 (n, z, h, w)."""
        size, device = (shape[0] // len(generators), *self.latent_size), self.world.device
        return torch.cat([torch.randn(size, generator=generator, device=device) for generator in generators])

    def compute_losses(self, network: nn.Module, batch: StepBatch) -> Losses:
        """What the discriminator thinks of images that are made; what is told of its own loss is of the step before."""
        made = network(batch.noise).float()
        self.shown = batch.x_0, made.detach()
        return Losses(self.critic.judge(made), [self.critic.loss])

    def finish_step(self, rate: float) -> None:
        """The discriminator's turn."""
        assert self.shown
        self.critic.learn(*self.shown, rate)

    def collect_state(self) -> dict[str, Tensor]:
        return self.critic.collect_state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.critic.restore(state)

    def validate(self, network: nn.Module) -> Validation:
        """There is no bound: the kernel distance of the pixels of samples to those of held-out images, which takes few
        of both."""
        seed, levels, device = self.trial.seed, self.dataset.levels, self.world.device
        x = to_model(torch.from_numpy(np.array(self.dataset.held_out[:VALIDATION_IMAGES])), levels)
        z = torch.randn((len(x), *self.latent_size), generator=make_generator(seed, "valid")).to(device)
        made = network(z).float().cpu()
        distance = compute_kid(made.flatten(1).numpy(), x.flatten(1).numpy(), subsets=1).mean if len(x) > 1 else 0.0
        z = torch.randn((SAMPLE_GRID, *self.latent_size), generator=make_generator(seed, "grid")).to(device)
        samples = draw_grid(to_data(network(z), levels), levels, columns=SAMPLE_GRID_COLUMNS)
        return Validation({PIXEL_KID: distance}, {"samples": samples})
