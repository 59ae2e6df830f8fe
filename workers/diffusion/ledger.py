"""The ledger of an evaluation: squared errors of (image, t) pairs, and all that follows from them by arithmetic.

`likelihood` fills it with the network, once. Whatever fixed variance p_theta has, every L_{t-1} depends on the
network only through |x_0 - x_0_hat(x_t)|^2, and so does the bound of any sub-chain of its times. So bits/dim for other
variances and shorter chains, and the rate-distortion curve, cost no further evaluation of the network. With a learned
variance the bound itself comes from a further column, the pairs' own terms.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float64, Int64

from workers.diffusion.bound import diffusion_terms, prior_term
from workers.diffusion.process import Process

Ints = Int64[np.ndarray, "n"]
Doubles = Float64[np.ndarray, "n"]
PerImage = Float64[np.ndarray, "images"]
ByTime = Float64[np.ndarray, "T"]
ByTerm = Float64[np.ndarray, "terms"]  # L_0, L_1, ..., L_T

# sigma_1^2 of the decoder, in multiples of that of a fixed variance: L_0 is measured at each, for its best value.
DECODER_FACTORS = 2.0 ** (np.arange(-8, 25) / 2)
OWN_FACTOR = 8  # the place of factor 1
OPTIMAL = "optimal"  # the isotropic variance that minimises the bound of the images measured
SHORTER = (1, 2, 5, 10, 20, 50)  # chains of T, T/2, ... steps
ROWS = ("image", "t", "squared_error", "weight")


@dataclass(frozen=True)
class Ledger:
    """What was measured of n pairs (image, t): a row a pair."""

    image: Ints
    t: Ints
    squared_error: Doubles  # |x_0 - x_0_hat(x_t, t)|^2, summed over the dimensions
    weight: Doubles  # of the term in the sum over t: 1 where every t is measured
    decoder_nats: Float64[np.ndarray, "images factors"]  # L_0 by sigma_1^2, for the rows at t = 1 in their order
    own_nats: Doubles | None = None  # L_{t-1} by a learned variance, L_0 at t = 1; None where it is fixed

    @staticmethod
    def join(parts: list["Ledger"]) -> "Ledger":
        """The rows of all parts in order of (image, t), whatever the order of the parts."""
        rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].rows}
        decoder_nats = np.concatenate([part.decoder_nats for part in parts])
        first = np.argsort(rows["image"][rows["t"] == 1], kind="stable")
        order = np.lexsort((rows["t"], rows["image"]))
        return Ledger(**{name: column[order] for name, column in rows.items()}, decoder_nats=decoder_nats[first])

    def take_first(self, images: int) -> "Ledger":
        """The rows of the images 0 .. images - 1."""
        keep, first = self.image < images, self.image[self.t == 1] < images
        rows = {name: getattr(self, name)[keep] for name in self.rows}
        return Ledger(**rows, decoder_nats=self.decoder_nats[first])

    @property
    def rows(self) -> tuple[str, ...]:
        """The columns that have a value a pair."""
        return ROWS if self.own_nats is None else (*ROWS, "own_nats")

    def diffusion_nats(self, process: Process, dimensions: int) -> Float64[np.ndarray, "later"]:
        """L_{t-1} of the pairs with t > 1 by the variance of the process, in their order."""
        later = self.t > 1
        if process.learned:
            assert self.own_nats is not None
            return self.own_nats[later]
        t, error = torch.from_numpy(self.t[later]), torch.from_numpy(self.squared_error[later])
        return np.asarray(diffusion_terms(process, t, error, dimensions).numpy())

    def own_decoder_nats(self, process: Process) -> PerImage:
        """L_0 of each image by the variance of the process."""
        if process.learned:
            assert self.own_nats is not None
            return self.own_nats[self.t == 1]
        return np.asarray(self.decoder_nats[:, OWN_FACTOR])

    @property
    def images(self) -> int:
        return int(np.count_nonzero(self.t == 1))

    def list_errors(self) -> Float64[np.ndarray, "images T"]:
        """|x_0 - x_0_hat|^2 of a joined ledger with every t."""
        return self.squared_error.reshape(self.images, -1)

    def make_table(self) -> pa.Table:
        """A row a pair; the decoder's terms as a list that is empty for t > 1."""
        lengths = np.where(self.t == 1, len(DECODER_FACTORS), 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        nats = pa.ListArray.from_arrays(offsets, self.decoder_nats.reshape(-1))
        return pa.table({**{name: getattr(self, name) for name in self.rows}, "decoder_nats": nats})

    @staticmethod
    def from_table(table: pa.Table) -> "Ledger":
        rows = {name: table[name].to_numpy() for name in (*ROWS, "own_nats") if name in table.column_names}
        nats = table["decoder_nats"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return Ledger(**rows, decoder_nats=nats.reshape(-1, len(DECODER_FACTORS)))


@dataclass(frozen=True)
class Bound:
    """The bound in bits/dim, image by image. The parts' sum is `total`."""

    prior: PerImage  # L_T
    diffusion: PerImage  # sum over t > 1 of L_{t-1}
    decoder: PerImage  # L_0
    posterior: PerImage | None = None  # where latents are diffused, log q(z | x) (`hierarchy`)
    distortion: PerImage | None = None  # and -log p(x | z)

    @property
    def total(self) -> PerImage:
        of_stage = (part for part in (self.posterior, self.distortion) if part is not None)
        return np.asarray(sum(of_stage, self.prior + self.diffusion + self.decoder))

    @property
    def mean(self) -> float:
        return float(self.total.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the mean over images; it contains the error from sampled timesteps."""
        return compute_standard_error(self.total)


def compute_standard_error(by_image: PerImage) -> float | None:
    """Of the mean over images; of a single one there is none."""
    n = len(by_image)
    return float(by_image.std(ddof=1) / n**0.5) if n > 1 else None


def compute_bound(process: Process, ledger: Ledger, squared_norm: PerImage, dimensions: int) -> Bound:
    """The bound of each image from its pairs: every t of 1..T, or t = 1 and a weighted sample of 2..T.

    `squared_norm` is |x_0|^2 of the images in ascending order of their names in the ledger.
    """
    names, row = np.unique(ledger.image, return_inverse=True)
    assert len(names) == len(squared_norm)
    later = ledger.t > 1
    terms = ledger.diffusion_nats(process, dimensions)
    diffusion = np.bincount(row[later], weights=terms * ledger.weight[later], minlength=len(names))
    diffusion = diffusion.astype(np.float64)  # of no terms at all, where T = 1, bincount makes int64
    return _convert_to_bits(process, squared_norm, diffusion, ledger.own_decoder_nats(process), dimensions)


def compute_chain_bound(
    process: Process,
    ledger: Ledger,
    squared_norm: PerImage,
    dimensions: int,
    variance: str,
    *,
    steps: int | None = None,
) -> Bound:
    """The bound of p_theta with a fixed `variance` instead, along `steps` of the times, from a ledger with every t.

    The sub-chain is that of `Process.strided`, which keeps t = 1 and T. A fixed variance leaves the decoder as it is;
    with OPTIMAL sigma_t^2 = beta_tilde_t + c_t^2 E|x_0 - x_0_hat|^2 / D minimises the mean of each L_{t-1} (c_t weighs
    x_0 in mu_tilde_t; Bao et al. 2022, theorem 1), and sigma_1^2 is the best of DECODER_FACTORS. It is fitted to the
    images it is measured on: a number a timestep, against images x D terms.
    """
    own = process if variance == OPTIMAL else replace(process, variance=variance)
    chain = own.strided(steps)
    error = torch.from_numpy(ledger.list_errors()[:, chain.times.numpy() - 1])
    if variance == OPTIMAL:
        excess = chain.posterior_x_0.square() * error.mean(0) / dimensions
        sigma_squared, factor = chain.beta_tilde + excess, int(ledger.decoder_nats.mean(0).argmin())
    else:
        sigma_squared, factor = chain.sigma_squared, OWN_FACTOR
    t = torch.arange(2, chain.T + 1).expand(len(error), -1)
    diffusion = diffusion_terms(chain, t, error[:, 1:], dimensions, sigma_squared).sum(1).numpy()
    return _convert_to_bits(process, squared_norm, diffusion, ledger.decoder_nats[:, factor], dimensions)


def compute_bits_by_t(process: Process, ledger: Ledger, squared_norm: PerImage, dimensions: int) -> ByTerm:
    """L_0, L_1, ..., L_T in bits/dim, each the mean over the images of a ledger with every t."""
    diffusion = ledger.diffusion_nats(process, dimensions).reshape(ledger.images, process.T - 1).mean(0)
    prior = prior_term(process, torch.from_numpy(squared_norm), dimensions).numpy().mean()
    decoder = ledger.own_decoder_nats(process).mean()
    return np.asarray([decoder, *diffusion, prior]) / (dimensions * np.log(2))


def compute_rate_distortion(
    process: Process, ledger: Ledger, squared_norm: PerImage, dimensions: int
) -> tuple[ByTime, ByTime]:
    """(rate, distortion) of progressive lossy coding after x_T, x_{T-1}, ..., x_1 are sent.

    The rate in bits/dim is the sum of the terms L_T ... L_t, the distortion the root of the mean square of
    x_0 - x_0_hat(x_t) on the 0..255 scale: section 4.3 and appendix C of Ho et al. 2020.
    """
    terms = compute_bits_by_t(process, ledger, squared_norm, dimensions)
    rate = np.cumsum(terms[:0:-1])
    return rate, 127.5 * np.sqrt(ledger.list_errors().mean(0)[::-1] / dimensions)


def list_shorter_chains(T: int) -> list[int]:
    """T, T/2, T/5, ...: the numbers of steps that are worth telling, from the longest."""
    return sorted({max(2, T // k) for k in SHORTER if 2 * k <= T} | {T}, reverse=True)


def _convert_to_bits(
    process: Process, squared_norm: PerImage, diffusion: PerImage, decoder: PerImage, dimensions: int
) -> Bound:
    """Nats an image -> bits a dimension, with the prior's term."""
    prior = prior_term(process, torch.from_numpy(squared_norm), dimensions).numpy()
    unit = dimensions * np.log(2)
    return Bound(prior / unit, diffusion / unit, decoder / unit)
