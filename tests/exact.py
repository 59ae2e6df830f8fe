"""What is known exactly: the KL of two Gaussians, and the bound and the samples of Gaussian pixels.

The best denoiser of pixels from N(0, s^2) is linear (`workers.diffusion.gaussian`). With it every term of the bound is
a closed form or one integral over a single normal number, and every sampler multiplies the variance of a pixel by a
known number and adds a known number.

Nothing here comes from `workers.diffusion.bound`, `.samplers` or the posterior of `Process`, but for the logarithm of
an interval under the normal law: what these compute is compared with this module. Clipping x_0_hat to [-1, 1] is left
out; at s = 0.2 it changes the bound by less than a ten-thousandth of its standard error (tests/test_gaussian.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.config import SamplerConfig
from workers.diffusion.bound import log_normal_interval
from workers.diffusion.process import Process

# The trapezoid rule for means over a standard normal number. For an analytic function its error falls as
# exp(-2 pi a / step), a being the distance of the nearest singularity from the real line; beyond REACH lies 1.5e-23.
REACH, STEP = 10.0, 0.02


def gaussian_kl(mean_1: Tensor, variance_1: Tensor, mean_2: Tensor, variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) a dimension, in nats."""
    return 0.5 * (torch.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2).square()) / variance_2 - 1)


def gain(process: Process, standard_deviation: float) -> Tensor:
    """sqrt(1 - alpha_bar_t) / (alpha_bar_t s^2 + 1 - alpha_bar_t), float64 (T,): the best denoiser is gain_t x_t."""
    alpha_bar = process.alpha_bar
    return (1 - alpha_bar).sqrt() / (alpha_bar * standard_deviation**2 + 1 - alpha_bar)


@dataclass(frozen=True)
class Exact:
    """The terms of the bound of some images in bits/dim, over the noise of x_t: float64 (N, T + 1).

    Columns are L_0, L_1, ..., L_T, as in an evaluation's `nll_by_t`.
    """

    mean: Tensor
    variance: Tensor  # of one measurement of the term; zero for L_T, which needs none

    def standard_error(self) -> float:
        """Of the bound's mean over the images, by the noise alone: each term measured once with noise of its own."""
        return float(self.variance.sum().sqrt()) / len(self.variance)


def exact_bound(process: Process, standard_deviation: float, images: np.ndarray, levels: int) -> Exact:
    """The bound of uint8 `images` (N, H, W, C) in 0..levels-1 under the best denoiser for N(0, s^2).

    L_{t-1} for t > 1 is eq. (12): both means are those of eq. (11), so that it is w_t |eps - gain_t x_t|^2 beside the
    KL of the two variances, where w_t = beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)), and

        eps - gain_t x_t = a_t eps - b_t x_0,    a_t = 1 - gain_t sqrt(1 - alpha_bar_t),  b_t = gain_t sqrt(alpha_bar_t)

    has E|.|^2 = a_t^2 D + b_t^2 |x_0|^2 and Var|.|^2 = 2 a_t^4 D + 4 a_t^2 b_t^2 |x_0|^2 over eps.
    """
    pixels = torch.from_numpy(np.asarray(images, np.int64)).flatten(1)
    D = pixels.shape[1]
    squared_norm = (2 * pixels.double() / (levels - 1) - 1).square().sum(1)[:, None]
    alpha_bar, beta, sigma_squared = process.alpha_bar, process.beta, process.sigma_squared

    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    true = beta[1:] * ((1 - before) / (1 - alpha_bar))[1:]  # the variance of q(x_{t-1} | x_t, x_0), eq. (7)
    spread = 0.5 * (torch.log(sigma_squared[1:] / true) + true / sigma_squared[1:] - 1)
    w = (beta**2 / (2 * sigma_squared * (1 - beta) * (1 - alpha_bar)))[1:]
    g = gain(process, standard_deviation)[1:]
    a, b = 1 - g * (1 - alpha_bar[1:]).sqrt(), g * alpha_bar[1:].sqrt()
    mean = D * spread + w * (a**2 * D + b**2 * squared_norm)
    variance = w**2 * (2 * a**4 * D + 4 * a**2 * b**2 * squared_norm)

    decoder_mean, decoder_variance = exact_decoder(process, standard_deviation, levels)
    last = alpha_bar[-1]
    prior = 0.5 * (D * (-last - torch.log1p(-last)) + last * squared_norm)  # KL(q(x_T | x_0) || N(0, I)), eq. (5)

    unit = D * math.log(2)  # nats an image -> bits a dimension
    return Exact(
        torch.cat([decoder_mean[pixels].sum(1, keepdim=True), mean, prior], 1) / unit,
        torch.cat([decoder_variance[pixels].sum(1, keepdim=True), variance, torch.zeros_like(prior)], 1) / unit**2,
    )


def exact_decoder(
    process: Process, standard_deviation: float, levels: int, reach: float = REACH, step: float = STEP
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a pixel's L_0 over eps, eq. (13), in nats for each of its values: two float64 (levels,).

    mu_theta(x_1, 1) is x_0_hat = (x_1 - sqrt(1 - alpha_bar_1) gain_1 x_1) / sqrt(alpha_bar_1), normal around a
    multiple of x_0. The means over it are by the trapezoid rule, with an error below 1e-10 wherever a level's bin is
    no wider than some 40 sigma_1.
    """
    z = torch.arange(-round(reach / step), round(reach / step) + 1, dtype=torch.float64) * step
    density = torch.exp(-z.square() / 2) * (step / math.sqrt(2 * math.pi))
    x_0 = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    half, sigma, first = 1 / (levels - 1), process.sigma_squared[0].sqrt(), process.alpha_bar[0]
    x_1 = first.sqrt() * x_0[:, None] + (1 - first).sqrt() * z  # (levels, nodes)
    mean = x_1 * (1 - (1 - first).sqrt() * gain(process, standard_deviation)[0]) / first.sqrt()
    upper, lower = (x_0[:, None] + half - mean) / sigma, (x_0[:, None] - half - mean) / sigma
    upper[-1], lower[0] = math.inf, -math.inf
    nats = -log_normal_interval(lower, upper)
    expected = nats @ density
    return expected, (nats - expected[:, None]).square() @ density


def sample_variances(process: Process, standard_deviation: float, sampler: SamplerConfig) -> Tensor:
    """The variance of a pixel of x_t in a chain of samples, float64 (steps + 1,): from 1 at x_T to that of x_0.

    With eps_theta = gain_t x_t each step is x_s = slope x_t + sqrt(added) z, so Var(x_s) = slope^2 Var(x_t) + added,
    and pixels stay independent, of mean 0 and normal.
    """
    trained, process = gain(process, standard_deviation), process.strided(sampler.steps)
    slope, added = CHAINS[sampler.kind](process, trained[process.times - 1], sampler)
    variances = [torch.ones((), dtype=torch.float64)]
    for step in reversed(range(process.T)):
        variances.append(slope[step] ** 2 * variances[-1] + added[step])
    return torch.stack(variances)


def _ancestral(process: Process, gain: Tensor, sampler: SamplerConfig) -> tuple[Tensor, Tensor]:
    """mu_theta of eq. (11) and sigma_t^2; the last step adds no noise (Algorithm 2)."""
    slope = (1 - process.beta / (1 - process.alpha_bar).sqrt() * gain) / (1 - process.beta).sqrt()
    added = process.sigma_squared.clone()
    added[0] = 0
    return slope, added


def _ddim(process: Process, gain: Tensor, sampler: SamplerConfig) -> tuple[Tensor, Tensor]:
    """Song et al. 2020a, eq. (12), with the sigma of eq. (16)."""
    now, before = process.alpha_bar, torch.cat([torch.ones(1, dtype=torch.float64), process.alpha_bar[:-1]])
    added = sampler.eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    x_0_hat = (1 - (1 - now).sqrt() * gain) / now.sqrt()
    return before.sqrt() * x_0_hat + (1 - before - added).clamp(min=0).sqrt() * gain, added


def _euler_maruyama(process: Process, gain: Tensor, sampler: SamplerConfig) -> tuple[Tensor, Tensor]:
    """x_t + B x_t / 2 + B score over B = -log(alpha_t), score = -E[eps | x_t] / std_t (Song et al. 2021, eq. 6)."""
    B = -torch.log1p(-process.beta)
    added = B.clone()
    added[0] = 0
    return 1 + B / 2 - B * gain / (1 - process.alpha_bar).sqrt(), added


CHAINS = {"ancestral": _ancestral, "ddim": _ddim, "euler_maruyama": _euler_maruyama}
