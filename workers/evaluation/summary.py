"""What the blocks of an evaluation add up to: metrics, their passports, and a hash of all that went into them.

    {"metrics": {"eval/nll_bpd": ...}, "passports": {"nll": ..., "samples": ...}, "hash": ...,
     "nll_per_image": [...], "nll_by_t": [...], "ledger": {...}, "rate_distortion": {...}, "curve": {...}}

The hash is of the values of all blocks and of how they were measured; a measurement of nothing has none.
A passport has two parts: `protocol`, how it was measured, and `subject`, what was. Two numbers may stand beside each
other where their protocols are equal. The likelihoods of data that are not discrete are densities, and have names of
their own: eval/density_bpd, density_per_image, eval/ode_density_bpd.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from workers.config import FIDConfig, Measurement
from workers.data.dataset import Dataset
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.hierarchy import StageTerms
from workers.diffusion.integral import RealLedger
from workers.diffusion.ledger import Ledger
from workers.diffusion.process import Process
from workers.evaluation import blocks, fidelity
from workers.evaluation.blocks import (
    Block,
    Images,
    count_reference_images,
    describe_weights,
    list_reference_blocks,
    make_measure_suffix,
    name_distance,
    name_reconstruction_distance,
)
from workers.evaluation.features import FeatureSpace
from workers.evaluation.frechet import (
    compute_distance,
    estimate_sampling_error,
    extrapolate_distance,
    find_least_to_extrapolate,
    merge_moments,
)
from workers.evaluation.inception import Inception
from workers.evaluation.make import make_measured_process, read_block
from workers.evaluation.nll import (
    describe_diffused,
    describe_times,
    summarise_integral,
    summarise_likelihood,
    summarise_ode_likelihood,
)
from workers.evaluation.rates import FROM_PRIOR, Stage, name_with_error, summarise_rates
from workers.identity import describe_sampler
from workers.kinds import MEASURES, SAMPLERS
from workers.passes import count_evaluations
from workers.shapes import Features
from workers.storage import Storage

Blocks = list[Float[np.ndarray, "_ d"]]  # of features

# What a network was told, for the passport: by what it was told, of images and of samples.
TOLD = {
    "labels": "each image's own, so that the bound is one of its class",
    "vectors": "each image's own, so that the bound is of the image given its vectors",
}
DRAWN = {
    "labels": "in the proportions of the training images, by the sample's number",
    "vectors": "those of the training images in the data's order, by the sample's number",
}
NEIGHBOURS = 10_000  # samples and images that precision and recall take at most: their cost grows with the square


def summarise(
    storage: Storage,
    m: Measurement,
    dataset: Dataset,
    process: AnyProcess | Stage,
    checkpoint: str,
    *,
    space: FeatureSpace | None,
) -> dict[str, Any]:
    """The metrics of a checkpoint from its blocks, all of which must be there. Raises DamagedBlock.

    A `Stage` stands in the place of the process where the network is no denoiser.

    `metrics` maps MLflow's names to numbers. Of the rest, what was not asked for is left out.
    """
    sha256 = hashlib.sha256()

    def read(block: Block) -> pa.Table:
        table = read_block(storage, block)
        _add_to_digest(sha256, table)
        return table

    process = process if isinstance(process, Stage) else make_measured_process(m, process)
    subject = {"checkpoint": checkpoint, **describe_weights(m), **process.describe(), "seed": m.seed}
    conditional = {str(m.told): TOLD[m.told]} if m.told else {}
    summary: dict[str, Any] = {"metrics": {}, "passports": {}}
    images = Images.of(dataset)
    encoded = [read(block) for block in blocks.list_latent_blocks(m, checkpoint, images)]
    if m.evaluation.nll:
        tables = [read(block) for block in blocks.list_nll_blocks(m, checkpoint, images)]
        _add(summary, _summarise_bound(m, dataset, process, tables, encoded))
        one_step = {}
        if isinstance(process, Process) and process.T == 1 and not process.learned:
            one_step = {"sigma_1^2": "beta_1: there is no beta_tilde_2"}
        summary["passports"]["nll"]["subject"] = subject | conditional | one_step
    if m.evaluation.ode_nll and not isinstance(process, Stage):
        n = blocks.count_ode_nll_images(m, images)
        tables = [read(block) for block in blocks.list_ode_nll_blocks(m, checkpoint, images)]
        terms = StageTerms.join(encoded, n) if encoded else None
        _add(summary, summarise_ode_likelihood(m, dataset, process, pa.concat_tables(tables).slice(0, n), terms))
        mean = _average_evaluations(tables, n)
        summary["passports"]["ode_nll"]["subject"] = {**subject, **conditional, "network_evaluations": mean}
    if m.evaluation.fid:
        assert space
        _add(summary, _summarise_samples(m, dataset, process, checkpoint, read=read, space=space, subject=subject))
    if m.reconstructs:
        assert space
        _add(summary, _summarise_reconstructions(m, dataset, checkpoint, read, space))
        summary["passports"]["reconstructions"]["subject"] = subject
    if not m.evaluation.measures:
        return summary
    # The same blocks give other numbers where fewer images of the last are asked for.
    protocols = {kind: passport["protocol"] for kind, passport in summary["passports"].items()}
    sha256.update(json.dumps(protocols, sort_keys=True).encode())
    return {**summary, "hash": sha256.hexdigest()[:16]}


def _summarise_bound(
    m: Measurement,
    dataset: Dataset,
    process: AnyProcess | Stage,
    tables: list[pa.Table],
    encoded: list[pa.Table],
) -> dict[str, Any]:
    """`encoded` is what the first stage of a model of latents has measured."""
    if isinstance(process, Stage):
        n = blocks.count_nll_images(m, Images.of(dataset))
        return summarise_rates(m, dataset, pa.concat_tables(tables).slice(0, n))
    diffused = describe_diffused(m, dataset, encoded)
    if isinstance(process, Continuous):
        return summarise_integral(m, dataset, process, RealLedger.join(tables), diffused)
    whole = Ledger.join([Ledger.from_table(t) for t in tables])
    return summarise_likelihood(m, dataset, process, whole, diffused)


def _summarise_reconstructions(
    m: Measurement, dataset: Dataset, checkpoint: str, read: Callable[[Block], pa.Table], space: FeatureSpace
) -> dict[str, Any]:
    """The distance of held-out images as they are made again to these images themselves."""
    fid, images = m.evaluation.fid, Images.of(dataset)
    assert fid
    n = blocks.count_reconstructions(m, images)
    made, real = (
        np.concatenate([_stack_features(read(block)) for block in part])[:n]
        for part in blocks.list_reconstruction_features(m, checkpoint, images)
    )
    name, (ours, theirs) = name_reconstruction_distance(fid), (merge_moments([part]) for part in (made, real))
    metrics = {f"eval/{name}": compute_distance(ours, theirs)}
    if not ours.singular:
        metrics[f"eval/{name}_se"] = estimate_sampling_error(made, theirs)
    protocol = {
        "version": blocks.VERSION, "features": fid.features, "features_digest": space.digest, "data": dataset.digest,
        "split": "held_out", "images": n, "reconstructions": "x_hat of one z from q(z | x), to the images themselves",
        "precision": m.evaluation.precision, "quantised": _describe_quantised(fid, dataset), "dropped": 0,
    }  # fmt: skip
    return {"metrics": metrics, "passports": {"reconstructions": {"protocol": protocol}}}


def _summarise_samples(
    m: Measurement,
    dataset: Dataset,
    process: AnyProcess | Stage,
    checkpoint: str,
    *,
    read: Callable[[Block], pa.Table],
    space: FeatureSpace,
    subject: dict[str, Any],
) -> dict[str, Any]:
    """What is measured of samples, and how they were drawn."""
    fid, images = m.evaluation.fid, Images.of(dataset)
    assert fid
    samples = [_stack_features(read(b)) for b in blocks.list_feature_blocks(m, checkpoint, images)]
    real = [_stack_features(read(b)) for b in list_reference_blocks(m, images)]
    last = fid.samples - (len(samples) - 1) * blocks.SAMPLES
    last_real = count_reference_images(fid, images) - (len(real) - 1) * blocks.REAL
    samples[-1], real[-1] = samples[-1][:last], real[-1][:last_real]
    found = _summarise_fidelity(m, fid, dataset, space, samples=samples, real=real)
    passport = found["passports"]["samples"]
    if isinstance(process, Stage):
        passport["protocol"] |= {"sampler": FROM_PRIOR, "x_0_hat": "not clipped"}
        passport["subject"] = {**subject, "network_evaluations": 1}
        found["metrics"]["eval/network_evaluations"] = 1.0
        return found
    if times := describe_times(process, SAMPLERS[fid.sampler.kind].form):
        passport["protocol"]["times"] = times
    count: float | None = count_evaluations(fid.sampler, process.T)
    if count is None:
        count = _average_evaluations([read(b) for b in blocks.list_sample_blocks(m, checkpoint, images)], fid.samples)
    drawn = {str(m.told): DRAWN[m.told]} if m.told else {}
    passport["subject"] = {**subject, **drawn, "network_evaluations": count}
    found["metrics"]["eval/network_evaluations"] = count
    return found


def _add_to_digest(sha256: Any, table: pa.Table) -> None:
    """The values of a table, and not how Parquet happened to encode them."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        values = column.flatten() if pa.types.is_list(column.type) else column
        sha256.update(name.encode())
        if pa.types.is_binary(values.type):
            sha256.update(b"".join(values.to_pylist()))
        else:
            sha256.update(values.to_numpy(zero_copy_only=False).tobytes())


def _add(summary: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        summary[name] = {**summary[name], **value} if name in ("metrics", "passports") else value


def _average_evaluations(tables: list[pa.Table], n: int) -> float:
    """Evaluations of the network an image, over the first n rows."""
    return float(np.concatenate([table["evaluations"].to_numpy() for table in tables])[:n].mean())


def _summarise_fidelity(
    m: Measurement, fid: FIDConfig, dataset: Dataset, space: FeatureSpace, *, samples: Blocks, real: Blocks
) -> dict[str, Any]:
    ours, theirs, name = merge_moments(samples), merge_moments(real), name_distance(fid)
    features, sampler = np.concatenate(samples), SAMPLERS[fid.sampler.kind]
    metrics = {f"eval/{name}": compute_distance(ours, theirs)}
    assert (ours.n, theirs.n) == (fid.samples, count_reference_images(fid, Images.of(dataset))), (ours.n, theirs.n)
    protocol = {
        "version": blocks.VERSION, "features": fid.features, "features_digest": space.digest,
        "dimensions": len(ours.mean),
        "reference": f"{dataset.digest} {fid.reference}", "reference_images": theirs.n, "samples": ours.n,
        "sampler": describe_sampler(fid.sampler), "precision": m.evaluation.precision,
        "x_0_hat": "clipped to [-1, 1]" if sampler.clips and not m.latent else "not clipped",
        "quantised": _describe_quantised(fid, dataset), "dropped": 0,
    }  # fmt: skip
    warnings = [
        f"{count} {what} are not more than the {len(ours.mean)} dimensions of {fid.features}: their covariance is "
        "singular, and most of the distance may be their small number"
        for what, count, moments in (("samples", ours.n, ours), ("reference images", theirs.n, theirs))
        if moments.singular
    ]
    found: dict[str, Any] = {
        "metrics": metrics,
        "passports": {"samples": {"protocol": protocol, "also": {}, "warnings": warnings}},
    }
    if not ours.singular:
        metrics[f"eval/{name}_se"] = estimate_sampling_error(features, theirs)
    if ours.n >= find_least_to_extrapolate(len(ours.mean)):
        curve = extrapolate_distance(features, theirs)
        metrics |= {f"eval/{name}_infinity": curve.distance, f"eval/{name}_infinity_se": curve.standard_error}
        found["curve"] = asdict(curve)
    if fid.features == "inception":
        protocol["resize"] = "to 299, bilinear, as TensorFlow 1 does"
    for other in fid.also:
        suffix = make_measure_suffix(fid, other)
        values, how = MEASURES[other].load()(space, features, real)
        for key, (value, error) in values.items():
            metrics |= name_with_error(f"eval/{key}{suffix}", value, error)
        found["passports"]["samples"]["also"][other] = how
    return found


def _describe_quantised(fid: FIDConfig, dataset: Dataset) -> str:
    if dataset.levels is not None:
        return f"{fid.quantise} to {dataset.levels} levels"
    seen = "; both rounded to 256 levels for Inception" if fid.features == "inception" else ""
    return f"not, as the data are not discrete; samples clipped to [-1, 1]{seen}"


# Metrics with their standard errors, where there are any; and how they were measured, for the passport.
Found = tuple[dict[str, tuple[float, float | None]], str]


def kid(space: FeatureSpace, samples: Features, real: Blocks) -> Found:
    data = np.concatenate(real)
    found = fidelity.compute_kid(samples, data)
    values = {"kid": (found.mean, fidelity.estimate_kid_error(samples, data))}
    return values, f"{found.subsets} subsets of {found.subset_size}, error by {fidelity.PARTS} disjoint parts"


def precision_recall(space: FeatureSpace, samples: Features, real: Blocks) -> Found:
    data = np.concatenate(real)[:NEIGHBOURS]
    found = fidelity.compute_precision_recall(samples[:NEIGHBOURS], data)
    how = f"k = 3, first {min(len(samples), NEIGHBOURS)} samples and {len(data)} images"
    return {"precision": (found.precision, None), "recall": (found.recall, None)}, how


def inception_score(space: FeatureSpace, samples: Features, real: Blocks) -> Found:
    assert isinstance(space, Inception)
    score = fidelity.compute_inception_score(space.compute_logits(samples))
    return {"inception_score": (score.mean, None)}, f"10 splits, standard deviation over them {score.std:.4f}"


def _stack_features(table: pa.Table) -> Features:
    column = table["features"].combine_chunks()
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1))
