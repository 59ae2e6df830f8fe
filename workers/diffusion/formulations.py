"""Diffusion in continuous time: EDM and flow matching, and what a formulation is.

All of them see the same images, x_0 + sigma eps at noise levels sigma, and differ in how they are scaled, told and
drawn: x_t = a_t (x_0 + sigma_t eps). So at one log-SNR, -2 log sigma, each is every other after a scaling, and
samplers, likelihoods and weightings are stated in sigma once for all (Kingma et al. 2021, section 5.1; Kingma &
Gao 2023).
A `Formulation` is the functions in which they differ, each of the settings and of real t; `workers.kinds` lists them,
and `workers.diffusion.laws` says in NumPy which t are trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from workers.config import DiffusionConfig
from workers.diffusion.process import Prediction, Process, Target, spread
from workers.entries import load
from workers.identity import collect_settings_read
from workers.kinds import FORMULATIONS
from workers.shapes import NCHW, PerImage64
from workers.students import Student

Reals = Float64[Tensor, "*times"]  # t, or noise levels
Rising = Float64[Tensor, "steps_and_end"]
OfTimes = Callable[[DiffusionConfig, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Formulation:
    """x_t = a_t (x_0 + sigma_t eps) for real t, and a network that is asked at it."""

    signal: OfTimes  # (config, t) -> a_t
    noise_level: OfTimes  # (config, t) -> sigma_t, rising in t
    time: OfTimes  # (config, sigma) -> t
    law: OfTimes  # (config, u) -> t, the quantile function of the t of the training
    density: OfTimes  # (config, t) -> the density of log SNR under that law
    feed: Callable[[DiffusionConfig, Tensor, Tensor], tuple[Tensor, Tensor]]  # (config, x_t, t) -> network's x and t
    target: Target  # what the network says
    drift: Callable[[DiffusionConfig, Tensor, Prediction], Tensor]  # (config, t, prediction) -> dx_t / dt of the flow
    path: Callable[[DiffusionConfig, int], Tensor]  # (config, steps) -> steps + 1 times from noise to data, falling


@dataclass(frozen=True)
class Continuous:
    """A formulation with its settings: it stands where a `Process` of T times would."""

    formulation: Formulation
    config: DiffusionConfig
    student: Student | None = None  # what is drawn along it, where it is one
    highest: float | None = None  # noise level that it begins at, where that is not the formulation's largest

    T: ClassVar[None] = None
    learned: ClassVar[bool] = False

    @staticmethod
    def of(config: DiffusionConfig) -> "Continuous":
        return Continuous(FORMULATIONS[config.formulation].load(), config)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The least and the largest noise level that it is measured at."""
        low, high = load(FORMULATIONS[self.config.formulation].ends)(self.config)
        return float(low), float(high if self.highest is None else self.highest)

    def prior_variance(self, sigma: float) -> float:
        """Of a pixel of y = x_0 + sigma eps where sampling begins: that of the noise alone."""
        return sigma**2

    def signal_at(self, t: Reals) -> Reals:
        """a_t."""
        return self.formulation.signal(self.config, t)

    def noise_level_at(self, t: Reals) -> Reals:
        """sigma_t."""
        return self.formulation.noise_level(self.config, t)

    def time_at(self, sigma: Reals) -> Reals:
        """The time at which the noise level is `sigma`."""
        return self.formulation.time(self.config, sigma)

    def divisor_at(self, sigma: Reals) -> Reals:
        """y / x_t at a noise level: 1 / a_t."""
        return 1 / self.signal_at(self.time_at(sigma))

    def q_sample(self, x_0: NCHW, t: PerImage64, eps: NCHW) -> NCHW:
        """x_t = a_t x_0 + a_t sigma_t eps."""
        a, b = self.signal_at(t), self.noise_at(t)
        return spread(a, x_0) * x_0 + spread(b, x_0) * eps

    def noise_at(self, t: Reals) -> Reals:
        """a_t sigma_t, which is finite where there is no signal, too."""
        a = self.signal_at(t)
        return torch.where(a > 0, a * self.noise_level_at(t), torch.ones_like(t))

    def feed(self, x_t: NCHW, t: PerImage64) -> tuple[NCHW, PerImage64]:
        """What the network is called with."""
        return self.formulation.feed(self.config, x_t, t)

    def draw_times(self, u: PerImage64) -> PerImage64:
        """The t of a training, of u that are uniform in (0, 1)."""
        return self.formulation.law(self.config, u)

    def describe(self) -> dict[str, Any]:
        """For a passport: its settings."""
        return {**collect_settings_read(self.config), **(self.student.describe() if self.student else {})}


AnyProcess = Process | Continuous


def make_process(config: DiffusionConfig) -> AnyProcess:
    """The process of these settings, of T times or continuous."""
    return Continuous.of(config) if config.continuous else Process.of(config)


def take_student(process: AnyProcess, student: Student | None) -> AnyProcess:
    """The process that a student is drawn along: of T times those at the ends of its own steps, T among them."""
    if student and student.steps and isinstance(process, Process):
        process = process.kept(process.T // student.steps * torch.arange(1, student.steps + 1))
    return replace(process, student=student)


@dataclass(frozen=True)
class Instants:
    """Some t of a continuous process, with what weightings and targets read of a `Process` at its T times."""

    process: Continuous
    t: Reals

    @cached_property
    def noise_level(self) -> Reals:
        return self.process.noise_level_at(self.t)

    @property
    def snr(self) -> Reals:
        return self.noise_level**-2

    @property
    def bound_weight(self) -> Reals:
        """What |x_0 - x_0_hat|^2 counts in the bound where t is drawn as in training: SNR / (2 p(log SNR)).

        The bound is half the integral of SNR |x_0 - x_0_hat|^2 over log SNR (Kingma et al. 2021, section 5), between
        the ends that it is measured at; beyond them it counts nothing.
        """
        low, high = self.process.ends
        inside = (self.noise_level >= low) & (self.noise_level <= high)
        density = self.process.formulation.density(self.process.config, self.t)
        return torch.where(inside, self.snr / (2 * density), torch.zeros_like(self.t))


# ---- EDM: Karras et al. 2022, sections 3 and 5 and table 1; t is sigma -------------------------------------------
#
# D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), where c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),
# c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2), c_in = 1 / sqrt(sigma^2 + sigma_data^2),
# c_noise = log(sigma) / 4. What F should say has variance 1 at any sigma, if the pixels have sigma_data^2.


def _find_total(config: DiffusionConfig, sigma: Tensor) -> Tensor:
    """sqrt(sigma^2 + sigma_data^2)."""
    return (sigma**2 + config.sigma_data**2).sqrt()


def _edm_target(process: Continuous, x_0: NCHW, x_t: NCHW, t: PerImage64, eps: NCHW) -> NCHW:
    """(x_0 - c_skip x_t) / c_out, of x_0 and eps: their difference at small sigma would lose its digits."""
    total, data = _find_total(process.config, t), process.config.sigma_data
    return spread(t / (data * total), x_0) * x_0 - spread(data / total, x_0) * eps


def _edm_x_0(process: Continuous, x_t: NCHW, t: PerImage64, output: NCHW) -> NCHW:
    """D = c_skip x + c_out F."""
    total, data = _find_total(process.config, t), process.config.sigma_data
    return spread((data / total) ** 2, x_t) * x_t + spread(t * data / total, x_t) * output


def _edm_eps(process: Continuous, x_t: NCHW, t: PerImage64, output: NCHW) -> NCHW:
    """(x - D) / sigma, where sigma divides each part by itself."""
    total, data = _find_total(process.config, t), process.config.sigma_data
    return spread(t / total**2, x_t) * x_t - spread(data / total, x_t) * output


def _edm_scale(instants: Instants) -> Reals:
    """c_out^2: the weighting of Karras et al., 1 / c_out^2 for the error of x_0, counts that of F evenly."""
    config = instants.process.config
    return (instants.t * config.sigma_data / _find_total(config, instants.t)) ** 2


def _draw_normal(config: DiffusionConfig, u: Tensor) -> Tensor:
    """log sigma ~ N(p_mean, p_std^2)."""
    return (config.p_mean + config.p_std * torch.special.ndtri(u)).exp()


def _find_density_of_normal(config: DiffusionConfig, t: Tensor) -> Tensor:
    """That of -2 log sigma."""
    law = torch.distributions.Normal(-2 * config.p_mean, 2 * config.p_std)
    return law.log_prob(-2 * t.log()).exp()


def space_by_power(low: float, high: float, steps: int, rho: float = 7.0) -> Rising:
    """`steps` levels from high to low, even in sigma^(1 / rho), and 0: Karras et al. 2022, eq. (5)."""
    levels = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


EDM = Formulation(
    signal=lambda config, t: torch.ones_like(t),
    noise_level=lambda config, t: t,
    time=lambda config, sigma: sigma,
    law=_draw_normal,
    density=_find_density_of_normal,
    feed=lambda config, x_t, t: (x_t / spread(_find_total(config, t), x_t), t.log() / 4),
    target=Target(of=_edm_target, x_0=_edm_x_0, eps=_edm_eps, scale=_edm_scale),
    drift=lambda config, t, prediction: prediction.eps,  # eq. (1) with s(t) = 1 and sigma(t) = t
    path=lambda config, steps: space_by_power(config.sigma_min, config.sigma_max, steps),
)


# ---- Flow matching on straight paths: Lipman et al. 2023, section 4.1, with t = 1 for noise and sigma_min = 0 -----
#
# x_t = (1 - t) x_0 + t eps, whose velocity dx_t / dt = eps - x_0 the network says.

TIMES_TOLD = 1000  # the network is told 1000 t, as by diffusers


def _find_flow_level(config: DiffusionConfig, t: Tensor) -> Tensor:
    return t / (1 - t)


def _draw_flow(config: DiffusionConfig, u: Tensor) -> Tensor:
    """t uniform on (0, 1), or its logit normal (Esser et al. 2024, section 3.1)."""
    if config.t_law == "uniform":
        return u
    return torch.sigmoid(config.t_mean + config.t_std * torch.special.ndtri(u))


def _find_density_of_flow(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Of log SNR = 2 log((1 - t) / t), whose slope is -2 / (t (1 - t))."""
    if config.t_law == "uniform":
        return t * (1 - t) / 2
    law = torch.distributions.Normal(config.t_mean, config.t_std)
    return law.log_prob(torch.logit(t)).exp() / 2


FLOW = Formulation(
    signal=lambda config, t: 1 - t,
    noise_level=_find_flow_level,
    time=lambda config, sigma: sigma / (1 + sigma),
    law=_draw_flow,
    density=_find_density_of_flow,
    feed=lambda config, x_t, t: (x_t, TIMES_TOLD * t),
    target=Target(
        of=lambda process, x_0, x_t, t, eps: eps - x_0,
        x_0=lambda process, x_t, t, output: x_t - spread(t, x_t) * output,
        eps=lambda process, x_t, t, output: x_t + spread(1 - t, x_t) * output,
        scale=lambda instants: instants.t**2,
    ),
    drift=lambda config, t, prediction: prediction.eps - prediction.x_0,
    path=lambda config, steps: torch.linspace(1, 0, steps + 1, dtype=torch.float64),
)
