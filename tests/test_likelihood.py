"""The bound in bits/dim: data whose bound is known, an independent decomposition, a slow loop, and its estimates."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from small_process import measure_all_times

from workers.config import DiffusionConfig, ModelConfig, ScheduleConfig
from workers.data.pixels import to_model
from workers.diffusion import likelihood
from workers.diffusion.bound import diffusion_terms, prior_term
from workers.diffusion.ledger import Bound, Ledger, compute_bound
from workers.diffusion.likelihood import (
    PROPOSALS,
    compute_squared_norms,
    draw_stratified_times,
    estimate,
    list_all_times,
)
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator

F64 = torch.float64
LEVELS = 5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def process(T: int, variance: Any = "fixed_small", beta_end: float = 0.5) -> Process:
    return Process.of(
        DiffusionConfig(T=T, schedule=ScheduleConfig(beta_start=0.02, beta_end=beta_end), variance=variance)
    )


def eps_theta(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network by no means optimal: it mixes neighbouring pixels and depends on t."""
    return 0.8 * (x_t + 0.3 * x_t.roll(1, dims=3)).tanh() + 0.02 * t.reshape(-1, 1, 1, 1)


def digits_like(images: int, size: int = 2) -> torch.Tensor:
    """Images of LEVELS levels, float32 (images, 1, size, size) in [-1, 1]."""
    pixels = torch.randint(0, LEVELS, (images, size, size, 1), generator=make_generator("pixels"), dtype=torch.uint8)
    return to_model(pixels, LEVELS)


def measured(p: Process, network, x_0: torch.Tensor, seed: int, clip: bool = True) -> Ledger:
    """Every t of each image, by the noise of `seed`."""
    noise = make_generator("measured", seed)
    return measure_all_times(p, from_eps(p, network), x_0, noise, levels=LEVELS, clip=clip)


def full(p: Process, network, x_0: torch.Tensor, seed: int, clip: bool = True) -> Bound:
    return compute_bound(p, measured(p, network, x_0, seed, clip), compute_squared_norms(x_0), x_0[0].numel())


# ---- Data whose bound is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", FIXED)
def test_gaussian_data_have_the_errors_of_their_posterior(variance):
    """For N(0, s^2) and E[eps | x_t] the mean of |x_0 - x_0_hat|^2 is s^2 (1 - alpha_bar) / v, the variance of x_0
    given x_t, where v = alpha_bar s^2 + 1 - alpha_bar; L_{t-1} and L_T follow. Every t by itself."""
    p, s, n = process(8, variance), 0.6, 8_000
    v = p.alpha_bar * s**2 + 1 - p.alpha_bar

    def best(x, t):
        return ((1 - p.alpha_bar).sqrt() / v)[t - 1].float().reshape(-1, 1, 1, 1) * x

    x_0 = s * torch.randn((n, 1, 1, 2), generator=make_generator("gaussian"))
    ledger = measured(p, best, x_0, 0, clip=False)
    error = ledger.squared_error.reshape(n, p.T)
    expected = 2 * s**2 * ((1 - p.alpha_bar) / v).numpy()
    np.testing.assert_allclose(error.mean(0), expected, rtol=5 * n**-0.5)  # chi-squared with 2 degrees: std = mean
    t = torch.arange(2, p.T + 1)
    terms = diffusion_terms(p, t, torch.from_numpy(expected[1:]), 2)
    result = compute_bound(p, ledger, compute_squared_norms(x_0), 2)
    standard_error = result.diffusion.std() / n**0.5
    assert abs(result.diffusion.mean() - float(terms.sum()) / (2 * math.log(2))) < 5 * standard_error
    prior = 0.5 * (p.alpha_bar[-1] * s**2 - p.alpha_bar[-1] - (1 - p.alpha_bar[-1]).log()) / math.log(2)
    assert abs(result.prior.mean() - float(prior)) < 5 * result.prior.std() / n**0.5


@pytest.mark.parametrize("T", [2, 8, 40])
def test_the_bound_of_standard_normal_data_is_their_entropy(T):
    """Under fixed_large the best reverse step is q's own, so nothing is lost: L = log(2 pi e) / 2 a dimension, with
    L_0 the entropy of N(mu, beta_1) for a density in place of the decoder."""
    p = process(T, "fixed_large", 0.3)
    t = torch.arange(2, T + 1)
    later = diffusion_terms(p, t, 1 - p.alpha_bar[1:], 1).sum()
    prior = prior_term(p, torch.ones(1, dtype=F64), 1)
    last = 0.5 * math.log(2 * math.pi * math.e * float(p.beta[0]))
    assert float(prior + later) + last == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-12)


def test_a_perfect_network_pays_only_the_prior_and_the_decoder():
    """One-point data under fixed_small: the terms between vanish, and the decoder has its closed form."""
    p, x_0 = process(6), digits_like(1)

    def knows(x, t):
        alpha_bar = p.alpha_bar[t - 1].reshape(-1, 1, 1, 1)
        return (x.double() - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

    result = full(p, knows, x_0.double(), 0)
    assert result.diffusion == pytest.approx(0, abs=1e-9)
    half, sigma = 1 / (LEVELS - 1), float(p.beta_tilde[1]) ** 0.5
    edge = (x_0.abs() == 1).flatten().numpy()
    inside = np.where(edge, norm.cdf(half / sigma), 2 * norm.cdf(half / sigma) - 1)
    assert result.decoder == pytest.approx(-np.log2(inside).mean(), rel=1e-6)


# ---- Oracles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("clip", [True, False])
def test_the_bound_is_what_a_slow_loop_finds(variance, clip):
    """Pair by pair and pixel by pixel in float64, with the KL by its formula and the decoder by differences of Phi."""
    p, x_0 = process(6, variance), digits_like(3).double()
    eps = (
        torch.randn((18, 1, 2, 2), generator=make_generator("measured", 0)).numpy().astype(np.float64).reshape(3, 6, 4)
    )
    beta = np.linspace(0.02, 0.5, 6)
    alpha_bar = np.concatenate([[1], np.cumprod(1 - beta)])
    tilde = [(1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t - 1] for t in range(1, 7)]
    sigma2 = [tilde[1], *(beta if variance == "fixed_large" else tilde)[1:]]
    expected = np.zeros((3, 3))
    for n, image in enumerate(x_0.reshape(3, 4).numpy()):
        for t in range(1, 7):
            x_t = np.sqrt(alpha_bar[t]) * image + np.sqrt(1 - alpha_bar[t]) * eps[n, t - 1]
            eps_hat = eps_theta(torch.from_numpy(x_t).reshape(1, 1, 2, 2), torch.tensor([t])).reshape(4).numpy()
            hat = (x_t - np.sqrt(1 - alpha_bar[t]) * eps_hat) / np.sqrt(alpha_bar[t])
            hat = np.clip(hat, -1, 1) if clip else hat
            for i in range(4):
                a = np.sqrt(alpha_bar[t - 1]) * beta[t - 1] / (1 - alpha_bar[t])
                b = np.sqrt(1 - beta[t - 1]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
                m1, m2, s1, s2 = a * image[i] + b * x_t[i], a * hat[i] + b * x_t[i], tilde[t - 1], sigma2[t - 1]
                if t > 1:
                    expected[n, 1] += 0.5 * np.log(s2 / s1) + (s1 + (m1 - m2) ** 2) / (2 * s2) - 0.5
                else:
                    upper = np.inf if image[i] == 1 else image[i] + 0.25
                    lower = -np.inf if image[i] == -1 else image[i] - 0.25
                    expected[n, 2] -= np.log(norm.cdf(upper, m2, s2**0.5) - norm.cdf(lower, m2, s2**0.5))
        m, s = np.sqrt(alpha_bar[-1]) * image, 1 - alpha_bar[-1]
        expected[n, 0] = (-0.5 * np.log(s) + (s + m**2) / 2 - 0.5).sum()
    result = full(p, eps_theta, x_0, 0, clip)
    found = np.stack([result.prior, result.diffusion, result.decoder], axis=1)
    np.testing.assert_allclose(found, expected / (4 * np.log(2)), rtol=1e-8)
    np.testing.assert_allclose(result.total, expected.sum(1) / (4 * np.log(2)), rtol=1e-8)


def log_normal(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return (-0.5 * ((x - mean).square() / variance + (2 * math.pi * variance).log())).flatten(1).sum(1)


@pytest.mark.parametrize("variance", FIXED)
def test_both_decompositions_of_the_bound_agree(variance):
    """Posterior form (5) against the form of eq. (3) along whole trajectories x_0 -> x_1 -> ... -> x_T, where each
    x_t weighs q(x_t | x_{t-1}) against p_theta(x_t | x_{t+1}): no posterior, no alpha_bar.

    x_t is averaged jointly with x_{t+1}. The KL of q(x_t | x_{t-1}) and p_theta(x_t | x_{t+1}) over independent ends
    q(x_{t-1}, x_{t+1} | x_0), as tutorials print it, forgets that x_{t+1} comes from x_t, and is another number.
    """
    p, n = process(4, variance), 20_000
    image = torch.tensor([-1.0, 0.5], dtype=F64).reshape(1, 1, 1, 2)
    x_0 = image.expand(n, 1, 1, 2)
    posterior_form = full(p, eps_theta, x_0, 1).total

    noise = make_generator("trajectories")
    x = [x_0]
    for beta in p.beta:
        z = torch.randn(x_0.shape, generator=noise, dtype=F64)
        x.append((1 - beta).sqrt() * x[-1] + beta.sqrt() * z)

    def mu(t: int) -> torch.Tensor:
        when = torch.full((n,), t)
        x_0_hat = p.predict_x_0(x[t], when, eps_theta(x[t], when), clip=True)
        return p.posterior_mean(x_0_hat, x[t], when)

    nats = -log_normal(x[p.T], torch.zeros_like(x_0), torch.ones((), dtype=F64))
    printed = nats.clone()
    for t in range(1, p.T + 1):
        beta, mean = p.beta[t - 1], (1 - p.beta[t - 1]).sqrt() * x[t - 1]
        nats += log_normal(x[t], mean, beta)
        printed += log_normal(x[t], mean, beta)
        if t < p.T:
            nats -= log_normal(x[t], mu(t + 1), p.sigma_squared[t])
            apart = mean + beta.sqrt() * torch.randn(x_0.shape, generator=noise, dtype=F64)
            printed -= log_normal(apart, mu(t + 1), p.sigma_squared[t])
    sigma, first = float(p.sigma_squared[0]) ** 0.5, mu(1).reshape(n, 2).numpy()
    decoder = norm.logcdf(-0.75, first[:, 0], sigma)
    decoder += np.log(norm.cdf(0.75, first[:, 1], sigma) - norm.cdf(0.25, first[:, 1], sigma))
    unit = 2 * math.log(2)
    eq_3, printed_form = ((a.numpy() - decoder) / unit for a in (nats, printed))

    error = math.hypot(posterior_form.std(), eq_3.std()) / n**0.5
    assert error < 0.01 * eq_3.mean() and abs(posterior_form.mean() - eq_3.mean()) < 4 * error
    assert printed_form.mean() - eq_3.mean() > 20 * error


# ---- Estimates from some of the timesteps ----------------------------------------------------------------------


def test_all_times_are_every_t_once_for_each_image():
    t, weight = list_all_times(7, 3)
    assert (t == np.arange(1, 8)).all() and t.shape == weight.shape == (3, 7) and (weight == 1).all()


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("strata", [6, 7, 100])
def test_as_many_strata_as_times_are_every_t_once(T, strata):
    found = draw_stratified_times(T, strata, 3, make_generator("t"), "uniform")
    for array, expected in zip(found, list_all_times(T, 3), strict=True):
        assert (array == expected).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("T", [2, 3, 7, 200, 1000])
def test_a_proposal_s_probabilities_are_those_of_its_draws_and_sum_to_one(proposal, T):
    """t as a function of v is a staircase from 2 to T, whose step at t is p(t) wide."""
    v = (np.arange(100_000) + 0.5) / 100_000
    t, probability = PROPOSALS[proposal](T, v)
    assert (np.diff(t) >= 0).all() and (t[0], t[-1]) == (2, T)
    of_t = dict(zip(t.tolist(), probability.tolist(), strict=True))
    assert sorted(of_t) == list(range(2, T + 1)) and math.fsum(of_t.values()) == pytest.approx(1, abs=1e-13)
    shares = np.bincount(t, minlength=T + 1)[2:] / len(v)
    np.testing.assert_allclose(shares, [of_t[k] for k in range(2, T + 1)], atol=2 / len(v))


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("T", [7, 200])
@pytest.mark.parametrize("strata", [1, 4, 16])
@pytest.mark.parametrize("images", [1, 25])
def test_stratified_sums_are_unbiased(T, strata, images, proposal):
    """Mean over addresses of sum_j w_j f(t_j) against the sum over 2..T; no t is left out.

    For f = 1 the weights' sum is T - 1 in expectation.
    """
    addresses = 600
    draws = [
        draw_stratified_times(T, strata, images, make_generator("unbiased", k), proposal) for k in range(addresses)
    ]
    t, weight = (np.stack(columns) for columns in zip(*draws, strict=True))  # (addresses, images, strata + 1)
    assert (t[..., 0] == 1).all() and (weight[..., 0] == 1).all()
    assert t.shape[-1] == min(strata, T - 1) + 1
    assert set(np.unique(t[..., 1:])) <= set(range(2, T + 1))
    assert images == 1 or set(np.unique(t[..., 1:])) == set(range(2, T + 1))
    times = np.arange(T + 1)
    for f in (np.ones(T + 1), 1 / np.maximum(times, 1), np.random.RandomState(0).rand(T + 1) * times):
        sums = (weight * f[t])[..., 1:].sum(-1).mean(-1)
        error = sums.std(ddof=1) / len(sums) ** 0.5
        assert abs(sums.mean() - f[2:].sum()) <= 4 * error + 1e-9


def test_a_stratum_is_drawn_evenly_over_the_images():
    """Latin hypercube: with one stratum of n images, the k-th smallest t lies where its n-th part of log t says."""
    T, n = 200, 64
    t = np.sort(draw_stratified_times(T, 1, n, make_generator("latin"), "log_uniform")[0][:, 1])
    edges = np.floor(2 * np.exp(np.log((T + 1) / 2) * np.arange(n + 1) / n))
    assert (edges[:-1] <= t).all() and (t <= edges[1:]).all()


@pytest.mark.parametrize("strata", [1, 4, 16])
def test_log_uniform_has_the_smaller_error_for_terms_as_training_leaves_them(strata):
    """The terms of Gaussian data of a small spread under the best network: most of the bound lies at small t."""
    p = Process.of(DiffusionConfig(T=1000, variance="fixed_large"))
    v = p.alpha_bar * 0.3**2 + 1 - p.alpha_bar
    error = 0.3**2 * (1 - p.alpha_bar) / v
    terms = np.concatenate([[0, 0], diffusion_terms(p, torch.arange(2, 1001), error[1:], 1).numpy()])
    deviation = {}
    for proposal in PROPOSALS:
        draws = [draw_stratified_times(1000, strata, 1, make_generator("decay", k), proposal) for k in range(1000)]
        deviation[proposal] = np.std([(weight * terms[t]).sum() for t, weight in draws])
    assert deviation["log_uniform"] < deviation["uniform"] / 2


@pytest.mark.parametrize("strata", [2, 4])
def test_the_estimate_is_unbiased(strata):
    p, x_0 = process(12), digits_like(8)
    estimates = np.array(
        [estimate(p, from_eps(p, eps_theta), x_0, strata, LEVELS, "unbiased", k).mean for k in range(150)]
    )
    sums = np.array([full(p, eps_theta, x_0, k).mean for k in range(150)])
    error = math.hypot(estimates.std(ddof=1), sums.std(ddof=1)) / 150**0.5
    assert abs(estimates.mean() - sums.mean()) < 4 * error
    assert error < 0.03 * sums.mean()


def test_the_estimate_of_all_strata_is_the_full_sum():
    p, x_0 = process(6), digits_like(3)
    noise = make_generator(0, "valid", "eps")
    ledger = measure_all_times(p, from_eps(p, eps_theta), x_0, noise, levels=LEVELS)
    expected = compute_bound(p, ledger, compute_squared_norms(x_0), 4).total
    assert (estimate(p, from_eps(p, eps_theta), x_0, 5, LEVELS, 0, "valid").total == expected).all()


def test_the_standard_error_is_that_of_a_mean_over_images():
    zero, total = np.zeros(4), np.array([1.0, 2.0, 3.0, 6.0])
    result = Bound(zero, total, zero)
    assert result.mean == 3 and result.standard_error == pytest.approx((14 / 3) ** 0.5 / 2)


# ---- Independence of how the work is cut -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 10_000])
def test_the_batch_of_the_network_leaves_the_bound_as_it_is(batch, monkeypatch):
    """Up to rounding: a matrix product sums in another order in another shape. The noise is the same bit for bit."""
    model = ModelConfig(channels=8, multipliers=(1,), blocks=1, attention=(4,), dropout=0.0)
    unet = UNet(make_unet_config(model, image_channels=1, resolution=4), make_generator("unet")).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=make_generator("conv_out"))
    p, x_0 = process(6), digits_like(5, size=4)
    whole = full(p, lambda x, t: unet(x, t - 1), x_0, 0).total
    monkeypatch.setattr(likelihood, "PIXELS", {"cpu": 16 * batch})
    np.testing.assert_allclose(full(p, lambda x, t: unet(x, t - 1), x_0, 0).total, whole, rtol=1e-6)
