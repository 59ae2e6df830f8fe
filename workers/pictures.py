"""Pictures of what a model does: progressive generation, interpolation and progressive coding (Ho et al. 2020).

Each is a function of tensors, with the noise that is handed in; images are float NCHW in [-1, 1].
"""

import numpy as np
import torch
from torch import Tensor

from workers.config import SamplerConfig
from workers.diffusion.process import Model, Prediction, Process, at
from workers.diffusion.samplers import draw
from workers.ledger import rate_distortion
from workers.likelihood import all_times, pair_errors, squared_norms


@torch.no_grad()
def progressive(
    process: Process, model: Model, config: SamplerConfig, x_T: Tensor, generator: torch.Generator, frames: int
) -> Tensor:
    """x_0_hat along the chain of each sample: (N, frames, C, H, W), evenly spaced, the sample last (figure 6)."""
    seen: list[Tensor] = []

    def watched(x_t: Tensor, t: Tensor) -> Prediction:
        said = model(x_t, t)
        seen.append(said.x_0.clamp(-1, 1))
        return said

    x_0 = draw(process, watched, config, x_T, generator, clip=True).x_0.clamp(-1, 1)
    kept = np.linspace(0, len(seen), min(frames, len(seen) + 1)).round().astype(int)
    return torch.stack([[*seen, x_0][k] for k in kept], dim=1)


@torch.no_grad()
def interpolated(
    process: Process, model: Model, ends: Tensor, t: int, weights: Tensor, generator: torch.Generator
) -> Tensor:
    """Images between two, (len(weights), C, H, W): x_0 ~ p_theta(x_0 | x_t) of blends of their x_t (section 5).

    x_t = (1 - weight) x_t + weight x_t', each from `ends` (2, C, H, W) with noise of its own; the chain from t on has
    the same noise for all.
    """
    noise = torch.randn(ends.shape, generator=generator).to(ends.device)
    x_t = process.q_sample(ends, torch.full((2,), t, device=ends.device), noise)
    weight = weights.to(ends)[:, None, None, None]
    x = (1 - weight) * x_t[:1] + weight * x_t[1:]
    for step in range(t, 0, -1):
        s = torch.full((len(x),), step, device=x.device)
        said = model(x, at(process.times, s, s))
        x = process.posterior_mean(said.x_0.clamp(-1, 1), x, s)
        if step > 1:
            x = x + process.sigma(said, s) * torch.randn(ends[:1].shape, generator=generator).to(x)
    return x.clamp(-1, 1)


@torch.no_grad()
def decoded(process: Process, model: Model, x_0: Tensor, times: list[int], generator: torch.Generator) -> Tensor:
    """x_0_hat(x_t) of each image at each of `times`, (N, len(times), C, H, W): what a receiver of x_t can show."""
    shown = []
    for time in times:
        t = torch.full((len(x_0),), time, device=x_0.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        shown.append(model(process.q_sample(x_0, t, noise), t).x_0.clamp(-1, 1))
    return torch.stack(shown, dim=1)


def coding_curve(
    process: Process, model: Model, x_0: Tensor, levels: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(rate in bits/dim, RMSE on the 0..255 scale) after x_T, ..., x_1 are sent, from every t of x_0 (N, C, H, W)."""
    t, weight = all_times(process.T, len(x_0))
    image = np.repeat(np.arange(len(x_0)), process.T)
    ledger = pair_errors(process, model, x_0[image], image, t.reshape(-1), weight.reshape(-1), generator, levels)
    return rate_distortion(process, ledger, squared_norms(x_0), x_0[0].numel())
