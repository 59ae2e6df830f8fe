"""What a network predicts, turned into eps: all else here calls eps_theta(x_t, t).

A prediction is a function of (process, x_t, t, the network's output) next to its formula; `PREDICTIONS` is the list
of valid names. x_t and the output are float (N, C, H, W); t (N,) lies in 1..T, between whole times by float64.
"""

from collections.abc import Callable

from torch import Tensor, nn

from workers.diffusion.process import Process, spread


def eps(process: Process, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """The output is eps_theta (Ho et al. 2020, eq. 14)."""
    return output


def x_0(process: Process, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t): eq. (4) of Ho et al. 2020 solved for eps."""
    alpha_bar = process.alpha_bar_at(t)
    return (x_t - spread(alpha_bar.sqrt(), x_t) * output) / spread((1 - alpha_bar).sqrt(), x_t)


def v(process: Process, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t.

    v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 is that of Salimans & Ho 2022, section 4.
    """
    alpha_bar = process.alpha_bar_at(t)
    return spread(alpha_bar.sqrt(), x_t) * output + spread((1 - alpha_bar).sqrt(), x_t) * x_t


Prediction = Callable[[Process, Tensor, Tensor, Tensor], Tensor]
PREDICTIONS: dict[str, Prediction] = {"eps": eps, "x_0": x_0, "v": v}


class EpsNetwork(nn.Module):
    """eps_theta from a network that predicts any of `PREDICTIONS`; called as the network itself is."""

    def __init__(self, network: nn.Module, process: Process, prediction: str) -> None:
        super().__init__()
        self.network, self.process, self.prediction = network, process, prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x float (N, C, H, W); t int64 (N,), counted from 0 (the paper's t - 1) -> eps, same shape as x."""
        return PREDICTIONS[self.prediction](self.process, x, t + 1, self.network(x, t))
