"""The forward process q, its posterior, and the reverse process p_theta with a fixed or a learned variance.

Symbols are those of Ho et al. 2020. `t` runs over 1..T as in the paper; coefficients are indexed by t - 1 and cast to
the images' dtype where they are used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from workers.code import describe_error, drop_pin
from workers.config import DiffusionConfig
from workers.diffusion import schedules
from workers.kinds import VARIANCES
from workers.shapes import NCHW, Beside, Heads, PerImage64, PerTime, RealTimes, Times
from workers.students import Student

# eps_theta(x_t, t): the noise in x_t. What integrates an ODE over the times asks between the trained ones too.
EpsModel = Callable[[NCHW, RealTimes], Heads]


@dataclass(frozen=True)
class Prediction:
    """What a model says of x_t, whatever its network was trained to predict: each in the dtype of x_t.

    x_0 is not clipped. `variance` is the output of a second head, of which the process makes sigma_t^2
    (`Process.sigma`); None where the variance is fixed.
    """

    x_0: NCHW
    eps: NCHW
    variance: NCHW | None = None


# p_theta at (x_t, t): as EpsModel, but with all that there is to know. `workers.diffusion.predictions` makes them.
Model = Callable[[NCHW, RealTimes], Prediction]


@dataclass(frozen=True)
class Target:
    """What a network is trained to say, and what follows from it. `process` may be a continuous one, t real."""

    of: Callable[[Any, NCHW, NCHW, Any, NCHW], NCHW]  # (process, x_0, x_t, t, eps) -> the exact output
    x_0: Callable[[Any, NCHW, Any, NCHW], NCHW]  # (process, x_t, t, output)
    eps: Callable[[Any, NCHW, Any, NCHW], NCHW]  # (process, x_t, t, output)
    scale: Callable[[Any], Shaped[Tensor, "times"]]  # k_t: |x_0 - x_0_hat|^2 = k_t |target - output|^2, at each t


@dataclass(frozen=True)
class Process:
    """A diffusion process over the times 1..T, or over a subsequence of another's times (`strided`)."""

    beta: PerTime
    variance: str  # a name in VARIANCES
    times: Int64[Tensor, "T"]  # the t that the network was trained with, at each step of this process
    student: Student | None = None  # what is drawn along it, where it is one

    @staticmethod
    def of(config: DiffusionConfig) -> "Process":
        return Process.of_betas(torch.from_numpy(schedules.betas(config)), config.variance)

    @staticmethod
    def of_betas(beta: Float[Tensor, "T"], variance: str) -> "Process":
        return Process(beta.double(), variance, torch.arange(1, len(beta) + 1))

    def to(self, device: torch.device) -> "Process":
        """The same process with its coefficients on that device, so that none is copied there when it is used."""
        return replace(self, beta=self.beta.to(device), times=self.times.to(device))

    @property
    def T(self) -> int:
        return len(self.beta)

    @cached_property
    def alpha(self) -> PerTime:
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> PerTime:
        return torch.cumprod(self.alpha, 0)

    @cached_property
    def alpha_bar_before(self) -> PerTime:
        """alpha_bar_{t-1}, with alpha_bar_0 = 1."""
        return torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]])

    @cached_property
    def beta_tilde(self) -> PerTime:
        """The posterior's variance, eq. (7); zero at t = 1."""
        return (1 - self.alpha_bar_before) / (1 - self.alpha_bar) * self.beta

    @property
    def decoder_sigma_squared(self) -> Float64[Tensor, ""]:
        """sigma_1^2 where the variance is fixed, and what a decoder is measured by where it is not."""
        return fixed_small(self)[0]

    @property
    def learned(self) -> bool:
        """Whether the network has a second head, for the variance."""
        return VARIANCES[self.variance].learned

    @cached_property
    def sigma_squared(self) -> PerTime:
        """The variance of p_theta(x_{t-1} | x_t) where it is fixed, section 3.2; at t = 1 that of the decoder."""
        assert not self.learned, f"{self.variance} has no variance without the network; ask for sigma()"
        return _for_decoder(self, VARIANCES[self.variance].load()(self).to(self.beta.device))

    def sigma(self, prediction: Prediction, t: Times) -> Beside:
        """The standard deviation of p_theta(x_{t-1} | x_t): (N, C, H, W) where it is learned, else (N, 1, 1, 1)."""
        if not self.learned:
            return at(self.sigma_squared.sqrt(), t, prediction.x_0)
        return (0.5 * self.log_sigma_squared(prediction, t)).exp()

    def log_sigma_squared(self, prediction: Prediction, t: Times) -> Beside:
        """The logarithm of sigma^2, of the same shape."""
        if not self.learned:
            return at(self.sigma_squared.log(), t, prediction.x_0)
        assert prediction.variance is not None, f"{self.variance} needs a network with a second head"
        found: Beside = VARIANCES[self.variance].load()(self, t, prediction.variance)
        return found

    @cached_property
    def posterior_x_0(self) -> PerTime:
        """The weight of x_0 in mu_tilde_t, eq. (7)."""
        return self.alpha_bar_before.sqrt() * self.beta / (1 - self.alpha_bar)

    @cached_property
    def posterior_x_t(self) -> PerTime:
        """The weight of x_t in mu_tilde_t, eq. (7)."""
        return self.alpha.sqrt() * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def snr(self) -> PerTime:
        """SNR_t = alpha_bar_t / (1 - alpha_bar_t)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def noise_level(self) -> PerTime:
        """The sigma_t of Karras et al. 2022, of x_t / sqrt(alpha_bar_t) = x_0 + sigma_t eps: sqrt(1 / alpha_bar_t - 1).

        It rises with t.
        """
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @property
    def bound_weight(self) -> PerTime:
        """What |x_0 - x_0_hat|^2 counts in the bound: (weight of x_0 in mu_tilde_t)^2 / (2 sigma_t^2), eq. (8)."""
        return self.posterior_x_0.square() / (2 * self.sigma_squared)

    @property
    def ends(self) -> tuple[float, float]:
        """sigma_1 and sigma_T."""
        return float(self.noise_level[0]), float(self.noise_level[-1])

    def prior_variance(self, sigma: float) -> float:
        """Of a pixel of y = x_0 + sigma eps where sampling begins: that of x_T ~ N(0, I), scaled as y is."""
        return 1 + sigma**2

    def divisor_at(self, sigma: Float64[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
        """y / x_t at a noise level: sqrt(1 + sigma^2) = 1 / sqrt(alpha_bar_t)."""
        return (1 + sigma**2).sqrt()

    def feed(self, x_t: NCHW, t: RealTimes) -> tuple[NCHW, RealTimes]:
        """What the network is called with: it counts the times of its training from 0."""
        return x_t, t - 1 if t.is_floating_point() else self.times.to(t.device)[t - 1] - 1

    def describe(self) -> dict[str, Any]:
        """For a passport."""
        return {"T": self.T, "variance": self.variance, **(self.student.describe() if self.student else {})}

    def alpha_bar_at(self, t: RealTimes) -> PerImage64:
        """alpha_bar at times t in [1, T]: between whole ones, log noise_level is linear in t."""
        if not t.is_floating_point():
            return self.alpha_bar.to(t.device)[t - 1]
        below = t.long().clamp(1, max(1, self.T - 1))
        log_sigma = self.noise_level.log().to(t.device)
        low, high = log_sigma[below - 1], log_sigma[below.clamp(max=self.T - 1) if self.T > 1 else below - 1]
        return torch.sigmoid(-2 * torch.lerp(low, high, t.double() - below))  # 1 / (1 + sigma^2)

    def time_at(self, sigma: PerImage64) -> PerImage64:
        """The time in [1, T] at which the noise level is `sigma`. `alpha_bar_at` backwards."""
        times = np.arange(1, self.T + 1, dtype=np.float64)
        return torch.from_numpy(np.interp(sigma.log().cpu(), self.noise_level.log(), times)).to(sigma.device)

    def q_sample(self, x_0: NCHW, t: Times, eps: NCHW) -> NCHW:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, eq. (4)."""
        return at(self.alpha_bar.sqrt(), t, x_0) * x_0 + at((1 - self.alpha_bar).sqrt(), t, x_0) * eps

    def predict_x_0(self, x_t: NCHW, t: RealTimes, eps: NCHW, clip: bool) -> NCHW:
        """x_0_hat = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t), eq. (15); `clip` to the pixels' [-1, 1]."""
        alpha_bar = self.alpha_bar_at(t)
        x_0 = (x_t - spread((1 - alpha_bar).sqrt(), x_t) * eps) / spread(alpha_bar.sqrt(), x_t)
        return x_0.clamp(-1, 1) if clip else x_0

    def posterior_mean(self, x_0: NCHW, x_t: NCHW, t: Times) -> NCHW:
        """mu_tilde_t(x_t, x_0), eq. (7). With x_0_hat for x_0 it is mu_theta, eq. (11)."""
        return at(self.posterior_x_0, t, x_t) * x_0 + at(self.posterior_x_t, t, x_t) * x_t

    def strided(self, steps: int | None) -> "Process":
        """The process of `steps` of the times, evenly spaced with T among them; betas recomputed from alpha_bar.

        Nichol & Dhariwal 2021, eq. (19). With None, or as many steps as times, it is this process.
        """
        if steps is None or steps >= self.T:
            return self
        return self.kept(torch.from_numpy(np.linspace(self.T, 1, steps).round().astype(np.int64)[::-1].copy()))

    def kept(self, steps: Int64[Tensor, "S"]) -> "Process":
        """The process of some of its steps, rising in 1..T; betas recomputed from alpha_bar."""
        alpha_bar = self.alpha_bar[steps - 1]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return replace(self, beta=1 - alpha_bar / before, times=self.times[steps - 1])


def fixed_large(process: Process) -> PerTime:
    """sigma_t^2 = beta_t: the best choice for x_0 ~ N(0, I)."""
    return process.beta


def fixed_small(process: Process) -> PerTime:
    """sigma_t^2 = beta_tilde_t: the best choice for a single point."""
    return _for_decoder(process, process.beta_tilde)


def learned(process: Process, t: Times, head: NCHW) -> NCHW:
    """log sigma_t^2 = log beta_t + head, a pixel each: the learned diagonal of table 2 (Ho et al. 2020).

    Their network outputs log sigma_t^2 itself. From beta_t it starts, with a head of 0, at the fixed large variance,
    and means the same along a strided chain.
    """
    return at(process.beta.log(), t, head) + head


def learned_range(process: Process, t: Times, head: NCHW) -> NCHW:
    """log sigma_t^2 = v log beta_t + (1 - v) log beta_tilde_t, v = (head + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

    beta_tilde_1 = 0 is replaced by beta_tilde_2, as in their code; v is not held within [0, 1].
    """
    v = (head + 1) / 2
    return v * at(process.beta.log(), t, head) + (1 - v) * at(fixed_small(process).log(), t, head)


def _for_decoder(process: Process, variance: PerTime) -> PerTime:
    """`variance` with beta_tilde_2 at t = 1, where only the decoder uses it: as in the code of the published bits/dim.

    beta_tilde_1 is zero, and beta_1 costs the decoder about 0.1 bits/dim on CIFAR-10 (the paper's L_0 = 1.97 at an
    RMSE of 0.95 goes with beta_tilde_2). A process of one step has no beta_tilde_2 and takes beta_1.
    """
    return torch.cat([process.beta_tilde[1:2] if process.T > 1 else process.beta, variance[1:]])


FIXED = tuple(name for name, entry in VARIANCES.items() if not entry.learned)  # the bound by each costs nothing more


@lru_cache
def find_variance_mistakes(diffusion: DiffusionConfig, variance: str) -> list[str]:
    """What is wrong with the form of what a variance that is not ours makes for the process of these settings."""
    return try_variance(replace(Process.of(diffusion), variance=variance))


def try_variance(process: Process) -> list[str]:
    """The same of the variance of a process."""
    variance = process.variance
    bare, head = drop_pin(variance), torch.zeros(2, 3, 4, 4)
    expected = tuple(head.shape) if process.learned else (process.T,)
    asked = (torch.tensor([1, process.T]), head) if process.learned else ()
    try:
        made = VARIANCES[variance].load()(process, *asked)
    except Exception as error:  # noqa: BLE001 somebody's own code
        return [f"{bare}: {describe_error(error, bare)}"]
    if not isinstance(made, Tensor) or made.shape != expected or not made.is_floating_point():
        found = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        return [f"{bare} makes {found}, where numbers {expected} are expected"]
    usable = made.isfinite().all() and (process.learned or (made.dtype == torch.float64 and (made[1:] > 0).all()))
    return [] if usable else [f"{bare} makes what is no variance: it is finite, and a fixed one float64 and above 0"]


def at(coefficient: Shaped[Tensor, "T"], t: Times, like: Beside) -> Beside:
    """coefficient_t for each of the batch: (n, 1, 1, ...) of `like`'s dtype."""
    return spread(coefficient.to(t.device)[t - 1], like)


def spread(values: Shaped[Tensor, "n"], like: Beside) -> Beside:
    """A number for each image, beside the images: (n, 1, 1, ...) of `like`'s dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
