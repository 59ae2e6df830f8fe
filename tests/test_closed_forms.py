"""Samplers on data whose samples are known in closed form."""

import pytest
import torch
from small_process import ANCESTRAL, DDIM, F64, denoiser_of_gaussian, every_t, make_prediction, process

from workers.config import SamplerConfig
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED
from workers.diffusion.samplers import ancestral, ddim, sample
from workers.kinds import SAMPLERS, SCHEDULES
from workers.noise import make_generator


def test_standard_normal_data_stay_standard_normal_under_fixed_large():
    """x_{t-1} = sqrt(alpha_t) x_t + sqrt(beta_t) z exactly; the last step shows its mean, of variance alpha_1."""
    p = process(30, "fixed_large")
    t, _, x_t, _ = every_t(p)
    eps_hat = (1 - p.alpha_bar).sqrt().reshape(-1, 1, 1, 1) * x_t
    mean = p.posterior_mean(p.predict_x_0(x_t, t, eps_hat, clip=False), x_t, t)
    torch.testing.assert_close(mean, p.alpha.sqrt().reshape(-1, 1, 1, 1) * x_t)

    n = 200_000
    x = (
        sample(p, denoiser_of_gaussian(p, 1.0), ANCESTRAL, (n, 1, 1, 1), make_generator("normal"), clip=False)
        .flatten()
        .numpy()
    )
    assert abs(x.mean()) < 4 / n**0.5
    assert x.var() == pytest.approx(float(p.alpha[0]), rel=4 * (2 / n) ** 0.5)
    assert (x**4).mean() == pytest.approx(3 * float(p.alpha[0]) ** 2, rel=0.03)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_point_data_keep_the_law_of_q_under_fixed_small(kind):
    """Through p_theta with x_0_hat = x_0 the law of x_{t-1} is N(sqrt(alpha_bar_{t-1}) x_0, 1 - alpha_bar_{t-1})."""
    small, large = process(40, "fixed_small", kind), process(40, "fixed_large", kind)
    t, ones = torch.arange(1, 41), torch.ones(40, 1, 1, 1, dtype=F64)
    mean = small.posterior_mean(ones, small.alpha_bar.sqrt().reshape(-1, 1, 1, 1), t)
    before = torch.cat([torch.ones(1, dtype=F64), small.alpha_bar[:-1]])
    torch.testing.assert_close(mean.flatten(), before.sqrt())
    spread = small.posterior_x_t**2 * (1 - small.alpha_bar)
    torch.testing.assert_close((spread + small.sigma_squared)[1:], 1 - before[1:])
    assert (spread + large.sigma_squared)[1] > (1 - before[1]) * 1.1


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("steps", [None, 7, 1])
@pytest.mark.parametrize("sampler", [{"kind": "ancestral"}, {"kind": "ddim"}, {"kind": "ddim", "eta": 1.0}])
def test_one_point_data_land_on_the_point(variance, steps, sampler):
    p = process(30, variance)
    point = 0.375

    def eps_theta(x, t):
        alpha_bar = p.alpha_bar[t - 1].reshape(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * point) / (1 - alpha_bar).sqrt()

    x = sample(p, from_eps(p, eps_theta), SamplerConfig(steps=steps, **sampler), (5, 1, 2, 2), make_generator("point"))
    torch.testing.assert_close(x, torch.full_like(x, point), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_the_noise_of_a_step_has_sigma_for_its_standard_deviation(kind):
    """Not sigma^2: the trap of the notes. From x_t = x_0_hat = 0 all that is left is sigma z."""
    p, n = process(40, "fixed_small"), 20_000
    zero, t = torch.zeros(n, 1, 1, 1, dtype=F64), torch.full((n,), 25)
    x = SAMPLERS[kind].load()(
        p, SamplerConfig(kind=kind, eta=1.0), zero, make_prediction(p, zero, zero, t), t, generator=make_generator(kind)
    )
    assert float(x.std()) == pytest.approx(float(p.beta_tilde[24]) ** 0.5, rel=4 / (2 * n) ** 0.5)


def test_the_last_step_shows_the_mean_without_noise():
    p = process(40, "fixed_large")
    t, x_0, x_t, _ = every_t(p)
    for kind in ("ancestral", "ddim"):
        of = make_prediction(p, x_0[:1], x_t[:1], t[:1])
        x = SAMPLERS[kind].load()(
            p, SamplerConfig(kind=kind, eta=1.0), x_t[:1], of, t[:1], generator=make_generator("last")
        )
        torch.testing.assert_close(x, x_0[:1], msg=kind)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_with_eta_1_is_ancestral_with_fixed_small(kind):
    """The same function of x_t, x_0_hat and z: one step at every t, and a whole strided chain."""
    p = process(40, "fixed_small", kind)
    t, x_0, x_t, _ = every_t(p)
    eta_1 = SamplerConfig(kind="ddim", eta=1.0)
    for k in range(p.T):
        one = slice(k, k + 1)
        of = make_prediction(p, x_0[one], x_t[one], t[one])
        a = ancestral(p, ANCESTRAL, x_t[one], of, t[one], generator=make_generator("z", k))
        torch.testing.assert_close(ddim(p, eta_1, x_t[one], of, t[one], generator=make_generator("z", k)), a)
    chains = [
        sample(p, from_eps(p, lambda x, t: x.sin()), SamplerConfig(steps=9, **c), (3, 1, 2, 2), make_generator("chain"))
        for c in ({"kind": "ancestral"}, {"kind": "ddim", "eta": 1.0})
    ]
    torch.testing.assert_close(*chains, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 10])
def test_ddim_with_eta_0_scales_gaussian_data_by_its_closed_form(steps):
    """For N(0, s^2) and E[eps | x_t], with v = alpha_bar s^2 + 1 - alpha_bar, a step t -> u is multiplication by
    (sqrt(alpha_bar_u alpha_bar_t) s^2 + sqrt((1 - alpha_bar_u)(1 - alpha_bar_t))) / v_t."""
    p, s = process(100), 0.5
    v = p.alpha_bar * s**2 + 1 - p.alpha_bar

    times = p.strided(steps).times
    alpha_bar = torch.cat([torch.ones(1, dtype=F64), p.alpha_bar[times - 1]])
    now, before = alpha_bar[1:], alpha_bar[:-1]
    factor = (((before * now).sqrt() * s**2 + ((1 - before) * (1 - now)).sqrt()) / v[times - 1]).prod()
    x_T = torch.randn((50, 1, 1, 1), generator=make_generator("ddim"))
    config = SamplerConfig(kind="ddim", steps=steps)
    x = sample(p, denoiser_of_gaussian(p, s), config, (50, 1, 1, 1), make_generator("ddim"), clip=False)
    torch.testing.assert_close(x, float(factor) * x_T, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_0_nears_the_flow_that_keeps_quantiles():
    """As steps shrink, the map of N(0, 1) to N(0, s^2) tends to multiplication by s (probability-flow ODE)."""
    s, errors = 0.5, []
    for T in (100, 1000):
        p = process(T)
        x = sample(p, denoiser_of_gaussian(p, s), DDIM, (50, 1, 1, 1), make_generator("flow"), clip=False)
        x_T = torch.randn((50, 1, 1, 1), generator=make_generator("flow"))
        errors.append(float((x - s * x_T).norm() / x.norm()))
    assert errors[1] < 0.005 and errors[1] < errors[0] / 5


def test_sampling_is_a_function_of_its_generator():
    p = process(30)
    draws = [
        sample(p, from_eps(p, lambda x, t: x.sin()), ANCESTRAL, (2, 1, 3, 3), make_generator("again", k))
        for k in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32
