"""Pixels from N(0, s^2): the one data set here whose best denoiser is known exactly.

(x_0, eps, x_t) of eq. (4) are jointly Gaussian, so the best eps_theta is the conditional mean, which is linear in x_t:

    E[eps | x_t] = Cov(eps, x_t) / Var(x_t) x_t = gain_t x_t,    gain_t = sqrt(1 - alpha_bar_t) / v_t,
    v_t = Var(x_t) = alpha_bar_t s^2 + 1 - alpha_bar_t,

as the score says too: grad log q(x_t) = -x_t / v_t = -E[eps | x_t] / sqrt(1 - alpha_bar_t) (Vincent 2011; Ho et al.
2020, section 3.2). The bound and the samples that it gives are known too: tests/exact.py.
"""

from typing import Any

from torch import nn

from workers.diffusion.process import Process, spread
from workers.shapes import NCHW, RealTimes


def make_denoiser_config(standard_deviation: float, size: int, channels: int) -> dict[str, Any]:
    """What a checkpoint holds of the denoiser beside its process: it has no weights."""
    return {
        "_class_name": "GaussianDenoiser",
        "standard_deviation": standard_deviation,
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
    }


class GaussianDenoiser(nn.Module):
    """eps_theta(x_t, t) = E[eps | x_t] for pixels from N(0, s^2): it stands where a `UNet` would, without weights.

    `config` is what `make_denoiser_config` makes; `process` the one whose times t are meant. Raises ValueError where
    the standard deviation is not positive.
    """

    def __init__(self, config: dict[str, Any], process: Process) -> None:
        super().__init__()
        s = config["standard_deviation"]
        if not s > 0:
            raise ValueError(f"standard_deviation: {s!r} must be above 0, on the pixels' scale of [-1, 1]")
        self.config, self.process = dict(config), process
        self.eval()

    def forward(self, x: NCHW, t: RealTimes) -> NCHW:
        """t is counted from 0: the paper's t - 1."""
        alpha_bar, s = self.process.alpha_bar_at(t + 1), self.config["standard_deviation"]
        return spread((1 - alpha_bar).sqrt() / (alpha_bar * s**2 + 1 - alpha_bar), x) * x
