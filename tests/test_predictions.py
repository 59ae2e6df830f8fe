"""Whatever a network predicts, the same x_0 and eps come out, and a learned variance beside them."""

import math
from typing import Any

import pytest
import torch

from workers.config import DiffusionConfig, ScheduleConfig
from workers.diffusion.predictions import Denoiser, find_target, interpret
from workers.diffusion.process import Prediction, Process, at
from workers.kinds import PREDICTIONS
from workers.noise import make_generator

TARGETS = {  # by formulas of their own
    "eps": lambda p, x_0, x_t, t, eps: eps,
    "x_0": lambda p, x_0, x_t, t, eps: x_0,
    "mu": lambda p, x_0, x_t, t, eps: (
        (x_t - at(p.beta / (1 - p.alpha_bar).sqrt(), t, x_t) * eps) / at(p.alpha.sqrt(), t, x_t)  # eq. (10)
    ),
    "v": lambda p, x_0, x_t, t, eps: at(p.alpha_bar.sqrt(), t, x_0) * eps - at((1 - p.alpha_bar).sqrt(), t, x_0) * x_0,
}


def process(kind: Any = "linear", variance: Any = "fixed_large") -> Process:
    return Process.of(DiffusionConfig(T=50, schedule=ScheduleConfig(kind=kind), variance=variance))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator("predictions", seed), dtype=torch.float64)


def every_t(p: Process):
    """(t, x_0, x_t, eps), one of each t."""
    t, x_0, eps = torch.arange(1, p.T + 1), normal(p.T, 2, 3, 3), normal(p.T, 2, 3, 3, seed=1)
    return t, x_0, p.q_sample(x_0, t, eps), eps


def test_every_prediction_is_tested():
    assert TARGETS.keys() == PREDICTIONS.keys()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_exact_target_gives_x_0_and_the_noise_back(name, kind):
    """A network that predicts its target exactly is an exact model, at every t; its own t is counted from 0."""
    p = process(kind)
    t, x_0, x_t, eps = every_t(p)
    target = TARGETS[name](p, x_0, x_t, t, eps)
    torch.testing.assert_close(find_target(name).of(p, x_0, x_t, t, eps), target, rtol=0, atol=1e-9)
    seen = []

    def network(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        seen.append((x, s))
        return target

    model = Denoiser(torch.nn.Module(), p, name)
    model.network.forward = network
    predicted = model(x_t, t)
    torch.testing.assert_close(predicted.eps, eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(predicted.x_0, x_0, rtol=0, atol=1e-7)
    assert predicted.variance is None
    [(x, s)] = seen
    assert torch.equal(x, x_t) and torch.equal(s, t - 1)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_an_error_of_the_target_is_an_error_of_x_0_times_its_scale(name):
    """|x_0 - x_0_hat|^2 = k_t |target - output|^2 = |eps - eps_hat|^2 / SNR_t, for any output."""
    p = process()
    t, x_0, x_t, eps = every_t(p)
    target = find_target(name)
    output = normal(*x_0.shape, seed=2)
    predicted = interpret(p, name, x_t, t, output)
    of_x_0 = (x_0 - predicted.x_0).square().flatten(1).sum(1)
    of_target = (target.of(p, x_0, x_t, t, eps) - output).square().flatten(1).sum(1)
    torch.testing.assert_close(of_x_0, target.scale(p) * of_target, rtol=1e-9, atol=0)
    torch.testing.assert_close(of_x_0, (eps - predicted.eps).square().flatten(1).sum(1) / p.snr, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["x_0", "v"])
def test_where_nothing_of_x_0_is_left_x_0_and_v_still_say_what_it_is(name):
    p = process("jsd")
    t, x_0, x_t, eps = every_t(p)
    assert p.alpha_bar[-1] == 0
    predicted = interpret(p, name, x_t, t, TARGETS[name](p, x_0, x_t, t, eps))
    torch.testing.assert_close(predicted.x_0, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(predicted.eps, eps, rtol=0, atol=1e-9)


def test_low_precision_of_the_network_ends_at_its_output():
    p = process()
    t, _, x_t, eps = every_t(p)
    predicted = interpret(p, "eps", x_t.float(), t, eps.bfloat16())
    assert predicted.eps.dtype == predicted.x_0.dtype == torch.float32


# ---- Learned variances -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_second_half_of_the_channels_is_the_variance(name, variance):
    p = process(variance=variance)
    t, x_0, x_t, eps = every_t(p)
    head = normal(*x_0.shape, seed=3)
    predicted = interpret(p, name, x_t, t, torch.cat([TARGETS[name](p, x_0, x_t, t, eps), head], dim=1))
    torch.testing.assert_close(predicted.eps, eps, rtol=0, atol=1e-9)
    assert predicted.variance is not None and torch.equal(predicted.variance, head)


@pytest.mark.parametrize("steps", [None, 10, 1])
def test_a_range_goes_from_fixed_small_to_fixed_large(steps):
    """Head -1 is beta_tilde_t (that of t = 2 at t = 1), 1 is beta_t, 0 their geometric mean: along any sub-chain."""
    p = process(variance="learned_range").strided(steps)
    t, zero = torch.arange(1, p.T + 1), torch.zeros(p.T, 1, 2, 2, dtype=torch.float64)
    small = Process(p.beta, "fixed_small", p.times).sigma_squared
    for head, expected in ((-1.0, small), (1.0, p.beta), (0.0, (small * p.beta).sqrt())):
        sigma = p.sigma(Prediction(zero, zero, zero + head), t)
        torch.testing.assert_close(sigma.square(), expected.reshape(-1, 1, 1, 1).expand_as(zero))


def test_a_learned_diagonal_starts_at_fixed_large_and_may_be_anything():
    p = process(variance="learned")
    t, zero = torch.arange(1, p.T + 1), torch.zeros(p.T, 1, 2, 2, dtype=torch.float64)
    head = normal(*zero.shape)
    torch.testing.assert_close(p.sigma(Prediction(zero, zero, head), t).square(), at(p.beta, t, zero) * head.exp())
    two = p.log_sigma_squared(Prediction(zero, zero, zero + math.log(2)), t)
    torch.testing.assert_close(two.exp(), 2 * at(p.beta, t, zero).expand_as(zero))
