"""The typed records that the driver and the nodes share: one resolved trial, and nothing else.

Every record is frozen and forbids unknown keys. A `Trial` is what one training and its evaluation need; its id is the
digest of what changes its weights (`workers.identity`). Importing this module imports neither torch nor ray.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from workers.diffusion_settings import DiffusionConfig as DiffusionConfig
from workers.diffusion_settings import ScheduleConfig as ScheduleConfig
from workers.entries import add_settings_of
from workers.gpu_parts import Gpus
from workers.kinds import (
    AUTOENCODER,
    DENOISER,
    FORMATS,
    MEASURES,
    OBJECTIVES,
    SAMPLERS,
    SPACES,
    TIMESTEPS,
    VARIANCES,
)  # fmt: skip
from workers.loss_settings import LossConfig as LossConfig
from workers.mistakes import Mistake as Mistake
from workers.mistakes import Open as Open
from workers.mistakes import hide_secrets as hide_secrets
from workers.model_settings import KIND_READS, MEASURED_READS, reset_unread
from workers.model_settings import ModelConfig as ModelConfig
from workers.model_settings import What as What
from workers.posthoc import PosthocConfig, Width
from workers.sections import NameOf, OpenRecord
from workers.sections import Record as Record
from workers.sides import Resolution
from workers.warm_start import EncoderConfig, InitConfig

Count = Literal["all"] | Annotated[int, Field(ge=1)]
Level = Annotated[int, Field(ge=0, le=255)]
Ends = Annotated[tuple[float, float], Field(strict=False), "[low, high]"]

# Training noise is addressed by (seed, step, sub-batch): a global batch is cut into this many parts wherever it runs,
# and each worker takes a whole number of them. A batch that 8 does not divide has fewer.
SUB_BATCHES = 8

# A validation: the first images held out, each at t = 1 and at one timestep of every stratum of 2..T, or as many real
# t, and a grid of samples (`workers.passes.choose_grid_sampler`). The training loop does it, the preflight counts it.
VALIDATION_IMAGES = 128
VALIDATION_TIMESTEPS = 16
SAMPLE_GRID = 25
SAMPLE_GRID_ROWS = 10  # classes at most that the grid has a row of, where the network is told them
SAMPLE_GRID_COLUMNS = 5  # samples of each
SAMPLE_GRID_STEPS = 50  # or T, where that is less

DRIVER_CPUS = 0.01  # of the process that leads the workers of a data-parallel trial: Ray Tune refuses 0
BLOCK_GPUS = 0.25  # of a GPU, for an evaluation block where trials train on GPUs


# The names of kinds are those of their tables; no type checker sees those that come from installed packages.
if TYPE_CHECKING:
    FormatName = str
    FixedName = str | None
    TimestepsName = str
    SamplerName = str
    SpaceName = str
    MeasureName = str
else:
    FormatName = Annotated[Literal[tuple(FORMATS)], NameOf(FORMATS)]
    _FIXED = tuple(name for name, entry in VARIANCES.items() if not entry.learned)
    FixedName = Annotated[Literal[_FIXED] | None, NameOf(VARIANCES)]
    TimestepsName = Annotated[Literal[tuple(TIMESTEPS)], NameOf(TIMESTEPS)]
    SamplerName = Annotated[Literal[tuple(SAMPLERS)], NameOf(SAMPLERS, takes_settings=True)]
    SpaceName = Annotated[Literal[tuple(SPACES)], NameOf(SPACES)]
    MeasureName = Annotated[Literal[tuple(MEASURES)], NameOf(MEASURES)]

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
MOST_STEPS = 10**9  # of anything that is only counted


class DataConfig(Record):
    """Which images. `source` is `digits` or `gaussian`, or a path or URI of files in a format of `workers.kinds`."""

    READS: ClassVar = {"shuffle": {"null": (), "a number": ("stream",)}}

    source: Open = Field(
        description="digits, gaussian, or the path or URI of images; a path is relative to where the command runs"
    )
    format: FormatName | None = Field(default=None, description="of the files there; null: found by what lies there")
    config: str | None = Field(
        default=None, description="which of a repository's data sets, where it has several, as load_dataset calls them"
    )
    resolution: Resolution | None = Field(
        default=None, description="centre-crop and resize to a square of this many pixels a side, or to [height, width]"
    )
    held_out: float = Field(default=0.1, gt=0, lt=1, description="fraction held out where the source has no test split")
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), strict=False, description="red, green and blue under transparent pixels, 0 to 255"
    )
    flip: bool = Field(default=False, description="mirror training images at random, left to right")
    dimensions: Literal[1, 2, 3] = Field(default=2, description="of arrays, channels aside: 1 signals, 3 volumes")
    ranges: Literal["all", "channel"] | Annotated[tuple[Ends, ...], Field(min_length=1, strict=False)] = Field(
        default="all",
        description="of values that are not discrete, what becomes [-1, 1]: the range of all to train on, or of each "
        "channel, or these [low, high], one for all channels or one for each",
    )
    condition: str | None = Field(
        default=None,
        description="column of Parquet files with the vectors of each image, which model.conditions tells the network",
    )
    shuffle: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="of Parquet or tar files, so many are shuffled together, one group after another; null: all images",
    )
    stream: float | None = Field(
        default=None,
        gt=0,
        description="GB of a node's disk for training images, read as they are needed; null: all are prepared before",
    )
    encoder: EncoderConfig | None = Field(default=None, description="whose latents are diffused; null: pixels are")


class TrainingConfig(Record):
    """`batch_size` is global: it does not change with the number of workers."""

    steps: int = Field(ge=1, le=MOST_STEPS, description="optimiser steps")
    batch_size: int = Field(default=128, ge=1, le=65_536, description="images per step, over all workers together")
    lr: float = Field(default=2e-4, gt=0, description="learning rate after the warm-up")
    warmup: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="steps over which the learning rate rises linearly from 0"
    )
    decay: Literal["none", "cosine"] = Field(default="none", description="of the learning rate after the warm-up")
    cooldown: Annotated[int, Field(ge=0, le=MOST_STEPS)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0,
        description="last steps, or part of all, over which the learning rate falls linearly to 0; trials of other "
        "lengths share what is before",
    )
    init: InitConfig | None = Field(default=None, description="the weights that it begins with; null: random ones")
    ema: float = Field(default=0.9999, ge=0, lt=1, description="decay of the average of the weights that is measured")
    averages: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(),
        strict=False,
        max_length=16,
        description="decays of further averages to keep; 0 is the weights themselves",
    )
    posthoc: PosthocConfig | None = Field(
        default=None, description="what is kept so that averages of any width can be made afterwards; null: nothing"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="auto: bf16 where it is faster, else float32"
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto", description="compile the network, by torch.compile; auto: for large steps on a GPU"
    )
    workers: int = Field(default=1, ge=1, le=SUB_BATCHES, description="data-parallel workers; above 1 under Ray Train")
    cpus: int = Field(default=1, ge=1, le=1024, description="cores per worker")
    gpus: Gpus = Field(
        default="auto",
        description="GPUs per worker, or the part of one that a trial of one worker takes; auto: where the cluster has "
        "any, as much of one as trials of its kind were measured to need",
    )
    validate_every: int = Field(default=500, ge=1, le=MOST_STEPS, description="steps between validations")
    checkpoint_every: int = Field(
        default=500, ge=1, le=MOST_STEPS, description="steps between checkpoints, and the most that a fault can cost"
    )
    timesteps: TimestepsName = Field(
        default="uniform", description="how t is drawn; importance: by the second moment of the loss"
    )
    label_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that the label or the vectors are kept from the network, which guidance needs",
    )

    @property
    def cooldown_steps(self) -> int:
        """The last steps, over which the learning rate falls."""
        return self.cooldown if isinstance(self.cooldown, int) else round(self.cooldown * self.steps)

    @property
    def trunk_steps(self) -> int:
        """How many steps come before them, which it has in common with trials of other lengths; 0 where none falls."""
        return self.steps - self.cooldown_steps if self.cooldown_steps else 0


def count_sub_batches(batch_size: int) -> int:
    """How many equal sub-batches a global batch has; the number of workers divides it."""
    return math.gcd(batch_size, SUB_BATCHES)


@add_settings_of(SAMPLERS)
class SamplerConfig(OpenRecord):
    """How samples are drawn."""

    READS: ClassVar = {"kind": SAMPLERS.reads}

    kind: SamplerName = Field(default="ancestral", description="how samples are drawn")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="of the T times, or noise levels; null: all T, which a continuous process has not",
    )
    eta: float = Field(default=0.0, ge=0, le=1, description="DDIM's noise: 0 deterministic, 1 that of the DDPM")
    repeats: int = Field(default=5, ge=1, le=10_000, description="Langevin's updates per noise level")
    step_size: float = Field(default=0.2, gt=0, lt=4, description="Langevin's a_i / sigma_i^2; above 4 it diverges")
    tolerance: float = Field(default=1e-3, ge=1e-6, lt=1, description="of the ode's error per step and pixel in x_t")
    churn: float = Field(default=0.0, ge=0, description="S_churn: how much noise is put back in all; 0: none")
    churn_min: float = Field(default=0.0, ge=0, description="S_tmin: the least noise level that is churned")
    churn_max: float = Field(default=1e6, gt=0, description="S_tmax: the largest noise level that is churned")
    churn_noise: float = Field(default=1.0, gt=0, description="S_noise: the standard deviation of what is put back")
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="scale of classifier-free guidance; 0: without the label or the vectors, 1 or null: by them alone",
    )


class NLLConfig(Record):
    """The bound in bits/dim: every t, or t = 1 and a stratified sample of 2..T, drawn from `proposal` and weighted."""

    READS: ClassVar = {"timesteps": {"all": (), "a number": ("proposal",)}}

    images: Count = Field(default="all", description="held-out images, from the first on")
    timesteps: Literal["all"] | Annotated[int, Field(ge=2)] = Field(
        default="all", description="every t of 1..T, or as many sampled t per image; of a continuous process so many"
    )
    proposal: Literal["uniform", "log_uniform"] = Field(
        default="log_uniform", description="distribution that sampled t are drawn from, in strata, and weighted by"
    )


class FIDConfig(Record):
    """What is measured of samples: the Fréchet distance, and `also` others, between their features and real images'."""

    samples: int = Field(default=1000, ge=2, le=10_000_000, description="samples to draw")
    sampler: SamplerConfig = Field(default=SamplerConfig(), description="how the samples are drawn")
    quantise: Literal["round", "truncate"] = Field(
        default="round",
        description="how samples become whole levels before they are measured; none where data are in floats",
    )
    features: SpaceName = Field(
        default="classifier", description="space in which distances are taken; inception needs the extra of that name"
    )
    reference: Literal["train", "held_out"] = Field(
        default="train", description="split whose images the samples are compared with"
    )
    reference_images: Count = Field(default="all", description="images of that split that are used")
    also: tuple[MeasureName, ...] = Field(
        default=("kid", "precision_recall"), strict=False, description="further measures of the same samples"
    )


class ODENLLConfig(Record):
    """bits/dim by the change of variables along the probability-flow ODE, of images dequantised uniformly."""

    images: Count = Field(default="all", description="held-out images, from the first on")
    probes: int = Field(default=1, ge=1, le=64, description="of Hutchinson's trace per image")
    tolerance: float = Field(default=1e-4, ge=1e-6, lt=1, description="of the solver's error per step")


class EvaluationConfig(Record):
    nll: NLLConfig | None = Field(default=NLLConfig(), description="the bound in bits/dim; null: not measured")
    fid: FIDConfig | None = Field(default=FIDConfig(), description="distances of samples; null: not measured")
    ode_nll: ODENLLConfig | None = Field(
        default=None, description="likelihood by the probability-flow ODE; null: not measured"
    )
    variance: FixedName = Field(default=None, description="of p_theta as it is measured; null: that of the checkpoint")
    precision: Literal["float32", "tf32", "bf16"] = Field(
        default="float32", description="in which the networks compute; tf32 on NVIDIA's GPUs alone"
    )
    ema: float | None = Field(
        default=None, ge=0, lt=1, description="one of training.averages to measure; null: that of training.ema"
    )
    ema_width: Width | None = Field(
        default=None,
        description="sigma_rel of the average to measure in its place, made of what training.posthoc keeps",
    )
    reconstructions: Count | None = Field(
        default="all",
        description="held-out images of whose reconstructions by an autoencoder the distance is measured, in the "
        "features of evaluation.fid; null: none",
    )

    @property
    def measures(self) -> bool:
        """Whether it asks for anything at all."""
        return any((self.nll, self.fid, self.ode_nll))


class Trial(Record):
    """One resolved configuration: all that training it and evaluating it take."""

    READS: ClassVar = {"model.kind": KIND_READS}

    seed: Seed = Field(default=0, description="of all noise: the first weights, training and evaluation")
    data: DataConfig = Field(description="which images")
    model: ModelConfig = Field(default=ModelConfig(), description="the network")
    diffusion: DiffusionConfig = Field(default=DiffusionConfig(), description="the process, and what is predicted")
    loss: LossConfig = Field(default=LossConfig(), description="what is minimised")
    training: TrainingConfig = Field(description="how it is trained, and on what")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="what is measured of a checkpoint")

    @property
    def diffuses(self) -> bool:
        """Whether it has a process, so that it reads `diffusion`."""
        return self.model.family == DENOISER

    @property
    def chain_steps(self) -> int | None:
        """The steps of the chain that samples come along: T, fewer of a progressive student, None where there is no
        chain."""
        own = "student_steps" in OBJECTIVES[self.loss.objective].reads
        return (self.loss.student_steps if own else None) or self.diffusion.steps

    @property
    def continuous(self) -> bool:
        """Whether that is one in continuous time."""
        return self.diffuses and self.diffusion.continuous


class Measurement(Record):
    """What is measured of a checkpoint, whatever made it. `ema` is the length of its average, where it is known."""

    READS: ClassVar = {"family": MEASURED_READS}

    seed: Seed = 0
    data: DataConfig
    family: str = DENOISER  # that its network is of
    T: int | None = Field(ge=1)  # None: its process is continuous, or it has none
    told: What | None = None  # what its network is told of each image
    latent: bool = False  # whether it diffuses the latents of an autoencoder that its checkpoint holds
    ema: float | None = None
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("evaluation")
    @classmethod
    def _spell_once(cls, evaluation: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        """As many timesteps or steps as there are is all of them, and guidance 1 is none: one protocol has one id."""
        T, nll, fid = info.data.get("T") or math.inf, evaluation.nll, evaluation.fid
        if nll and nll.timesteps != "all" and nll.timesteps >= T:
            nll = nll.model_copy(update={"timesteps": "all"})
        if fid and fid.sampler.steps and fid.sampler.steps >= T:
            fid = fid.model_copy(update={"sampler": fid.sampler.model_copy(update={"steps": None})})
        if fid and fid.sampler.guidance == 1:
            fid = fid.model_copy(update={"sampler": fid.sampler.model_copy(update={"guidance": None})})
        ema = None if evaluation.ema == info.data.get("ema") else evaluation.ema
        return evaluation.model_copy(update={"nll": nll, "fid": fid, "ema": ema})

    @property
    def reconstructs(self) -> bool:
        """Whether reconstructions are measured."""
        return self.family == AUTOENCODER and bool(self.evaluation.fid and self.evaluation.reconstructions)

    @staticmethod
    def of(trial: Trial) -> "Measurement":
        ema, T, evaluation, family = trial.training.ema, trial.chain_steps, trial.evaluation, trial.model.family
        if evaluation.variance == trial.diffusion.variance and T is not None:
            evaluation = evaluation.model_copy(update={"variance": None})
        T, told = (T, trial.model.told) if family == DENOISER else (None, None)
        data, latent = trial.data.model_copy(update={"encoder": None}), trial.data.encoder is not None
        of: Any = {"family": family, "T": T, "told": told, "latent": latent, "ema": ema, "data": data}
        return Measurement(seed=trial.seed, evaluation=reset_unread(evaluation, family), **of)
