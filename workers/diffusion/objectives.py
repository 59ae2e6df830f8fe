"""Training objectives: the squared error of eps_theta and the weightings of it over t.

A weighting is a function of the process next to its formula; `WEIGHTINGS` is the list of valid names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.config import LossConfig
from workers.diffusion.process import EpsModel, Process


def simple(process: Process, loss: LossConfig) -> Tensor:
    """1: L_simple, eq. (14)."""
    return torch.ones_like(process.beta)


def vlb(process: Process, loss: LossConfig) -> Tensor:
    """beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)): the bound's own weights, eq. (12)."""
    return process.beta**2 / (2 * process.sigma_squared * process.alpha * (1 - process.alpha_bar))


def min_snr(process: Process, loss: LossConfig) -> Tensor:
    """min(SNR_t, gamma) / SNR_t: min-SNR-gamma for an eps network (Hang et al. 2023, section 3.4)."""
    return process.snr.clamp(max=loss.gamma) / process.snr


WEIGHTINGS: dict[str, Callable[[Process, LossConfig], Tensor]] = {"simple": simple, "vlb": vlb, "min_snr": min_snr}


def weights(process: Process, loss: LossConfig) -> Tensor:
    """The weight of each t, float64 (T,), scaled to a mean of 1.

    The scale leaves the minimum where it is and lets one learning rate and one gradient clip serve all weightings.
    """
    w = WEIGHTINGS[loss.weighting](process, loss)
    return w / w.mean()


@dataclass(frozen=True)
class Loss:
    weighted: Tensor  # (N,): what is minimised
    eps_mse: Tensor  # (N,): the plain squared error a dimension, detached


def eps_loss(process: Process, eps_theta: EpsModel, weights: Tensor, x_0: Tensor, t: Tensor, eps: Tensor) -> Loss:
    """w_t |eps - eps_theta(x_t, t)|^2 a dimension, eq. (12) and (14).

    x_0, eps: float32 (N, C, H, W); t: int64 (N,) in 1..T; weights: float64 (T,).
    """
    eps_hat = eps_theta(process.q_sample(x_0, t, eps), t).to(eps.dtype)
    mse = (eps - eps_hat).square().flatten(1).mean(1)
    return Loss(weights.to(t.device)[t - 1].to(mse.dtype) * mse, mse.detach())
