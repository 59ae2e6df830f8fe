"""The forward process q, its posterior, and the reverse process p_theta with a fixed variance.

Symbols are those of Ho et al. 2020. `t` runs over 1..T as in the paper; coefficients are float64 tensors (T,)
indexed by t - 1 and cast to the images' dtype where they are used. Images are float NCHW.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from workers.config import DiffusionConfig
from workers.diffusion import schedules

# eps_theta(x_t, t): noisy images (N, C, H, W) and t (N,) in 1..T -> the noise in them, same shape as x_t. Times are
# whole numbers, int64; what integrates an ODE over them asks between them too, by float64.
EpsModel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Process:
    """A diffusion process over the times 1..T, or over a subsequence of another's times (`strided`)."""

    beta: Tensor  # float64 (T,)
    variance: str  # a name in VARIANCES
    times: Tensor  # int64 (T,): the t that the network was trained with, at each step of this process

    @staticmethod
    def of(config: DiffusionConfig) -> "Process":
        return Process.of_betas(torch.from_numpy(schedules.betas(config)), config.variance)

    @staticmethod
    def of_betas(beta: Tensor, variance: str) -> "Process":
        return Process(beta.double(), variance, torch.arange(1, len(beta) + 1))

    @property
    def T(self) -> int:
        return len(self.beta)

    @cached_property
    def alpha(self) -> Tensor:
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> Tensor:
        return torch.cumprod(self.alpha, 0)

    @cached_property
    def alpha_bar_before(self) -> Tensor:
        """alpha_bar_{t-1}, with alpha_bar_0 = 1."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def beta_tilde(self) -> Tensor:
        """The posterior's variance, eq. (7); zero at t = 1."""
        return (1 - self.alpha_bar_before) / (1 - self.alpha_bar) * self.beta

    @cached_property
    def sigma_squared(self) -> Tensor:
        """The variance of p_theta(x_{t-1} | x_t), section 3.2."""
        return VARIANCES[self.variance](self)

    @cached_property
    def posterior_x_0(self) -> Tensor:
        """The weight of x_0 in mu_tilde_t, eq. (7)."""
        return self.alpha_bar_before.sqrt() * self.beta / (1 - self.alpha_bar)

    @cached_property
    def posterior_x_t(self) -> Tensor:
        """The weight of x_t in mu_tilde_t, eq. (7)."""
        return self.alpha.sqrt() * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def snr(self) -> Tensor:
        """SNR_t = alpha_bar_t / (1 - alpha_bar_t)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def sigma(self) -> Tensor:
        """The noise level of x_t / sqrt(alpha_bar_t) = x_0 + sigma_t eps: sqrt(1 / alpha_bar_t - 1), rising with t."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha_bar (N,) float64 at times t (N,) in [1, T]: between whole ones, log sigma_t is linear in t."""
        if not t.is_floating_point():
            return self.alpha_bar.to(t.device)[t - 1]
        below = t.long().clamp(1, max(1, self.T - 1))
        log_sigma = self.sigma.log().to(t.device)
        low, high = log_sigma[below - 1], log_sigma[below.clamp(max=self.T - 1) if self.T > 1 else below - 1]
        return torch.sigmoid(-2 * torch.lerp(low, high, t.double() - below))  # 1 / (1 + sigma^2)

    def time_at(self, sigma: Tensor) -> Tensor:
        """The time in [1, T] at which the noise level is `sigma`: float64, of its shape. `alpha_bar_at` backwards."""
        times = np.arange(1, self.T + 1, dtype=np.float64)
        return torch.from_numpy(np.interp(sigma.log().cpu(), self.sigma.log(), times)).to(sigma.device)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, eq. (4)."""
        return at(self.alpha_bar.sqrt(), t, x_0) * x_0 + at((1 - self.alpha_bar).sqrt(), t, x_0) * eps

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor, clip: bool) -> Tensor:
        """x_0_hat = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t), eq. (15); `clip` to the pixels' [-1, 1]."""
        x_0 = (x_t - at((1 - self.alpha_bar).sqrt(), t, x_t) * eps) / at(self.alpha_bar.sqrt(), t, x_t)
        return x_0.clamp(-1, 1) if clip else x_0

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mu_tilde_t(x_t, x_0), eq. (7). With x_0_hat for x_0 it is mu_theta, eq. (11)."""
        return at(self.posterior_x_0, t, x_t) * x_0 + at(self.posterior_x_t, t, x_t) * x_t

    def strided(self, steps: int | None) -> "Process":
        """The process of `steps` of the times, evenly spaced with T among them; betas recomputed from alpha_bar.

        Nichol & Dhariwal 2021, eq. (19). With None, or as many steps as times, it is this process.
        """
        if steps is None or steps >= self.T:
            return self
        return self.kept(torch.from_numpy(np.linspace(self.T, 1, steps).round().astype(np.int64)[::-1].copy()))

    def kept(self, steps: Tensor) -> "Process":
        """The process of some of its steps, int64 rising in 1..T; betas recomputed from alpha_bar."""
        alpha_bar = self.alpha_bar[steps - 1]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return Process(1 - alpha_bar / before, self.variance, self.times[steps - 1])


def fixed_large(process: Process) -> Tensor:
    """sigma_t^2 = beta_t: the best choice for x_0 ~ N(0, I)."""
    return _for_decoder(process, process.beta)


def fixed_small(process: Process) -> Tensor:
    """sigma_t^2 = beta_tilde_t: the best choice for a single point."""
    return _for_decoder(process, process.beta_tilde)


def _for_decoder(process: Process, variance: Tensor) -> Tensor:
    """`variance` with beta_tilde_2 at t = 1, where only the decoder uses it: as in the code of the published bits/dim.

    beta_tilde_1 is zero, and beta_1 costs the decoder about 0.1 bits/dim on CIFAR-10 (the paper's L_0 = 1.97 at an
    RMSE of 0.95 goes with beta_tilde_2). A process of one step has no beta_tilde_2 and takes beta_1.
    """
    return torch.cat([process.beta_tilde[1:2] if process.T > 1 else process.beta, variance[1:]])


VARIANCES: dict[str, Callable[[Process], Tensor]] = {"fixed_large": fixed_large, "fixed_small": fixed_small}


def at(coefficient: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """coefficient_t for each of the batch: float64 (T,), t (N,) in 1..T -> (N, 1, 1, ...) of `like`'s dtype."""
    return spread(coefficient.to(t.device)[t - 1], like)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """A number for each image, beside the images: (N,) -> (N, 1, 1, ...) of `like`'s dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
