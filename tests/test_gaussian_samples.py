"""Samples of Gaussian pixels have the variance that is known exactly."""

from dataclasses import replace

import gaussian_pixels
import numpy as np
import pytest
import torch
from exact import CHAINS, sample_variances
from gaussian_pixels import S, network, process, with_head

from workers import kinds
from workers.config import SamplerConfig
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.diffusion.samplers import sample
from workers.kinds import VARIANCES, VarianceEntry
from workers.noise import make_generator

one_thread = gaussian_pixels.one_thread
SAMPLERS = [
    SamplerConfig(),
    SamplerConfig(steps=10),
    SamplerConfig(kind="ddim"),
    SamplerConfig(kind="ddim", steps=10),
    SamplerConfig(kind="ddim", steps=7, eta=0.5),
    SamplerConfig(kind="ddim", steps=25, eta=1.0),
    SamplerConfig(kind="euler_maruyama"),
    SamplerConfig(kind="euler_maruyama", steps=25),
]


def test_every_sampler_has_its_chain():
    assert set(CHAINS) == {name for name, entry in kinds.SAMPLERS.items() if entry.form == "step"}


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda c: f"{c.kind}-{c.steps}-{c.eta}")
def test_samples_have_the_exact_variance(sampler, variance):
    """At every step of the chain, as the network sees x_t, and at its end: mean squares of 32,000 normal pixels are
    within 4 of their standard errors, sqrt(2 / 32,000) of the variance."""
    p, seen = process(50, variance), []
    eps_theta = network(p)

    def watched(x, t):
        seen.append(float(x.double().square().mean()))
        return eps_theta(x, t)

    x_0 = sample(p, from_eps(p, watched), sampler, (500, 1, 8, 8), make_generator("samples"))
    expected = sample_variances(p, S, sampler).numpy()
    found = np.array([*seen, float(x_0.double().square().mean())])
    assert len(found) == (sampler.steps or p.T) + 1
    np.testing.assert_allclose(found, expected, rtol=4 * (2 / x_0.numel()) ** 0.5)
    assert abs(float(x_0.mean())) < 4 * (expected[-1] / x_0.numel()) ** 0.5


@pytest.mark.parametrize("steps", [None, 40, 7, 1])
def test_ancestral_with_the_posterior_s_variance_is_ddim_with_eta_1(steps):
    """Song et al. 2020a, section 4.1: an identity of the two recursions."""
    p = process(200, "fixed_small")
    ancestral = sample_variances(p, S, SamplerConfig(steps=steps))
    ddim = sample_variances(p, S, SamplerConfig(kind="ddim", steps=steps, eta=1.0))
    torch.testing.assert_close(ancestral, ddim, rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [None, 40, 7])
def test_standard_normal_data_stay_standard_normal(steps):
    """For s = 1 and sigma_t^2 = beta_t each step is q's own reverse: variance 1 until the last, which adds no noise
    and leaves E[x_0 | x_1] = sqrt(alpha_bar_1) x_1."""
    p = process(200)
    variances = sample_variances(p, 1.0, SamplerConfig(steps=steps))
    torch.testing.assert_close(variances[:-1], torch.ones_like(variances[:-1]), rtol=1e-12, atol=0)
    assert float(variances[-1]) == pytest.approx(float(p.strided(steps).alpha_bar[0]), rel=1e-12)


@pytest.mark.parametrize("sampler", [SamplerConfig(kind="ddim"), SamplerConfig(kind="ddim", eta=1.0), SamplerConfig()])
def test_long_chains_reach_the_data(sampler):
    """The samples' variance tends to s^2, and the gap falls as 1 / T: four times as many steps, about a quarter."""
    gaps = [S**2 - float(sample_variances(process(T), S, sampler)[-1]) for T in (1000, 4000)]
    assert 0 < abs(gaps[1]) < 0.02 * S**2
    assert abs(gaps[0] / gaps[1]) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("steps", [None, 10])
def test_samples_with_a_learned_variance_have_the_exact_one(steps, monkeypatch):
    """Along a sub-chain the head's range is that of its own betas."""
    p = replace(process(50), variance="learned_range")

    def between(q: Process) -> torch.Tensor:
        return (q.beta * torch.cat([q.beta_tilde[1:2], q.beta_tilde[1:]])).sqrt()

    monkeypatch.setitem(VARIANCES, "between", VarianceEntry(function=between, about="what the head means"))
    sampler = SamplerConfig(steps=steps)
    x_0 = sample(p, with_head(p, 0.0), sampler, (500, 1, 8, 8), make_generator("learned"))
    expected = float(sample_variances(replace(p, variance="between"), S, sampler)[-1])
    assert float(x_0.double().square().mean()) == pytest.approx(expected, rel=4 * (2 / x_0.numel()) ** 0.5)
