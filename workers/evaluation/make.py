"""Making the blocks of an evaluation: each by anyone, anywhere, in any order, once.

A block's content is a function of its address alone: its shape is fixed and its noise is addressed, so the number of
tasks, their order and a retry change nothing. `blocks` says what there is to make, `summary` what it adds up to.
"""

import io
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64

from workers.config import FIDConfig, Measurement
from workers.data.dataset import Dataset
from workers.data.pixels import QUANTISERS, to_model
from workers.diffusion.flow import integrate_log_density
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.integral import draw_real_times, find_ends, measure
from workers.diffusion.likelihood import draw_stratified_times, list_all_times, measure_pairs
from workers.diffusion.samplers import draw
from workers.evaluation import blocks
from workers.evaluation.blocks import Block, count_strata, count_time_blocks
from workers.evaluation.features import FeatureSpace, load_feature_space
from workers.evaluation.loaded import LoadedModel, load_model, move_to_device
from workers.kinds import AUTOENCODER, GENERATOR
from workers.network import checkpoint as checkpoints
from workers.network.autoencoder import Autoencoder, FromLatents
from workers.network.autoencoder_config import find_latent_size
from workers.network.manifest import Checkpoint
from workers.noise import make_generator
from workers.passes import count_evaluations
from workers.precision import compute_in, round_products
from workers.seals import Damage, open_parquet, seal_parquet
from workers.shapes import NCHW, NHWC
from workers.storage import Storage

Ints = Int64[np.ndarray, "n"]
N = TypeVar("N", bound=torch.nn.Module)

SPACE = b"feature_space"  # the stamp of features, in a block's metadata
HOST = b"host"  # of the machine that made the block, in its metadata, which no hash of an evaluation counts


@dataclass(frozen=True)
class Bench:
    """What making a block takes; the model and the feature space are loaded where a block needs them."""

    storage: Storage
    m: Measurement
    dataset: Dataset
    checkpoint: Checkpoint
    device: torch.device

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(self.checkpoint, self.device, self.m.evaluation.precision)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return move_to_device(checkpoints.load_autoencoder(self.checkpoint), self.device)

    @cached_property
    def decoder(self) -> FromLatents:
        """Of a network that is no denoiser."""
        return move_to_device(checkpoints.load_decoder(self.checkpoint), self.device)

    @cached_property
    def space(self) -> FeatureSpace:
        assert self.m.evaluation.fid
        name, precision = self.m.evaluation.fid.features, self.m.evaluation.precision
        return load_feature_space(self.storage, self.dataset, name, self.device, precision)


def make_measured_process(m: Measurement, process: AnyProcess) -> AnyProcess:
    """The checkpoint's process with the variance that the measurement asks for."""
    if isinstance(process, Continuous):
        return process
    return replace(process, variance=m.evaluation.variance) if m.evaluation.variance else process


def make_nll_block(bench: Bench, block: Block) -> pa.Table:
    """|x_0 - x_0_hat|^2 and decoder terms of IMAGES x TIMES pairs: a row a pair. Of real t see `_make_integral`."""
    m, dataset, model = bench.m, bench.dataset, bench.model
    assert m.evaluation.nll and m.T == model.process.T, (m.T, model.process.T)
    if isinstance(model.process, Continuous):
        return _make_integral(bench, model.process, block)
    assert m.T is not None
    i, j = divmod(block.number, count_time_blocks(m))
    image = np.arange(i * blocks.IMAGES, min((i + 1) * blocks.IMAGES, len(dataset.held_out)))
    where = (m.seed, "nll", i, j)
    sampled = count_strata(m)
    if sampled is None:
        span = slice(j * blocks.TIMES, (j + 1) * blocks.TIMES)
        t, weight = (a[:, span] for a in list_all_times(m.T, len(image)))
    else:
        t, weight = draw_stratified_times(
            m.T, sampled, len(image), make_generator(*where, "t"), m.evaluation.nll.proposal
        )
    pairs = np.repeat(image, t.shape[1])
    x_0 = model.space.encode(_show_held_out(bench, image), m.seed, image).repeat_interleave(t.shape[1], dim=0)
    told = model.tell_held_out(dataset, pairs)
    noise = make_generator(*where, "eps")  # on the CPU, as a GPU's generator would draw other numbers
    rows, weight = (pairs, t.reshape(-1)), weight.reshape(-1)
    of: Any = {"levels": model.space.find_levels(dataset.levels), "clip": model.space.bounded}
    return measure_pairs(model.process, told, x_0, *rows, weight=weight, noise=noise, **of).make_table()


def _show_held_out(bench: Bench, image: Ints) -> NCHW:
    """The held-out images with these numbers, on the scale of the model."""
    images = np.array(bench.dataset.held_out[image])
    return to_model(torch.from_numpy(images), bench.dataset.levels).to(bench.device)


def _take_held_out(bench: Bench, block: Block, size: int) -> tuple[Ints, NCHW]:
    """The held-out images of a block of so many, and their numbers."""
    image = np.arange(block.number * size, min((block.number + 1) * size, len(bench.dataset.held_out)))
    return image, _show_held_out(bench, image)


def make_latent_block(bench: Bench, block: Block) -> pa.Table:
    """What the first stage of a latent model measures of IMAGES images: a row an image (`StageTerms`)."""
    image, x = _take_held_out(bench, block, blocks.IMAGES)
    _, terms = bench.model.space.measure(x, bench.dataset.levels, bench.m.seed, image)
    assert terms, "nothing is encoded here"
    return terms.make_table()


def _make_integral(bench: Bench, process: Continuous, block: Block) -> pa.Table:
    """The terms of the bound in continuous time, of IMAGES images at sampled t: a row a pair (`RealLedger`)."""
    m, dataset, model = bench.m, bench.dataset, bench.model
    nll, strata = m.evaluation.nll, count_strata(m)
    assert nll and strata is not None
    (image, x), levels = _take_held_out(bench, block, blocks.IMAGES), model.space.find_levels(dataset.levels)
    where = (m.seed, "nll", block.number, 0)
    ends, shape = find_ends(process, levels), (len(image), strata)
    drawn = draw_real_times(process, ends, shape, make_generator(*where, "t"), nll.proposal)
    x_0 = model.space.encode(x, m.seed, image)
    told, noise = model.tell_held_out(dataset, np.repeat(image, strata + 1)), make_generator(*where, "eps")
    of: Any = {"drawn": drawn, "noise": noise, "levels": levels, "clip": model.space.bounded}
    return measure(process, told, x_0, image, **of).make_table()


def make_ode_nll_block(bench: Bench, block: Block) -> pa.Table:
    """-log P of IMAGES images in nats by the probability-flow ODE: a row an image.

    A level's probability is bounded by the density over its bin: -log P(x) <= -E log p(x + u) - D log(bin), with u
    uniform over the bin (Theis et al. 2016, section 3.1). Of what is not discrete, as latents are, it is -log p(x)
    itself.
    """
    m, dataset, model = bench.m, bench.dataset, bench.model
    ode = m.evaluation.ode_nll
    assert ode
    (image, x), levels = _take_held_out(bench, block, blocks.IMAGES), model.space.find_levels(dataset.levels)
    x_0 = model.space.encode(x, m.seed, image).double().cpu()
    where, bin_ = (m.seed, "ode_nll", block.number), 2 / (levels - 1) if levels else None
    u = torch.rand(x_0.shape, generator=make_generator(*where, "u"), dtype=torch.float64) - 0.5
    probes = 2 * torch.randint(0, 2, (ode.probes, *x_0.shape), generator=make_generator(*where, "probes")) - 1
    x, probes = (x_0 + bin_ * u if bin_ else x_0).to(model.device), probes.to(model.device)
    with round_products(m.evaluation.precision):
        density = integrate_log_density(model.process, model.tell_held_out(dataset, image), x, probes, ode.tolerance)
    nats = -density.log_p.cpu().numpy() - (x_0[0].numel() * np.log(bin_) if bin_ else 0)
    return pa.table({"image": image, "nats": nats, "evaluations": density.evaluations.cpu().numpy()})


def make_sample_block(bench: Bench, block: Block) -> pa.Table:
    """SAMPLES samples by their seed, as the data are kept, quantised where these are: a row a sample.

    Where the sampler decides on the number of evaluations itself, each row has its own beside it.
    """
    m, dataset, model = bench.m, bench.dataset, bench.model
    fid = m.evaluation.fid
    assert fid
    model = replace(model, process=make_measured_process(m, model.process))
    told = model.assign_told(list_samples(block.number), dataset)
    of = model, fid, m.seed, block.number
    images, counts = draw_block(*of, shape=dataset.shape, levels=dataset.levels, told=told)
    first = block.number * blocks.SAMPLES
    rows = {"sample": np.arange(first, first + len(images)), "image": [row.tobytes() for row in images]}
    counted = {} if count_evaluations(fid.sampler, m.T) else {"evaluations": counts}
    return pa.table(rows | counted)


def list_samples(block: int) -> Ints:
    """The numbers of the samples in a block."""
    return np.arange(block * blocks.SAMPLES, (block + 1) * blocks.SAMPLES)


def draw_block(
    model: LoadedModel,
    fid: FIDConfig,
    seed: int,
    block: int,
    *,
    shape: tuple[int, int, int],
    levels: int | None,
    told: np.ndarray | None = None,
) -> tuple[NHWC, Ints]:
    """The SAMPLES images of a block, drawn as `fid` says, and the evaluations that each took; `shape` is (h, w, c).

    They are a function of (seed, block) and of what is `told` of each, here and in a registered model.
    """
    height, width, channels = model.space.find_shape(shape)
    conditional = model.tell(told, fid.sampler.guidance)
    noise = make_generator(seed, "samples", block)
    x_T = torch.randn((blocks.SAMPLES, channels, height, width), generator=noise).to(model.device)
    drawn = draw(model.process, conditional, fid.sampler, x_T, noise, clip=model.space.bounded)
    images = model.space.decode(drawn.x_0)
    return QUANTISERS[fid.quantise](images, levels).cpu().numpy(), drawn.evaluations.numpy()


def make_feature_block(bench: Bench, block: Block) -> pa.Table:
    """The features of a block of samples: a row a sample."""
    [samples] = block.needs
    images = read_block(bench.storage, samples)["image"].to_pylist()
    pixels = np.stack([np.frombuffer(image, bench.dataset.train.dtype) for image in images]).reshape(
        -1, *bench.dataset.shape
    )
    return _make_feature_table(bench, pixels)


def make_reference_block(bench: Bench, block: Block) -> pa.Table:
    """The features of REAL real images of the split that the samples are held against: a row an image."""
    assert bench.m.evaluation.fid
    images = getattr(bench.dataset, bench.m.evaluation.fid.reference)
    part = images[block.number * blocks.REAL : (block.number + 1) * blocks.REAL]
    return _make_feature_table(bench, np.asarray(part))


def _make_feature_table(bench: Bench, images: NHWC) -> pa.Table:
    """Features, stamped with the space they are in: those of another are no use beside them."""
    table = pa.table({"features": list(bench.space.compute_features(images))})
    return table.replace_schema_metadata({SPACE: bench.space.digest})


def make_rate_block(bench: Bench, block: Block) -> pa.Table:
    """KL(q(z | x) || p(z)) and -log p(x | z), in nats, of IMAGES images with one z of each: a row an image."""
    image, x = _take_held_out(bench, block, blocks.IMAGES)
    stage, noise = bench.autoencoder, make_generator(bench.m.seed, "nll", block.number, "z")
    with compute_in(bench.m.evaluation.precision, bench.device):
        posterior = stage.encode(x)
        x_hat = stage.decode(posterior.sample(torch.randn(posterior.mean.shape, generator=noise).to(x)))
    rate, distortion = posterior.compute_rate(), stage.compute_distortion(x, x_hat, bench.dataset.levels)
    return pa.table({"image": image, "rate": rate.cpu().numpy(), "distortion": distortion.cpu().numpy()})


def make_prior_block(bench: Bench, block: Block) -> pa.Table:
    """SAMPLES samples by their seed, x_hat of z from N(0, I), quantised as `make_sample_block` says: a row a sample."""
    m, first = bench.m, block.number * blocks.SAMPLES
    assert m.evaluation.fid
    of = bench.decoder, m.evaluation.fid, m.seed, block.number
    images = draw_from_prior(*of, levels=bench.dataset.levels, precision=m.evaluation.precision)
    numbers = np.arange(first, first + len(images))
    return pa.table({"sample": numbers, "image": [row.tobytes() for row in images]})


@torch.no_grad()
def draw_from_prior(
    stage: FromLatents, fid: FIDConfig, seed: int, block: int, *, levels: int | None, precision: str
) -> NHWC:
    """The SAMPLES images of a block, here and in a registered model: a function of (seed, block) alone."""
    size, noise = (blocks.SAMPLES, *find_latent_size(stage.config)), make_generator(seed, "samples", block)
    device = next(stage.parameters()).device
    with compute_in(precision, device):
        x_hat = stage.decode(torch.randn(size, generator=noise).to(device)).float()
    kept: NHWC = QUANTISERS[fid.quantise](x_hat, levels).cpu().numpy()
    return kept


def make_reconstruction_block(bench: Bench, block: Block) -> pa.Table:
    """x_hat of SAMPLES held-out images, by one z of each: a row an image."""
    image, x = _take_held_out(bench, block, blocks.SAMPLES)
    noise = make_generator(bench.m.seed, "reconstructions", block.number)
    with compute_in(bench.m.evaluation.precision, bench.device):
        posterior = bench.autoencoder.encode(x)
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=noise).to(x))
        x_hat = bench.autoencoder.decode(z).float()
    assert bench.m.evaluation.fid
    kept = QUANTISERS[bench.m.evaluation.fid.quantise](x_hat, bench.dataset.levels).cpu().numpy()
    return pa.table({"sample": image, "image": [row.tobytes() for row in kept]})


def make_held_out_block(bench: Bench, block: Block) -> pa.Table:
    """The features of REAL held-out images: a row an image."""
    part = bench.dataset.held_out[block.number * blocks.REAL : (block.number + 1) * blocks.REAL]
    return _make_feature_table(bench, np.asarray(part))


KINDS: dict[str, Callable[[Bench, Block], pa.Table]] = {
    "nll": make_nll_block,
    "ode_nll": make_ode_nll_block,
    "latents": make_latent_block,
    "samples": make_sample_block,
    "features": make_feature_block,
    "reference": make_reference_block,
}
# Those of other families than denoisers.
FAMILY_KINDS: dict[str, dict[str, Callable[[Bench, Block], pa.Table]]] = {
    AUTOENCODER: {
        "nll": make_rate_block,
        "samples": make_prior_block,
        "reconstructions": make_reconstruction_block,
        "held_out": make_held_out_block,
    },
    GENERATOR: {"samples": make_prior_block},
}


@torch.no_grad()
def make(bench: Bench, block: Block) -> dict[Block, str]:
    """Makes a block and writes it; does nothing where it is there.

    What it needs is made before where that is not there or damaged. Returns what was, and what was wrong with it.
    """
    if bench.storage.exists(block.path):
        return {}
    again = find_unusable(bench.storage, list(block.needs), None)
    for needed in again:
        make(bench, needed)
    table = (KINDS | FAMILY_KINDS.get(bench.m.family, {}))[block.kind](bench, block)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), HOST: socket.gethostname()})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    bench.storage.write(block.path, seal_parquet(stream.getvalue(), block.path))
    return again


def read_block(storage: Storage, block: Block) -> pa.Table:
    """Raises DamagedBlock, and FileNotFoundError where there is none."""
    try:
        content = open_parquet(storage.read(block.path), block.path)
    except Damage as damage:
        raise DamagedBlock(f"{storage.find_url(block.path)} is damaged: {damage}") from damage
    return pq.read_table(io.BytesIO(content))


class DamagedBlock(ValueError):
    """The bytes of a block are not those that were written."""


def find_unusable(storage: Storage, wanted: list[Block], space: FeatureSpace | None) -> dict[Block, str]:
    """The blocks that are not there, cannot be read, or hold features of another `space` than today's, and why.

    What is there of them is removed, so that it can be made again.
    """
    found = {}
    for block in wanted:
        try:
            stamp = (read_block(storage, block).schema.metadata or {}).get(SPACE)
            if stamp is not None and space and stamp.decode() != space.digest:
                raise DamagedBlock(f"{storage.find_url(block.path)} has features of another space, {stamp.decode()}")
        except FileNotFoundError:
            found[block] = f"{storage.find_url(block.path)} is not there"
        except DamagedBlock as error:
            storage.delete(block.path)
            found[block] = str(error)
    return found
