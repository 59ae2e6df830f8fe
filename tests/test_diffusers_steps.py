"""The steps of diffusers, as a second opinion."""

import pytest
import torch
from small_process import ANCESTRAL, F64, normal, process

from workers.config import SamplerConfig
from workers.diffusion.process import FIXED, Prediction, Process
from workers.diffusion.samplers import ancestral, ddim
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
