"""The probability-flow ODE: its solver against closed forms, and its density against the exact one."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm as normal

from workers.config import DiffusionConfig, ScheduleConfig
from workers.diffusion.flow import BOGACKI_SHAMPINE, DORMAND_PRINCE, integrate, integrate_log_density, solve
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import Process
from workers.noise import make_generator

F64 = torch.float64
S = 0.2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def process(T: int = 200) -> Process:
    return Process.of(DiffusionConfig(T=T, schedule=ScheduleConfig(scale="per_1000")))


def correlated(p: Process, A: torch.Tensor):
    """E[eps | x_t] for x_0 ~ N(0, A A^T): sqrt(1 - alpha_bar) (alpha_bar A A^T + (1 - alpha_bar) I)^-1 x_t."""
    covariance = A @ A.T

    def eps_theta(x, t):
        alpha_bar = p.alpha_bar_at(t)[:, None, None]
        v = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(len(A), dtype=F64)
        eps = (1 - alpha_bar).sqrt() * torch.linalg.solve(v, x.double().flatten(1)[:, :, None])
        return eps.reshape(x.shape).to(x.dtype)

    return from_eps(p, eps_theta)


def probes(K: int, x: torch.Tensor, *where: int | str) -> torch.Tensor:
    return 2 * torch.randint(0, 2, (K, *x.shape), generator=make_generator(*where)) - 1


# ---- The solver ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [BOGACKI_SHAMPINE, DORMAND_PRINCE], ids=["3(2)", "5(4)"])
def test_a_step_is_exact_for_polynomials_of_its_order_and_its_error_one_below(pair):
    """dy/du = u^k: a rule of order p integrates k < p exactly; its companion of order p - 1 all but k = p - 1."""
    nodes = np.array([0, *pair.times])
    weights, error = np.array([*pair.rows[-1], 0]), np.array(pair.error)
    for k in range(pair.order):
        assert weights @ nodes**k == pytest.approx(1 / (k + 1), abs=1e-14)
        assert (abs(error @ nodes**k) < 1e-14) == (k < pair.order - 1)
    assert all(sum(row) <= 1 + 1e-15 for row in pair.rows) and pair.times[-1] == pytest.approx(1)


@pytest.mark.parametrize("pair", [BOGACKI_SHAMPINE, DORMAND_PRINCE], ids=["3(2)", "5(4)"])
@pytest.mark.parametrize("way", [(0.0, 3.0), (3.0, 0.0)])
def test_an_oscillation_is_followed_to_the_tolerance(pair, way):
    """y'' = -w^2 y with a frequency of its own for each row: each takes the steps that it needs."""
    w = torch.tensor([1.0, 3.0, 9.0], dtype=F64)

    def derivative(rows, u, y):
        return torch.stack([y[:, 1], -(w[rows] ** 2) * y[:, 0]], 1)

    def exact(u):
        return torch.stack([(w * u).sin() / w, (w * u).cos()], 1)

    def norm(tolerance, u, error):
        return error.square().mean(1).sqrt() / tolerance

    for tolerance in (1e-4, 1e-8):
        found = integrate(derivative, partial(norm, tolerance), exact(way[0]), way[0], way[1], pair=pair)
        assert (found.y - exact(way[1])).abs().max() < 200 * tolerance
        assert (found.evaluations.diff() > 0).all()


def test_a_network_that_is_not_finite_is_an_error():
    p = process(20)
    with pytest.raises(FloatingPointError, match="not finite"):
        solve(p, from_eps(p, lambda x, t: x / 0), torch.ones(2, 1, 2, 2), 1e-3)


def test_a_jump_that_no_step_can_pass_is_an_error():
    def derivative(rows, u, y):
        return 1e12 * torch.where(u > 0.5, 1.0, -1.0).to(F64)[:, None] * torch.ones_like(y)

    with pytest.raises(FloatingPointError, match="larger"):
        integrate(
            derivative, lambda u, e: e.abs().mean(1) / 1e-6, torch.zeros(1, 1, dtype=F64), 0, 1, pair=DORMAND_PRINCE
        )


# ---- The density -----------------------------------------------------------------------------------------------


def exact_log_p(p: Process, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The flow is linear: y_1 = M y_T in the eigenbasis of A A^T, y_T ~ N(0, (1 + sigma_T^2) I)."""
    values, vectors = torch.linalg.eigh(A @ A.T)
    first, last = p.noise_level[0] ** 2, p.noise_level[-1] ** 2
    variance = (1 + last) * (values + first) / (values + last)
    z = x.double().flatten(1) @ vectors
    return -0.5 * (z.square() / variance + torch.log(2 * math.pi * variance)).sum(1)


def mixing(D: int) -> torch.Tensor:
    return 0.2 * torch.eye(D, dtype=F64) + 0.1 * torch.randn((D, D), generator=make_generator("A"), dtype=F64)


@pytest.mark.parametrize("T", [50, 1000])
def test_the_density_of_independent_pixels_is_exact(T):
    """The Jacobian is a multiple of I, of which a single probe of +-1 has the trace exactly."""
    p, A = process(T), S * torch.eye(16, dtype=F64)
    x = S * torch.randn((6, 1, 4, 4), generator=make_generator("x"), dtype=F64)
    for tolerance in (1e-4, 1e-6):
        found = integrate_log_density(p, correlated(p, A), x, probes(1, x, "v"), tolerance)
        assert (found.log_p - exact_log_p(p, x, A)).abs().max() < 16 * 10 * tolerance
    assert (found.evaluations > 50).all()


def test_the_density_of_correlated_pixels_is_exact_with_all_probes():
    """With all 2^4 probes of D = 4 Hutchinson's estimate is the trace itself."""
    p, A = process(), mixing(4)
    x = torch.randn((5, 4), generator=make_generator("x"), dtype=F64).reshape(5, 1, 2, 2) * 0.2
    signs = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 4)[:, None].expand(16, 5, 4).reshape(16, 5, 1, 2, 2)
    found = integrate_log_density(p, correlated(p, A), x, signs, 1e-6)
    torch.testing.assert_close(found.log_p, exact_log_p(p, x, A), rtol=0, atol=1e-3)


def test_hutchinson_s_estimate_is_unbiased():
    p, A = process(50), mixing(4)
    x = (torch.randn((1, 4), generator=make_generator("x"), dtype=F64) * 0.2).reshape(1, 1, 2, 2).expand(400, 1, 2, 2)
    found = integrate_log_density(p, correlated(p, A), x, probes(1, x, "v"), 1e-4).log_p - exact_log_p(p, x, A)
    assert found.std() > 0.1 and abs(found.mean()) < 4 * found.std() / 400**0.5


def test_an_image_s_density_does_not_depend_on_those_beside_it():
    p, A = process(50), mixing(4)
    x = (torch.randn((5, 4), generator=make_generator("x"), dtype=F64) * torch.arange(1, 6)[:, None]).reshape(
        5, 1, 2, 2
    )
    v = probes(2, x, "v")
    together = integrate_log_density(p, correlated(p, A), x, v, 1e-4)
    for k in range(5):
        alone = integrate_log_density(p, correlated(p, A), x[k : k + 1], v[:, k : k + 1], 1e-4)
        torch.testing.assert_close(alone.log_p, together.log_p[k : k + 1], rtol=0, atol=1e-9)
        assert torch.equal(alone.evaluations, together.evaluations[k : k + 1])


def test_dequantised_bits_bound_those_of_the_levels():
    """-E log p(x + u) - log(bin) >= -log P(level) for a pixel, Jensen's inequality, and are near for fine levels."""
    sd = 0.3
    for levels, most in ((3, 3.0), (17, 0.1), (256, 1e-3)):
        bin_ = 2 / (levels - 1)
        for x in (-1.0, 0.0):
            mass = normal.cdf((x + bin_ / 2) / sd) - normal.cdf((x - bin_ / 2) / sd)
            mean = quad(lambda u, x=x: -normal.logpdf(x + u, scale=sd), -bin_ / 2, bin_ / 2)[0] / bin_
            gap = mean - math.log(bin_) + math.log(mass)
            assert 0 < gap < most
