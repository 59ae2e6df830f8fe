"""What is diffused: images themselves, or the latents of an autoencoder, which is then the first stage of the model.

A latent model is one model that draws pixels: its checkpoint holds the autoencoder beside the network, and what is
diffused is z * scale, of unit variance over the training images (Rombach et al. 2022, appendix G). It is not on [-1, 1]
and has no levels, so that no prediction of it is clipped, and its likelihood is a density.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workers.diffusion.hierarchy import StageTerms, posterior_term
from workers.network.autoencoder import Autoencoder, FirstStage, Posterior
from workers.network.autoencoder_config import AUTOENCODER_DEFAULTS
from workers.network.checkpoint import load_autoencoder
from workers.network.manifest import Checkpoint, open_stage
from workers.noise import make_generator
from workers.precision import compute_in
from workers.shapes import NCHW

Shape = tuple[int, int, int]  # height, width, channels
Ints = Int64[np.ndarray, "n"]
Diffused = Float[Tensor, "n z height width"]


class PixelSpace:
    """The images themselves."""

    bounded = True  # whether all of it is on [-1, 1]

    def find_shape(self, shape: Shape) -> Shape:
        """Of what is diffused, from that of images."""
        return shape

    def find_levels(self, levels: int | None) -> int | None:
        """The levels of what is diffused, from those of images."""
        return levels

    def encode(self, x: NCHW, seed: int, image: Ints) -> Diffused:
        """What is diffused of images on [-1, 1], which have these numbers among those held out."""
        return x

    def measure(self, x: NCHW, levels: int | None, seed: int, image: Ints) -> tuple[Diffused, StageTerms | None]:
        """The same, and what the first stage measures of the images; None where there is none."""
        return x, None

    def decode(self, x_0: Diffused) -> NCHW:
        """Images, on about [-1, 1], of what was drawn."""
        return x_0

    def describe_stage(self) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
        """What a checkpoint keeps of the first stage: its config.json and its weights; None where there is none."""
        return None


PIXELS = PixelSpace()


@dataclass(frozen=True)
class LatentSpace(PixelSpace):
    """Latents, drawn from q(z | x) and scaled."""

    stage: FirstStage  # in eval mode
    scale: float
    bounded = False

    def find_shape(self, shape: Shape) -> Shape:
        height, width, channels = shape
        weights = next(self.stage.parameters())
        latents = self.find_posterior(torch.zeros((1, channels, height, width), device=weights.device)).mean
        return latents.shape[2], latents.shape[3], latents.shape[1]

    def find_levels(self, levels: int | None) -> None:
        return None

    @torch.no_grad()
    def find_posterior(self, x: NCHW) -> Posterior:
        """q(z | x) as the autoencoder has it, not scaled; in float32."""
        with compute_in("float32", x.device):
            return self.stage.encode(x)

    def encode(self, x: NCHW, seed: int, image: Ints) -> Diffused:
        """z ~ q(z | x), with the noise of each image's own address: the same in whatever batch it is."""
        posterior = self.find_posterior(x)
        return self.scale * posterior.sample(_draw_noise(posterior, seed, image))

    @torch.no_grad()
    def measure(self, x: NCHW, levels: int | None, seed: int, image: Ints) -> tuple[Diffused, StageTerms]:
        posterior = self.find_posterior(x)
        eps = _draw_noise(posterior, seed, image)
        z = self.scale * posterior.sample(eps)
        nats = self.stage.compute_distortion(x, self.decode(z), levels)
        own = posterior_term(posterior.log_variance + 2 * float(np.log(self.scale)), eps)
        norm = z.double().square().flatten(1).sum(1)
        dimensions = np.full(len(z), z[0].numel())
        return z, StageTerms(image, dimensions, *(part.cpu().numpy() for part in (nats, own, norm)))

    @torch.no_grad()
    def decode(self, x_0: Diffused) -> NCHW:
        with compute_in("float32", x_0.device):
            return self.stage.decode(x_0.float() / self.scale)

    def describe_stage(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        assert isinstance(self.stage, Autoencoder), "a stage that is not ours has no config.json"
        return {**self.stage.config, "scaling_factor": self.scale}, self.stage.state_dict()


def _draw_noise(posterior: Posterior, seed: int, image: Ints) -> Diffused:
    shape = posterior.mean.shape[1:]
    noise = [torch.randn(shape, generator=make_generator(seed, "latents", int(k))) for k in image]
    return torch.stack(noise).to(posterior.mean)


def load_space(checkpoint: Checkpoint, device: torch.device | None = None) -> PixelSpace:
    """The space that the model of a checkpoint diffuses in. Raises CheckpointError where bytes are damaged."""
    if (stage := open_stage(checkpoint)) is None:
        return PIXELS
    network = load_autoencoder(stage)
    scale = {**AUTOENCODER_DEFAULTS, **network.config}["scaling_factor"]
    return LatentSpace(network.to(device) if device else network, scale)
