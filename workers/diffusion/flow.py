"""The probability-flow ODE: a deterministic flow whose law at every time is that of the process.

It is dx = (f(x, t) - g(t)^2 grad log q_t(x) / 2) dt (Song et al. 2021, eq. 13). For y = x_t / sqrt(alpha_bar_t), which
is x_0 + sigma_t eps, it has no other term than the network,

    dy / dsigma = eps_theta(x_t, t),    x_t = y / sqrt(1 + sigma^2)

(Song et al. 2020a, eq. 14; Karras et al. 2022, eq. 4), and is solved over log sigma from sigma_T to sigma_1 or back.
A network trained at T times is asked between them too: at the real t whose log sigma_t, linear between the trained
times, is the one that is meant (`Process.time_at`). Its time embedding is smooth in t; the laws are exact as far as
eps_theta is. A continuous process (`workers.diffusion.formulations`) is trained at real t and has the same flow, with
x_t = y / divisor and ends of its own.

The solver is an embedded Runge-Kutta pair with error control for each image by itself: how an image is solved does not
depend on those beside it, but for the rounding of the network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from workers.diffusion.formulations import AnyProcess
from workers.diffusion.guidance import take_rows
from workers.diffusion.process import Model, spread
from workers.shapes import NCHW, Counts, PerImage64

NCHW64 = Float64[Tensor, "n c h w"]
Rows = Float64[Tensor, "n D"]
Probes = Shaped[Tensor, "k n c h w"]  # of -1 and 1

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0  # of the next step: the usual ones (Hairer et al. 1993, section II.4)
FIRST, LEAST = 0.05, 1e-7  # the first step, and one that says that the solver is stuck, as parts of the whole way


@dataclass(frozen=True)
class Pair:
    """An explicit Runge-Kutta pair whose last stage is the first of the next step."""

    order: int
    rows: tuple[tuple[float, ...], ...]  # of the stages after the first; the last is the solution's weights
    error: tuple[float, ...]  # the solution's weights minus those of one order less

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(sum(row) for row in self.rows)


# Bogacki & Shampine 1989: cheap steps for coarse tolerances.
BOGACKI_SHAMPINE = Pair(
    order=3,
    rows=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
# Dormand & Prince 1980, SciPy's RK45.
DORMAND_PRINCE = Pair(
    order=5,
    rows=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

Derivative = Callable[[Counts, PerImage64, Rows], Rows]  # (which images, u, y) -> dy / du
Norm = Callable[[PerImage64, Rows], PerImage64]  # (u, error) -> 1 where it is what the tolerance allows


@dataclass(frozen=True)
class Solution:
    y: Float64[Tensor, "n ..."]  # at the end
    evaluations: Counts  # of the derivative, for each image


def integrate(derivative: Derivative, norm: Norm, y: Rows, start: float, end: float, *, pair: Pair) -> Solution:
    """y from u = start to u = end, each row with steps of its own.

    Raises FloatingPointError where the derivative is not finite, or an error stays above the tolerance in the smallest
    steps.
    """
    way = end - start
    y, u = y.clone(), torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    h = torch.full_like(u, FIRST * way)
    evaluations = torch.ones(len(y), dtype=torch.int64, device=y.device)
    open_ = torch.arange(len(y), device=y.device)
    slope = derivative(open_, u, y)
    while len(open_):
        ends = h[open_].abs() >= (end - u[open_]).abs()
        step = torch.where(ends, end - u[open_], h[open_])
        stages = [slope[open_]]
        for time, row in zip(pair.times, pair.rows, strict=True):
            reached = y[open_] + step[:, None] * _add_weighted(row, stages)
            stages.append(derivative(open_, u[open_] + time * step, reached))
        error = norm(u[open_] + step, step[:, None] * _add_weighted(pair.error, stages))
        evaluations[open_] += len(pair.rows)
        if not torch.isfinite(error).all():
            raise FloatingPointError("the network is not finite along the probability-flow ODE")
        taken, done = error <= 1, open_[(error <= 1) & ends]
        y[open_[taken]], slope[open_[taken]] = reached[taken], stages[-1][taken]
        u[open_[taken]] += step[taken]
        factor = SAFETY * error.clamp(min=1e-12) ** (-1 / pair.order)
        h[open_] = step * factor.clamp(SHRINK, GROW)
        if (h[open_].abs() < LEAST * abs(way))[~taken].any():
            raise FloatingPointError("the probability-flow ODE cannot be solved to this tolerance: take a larger one")
        open_ = open_[~torch.isin(open_, done)]
    return Solution(y, evaluations)


def _add_weighted(weights: tuple[float, ...], stages: list[Rows]) -> Rows:
    total = torch.zeros_like(stages[0])
    for weight, stage in zip(weights, stages, strict=True):
        if weight:
            total = total + weight * stage
    return total


def eps_at(process: AnyProcess, model: Model, y: NCHW64, sigma: PerImage64) -> NCHW64:
    """The model's eps of y = x_0 + sigma eps, at noise levels sigma, trained or between."""
    x_t = (y / spread(process.divisor_at(sigma), y)).float()
    return model(x_t, process.time_at(sigma)).eps.double()


def _find_ends(process: AnyProcess) -> tuple[float, float]:
    """log sigma_1 and log sigma_T."""
    low, high = process.ends
    return math.log(low), math.log(high)


def solve(process: AnyProcess, model: Model, y: NCHW, tolerance: float) -> Solution:
    """y at sigma_1 from y at sigma_T, by Bogacki and Shampine's pair.

    `tolerance` is the root mean square of a step's error over the pixels of x_t = y / sqrt(1 + sigma^2), the scale on
    which all times have pixels of about 1.
    """
    shape, (low, high) = y.shape[1:], _find_ends(process)

    def derivative(images: Counts, u: PerImage64, y: Rows) -> Rows:
        sigma = u.exp()
        return sigma[:, None] * eps_at(process, take_rows(model, images), y.unflatten(1, shape), sigma).flatten(1)

    def norm(u: PerImage64, error: Rows) -> PerImage64:
        return error.square().mean(1).sqrt() / (1 + (2 * u).exp()).sqrt() / tolerance

    solution = integrate(derivative, norm, y.double().flatten(1), high, low, pair=BOGACKI_SHAMPINE)
    return Solution(solution.y.unflatten(1, shape), solution.evaluations)


@dataclass(frozen=True)
class Density:
    log_p: PerImage64  # in nats
    evaluations: Counts  # of the network; each goes with a backward pass for each probe


def integrate_log_density(process: AnyProcess, model: Model, x: NCHW, probes: Probes, tolerance: float) -> Density:
    """log p(x) of the images that the flow makes of x_T ~ N(0, I), stopped at sigma_1: Song et al. 2021, eq. 39.

    log p_1(y) = log p_T(y_T) + integral of tr(d eps_theta / dy) dsigma along the flow from sigma_1 to sigma_T, the
    trace by Hutchinson's estimate v^T (d eps_theta / dy) v, whose mean over v is exact (eq. 40); the
    probes v are the same all the way. `tolerance` is the root mean square of a step's error over the pixels of x_t, and
    that in nats a dimension of log p. By Dormand and Prince's pair.
    """
    shape, D, (low, high) = x.shape[1:], x[0].numel(), _find_ends(process)

    def derivative(images: Counts, u: PerImage64, state: Rows) -> Rows:
        sigma = u.exp()
        with torch.enable_grad():
            y = state[:, :D].unflatten(1, shape).detach().requires_grad_()
            eps = eps_at(process, take_rows(model, images), y, sigma)
            traces = []
            for k, probe in enumerate(probes):
                v = probe[images].to(eps.dtype)
                [product] = torch.autograd.grad(eps, y, v, retain_graph=k + 1 < len(probes))
                traces.append((product * v).flatten(1).sum(1))
        trace = torch.stack(traces).mean(0)
        return sigma[:, None] * torch.cat([eps.detach().flatten(1), trace[:, None]], 1)

    def norm(u: PerImage64, error: Rows) -> PerImage64:
        pixels = error[:, :D].square().mean(1).sqrt() / (1 + (2 * u).exp()).sqrt()
        return torch.maximum(pixels, error[:, D].abs() / D) / tolerance

    state = torch.cat([x.double().flatten(1), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)], 1)
    solution = integrate(derivative, norm, state, low, high, pair=DORMAND_PRINCE)
    variance = process.prior_variance(math.exp(high))
    squared_norm = solution.y[:, :D].square().sum(1) / variance
    prior = -0.5 * (squared_norm + D * math.log(2 * math.pi * variance))
    return Density(prior + solution.y[:, D], solution.evaluations)
