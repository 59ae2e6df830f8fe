"""What the blocks of an autoencoder add up to: its bound as rate and distortion, and what its passports say."""

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from workers.bits import name_likelihood
from workers.config import Measurement
from workers.data.dataset import Dataset
from workers.data.ranges import compute_unit_bits, show_span
from workers.diffusion.ledger import compute_standard_error
from workers.evaluation import blocks
from workers.network.autoencoder import Autoencoder
from workers.network.autoencoder_config import ADVERSARIAL, BETA, find_latent_size
from workers.network.checkpoint import load_decoder
from workers.network.manifest import Checkpoint

FROM_PRIOR = "x_hat of z from N(0, I), by one pass of the decoder"  # how samples are drawn without a process


@dataclass(frozen=True)
class Stage:
    """What a passport says of an autoencoder, or of a generator, which has no p(x | z)."""

    family: str
    law: str
    scale: float
    beta: float | None  # that it was trained with; None of a folder that does not say
    latents: tuple[int, int, int]  # channels, height, width
    adversarial: float | None = None  # what a discriminator counted in its training

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Stage":
        """Raises CheckpointError."""
        network = load_decoder(checkpoint)
        if not isinstance(network, Autoencoder):
            return Stage(checkpoint.family, "", 0.0, None, find_latent_size(network.config))
        beta, scale = network.config.get(BETA), float(network.log_scale.detach().exp())
        latents, game = find_latent_size(network.config), network.config.get(ADVERSARIAL)
        return Stage(checkpoint.family, network.law, scale, beta, latents, game)

    def describe(self) -> dict[str, Any]:
        of = {"model": self.family, "latents": list(self.latents)}
        if not self.law:
            return {**of, "bound": "none: a generator has no likelihood"}
        beta = "unknown" if self.beta is None else f"{self.beta:g}"
        p = f"{self.law}, scale {self.scale:.4g}"
        game = {} if self.adversarial is None else {"discriminator": f"counts {self.adversarial:g}"}
        return {**of, "trained with beta": beta, **game, "p(x | z)": p}


def summarise_rates(m: Measurement, dataset: Dataset, table: pa.Table) -> dict[str, Any]:
    """The bound at beta = 1, whatever was trained, and its two parts, of the first images of the table."""
    n, name = len(table), name_likelihood(dataset.levels)
    unit = 1 / (math.prod(dataset.shape) * math.log(2))
    rate, distortion = (table[column].to_numpy() * unit for column in ("rate", "distortion"))
    bits, density = rate + distortion, "density_" if name == "density" else ""
    metrics = {
        **name_with_error(f"eval/{name}_bpd", float(bits.mean()), compute_standard_error(bits)),
        "eval/rate_bpd": float(rate.mean()),
        f"eval/{density}distortion_bpd": float(distortion.mean()),
    }
    protocol = {
        "version": blocks.VERSION, "data": dataset.digest, "split": "held_out", "images": n,
        **describe_values(dataset), "dropped": 0, "precision": m.evaluation.precision,
        "bound": "ELBO of an autoencoder at beta = 1, one z of each image",
        "decoder": f"{'density' if density else 'discrete'} around x_hat, its scale learned",
    }  # fmt: skip
    return {"metrics": metrics, "passports": {"nll": {"protocol": protocol}}, f"{name}_per_image": bits.tolist()}


def name_with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    """A metric and its standard error, where it has one."""
    return {name: value} if error is None else {name: value, f"{name}_se": error}


def describe_values(dataset: Dataset) -> dict[str, Any]:
    """Of a protocol: which values a likelihood is of, and of a density also in which units, and in the data's own."""
    if dataset.levels is not None:
        return {"levels": dataset.levels}
    assert dataset.span
    return {
        "values": f"real; {show_span(dataset.span, 9)} is [-1, 1]",
        "units": f"of the density on [-1, 1]; add {compute_unit_bits(dataset.span):.9g} bits/dim for the data's own",
    }
