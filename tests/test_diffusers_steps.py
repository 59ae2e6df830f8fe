"""The steps of diffusers, as a second opinion."""

from typing import Any

import pytest
import torch
from small_process import ANCESTRAL, F64, normal, process

from workers.config import DiffusionConfig, SamplerConfig
from workers.diffusion.formulations import Continuous
from workers.diffusion.predictions import interpret
from workers.diffusion.process import FIXED, Prediction, Process
from workers.diffusion.samplers import ancestral, ddim, draw
from workers.noise import make_generator


@pytest.fixture(scope="module")
def schedulers():
    return pytest.importorskip("diffusers.schedulers")


def images(seed: int) -> torch.Tensor:
    return normal(4, 1, 5, 5, seed=seed).float()


def test_q_sample_is_add_noise(schedulers):
    p = process(100)
    t, x_0, eps = torch.tensor([1, 2, 50, 100]), images(0).clamp(-1, 1), images(1)
    scheduler = schedulers.DDPMScheduler(100, trained_betas=p.beta.tolist())
    torch.testing.assert_close(p.q_sample(x_0, t, eps), scheduler.add_noise(x_0, eps, t - 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [None, 9])
def test_ancestral_steps_are_those_of_diffusers(schedulers, variance, clip, steps):
    p = process(100, variance)
    scheduler = schedulers.DDPMScheduler(100, trained_betas=p.beta.tolist(), variance_type=variance, clip_sample=clip)
    q = p.strided(steps)
    scheduler.set_timesteps(timesteps=(q.times - 1).flip(0).tolist())
    x_t, eps = images(0), images(1)
    for step in (q.T, q.T // 2, 2, 1):
        t, time = torch.full((4,), step), int(q.times[step - 1]) - 1
        of = Prediction(q.predict_x_0(x_t, t, eps, clip), eps)
        ours = ancestral(q, ANCESTRAL, x_t, of, t, generator=make_generator("z"))
        theirs = scheduler.step(eps, time, x_t, generator=make_generator("z")).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [100, 10])
def test_ddim_steps_are_those_of_diffusers(schedulers, eta, clip, steps):
    p = process(100)
    scheduler = schedulers.DDIMScheduler(
        100, trained_betas=p.beta.tolist(), clip_sample=clip, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    kept = (scheduler.timesteps + 1).flip(0)  # theirs end at T too, but are spaced from 0
    alpha_bar = p.alpha_bar[kept - 1]
    q = Process(1 - alpha_bar / torch.cat([torch.ones(1, dtype=F64), alpha_bar[:-1]]), p.variance, kept)
    x_t, eps = images(0), images(1)
    for step in (q.T, q.T // 2, 2, 1):
        t, time = torch.full((4,), step), int(q.times[step - 1]) - 1
        of = Prediction(q.predict_x_0(x_t, t, eps, clip), eps)
        ours = ddim(q, SamplerConfig(kind="ddim", eta=eta), x_t, of, t, generator=make_generator("z"))
        theirs = scheduler.step(eps, time, x_t, eta=eta, use_clipped_model_output=True, generator=make_generator("z"))
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=2e-4, atol=2e-4)


# Continuous time: all steps from noise to an image by the same network, which says a wave of what it is fed.


def wave(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x + told.to(x.dtype).reshape(-1, 1, 1, 1))


def follow(p: Continuous, sampler: SamplerConfig, x_T: torch.Tensor) -> torch.Tensor:
    def model(x_t, t):
        return interpret(p, "", x_t, t, wave(*p.feed(x_t, t)))

    return draw(p, model, sampler, x_T, make_generator("z"), clip=False).x_0


@pytest.mark.parametrize("kind", ["euler", "dpmpp"])
def test_steps_of_edm_are_those_of_diffusers(schedulers, kind):
    """DPM-Solver++ of theirs spaces its levels by the power of 7, so ours are put to theirs' geometric ones."""
    own: dict[str, Any] = {"sigma_min": 0.01, "sigma_max": 30.0, "sigma_data": 0.4}
    p, x_T = Continuous.of(DiffusionConfig(formulation="edm", **own)), images(2)
    if kind == "euler":
        scheduler = schedulers.EDMEulerScheduler(**own)
    else:
        how = {"sigma_schedule": "exponential", "solver_order": 2, "lower_order_final": False}
        scheduler = schedulers.EDMDPMSolverMultistepScheduler(**own, **how, final_sigmas_type="zero")
    scheduler.set_timesteps(8)
    x = x_T * own["sigma_max"]
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t)
        x = scheduler.step(wave(fed, t.expand(4)), t, x).prev_sample
    ours = follow(p, SamplerConfig(kind=kind, steps=8), x_T)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_steps_of_the_flow_are_those_of_diffusers(schedulers):
    p, x_T = Continuous.of(DiffusionConfig(formulation="flow")), images(3)
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / 8 for k in range(8)])
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(wave(x, t.expand(4)), t, x).prev_sample
    torch.testing.assert_close(follow(p, SamplerConfig(kind="euler", steps=8), x_T), x, rtol=2e-4, atol=2e-4)
