"""The bound of a hierarchy: latents z of an autoencoder, and a diffusion model of them.

    -log p(x) <= E_q[-log p(x | z)] + E_q[log q(z | x)] + E_q[-log p(z)],    z ~ q(z | x)

(Kingma & Welling 2014, eq. 3), each estimated by one z of each image. The third is bounded by the diffusion model's own
bound of the density of z. Densities of z are on the scale on which it is diffused: another scale adds to the second
term what it takes from the third.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from workers.diffusion.ledger import Bound
from workers.shapes import NCHW, PerImage64

Ints = Int64[np.ndarray, "images"]
PerRow = Float64[np.ndarray, "images"]


@dataclass(frozen=True)
class StageTerms:
    """What the autoencoder has measured of images: a row an image, in nats, and |z|^2 of the latents drawn of it."""

    image: Ints
    dimensions: Ints  # of the latents
    distortion: PerRow  # -log p(x | z)
    posterior: PerRow  # log q(z | x)
    squared_norm: PerRow

    def make_table(self) -> pa.Table:
        return pa.table({name: getattr(self, name) for name in self.__dataclass_fields__})

    @staticmethod
    def join(tables: list[pa.Table], images: int) -> "StageTerms":
        """The rows of the images 0 .. images - 1, in their order."""
        table = pa.concat_tables(tables)
        order = np.argsort(table["image"].to_numpy(), kind="stable")[:images]
        return StageTerms(**{name: table[name].to_numpy()[order] for name in StageTerms.__dataclass_fields__})


def posterior_term(log_variance: NCHW, eps: NCHW) -> PerImage64:
    """log q(z | x) of z = mean + standard deviation * eps, in nats.

    Of the one z that is drawn, and not minus the posterior's entropy: where q is near p(z | x), what the three terms
    owe to the draw is nearly the same in all, and so cancels in their sum.
    """
    return -0.5 * (eps.double().square() + math.log(2 * math.pi) + log_variance.double()).flatten(1).sum(1)


def bound_images(bound: Bound, terms: StageTerms, dimensions: int) -> Bound:
    """The bound of images of so many dimensions, from that of their latents in bits a dimension."""
    share, unit = terms.dimensions / dimensions, dimensions * math.log(2)
    own = {name: getattr(bound, name) * share for name in ("prior", "diffusion", "decoder")}
    return replace(bound, **own, posterior=terms.posterior / unit, distortion=terms.distortion / unit)
