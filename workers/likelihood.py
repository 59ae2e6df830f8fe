"""Bits/dim of images under a checkpoint: squared errors by the network, then the bound by arithmetic.

`pair_errors` is the only part that evaluates the network: it turns (image, t) pairs into |x_0 - x_0_hat|^2, and the
pairs at t = 1 into decoder terms. `Ledger` collects them; `per_image_bpd` sums the bound of eq. (5) from it.
All calls batch pairs of any t together.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.diffusion.bound import decoder_term, diffusion_terms, prior_term
from workers.diffusion.process import EpsModel, Process
from workers.noise import generator

BATCH = 250  # pairs a network evaluation


@dataclass(frozen=True)
class Ledger:
    """What was measured of (image, t) pairs: float64 and int64 arrays of one length, a row a pair."""

    image: np.ndarray
    t: np.ndarray
    squared_error: np.ndarray  # |x_0 - x_0_hat(x_t, t)|^2, summed over the dimensions
    decoder_nats: np.ndarray  # L_0 at t = 1, else 0
    weight: np.ndarray  # of the term in the sum over t: 1 where every t is measured

    @staticmethod
    def join(parts: list["Ledger"]) -> "Ledger":
        """The rows of all parts in order of (image, t), whatever the order of the parts."""
        columns = [np.concatenate(c) for c in zip(*(vars(p).values() for p in parts), strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        return Ledger(*(c[order] for c in columns))


@dataclass(frozen=True)
class Bound:
    """The bound in bits/dim, image by image; each array float64 (images,). Their sum is `total`."""

    prior: np.ndarray  # L_T
    diffusion: np.ndarray  # sum over t > 1 of L_{t-1}
    decoder: np.ndarray  # L_0

    @property
    def total(self) -> np.ndarray:
        return np.asarray(self.prior + self.diffusion + self.decoder)

    @property
    def mean(self) -> float:
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean over images; it contains the error from sampled timesteps. 0 for a single image."""
        n = len(self.total)
        return float(self.total.std(ddof=1) / n**0.5) if n > 1 else 0.0


@torch.no_grad()
def pair_errors(
    process: Process,
    eps_theta: EpsModel,
    x_0: Tensor,
    image: np.ndarray,
    t: np.ndarray,
    weight: np.ndarray,
    noise: torch.Generator,
    levels: int,
    clip: bool = True,
) -> Ledger:
    """Measures the pairs (x_0[k], t[k]): x_0 float32 (N, C, H, W), t in 1..T; `image` and `weight` go to the ledger.

    The noise of all pairs is drawn from `noise` in their order, so BATCH's split changes nothing but rounding.
    """
    eps = torch.randn(x_0.shape, generator=noise, device=noise.device).to(x_0.device)
    times = torch.from_numpy(t).to(x_0.device)
    errors, nats = [], []
    for k in range(0, len(t), BATCH):
        part = slice(k, k + BATCH)
        x_t = process.q_sample(x_0[part], times[part], eps[part])
        eps_hat = eps_theta(x_t, times[part]).to(x_t.dtype)
        x_0_hat = process.predict_x_0(x_t, times[part], eps_hat, clip)
        errors.append((x_0[part] - x_0_hat).double().square().flatten(1).sum(1))
        first = times[part] == 1
        decoder = torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
        if first.any():
            mean = process.posterior_mean(x_0_hat[first], x_t[first], times[part][first])
            sigma = float(process.sigma_squared[0].sqrt())
            decoder[first] = decoder_term(x_0[part][first], mean, sigma, levels)
        nats.append(decoder)
    return Ledger(image, t, torch.cat(errors).cpu().numpy(), torch.cat(nats).cpu().numpy(), weight)


def bound(process: Process, ledger: Ledger, squared_norm: np.ndarray, dimensions: int) -> Bound:
    """The bound of each image from its pairs: every t of 1..T, or t = 1 and a weighted sample of 2..T.

    `squared_norm` float64 (images,) is |x_0|^2 of the images in ascending order of their names in the ledger.
    """
    names, row = np.unique(ledger.image, return_inverse=True)
    assert len(names) == len(squared_norm)
    later = ledger.t > 1
    t, error = torch.from_numpy(ledger.t[later]), torch.from_numpy(ledger.squared_error[later])
    terms = diffusion_terms(process, t, error, dimensions).numpy()
    diffusion = np.bincount(row[later], weights=terms * ledger.weight[later], minlength=len(names))
    decoder = np.bincount(row, weights=ledger.decoder_nats, minlength=len(names))
    prior = prior_term(process, torch.from_numpy(squared_norm), dimensions).numpy()
    unit = dimensions * np.log(2)  # nats an image -> bits a dimension
    return Bound(prior / unit, diffusion / unit, decoder / unit)


def all_times(T: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Every t for each image: (t, weight), int64 and float64 (images, T)."""
    return np.tile(np.arange(1, T + 1), (images, 1)), np.ones((images, T))


def stratified_times(T: int, strata: int, images: int, noise: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """t = 1, and one draw from each of `strata` parts of 2..T for each image: (t, weight), (images, strata + 1).

    The parts are equally long in log t, since L_{t-1} falls about as 1 / t, and a term weighs 1 / (strata p(t)): the
    weighted sum is unbiased for any network. Within a part the images' draws form a Latin hypercube, so that together
    they cover it evenly. With strata >= T - 1 it is every t once.
    """
    if strata >= T - 1:
        return all_times(T, images)
    order = torch.stack([torch.randperm(images, generator=noise) for _ in range(strata)], dim=1)
    u = (order + torch.rand((images, strata), generator=noise, dtype=torch.float64)).numpy() / images
    span = math.log((T + 1) / 2)  # t is the whole part of 2 exp(span * uniform)
    t = np.clip(np.floor(2 * np.exp(span * (np.arange(strata) + u) / strata)).astype(np.int64), 2, T)
    weight = span / (strata * np.log((t + 1) / t))
    first = np.ones((images, 1))
    return np.concatenate([first.astype(np.int64), t], axis=1), np.concatenate([first, weight], axis=1)


def estimate(process: Process, eps_theta: EpsModel, x_0: Tensor, strata: int, levels: int, *where: int | str) -> Bound:
    """The bound of each of x_0 (N, C, H, W) from `strata` timesteps an image; its noise lies at the address `where`."""
    t, weight = stratified_times(process.T, strata, len(x_0), generator(*where, "t"))
    image = np.repeat(np.arange(len(x_0)), t.shape[1])
    noise = generator(*where, "eps", device=x_0.device)
    ledger = pair_errors(process, eps_theta, x_0[image], image, t.reshape(-1), weight.reshape(-1), noise, levels)
    return bound(process, ledger, squared_norms(x_0), x_0[0].numel())


def squared_norms(x_0: Tensor) -> np.ndarray:
    """|x_0|^2, float64 (N,)."""
    return np.asarray(x_0.double().square().flatten(1).sum(1).cpu().numpy())
