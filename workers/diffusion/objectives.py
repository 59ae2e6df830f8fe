"""Training objectives: the weighted squared error of the network's target, the bound itself, and the two together.

An objective is a function of a batch, a weighting a function of the process, each next to its formula;
`workers.kinds` lists them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from workers.config import DiffusionConfig, LossConfig
from workers.diffusion.bound import model_terms
from workers.diffusion.formulations import AnyProcess, Continuous, Instants, make_process, take_student
from workers.diffusion.predictions import choose_target, find_target, interpret, split_heads
from workers.diffusion.process import Model, Prediction, Process, Target
from workers.kinds import OBJECTIVES, WEIGHTINGS
from workers.shapes import NCHW, Heads, PerImage, PerImage64, PerTime, RealTimes
from workers.students import Student, describe_student

SHARES = 10_000  # of the law of real t, over which a weighting's mean is taken
Weighed = Process | Instants  # what weightings are functions of: a process at its T times, or at some real ones

# ---- Weightings: what |x_0 - x_0_hat|^2 counts at each t -------------------------------------------------------
#
# All are stated for the error of x_0, whatever the network predicts; |eps - eps_hat|^2 = SNR_t |x_0 - x_0_hat|^2. The
# last argument is the weight that the network's own target has there: with it, the error of the target counts 1. But
# for `simple` and `vlb` they are functions of the SNR alone, so that they mean the same in every formulation. What an
# error counts in all is its weight times the density of log SNR in training (Kingma & Gao 2023).


def simple(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """The target's own error, unweighted: L_simple, eq. (14), for eps; eq. (8) without its factor for mu."""
    return own


def vlb(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """(weight of x_0 in mu_tilde_t)^2 / (2 sigma_t^2): the bound's own, eq. (8); of real t `Instants.bound_weight`.

    For the error of eps it is beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)), eq. (12).
    """
    return process.bound_weight


def snr(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """SNR_t: L_simple for a network that predicts anything (Salimans & Ho 2022, section 4)."""
    return process.snr


def truncated_snr(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """max(SNR_t, 1) (Salimans & Ho 2022, section 4): the larger of the errors of x_0 and eps."""
    return process.snr.clamp(min=1)


def min_snr(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """min(SNR_t, gamma): min-SNR-gamma (Hang et al. 2023, section 3.4); for the error of eps, that over SNR_t."""
    return process.snr.clamp(max=loss.gamma)


def p2(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """SNR_t / (k + SNR_t)^gamma: P2 (Choi et al. 2022, eq. 8), stated there as 1 / (k + SNR_t)^gamma for eps."""
    return process.snr / (loss.p2_k + process.snr) ** loss.p2_gamma


def sigmoid(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """SNR_t sigmoid(bias - log SNR_t) = SNR_t / (1 + e^-bias SNR_t): for eps, sigmoid(bias - log SNR_t).

    Kingma & Gao 2023: about SNR_t where there is more noise than `bias` says, and e^bias where there is less.
    """
    return process.snr / (1 + math.exp(-loss.sigmoid_bias) * process.snr)


def edm(process: Weighed, loss: LossConfig, own: PerTime) -> PerTime:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR_t + 1 / sigma_data^2: Karras et al. 2022, table 1."""
    return process.snr + loss.weighting_sigma_data**-2


def weigh(process: Weighed, loss: LossConfig, target: Target) -> PerTime:
    """The weight of the target's squared error at each t, by the weighting's own scale."""
    scale = target.scale(process)
    w: PerTime = WEIGHTINGS[loss.weighting].load()(process, loss, 1 / scale) * scale
    return w


def weights(process: Process, loss: LossConfig, prediction: str = "eps") -> PerTime:
    """The weight of the target's squared error at each t, scaled to a mean of 1.

    The scale leaves the minimum where it is and lets one learning rate and one gradient clip serve all weightings.
    """
    w = weigh(process, loss, find_target(prediction))
    return w / w.mean()


def weights_at(process: Continuous, t: PerImage64, loss: LossConfig) -> PerImage64:
    """The same at real t, of a mean of 1 over the t of the training."""
    return weigh(Instants(process, t), loss, process.formulation.target) / _find_mean_weight(process, loss)


@lru_cache
def _find_mean_weight(process: Continuous, loss: LossConfig) -> float:
    shares = (torch.arange(SHARES, dtype=torch.float64) + 0.5) / SHARES
    return float(weigh(Instants(process, process.draw_times(shares)), loss, process.formulation.target).mean())


# ---- Objectives -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teaching:
    """What the objective of a student goes by beside a batch. `teacher` is asked at the times of the whole process."""

    step: int  # of the training, from 0 on
    teacher: Model


@dataclass(frozen=True)
class Batch:
    """Noisy images and what the network says of them."""

    x_0: NCHW
    t: RealTimes
    target: NCHW  # what it should be
    output: NCHW  # the part of it that is of the target
    prediction: Prediction
    x_t: NCHW
    eps: NCHW
    ask: Model  # the network once more, at other x_t and t
    teaching: Teaching | None = None


@dataclass(frozen=True)
class Loss:
    weighted: PerImage  # what is minimised
    eps_mse: PerImage  # the plain squared error of eps a dimension, detached


@dataclass(frozen=True)
class Objective:
    """What one trial minimises. `network` of a call takes (x_t, t) and returns its heads, as `interpret` reads them."""

    process: AnyProcess
    prediction: str
    loss: LossConfig
    levels: int | None  # of the data, for the decoder
    teacher_process: AnyProcess | None = None  # that of the times that the network is told; None: `process` itself

    @staticmethod
    def of(diffusion: DiffusionConfig, loss: LossConfig, levels: int | None) -> "Objective":
        whole = make_process(diffusion)
        process = take_student(whole, describe_student(loss))
        return Objective(process, diffusion.prediction, loss, levels, whole)

    @property
    def whole(self) -> AnyProcess:
        """The process of all times that the network is told, of which a student may have some."""
        return self.teacher_process or self.process

    @property
    def student(self) -> Student | None:
        """What it makes, where it has no bound."""
        return self.process.student

    def to(self, device: torch.device) -> "Objective":
        """The same with its coefficients on that device; the weighting is asked before, as it may make tensors.

        A continuous process has no list of them: it computes them of each t.
        """
        if isinstance(self.process, Continuous):
            return self
        assert isinstance(self.whole, Process)
        moved = replace(self, process=self.process.to(device), teacher_process=self.whole.to(device))
        if "weighting" in OBJECTIVES[self.loss.objective].reads:
            vars(moved)["weights"] = self.weights.to(device)
        return moved

    @cached_property
    def weights(self) -> PerTime:
        assert isinstance(self.process, Process), "real t have no list of weights; ask for find_weights()"
        return weights(self.process, self.loss, self.prediction)

    def find_weights(self, t: RealTimes) -> PerImage64:
        """What the target's squared error counts at each of these t."""
        if isinstance(self.process, Continuous):
            return weights_at(self.process, t, self.loss)
        return self.weights.to(t.device)[t - 1]

    def __call__(
        self,
        network: Callable[[NCHW, RealTimes], Heads],
        x_0: NCHW,
        t: RealTimes,
        eps: NCHW,
        teaching: Teaching | None = None,
    ) -> Loss:
        def ask(x: NCHW, s: RealTimes) -> Prediction:
            return interpret(self.process, self.prediction, x, s, network(x, s).to(eps.dtype))

        x_t = self.process.q_sample(x_0, t, eps)
        raw = network(x_t, t).to(eps.dtype)
        target = choose_target(self.process, self.prediction).of(self.process, x_0, x_t, t, eps)
        prediction = interpret(self.process, self.prediction, x_t, t, raw)
        output = split_heads(self.process, raw)[0]
        batch = Batch(x_0, t, target, output, prediction, x_t=x_t, eps=eps, ask=ask, teaching=teaching)
        return Loss(OBJECTIVES[self.loss.objective].load()(self, batch), mean_square(eps - prediction.eps).detach())


def mse(objective: Objective, batch: Batch) -> PerImage:
    """w_t |target - output|^2 a dimension, eq. (8), (12) and (14)."""
    error = mean_square(batch.target - batch.output)
    return objective.find_weights(batch.t).to(error.dtype) * error


def kl(objective: Objective, batch: Batch) -> PerImage:
    """T L_{t-1} in bits/dim, eq. (5), with the decoder at t = 1: its mean over t is the bound without L_T."""
    return _bits(objective, batch, batch.prediction)


def hybrid(objective: Objective, batch: Batch) -> PerImage:
    """mse + lambda kl, where kl sees the mean detached: it teaches the variance alone (Nichol & Dhariwal 2021, eq. 16).

    Their lambda of 0.001 goes with the bound in bits/dim over all T, as here.
    """
    frozen = replace(batch.prediction, x_0=batch.prediction.x_0.detach(), eps=batch.prediction.eps.detach())
    return mse(objective, batch) + objective.loss.vlb_weight * _bits(objective, batch, frozen)


def _bits(objective: Objective, batch: Batch, prediction: Prediction) -> PerImage:
    process, dimensions = objective.process, batch.x_0[0].numel()
    assert isinstance(process, Process), "the bound of a continuous process is no sum over steps"
    nats = model_terms(process, prediction, batch.x_0, batch.t, objective.levels)
    bits: PerImage = nats * (process.T / (dimensions * torch.log(torch.tensor(2.0))).item())
    return bits


def mean_square(error: NCHW) -> PerImage:
    return error.square().flatten(1).mean(1)
