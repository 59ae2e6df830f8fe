"""Likelihood: the network's errors on (image, t) pairs, which `workers.diffusion.ledger` turns into bits/dim.

`measure_pairs` is the only part that evaluates the network: it turns (image, t) pairs into |x_0 - x_0_hat|^2, the pairs
at t = 1 into decoder terms, and where the variance is learned every pair into its own term of the bound. Pairs of any t
are batched together. Which t are measured is a proposal's choice.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float64, Int64

from workers.diffusion.bound import decoder_term, model_terms
from workers.diffusion.guidance import take_rows
from workers.diffusion.ledger import DECODER_FACTORS, Bound, Ledger, compute_bound
from workers.diffusion.process import Model, Prediction, Process
from workers.noise import make_generator
from workers.shapes import NCHW

Ints = Int64[np.ndarray, "n"]
Doubles = Float64[np.ndarray, "n"]
Units = Float64[np.ndarray, "*shape"]  # in [0, 1)
Drawn = tuple[Int64[np.ndarray, "*shape"], Float64[np.ndarray, "*shape"]]  # t, and p(t)
Weighted = tuple[Int64[np.ndarray, "images times"], Float64[np.ndarray, "images times"]]  # t, and its weight

# Pixels of a batch of the network, by kind of device: what nearly fills a GPU (512 images of 32x32; the paper's network
# takes 3.3 GB for them in float32, and blocks have a quarter of a GPU), and what stays near the cores of a CPU, where
# 64 went a fifth faster than 250. How pairs are cut depends on this alone, whoever measures them.
PIXELS = {"cpu": 2**16, "gpu": 2**19}


def count_pairs_at_once(x_0: NCHW) -> int:
    """How many pairs of such images are in a batch of the network, on their device."""
    return max(1, PIXELS["cpu" if x_0.device.type == "cpu" else "gpu"] // x_0[0, 0].numel())


@torch.no_grad()
def measure_pairs(
    process: Process,
    model: Model,
    x_0: NCHW,
    image: Ints,
    t: Ints,
    *,
    weight: Doubles,
    noise: torch.Generator,
    levels: int | None,
    clip: bool = True,
) -> Ledger:
    """Measures the pairs (x_0[k], t[k]), t in 1..T; `image` and `weight` go to the ledger.

    The noise of all pairs is drawn from `noise` in their order, so that batches change nothing but rounding.
    """
    eps = torch.randn(x_0.shape, generator=noise, device=noise.device).to(x_0.device)
    times = torch.from_numpy(t).to(x_0.device)
    sigmas = (process.decoder_sigma_squared * torch.from_numpy(DECODER_FACTORS)).sqrt().tolist()
    errors, nats, own = [], [], []
    batch = count_pairs_at_once(x_0)
    for k in range(0, len(t), batch):
        part = slice(k, k + batch)
        x_t = process.q_sample(x_0[part], times[part], eps[part])
        prediction = take_rows(model, part)(x_t, times[part])
        x_0_hat = prediction.x_0.clamp(-1, 1) if clip else prediction.x_0
        errors.append((x_0[part] - x_0_hat).double().square().flatten(1).sum(1))
        first = times[part] == 1
        mean = process.posterior_mean(x_0_hat[first], x_t[first], times[part][first])
        nats.append(torch.stack([decoder_term(x_0[part][first], mean, sigma, levels) for sigma in sigmas], dim=1))
        if process.learned:
            assert prediction.variance is not None
            precise = Prediction(x_0_hat.double(), prediction.eps.double(), prediction.variance.double())
            own.append(model_terms(process, precise, x_0[part].double(), times[part], levels))
    squared_error, decoder_nats = (torch.cat(parts).cpu().numpy() for parts in (errors, nats))
    return Ledger(
        image, t, squared_error, weight, decoder_nats, torch.cat(own).cpu().numpy() if process.learned else None
    )


def list_all_times(T: int, images: int) -> Weighted:
    """Every t for each image."""
    return np.tile(np.arange(1, T + 1), (images, 1)), np.ones((images, T))


def uniform(T: int, v: Units) -> Drawn:
    """t uniform on 2..T."""
    t = np.clip(np.floor(2 + (T - 1) * v).astype(np.int64), 2, T)
    return t, np.full(t.shape, 1 / (T - 1))


def log_uniform(T: int, v: Units) -> Drawn:
    """t uniform in its logarithm: importance sampling for terms L_{t-1} that fall about as 1 / t."""
    span = math.log((T + 1) / 2)
    t = np.clip(np.floor(2 * np.exp(span * v)).astype(np.int64), 2, T)
    return t, np.log((t + 1) / t) / span


# From v uniform on [0, 1) to t in 2..T, increasing in v, and its probability p(t).
PROPOSALS: dict[str, Callable[[int, Units], Drawn]] = {
    "uniform": uniform,
    "log_uniform": log_uniform,
}


def draw_stratified_times(T: int, strata: int, images: int, noise: torch.Generator, proposal: str) -> Weighted:
    """t = 1, and one draw from each of `strata` equally likely parts of 2..T for each image.

    A term weighs 1 / (strata p(t)), so the weighted sum over t is unbiased for any network and proposal. Within a part
    the images' draws form a Latin hypercube, so that together they cover it evenly. With strata >= T - 1 it is every t
    once.
    """
    if strata >= T - 1:
        return list_all_times(T, images)
    t, probability = PROPOSALS[proposal](T, draw_strata(strata, images, noise))
    first = np.ones((images, 1))
    return np.concatenate([first.astype(np.int64), t], axis=1), np.concatenate([first, 1 / (strata * probability)], 1)


def draw_strata(strata: int, images: int, noise: torch.Generator) -> Float64[np.ndarray, "images strata"]:
    """Of each image one number from each of `strata` equal parts of [0, 1), a Latin hypercube within a part."""
    order = torch.stack([torch.randperm(images, generator=noise) for _ in range(strata)], dim=1)
    u = (order + torch.rand((images, strata), generator=noise, dtype=torch.float64)).numpy() / images
    return np.asarray((np.arange(strata) + u) / strata)


def estimate(
    process: Process,
    model: Model,
    x_0: NCHW,
    strata: int,
    levels: int | None,
    *where: int | str,
    clip: bool = True,
) -> Bound:
    """The bound of each of x_0 from `strata` timesteps per image; its noise lies at the address `where`."""
    t, weight = draw_stratified_times(process.T, strata, len(x_0), make_generator(*where, "t"), "log_uniform")
    image = np.repeat(np.arange(len(x_0)), t.shape[1])
    noise = make_generator(*where, "eps", device=x_0.device)
    of_pairs = take_rows(model, torch.from_numpy(image))
    rows, weight = (image, t.reshape(-1)), weight.reshape(-1)
    ledger = measure_pairs(process, of_pairs, x_0[image], *rows, weight=weight, noise=noise, levels=levels, clip=clip)
    return compute_bound(process, ledger, compute_squared_norms(x_0), x_0[0].numel())


def compute_squared_norms(x_0: NCHW) -> Doubles:
    """|x_0|^2."""
    return np.asarray(x_0.double().square().flatten(1).sum(1).cpu().numpy())
