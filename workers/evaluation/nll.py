"""The likelihoods of a summary: bounds in bits/dim of the images, by whatever is diffused, and their protocols."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float64

from workers.bits import name_likelihood
from workers.config import Measurement
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.hierarchy import StageTerms, bound_images
from workers.diffusion.integral import RealLedger, compute_integral_bound, find_ends
from workers.diffusion.ledger import (
    OPTIMAL,
    Bound,
    Ledger,
    compute_bits_by_t,
    compute_bound,
    compute_chain_bound,
    compute_rate_distortion,
    compute_standard_error,
    list_shorter_chains,
)
from workers.diffusion.likelihood import compute_squared_norms
from workers.diffusion.process import FIXED, Process
from workers.evaluation import blocks
from workers.evaluation.blocks import Images, count_strata
from workers.evaluation.rates import describe_values, name_with_error

BETWEEN = "real t, log sigma_t linear between trained t"  # of what solves the ODE with levels of its own
HIERARCHY = "-log q(x, z) / p(x, z) of z ~ q(z | x), one an image: a bound in bits a dimension of the image"


@dataclass(frozen=True)
class Diffused:
    """The images that the bound is measured on, as the model diffuses them, and what its first stage said of them."""

    norms: Float64[np.ndarray, "images"]  # |x_0|^2
    dimensions: int
    levels: int | None
    terms: StageTerms | None
    of_image: int  # dimensions

    def lift(self, bound: Bound) -> Bound:
        """The bound of the images, from that of what is diffused."""
        return bound_images(bound, self.terms, self.of_image) if self.terms else bound

    @property
    def share(self) -> float:
        """What a bit a dimension of what is diffused is a dimension of the image."""
        return self.dimensions / self.of_image

    def describe(self, decoder: str) -> dict[str, str]:
        """Of a protocol: how x_0_hat and the decoder at the least noise are taken."""
        kind = "discrete" if self.levels else "Gaussian density"
        if self.terms is None:
            return {"x_0_hat": "clipped to [-1, 1]", "decoder": f"{kind}{decoder}"}
        return {"x_0_hat": "not clipped", "decoder": f"{kind} of latents{decoder}", "hierarchy": HIERARCHY}


def describe_diffused(m: Measurement, dataset: Dataset, encoded: list[pa.Table]) -> Diffused:
    n, of_image = blocks.count_nll_images(m, Images.of(dataset)), math.prod(dataset.shape)
    if encoded:
        terms = StageTerms.join(encoded, n)
        return Diffused(terms.squared_norm, int(terms.dimensions[0]), None, terms, of_image)
    x_0 = to_model(torch.from_numpy(np.array(dataset.held_out[:n])), dataset.levels)
    return Diffused(compute_squared_norms(x_0), of_image, dataset.levels, None, of_image)


def _name_bound(name: str, bound: Bound) -> dict[str, float]:
    """A bound and its parts as metrics; of a model of latents their rate, of which all but the distortion are parts."""
    parts = {part: getattr(bound, part) for part in ("prior", "diffusion", "decoder", "posterior")}
    means = {part: float(by_image.mean()) for part, by_image in parts.items() if by_image is not None}
    found = {
        **name_with_error(f"eval/{name}_bpd", bound.mean, bound.standard_error),
        **{f"eval/{name}_{part}_bpd": mean for part, mean in means.items()},
    }
    if bound.distortion is None:
        return found
    how, density = "continuous_" * name.startswith("continuous"), "density_" * name.endswith("density")
    return {
        **found,
        f"eval/{how}rate_bpd": sum(means.values()),
        f"eval/{density}distortion_bpd": float(bound.distortion.mean()),
    }


def summarise_integral(
    m: Measurement, dataset: Dataset, process: Continuous, whole: RealLedger, diffused: Diffused
) -> dict[str, Any]:
    """The bound in continuous time, which has a name and a protocol of its own."""
    nll, strata, n = m.evaluation.nll, count_strata(m), len(diffused.norms)
    assert nll and strata is not None
    name = name_likelihood(dataset.levels)
    bound = compute_integral_bound(process, whole.take_first(n), diffused.norms, diffused.dimensions)
    bound, (low, high) = diffused.lift(bound), find_ends(process, diffused.levels)
    protocol = {
        "version": blocks.VERSION, "data": dataset.digest, "split": "held_out", "images": n,
        **describe_values(dataset), "dropped": 0, "time": f"continuous, sigma from {low:.4g} to {high:.4g}",
        "timesteps": f"{strata + 1}, {nll.proposal}", "precision": m.evaluation.precision,
        **diffused.describe(" around x_0_hat with the least sigma"),
    }  # fmt: skip
    return {
        "metrics": _name_bound(f"continuous_{name}", bound),
        "passports": {"nll": {"protocol": protocol}},
        f"{name}_per_image": bound.total.tolist(),
    }


def summarise_likelihood(
    m: Measurement, dataset: Dataset, process: Process, whole: Ledger, diffused: Diffused
) -> dict[str, Any]:
    norms, dimensions, n = diffused.norms, diffused.dimensions, len(diffused.norms)
    ledger, name = whole.take_first(n), name_likelihood(dataset.levels)
    result = diffused.lift(compute_bound(process, ledger, norms, dimensions))
    metrics = _name_bound(name, result)
    sampled, nll = count_strata(m), m.evaluation.nll
    assert nll
    protocol = {
        "version": blocks.VERSION, "data": dataset.digest, "split": "held_out", "images": n,
        **describe_values(dataset), "dropped": 0,
        "timesteps": "all" if sampled is None else f"{sampled + 1}, {nll.proposal}",
        "precision": m.evaluation.precision, **diffused.describe("; a fixed sigma_1^2 is beta_tilde_2"),
    }  # fmt: skip
    by_image = {f"{name}_per_image": result.total.tolist()}
    found = {"metrics": metrics, "passports": {"nll": {"protocol": protocol}}, **by_image}
    if sampled is not None:
        return found
    chains: dict[str, list[dict[str, Any]]] = {
        variance: [
            {"steps": steps, "bpd": b.mean, "bpd_se": b.standard_error}
            for steps in list_shorter_chains(process.T)
            for b in [diffused.lift(compute_chain_bound(process, ledger, norms, dimensions, variance, steps=steps))]
        ]
        for variance in dict.fromkeys([*([] if process.learned else [process.variance]), *FIXED, OPTIMAL])
    }
    if process.learned:
        whole_chain = {"steps": process.T, "bpd": result.mean, "bpd_se": result.standard_error}
        chains = {process.variance: [whole_chain], **chains}
    best = chains[OPTIMAL][0]
    metrics |= name_with_error(f"eval/{name}_optimal_variance_bpd", best["bpd"], best["bpd_se"])
    by_t = (diffused.share * compute_bits_by_t(process, ledger, norms, dimensions)).tolist()
    found |= {"nll_by_t": by_t, "ledger": chains}
    if diffused.terms:  # a distortion of latents is none of images
        return found
    rate, distortion = compute_rate_distortion(process, ledger, norms, dimensions)
    return found | {"rate_distortion": {"rate_bpd": rate.tolist(), "rmse_255": distortion.tolist()}}


def summarise_ode_likelihood(
    m: Measurement, dataset: Dataset, process: AnyProcess, table: pa.Table, terms: StageTerms | None
) -> dict[str, Any]:
    """By the exact density of what is diffused; that of latents stands in the place of its bound."""
    ode, n = m.evaluation.ode_nll, len(table)
    assert ode
    nats = table["nats"].to_numpy() + (terms.posterior + terms.distortion if terms else 0)
    bits = nats / (np.prod(dataset.shape) * np.log(2))
    name = f"ode_{name_likelihood(dataset.levels)}"
    metrics = name_with_error(f"eval/{name}_bpd", float(bits.mean()), compute_standard_error(bits))
    protocol = {
        "version": blocks.VERSION, "data": dataset.digest, "split": "held_out", "images": n,
        **describe_values(dataset), "dropped": 0, "trace": f"Hutchinson's, {ode.probes} of +-1",
        **({"hierarchy": HIERARCHY} if terms else {"dequantised": _describe_dequantised(dataset)}),
        "solver": f"Dormand-Prince from sigma_1 to sigma_T, tolerance {ode.tolerance:g}",
        "times": describe_times(process, "whole"),
        "x_0_hat": "not clipped",
    }  # fmt: skip
    return {"metrics": metrics, "passports": {"ode_nll": {"protocol": protocol}}, f"{name}_per_image": bits.tolist()}


def _describe_dequantised(dataset: Dataset) -> str:
    return "uniformly over a level's bin" if dataset.levels else "not, as the data are not discrete"


def describe_times(process: AnyProcess, form: str) -> str:
    """At which t a sampler of this form asks the network; of a chain's step it goes without saying."""
    if isinstance(process, Continuous):
        return "real t, as trained"
    return {"step": "", "levels": "levels moved to the nearest trained t"}.get(form, BETWEEN)
