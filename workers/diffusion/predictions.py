"""What a network is trained to predict, and what follows from it: x_0 and eps, whichever it is.

A `Target` is four functions next to their formulas: what the network should say, x_0 and eps by what it says, and what
a squared error of it is worth. `workers.kinds` lists them. What turns an output into eps or x_0 takes
real times too, but for `mu`, which belongs to a step.
"""

import torch
from torch import nn

from workers.classes import Classes, Told
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.process import EpsModel, Model, Prediction, Process, at, spread
from workers.diffusion.process import Target as Target
from workers.kinds import PREDICTIONS
from workers.shapes import NCHW, Conditions, Heads, RealTimes, Times


def eps_by_x_0(process: Process, x_t: NCHW, t: RealTimes, x_0: NCHW) -> NCHW:
    """eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t): eq. (4) of Ho et al. 2020 solved for eps."""
    alpha_bar = process.alpha_bar_at(t)
    return (x_t - spread(alpha_bar.sqrt(), x_t) * x_0) / spread((1 - alpha_bar).sqrt(), x_t)


# eps, eq. (14). It does not determine x_0 where alpha_bar_t = 0.
EPS = Target(
    of=lambda process, x_0, x_t, t, eps: eps,
    x_0=lambda process, x_t, t, output: process.predict_x_0(x_t, t, output, clip=False),
    eps=lambda process, x_t, t, output: output,
    scale=lambda process: 1 / process.snr,
)

# x_0, which the paper found worse early on (section 3.2).
X_0 = Target(
    of=lambda process, x_0, x_t, t, eps: x_0,
    x_0=lambda process, x_t, t, output: output,
    eps=eps_by_x_0,
    scale=lambda process: torch.ones_like(process.beta),
)


def _x_0_by_mu(process: Process, x_t: NCHW, t: Times, output: NCHW) -> NCHW:
    """Eq. (7) solved for x_0."""
    return (output - at(process.posterior_x_t, t, x_t) * x_t) / at(process.posterior_x_0, t, x_t)


# mu_tilde_t(x_t, x_0), eq. (7) and (8): the baseline of table 2. It lies so near x_t that bf16 hardly tells them apart.
MU = Target(
    of=lambda process, x_0, x_t, t, eps: process.posterior_mean(x_0, x_t, t),
    x_0=_x_0_by_mu,
    eps=lambda process, x_t, t, output: eps_by_x_0(process, x_t, t, _x_0_by_mu(process, x_t, t, output)),
    scale=lambda process: 1 / process.posterior_x_0.square(),
)


def _v(process: Process, x_0: NCHW, x_t: NCHW, t: Times, eps: NCHW) -> NCHW:
    alpha_bar = process.alpha_bar
    return at(alpha_bar.sqrt(), t, x_0) * eps - at((1 - alpha_bar).sqrt(), t, x_0) * x_0


def _x_0_by_v(process: Process, x_t: NCHW, t: RealTimes, output: NCHW) -> NCHW:
    alpha_bar = process.alpha_bar_at(t)
    return spread(alpha_bar.sqrt(), x_t) * x_t - spread((1 - alpha_bar).sqrt(), x_t) * output


def _eps_by_v(process: Process, x_t: NCHW, t: RealTimes, output: NCHW) -> NCHW:
    alpha_bar = process.alpha_bar_at(t)
    return spread(alpha_bar.sqrt(), x_t) * output + spread((1 - alpha_bar).sqrt(), x_t) * x_t


# v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0: Salimans & Ho 2022, section 4 and appendix D.
V = Target(of=_v, x_0=_x_0_by_v, eps=_eps_by_v, scale=lambda process: 1 - process.alpha_bar)


def find_target(prediction: str) -> Target:
    """The target that is called so."""
    target: Target = PREDICTIONS[prediction].load()
    return target


def choose_target(process: AnyProcess, prediction: str) -> Target:
    """What a network of this process says: its prediction, where the formulation has none of its own."""
    return process.formulation.target if isinstance(process, Continuous) else find_target(prediction)


def split_heads(process: AnyProcess, output: Heads) -> tuple[NCHW, NCHW | None]:
    """What the network says of its target and, where it learns one, of the variance: the two halves of its channels."""
    if not process.learned:
        return output, None
    target, variance = output.chunk(2, dim=1)
    return target, variance


def interpret(process: AnyProcess, prediction: str, x_t: NCHW, t: RealTimes, output: Heads) -> Prediction:
    """The output of a network trained to predict `prediction`, in the dtype of x_t."""
    target, (target_output, variance) = choose_target(process, prediction), split_heads(process, output.to(x_t.dtype))
    return Prediction(target.x_0(process, x_t, t, target_output), target.eps(process, x_t, t, target_output), variance)


def from_eps(process: Process, eps_theta: EpsModel) -> Model:
    """The model that a function eps_theta(x_t, t) is, with a fixed variance."""
    return lambda x_t, t: interpret(process, "eps", x_t, t, eps_theta(x_t, t))


class Denoiser(nn.Module):
    """A `Model` from a network that predicts any of `PREDICTIONS`, or what a continuous formulation has it predict."""

    def __init__(self, network: nn.Module, process: AnyProcess, prediction: str) -> None:
        super().__init__()
        self.network, self.process, self.prediction = network, process, prediction

    @property
    def told(self) -> Told | None:
        """What the network is told of each image; None where it is told nothing."""
        return getattr(self.network, "told", None)

    @property
    def classes(self) -> Classes | None:
        """The classes that the network is told; None where it is told none."""
        return self.told if isinstance(self.told, Classes) else None

    @property
    def takes_no_label(self) -> bool:
        """Whether it was trained without what it is told, too, so that it can be guided."""
        return bool(getattr(self.network, "takes_no_label", False))

    def forward(self, x_t: NCHW, t: RealTimes, told: Conditions | None = None) -> Prediction:
        more = () if told is None else (told,)
        return interpret(self.process, self.prediction, x_t, t, self.network(*self.process.feed(x_t, t), *more))
