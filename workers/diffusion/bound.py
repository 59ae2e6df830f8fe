"""The variational bound L = L_T + sum_{t>1} L_{t-1} + L_0 of eq. (5), in nats, float64.

For a fixed variance every L_{t-1} depends on the network only through |x_0 - x_0_hat(x_t)|^2, since both means are
the same linear combination of (x_0, x_t) and (x_0_hat, x_t). So the expensive part records squared errors
(`likelihood`) and the terms follow from them here; L_0 goes through the discrete decoder of eq. (13), or of
data that are not discrete through a Gaussian density. A learned variance takes part in every term, which is then
computed where the network is (`model_terms`).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from workers.diffusion.process import Prediction, Process, at, fixed_small
from workers.shapes import NCHW, Beside, PerImage, PerImage64, PerTime, Times

# Of pairs of an image and a time, in any arrangement.
PairTimes = Int64[Tensor, "*pairs"]
PerPair = Float64[Tensor, "*pairs"]
# Of the pixels of images. The two may be of other types.
Pixels = Float[Tensor, "n *pixels"]
Doubles = Float64[Tensor, "*pixels"]


def prior_term(process: Process, squared_norm: PerImage64, dimensions: int) -> PerImage64:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, from |x_0|^2 and D."""
    last = process.alpha_bar[-1]
    return 0.5 * (last * squared_norm - dimensions * (last + torch.log1p(-last)))


def diffusion_terms(
    process: Process, t: PairTimes, squared_error: PerPair, dimensions: int, sigma_squared: PerTime | None = None
) -> PerPair:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) in nats, for t > 1.

    From |x_0 - x_0_hat|^2. `sigma_squared` stands for the process's own variance.
    """
    i = t - 1
    true, model = process.beta_tilde[i], (process.sigma_squared if sigma_squared is None else sigma_squared)[i]
    spread = 0.5 * dimensions * (torch.log(model / true) + true / model - 1)
    return spread + process.posterior_x_0[i].square() * squared_error / (2 * model)


def model_terms(process: Process, prediction: Prediction, x_0: NCHW, t: Times, levels: int | None) -> PerImage:
    """L_{t-1} by the variance of the process, fixed or learned, in nats: eq. (5), and at t = 1 the decoder's L_0.

    x_0 of `levels` values, None being any; `prediction` in the same dtype, its x_0 clipped or not as the mean is to be.
    """
    log_model = process.log_sigma_squared(prediction, t)
    log_true = at(fixed_small(process).log(), t, x_0)  # that of eq. (7) for t > 1; of t = 1 only finite
    squared_error = (at(process.posterior_x_0, t, x_0) * (x_0 - prediction.x_0)).square()
    kl = 0.5 * (log_model - log_true + (log_true - log_model).exp() + squared_error * (-log_model).exp() - 1)
    terms, first = kl.flatten(1).sum(1), t == 1
    if first.any():  # where mu_theta(x_1, 1) = x_0_hat
        sigma = process.sigma(prediction, t)[first].double()
        terms = terms.masked_scatter(
            first, decoder_term(x_0[first], prediction.x_0[first], sigma, levels).to(terms.dtype)
        )
    return terms


def log_normal_interval(lower: Doubles, upper: Doubles) -> Doubles:
    """log(Phi(upper) - Phi(lower)) for lower < upper, accurate in both tails."""
    flip = lower > 0  # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): subtract in the tail where the two are small
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


def log_laplace_interval(lower: Doubles, upper: Doubles) -> Doubles:
    """log(F(upper) - F(lower)) for lower < upper, F the standard Laplace distribution, accurate in both tails."""
    flip = lower + upper < 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    above = -math.log(2) - lower.clamp(min=0) + torch.log(-torch.expm1(-(upper - lower)))  # e^-x / 2 from 0 on
    around = torch.log(-(torch.expm1(lower.clamp(max=0)) + torch.expm1(-upper)) / 2)  # the centre lies between
    return torch.where(lower < 0, around, above)


def normal_nats(error: Doubles, log_scale: Tensor) -> Doubles:
    """-log of the density of N(0, scale^2) at an error, which is counted in scales."""
    return 0.5 * math.log(2 * math.pi) + log_scale + error.square() / 2


def laplace_nats(error: Doubles, log_scale: Tensor) -> Doubles:
    """The same of the Laplace distribution of that scale."""
    return math.log(2) + log_scale + error.abs()


# Laws of a decoder around its mean: the logarithm of an interval's probability, and -log of a density.
LAWS: dict[str, tuple[Callable[[Doubles, Doubles], Doubles], Callable[[Doubles, Tensor], Doubles]]] = {
    "gaussian": (log_normal_interval, normal_nats),
    "laplace": (log_laplace_interval, laplace_nats),
}


def decoder_term(
    x_0: Pixels, mean: Pixels, sigma: Beside | float, levels: int | None, *, law: str = "gaussian"
) -> PerImage64:
    """L_0 = -log p_theta(x_0 | x_1) in nats: the discrete decoder, eq. (13).

    x_0: one of `levels` values evenly spaced on [-1, 1]; mean: mu_theta(x_1, 1). A level's bin
    reaches 1 / (levels - 1) to either side; the outermost two reach to infinity. Where `levels` is None, x_0 is not
    discrete, and p_theta(x_0 | x_1) is the density N(x_0; mean, sigma^2 I) itself, whose L_0 may be below 0. The `law`
    may be another one of LAWS, of which `sigma` is the scale.
    """
    x_0, mean = x_0.double(), mean.double()
    log_interval, find_nats = LAWS[law]
    if levels is None:
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x_0.device)
        return find_nats((x_0 - mean) / sigma, sigma.log()).flatten(1).sum(1)
    half = 1 / (levels - 1)
    upper = torch.where(x_0 > 1 - half, math.inf, (x_0 + half - mean) / sigma)
    lower = torch.where(x_0 < -1 + half, -math.inf, (x_0 - half - mean) / sigma)
    return -log_interval(lower, upper).flatten(1).sum(1)
