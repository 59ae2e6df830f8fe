"""Training objectives: the weighted squared error of the network's target, the bound itself, and the two together.

An objective is a function of a batch, a weighting a function of the process, each next to its formula; `OBJECTIVES` and
`WEIGHTINGS` are the lists of valid names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from workers.config import DiffusionConfig, LossConfig
from workers.diffusion.bound import model_terms
from workers.diffusion.predictions import PREDICTIONS, heads, interpret
from workers.diffusion.process import Prediction, Process

# ---- Weightings: what |x_0 - x_0_hat|^2 counts at each t, float64 (T,) ------------------------------------------
#
# All are stated for the error of x_0, whatever the network predicts; |eps - eps_hat|^2 = SNR_t |x_0 - x_0_hat|^2. The
# last argument is the weight that the network's own target has there: with it, the error of the target counts 1.


def simple(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """The target's own error, unweighted: L_simple, eq. (14), for eps; eq. (8) without its factor for mu."""
    return own


def vlb(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """(weight of x_0 in mu_tilde_t)^2 / (2 sigma_t^2): the bound's own, eq. (8).

    For the error of eps it is beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)), eq. (12).
    """
    return process.posterior_x_0.square() / (2 * process.sigma_squared)


def snr(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """SNR_t: L_simple for a network that predicts anything (Salimans & Ho 2022, section 4)."""
    return process.snr


def truncated_snr(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """max(SNR_t, 1) (Salimans & Ho 2022, section 4): the larger of the errors of x_0 and eps."""
    return process.snr.clamp(min=1)


def min_snr(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """min(SNR_t, gamma): min-SNR-gamma (Hang et al. 2023, section 3.4); for the error of eps, that over SNR_t."""
    return process.snr.clamp(max=loss.gamma)


def p2(process: Process, loss: LossConfig, own: Tensor) -> Tensor:
    """SNR_t / (k + SNR_t)^gamma: P2 (Choi et al. 2022, eq. 8), stated there as 1 / (k + SNR_t)^gamma for eps."""
    return process.snr / (loss.p2_k + process.snr) ** loss.p2_gamma


WEIGHTINGS: dict[str, Callable[[Process, LossConfig, Tensor], Tensor]] = {
    "simple": simple,
    "vlb": vlb,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "p2": p2,
}


def weights(process: Process, loss: LossConfig, prediction: str = "eps") -> Tensor:
    """The weight of the target's squared error at each t, float64 (T,), scaled to a mean of 1.

    The scale leaves the minimum where it is and lets one learning rate and one gradient clip serve all weightings.
    """
    scale = PREDICTIONS[prediction].scale(process)
    w = WEIGHTINGS[loss.weighting](process, loss, 1 / scale) * scale
    return w / w.mean()


# ---- Objectives -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noisy images and what the network says of them."""

    x_0: Tensor  # float32 (N, C, H, W)
    t: Tensor  # int64 (N,) in 1..T
    target: Tensor  # what it should have said
    output: Tensor  # what it said of the target
    said: Prediction


@dataclass(frozen=True)
class Loss:
    weighted: Tensor  # (N,): what is minimised
    eps_mse: Tensor  # (N,): the plain squared error of eps a dimension, detached


@dataclass(frozen=True)
class Objective:
    """What one trial minimises. `network` of a call takes (x_t, t) and gives its heads, as `interpret` reads them."""

    process: Process
    prediction: str
    loss: LossConfig
    levels: int  # of the data, for the decoder

    @staticmethod
    def of(diffusion: DiffusionConfig, loss: LossConfig, levels: int) -> "Objective":
        return Objective(Process.of(diffusion), diffusion.prediction, loss, levels)

    @cached_property
    def weights(self) -> Tensor:
        return weights(self.process, self.loss, self.prediction)

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Loss:
        """x_0, eps: float32 (N, C, H, W); t: int64 (N,) in 1..T."""
        x_t = self.process.q_sample(x_0, t, eps)
        raw = network(x_t, t).to(eps.dtype)
        target = PREDICTIONS[self.prediction].of(self.process, x_0, x_t, t, eps)
        said = interpret(self.process, self.prediction, x_t, t, raw)
        batch = Batch(x_0, t, target, heads(self.process, raw)[0], said)
        return Loss(OBJECTIVES[self.loss.objective](self, batch), _mean_square(eps - said.eps).detach())


def mse(objective: Objective, batch: Batch) -> Tensor:
    """w_t |target - output|^2 a dimension, eq. (8), (12) and (14)."""
    error = _mean_square(batch.target - batch.output)
    return objective.weights.to(batch.t.device)[batch.t - 1].to(error.dtype) * error


def kl(objective: Objective, batch: Batch) -> Tensor:
    """T L_{t-1} in bits/dim, eq. (5), with the decoder at t = 1: its mean over t is the bound without L_T."""
    return _bits(objective, batch, batch.said)


def hybrid(objective: Objective, batch: Batch) -> Tensor:
    """mse + lambda kl, where kl sees the mean detached: it teaches the variance alone (Nichol & Dhariwal 2021, eq. 16).

    Their lambda of 0.001 goes with the bound in bits/dim over all T, as here.
    """
    frozen = replace(batch.said, x_0=batch.said.x_0.detach(), eps=batch.said.eps.detach())
    return mse(objective, batch) + objective.loss.vlb_weight * _bits(objective, batch, frozen)


OBJECTIVES: dict[str, Callable[[Objective, Batch], Tensor]] = {"mse": mse, "kl": kl, "hybrid": hybrid}


def _bits(objective: Objective, batch: Batch, said: Prediction) -> Tensor:
    process, dimensions = objective.process, batch.x_0[0].numel()
    nats = model_terms(process, said, batch.x_0, batch.t, objective.levels)
    bits: Tensor = nats * (process.T / (dimensions * torch.log(torch.tensor(2.0))).item())
    return bits


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
