"""A weighting of one's own: how much the squared error at each t counts."""

from workers.config import LossConfig
from workers.diffusion.process import Process
from workers.kinds import WeightingEntry
from workers.shapes import PerTime


def root_snr(process: Process, loss: LossConfig, own: PerTime) -> PerTime:
    """What the squared error of x_0 counts at t = 1..T: between simple, in which it counts SNR_t, and x_0's own, 1."""
    return process.snr.sqrt()


ROOT_SNR = WeightingEntry(function=root_snr, about="sqrt(SNR_t) for the error of x_0")
