"""Samplers of p_theta: from noise to images. All noise comes from the one generator that is handed in.

`workers.kinds.SAMPLERS` lists them. A sampler is one step x_t -> x_s of a chain of kept times, evenly spaced with T
among them (`Process.strided`); or it goes through noise levels sigma in y = x_t / sqrt(alpha_bar_t) = x_0 + sigma eps,
where the score is -eps / sigma and the flow dy / dsigma = eps, and names how its levels are spaced; or it follows x_t
over the real times of a continuous process.

The network of a discrete process is only asked for times that it was trained with: levels are moved to the nearest of
them, as Karras et al. 2022 do for discrete models (appendix C.3), and all arithmetic is with the level of that time.
The exception is `ode`, whose solver chooses its levels: see `workers.diffusion.flow`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from workers.config import SamplerConfig
from workers.diffusion import flow
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.process import Model, Prediction, Process, at, spread
from workers.entries import load
from workers.kinds import SAMPLERS
from workers.passes import count_passes, plan_evaluations
from workers.shapes import NCHW, Counts, PerImage64, Times
from workers.students import check_drawing

Sigmas = Float64[np.ndarray, "S"]  # noise levels, rising
Levels = Callable[[float, float, int], Sigmas]  # (low, high, steps) -> so many between them

RHO, LEAST, MOST = 7, 0.002, 80.0  # of `heun`'s levels: Karras et al. 2022, table 1
MOST_OF_DPMPP = float(np.exp(5.1))  # where Lu et al. 2022b clip the log-SNR of chains that end far beyond, as cosine's


@dataclass(frozen=True)
class Drawn:
    x_0: NCHW
    evaluations: Counts  # of the network, for each image


@torch.no_grad()
def draw(
    process: AnyProcess, model: Model, config: SamplerConfig, x_T: NCHW, generator: torch.Generator, *, clip: bool
) -> Drawn:
    """Images x_0 from x_T, float32. `clip` allows the kinds that do so to clip x_0_hat.

    A guided `model` is guided by the scale of `config` (`guidance.tell`), of which only the count is made here.

    Noise is drawn where the generator is, so that one on the CPU makes the same noise for every device. Raises Mistake
    where the sampler does not draw from the student that the model is.
    """
    check_drawing(process.student, config)
    entry = SAMPLERS[config.kind]
    function, clip = entry.load(), clip and entry.clips
    if entry.form == "whole":
        drawn: Drawn = function(process, model, config, x_T, generator)
        return replace(drawn, evaluations=drawn.evaluations * count_passes(config))
    if entry.form == "path":
        x_0 = function(process, model, config, x_T, generator).float()
    elif entry.form == "step":
        assert isinstance(process, Process), f"{config.kind} is a step of a chain, which a continuous process has not"
        x_0 = _run_chain(process.strided(config.steps), model, function, config, x_T, generator=generator, clip=clip)
    else:
        ladder = Ladder.at(process, load(entry.levels), config.steps, model=model, clip=clip)
        start = process.prior_variance(float(ladder.sigma[-1])) ** 0.5
        x_0 = function(ladder, config, x_T.double() * start, generator).float()
    return Drawn(x_0, torch.full((len(x_T),), plan_evaluations(config, process.T)))


def sample(
    process: AnyProcess,
    model: Model,
    config: SamplerConfig,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    clip: bool = True,
    device: torch.device | None = None,
) -> NCHW:
    """Images x_0 of `shape` (n, c, h, w), float32, from x_T ~ N(0, I), on `device` or else the generator's."""
    x_T = torch.randn(shape, generator=generator, device=generator.device).to(device or generator.device)
    return draw(process, model, config, x_T, generator, clip=clip).x_0


# ---- One step of a chain ---------------------------------------------------------------------------------------


def ancestral(
    process: Process, config: SamplerConfig, x_t: NCHW, prediction: Prediction, t: Times, *, generator: torch.Generator
) -> NCHW:
    """x_{t-1} = mu_theta(x_t, t) + sigma_t z, with z = 0 at t = 1: Algorithm 2. sigma_t is a standard deviation."""
    mean = process.posterior_mean(prediction.x_0, x_t, t)
    if int(t[0]) == 1:
        return mean
    return mean + process.sigma(prediction, t) * _draw_normal_like(x_t, generator)


def ddim(
    process: Process, config: SamplerConfig, x_t: NCHW, prediction: Prediction, t: Times, *, generator: torch.Generator
) -> NCHW:
    """x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z (Song et al. 2020a, eq. 12, 16).

    s is the time before t, sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s);
    eps is taken from x_0_hat, so that a clipped x_0_hat and eps agree.
    """
    now, before = process.alpha_bar, process.alpha_bar_before
    eps = (x_t - at(now.sqrt(), t, x_t) * prediction.x_0) / at((1 - now).sqrt(), t, x_t)
    sigma = config.eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    x_s = at(before.sqrt(), t, x_t) * prediction.x_0 + at((1 - before - sigma**2).clamp(min=0).sqrt(), t, x_t) * eps
    return x_s if config.eta == 0 else x_s + at(sigma, t, x_t) * _draw_normal_like(x_t, generator)


def euler_maruyama(
    process: Process, config: SamplerConfig, x_t: NCHW, prediction: Prediction, t: Times, *, generator: torch.Generator
) -> NCHW:
    """x_s = x_t + B x_t / 2 + B score + sqrt(B) z: dx = (f - g^2 score) dt + g dw backwards (Song et al. 2021, eq. 6).

    f = -beta(t) x / 2 and g^2 = beta(t), the variance-preserving SDE (eq. 11); B is the integral of beta(t) over the
    step, -log(alpha_bar_t / alpha_bar_s); score = -eps / sqrt(1 - alpha_bar_t). The last step adds no noise.
    """
    B = -torch.log1p(-process.beta)
    score = -prediction.eps / at((1 - process.alpha_bar).sqrt(), t, x_t)
    mean = x_t + at(B, t, x_t) * (x_t / 2 + score)
    return mean if int(t[0]) == 1 else mean + at(B.sqrt(), t, x_t) * _draw_normal_like(x_t, generator)


@runtime_checkable
class Step(Protocol):
    """The x_0 of the prediction is clipped where that is asked for; its eps is the network's own."""

    def __call__(
        self,
        process: Process,
        config: SamplerConfig,
        x_t: NCHW,
        prediction: Prediction,
        t: Times,
        *,
        generator: torch.Generator,
    ) -> NCHW: ...


def _run_chain(
    process: Process,
    model: Model,
    step: Step,
    config: SamplerConfig,
    x: NCHW,
    *,
    generator: torch.Generator,
    clip: bool,
) -> NCHW:
    for time in range(process.T, 0, -1):
        t = torch.full((len(x),), time, device=x.device)
        prediction = model(x, at(process.times, t, t))
        prediction = replace(prediction, x_0=prediction.x_0.clamp(-1, 1)) if clip else prediction
        x = step(process, config, x, prediction, t, generator=generator)
    return x


# ---- Through noise levels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ladder:
    """The noise levels sigma_1 < ... < sigma_S of a sampler, and the network at each of them."""

    sigma: Float64[Tensor, "S"]
    times: Shaped[Tensor, "S"]  # the t of each, whole numbers of a discrete process
    model: Model
    clip: bool
    divisor: Float64[Tensor, "S"]  # y / x_t at each

    @staticmethod
    def of(process: Process, model: Model, clip: bool) -> "Ladder":
        """All times of the process."""
        return Ladder(process.noise_level, process.times, model, clip, process.divisor_at(process.noise_level))

    @staticmethod
    def at(process: AnyProcess, levels: Levels, steps: int | None, *, model: Model, clip: bool) -> "Ladder":
        """So many levels: of a discrete process the nearest of its times."""
        if isinstance(process, Process):
            return Ladder.of(process.kept(find_nearest_times(process, levels, steps)), model, clip)
        assert steps, "a continuous process has no T times to be the steps"
        sigma = torch.from_numpy(levels(*process.ends, max(steps, 2))[-steps:].copy())
        return Ladder(sigma, process.time_at(sigma), model, clip, process.divisor_at(sigma))

    def eps(self, y: NCHW, level: int) -> NCHW:
        """eps in y, float64, whose noise is that of `level` in 1..S."""
        x_t = (y / float(self.divisor[level - 1])).float()
        return self.model(x_t, self.times[level - 1].to(y.device).expand(len(y))).eps.double()

    def x_0_hat(self, y: NCHW, level: int) -> NCHW:
        """y - sigma eps, clipped where the ladder clips."""
        x_0 = y - float(self.sigma[level - 1]) * self.eps(y, level)
        return x_0.clamp(-1, 1) if self.clip else x_0


def geometric(low: float, high: float, steps: int) -> Sigmas:
    """Levels whose logarithms, and so those of the signal-to-noise ratio, are evenly spaced."""
    return np.geomspace(low, min(high, MOST_OF_DPMPP), steps)


def power(low: float, high: float, steps: int) -> Sigmas:
    """Levels evenly spaced in sigma^(1 / rho), rho = 7, within 0.002..80: Karras et al. 2022, eq. (5)."""
    ends = max(low, LEAST) ** (1 / RHO), min(high, MOST) ** (1 / RHO)
    return np.asarray(np.linspace(*ends, steps) ** RHO)


def power_without_least(low: float, high: float, steps: int) -> Sigmas:
    """The same without the least of one more: a student by consistency jumps from each of them to the end."""
    return power(low, high, steps + 1)[1:]


def find_nearest_times(process: Process, levels: Levels, steps: int | None) -> Int64[Tensor, "S"]:
    """The times, rising in 1..T, whose noise levels are nearest to `steps` levels between sigma_1 and sigma_T.

    No two are the same: where a chain is too coarse for that, the next time above is taken. All T steps are all times.
    """
    sigma, T = process.noise_level.numpy(), process.T
    if steps is None or steps >= T:
        return torch.arange(1, T + 1)
    wanted = levels(sigma[0], sigma[-1], max(steps, 2))[-steps:]
    nearest = np.abs(sigma[None, :] - wanted[:, None]).argmin(1)
    place = np.arange(steps)
    distinct = np.maximum.accumulate(nearest - place) + place  # each at least one above the one before
    return torch.from_numpy(np.minimum(distinct, T - steps + place) + 1)


def heun(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """The flow by Heun's rule, an Euler step to sigma = 0 at the end: Karras et al. 2022, Algorithm 1.

    y' = y + (sigma' - sigma) eps(y, sigma), then y + (sigma' - sigma) (eps(y, sigma) + eps(y', sigma')) / 2. Of the
    second order; 2 S - 1 evaluations.
    """
    for level in range(len(ladder.sigma), 0, -1):
        eps, sigma = ladder.eps(y, level), float(ladder.sigma[level - 1])
        below = float(ladder.sigma[level - 2]) if level > 1 else 0.0
        reached = y + (below - sigma) * eps
        y = reached if level == 1 else y + (below - sigma) * (eps + ladder.eps(reached, level - 1)) / 2
    return y


def dpmpp(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """DPM-Solver++(2M): Lu et al. 2022b, Algorithm 2, in y = x_t / sqrt(alpha_bar_t).

    y' = (sigma' / sigma) y + (1 - sigma' / sigma) D,  D = x_0_hat + (x_0_hat - x_0_hat before) h / (2 h before), where
    h is a step in -log sigma. The first step has no x_0_hat before it, and the last, to sigma = 0, is D = x_0_hat.
    """
    sigma, before, h_before = ladder.sigma.tolist(), None, 0.0
    for level in range(len(sigma), 1, -1):
        x_0_hat, ratio = ladder.x_0_hat(y, level), sigma[level - 2] / sigma[level - 1]
        h = -float(np.log(ratio))
        D = x_0_hat if before is None else x_0_hat + (x_0_hat - before) * (h / (2 * h_before))
        y, before, h_before = ratio * y + (1 - ratio) * D, x_0_hat, h
    return ladder.x_0_hat(y, 1)


def langevin(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """Annealed Langevin dynamics: Song & Ermon 2019, Algorithm 1, with the score -eps / sigma.

    y <- y + a_i / 2 score + sqrt(a_i) z, `repeats` times a level, where a_i = `step_size` sigma_i^2 (theirs is
    epsilon sigma_i^2 / sigma_L^2, 0.2 sigma_i^2 in their experiments). At the end x_0_hat takes the last noise away
    (Jolicoeur-Martineau et al. 2021, section 3.1).
    """
    for level in range(len(ladder.sigma), 0, -1):
        a = config.step_size * float(ladder.sigma[level - 1]) ** 2
        for _ in range(config.repeats):
            score = -ladder.eps(y, level) / float(ladder.sigma[level - 1])
            y = y + a / 2 * score + a**0.5 * _draw_normal_like(y, generator)
    return ladder.x_0_hat(y, 1)


def consistency(ladder: Ladder, config: SamplerConfig, y: NCHW, generator: torch.Generator) -> NCHW:
    """x_0 = f(y, sigma), and from each further level f(x_0 + sigma z, sigma): Song et al. 2023, Algorithm 1.

    The f of `workers.diffusion.distillation` is the identity at sigma = 0, so that their epsilon is 0.
    """
    x_0 = ladder.x_0_hat(y, len(ladder.sigma))
    for level in range(len(ladder.sigma) - 1, 0, -1):
        y = x_0 + float(ladder.sigma[level - 1]) * _draw_normal_like(y, generator)
        x_0 = ladder.x_0_hat(y, level)
    return x_0


# ---- Along real times -------------------------------------------------------------------------------------------
#
# x_t of a continuous process over the times of its own path, from noise to sigma = 0, float64.


def _predict(model: Model, x: NCHW, t: PerImage64) -> Prediction:
    """In float64, of a network in float32."""
    prediction = model(x.float(), t)
    return Prediction(prediction.x_0.double(), prediction.eps.double())


def _follow(process: Continuous, model: Model, steps: int | None, x_T: NCHW, *, corrects: bool) -> NCHW:
    """x_t along the path, by Euler's rule or Heun's; the last step, to sigma = 0, is Euler's."""
    assert steps, "a continuous process has no T times to be the steps"
    path = process.formulation.path(process.config, steps).to(x_T.device)

    def slope(x: NCHW, k: int) -> NCHW:
        t = path[k].expand(len(x))
        drift: NCHW = process.formulation.drift(process.config, t, _predict(model, x, t))
        return drift

    x = x_T.double() * float(process.noise_at(path[:1]))
    for k in range(steps):
        now, step = slope(x, k), float(path[k + 1] - path[k])
        reached = x + step * now
        x = x + step * (now + slope(reached, k + 1)) / 2 if corrects and k + 1 < steps else reached
    return x


def euler(process: Continuous, model: Model, config: SamplerConfig, x_T: NCHW, generator: torch.Generator) -> NCHW:
    """x_s = x_t + (s - t) dx_t / dt: of `flow` the velocity (Lipman et al. 2023), of `edm` eps."""
    return _follow(process, model, config.steps, x_T, corrects=False)


def path_heun(process: Continuous, model: Model, config: SamplerConfig, x_T: NCHW, generator: torch.Generator) -> NCHW:
    """The same with the mean of the slopes at t and s, but for the last step; of `edm` it is `heun`."""
    return _follow(process, model, config.steps, x_T, corrects=True)


def churn(process: Continuous, model: Model, config: SamplerConfig, x_T: NCHW, generator: torch.Generator) -> NCHW:
    """Heun's rule with noise put back before each step: Karras et al. 2022, Algorithm 2, in y = x_0 + sigma eps.

    sigma^ = (1 + gamma) sigma, y^ = y + sqrt(sigma^^2 - sigma^2) S_noise z, gamma = min(S_churn / N, sqrt(2) - 1) where
    S_tmin <= sigma <= S_tmax, and 0 elsewhere; then Heun's step from sigma^. Levels are those of `heun`.
    """
    steps = config.steps
    assert steps, "a continuous process has no T times to be the steps"
    sigmas = [0.0, *power(*process.ends, max(steps, 2))[-steps:].tolist()]
    most = min(config.churn / steps, 2**0.5 - 1)
    y = x_T.double() * process.prior_variance(sigmas[-1]) ** 0.5

    def slope(y: NCHW, sigma: float) -> NCHW:
        return flow.eps_at(process, model, y, torch.full((len(y),), sigma, dtype=torch.float64, device=y.device))

    for level in range(steps, 0, -1):
        sigma, below = sigmas[level], sigmas[level - 1]
        if most > 0 and config.churn_min <= sigma <= config.churn_max:
            raised = (1 + most) * sigma
            z = _draw_normal_like(y, generator)
            y, sigma = y + (raised**2 - sigma**2) ** 0.5 * config.churn_noise * z, raised
        eps = slope(y, sigma)
        reached = y + (below - sigma) * eps
        y = reached if level == 1 else y + (below - sigma) * (eps + slope(reached, below)) / 2
    return y


def ode(process: AnyProcess, model: Model, config: SamplerConfig, x_T: NCHW, generator: torch.Generator) -> Drawn:
    """The flow by a solver with error control (`flow.solve`) down to sigma_1, then x_0_hat."""
    low, high = process.ends
    solution = flow.solve(process, model, x_T.double() * process.prior_variance(high) ** 0.5, config.tolerance)
    sigma = torch.full((len(x_T),), low, dtype=torch.float64, device=x_T.device)
    x_0 = solution.y - spread(sigma, solution.y) * flow.eps_at(process, model, solution.y, sigma)
    return Drawn(x_0.float(), solution.evaluations.cpu() + 1)


def _draw_normal_like(x: NCHW, generator: torch.Generator) -> NCHW:
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
