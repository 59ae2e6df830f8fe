"""How noisy the images are that a continuous formulation trains on, in NumPy, so that a dry run can say it.

Of each formulation: log SNR = -2 log sigma at shares of the t that are drawn, from the least noise on; the least and
the largest noise level sigma of x_0 + sigma eps that it is measured at; and what is wrong with its settings.
`workers.diffusion.formulations` has the rest.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from workers.config import DiffusionConfig

LogSNRs = Float64[np.ndarray, "shares"]
REACH = 6.0  # standard deviations of a law beyond which a network has seen nothing


def _find_quantiles(shares: Sequence[float]) -> LogSNRs:
    """Of the standard normal law."""
    return np.array([NormalDist().inv_cdf(share) for share in shares])


def log_snrs_of_edm(config: DiffusionConfig, shares: Sequence[float]) -> LogSNRs:
    """-2 log sigma, log sigma ~ N(p_mean, p_std^2): Karras et al. 2022, table 1."""
    return -2 * (config.p_mean + config.p_std * _find_quantiles(shares))


def ends_of_edm(config: DiffusionConfig) -> tuple[float, float]:
    """sigma_min and sigma_max."""
    return config.sigma_min, config.sigma_max


def check_of_edm(config: DiffusionConfig) -> Iterator[str]:
    """Ends in the wrong order, or where the law of the training has no noise levels."""
    if config.sigma_min >= config.sigma_max:
        yield (
            f"diffusion.sigma_min: {config.sigma_min:g} is not below sigma_max = {config.sigma_max:g}; it is the least "
            "noise level"
        )
        return
    low, high = (config.p_mean + sign * REACH * config.p_std for sign in (-1, 1))
    for name in ("sigma_min", "sigma_max"):
        if not low <= math.log(sigma := getattr(config, name)) <= high:
            yield (
                f"diffusion.{name}: {sigma:g} is more than {REACH:g} standard deviations from the log sigma that are "
                f"trained on (p_mean: {config.p_mean:g}, p_std: {config.p_std:g}), so the network has seen nothing "
                f"like it; take one of {math.exp(low):.2g} to {math.exp(high):.2g}, or a larger p_std"
            )


def log_snrs_of_flow(config: DiffusionConfig, shares: Sequence[float]) -> LogSNRs:
    """2 log((1 - t) / t), t uniform or its logit normal."""
    if config.t_law == "logit_normal":
        return -2 * (config.t_mean + config.t_std * _find_quantiles(shares))
    t = np.array(shares)
    return np.asarray(2 * np.log((1 - t) / t))


def ends_of_flow(config: DiffusionConfig) -> tuple[float, float]:
    """t / (1 - t) at t_min and t_max: at t = 1 there would be no signal, and at 0 no noise."""
    return config.t_min / (1 - config.t_min), config.t_max / (1 - config.t_max)


def check_of_flow(config: DiffusionConfig) -> Iterator[str]:
    """Ends in the wrong order."""
    if config.t_min >= config.t_max:
        yield f"diffusion.t_min: {config.t_min:g} is not below t_max = {config.t_max:g}; it is the end with less noise"
