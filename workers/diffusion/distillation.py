"""What students are taught: to come in one call of the network where their teacher's flow leads to.

Progressive distillation halves the steps of a sampler again and again; a consistency function jumps from any point of
the flow to its end. The teacher is a `Model`, whatever its network predicts.
"""

import torch
from torch import Tensor

from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.objectives import Batch, Objective, mean_square, mse
from workers.diffusion.predictions import choose_target
from workers.diffusion.process import Model, Process, spread
from workers.shapes import NCHW, PerImage, PerImage64, RealTimes, Times

HUBER = 0.00054  # c of the pseudo-Huber loss, over sqrt(dimensions): Song & Dhariwal 2024, section 3.3
SLOPE, RISE = 8.0, 1.0  # k and b of the gap: Geng et al. 2024

# ---- Progressive distillation: Salimans & Ho 2022, Algorithm 2 -----------------------------------------------------


def progressive(objective: Objective, batch: Batch) -> PerImage:
    """The weighted squared error of the target that the x~ of the teacher makes (`find_progressive_x_0`)."""
    process, teaching = objective.process, batch.teaching
    assert isinstance(process, Process) and isinstance(objective.whole, Process) and teaching
    x_0 = find_progressive_x_0(process, objective.whole, teaching.teacher, batch.x_t, batch.t)
    alpha_bar = process.alpha_bar_at(batch.t)
    eps = (batch.x_t - spread(alpha_bar.sqrt(), x_0) * x_0) / spread((1 - alpha_bar).sqrt(), x_0)
    target = choose_target(process, objective.prediction).of(process, x_0, batch.x_t, batch.t, eps)
    return mse(objective, Batch(**{**vars(batch), "target": target}))


@torch.no_grad()
def find_progressive_x_0(process: Process, whole: Process, teacher: Model, x_t: NCHW, t: Times) -> NCHW:
    """x~, by which one step of DDIM from t to the student's time before comes where two of the teacher do.

    x~ = (x_t'' - (sigma_t'' / sigma_t) x_t) / (alpha_t'' - (sigma_t'' / sigma_t) alpha_t), with alpha and sigma the
    square roots of alpha_bar and 1 - alpha_bar. `t` counts the student's times, 1..N, which are T / N of the teacher's
    apart (`process.times`).
    """
    end = process.times.to(t.device)[t - 1]
    stride = whole.T // process.T
    halfway = step_ddim(whole, teacher, x_t, end, end - stride // 2)
    reached = step_ddim(whole, teacher, halfway, end - stride // 2, end - stride)
    (alpha, sigma), (alpha_end, sigma_end) = _find_scales(whole, end), _find_scales(whole, end - stride)
    ratio = sigma_end / sigma
    return (reached - spread(ratio, x_t) * x_t) / spread(alpha_end - ratio * alpha, x_t)


def step_ddim(process: Process, model: Model, x_t: NCHW, t: Times, s: Times) -> NCHW:
    """x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s) eps, without noise; s = 0 is x_0_hat itself."""
    prediction = model(x_t, t)
    alpha, sigma = _find_scales(process, s)
    return spread(alpha, x_t) * prediction.x_0 + spread(sigma, x_t) * prediction.eps


def _find_scales(process: Process, t: Times) -> tuple[PerImage64, PerImage64]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t in 0..T."""
    alpha_bar = torch.cat([torch.ones_like(process.alpha_bar[:1]), process.alpha_bar]).to(t.device)[t]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


# ---- Consistency: Song et al. 2023, with the schedule of Geng et al. 2024 -------------------------------------------
#
# f(x_t, t) is the x_0 of what the network predicts: of eps, v, the velocity of a flow and EDM's F, c_skip x + c_out F
# with c_skip = 1 and c_out = 0 at sigma = 0, so that it is the identity there, whatever the network says.


def consistency(objective: Objective, batch: Batch) -> PerImage:
    """(sqrt(d^2 + c^2) - c) / (sigma_t - sigma_r), where d^2 is the mean square of f(x_t, t) - f(x_r, r).

    x_r is the point of the same flow with less noise: by a step of the teacher's (`pairs: flow`), or of the same x_0
    and eps (`pairs: noise`, Geng et al. 2024). What f says there is not differentiated. The gap narrows with the steps
    of the training, from what is all the way to x_0 for most t; the loss is iCT's (Song & Dhariwal 2024).
    """
    process, loss, teaching, x_t, t = objective.process, objective.loss, batch.teaching, batch.x_t, batch.t
    assert teaching
    sigma = _find_level(process, t)
    share = find_gap(sigma, min(teaching.step // loss.halve_every, loss.halvings))
    r, sigma_r = _find_earlier(process, t, sigma * (1 - share))
    ends = sigma_r == 0
    with torch.no_grad():
        x_0, eps = batch.x_0, batch.eps
        if loss.pairs == "flow":
            prediction = teaching.teacher(x_t, t)
            x_0, eps = prediction.x_0, prediction.eps
        reached = x_0
        if not ends.all():
            s = torch.where(ends, t, r)  # of those that are at the end the network is asked in vain
            said = batch.ask(process.q_sample(x_0, s, eps), s).x_0
            reached = torch.where(spread(ends, x_0).bool(), x_0, said)
    missed = (mean_square(batch.prediction.x_0 - reached) + HUBER**2).sqrt() - HUBER
    return missed / (sigma - sigma_r).to(missed.dtype)


def find_gap(sigma: PerImage64, halvings: int) -> PerImage64:
    """1 - r / t in noise levels: 2^-(1 + halvings) (1 + k sigmoid(-b sigma)), at most 1 (Geng et al. 2024).

    The sigmoid widens the gap where there is little noise.
    """
    gap: Tensor = 2.0 ** -(1 + halvings) * (1 + SLOPE * torch.sigmoid(-RISE * sigma))
    return gap.clamp(max=1)


def _find_level(process: AnyProcess, t: RealTimes) -> PerImage64:
    if isinstance(process, Continuous):
        return process.noise_level_at(t)
    return process.noise_level.to(t.device)[t - 1]


def _find_earlier(process: AnyProcess, t: RealTimes, sigma: PerImage64) -> tuple[RealTimes, PerImage64]:
    """The time of a noise level below that of t, and the level: of T times the nearest below. A level of 0 has none."""
    if isinstance(process, Continuous):
        return process.time_at(sigma), sigma
    levels = process.noise_level.to(t.device)
    r = torch.minimum(torch.searchsorted(levels, sigma, right=True), t - 1)
    return r.clamp(min=1), torch.cat([torch.zeros_like(levels[:1]), levels])[r]
