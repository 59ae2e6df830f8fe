"""Pictures of what a model does: progressive generation, interpolation and progressive coding (Ho et al. 2020).

Each is a function of tensors, with the noise that is handed in; images are in [-1, 1].
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from workers.config import SamplerConfig
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.guidance import take_rows
from workers.diffusion.ledger import compute_rate_distortion
from workers.diffusion.likelihood import compute_squared_norms, list_all_times, measure_pairs
from workers.diffusion.process import Model, Prediction, Process, at
from workers.diffusion.samplers import draw
from workers.network.latent_space import PIXELS, PixelSpace
from workers.shapes import NCHW, RealTimes

Frames = Float[Tensor, "n frames c h w"]  # pictures of each image
Two = Float[Tensor, "2 c h w"]
Weights = Float[Tensor, "n"]
ByTime = Float64[np.ndarray, "T"]

LEVELS = 18  # of Heun's rule from a blend to an image (Karras et al. 2022)


@torch.no_grad()
def draw_progressive(
    process: AnyProcess,
    model: Model,
    config: SamplerConfig,
    x_T: NCHW,
    generator: torch.Generator,
    *,
    frames: int,
    space: PixelSpace = PIXELS,
) -> Frames:
    """x_0_hat along the chain of each sample, evenly spaced, the sample last (figure 6): as images, where the chain is
    in a `space` of latents."""
    seen: list[Tensor] = []

    def predict_watched(x_t: NCHW, t: RealTimes) -> Prediction:
        prediction = model(x_t, t)
        seen.append(prediction.x_0)
        return prediction

    x_0 = draw(process, predict_watched, config, x_T, generator, clip=space.bounded).x_0
    kept = np.linspace(0, len(seen), min(frames, len(seen) + 1)).round().astype(int)
    return torch.stack([space.decode([*seen, x_0][k]).clamp(-1, 1) for k in kept], dim=1)


@torch.no_grad()
def interpolate(
    process: Process, model: Model, ends: Two, t: int, weights: Weights, *, generator: torch.Generator
) -> NCHW:
    """Images between two: x_0 ~ p_theta(x_0 | x_t) of blends of their x_t (section 5).

    x_t = (1 - weight) x_t + weight x_t', each from `ends` with noise of its own; the chain from t on has
    the same noise for all.
    """
    noise = torch.randn(ends.shape, generator=generator).to(ends.device)
    x_t = process.q_sample(ends, torch.full((2,), t, device=ends.device), noise)
    weight = weights.to(ends)[:, None, None, None]
    x = (1 - weight) * x_t[:1] + weight * x_t[1:]
    for step in range(t, 0, -1):
        s = torch.full((len(x),), step, device=x.device)
        prediction = model(x, at(process.times, s, s))
        x = process.posterior_mean(prediction.x_0.clamp(-1, 1), x, s)
        if step > 1:
            x = x + process.sigma(prediction, s) * torch.randn(ends[:1].shape, generator=generator).to(x)
    return x.clamp(-1, 1)


@torch.no_grad()
def interpolate_along_flow(
    process: Continuous, model: Model, ends: Two, sigma: float, weights: Weights, *, generator: torch.Generator
) -> NCHW:
    """The same in continuous time: from blends of the two at a noise level, with one noise for all, along the flow."""
    noise, weight = torch.randn(ends[:1].shape, generator=generator).to(ends), weights.to(ends)[:, None, None, None]
    y = (1 - weight) * ends[:1] + weight * ends[1:] + sigma * noise
    begun = replace(process, highest=sigma)  # samplers scale what they begin with by that level
    config = SamplerConfig(kind="heun", steps=LEVELS)
    return draw(begun, model, config, y / sigma, generator, clip=True).x_0.clamp(-1, 1)


@torch.no_grad()
def decode_at(process: Process, model: Model, x_0: NCHW, times: list[int], generator: torch.Generator) -> Frames:
    """x_0_hat(x_t) of each image at each of `times`: what a receiver of x_t can show."""
    shown = []
    for time in times:
        t = torch.full((len(x_0),), time, device=x_0.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        shown.append(model(process.q_sample(x_0, t, noise), t).x_0.clamp(-1, 1))
    return torch.stack(shown, dim=1)


def compute_coding_curve(
    process: Process, model: Model, x_0: NCHW, levels: int | None, generator: torch.Generator
) -> tuple[ByTime, ByTime]:
    """(rate in bits/dim, RMSE on the 0..255 scale) after x_T, ..., x_1 are sent, from every t of x_0."""
    t, weight = list_all_times(process.T, len(x_0))
    image = np.repeat(np.arange(len(x_0)), process.T)
    of_pairs = take_rows(model, torch.from_numpy(image))
    ledger = measure_pairs(
        process, of_pairs, x_0[image], image, t.reshape(-1), weight=weight.reshape(-1), noise=generator, levels=levels
    )
    return compute_rate_distortion(process, ledger, compute_squared_norms(x_0), x_0[0].numel())
