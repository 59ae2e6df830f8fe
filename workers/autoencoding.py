"""What an autoencoder learns: the bound of Kingma & Welling 2014, eq. (3), and where it is asked for a discriminator's
part, as the first stage of latent diffusion has it (Rombach et al. 2022, section 3.1 and appendix G)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from workers.adversarial import Critic, find_weight
from workers.config import SAMPLE_GRID, SAMPLE_GRID_COLUMNS, VALIDATION_IMAGES, LossConfig, Trial
from workers.data.dataset import Dataset
from workers.data.pixels import draw_grid, to_data, to_model
from workers.kinds import OBJECTIVES
from workers.lessons import Lesson, Losses, StepBatch, Validation
from workers.network.autoencoder import Autoencoder, FirstStage, FromLatents, Pass
from workers.network.autoencoder_config import ADVERSARIAL, BETA, DECODER, find_latent_size
from workers.noise import make_generator
from workers.world import World

SHOWN = 10  # held-out images whose reconstructions a validation shows
PerImage = Float64[Tensor, "n"]


def elbo(loss: LossConfig, rate: PerImage, distortion: PerImage) -> PerImage:
    """distortion + beta rate, the negative bound at beta = 1 (Higgins et al. 2017, eq. 4)."""
    return distortion + loss.beta * rate


def compute_bits(stage: FirstStage, x: Tensor, found: Pass, levels: int | None) -> tuple[PerImage, PerImage]:
    """(rate, distortion) of images in bits/dim, each (n,); their sum is a bound of -log2 p(x) / D, whatever was
    minimised."""
    unit = 1 / (x[0].numel() * math.log(2))
    return found.posterior.compute_rate() * unit, stage.compute_distortion(x, found.x_hat, levels) * unit


class Autoencoding(Lesson):
    told: tuple[str, ...] = ("train/rate_bpd", "train/distortion_bpd")
    module: Autoencoder

    def __init__(self, trial: Trial, dataset: Dataset, world: World, parts: Sequence[int]) -> None:
        super().__init__(trial, dataset, world, parts)
        self.latent_size = find_latent_size(self.config)
        self.critic: Critic | None = None
        self.made: tuple[Tensor, Tensor] | None = None  # images of the step and their reconstructions
        if trial.loss.adversarial:
            self.critic = Critic(trial.loss, dataset.shape[2], trial.seed, world)
            self.told = (*self.told, "train/adversarial_weight", "train/adversarial_loss", "train/discriminator_loss")
            self.goes_back_once = False

    def make_config(self) -> dict[str, Any]:
        loss = self.trial.loss
        game = {ADVERSARIAL: loss.adversarial} if loss.adversarial else {}
        return super().make_config() | {DECODER: loss.reconstruction, BETA: loss.beta, **game}

    def draw_noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        """eps of the latents, float32 (n, z, h, w)."""
        size, device = (shape[0] // len(generators), *self.latent_size), self.world.device
        return torch.cat([torch.randn(size, generator=generator, device=device) for generator in generators])

    def compute_losses(self, network: nn.Module, batch: StepBatch) -> Losses:
        found: Pass = network(batch.x_0, batch.noise)
        rate, distortion = compute_bits(self.module, batch.x_0, found, self.dataset.levels)
        loss: Tensor = OBJECTIVES[self.trial.loss.objective].load()(self.trial.loss, rate, distortion)
        told = [rate.detach().mean(), distortion.detach().mean()]
        if self.critic is None:
            return Losses(loss, told)
        weight = judged = torch.zeros(len(loss), device=loss.device)
        if batch.step >= self.trial.loss.adversarial_start and torch.is_grad_enabled():
            x_hat = found.x_hat.float()
            judged = self.critic.judge(x_hat)
            weight = find_weight(distortion.mean(), judged.mean(), self.module.last_layer, self.world)
            self.made = batch.x_0, x_hat.detach()
            loss = loss + (self.trial.loss.adversarial or 0) * weight * judged
        return Losses(loss, [*told, weight.mean(), judged.detach().mean(), self.critic.loss])

    def finish_step(self, rate: float) -> None:
        """The discriminator's turn, on what the decoder made before its own step."""
        if self.critic and self.made:
            self.critic.learn(*self.made, rate)

    def collect_state(self) -> dict[str, Tensor]:
        return self.critic.collect_state() if self.critic else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.critic:
            self.critic.restore(state)

    def validate(self, network: nn.Module) -> Validation:
        """The bound at beta = 1 of held-out images with its two parts, reconstructions, and samples: x_hat of z from
        the prior."""
        seed, levels, device = self.trial.seed, self.dataset.levels, self.world.device
        x = to_model(torch.from_numpy(np.array(self.dataset.held_out[:VALIDATION_IMAGES])).to(device), levels)
        eps = torch.randn((len(x), *self.latent_size), generator=make_generator(seed, "valid")).to(device)
        found: Pass = network(x, eps)
        rate, distortion = compute_bits(self.module, x, found, levels)
        bits = (rate + distortion).cpu()
        values = {self.measure: float(bits.mean()), "valid/rate_bpd": float(rate.mean())}
        values["valid/distortion_bpd"] = float(distortion.mean())
        if len(bits) > 1:
            values[f"{self.measure}_se"] = float(bits.std() / math.sqrt(len(bits)))
        z = torch.randn((SAMPLE_GRID, *self.latent_size), generator=make_generator(seed, "grid")).to(device)
        samples = draw_grid(to_data(self.module.decode(z), levels), levels, columns=SAMPLE_GRID_COLUMNS)
        return Validation(values, {"samples": samples, "reconstructions": draw_pairs(x, found.x_hat, levels)})


def draw_pairs(x: Tensor, x_hat: Tensor, levels: int | None) -> bytes:
    """Some images in a row, and their reconstructions below them, as PNG."""
    shown = torch.cat([x[:SHOWN], x_hat[:SHOWN].to(x)])
    names = ["images", "reconstructed"]
    return draw_grid(to_data(shown, levels), levels, side=100, columns=len(shown) // 2, names=names)


@torch.no_grad()
def draw_stage(stage: FromLatents, dataset: Dataset, seed: int, n: int, rows: int) -> dict[str, bytes]:
    """Pictures, as PNG, of a network without a process: n samples of z from N(0, I), and of an autoencoder so many
    held-out images beside x_hat of them."""
    size = find_latent_size(stage.config)
    z = torch.randn((n, *size), generator=make_generator(seed, "pictures", "samples"))
    found = {"samples": draw_grid(to_data(stage.decode(z), dataset.levels), dataset.levels)}
    if isinstance(stage, FirstStage):
        x = to_model(torch.from_numpy(np.array(dataset.held_out[:rows])), dataset.levels)
        eps = torch.randn((len(x), *size), generator=make_generator(seed, "pictures", "reconstructions"))
        found["reconstructions"] = draw_pairs(x, stage(x, eps).x_hat, dataset.levels)
    return found
