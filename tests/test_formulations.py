"""EDM and flow matching: closed forms for Gaussian pixels, and that all formulations are one process in log-SNR."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import exact_bound
from scipy.integrate import quad
from small_process import F64, normal

from orchestrator.experiment.load import load as load_experiment
from workers.config import DiffusionConfig, LossConfig, SamplerConfig, ScheduleConfig
from workers.diffusion.flow import integrate_log_density
from workers.diffusion.formulations import Continuous, Instants, make_process, space_by_power
from workers.diffusion.integral import compute_integral_bound, draw_real_times, estimate_integral, find_ends, measure
from workers.diffusion.laws import log_snrs_of_edm, log_snrs_of_flow
from workers.diffusion.likelihood import compute_squared_norms
from workers.diffusion.objectives import Objective, weights_at
from workers.diffusion.predictions import Denoiser, from_eps, interpret
from workers.diffusion.process import Prediction, Process
from workers.diffusion.samplers import draw, power
from workers.kinds import WEIGHTINGS
from workers.network.diffusers_config import make_scheduler_config, read_scheduler
from workers.noise import make_generator

S = 0.2
CONFIGS: dict[str, dict[str, Any]] = {
    "edm": {"formulation": "edm"},
    "edm for darker pixels": {"formulation": "edm", "sigma_data": 0.2, "p_mean": -1.8, "sigma_max": 40.0},
    "flow": {"formulation": "flow"},
    "flow, logit-normal": {"formulation": "flow", "t_law": "logit_normal", "t_mean": 0.3, "t_std": 2.0},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=CONFIGS)
def process(request) -> Continuous:
    return make(request.param)


def make(name: str) -> Continuous:
    made = make_process(DiffusionConfig(**CONFIGS[name]))
    assert isinstance(made, Continuous)
    return made


def times(p: Continuous, n: int = 9) -> torch.Tensor:
    """Between the ends, even in log SNR."""
    low, high = p.ends
    return p.time_at(torch.logspace(math.log10(low), math.log10(high), n, dtype=F64))


class Best(torch.nn.Module):
    """The network that says E[target | x_t] of pixels from N(0, s^2), by the x and the t that it is fed."""

    def __init__(self, p: Continuous, s: float = S) -> None:
        super().__init__()
        self.p, self.s = p, s

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        config = self.p.config
        if config.formulation == "edm":  # c_noise = log(sigma) / 4, c_in = 1 / sqrt(sigma^2 + sigma_data^2)
            t = (4 * told).exp()
            x = x * ((t**2 + config.sigma_data**2).sqrt()[:, None, None, None]).to(x.dtype)
        else:
            t = told / 1000
        a, b = (c[:, None, None, None] for c in (self.p.signal_at(t), self.p.noise_at(t)))
        variance = a**2 * self.s**2 + b**2
        x_0, eps = (x.double() * gain for gain in (a * self.s**2 / variance, b / variance))
        return self.p.formulation.target.of(self.p, x_0, x.double(), t, eps).to(x.dtype)


def best(p: Continuous, s: float = S) -> Denoiser:
    return Denoiser(Best(p, s), p, "")


# ---- Paths, targets and laws ------------------------------------------------------------------------------------


def test_the_exact_output_gives_back_x_0_and_eps(process):
    t = times(process)
    x_0, eps = normal(9, 1, 3, 2), normal(9, 1, 3, 2, seed=1)
    x_t = process.q_sample(x_0, t, eps)
    output = process.formulation.target.of(process, x_0, x_t, t, eps)
    found = interpret(process, "", x_t, t, output)
    torch.testing.assert_close(found.x_0, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-9)
    # x_t is y over the divisor, and a wrong output costs x_0 and eps what their scales say.
    sigma = process.noise_level_at(t)
    y = x_0 + sigma[:, None, None, None] * eps
    torch.testing.assert_close(x_t * process.divisor_at(sigma)[:, None, None, None], y, rtol=1e-12, atol=0)
    off = interpret(process, "", x_t, t, output + 1)
    scale = process.formulation.target.scale(Instants(process, t))
    torch.testing.assert_close((off.x_0 - x_0)[:, 0, 0, 0] ** 2, scale, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close((off.eps - eps)[:, 0, 0, 0] ** 2, scale / sigma**2, rtol=1e-6, atol=1e-12)


def test_edm_is_table_1_of_karras_et_al():
    p, sigma = make("edm"), torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=F64)
    x, output, data = normal(4, 1, 1, 1), normal(4, 1, 1, 1, seed=1), 0.5
    column = sigma[:, None, None, None]
    c_skip, c_out = data**2 / (column**2 + data**2), column * data / (column**2 + data**2).sqrt()
    torch.testing.assert_close(interpret(p, "", x, sigma, output).x_0, c_skip * x + c_out * output)
    fed, told = p.feed(x, sigma)
    torch.testing.assert_close(fed, x / (column**2 + data**2).sqrt())
    torch.testing.assert_close(told, sigma.log() / 4)
    # lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 counts the output evenly: simple and edm are one.
    for weighting in ("simple", "edm"):
        torch.testing.assert_close(weights_at(p, sigma, LossConfig(weighting=weighting)), torch.ones(4, dtype=F64))
    # What F should say has variance 1 where the pixels have sigma_data^2.
    x_0, eps = data * normal(4, 1, 100, 100), normal(4, 1, 100, 100, seed=1)
    target = p.formulation.target.of(p, x_0, x_0 + column * eps, sigma, eps)
    assert (target.flatten(1).var(1) - 1).abs().max() < 5 * (2 / 10_000) ** 0.5
    first, *_, last = space_by_power(0.002, 80.0, 18)[:-1].tolist()
    assert first == pytest.approx(80) and last == pytest.approx(0.002)


def test_flow_is_the_straight_path_to_noise():
    p, t = make("flow"), torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    x_0, eps = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    x_t = p.q_sample(x_0, t, eps)
    torch.testing.assert_close(x_t, (1 - t)[:, None, None, None] * x_0 + t[:, None, None, None] * eps)
    found = interpret(p, "", x_t, t, eps - x_0)  # at t = 1 as well, where there is no signal
    torch.testing.assert_close((found.x_0, found.eps), (x_0, eps))
    assert p.feed(x_t, t)[1].tolist() == [0, 250, 1000]


def test_the_t_of_a_training_have_the_density_that_is_said(process):
    shares = (torch.arange(400, dtype=F64) + 0.5) / 400
    t = process.draw_times(shares)
    log_snr = -2 * process.noise_level_at(t).log()
    law = log_snrs_of_edm if process.config.formulation == "edm" else log_snrs_of_flow
    np.testing.assert_allclose(log_snr, law(process.config, shares.tolist()), rtol=1e-9, atol=1e-9)
    density = process.formulation.density(process.config, t)
    slope = (shares[2:] - shares[:-2]) / (log_snr[:-2] - log_snr[2:])
    torch.testing.assert_close(density[1:-1][20:-20], slope[20:-20], rtol=1e-2, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_are_functions_of_log_snr(weighting):
    """What the error of x_0 counts is the same in every formulation, up to a factor; the bound's and the own aside."""
    if weighting in ("simple", "vlb"):
        pytest.skip("of the target, or of the law of the training")
    loss, found = LossConfig(weighting=weighting, gamma=3.0, sigmoid_bias=1.0), []
    chain = Process.of(DiffusionConfig(T=300, schedule=ScheduleConfig(kind="log_snr")))
    sigma = chain.noise_level
    found.append(Objective(chain, "v", loss, 256).weights / (1 - chain.alpha_bar))
    for name in CONFIGS:
        p = make(name)
        scale = p.formulation.target.scale(Instants(p, p.time_at(sigma)))
        found.append(weights_at(p, p.time_at(sigma), loss) / scale)
    for other in found[1:]:
        torch.testing.assert_close(other / other[0], found[0] / found[0][0], rtol=1e-9, atol=0)


def test_the_bound_s_weight_makes_the_loss_the_bound(process):
    """The mean over the training's t of its weight times a function is half the integral of SNR times the function."""
    low, high = process.ends
    u = (torch.arange(2_000_000, dtype=F64) + 0.5) / 2_000_000
    instants = Instants(process, process.draw_times(u))
    error = S**2 / (1 + S**2 * instants.snr)  # E|x_0 - x_0_hat|^2 of a pixel
    found = float((instants.bound_weight * error).mean())
    exact = quad(
        lambda v: 0.5 * math.exp(v) * S**2 / (1 + S**2 * math.exp(v)), *(-2 * math.log(e) for e in (high, low))
    )
    assert found == pytest.approx(exact[0], rel=2e-2)


# ---- One process ------------------------------------------------------------------------------------------------


def test_each_formulation_is_every_other_at_the_same_log_snr():
    """The best denoisers of a discrete eps and of EDM and the flow say one x_0 and one eps of one x_0 + sigma eps."""
    chain = Process.of(DiffusionConfig(T=200, schedule=ScheduleConfig(scale="per_1000")))
    t = torch.tensor([1, 20, 100, 200])
    sigma, alpha_bar = chain.noise_level[t - 1], chain.alpha_bar[t - 1][:, None, None, None]
    y = normal(4, 1, 3, 3) * (S**2 + sigma**2).sqrt()[:, None, None, None]

    def eps_theta(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (1 - alpha_bar).sqrt() / (alpha_bar * S**2 + 1 - alpha_bar) * x

    expected = from_eps(chain, eps_theta)(y * alpha_bar.sqrt(), t)
    for name in CONFIGS:
        p = make(name)
        found = best(p)(y / p.divisor_at(sigma)[:, None, None, None], p.time_at(sigma))
        torch.testing.assert_close((found.x_0, found.eps), (expected.x_0, expected.eps), rtol=1e-9, atol=1e-9)


def draw_factor(p: Continuous, sampler: SamplerConfig) -> float:
    """x_0 / x_T of a deterministic sampler, which is one number where the flow is linear."""
    x_T = torch.randn((2, 1, 2, 2), generator=make_generator("x_T"))
    drawn = draw(p, best(p), sampler, x_T, make_generator("unused"), clip=False)
    assert (drawn.evaluations == (sampler.steps or 0) * (2 if "heun" in sampler.kind else 1) - ("heun" in sampler.kind)
            ).all()  # fmt: skip
    ratio = (drawn.x_0 / x_T).double()
    assert float(ratio.max() - ratio.min()) < 1e-4 * float(ratio.mean())
    return float(ratio.mean())


@pytest.mark.parametrize("kind", ["euler", "path_heun"])
def test_steps_along_the_path_are_exact_for_gaussian_pixels(process, kind):
    """dx/dt = g(t) x: a step multiplies by 1 + h g(t), or 1 + h (g(t) + g(s) (1 + h g(t))) / 2."""
    t = process.formulation.path(process.config, 7)
    a, b = process.signal_at(t), process.noise_at(t)
    x_0, eps = a * S**2 / (a**2 * S**2 + b**2), b / (a**2 * S**2 + b**2)
    g = (eps if process.config.formulation == "edm" else eps - x_0).tolist()
    x = process.ends[1] if process.config.formulation == "edm" else 1.0
    for k in range(7):
        h = float(t[k + 1] - t[k])
        step = 1 + h * g[k]
        heun = kind == "path_heun" and k < 6
        x *= 1 + h * (g[k] + g[k + 1] * step) / 2 if heun else step
    assert draw_factor(process, SamplerConfig(kind=kind, steps=7)) == pytest.approx(x, rel=1e-5)


def test_samplers_of_many_steps_follow_the_flow(process):
    """Exactly y_0 = y_T s / sqrt(s^2 + sigma_T^2); Heun's error falls as the square of the steps."""
    for kind, steps, error in (("euler", 400, 0.05), ("path_heun", 60, 0.02), ("heun", 60, 0.01), ("dpmpp", 100, 0.02)):
        assert draw_factor(process, SamplerConfig(kind=kind, steps=steps)) == pytest.approx(S, rel=error), kind
    drawn = draw(process, best(process), SamplerConfig(kind="ode", tolerance=1e-4), torch.ones(1, 1, 2, 2),
                 make_generator("unused"), clip=False)  # fmt: skip
    torch.testing.assert_close(drawn.x_0, torch.full((1, 1, 2, 2), S), rtol=2e-3, atol=0)


def test_of_edm_heun_is_one_whatever_it_is_called():
    p = make("edm")
    kinds = [draw_factor(p, SamplerConfig(kind=kind, steps=9)) for kind in ("heun", "path_heun")]
    x_T = torch.ones(1, 1, 2, 2)
    churned = draw(p, best(p), SamplerConfig(kind="churn", steps=9), x_T, make_generator("z"), clip=False)
    assert kinds[0] == pytest.approx(kinds[1], rel=1e-6) == pytest.approx(float(churned.x_0.mean()), rel=1e-6)


def test_churn_is_exact_for_gaussian_pixels(process):
    """A step puts noise back, V + sigma^^2 - sigma^2, and multiplies by Heun's m^2; eps = sigma y / (s^2 + sigma^2)."""
    sampler = SamplerConfig(kind="churn", steps=12, churn=3.0, churn_min=0.05, churn_max=30.0, churn_noise=1.1)
    low, high = process.ends
    sigma = [*power(low, high, 12)[::-1].tolist(), 0.0]
    variance = process.prior_variance(sigma[0])
    for now, below in pairwise(sigma):
        gamma = 3.0 / 12 if 0.05 <= now <= 30.0 else 0.0
        raised = (1 + gamma) * now
        variance += 1.1**2 * (raised**2 - now**2)
        slope = raised / (S**2 + raised**2)
        step = 1 + (below - raised) * slope
        m = step if below == 0 else 1 + (below - raised) * (slope + below / (S**2 + below**2) * step) / 2
        variance *= m**2
    x_T = torch.randn((400, 1, 8, 8), generator=make_generator("x_T"))
    found = draw(process, best(process), sampler, x_T, make_generator("z"), clip=False)
    assert (found.evaluations == 23).all()
    assert float(found.x_0.double().square().mean()) == pytest.approx(variance, rel=4 * (2 / 25_600) ** 0.5)


def test_the_density_by_the_flow_is_exact(process):
    """y_1 = M y_T, y_T ~ N(0, sigma_T^2), of independent pixels."""
    x = S * torch.randn((4, 1, 3, 3), generator=make_generator("x"), dtype=F64)
    first, last = (sigma**2 for sigma in process.ends)
    variance = last * (S**2 + first) / (S**2 + last)
    exact = -0.5 * (x.flatten(1).square() / variance + math.log(2 * math.pi * variance)).sum(1)
    probes = 2 * torch.randint(0, 2, (1, 4, 1, 3, 3), generator=make_generator("v")) - 1
    found = integrate_log_density(process, best(process), x, probes, 1e-5)
    torch.testing.assert_close(found.log_p, exact, rtol=0, atol=9 * 1e-3)


# ---- The bound in continuous time ---------------------------------------------------------------------------------


def exact_diffusion(ends: tuple[float, float], squared_norm: np.ndarray, D: int) -> np.ndarray:
    """1/2 integral of E|eps - eps_hat|^2 over log SNR: eps - eps_hat = (s^2 eps - sigma x_0) / (s^2 + sigma^2)."""
    spans = [-2 * math.log(sigma) for sigma in reversed(ends)]

    def term(power: int, v: float) -> float:
        sigma_squared = math.exp(-v)
        return 0.5 * (S**4 if power else sigma_squared) / (S**2 + sigma_squared) ** 2

    of_noise, of_norm = (quad(lambda v, k=k: term(k, v), *spans, limit=200)[0] for k in (1, 0))
    return np.asarray(D * of_noise + squared_norm * of_norm)


def images(n: int) -> torch.Tensor:
    pixels = S * torch.randn((n, 1, 4, 4), generator=make_generator("images"))
    return (((pixels + 1) / 2 * 255).round().clamp(0, 255) / 255 * 2 - 1).float()


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_the_continuous_bound_is_exact_by_either_proposal(process, proposal):
    assert find_ends(process, None) == find_ends(process, 2**16) == process.ends
    assert find_ends(process, 17) == (pytest.approx(0.3 / 8), process.ends[1])  # no further than the levels
    x_0, D, n = images(60), 16, 60
    strata = 40 if proposal == "log_uniform" else 400  # of EDM, uniform in sigma, few fall where the integrand is
    drawn = draw_real_times(process, find_ends(process, 256), (n, strata), make_generator("t", proposal), proposal)
    assert drawn[0].shape == drawn[1].shape == (n, strata + 1) and (drawn[0][:, 0] == drawn[0][0, 0]).all()
    ledger = measure(process, best(process), x_0, np.arange(n), drawn=drawn, noise=make_generator("eps"), levels=256)
    norms = compute_squared_norms(x_0)
    found = compute_integral_bound(process, ledger, norms, D)
    unit = D * math.log(2)
    difference = found.diffusion - exact_diffusion(find_ends(process, 256), norms, D) / unit
    assert abs(difference.mean()) < 4.5 * difference.std(ddof=1) / n**0.5
    last = process.ends[1]
    np.testing.assert_allclose(found.prior, norms / (2 * last**2) / unit, rtol=1e-9)
    one, every = (ledger.take_first(k).nats[:1] for k in (1, 60))
    assert np.array_equal(one, every) and found.decoder.min() > 0


def test_the_continuous_bound_is_the_limit_of_the_discrete_one():
    """The sum of L_{t-1} over T steps, even in log SNR between the same ends, falls to the integral as 1 / T."""
    low, high = 0.01, 90.0
    ends: dict[str, Any] = {"log_snr_start": -2 * math.log(low), "log_snr_end": -2 * math.log(high)}
    pixels = ((images(5) + 1) / 2 * 255).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    norms = compute_squared_norms(images(5))
    limit = exact_diffusion((low, high), norms, 16) / (16 * math.log(2))
    gaps = []
    for T in (500, 1000, 2000):
        p = Process.of(DiffusionConfig(T=T, variance="fixed_small", schedule=ScheduleConfig(kind="log_snr", **ends)))
        gaps.append(float((exact_bound(p, S, pixels, 256).mean[:, 1:-1].sum(1).numpy() - limit).mean()))
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_the_bound_of_levels_is_above_their_entropy_by_what_the_decoder_costs(name):
    """Pixels of 17 levels and E[x_0 | x_t]: 1/2 of the integral is I(x_0; y_1), so the bound is H(x_0) - H(x_0 | y_1)
    and what the decoder says, which knows the level but for about 0.1 nats."""
    process, levels = make(name), torch.linspace(-1, 1, 17, dtype=F64)

    def model(x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        a, sigma = (c[:, None, None, None, None] for c in (process.signal_at(t), process.noise_level_at(t)))
        y = x_t.double()[..., None] / a
        x_0 = (torch.softmax(-((y - levels) ** 2) / (2 * sigma**2), dim=-1) * levels).sum(-1)
        return Prediction(x_0.to(x_t.dtype), ((y[..., 0] - x_0) / sigma[..., 0]).to(x_t.dtype))

    x_0 = levels[torch.randint(0, 17, (400, 1, 4, 4), generator=make_generator("levels"))].float()
    bound = estimate_integral(process, model, x_0, 64, 17, "levels")
    error = 3 * (bound.standard_error or 1)
    assert error < 0.1 and -error < bound.mean - math.log2(17) < 0.2 + error


def test_formulations_with_the_same_ends_have_the_same_bound():
    """And more strata a smaller error, as many images."""
    low, high = make("flow").ends
    edm = make_process(DiffusionConfig(formulation="edm", sigma_min=low, sigma_max=high))
    assert isinstance(edm, Continuous)
    x_0 = images(100)
    found = [estimate_integral(p, best(p), x_0, 16, 256, "bound") for p in (edm, make("flow"))]
    error = math.hypot(*((b.standard_error or 0) for b in found))
    assert abs(found[0].mean - found[1].mean) < 3 * error < 1


# ---- One of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """The process of tests/own/trig_flow.py, from an experiment file that names it."""
    text = (
        f"name: e\ndata: {{source: digits}}\ntraining: {{steps: 3}}\ncode: [{Path(__file__).parent / 'own'}]\n"
        "diffusion: {formulation: 'trig_flow:TRIG', last: 150.0}\n"
        "evaluation: {nll: {timesteps: 9}, fid: {sampler: {kind: euler, steps: 5}}}\n"
        "search: {metric: eval/continuous_nll_bpd}\n"
    )
    (tmp_path / "e.yaml").write_text(text)
    return make_process(load_experiment(tmp_path / "e.yaml").trial.diffusion)


def test_a_formulation_of_ones_own_plugs_in(own):
    assert isinstance(own, Continuous) and own.ends == (1 / 150, 150)
    t = times(own)
    x_0, eps = normal(9, 1, 2, 2), normal(9, 1, 2, 2, seed=1)
    x_t = own.q_sample(x_0, t, eps)
    found = interpret(own, "", x_t, t, own.formulation.target.of(own, x_0, x_t, t, eps))
    torch.testing.assert_close((found.x_0, found.eps), (x_0, eps), rtol=0, atol=1e-9)

    def model(x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        a, b = (c[:, None, None, None] for c in (own.signal_at(t), own.noise_at(t)))
        x_0, eps = (x_t.double() * gain / (a**2 * S**2 + b**2) for gain in (a * S**2, b))
        return Prediction(x_0.float(), eps.float())

    x_T = torch.ones(1, 1, 2, 2)
    for kind, steps in (("euler", 300), ("path_heun", 60), ("heun", 60), ("dpmpp", 60), ("churn", 60)):
        drawn = draw(own, model, SamplerConfig(kind=kind, steps=steps), x_T, make_generator("z"), clip=False)
        assert float(drawn.x_0.mean()) == pytest.approx(S, rel=0.03), kind
    x_0 = images(60)
    bound = estimate_integral(own, model, x_0, 32, 256, "own")
    norms = compute_squared_norms(x_0)
    difference = bound.diffusion - exact_diffusion(own.ends, norms, 16) / (16 * math.log(2))
    assert abs(difference.mean()) < 4.5 * difference.std(ddof=1) / 60**0.5
    # Its weightings are those of the others, and a checkpoint names it with the digest of its code.
    weights = weights_at(own, own.draw_times(torch.rand(1000, dtype=F64)), LossConfig(weighting="min_snr"))
    assert float(weights.mean()) == pytest.approx(1, abs=0.2)
    config = make_scheduler_config(own)
    assert config["_class_name"].startswith("trig_flow:TRIG@") and config["settings"]["last"] == 150
    assert read_scheduler(config).process.ends == own.ends
