"""Gaussian pixels: the exact denoiser and bound against quadrature, laws, and what the code measures."""

import json
import math
from dataclasses import replace

import gaussian_pixels
import numpy as np
import pytest
import torch
from exact import exact_bound, exact_decoder, gaussian_kl
from gaussian_pixels import S, network, process, short, with_head
from scipy.integrate import quad
from scipy.stats import norm
from small_process import measure_all_times

from workers.data.pixels import to_model
from workers.diffusion.bound import decoder_term, diffusion_terms
from workers.diffusion.gaussian import GaussianDenoiser, make_denoiser_config
from workers.diffusion.ledger import OWN_FACTOR, Ledger, compute_bits_by_t, compute_bound, compute_chain_bound
from workers.diffusion.likelihood import compute_squared_norms, estimate
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.kinds import VARIANCES, VarianceEntry
from workers.noise import make_generator

F64 = torch.float64
IMAGES = 200  # of the held-out split, where the network is measured

one_thread = gaussian_pixels.one_thread
data = gaussian_pixels.data


def measured(p: Process, eps_theta, images: np.ndarray, clip: bool = True):
    """(Ledger, Bound) of every t of each image."""
    x_0, noise = to_model(torch.from_numpy(np.array(images)), 256), make_generator("measured")
    ledger = measure_all_times(p, from_eps(p, eps_theta), x_0, noise, levels=256, clip=clip)
    return ledger, compute_bound(p, ledger, compute_squared_norms(x_0), 64)


# ---- The denoiser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 4, 8])
@pytest.mark.parametrize("s", [0.2, 1.0, 3.0])
def test_the_denoiser_is_the_posterior_mean(t, s):
    """E[eps | x_t] by Bayes' rule, integrated over x_0."""
    p = short(8)
    alpha_bar = float(p.alpha_bar[t - 1])
    for x_t in (-1.3, 0.2, 2.0):

        def eps(x_0, x_t=x_t):
            return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)

        def joint(x_0):
            return norm.pdf(x_0, scale=s) * norm.pdf(eps(x_0))

        peak = math.sqrt(alpha_bar) * s**2 * x_t / (alpha_bar * s**2 + 1 - alpha_bar)
        ends = peak - 9 * s, peak + 9 * s
        weight = quad(joint, *ends, points=[peak], limit=200)[0]
        mean = quad(lambda x: eps(x) * joint(x), *ends, points=[peak], limit=200)[0] / weight
        found = network(p, s)(torch.full((1, 1, 1, 1), x_t, dtype=F64), torch.tensor([t]))
        assert float(found) == pytest.approx(mean, rel=1e-9)


def test_the_denoiser_stands_where_the_u_net_does():
    """Times from 0, the dtype of the images, evaluation mode, no weights, and a config that JSON keeps."""
    p = short(8)
    config = make_denoiser_config(S, 8, 1)
    denoiser = GaussianDenoiser(json.loads(json.dumps(config)), p)
    assert denoiser.config == config and not denoiser.training and denoiser.state_dict() == {}
    x = torch.ones(3, 1, 8, 8)
    eps = denoiser(x, torch.tensor([0, 3, 7]))
    assert eps.shape == x.shape and eps.dtype == x.dtype
    for row, t in enumerate((1, 4, 8)):
        v = p.alpha_bar[t - 1] * S**2 + 1 - p.alpha_bar[t - 1]
        torch.testing.assert_close(eps[row], ((1 - p.alpha_bar[t - 1]).sqrt() / v).float() * x[row])


@pytest.mark.parametrize("s", [0.0, -0.2, math.nan])
def test_a_deviation_must_be_positive(s):
    with pytest.raises(ValueError, match=r"standard_deviation.*must be above 0"):
        GaussianDenoiser(make_denoiser_config(s, 8, 1), short(8))


def test_no_multiple_of_the_denoiser_is_better(data):
    """At each t the best multiple, <eps, eps_hat> / |eps_hat|^2, is 1 within 4 standard errors; and the bound of the
    training images grows when the denoiser is scaled either way."""
    p = short(8)
    x_0 = to_model(torch.from_numpy(np.array(data.train)), 256)
    for t in range(1, p.T + 1):
        times = torch.full((len(x_0),), t)
        eps = torch.randn(x_0.shape, generator=make_generator("minimiser", t))
        eps_hat = network(p)(p.q_sample(x_0, times, eps), times)
        excess = (eps - eps_hat) * eps_hat  # of mean 0: the residual of a conditional mean is orthogonal to it
        error = float(excess.std()) / excess.numel() ** 0.5
        assert abs(float(excess.mean())) < 4 * error, t
    best = measured(p, network(p), data.train)[1].total
    for scale in (0.95, 0.99, 1.01, 1.05):
        worse = measured(p, network(p, scale=scale), data.train)[1].total - best
        assert worse.mean() > (4 * worse.std() / len(worse) ** 0.5 if abs(scale - 1) > 0.02 else 0), scale


# ---- The bound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("T", [2, 8, 200])
@pytest.mark.parametrize("s", [0.2, 0.7])
def test_the_terms_are_means_of_the_kl_over_the_noise(T, variance, s):
    """Five Gauss-Hermite nodes integrate the KL (of degree 2 in eps) and its square exactly: mean and variance of each
    L_{t-1} pixel by pixel, through mu_tilde and x_0_hat; L_T from the KL itself."""
    p = process(T, variance) if T > 20 else short(T, variance)
    nodes, masses = np.polynomial.hermite_e.hermegauss(5)
    eps, weights = torch.from_numpy(nodes), torch.from_numpy(masses / masses.sum())
    image = np.array([[[10], [128]], [[255], [90]]], np.uint8)
    exact = exact_bound(p, s, image[None], 256)
    x_0 = torch.from_numpy(image.reshape(4, 1) / 127.5 - 1).expand(4, 5).reshape(20, 1, 1, 1)
    noise = eps.repeat(4).reshape(20, 1, 1, 1)
    for t in range(2, T + 1):
        times = torch.full((20,), t)
        x_t = p.q_sample(x_0, times, noise)
        x_0_hat = p.predict_x_0(x_t, times, network(p, s)(x_t, times), clip=False)
        means = p.posterior_mean(x_0, x_t, times), p.posterior_mean(x_0_hat, x_t, times)
        kl = gaussian_kl(means[0], p.beta_tilde[t - 1], means[1], p.sigma_squared[t - 1]).reshape(4, 5)
        mean = kl @ weights
        variance_of_kl = (kl - mean[:, None]).square() @ weights
        unit = 4 * math.log(2)
        assert float(exact.mean[0, t - 1]) == pytest.approx(float(mean.sum()) / unit, rel=1e-9)
        assert float(exact.variance[0, t - 1]) == pytest.approx(float(variance_of_kl.sum()) / unit**2, rel=1e-7)
    last = p.alpha_bar[-1]
    prior = gaussian_kl(last.sqrt() * x_0[::5], 1 - last, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    assert float(exact.mean[0, T]) == pytest.approx(float(prior.sum()) / unit, rel=1e-7)
    assert float(exact.variance[0, T]) == 0


@pytest.mark.parametrize("T", [1, 8, 200, 4000])
@pytest.mark.parametrize("levels", [17, 256])
def test_the_decoder_is_an_integral_over_the_noise(T, levels):
    """L_0 of single levels by adaptive quadrature over mu, an interval of Phi at a time, for mean and square."""
    p = process(T) if T > 1 else Process.of_betas(torch.tensor([0.3]), "fixed_small")
    mean, variance = exact_decoder(p, S, levels)
    assert mean.shape == variance.shape == (levels,)
    alpha_bar, sigma = float(p.alpha_bar[0]), float(p.sigma_squared[0]) ** 0.5
    shrink = alpha_bar * S**2 / (alpha_bar * S**2 + 1 - alpha_bar)  # E[x_0 | x_1] = shrink x_1 / sqrt(alpha_bar)
    spread, half = shrink * ((1 - alpha_bar) / alpha_bar) ** 0.5, 1 / (levels - 1)
    for level in (0, 1, levels // 2, levels - 2, levels - 1):
        x_0 = 2 * level / (levels - 1) - 1
        lower = -math.inf if level == 0 else x_0 - half
        upper = math.inf if level == levels - 1 else x_0 + half

        def nats(mu, lower=lower, upper=upper):
            a, b = (lower - mu) / sigma, (upper - mu) / sigma
            a, b = (-b, -a) if a > 0 else (a, b)
            return -(norm.logcdf(b) + math.log(-math.expm1(norm.logcdf(a) - norm.logcdf(b))))

        centre = shrink * x_0
        ends = centre - 9 * spread, centre + 9 * spread
        edges = [e for e in (lower, upper, centre) if ends[0] < e < ends[1]]
        moments = [
            quad(lambda mu, k=k: nats(mu) ** k * norm.pdf(mu, centre, spread), *ends, points=edges, limit=400)[0]  # noqa: B023
            for k in (1, 2)
        ]
        assert float(mean[level]) == pytest.approx(moments[0], rel=1e-7, abs=1e-10)
        assert float(variance[level]) == pytest.approx(moments[1] - moments[0] ** 2, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("T", [8, 200, 4000])
@pytest.mark.parametrize("levels", [17, 256])
def test_the_decoder_s_quadrature_has_converged(T, levels):
    """Twice as fine, and reaching further, it changes by less than its stated error; and it is symmetric about 0."""
    p = process(T)
    for finer in ({"step": 0.01}, {"reach": 12.0}):
        for found, expected in zip(exact_decoder(p, S, levels), exact_decoder(p, S, levels, **finer), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for moment in exact_decoder(p, S, levels):
        torch.testing.assert_close(moment, moment.flip(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", FIXED)
def test_the_bound_lies_above_the_entropy(variance):
    """Averaged over N(0, s^2) in 256 levels no code is shorter than the entropy, and more steps come nearer to it:
    each level is a one-pixel image, weighed by its probability."""
    edges = (2 * np.arange(1, 256) - 1) / 255 - 1
    probability = np.diff(np.concatenate([[0], norm.cdf(edges, scale=S), [1]]))
    entropy = -(probability * np.log2(np.maximum(probability, 1e-300))).sum()
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    totals = {T: exact_bound(process(T, variance), S, levels, 256).mean.sum(1).numpy() for T in (50, 200)}
    gaps = [float(probability @ total) - entropy for total in totals.values()]
    assert gaps[0] > gaps[1] > 0


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize(("schedule", "T"), [(short, 1), (short, 2), (short, 16), (process, 50), (process, 200)])
def test_what_is_measured_is_the_exact_bound(data, schedule, T, variance):
    """The mean over images within 4 of the exact standard errors: in total, and of every L_{t-1} by itself. Their
    squares in these units add up to chi-squared with T degrees, which holds the exact variances too."""
    p, images = schedule(T, variance), data.held_out[:IMAGES]
    exact = exact_bound(p, S, images, 256)
    ledger, result = measured(p, network(p), images)
    assert abs(result.mean - float(exact.mean.sum(1).mean())) < 4 * exact.standard_error()
    np.testing.assert_allclose(result.prior, exact.mean[:, -1].numpy(), rtol=1e-5, atol=1e-12)  # float32 pixels
    later = ledger.t > 1
    nats = np.empty(len(later))
    nats[~later] = ledger.decoder_nats[:, OWN_FACTOR]
    when, squared = (torch.from_numpy(column[later]) for column in (ledger.t, ledger.squared_error))
    nats[later] = diffusion_terms(p, when, squared, 64)
    found = nats.reshape(IMAGES, T) / (64 * math.log(2))
    error = (exact.variance[:, :-1].sum(0).sqrt() / IMAGES).numpy()
    z = (found - exact.mean[:, :-1].numpy()).mean(0) / error
    assert np.abs(z).max() < 4
    assert abs((z**2).sum() - T) < 4 * (2 * T) ** 0.5
    images_z = (found - exact.mean[:, :-1].numpy()).sum(1) / exact.variance.sum(1).sqrt().numpy()
    assert abs((images_z**2).mean() - 1) < 4 * (6 / IMAGES) ** 0.5  # 2 / IMAGES if normal; small T has heavier tails


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("strata", [4, 16])
@pytest.mark.parametrize("T", [50, 200])
def test_sampled_timesteps_estimate_the_exact_bound(data, T, strata, variance):
    """Image by image against its own exact bound, so that the standard error is that of timesteps and noise alone."""
    p = process(T, variance)
    x_0 = to_model(torch.from_numpy(np.array(data.held_out)), 256)
    found = estimate(p, from_eps(p, network(p)), x_0, strata, 256, "stratified").total
    gap = found - exact_bound(p, S, data.held_out, 256).mean.sum(1).numpy()
    error = gap.std(ddof=1) / len(gap) ** 0.5
    assert abs(gap.mean()) < 4 * error
    assert error < 0.015 * found.mean()


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("T", [50, 200])
def test_clipping_x_0_hat_is_negligible(data, T, variance):
    """What the bound gains when a normal x_0_hat is clipped, level by level and t by t, integrated over the noise:
    below a ten-thousandth of its standard error over all 500 images."""
    p = process(T, variance)
    z = np.linspace(-10, 10, 1001)
    density = norm.pdf(z) * 0.02
    counts = np.bincount(np.asarray(data.held_out).reshape(-1), minlength=256)
    x_0 = (np.arange(256) / 127.5 - 1)[:, None]
    change = 0.0
    for t in range(1, T + 1):
        alpha_bar = float(p.alpha_bar[t - 1])
        shrink = alpha_bar * S**2 / (alpha_bar * S**2 + 1 - alpha_bar)
        x_0_hat = shrink * (x_0 + ((1 - alpha_bar) / alpha_bar) ** 0.5 * z)
        if t == 1:  # mu_theta is x_0_hat
            columns = (np.broadcast_to(x_0, x_0_hat.shape), x_0_hat, x_0_hat.clip(-1, 1))
            pixel, free, clipped = (torch.from_numpy(c.reshape(-1, 1).copy()) for c in columns)
            sigma = float(p.sigma_squared[0]) ** 0.5
            saved = (decoder_term(pixel, free, sigma, 256) - decoder_term(pixel, clipped, sigma, 256)).numpy()
            change += counts @ (saved.reshape(x_0_hat.shape) @ density)
        else:
            saved = ((x_0 - x_0_hat) ** 2 - (x_0 - x_0_hat.clip(-1, 1)) ** 2) @ density
            change += float(p.posterior_x_0[t - 1] ** 2 / (2 * p.sigma_squared[t - 1])) * (counts @ saved)
    change /= len(data.held_out) * 64 * math.log(2)
    error = exact_bound(p, S, data.held_out, 256).standard_error()
    assert abs(change) < 1e-4 * error


# ---- A learned variance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [-0.4, 0.3])
def test_the_bound_with_a_learned_variance_is_the_exact_one(data, head, monkeypatch):
    """The exact bound knows fixed variances: the one that the head means is made one of them."""
    p = replace(process(50), variance="learned_range")

    def between(q: Process) -> torch.Tensor:
        v = (head + 1) / 2
        return (v * q.beta.log() + (1 - v) * torch.cat([q.beta_tilde[1:2], q.beta_tilde[1:]]).log()).exp()

    monkeypatch.setitem(VARIANCES, "between", VarianceEntry(function=between, about="what the head means"))
    images = data.held_out[:100]
    n, x_0 = len(images), to_model(torch.from_numpy(np.array(images)), 256)
    ledger = measure_all_times(p, with_head(p, head), x_0, make_generator("learned"), levels=256)
    found = compute_bound(p, ledger, compute_squared_norms(x_0), 64)
    exact = exact_bound(replace(p, variance="between"), S, images, 256)
    assert abs(found.mean - float(exact.mean.sum(1).mean())) < 4 * exact.standard_error()
    by_t = compute_bits_by_t(p, ledger, compute_squared_norms(x_0), 64)
    errors = (exact.variance.sum(0).sqrt() / n).numpy()
    assert (np.abs(by_t - exact.mean.mean(0).numpy()) < 5 * errors + 1e-9).all()
    # What follows for fixed variances is as without the second head.
    own = from_eps(process(50), network(p))
    plain = measure_all_times(process(50), own, x_0, make_generator("learned"), levels=256)
    for variance in ("fixed_small", "fixed_large"):
        ours, theirs = (
            compute_chain_bound(process(50), x, compute_squared_norms(x_0), 64, variance) for x in (ledger, plain)
        )
        np.testing.assert_allclose(ours.total, theirs.total, rtol=1e-6)
    # It survives the file, and its parts join.
    kept = Ledger.from_table(ledger.make_table())
    assert kept.own_nats is not None and ledger.own_nats is not None and np.array_equal(kept.own_nats, ledger.own_nats)
    assert np.array_equal(
        compute_bound(p, kept.take_first(7), compute_squared_norms(x_0[:7]), 64).total, found.total[:7]
    )
