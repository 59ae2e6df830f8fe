"""The ledger: every bound that follows from it, against slow loops, closed forms and searches."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import norm
from small_process import measure_all_times

from workers.config import DiffusionConfig, ScheduleConfig
from workers.data.pixels import to_model
from workers.diffusion.bound import diffusion_terms
from workers.diffusion.ledger import (
    DECODER_FACTORS,
    OPTIMAL,
    OWN_FACTOR,
    ROWS,
    Ledger,
    compute_bits_by_t,
    compute_bound,
    compute_chain_bound,
    compute_rate_distortion,
    list_shorter_chains,
)
from workers.diffusion.likelihood import compute_squared_norms
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.noise import make_generator

T, N, D, LEVELS = 9, 5, 4, 5
BETA = np.linspace(0.02, 0.5, T)


def process(variance: Any = "fixed_small") -> Process:
    return Process.of(DiffusionConfig(T=T, schedule=ScheduleConfig(beta_start=0.02, beta_end=0.5), variance=variance))


def eps_theta(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network by no means optimal: it mixes neighbouring pixels and depends on t."""
    return 0.8 * (x_t + 0.3 * x_t.roll(1, dims=3)).tanh() + 0.02 * t.reshape(-1, 1, 1, 1)


def images() -> torch.Tensor:
    """float64 (N, 1, 2, 2) of LEVELS levels."""
    pixels = torch.randint(0, LEVELS, (N, 2, 2, 1), generator=make_generator("pixels"), dtype=torch.uint8)
    return to_model(pixels, LEVELS).double()


def measured(p: Process, network=eps_theta) -> Ledger:
    return measure_all_times(p, from_eps(p, network), images(), make_generator("measured"), levels=LEVELS)


NORMS = compute_squared_norms(images())


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return measured(process())


def same(a: Ledger, b: Ledger) -> bool:
    """Bit for bit, and of the same types."""
    names = [f.name for f in fields(Ledger) if getattr(a, f.name) is not None or getattr(b, f.name) is not None]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def rows(ledger: Ledger, keep: np.ndarray) -> Ledger:
    """Some of the pairs, in the order of `keep`."""
    place = np.cumsum(ledger.t == 1) - 1  # of a row at t = 1 among those
    nats = ledger.decoder_nats[[place[k] for k in keep if ledger.t[k] == 1]]
    return Ledger(**{name: getattr(ledger, name)[keep] for name in ROWS}, decoder_nats=nats)


# ---- Other variances, shorter chains ---------------------------------------------------------------------------


@pytest.mark.parametrize("own", FIXED)
@pytest.mark.parametrize("variance", FIXED)
def test_along_all_times_a_fixed_variance_s_chain_is_its_process(own, variance, ledger):
    """Whichever variance the ledger was measured under, which is no part of it."""
    expected = compute_bound(process(variance), measured(process(variance)), NORMS, D)
    for steps in (None, T, T + 1):
        found = compute_chain_bound(process(own), ledger, NORMS, D, variance, steps=steps)
        np.testing.assert_allclose(found.total, expected.total, rtol=1e-13)
    assert same(ledger, measured(process(variance)))


def slow_bound(times: list[int], variance: str) -> np.ndarray:
    """float64 (N, 3), L_T, sum of L_{t-1} and L_0 in bits/dim of the chain over `times`: pixel by pixel, by its own
    betas, posterior and KL, from the noise that the ledger was measured with."""
    eps = (
        torch.randn((N * T, 1, 2, 2), generator=make_generator("measured")).numpy().astype(np.float64).reshape(N, T, D)
    )
    whole = np.cumprod(1 - BETA)
    alpha_bar = [1.0, *(whole[t - 1] for t in times)]
    expected = np.zeros((N, 3))
    for n, x_0 in enumerate(images().reshape(N, D).numpy()):
        for s, t in enumerate(times, start=1):
            now, before = alpha_bar[s], alpha_bar[s - 1]
            beta = 1 - now / before
            x_t = np.sqrt(now) * x_0 + np.sqrt(1 - now) * eps[n, t - 1]
            eps_hat = eps_theta(torch.from_numpy(x_t).reshape(1, 1, 2, 2), torch.tensor([t])).reshape(D).numpy()
            x_0_hat = np.clip((x_t - np.sqrt(1 - now) * eps_hat) / np.sqrt(now), -1, 1)
            for i in range(D):
                if s == 1:
                    upper = np.inf if x_0[i] == 1 else x_0[i] + 0.25
                    lower = -np.inf if x_0[i] == -1 else x_0[i] - 0.25
                    sigma = np.sqrt((1 - whole[0]) / (1 - whole[1]) * BETA[1])  # beta_tilde_2 of all the times
                    expected[n, 2] -= np.log(norm.cdf(upper, x_0_hat[i], sigma) - norm.cdf(lower, x_0_hat[i], sigma))
                    continue
                a, b = np.sqrt(before) * beta / (1 - now), np.sqrt(1 - beta) * (1 - before) / (1 - now)
                m1, m2, s1 = a * x_0[i] + b * x_t[i], a * x_0_hat[i] + b * x_t[i], (1 - before) / (1 - now) * beta
                s2 = beta if variance == "fixed_large" else s1
                expected[n, 1] += 0.5 * np.log(s2 / s1) + (s1 + (m1 - m2) ** 2) / (2 * s2) - 0.5
        m, s = np.sqrt(whole[-1]) * x_0, 1 - whole[-1]
        expected[n, 0] = (-0.5 * np.log(s) + (s + m**2) / 2 - 0.5).sum()
    return expected / (D * np.log(2))


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("times", [[1, 9], [1, 5, 9], [1, 3, 5, 7, 9], list(range(1, 10))])
def test_a_chain_s_bound_is_what_a_slow_loop_finds(times, variance, ledger):
    found = compute_chain_bound(process(), ledger, NORMS, D, variance, steps=len(times))
    parts = np.stack([found.prior, found.diffusion, found.decoder], axis=1)
    np.testing.assert_allclose(parts, slow_bound(times, variance), rtol=1e-9)


@pytest.mark.parametrize("steps", [2, 4, T])
def test_the_optimal_variance_is_the_best_of_any(steps, ledger):
    """At every t no other sigma_t^2, from a ten-thousandth to ten thousand times as large, has a smaller mean term."""
    chain = process().strided(steps)
    error = torch.from_numpy(ledger.list_errors()[:, chain.times.numpy() - 1])
    t = torch.arange(2, chain.T + 1).expand(N, -1)
    best = chain.beta_tilde + chain.posterior_x_0**2 * error.mean(0) / D

    def terms(sigma_squared: torch.Tensor) -> torch.Tensor:
        return diffusion_terms(chain, t, error[:, 1:], D, sigma_squared).mean(0)

    found = compute_chain_bound(process(), ledger, NORMS, D, OPTIMAL, steps=steps)
    assert found.diffusion.mean() == pytest.approx(float(terms(best).sum()) / (D * math.log(2)), rel=1e-12)
    for factor in np.logspace(-4, 4, 81):
        assert (terms(best) <= terms(best * factor) + 1e-12).all()
    for variance in FIXED:
        fixed = compute_chain_bound(process(), ledger, NORMS, D, variance, steps=steps)
        assert found.diffusion.mean() < fixed.diffusion.mean() and found.mean < fixed.mean
        assert (found.prior == fixed.prior).all()


def test_the_optimal_decoder_has_the_best_of_the_factors(ledger):
    found = compute_chain_bound(process(), ledger, NORMS, D, OPTIMAL).decoder
    by_factor = ledger.decoder_nats / (D * math.log(2))
    assert found.mean() == by_factor.mean(0).min() < by_factor[:, OWN_FACTOR].mean()
    assert 0 < ledger.decoder_nats.mean(0).argmin() < len(DECODER_FACTORS) - 1  # and not the last that was tried


def test_a_factor_is_a_process_of_that_variance(ledger):
    """The decoder's term at every factor, by differences of Phi; the process's own factor is 1."""
    assert DECODER_FACTORS[OWN_FACTOR] == 1 and (np.diff(DECODER_FACTORS) > 0).all()
    p, x_0 = process(), images()
    eps = torch.randn((N * T, 1, 2, 2), generator=make_generator("measured")).double()[::T]
    one = torch.ones(N, dtype=torch.int64)
    x_1 = p.q_sample(x_0, one, eps)
    mean = p.predict_x_0(x_1, one, eps_theta(x_1, one), clip=True).numpy()
    upper, lower = np.where(x_0 == 1, np.inf, x_0 + 0.25), np.where(x_0 == -1, -np.inf, x_0 - 0.25)
    for k in range(OWN_FACTOR, len(DECODER_FACTORS)):
        sigma = float(p.sigma_squared[0] * DECODER_FACTORS[k]) ** 0.5
        nats = -np.log(norm.cdf(upper, mean, sigma) - norm.cdf(lower, mean, sigma)).reshape(N, -1).sum(1)
        np.testing.assert_allclose(ledger.decoder_nats[:, k], nats, rtol=1e-6)


@pytest.mark.parametrize(
    ("times", "chains"),
    [(1, [1]), (2, [2]), (4, [4, 2]), (50, [50, 25, 10, 5, 2]), (1000, [1000, 500, 200, 100, 50, 20])],
)
def test_shorter_chains_halve_and_so_on_and_keep_both_ends(times, chains):
    assert list_shorter_chains(times) == chains


# ---- Rate and distortion ---------------------------------------------------------------------------------------


def test_the_rate_grows_to_the_bound_without_the_decoder(ledger):
    rate, distortion = compute_rate_distortion(process(), ledger, NORMS, D)
    terms, whole = compute_bits_by_t(process(), ledger, NORMS, D), compute_bound(process(), ledger, NORMS, D)
    assert rate.shape == distortion.shape == (T,) and terms.shape == (T + 1,)
    assert (np.diff(rate) >= 0).all() and rate[0] == pytest.approx(whole.prior.mean(), rel=1e-12)
    assert rate[-1] + terms[0] == pytest.approx(whole.mean, rel=1e-12) == terms.sum()
    np.testing.assert_allclose(distortion, 127.5 * np.sqrt(ledger.list_errors().mean(0)[::-1] / D), rtol=1e-12)


def test_a_perfect_network_has_no_distortion_and_the_rate_of_the_prior():
    x_0 = images()
    alpha_bar = process().alpha_bar

    def knows(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        now = alpha_bar[t - 1].reshape(-1, 1, 1, 1)
        return (x_t - now.sqrt() * x_0.repeat_interleave(T, dim=0)) / (1 - now).sqrt()

    perfect = measured(process(), knows)
    rate, distortion = compute_rate_distortion(process(), perfect, NORMS, D)
    assert distortion == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(rate, compute_bound(process(), perfect, NORMS, D).prior.mean(), rtol=1e-12)


def test_rate_and_distortion_of_a_chain_by_hand():
    """Two steps of beta = 1/2: alpha_bar = 1/2, 1/4; beta_tilde_2 = 1/3; x_0 weighs sqrt(1/2) 1/2 / (3/4) at t = 2.

    One image of 2 pixels with |x_0|^2 = 2, |x_0 - x_0_hat|^2 = 0.02 at t = 1 and 0.5 at t = 2, fixed_small:
    L_2 = (1/4 2 - 2 (1/4 + log 3/4)) / 2 = -log 3/4, L_1 = (2/9) 0.5 / (2/3) = 1/6 nats.
    """
    p = Process.of_betas(torch.tensor([0.5, 0.5]), "fixed_small")
    nats = np.full((1, len(DECODER_FACTORS)), 0.4)
    ledger = Ledger(np.zeros(2, np.int64), np.array([1, 2]), np.array([0.02, 0.5]), np.ones(2), nats)
    rate, distortion = compute_rate_distortion(p, ledger, np.array([2.0]), 2)
    unit = 2 * math.log(2)
    np.testing.assert_allclose(rate, [-math.log(0.75) / unit, (1 / 6 - math.log(0.75)) / unit], rtol=1e-12)
    np.testing.assert_allclose(distortion, [127.5 * 0.5, 127.5 * 0.1], rtol=1e-12)
    np.testing.assert_allclose(
        compute_bits_by_t(p, ledger, np.array([2.0]), 2), [0.4 / unit, 1 / 6 / unit, rate[0]], rtol=1e-12
    )


# ---- Ledgers and tables ----------------------------------------------------------------------------------------


def test_parts_join_to_the_same_ledger_in_any_order(ledger):
    parts = [rows(ledger, np.arange(len(ledger.t))[k::7][::-1]) for k in range(7)]
    for order in (range(7), reversed(range(7)), [3, 0, 6, 2, 5, 1, 4]):
        assert same(Ledger.join([parts[k] for k in order]), ledger)


def test_the_first_images_are_those_measured_alone(ledger):
    for n in range(1, N + 1):
        first = ledger.take_first(n)
        assert same(first, rows(ledger, np.arange(n * T))) and first.images == n and first.list_errors().shape == (n, T)
        np.testing.assert_array_equal(
            compute_bound(process(), first, NORMS[:n], D).total, compute_bound(process(), ledger, NORMS, D).total[:n]
        )


@pytest.mark.parametrize("keep", [range(N * T), [0], [1], [3, 9, 10, 11, 18, 40], range(1, 9), []])
def test_a_table_gives_the_ledger_back_bit_for_bit(keep, ledger, tmp_path):
    """Blocks with one image at t = 1, several, and none; in memory and through a Parquet file."""
    part = rows(ledger, np.array(keep, np.int64))
    part = replace(part, squared_error=part.squared_error * np.pi)
    assert same(Ledger.from_table(part.make_table()), part)
    pq.write_table(part.make_table(), tmp_path / "block.parquet")
    assert same(Ledger.from_table(pq.read_table(tmp_path / "block.parquet")), part)
