"""The variational bound in continuous time, in nats, float64: Kingma et al. 2021, section 5.

For a denoiser that is asked at every noise level sigma between two ends it is the limit of many steps,

    L = KL(q(y_T | x_0) || p(y_T)) + 1/2 integral of E|eps - eps_hat|^2 over log SNR + E[-log p(x_0 | y_1)],

with y = x_0 + sigma eps, |eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2 and log SNR = -2 log sigma: however x_t is scaled
and t runs, it depends on the two ends alone (`find_ends`). The decoder p(x_0 | y_1) is that of eq. (13) of Ho et al.
2020 around x_0_hat, or a Gaussian density, with the standard deviation sigma_1 of the noise that is left.

`measure` evaluates the network, at sampled t: one of each stratum of a proposal for each image, weighted so that the
sum is unbiased for any network and proposal, and the least t for the decoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float64, Int64

from workers.diffusion.bound import decoder_term
from workers.diffusion.formulations import Continuous
from workers.diffusion.guidance import take_rows
from workers.diffusion.ledger import Bound
from workers.diffusion.likelihood import compute_squared_norms, count_pairs_at_once, draw_strata
from workers.diffusion.process import Model
from workers.noise import make_generator
from workers.shapes import NCHW

Ints = Int64[np.ndarray, "n"]
Doubles = Float64[np.ndarray, "n"]
PerImage = Float64[np.ndarray, "images"]
Pairs = Float64[np.ndarray, "images times"]
Units = Float64[torch.Tensor, "images strata"]  # in [0, 1)

# Of the distance between two levels: the least noise that the bound goes down to. Measured on EDM and a flow of the
# digits: 2.78 and 2.65 bits/dim at 0.1, 2.20 and 2.11 at 0.2, 2.06 and 1.99 at 0.3, 2.05 and 2.00 at 0.5.
LEAST = 0.3

# From the least t and the largest, and v in [0, 1), to t between them, rising in v.
PROPOSALS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "uniform": lambda first, last, v: first + (last - first) * v,
    "log_uniform": lambda first, last, v: first * (last / first) ** v,
}


@dataclass(frozen=True)
class RealLedger:
    """What was measured of n pairs of an image and a real t: a row a pair."""

    image: Ints
    t: Doubles
    nats: Doubles  # 1/2 |eps - eps_hat|^2, or where it `decodes` the decoder's
    weight: Doubles  # of the row in the sum over an image's
    decodes: Bool[np.ndarray, "n"]

    def make_table(self) -> pa.Table:
        return pa.table({name: getattr(self, name) for name in self.__dataclass_fields__})

    @staticmethod
    def join(tables: list[pa.Table]) -> "RealLedger":
        """The rows of all blocks in order of (image, t)."""
        table = pa.concat_tables(tables)
        rows = {n: table[n].to_numpy(zero_copy_only=False) for n in RealLedger.__dataclass_fields__}
        order = np.lexsort((rows["t"], rows["image"]))
        return RealLedger(**{name: column[order] for name, column in rows.items()})

    def take_first(self, images: int) -> "RealLedger":
        """The rows of the images 0 .. images - 1."""
        kept = self.image < images
        return RealLedger(**{name: getattr(self, name)[kept] for name in self.__dataclass_fields__})


def find_ends(process: Continuous, levels: int | None) -> tuple[float, float]:
    """The least and the largest noise level of the bound, on images of `levels` values, None being any.

    It is a bound from any least level on. The process's own may lie far below the distance of two levels, where a
    network that does not see so little noise pays half a nat a dimension for each unit of log SNR, which the decoder
    saves, as it knows the levels.
    """
    low, high = process.ends
    return (low if levels is None else max(low, LEAST * 2 / (levels - 1))), high


def draw_real_times(
    process: Continuous, ends: tuple[float, float], shape: tuple[int, int], noise: torch.Generator, proposal: str
) -> tuple[Pairs, Pairs]:
    """t and weights, both (images, 1 + strata): the t of the least noise level of `ends`, and one t of each of the
    strata of the proposal. `shape` is (images, strata).

    The weight of a sampled term is |d log SNR / dv| / strata, v being what the proposal makes t of.
    """
    images, strata = shape
    v = torch.from_numpy(draw_strata(strata, images, noise)).requires_grad_()
    first, last = process.time_at(torch.tensor(ends, dtype=torch.float64)).unbind()
    with torch.enable_grad():
        t = PROPOSALS[proposal](first, last, v)
        log_snr = -2 * process.noise_level_at(t).log()
        [slope] = torch.autograd.grad(log_snr.sum(), v)
    firsts, ones = np.full((images, 1), float(first)), np.ones((images, 1))
    weight = slope.abs().numpy() / strata
    return np.concatenate([firsts, t.detach().numpy()], 1), np.concatenate([ones, weight], 1)


@torch.no_grad()
def measure(
    process: Continuous,
    model: Model,
    x_0: NCHW,
    image: Ints,
    *,
    drawn: tuple[Pairs, Pairs],
    noise: torch.Generator,
    levels: int | None,
    clip: bool = True,
) -> RealLedger:
    """Measures each of x_0, which goes by the names `image` and has `levels` values, None being any, at times `drawn`.

    `model` is asked for the pairs as they lie in a row, an image after the other; x_0_hat is clipped to [-1, 1], unless
    x_0 goes beyond. The noise of all pairs is drawn from `noise` in their order, so that batches change nothing but
    rounding.
    """
    t, weight = drawn
    pairs, times = np.repeat(np.arange(len(x_0)), t.shape[1]), torch.from_numpy(t.reshape(-1)).to(x_0.device)
    eps = torch.randn((len(pairs), *x_0.shape[1:]), generator=noise, device=noise.device).to(x_0.device)
    decodes, nats, batch = np.arange(len(pairs)) % t.shape[1] == 0, [], count_pairs_at_once(x_0)
    for k in range(0, len(pairs), batch):
        part = slice(k, k + batch)
        clean, when = x_0[torch.from_numpy(pairs[part]).to(x_0.device)], times[part]
        prediction = take_rows(model, part)(process.q_sample(clean, when, eps[part]), when)
        x_0_hat = (prediction.x_0.clamp(-1, 1) if clip else prediction.x_0).double()
        sigma = process.noise_level_at(when)
        found = (clean - x_0_hat).square().flatten(1).sum(1) / (2 * sigma**2)
        first = torch.from_numpy(decodes[part]).to(x_0.device)
        if first.any():
            found[first] = decoder_term(clean[first], x_0_hat[first], find_ends(process, levels)[0], levels)
        nats.append(found)
    return RealLedger(image[pairs], t.reshape(-1), torch.cat(nats).cpu().numpy(), weight.reshape(-1), decodes)


def compute_integral_bound(process: Continuous, ledger: RealLedger, squared_norm: PerImage, dimensions: int) -> Bound:
    """The bound of each image, from |x_0|^2 of the images in ascending order of their names in the ledger."""
    names, row = np.unique(ledger.image, return_inverse=True)
    assert len(names) == len(squared_norm)
    nats, decodes = ledger.nats * ledger.weight, ledger.decodes
    diffusion, decoder = (
        np.bincount(row[part], weights=nats[part], minlength=len(names)) for part in (~decodes, decodes)
    )
    last = process.ends[1]
    variance = process.prior_variance(last)
    spread = last**2 / variance
    prior = 0.5 * (squared_norm / variance + dimensions * (spread - 1 - math.log(spread)))
    unit = dimensions * math.log(2)
    return Bound(prior / unit, diffusion / unit, decoder / unit)


def estimate_integral(
    process: Continuous,
    model: Model,
    x_0: NCHW,
    strata: int,
    levels: int | None,
    *where: int | str,
    clip: bool = True,
) -> Bound:
    """The bound of each of x_0 from `strata` times per image; its noise lies at the address `where`."""
    ends, shape = find_ends(process, levels), (len(x_0), strata)
    drawn = draw_real_times(process, ends, shape, make_generator(*where, "t"), "log_uniform")
    image, noise = np.arange(len(x_0)), make_generator(*where, "eps", device=x_0.device)
    of_pairs = take_rows(model, torch.from_numpy(np.repeat(image, strata + 1)))
    ledger = measure(process, of_pairs, x_0, image, drawn=drawn, noise=noise, levels=levels, clip=clip)
    return compute_integral_bound(process, ledger, compute_squared_norms(x_0), x_0[0].numel())
