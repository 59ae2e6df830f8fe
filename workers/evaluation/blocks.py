"""Which blocks an evaluation is made of, and where they lie: pure functions of what is measured.

    evaluations/<checkpoint>/nll-<key>/block-00007.parquet                    |x_0 - x_0_hat|^2 of images x timesteps
    evaluations/<checkpoint>/ode_nll-<key>/block-00007.parquet                -log P of images along the ODE
    evaluations/<checkpoint>/samples-<key>/block-00007.parquet                images by seed
    evaluations/<checkpoint>/samples-<key>-<features>/block-00007.parquet     their features
    references/<data>-<split>-<features>-v<version>/block-00007.parquet       features of real images

A key holds what is measured and not how much of it: asking for more images, samples or features adds blocks and leaves
the others where they are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from workers.config import Count, FIDConfig, Measurement
from workers.data.dataset import Dataset
from workers.data.sources import Source
from workers.identity import digest, settings_read
from workers.kinds import MEASURES, SAMPLERS
from workers.layout import evaluation_folder, reference_file, summary_file

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
    levels: int

    @staticmethod
    def of(data: Source | Dataset) -> "Images":
        if isinstance(data, Source):
            return Images(data.digest, data.train, data.held_out, data.levels)
        return Images(data.digest, len(data.train), len(data.held_out), data.levels)

    def count(self, split: str) -> int:
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


def _in_precision(m: Measurement) -> list[str]:
    """What of an id says in which precision the network computes."""
    return [] if m.evaluation.precision == "float32" else [m.evaluation.precision]


def asked(count: Count, available: int) -> int:
    return available if count == "all" else min(count, available)


def nll_images(m: Measurement, images: Images) -> int:
    """How many held-out images the bound is measured on."""
    return asked(m.evaluation.nll.images, images.held_out) if m.evaluation.nll else 0


def strata(m: Measurement) -> int | None:
    """Timesteps sampled an image, besides t = 1; None where every t is measured."""
    assert m.evaluation.nll
    timesteps = m.evaluation.nll.timesteps
    return None if timesteps == "all" or timesteps >= m.T else max(1, timesteps - 1)


def time_blocks(m: Measurement) -> int:
    """Blocks that share the same images."""
    return 1 if strata(m) is not None else math.ceil(m.T / TIMES)


def nll_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The blocks that hold the first `nll.images` of the held-out split; numbers grow by image, then by t."""
    if m.evaluation.nll is None:
        return []
    sampled = None if strata(m) is None else [strata(m), m.evaluation.nll.proposal]
    content = [VERSION, images.digest, m.seed, sampled, *_in_precision(m)]
    folder = f"{evaluation_folder(checkpoint)}/nll-{digest(content)}"
    rows = math.ceil(nll_images(m, images) / IMAGES)
    return [Block("nll", folder, k) for k in range(rows * time_blocks(m))]


def ode_nll_images(m: Measurement, images: Images) -> int:
    return asked(m.evaluation.ode_nll.images, images.held_out) if m.evaluation.ode_nll else 0


def ode_nll_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The blocks that hold the first `ode_nll.images` of the held-out split."""
    ode = m.evaluation.ode_nll
    if ode is None:
        return []
    folder = (
        f"{evaluation_folder(checkpoint)}/ode_nll-{digest([VERSION, images.digest, m.seed, ode.probes, ode.tolerance])}"
    )
    return [Block("ode_nll", folder, k) for k in range(math.ceil(ode_nll_images(m, images) / IMAGES))]


def sample_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    fid = m.evaluation.fid
    if fid is None:
        return []
    what = [VERSION, m.seed, settings_read(fid.sampler, only_set=True), fid.quantise, images.levels]
    if SAMPLERS[fid.sampler.kind].reads_variance and m.evaluation.variance:
        what.append(m.evaluation.variance)
    what += _in_precision(m)
    folder = f"{evaluation_folder(checkpoint)}/samples-{digest(what)}"
    return [Block("samples", folder, k) for k in range(math.ceil(fid.samples / SAMPLES))]


def feature_blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """The features of the samples. Those of the classifier belong to the data it was trained on."""
    fid = m.evaluation.fid
    if fid is None:
        return []
    space = f"{fid.features}-{images.digest}" if fid.features == "classifier" else _network_space(m, fid)
    return [Block("features", f"{b.folder}-{space}", b.number, (b,)) for b in sample_blocks(m, checkpoint, images)]


def reference_blocks(m: Measurement, images: Images) -> list[Block]:
    """The features of the real images that the samples are held against."""
    fid = m.evaluation.fid
    if fid is None:
        return []
    folder = reference_folder(m, fid, images)
    return [Block("reference", folder, k) for k in range(math.ceil(reference_images(fid, images) / REAL))]


def reference_folder(m: Measurement, fid: FIDConfig, images: Images) -> str:
    space = fid.features if fid.features == "classifier" else _network_space(m, fid)
    return reference_file(f"{images.digest}-{fid.reference}-{space}-v{VERSION}")


def _network_space(m: Measurement, fid: FIDConfig) -> str:
    """The name of the space of a feature network, which is coarser where TF32 is allowed (`features.feature_space`)."""
    return fid.features if m.evaluation.precision == "float32" else f"{fid.features}-tf32"


def reference_images(fid: FIDConfig, images: Images) -> int:
    return asked(fid.reference_images, images.count(fid.reference))


def blocks(m: Measurement, checkpoint: str, images: Images) -> list[Block]:
    """All blocks of an evaluation, each after those that it needs."""
    return [
        *nll_blocks(m, checkpoint, images),
        *ode_nll_blocks(m, checkpoint, images),
        *reference_blocks(m, images),
        *sample_blocks(m, checkpoint, images),
        *feature_blocks(m, checkpoint, images),
    ]


def number_of_blocks(m: Measurement, images: Images) -> int:
    """How many `blocks` has, without making them."""
    fid, rows = m.evaluation.fid, math.ceil(nll_images(m, images) / IMAGES)
    return (
        (rows * time_blocks(m) if m.evaluation.nll else 0)
        + math.ceil(ode_nll_images(m, images) / IMAGES)
        + (math.ceil(reference_images(fid, images) / REAL) + 2 * math.ceil(fid.samples / SAMPLES) if fid else 0)
    )


def summary_path(m: Measurement, checkpoint: str, images: Images) -> str:
    return summary_file(checkpoint, protocol_key(m, images))


def protocol_key(m: Measurement, images: Images) -> str:
    """What names a way of measuring: the same key, the same protocol."""
    return digest([VERSION, images.digest, m.seed, settings_read(m.evaluation, only_set=True)])


def distance_name(fid: FIDConfig) -> str:
    """`fid` is Inception against all of the training split, and nothing else is."""
    if fid.features == "inception" and fid.reference == "train" and fid.reference_images == "all":
        return "fid"
    name = f"fd_{fid.features}"
    return name if fid.reference == "train" else f"{name}_{fid.reference}"


def measure_suffix(fid: FIDConfig, measure: str) -> str:
    """What the names of a measure of samples end with: as the distance's do, unless it is for one feature space."""
    name = distance_name(fid)
    return "" if name == "fid" or MEASURES[measure].needs else name.removeprefix("fd")


def comparable_metrics(fid: FIDConfig) -> list[str]:
    """The metrics of samples of which lower is better, the distance first."""
    others = [f"eval/{key}{measure_suffix(fid, name)}" for name in fid.also for key in MEASURES[name].lower]
    return [f"eval/{distance_name(fid)}", *others]
