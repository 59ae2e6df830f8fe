"""What is minimised: weightings in the space of each prediction, the bound with a learned variance, and the hybrid."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exact import gaussian_kl
from scipy import integrate
from scipy.stats import norm

from workers.config import DiffusionConfig, LossConfig, ScheduleConfig
from workers.data.pixels import to_model
from workers.diffusion.bound import model_terms
from workers.diffusion.objectives import Objective, weights
from workers.diffusion.predictions import find_target, interpret
from workers.diffusion.process import Prediction, Process
from workers.kinds import PREDICTIONS, VARIANCES, WEIGHTINGS
from workers.noise import make_generator

F64 = torch.float64
T, LEVELS = 30, 17


def process(variance: Any = "fixed_large", T: int = T) -> Process:
    schedule = ScheduleConfig(beta_start=0.001, beta_end=0.2)
    return Process.of(DiffusionConfig(T=T, schedule=schedule, variance=variance))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator("objectives", seed), dtype=F64)


def every_t(p: Process) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(t, x_0, x_t, eps), one of each t: x_0 of LEVELS levels, float64 (T, 1, 2, 3)."""
    pixels = torch.randint(0, LEVELS, (p.T, 2, 3, 1), generator=make_generator("pixels"), dtype=torch.uint8)
    t, x_0, eps = torch.arange(1, p.T + 1), to_model(pixels, LEVELS).double(), normal(p.T, 1, 2, 3, seed=1)
    return t, x_0, p.q_sample(x_0, t, eps), eps


def always(output: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The network that gives this whatever it is asked."""
    return lambda x, t: output


# ---- Weightings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_have_a_mean_of_one(weighting, prediction):
    w = weights(process(), LossConfig(weighting=weighting), prediction)
    assert w.dtype == F64 and w.shape == (T,) and (w > 0).all()
    assert float(w.mean()) == pytest.approx(1)
    if weighting == "simple":
        assert torch.equal(w.float(), torch.ones(T))


# The weights as they are written for a network that predicts eps, x_0 or v, in the papers' own space.
PUBLISHED = {
    ("simple", "eps"): lambda p, snr: 1 + 0 * snr,
    ("vlb", "eps"): lambda p, snr: p.beta**2 / (2 * p.sigma_squared * p.alpha * (1 - p.alpha_bar)),  # Ho, eq. (12)
    ("vlb", "mu"): lambda p, snr: 1 / (2 * p.sigma_squared),  # Ho, eq. (8)
    ("vlb", "x_0"): lambda p, snr: (p.alpha_bar / p.alpha) * p.beta**2 / (1 - p.alpha_bar) ** 2 / (2 * p.sigma_squared),
    ("snr", "x_0"): lambda p, snr: snr,
    ("snr", "eps"): lambda p, snr: 1 + 0 * snr,
    ("truncated_snr", "x_0"): lambda p, snr: torch.where(snr > 1, snr, torch.ones_like(snr)),
    ("truncated_snr", "eps"): lambda p, snr: torch.where(snr > 1, torch.ones_like(snr), 1 / snr),
    ("min_snr", "x_0"): lambda p, snr: torch.where(snr > 5, torch.full_like(snr, 5), snr),
    ("min_snr", "eps"): lambda p, snr: torch.where(snr > 5, 5 / snr, torch.ones_like(snr)),
    ("min_snr", "v"): lambda p, snr: torch.where(snr > 5, torch.full_like(snr, 5), snr) / (snr + 1),
    ("p2", "eps"): lambda p, snr: 1 / (1 + snr),
    ("simple", "v"): lambda p, snr: 1 + 0 * snr,
    ("sigmoid", "eps"): lambda p, snr: torch.sigmoid(-snr.log()),  # Kingma & Gao, with a bias of 0
    ("edm", "x_0"): lambda p, snr: (1 / snr + 0.5**2) / (1 / snr * 0.5**2),  # Karras et al., table 1; sigma^2 = 1 / SNR
}


@pytest.mark.parametrize(("weighting", "prediction"), PUBLISHED)
def test_weights_are_the_published_ones_up_to_their_scale(weighting, prediction):
    p = process()
    snr = p.alpha_bar / (1 - p.alpha_bar)
    assert (snr > 5).any() and (snr < 1).any()
    published = PUBLISHED[weighting, prediction](p, snr)
    found = weights(p, LossConfig(weighting=weighting), prediction)
    torch.testing.assert_close(found, published / published.mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "simple"])
def test_a_weighting_is_one_objective_whatever_is_predicted(weighting):
    """The same x_0_hat has the same loss, up to one number for all t, by eps, x_0, mu and v."""
    p, loss = process(), LossConfig(weighting=weighting)
    t, x_0, x_t, eps = every_t(p)
    x_0_hat = x_0 + normal(*x_0.shape, seed=2)
    eps_hat = interpret(p, "x_0", x_t, t, x_0_hat).eps
    losses = []
    for prediction in PREDICTIONS:
        target = find_target(prediction)
        output = target.of(p, x_0_hat, x_t, t, eps_hat)
        found = Objective(p, prediction, loss, LEVELS)(always(output), x_0, t, eps)
        losses.append(found.weighted / found.weighted.sum())
        torch.testing.assert_close(found.eps_mse, (eps - eps_hat).square().flatten(1).mean(1), rtol=1e-6, atol=1e-9)
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("objective", ("mse", "kl", "hybrid"))
def test_the_exact_network_has_no_squared_error(objective, prediction):
    variance = "learned_range" if objective == "hybrid" else "fixed_small"
    p = process(variance)
    t, x_0, x_t, eps = every_t(p)
    exact = find_target(prediction).of(p, x_0, x_t, t, eps)
    output = torch.cat([exact, -torch.ones_like(exact)], 1) if p.learned else exact  # the head at fixed_small
    loss = Objective(p, prediction, LossConfig(objective=objective), LEVELS)(lambda x, s: output, x_0, t, eps)
    torch.testing.assert_close(loss.weighted[1:], torch.zeros(T - 1, dtype=F64), rtol=0, atol=1e-7)
    torch.testing.assert_close(loss.eps_mse, torch.zeros(T, dtype=F64), rtol=0, atol=1e-9)


# ---- The bound -------------------------------------------------------------------------------------------------


def integrated_kl(m1: float, v1: float, m2: float, v2: float) -> float:
    """KL of two normal laws by quadrature over 12 standard deviations of the first."""
    s1, s2 = math.sqrt(v1), math.sqrt(v2)

    def integrand(x: float) -> float:
        return float(norm.pdf(x, m1, s1) * (norm.logpdf(x, m1, s1) - norm.logpdf(x, m2, s2)))

    return integrate.quad(integrand, m1 - 12 * s1, m1 + 12 * s1, limit=200)[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_each_term_is_that_of_an_independent_loop(variance, prediction):
    """L_{t-1} pixel by pixel from betas alone, each KL by quadrature, and the decoder by differences of Phi."""
    p = process(variance, T=6)
    t, x_0, x_t, eps = every_t(p)
    said_of_target = find_target(prediction).of(p, x_0, x_t, t, eps) + 0.05 * normal(*x_0.shape, seed=2)
    head = 0.7 * normal(*x_0.shape, seed=3)
    output = torch.cat([said_of_target, head], 1) if p.learned else said_of_target
    predicted = interpret(p, prediction, x_t, t, output)
    found = model_terms(p, predicted, x_0, t, LEVELS)

    beta, bar = p.beta.numpy(), np.concatenate([[1.0], np.cumprod(1 - p.beta.numpy())])
    tilde = [(1 - bar[k - 1]) / (1 - bar[k]) * beta[k - 1] for k in range(1, 7)]
    tilde[0] = tilde[1]
    for k in range(1, 7):
        a, b = (
            np.sqrt(bar[k - 1]) * beta[k - 1] / (1 - bar[k]),
            np.sqrt(1 - beta[k - 1]) * (1 - bar[k - 1]) / (1 - bar[k]),
        )
        total, small, large = 0.0, tilde[k - 1], beta[k - 1] if k > 1 else tilde[1]
        pixels = (v[k - 1].flatten().tolist() for v in (x_0, x_t, predicted.x_0, head))
        for true, noisy, guess, h in zip(*pixels, strict=True):
            sigma_squared = {
                "fixed_small": small,
                "fixed_large": large,
                "learned": beta[k - 1] * math.exp(h),
                "learned_range": math.exp((h + 1) / 2 * math.log(beta[k - 1]) + (1 - h) / 2 * math.log(small)),
            }[variance]
            if k > 1:
                total += integrated_kl(a * true + b * noisy, tilde[k - 1], a * guess + b * noisy, sigma_squared)
            else:
                upper = math.inf if true > 0.99 else true + 1 / (LEVELS - 1)
                lower = -math.inf if true < -0.99 else true - 1 / (LEVELS - 1)
                s = math.sqrt(sigma_squared)
                total -= math.log(norm.cdf(upper, guess, s) - norm.cdf(lower, guess, s))
        assert float(found[k - 1]) == pytest.approx(total, rel=1e-6), k


def test_the_kl_objective_is_the_bound_in_bits():
    """Its mean over every t is L_0 + ... + L_{T-1} in bits/dim."""
    p = process("learned_range")
    t, x_0, x_t, eps = every_t(p)
    output = normal(T, 2, 2, 3, seed=2)
    loss = Objective(p, "eps", LossConfig(objective="kl"), LEVELS)(lambda x, s: output, x_0, t, eps)
    nats = model_terms(p, interpret(p, "eps", x_t, t, output), x_0, t, LEVELS)
    assert float(loss.weighted.mean()) == pytest.approx(float(nats.sum()) / (6 * math.log(2)))


def test_the_best_learned_variance_of_gaussian_errors_is_their_size():
    """The KL to a law of free variance is least at beta_tilde + (difference of the means)^2, found by its gradient."""
    p, t = process("learned"), torch.tensor([T // 2])
    x_0, x_0_hat = torch.zeros(1, 1, 1, 1, dtype=F64), torch.full((1, 1, 1, 1), 0.3, dtype=F64)
    excess = (p.posterior_x_0[t - 1] * 0.3) ** 2
    head = torch.log((p.beta_tilde[t - 1] + excess) / p.beta[t - 1]).reshape(1, 1, 1, 1).requires_grad_()
    model_terms(p, Prediction(x_0_hat, x_0_hat, head), x_0, t, LEVELS).sum().backward()
    assert head.grad is not None and abs(float(head.grad)) < 1e-12


@pytest.mark.parametrize("objective", ["kl", "hybrid"])
def test_gradients_are_finite_in_float32_whatever_the_error(objective):
    p = process("learned_range")
    t, x_0, _, eps = every_t(p)
    for size in (1e-3, 1.0, 30.0):
        output = (size * normal(T, 2, 2, 3)).float().requires_grad_()
        loss = Objective(p, "eps", LossConfig(objective=objective), LEVELS)(always(output), x_0.float(), t, eps.float())
        assert torch.isfinite(loss.weighted).all()
        if size < 30:
            loss.weighted.mean().backward()
            assert output.grad is not None and torch.isfinite(output.grad).all() and (output.grad != 0).any()


# ---- Hybrid ----------------------------------------------------------------------------------------------------


def heads_gradient(loss: LossConfig, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the target's and of the variance's channels."""
    p = process("learned_range")
    t, x_0, _, eps = every_t(p)
    output = normal(T, 2, 2, 3, seed=2).requires_grad_()
    Objective(p, prediction, loss, LEVELS)(lambda x, s: output, x_0, t, eps).weighted.mean().backward()
    return output.grad[:, :1], output.grad[:, 1:]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_hybrid_teaches_the_mean_by_the_squared_error_alone(prediction):
    """However much the bound counts, and the variance by the bound alone, in proportion to lambda."""
    mse = heads_gradient(LossConfig(objective="mse"), prediction)
    kl = heads_gradient(LossConfig(objective="kl"), prediction)
    for weight in (0.001, 10.0):
        hybrid = heads_gradient(LossConfig(objective="hybrid", vlb_weight=weight), prediction)
        assert torch.equal(hybrid[0], mse[0])
        torch.testing.assert_close(hybrid[1], weight * kl[1], rtol=1e-9, atol=0)
    assert (mse[1] == 0).all() and (kl[1] != 0).any() and not torch.equal(kl[0], mse[0])


def test_kl_of_the_record_is_that_of_its_formula():
    """model_terms by gaussian_kl of the two laws' moments, for t > 1."""
    p = process("learned")
    t, x_0, x_t, _ = every_t(p)
    predicted = interpret(p, "v", x_t, t, normal(T, 2, 2, 3, seed=5))
    mean, mean_hat = (p.posterior_mean(x, x_t, t) for x in (x_0, predicted.x_0))
    true = p.beta_tilde.reshape(-1, 1, 1, 1)
    expected = gaussian_kl(mean, true, mean_hat, p.sigma(predicted, t).square()).flatten(1).sum(1)
    torch.testing.assert_close(model_terms(p, predicted, x_0, t, LEVELS)[1:], expected[1:], rtol=1e-9, atol=0)
