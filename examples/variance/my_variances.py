"""Variances of p_theta of one's own: one that is fixed, and one that a second head of the network says."""

from torch import Tensor

from workers.diffusion.process import Process, at
from workers.kinds import VarianceEntry
from workers.shapes import NCHW, PerTime, Times


def geometric_mean(process: Process) -> PerTime:
    """sigma_t^2 = sqrt(beta_t beta_tilde_t), halfway between the two choices of Ho et al. 2020, section 3.2."""
    return (process.beta * process.beta_tilde).sqrt()


def above_small(process: Process, t: Times, head: NCHW) -> Tensor:
    """log sigma_t^2 = log (beta_tilde_t + exp(head) (beta_t - beta_tilde_t)): never below the posterior's own."""
    small, large = at(process.beta_tilde, t, head), at(process.beta, t, head)
    return (small + head.exp() * (large - small)).log()


MIDDLE = VarianceEntry(function=geometric_mean, about="sqrt(beta_t beta_tilde_t)")
ABOVE_SMALL = VarianceEntry(function=above_small, about="beta_tilde_t and a learned part of the rest", learned=True)
