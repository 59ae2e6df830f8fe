"""Samplers: on Gaussian pixels, whose flow and laws are known exactly, and against diffusers' schedulers."""

import itertools
import math
from typing import Any

import pytest
import torch

from workers.config import DiffusionConfig, SamplerConfig, ScheduleConfig
from workers.diffusion.predictions import from_eps, interpret
from workers.diffusion.process import Process
from workers.diffusion.samplers import Ladder, draw, find_nearest_times, geometric, langevin, power
from workers.entries import load
from workers.kinds import SAMPLERS
from workers.noise import make_generator
from workers.passes import count_evaluations

F64 = torch.float64
S = 0.2  # the pixels' standard deviation
DISCRETE = [kind for kind, entry in SAMPLERS.items() if entry.suits(continuous=False)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def process(T: int, kind: Any = "linear") -> Process:
    return Process.of(DiffusionConfig(T=T, schedule=ScheduleConfig(kind=kind, scale="per_1000")))


def best(p: Process, s: float = S):
    """E[eps | x_t] for N(0, s^2), at whole times and between them."""

    def eps_theta(x, t):
        alpha_bar = p.alpha_bar_at(t)
        gain = (1 - alpha_bar).sqrt() / (alpha_bar * s**2 + 1 - alpha_bar)
        return gain.to(x.dtype)[:, None, None, None] * x

    return from_eps(p, eps_theta)


def noise(n: int, *where: int | str) -> torch.Tensor:
    return torch.randn((n, 1, 4, 4), generator=make_generator("x_T", *where))


def exact_map(p: Process, kind: str) -> float:
    """x_0 / x_T of the flow to sigma_1, where y has the standard deviation sqrt(s^2 + sigma^2) by quantiles, and of
    x_0_hat = E[x_0 | x_1] there. It begins at the highest level that the kind takes."""
    start = int(find_nearest_times(p, load(SAMPLERS[kind].levels), 5)[-1]) if SAMPLERS[kind].levels else p.T
    first, last = float(p.noise_level[0]) ** 2, float(p.noise_level[start - 1]) ** 2
    return math.sqrt((1 + last) * (S**2 + first) / (S**2 + last)) * S**2 / (S**2 + first)


def error(p: Process, sampler: SamplerConfig) -> float:
    """Of the deterministic map, relative."""
    x_T = noise(8)
    x_0 = draw(p, best(p), sampler, x_T, make_generator("none"), clip=False).x_0
    exact = exact_map(p, sampler.kind) * x_T.double()
    return float((x_0.double() - exact).norm() / exact.norm())


# ---- Kinds -----------------------------------------------------------------------------------------------------


def test_every_kind_is_there_once():
    assert {entry.form for entry in SAMPLERS.values()} == {"step", "levels", "path", "whole"}
    assert all(bool(entry.levels) == (entry.form == "levels") for entry in SAMPLERS.values())
    assert all(set(names) < set(SamplerConfig.model_fields) for names in SAMPLERS.reads.values())


@pytest.mark.parametrize("steps", [None, 7, 1, 30])
@pytest.mark.parametrize("kind", [k for k in DISCRETE if k != "ode"])
def test_evaluations_are_counted_as_they_are_made(kind, steps):
    p, calls = process(30), []

    def watched(x, t):
        assert not t.is_floating_point() and len(set(t.tolist())) == 1
        calls.append(len(x))
        return best(p)(x, t)

    sampler = SamplerConfig(kind=kind, steps=steps)
    drawn = draw(p, watched, sampler, noise(3), make_generator("z"), clip=True)
    assert drawn.x_0.shape == (3, 1, 4, 4) and drawn.x_0.dtype == torch.float32
    assert calls == [3] * count_evaluations(sampler, p.T) and drawn.evaluations.tolist() == [len(calls)] * 3


def test_the_numbers_of_evaluations_are_those_of_the_papers():
    assert count_evaluations(SamplerConfig(kind="heun", steps=18), 1000) == 35
    assert count_evaluations(SamplerConfig(kind="ddim"), 1000) == count_evaluations(SamplerConfig(), 1000) == 1000
    assert count_evaluations(SamplerConfig(kind="langevin", steps=10, repeats=100), 1000) == 1001
    assert count_evaluations(SamplerConfig(kind="ode"), 1000) is None


@pytest.mark.parametrize("kind", DISCRETE)
def test_a_sample_is_a_function_of_its_seed(kind):
    p = process(50)
    a, b, c = (
        draw(p, best(p), SamplerConfig(kind=kind), noise(2), make_generator("z", k), clip=True).x_0 for k in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert torch.equal(a, c) == (kind in ("ddim", "heun", "dpmpp", "ode"))  # those that add no noise


@pytest.mark.parametrize("kind", DISCRETE)
def test_one_point_data_land_on_the_point(kind):
    """With eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t) all deterministic ones are exact at any step;
    the others, but for the reverse SDE's step to t = 0, end by x_0_hat."""
    p, point = process(200), 0.375

    def eps_theta(x, t):
        alpha_bar = p.alpha_bar_at(t).to(x.dtype)[:, None, None, None]
        return (x - alpha_bar.sqrt() * point) / (1 - alpha_bar).sqrt()

    x = draw(p, from_eps(p, eps_theta), SamplerConfig(kind=kind), noise(2), make_generator("point"), clip=True).x_0
    torch.testing.assert_close(x, torch.full_like(x, point), rtol=0, atol=0.02 if kind == "euler_maruyama" else 1e-3)


# ---- Times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [power, geometric])
@pytest.mark.parametrize("steps", [1, 2, 5, 18, 49, 50, None, 60])
@pytest.mark.parametrize("T", [30, 50, 1000])
def test_levels_move_to_distinct_trained_times(T, steps, levels, kind):
    p = process(T, kind)
    t = find_nearest_times(p, levels, steps)
    assert len(t) == min(steps or T, T) and (t.diff() > 0).all() and t[0] >= 1 and t[-1] <= T
    assert len(t) == 1 or t[0] == 1
    most = min(float(p.noise_level[-1]), 80.0 if levels is power else math.exp(5.1))
    assert T < 1000 or len(t) == T or float(p.noise_level[t[-1] - 1]) == pytest.approx(most, rel=0.2)


def test_levels_go_to_the_nearest_time_where_there_is_room():
    """Karras et al. 2022, eq. (5), from 80 down to sigma_1 = 0.01."""
    p = process(1000)
    low, high = float(p.noise_level[0]) ** (1 / 7), 80 ** (1 / 7)
    rho = (low + torch.arange(18) / 17 * (high - low)) ** 7
    torch.testing.assert_close(
        find_nearest_times(p, power, 18), (p.noise_level[None] - rho[:, None]).abs().argmin(1) + 1
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_noise_levels_between_the_times(kind):
    """alpha_bar_at is alpha_bar at whole times, falls between them, and time_at turns it back."""
    p = process(30, kind)
    whole = torch.arange(1, 31)
    assert torch.equal(p.alpha_bar_at(whole), p.alpha_bar)
    torch.testing.assert_close(p.alpha_bar_at(whole.double()), p.alpha_bar, rtol=1e-12, atol=0)
    t = torch.linspace(1, 30, 400, dtype=F64)
    alpha_bar = p.alpha_bar_at(t)
    assert (alpha_bar.diff() < 0).all()
    torch.testing.assert_close(p.time_at((1 / alpha_bar - 1).sqrt()), t, rtol=1e-9, atol=1e-9)
    middle = p.alpha_bar_at(torch.tensor([7.5], dtype=F64))
    torch.testing.assert_close(1 / middle - 1, (p.noise_level[6] * p.noise_level[7])[None])
    assert float(process(1).alpha_bar_at(torch.ones(1, dtype=F64))) == pytest.approx(float(process(1).alpha_bar))


# ---- Order of convergence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps", "factor"), [("ddim", 200, 2), ("heun", 40, 4), ("dpmpp", 20, 4)], ids=lambda x: str(x)
)
def test_the_error_of_the_map_falls_by_its_order(kind, steps, factor):
    """Every deterministic sampler tends to the exact map of x_T; twice the steps divide the error by 2^order."""
    p = process(4000)
    errors = [error(p, SamplerConfig(kind=kind, steps=n)) for n in (steps, 2 * steps, 4 * steps)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([factor, factor], rel=0.1), errors
    assert errors[-1] < 0.02


def test_the_adaptive_solver_reaches_its_tolerance():
    """A hundredth of the tolerance costs 100^(1/3) = 4.6 times the steps, of a pair of the third order."""
    p, errors, costs = process(1000), [], []
    for tolerance in (1e-3, 1e-5):
        drawn = draw(
            p, best(p), SamplerConfig(kind="ode", tolerance=tolerance), noise(4), make_generator("n"), clip=False
        )
        errors.append(error(p, SamplerConfig(kind="ode", tolerance=tolerance)))
        costs.append(float(drawn.evaluations.double().mean()))
        assert errors[-1] * S < 10 * tolerance  # some ten steps add up
    assert errors[1] < errors[0] / 50 and costs[1] / costs[0] == pytest.approx(4.6, rel=0.2)


def test_an_image_is_solved_alike_in_any_company():
    p = process(200)
    sampler, x_T = SamplerConfig(kind="ode"), noise(5) * torch.tensor([0.1, 1, 1, 1, 30]).reshape(-1, 1, 1, 1)
    together = draw(p, best(p), sampler, x_T, make_generator("n"), clip=False)
    for k in range(5):
        alone = draw(p, best(p), sampler, x_T[k : k + 1], make_generator("n"), clip=False)
        assert torch.equal(alone.x_0, together.x_0[k : k + 1])
        assert torch.equal(alone.evaluations, together.evaluations[k : k + 1])
    assert len(set(together.evaluations.tolist())) > 1


# ---- Laws ------------------------------------------------------------------------------------------------------


def variance(x: torch.Tensor) -> float:
    return float(x.double().square().mean())


def test_the_reverse_sde_by_all_steps_has_the_law_of_the_ancestral_chain():
    """Both are discretisations of one SDE; a pixel's variance differs by O(1 / T)."""
    p = process(1000)
    found = variance(
        draw(p, best(p), SamplerConfig(kind="euler_maruyama"), noise(2000), make_generator("z"), clip=False).x_0
    )
    assert found == pytest.approx(S**2, rel=0.03)


@pytest.mark.parametrize("step_size", [0.2, 1.0])
def test_langevin_is_stationary_at_its_own_variance(step_size):
    """For N(0, v) an update is y <- (1 - a / 2v) y + sqrt(a) z, whose stationary variance is v / (1 - a / 4v)."""
    p = process(50)
    level = 25
    ladder = Ladder.of(p.kept(torch.tensor([level])), best(p), False)
    sigma = float(p.noise_level[level - 1])
    v = S**2 + sigma**2
    y = noise(6000).double() * v**0.5
    config = SamplerConfig(kind="langevin", step_size=step_size, repeats=60)
    x_0 = langevin(ladder, config, y, make_generator("langevin"))
    a, shrink = step_size * sigma**2, S**2 / v  # x_0_hat = E[x_0 | y] = shrink y
    assert variance(x_0) / shrink**2 == pytest.approx(v / (1 - a / (4 * v)), rel=4 * (2 / x_0.numel()) ** 0.5)


def test_annealing_follows_the_recursion_of_the_variance():
    p = process(40)
    config = SamplerConfig(kind="langevin", steps=12, repeats=3)
    x_0 = draw(p, best(p), config, noise(6000), make_generator("z"), clip=False).x_0
    sigma = p.noise_level[find_nearest_times(p, geometric, 12) - 1].flip(0).tolist()
    expected = 1 + sigma[0] ** 2
    for s in sigma:
        a, v = config.step_size * s**2, S**2 + s**2
        for _ in range(config.repeats):
            expected = (1 - a / (2 * v)) ** 2 * expected + a
    expected *= (S**2 / v) ** 2
    assert variance(x_0) == pytest.approx(expected, rel=4 * (2 / x_0.numel()) ** 0.5)


# ---- diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [4, 12])
def test_dpmpp_is_that_of_diffusers(steps, clip):
    """DPMSolverMultistepScheduler, order 2, at the times that are taken here, with a network that is no closed form."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    p = process(100)
    scheduler = schedulers.DPMSolverMultistepScheduler(
        100, trained_betas=p.beta.tolist(), algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
        thresholding=clip, dynamic_thresholding_ratio=1.0, sample_max_value=1.0, lower_order_final=False,
    )  # fmt: skip
    times = find_nearest_times(p, geometric, steps)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = times.flip(0) - 1
    scheduler.sigmas = torch.cat([p.noise_level[times - 1].flip(0), torch.zeros(1, dtype=F64)])

    def eps_theta(x, t):
        return (x + t[:, None, None, None] / 100).sin()

    x = x_T = noise(3)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_theta(x, (t + 1).expand(3)), t, x).prev_sample
    ours = draw(
        p, from_eps(p, eps_theta), SamplerConfig(kind="dpmpp", steps=steps), x_T, make_generator("n"), clip=clip
    ).x_0
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_heun_is_that_of_diffusers():
    schedulers = pytest.importorskip("diffusers.schedulers")
    p = process(100)
    times = find_nearest_times(p, power, 9)
    sigma = p.noise_level[times - 1].flip(0)
    scheduler = schedulers.HeunDiscreteScheduler(100, trained_betas=p.beta.tolist())
    scheduler.set_timesteps(9)
    scheduler.sigmas = torch.cat([sigma[:1], sigma[1:].repeat_interleave(2), torch.zeros(1, dtype=F64)])
    t = times.flip(0) - 1
    scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])

    def eps_theta(x, t):
        return (x + t[:, None, None, None] / 100).sin()

    x_T = noise(3)
    y = x_T * (1 + sigma[0] ** 2).sqrt()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(y, t)
        y = scheduler.step(eps_theta(scaled.float(), (t + 1).expand(3)), t, y).prev_sample
    ours = draw(p, from_eps(p, eps_theta), SamplerConfig(kind="heun", steps=9), x_T, make_generator("n"), clip=True).x_0
    torch.testing.assert_close(ours, y.float(), rtol=1e-3, atol=1e-3)
    assert len(scheduler.timesteps) == count_evaluations(SamplerConfig(kind="heun", steps=9), 100)


# ---- Times between ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_a_network_of_any_prediction_is_understood_between_its_times(prediction):
    """What it says at a real t becomes x_0 and eps by the noise level of that t."""
    p = process(50)
    x, t = noise(4).double(), torch.tensor([1.25, 4.5, 21, 49.9], dtype=F64)
    best_ = best(p)(x, t)
    alpha_bar = p.alpha_bar_at(t)[:, None, None, None]
    output = {
        "eps": best_.eps,
        "x_0": best_.x_0,
        "v": alpha_bar.sqrt() * best_.eps - (1 - alpha_bar).sqrt() * best_.x_0,
    }
    found = interpret(p, prediction, x, t, output[prediction])
    torch.testing.assert_close(found.eps, best_.eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.x_0, best_.x_0, rtol=0, atol=1e-9)
