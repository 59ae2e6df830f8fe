"""The mathematics of the diffusion process: closed forms and Bayes' rule."""

import math

import numpy as np
import pytest
import torch
from exact import gaussian_kl
from scipy import integrate
from scipy.stats import norm
from small_process import F64, config, every_t, normal, process

from workers.config import DiffusionConfig, LossConfig, SamplerConfig, ScheduleConfig
from workers.data.pixels import to_data, to_model
from workers.diffusion.bound import decoder_term, diffusion_terms, log_normal_interval, prior_term
from workers.diffusion.objectives import Objective, weights
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.diffusion.samplers import sample
from workers.diffusion.schedules import alpha_bars, betas, log_snrs, prior_bpd
from workers.kinds import SCHEDULES, WEIGHTINGS
from workers.noise import make_generator

# ---- Schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 100, 1000])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize(("scale", "factor"), [("absolute", lambda T: 1.0), ("per_1000", lambda T: 1000 / T)])
def test_a_range_begins_and_ends_where_it_says(kind, T, scale, factor):
    beta = betas(config(T, kind, scale))
    assert beta.dtype == np.float64 and beta.shape == (T,)
    np.testing.assert_allclose([beta[0], beta[-1]], np.array([1e-4, 0.02]) * factor(T), rtol=1e-14)


@pytest.mark.parametrize(("kind", "shape"), [("linear", lambda beta: beta), ("quadratic", np.sqrt)])
def test_a_range_is_linear_in_beta_or_in_its_root(kind, shape):
    np.testing.assert_allclose(np.diff(shape(betas(config(50, kind))), 2), 0, atol=1e-15)


def test_constant_is_beta_end_at_every_t():
    assert (betas(config(250, "constant", "per_1000")) == 0.02 * 4).all()


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_cosine_has_the_alpha_bar_of_its_formula(T):
    t = np.arange(1, T)  # beta_T is capped
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = betas(config(T, "cosine"))
    np.testing.assert_allclose(alpha_bars(beta)[t - 1], f[t] / f[0], rtol=1e-9)
    assert beta[-1] == 0.999


@pytest.mark.parametrize(("T", "gap"), [(100, 0.129), (250, 0.0168), (500, 0.00116), (1000, 7.3e-6)])
def test_a_fixed_range_leaves_a_short_chain_short_of_noise(T, gap):
    beta = betas(config(T))
    assert prior_bpd(beta, 0.25) == pytest.approx(gap, rel=0.01)
    nats = prior_term(Process.of(config(T)), torch.tensor([0.25 * 12], dtype=F64), 12)
    assert float(nats) / (12 * math.log(2)) == pytest.approx(prior_bpd(beta, 0.25), rel=1e-9)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_every_schedule_falls_in_log_snr(kind, T):
    """Strictly, but for the end of jsd at -inf; each value T of them, in (0, 1]."""
    beta = betas(config(T, kind))
    assert beta.shape == (T,) and beta.dtype == np.float64 and (beta > 0).all() and (beta <= 1).all()
    curve = log_snrs(beta)
    assert (np.diff(curve) < 0).all() and (np.isfinite(curve[:-1])).all()
    assert np.isfinite(curve[-1]) == (kind != "jsd")


def test_closed_forms_of_the_schedules():
    jsd = betas(config(5, "jsd"))
    np.testing.assert_allclose(jsd, [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1])
    np.testing.assert_allclose(alpha_bars(jsd), [0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)
    for kind, rise in (("warmup10", 100), ("warmup50", 500)):
        beta = betas(config(1000, kind))
        assert (beta[rise:] == 0.02).all() and beta[0] == 1e-4 and beta[rise - 1] == 0.02
        np.testing.assert_allclose(np.diff(beta[:rise]), (0.02 - 1e-4) / (rise - 1))
    sigmoid = betas(config(1000, "sigmoid"))
    assert sigmoid[0] == pytest.approx(1e-4 + (0.02 - 1e-4) / (1 + math.exp(6)))
    np.testing.assert_allclose(sigmoid + sigmoid[::-1], 0.02 + 1e-4)  # symmetric about its middle
    straight = ScheduleConfig(kind="log_snr", log_snr_start=7.0, log_snr_end=-6.0)
    curve = log_snrs(betas(DiffusionConfig(T=14, schedule=straight)))
    np.testing.assert_allclose(curve, np.arange(7, -7, -1), rtol=1e-9, atol=1e-9)
    given = (0.5, 0.1, 0.3)
    assert tuple(betas(DiffusionConfig(T=3, schedule=ScheduleConfig(kind="list", betas=given)))) == given


@pytest.mark.parametrize("kind", ["linear", "quadratic", "constant", "warmup10", "warmup50", "sigmoid"])
def test_a_scaled_range_keeps_its_end_as_T_falls(kind):
    """per_1000 means about the same alpha_bar_T, in its logarithm, at T = 100 as at 1000; at 1000 it is absolute."""
    assert (betas(config(1000, kind, "per_1000")) == betas(config(1000, kind))).all()
    end, short = (np.log(alpha_bars(betas(config(T, kind, "per_1000")))[-1]) for T in (1000, 100))
    assert short == pytest.approx(end, rel=0.12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_alpha_bar_of_the_dry_run_is_that_of_the_process(kind):
    beta = betas(config(60, kind))
    np.testing.assert_allclose(alpha_bars(beta), Process.of(config(60, kind)).alpha_bar.numpy(), rtol=1e-13)


# ---- The posterior ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_is_bayes_rule(kind):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_{t-1} | x_0) q(x_t | x_{t-1}), eq. (2) and (4)."""
    p = process(40, kind=kind)
    t, x_0, x_t, _ = every_t(p)
    beta = betas(config(40, kind, "per_1000"))
    for k in range(1, p.T):  # t = k + 1
        alpha_bar_before = np.prod(1 - beta[:k])
        precision = 1 / (1 - alpha_bar_before) + (1 - beta[k]) / beta[k]
        pull = np.sqrt(alpha_bar_before) * x_0[k] / (1 - alpha_bar_before) + np.sqrt(1 - beta[k]) * x_t[k] / beta[k]
        torch.testing.assert_close(p.posterior_mean(x_0, x_t, t)[k], pull / precision, rtol=1e-9, atol=1e-9)
        assert float(p.beta_tilde[k]) == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_at_t_1_is_x_0_itself():
    p = process(40)
    t, x_0, x_t, _ = every_t(p)
    torch.testing.assert_close(p.posterior_mean(x_0, x_t, t)[0], x_0[0], rtol=1e-12, atol=0)
    assert p.beta_tilde[0] == 0


@pytest.mark.parametrize("kind", sorted(SCHEDULES.keys() - {"jsd"}))  # whose last eps does not determine x_0
def test_the_posterior_mean_of_x_0_hat_is_mu_of_eps_hat(kind):
    """Eq. (11), with 1 / sqrt(alpha_t) and not alpha_bar_t in front."""
    p = process(40, kind=kind)
    t, _, x_t, eps_hat = every_t(p)
    x_0_hat = p.predict_x_0(x_t, t, eps_hat, clip=False)
    beta, alpha, alpha_bar = (a.reshape(-1, 1, 1, 1) for a in (p.beta, 1 - p.beta, torch.cumprod(1 - p.beta, 0)))
    mu = (x_t - beta / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
    torch.testing.assert_close(p.posterior_mean(x_0_hat, x_t, t), mu, rtol=1e-9, atol=1e-9)


def test_predict_x_0_inverts_q_sample_and_clips_to_pixels():
    p = process(40)
    t, x_0, x_t, eps = every_t(p)
    torch.testing.assert_close(p.predict_x_0(x_t, t, eps, clip=False), x_0, rtol=1e-9, atol=1e-9)
    wild = p.predict_x_0(x_t, t, eps + 3, clip=False)
    assert wild.abs().max() > 1
    assert torch.equal(p.predict_x_0(x_t, t, eps + 3, clip=True), wild.clamp(-1, 1))


@pytest.mark.parametrize("T", [2, 30])
def test_variances_of_the_reverse_process(T):
    """beta_t; beta_tilde_t, with beta_tilde_2 for the zero at t = 1."""
    p = process(T, "fixed_small", scale="absolute")
    large = process(T, "fixed_large", scale="absolute").sigma_squared
    assert torch.equal(large[1:], p.beta[1:]) and large[0] == p.beta_tilde[1]
    assert torch.equal(p.sigma_squared[1:], p.beta_tilde[1:])
    assert p.sigma_squared[0] == p.beta_tilde[1] > 0


@pytest.mark.parametrize("variance", FIXED)
def test_a_process_of_one_step_has_a_positive_variance(variance):
    assert process(1, variance, scale="absolute").sigma_squared.tolist() == [1e-4]


# ---- The terms of the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m1", "v1", "m2", "v2"), [(0, 1, 0, 1), (0.3, 0.5, -1.0, 2.0), (2, 3, 1.5, 0.1)])
def test_gaussian_kl_is_the_integral(m1, v1, m2, v2):
    p, q = norm(m1, v1**0.5), norm(m2, v2**0.5)
    kl, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m1 - 12 * v1**0.5, m1 + 12 * v1**0.5)
    arguments = (torch.tensor(a, dtype=F64) for a in (m1, v1, m2, v2))
    assert float(gaussian_kl(*arguments)) == pytest.approx(kl, abs=1e-9)


def test_prior_term_is_the_kl_to_the_standard_normal():
    p = process(30, scale="absolute")
    x_0 = normal(4, 12)
    last = p.alpha_bar[-1]
    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    kl = gaussian_kl(last.sqrt() * x_0, 1 - last, zero, one).sum(1)
    torch.testing.assert_close(prior_term(p, x_0.square().sum(1), 12), kl)


@pytest.mark.parametrize("variance", FIXED)
def test_diffusion_term_is_the_kl_of_posterior_and_reverse_step(variance):
    p = process(40, variance)
    t, x_0, x_t, eps = every_t(p)
    x_0_hat = p.predict_x_0(x_t, t, eps + normal(p.T, 1, 2, 3, seed=2), clip=True)
    means = (p.posterior_mean(x, x_t, t)[1:] for x in (x_0, x_0_hat))
    true, model = (v[1:].reshape(-1, 1, 1, 1) for v in (p.beta_tilde, p.sigma_squared))
    mean_true, mean_model = means
    kl = gaussian_kl(mean_true, true, mean_model, model).flatten(1).sum(1)
    error = (x_0 - x_0_hat).square().flatten(1).sum(1)
    torch.testing.assert_close(diffusion_terms(p, t[1:], error[1:], 6), kl, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 3.0])
def test_decoder_sums_to_one_over_its_levels(levels, sigma):
    values = torch.linspace(-1, 1, levels, dtype=F64)[:, None]
    means = torch.tensor([[-30, -1, -0.3, 0.0, 0.123, 1, 50]], dtype=F64)
    x_0, mean = (a.flatten()[:, None] for a in torch.broadcast_tensors(values, means))
    p = (-decoder_term(x_0, mean, sigma, levels)).exp().reshape(levels, -1)
    torch.testing.assert_close(p.sum(0), torch.ones(7, dtype=F64), rtol=1e-10, atol=0)
    pixels = torch.arange(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    x_0 = to_model(pixels, levels)
    single = (-decoder_term(x_0, torch.full_like(x_0, 0.123), sigma, levels)).exp().sum()
    assert float(single) == pytest.approx(1, abs=2e-4)  # the pixels' scale is float32: 6e-8 beside sigma = 1e-3


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_is_the_normal_over_a_level_s_bin(levels):
    """A bin reaches 1 / (levels - 1) to either side, and to infinity at both ends; dimensions add up."""
    x_0 = torch.linspace(-1, 1, levels, dtype=F64)
    mean, sigma, half = x_0.flip(0) * 0.3 + 0.01, 0.4, 1 / (levels - 1)
    upper, lower = x_0.numpy() + half, x_0.numpy() - half
    upper[-1], lower[0] = np.inf, -np.inf
    nats = -np.log(norm.cdf(upper, mean, sigma) - norm.cdf(lower, mean, sigma)).sum()
    assert float(decoder_term(x_0[None], mean[None], sigma, levels)) == pytest.approx(nats, rel=1e-9)


@pytest.mark.parametrize(
    ("lower", "upper"), [(-40, -39.9), (39, 39.01), (1000, 1001), (-2000, -1), (-0.5, 2), (0, 1e-3), (-1e-6, 1e-6)]
)
def test_log_normal_interval_holds_in_the_tails(lower, upper):
    """Against the integral of exp(-(near + s)^2 / 2 + near^2 / 2), which neither under- nor overflows."""
    near, width = (lower, upper - lower) if abs(lower) < abs(upper) else (-upper, upper - lower)
    reach = min(width, 40 / max(near, 1))
    scaled, _ = integrate.quad(lambda s: math.exp(-near * s - s * s / 2), 0, reach, epsabs=0, epsrel=1e-10)
    expected = math.log(scaled) - near**2 / 2 - 0.5 * math.log(2 * math.pi)
    low, high = torch.tensor(lower, dtype=F64), torch.tensor(upper, dtype=F64)
    assert float(log_normal_interval(low, high)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(log_normal_interval(-high, -low), log_normal_interval(low, high), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x", [-300.0, -3.0, 0.5, 9.0, 300.0])
def test_log_normal_interval_of_half_lines(x):
    here, far = torch.tensor(x, dtype=F64), torch.tensor(math.inf, dtype=F64)
    assert float(log_normal_interval(-far, here)) == pytest.approx(norm.logcdf(x), rel=1e-12)
    assert float(log_normal_interval(here, far)) == pytest.approx(norm.logsf(x), rel=1e-12)
    assert float(log_normal_interval(-far, far)) == 0


# ---- Objectives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", FIXED)
def test_vlb_weights_make_the_squared_error_of_eps_the_kl_of_the_means(variance):
    """Eq. (12) for t > 1, with an x_0_hat that is not clipped."""
    p = process(40, variance)
    t, x_0, x_t, eps = every_t(p)
    eps_hat = eps + normal(p.T, 1, 2, 3, seed=2)
    error = (x_0 - p.predict_x_0(x_t, t, eps_hat, clip=False)).square().flatten(1).sum(1)
    kl_of_means = (diffusion_terms(p, t, error, 6) - diffusion_terms(p, t, torch.zeros_like(error), 6))[1:]
    w = WEIGHTINGS["vlb"].load()(p, LossConfig(), p.snr) / p.snr
    weighted = w * (eps - eps_hat).square().flatten(1).sum(1)
    torch.testing.assert_close(weighted[1:], kl_of_means, rtol=1e-7, atol=0)
    torch.testing.assert_close(w, p.beta**2 / (2 * p.sigma_squared * (1 - p.beta) * (1 - p.alpha_bar)))


def test_loss_is_the_weighted_squared_error_of_eps_at_x_t():
    p = process(40)
    t, x_0, x_t, eps = every_t(p)
    w = weights(p, LossConfig(weighting="vlb"))
    objective = Objective(p, "eps", LossConfig(weighting="vlb"), 256)
    loss = objective(lambda x, s: x * s[:, None, None, None], x_0, t, eps)
    mse = (eps - x_t * t[:, None, None, None]).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.eps_mse, mse)
    torch.testing.assert_close(loss.weighted, w * mse)


# ---- Strided processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 3, 50, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 49, 999])
def test_a_strided_process_keeps_alpha_bar_at_the_times_it_keeps(T, steps):
    p = process(T, scale="absolute")
    q = p.strided(steps)
    assert q.T == len(q.times) == min(steps, T)
    assert q.times[-1] == T and (q.times.diff() > 0).all() and q.times[0] >= 1
    assert steps == 1 or q.times[0] == 1
    torch.testing.assert_close(q.alpha_bar, p.alpha_bar[q.times - 1], rtol=1e-11, atol=0)
    assert (q.sigma_squared > 0).all() and (q.beta < 1).all()


@pytest.mark.parametrize("steps", [None, 40, 41])
def test_all_the_steps_are_the_process_itself(steps):
    p = process(40)
    assert p.strided(steps) is p


@pytest.mark.parametrize("steps", [1, 7, None])
def test_the_network_sees_the_times_it_was_trained_with(steps):
    p, seen = process(40), []

    def eps_theta(x, t):
        seen.append(t)
        return x

    sample(p, from_eps(p, eps_theta), SamplerConfig(steps=steps), (3, 1, 1, 1), make_generator("seen"))
    kept = p.strided(steps).times.flip(0)
    assert torch.equal(torch.stack(seen), kept[:, None].expand(-1, 3))


# ---- Pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_survive_the_model_s_scale(levels):
    pixels = torch.arange(levels, dtype=torch.uint8).reshape(1, levels, 1, 1).expand(2, levels, 3, 1)
    x = to_model(pixels, levels)
    assert x.shape == (2, 1, levels, 3) and x.min() == -1 and x.max() == 1
    assert torch.equal(to_data(x, levels), pixels)
    assert torch.equal(to_data(x + 0.98 / (levels - 1), levels), pixels)  # within the bin of eq. (13)
    assert torch.equal(to_data(x * 5, levels).unique(), to_data((x * 5).clamp(-1, 1), levels).unique())
