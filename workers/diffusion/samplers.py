"""Samplers of p_theta: from noise to images. All noise comes from the one generator that is handed in.

A sampler is one step x_t -> x_{t-1}, a function next to its formula; `STEPS` is the list of valid names. `steps` of
the config picks a subsequence of the times first (`Process.strided`), so an image costs one network evaluation a step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workers.config import SamplerConfig
from workers.diffusion.process import Model, Prediction, Process, at


def ancestral(
    process: Process, config: SamplerConfig, x_t: Tensor, said: Prediction, t: Tensor, generator: torch.Generator
) -> Tensor:
    """x_{t-1} = mu_theta(x_t, t) + sigma_t z, with z = 0 at t = 1: Algorithm 2. sigma_t is a standard deviation."""
    mean = process.posterior_mean(said.x_0, x_t, t)
    if int(t[0]) == 1:
        return mean
    return mean + process.sigma(said, t) * _normal_like(x_t, generator)


def ddim(
    process: Process, config: SamplerConfig, x_t: Tensor, said: Prediction, t: Tensor, generator: torch.Generator
) -> Tensor:
    """x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z (Song et al. 2020a, eq. 12, 16).

    s is the time before t, sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s);
    eps is taken from x_0_hat, so that a clipped x_0_hat and eps agree.
    """
    now, before = process.alpha_bar, process.alpha_bar_before
    eps = (x_t - at(now.sqrt(), t, x_t) * said.x_0) / at((1 - now).sqrt(), t, x_t)
    sigma = config.eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    x_s = at(before.sqrt(), t, x_t) * said.x_0 + at((1 - before - sigma**2).clamp(min=0).sqrt(), t, x_t) * eps
    return x_s if config.eta == 0 else x_s + at(sigma, t, x_t) * _normal_like(x_t, generator)


# The prediction that a step is given has x_0 clipped where that is asked for; its eps is the network's own.
Step = Callable[[Process, SamplerConfig, Tensor, Prediction, Tensor, torch.Generator], Tensor]
STEPS: dict[str, Step] = {"ancestral": ancestral, "ddim": ddim}


@torch.no_grad()
def sample(
    process: Process,
    model: Model,
    config: SamplerConfig,
    shape: tuple[int, ...],
    generator: torch.Generator,
    clip: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Images x_0 of `shape` (N, C, H, W), float32, from x_T ~ N(0, I), on `device` or else the generator's.

    Noise is drawn where the generator is, so that one on the CPU gives the same noise for every device.
    """
    process = process.strided(config.steps)
    x = torch.randn(shape, generator=generator, device=generator.device).to(device or generator.device)
    for step in range(process.T, 0, -1):
        t = torch.full((shape[0],), step, device=x.device)
        said = model(x, at(process.times, t, t))
        said = replace(said, x_0=said.x_0.clamp(-1, 1)) if clip else said
        x = STEPS[config.kind](process, config, x, said, t, generator)
    return x


def _normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
