"""A formulation of one's own, as its user writes it: x_t = cos(t) x_0 + sin(t) eps (TrigFlow, Lu & Song 2024)."""

import math

import numpy as np
import torch
from pydantic import Field

from workers.diffusion.formulations import Formulation
from workers.diffusion.process import Target, spread
from workers.kinds import FormulationEntry


def draw(config, u):
    """log tan(t) ~ N(0, width^2)."""
    return torch.atan((config.width * torch.special.ndtri(u)).exp())


def density(config, t):
    law = torch.distributions.Normal(0, 2 * config.width)
    return law.log_prob(-2 * t.tan().log()).exp()


def path(config, steps):
    return torch.linspace(math.atan(config.last), 0, steps + 1, dtype=torch.float64)


def log_snrs(config, shares):
    return np.zeros(len(shares))


def ends(config):
    return 1 / config.last, config.last


TRIG = FormulationEntry(
    function=Formulation(
        signal=lambda config, t: t.cos(),
        noise_level=lambda config, t: t.tan(),
        time=lambda config, sigma: sigma.atan(),
        law=draw,
        density=density,
        feed=lambda config, x_t, t: (x_t, t),
        target=Target(
            of=lambda process, x_0, x_t, t, eps: spread(t.cos(), x_0) * eps - spread(t.sin(), x_0) * x_0,
            x_0=lambda process, x_t, t, output: spread(t.cos(), x_t) * x_t - spread(t.sin(), x_t) * output,
            eps=lambda process, x_t, t, output: spread(t.sin(), x_t) * x_t + spread(t.cos(), x_t) * output,
            scale=lambda instants: instants.t.sin() ** 2,
        ),
        drift=lambda config, t, prediction: (
            spread(t.cos(), prediction.eps) * prediction.eps - spread(t.sin(), prediction.x_0) * prediction.x_0
        ),
        path=path,
    ),
    about="x_0 turned into noise",
    log_snrs="trig_flow:log_snrs",
    ends="trig_flow:ends",
    settings={
        "last": (float, Field(default=200.0, gt=1, description="the largest noise level")),
        "width": (float, Field(default=1.5, gt=0, description="of the law of log sigma")),
    },
)
