"""Which blocks an evaluation is made of, and where they lie: pure functions of what is measured.

    evaluations/<checkpoint>/nll-<key>/block-00007.parquet                    |x_0 - x_0_hat|^2 of images x timesteps
    evaluations/<checkpoint>/nll-<key>/...                                    of an autoencoder rate and distortion
    evaluations/<checkpoint>/ode_nll-<key>/block-00007.parquet                -log P of images along the ODE
    evaluations/<checkpoint>/latents-<key>/block-00007.parquet                what the autoencoder says of images
    evaluations/<checkpoint>/samples-<key>/block-00007.parquet                images by seed
    evaluations/<checkpoint>/samples-<key>-<features>/block-00007.parquet     their features
    evaluations/<checkpoint>/reconstructions-<key>/block-00007.parquet        held-out images by an autoencoder
    references/<data>-<split>-<features>-v<version>/block-00007.parquet       features of real images

<features> is the name of a space, and of one from outside what tells its code apart, too.
A key holds what is measured and not how much of it: asking for more images, samples or features adds blocks and leaves
the others where they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workers.code import drop_pin
from workers.config import Count, FIDConfig, Measurement
from workers.data.dataset import Dataset
from workers.data.sources import Source
from workers.identity import collect_settings_read, compute_digest, describe_evaluation
from workers.kinds import DENOISER, MEASURES, SAMPLERS, SPACES
from workers.layout import name_evaluation_folder, name_reference_file, name_summary_file

VERSION = 3  # of what blocks hold: raise it when the same checkpoint would give other numbers
IMAGES, TIMES = 25, 100  # an NLL block: so many images times so many timesteps
SAMPLES = 100  # a block of samples, and of their features
REAL = 500  # a block of real images' features
MOST_BLOCKS = 500_000  # of an evaluation: a file and a task each


class Images(NamedTuple):
    """The data set as far as it decides about blocks."""

    digest: str
    train: int
    held_out: int
    levels: int | None

    @staticmethod
    def of(data: Source | Dataset) -> "Images":
        if isinstance(data, Source):
            return Images(data.digest, data.train, data.held_out, data.levels)
        return Images(data.digest, len(data.train), len(data.held_out), data.levels)

    def get_count(self, split: str) -> int:
        return int(getattr(self, split))


@dataclass(frozen=True)
class Block:
    """One piece of work and of its result: the unit of parallelism, retry and caching."""

    kind: str  # a name in evaluation.KINDS
    folder: str
    number: int
    needs: tuple["Block", ...] = ()  # blocks that must be there before

    @property
    def name(self) -> str:
        return f"block-{self.number:05}.parquet"

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"


def _describe_precision(m: Measurement) -> list[str]:
    """What of an id says in which precision the network computes."""
    return [] if m.evaluation.precision == "float32" else [m.evaluation.precision]


def describe_weights(m: Measurement) -> dict[str, float | None]:
    """Which average of the weights is measured, for a passport."""
    ema, width = m.evaluation.ema, m.evaluation.ema_width
    return {"ema": m.ema if ema is None else ema} if width is None else {"ema_width": width}


def count_asked(count: Count, available: int) -> int:
    return available if count == "all" else min(count, available)


def count_nll_images(m: Measurement, images: Images) -> int:
    """How many held-out images the bound is measured on."""
    return count_asked(m.evaluation.nll.images, images.held_out) if m.evaluation.nll else 0


def count_strata(m: Measurement) -> int | None:
    """Timesteps sampled an image, besides t = 1 or the least real t; None where every t is measured."""
    assert m.evaluation.nll
    timesteps = m.evaluation.nll.timesteps
    if m.T is None:
        assert timesteps != "all", "a continuous process has no T times that could all be measured"
        return timesteps - 1
    return None if timesteps == "all" or timesteps >= m.T else max(1, timesteps - 1)


def count_time_blocks(m: Measurement) -> int:
    """Blocks that share the same images."""
    if m.family != DENOISER:
        return 1
    return 1 if m.T is None or count_strata(m) is not None else math.ceil(m.T / TIMES)


def list_nll_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The blocks that hold the first `nll.images` of the held-out split; numbers grow by image, then by t."""
    if m.evaluation.nll is None:
        return []
    rows = math.ceil(count_nll_images(m, images) / IMAGES)
    if m.family != DENOISER:
        folder = _name_stage_folder(m, checkpoint, "nll", images.digest)
        return [Block("nll", folder, k) for k in range(rows)]
    sampled = None if count_strata(m) is None else [count_strata(m), m.evaluation.nll.proposal]
    content = [VERSION, images.digest, m.seed, sampled, *_describe_precision(m)]
    folder = f"{name_evaluation_folder(checkpoint)}/nll-{compute_digest(content)}"
    return [Block("nll", folder, k) for k in range(rows * count_time_blocks(m))]


def _name_stage_folder(m: Measurement, checkpoint: str, kind: str, *more: Any) -> str:
    """Of blocks of a network that is no denoiser."""
    content = compute_digest([VERSION, m.seed, *more, *_describe_precision(m)])
    return f"{name_evaluation_folder(checkpoint)}/{kind}-{content}"


def count_ode_nll_images(m: Measurement, images: Images) -> int:
    return count_asked(m.evaluation.ode_nll.images, images.held_out) if m.evaluation.ode_nll else 0


def list_ode_nll_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The blocks that hold the first `ode_nll.images` of the held-out split."""
    ode = m.evaluation.ode_nll
    if ode is None:
        return []
    content = compute_digest([VERSION, images.digest, m.seed, ode.probes, ode.tolerance])
    folder = f"{name_evaluation_folder(checkpoint)}/ode_nll-{content}"
    return [Block("ode_nll", folder, k) for k in range(math.ceil(count_ode_nll_images(m, images) / IMAGES))]


def count_encoded_images(m: Measurement, images: Images) -> int:
    """How many held-out images are encoded, for either likelihood; 0 where nothing is."""
    return max(count_nll_images(m, images), count_ode_nll_images(m, images)) if m.latent else 0


def list_latent_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The blocks that hold what the first stage of a latent model adds to its likelihoods."""
    folder = f"{name_evaluation_folder(checkpoint)}/latents-{compute_digest([VERSION, images.digest, m.seed])}"
    return [Block("latents", folder, k) for k in range(math.ceil(count_encoded_images(m, images) / IMAGES))]


def list_sample_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    fid = m.evaluation.fid
    if fid is None:
        return []
    count = math.ceil(fid.samples / SAMPLES)
    if m.family != DENOISER:
        folder = _name_stage_folder(m, checkpoint, "samples", fid.quantise, images.levels)
        return [Block("samples", folder, k) for k in range(count)]
    what = [VERSION, m.seed, collect_settings_read(fid.sampler, only_set=True), fid.quantise, images.levels]
    if SAMPLERS[fid.sampler.kind].reads_variance and m.evaluation.variance:
        what.append(m.evaluation.variance)
    what += _describe_precision(m)
    if m.told == "vectors":  # those of the training images
        what.append(images.digest)
    folder = f"{name_evaluation_folder(checkpoint)}/samples-{compute_digest(what)}"
    return [Block("samples", folder, k) for k in range(count)]


def count_reconstructions(m: Measurement, images: Images) -> int:
    asked = m.evaluation.reconstructions
    return count_asked(asked, images.held_out) if m.reconstructs and asked else 0


def list_reconstruction_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """Held-out images as an autoencoder makes them again."""
    if not m.reconstructs:
        return []
    assert m.evaluation.fid
    folder = _name_stage_folder(
        m, checkpoint, "reconstructions", images.digest, m.evaluation.fid.quantise, images.levels
    )
    count = math.ceil(count_reconstructions(m, images) / SAMPLES)
    return [Block("reconstructions", folder, k) for k in range(count)]


def list_feature_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The features of the samples. Those of a space that was taught the data belong to the data."""
    fid = m.evaluation.fid
    if fid is None:
        return []
    return _list_features(m, fid, list_sample_blocks(m, checkpoint, images), images)


def _list_features(m: Measurement, fid: FIDConfig, made: Sequence[Block], images: Images) -> list[Block]:
    space = _name_made_space(m, fid) + (f"-{images.digest}" if SPACES[fid.features].train else "")
    return [Block("features", f"{block.folder}-{space}", block.number, (block,)) for block in made]


def list_reconstruction_features(m: Measurement, checkpoint: str, images: Images) -> tuple[list[Block], list[Block]]:
    """The features of reconstructions, and those of the held-out images themselves."""
    made, fid = list_reconstruction_blocks(m, checkpoint, images), m.evaluation.fid
    if not made or fid is None:
        return [], []
    folder = name_reference_folder(m, fid.model_copy(update={"reference": "held_out"}), images)
    count = math.ceil(count_reconstructions(m, images) / REAL)
    return _list_features(m, fid, made, images), [Block("held_out", folder, k) for k in range(count)]


def list_reference_blocks(m: Measurement, images: Images) -> list[Block]:
    """The features of the real images that the samples are held against."""
    fid = m.evaluation.fid
    if fid is None:
        return []
    folder = name_reference_folder(m, fid, images)
    return [Block("reference", folder, k) for k in range(math.ceil(count_reference_images(fid, images) / REAL))]


def name_reference_folder(m: Measurement, fid: FIDConfig, images: Images) -> str:
    return name_reference_file(f"{images.digest}-{fid.reference}-{_name_made_space(m, fid)}-v{VERSION}")


def _name_made_space(m: Measurement, fid: FIDConfig) -> str:
    """The space as names of folders have it: a network's is coarser where TF32 is allowed (`load_feature_space`)."""
    coarser = SPACES[fid.features].reads_precision and m.evaluation.precision != "float32"
    return name_space_folder(fid.features) + ("-tf32" if coarser else "")


def name_space(features: str) -> str:
    """What a feature space is called in the names of metrics: one from outside by its module and its name."""
    return drop_pin(features).replace(":", ".")


def name_space_folder(features: str) -> str:
    """The same with what tells its code apart, for the names of files."""
    bare, _, pinned = features.partition("@")
    return f"{name_space(bare)}-{pinned}" if pinned else bare


def count_reference_images(fid: FIDConfig, images: Images) -> int:
    return count_asked(fid.reference_images, images.get_count(fid.reference))


def list_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """All blocks of an evaluation, each after those that it needs."""
    reconstructed, held_out = list_reconstruction_features(m, checkpoint, images)
    return [
        *list_nll_blocks(m, checkpoint, images),
        *list_ode_nll_blocks(m, checkpoint, images),
        *list_latent_blocks(m, checkpoint, images),
        *list_reference_blocks(m, images),
        *list_sample_blocks(m, checkpoint, images),
        *list_feature_blocks(m, checkpoint, images),
        *list_reconstruction_blocks(m, checkpoint, images),
        *held_out,
        *reconstructed,
    ]


def count_blocks(m: Measurement, images: Images) -> int:
    """How many `list_blocks` has, without making them."""
    fid, rows = m.evaluation.fid, math.ceil(count_nll_images(m, images) / IMAGES)
    again = count_reconstructions(m, images)
    return (
        2 * math.ceil(again / SAMPLES)
        + math.ceil(again / REAL)
        + (rows * count_time_blocks(m) if m.evaluation.nll else 0)
        + math.ceil(count_ode_nll_images(m, images) / IMAGES)
        + math.ceil(count_encoded_images(m, images) / IMAGES)
        + (math.ceil(count_reference_images(fid, images) / REAL) + 2 * math.ceil(fid.samples / SAMPLES) if fid else 0)
    )


def name_summary(m: Measurement, checkpoint: str, images: Images) -> str:
    return name_summary_file(checkpoint, make_protocol_key(m, images))


def make_protocol_key(m: Measurement, images: Images) -> str:
    """What names a way of measuring: the same key, the same protocol."""
    return compute_digest([VERSION, images.digest, m.seed, describe_evaluation(m)])


def name_distance(fid: FIDConfig) -> str:
    """`fid` is Inception against all of the training split, and nothing else is."""
    if fid.features == "inception" and fid.reference == "train" and fid.reference_images == "all":
        return "fid"
    name = f"fd_{name_space(fid.features)}"
    return name if fid.reference == "train" else f"{name}_{fid.reference}"


def make_measure_suffix(fid: FIDConfig, measure: str) -> str:
    """What the names of a measure of samples end with: as the distance's do, unless it is for one feature space."""
    name = name_distance(fid)
    return "" if name == "fid" or MEASURES[measure].needs else name.removeprefix("fd")


def name_reconstruction_distance(fid: FIDConfig) -> str:
    """Of reconstructions of held-out images to these."""
    return f"reconstruction_fd_{name_space(fid.features)}"


def list_comparable_metrics(fid: FIDConfig) -> list[str]:
    """The metrics of samples of which lower is better, the distance first."""
    others = [f"eval/{key}{make_measure_suffix(fid, name)}" for name in fid.also for key in MEASURES[name].lower]
    return [f"eval/{name_distance(fid)}", *others]
