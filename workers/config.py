"""The typed records that the driver and the nodes share: one resolved trial, and nothing else.

Every record is frozen and forbids unknown keys. A `Trial` is what one training and its evaluation need;
its address is the digest of what changes its result, so names, storage, concurrency and the number of
workers are left out of it (`trial_digest`). Importing this module imports neither torch nor ray.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

Count = Literal["all"] | Annotated[int, Field(ge=1)]

# Training noise is addressed by (seed, step, sub-batch): a global batch is cut into this many parts wherever it runs,
# and each worker takes a whole number of them. A batch that 8 does not divide has fewer.
SUB_BATCHES = 8

# A validation: the first images held out, each at t = 1 and at one timestep of every stratum of 2..T, and a grid of
# samples by DDIM. The training loop does it and the preflight counts it.
VALIDATION_IMAGES = 128
VALIDATION_TIMESTEPS = 16
SAMPLE_GRID = 25
SAMPLE_GRID_STEPS = 50  # or T, where that is less

DRIVER_CPUS = 0.01  # of the process that leads the workers of a data-parallel trial: Ray Tune refuses 0


class Mistake(ValueError):
    """The user's mistake. Its message says what to do; a command prints it and exits with status 2."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Record):
    """Which images. `source` is `digits` or `gaussian`, or a path or URI: Parquet, images, CIFAR-10 binary, IDX."""

    source: str
    resolution: int | None = Field(default=None, ge=1, description="centre-crop and resize to this many pixels")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="fraction held out where the source has no test split")
    flip: bool = Field(default=False, description="mirror training images at random, left to right")


class ModelConfig(Record):
    """eps_theta: the U-Net of Ho et al. 2020, appendix B. Defaults are the paper's for CIFAR-10 (35.7M parameters)."""

    channels: int = Field(default=128, ge=1)
    multipliers: tuple[int, ...] = Field(default=(1, 2, 2, 2), min_length=1, strict=False)
    blocks: int = Field(default=2, ge=1, description="residual blocks a resolution")
    attention: tuple[int, ...] = Field(default=(16,), strict=False, description="resolutions with self-attention")
    dropout: float = Field(default=0.1, ge=0, lt=1)
    norm_groups: int = Field(default=32, ge=1)


class ScheduleConfig(Record):
    """beta_1..beta_T. `per_1000` states the range for T = 1000 and multiplies it by 1000 / T; `absolute` does not.

    SCHEDULE_READS says which kind reads what.
    """

    kind: Literal[
        "linear", "quadratic", "constant", "jsd", "warmup10", "warmup50", "cosine", "sigmoid", "list", "log_snr"
    ] = "linear"
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    scale: Literal["absolute", "per_1000"] = "absolute"
    betas: tuple[float, ...] | None = Field(default=None, strict=False, description="beta_1..beta_T of kind: list")
    log_snr_start: float = Field(default=9.0, gt=-30, lt=30, description="log SNR_1 of kind: log_snr")
    log_snr_end: float = Field(default=-9.0, gt=-30, lt=30, description="log SNR_T of kind: log_snr")


_RANGE = ("beta_start", "beta_end", "scale")
SCHEDULE_READS: dict[str, tuple[str, ...]] = {
    "linear": _RANGE,
    "quadratic": _RANGE,
    "constant": ("beta_end", "scale"),
    "jsd": (),
    "warmup10": _RANGE,
    "warmup50": _RANGE,
    "cosine": (),
    "sigmoid": _RANGE,
    "list": ("betas",),
    "log_snr": ("log_snr_start", "log_snr_end"),
}


class DiffusionConfig(Record):
    """What is diffused and what the network learns of it: its target, and for a learned variance a second head."""

    T: int = Field(default=1000, ge=1, le=100_000)
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: Literal["eps", "x_0", "mu", "v"] = "eps"
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_large"

    @property
    def learned(self) -> bool:
        """Whether the network has a second head, for the variance."""
        return self.variance.startswith("learned")


class LossConfig(Record):
    """What is minimised: `mse` the weighted squared error of the target, `kl` the bound, `hybrid` both together."""

    objective: Literal["mse", "kl", "hybrid"] = "mse"
    weighting: Literal["simple", "vlb", "snr", "truncated_snr", "min_snr", "p2"] = "simple"
    gamma: float = Field(default=5.0, gt=0, description="the cap of min-SNR-gamma")
    p2_gamma: float = Field(default=1.0, ge=0, description="the exponent of P2")
    p2_k: float = Field(default=1.0, gt=0, description="what P2 adds to the SNR")
    vlb_weight: float = Field(
        default=0.001, gt=0, description="lambda of the hybrid: what a bit/dim of the bound counts"
    )


class TrainingConfig(Record):
    """`batch_size` is global: it does not change with the number of workers."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    warmup: int = Field(default=0, ge=0, description="steps over which the learning rate rises linearly from 0")
    decay: Literal["none", "cosine"] = Field(default="none", description="of the learning rate after the warm-up")
    ema: float = Field(default=0.9999, ge=0, lt=1)
    averages: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(), strict=False, description="decays of further averages to keep; 0 is the weights themselves"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "float32"] = "auto"
    workers: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1, description="cores a worker")
    gpus: Literal["auto", 0, 1] = Field(default="auto", description="GPUs a worker; auto: 1 where the cluster has any")
    validate_every: int = Field(default=500, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    timesteps: Literal["uniform", "stratified", "antithetic", "importance"] = Field(
        default="uniform", description="how t is drawn; importance: by the second moment of the loss"
    )


def sub_batches(batch_size: int) -> int:
    """How many equal sub-batches a global batch has; the number of workers divides it."""
    return math.gcd(batch_size, SUB_BATCHES)


class SamplerConfig(Record):
    """How samples are drawn. A kind reads some of the settings (`SAMPLERS`); any other must be at its default."""

    kind: Literal["ancestral", "ddim", "euler_maruyama", "langevin", "heun", "dpmpp", "ode"] = "ancestral"
    steps: int | None = Field(default=None, ge=1, description="of the T times, or noise levels; null: all T")
    eta: float = Field(default=0.0, ge=0, le=1, description="DDIM's noise: 0 deterministic, 1 that of the DDPM")
    repeats: int = Field(default=5, ge=1, description="Langevin's updates a noise level")
    step_size: float = Field(default=0.2, gt=0, lt=4, description="Langevin's a_i / sigma_i^2; above 4 it diverges")
    tolerance: float = Field(default=1e-3, ge=1e-6, lt=1, description="of the ode's error a step and pixel in x_t")

    @model_serializer(mode="wrap")
    def _read(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the kind does not read is left out, so that it moves no address.

        `eta` of the ancestral sampler stays: it was there before there were other kinds.
        """
        names = ("steps", "eta") if self.kind == "ancestral" else SAMPLERS[self.kind]
        return {name: value for name, value in content(self).items() if name in ("kind", *names)}


# The kinds of samplers, each with the settings that it reads.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "ancestral": ("steps",),
    "ddim": ("steps", "eta"),
    "euler_maruyama": ("steps",),
    "langevin": ("steps", "repeats", "step_size"),
    "heun": ("steps",),
    "dpmpp": ("steps",),
    "ode": ("tolerance",),
}
# Evaluations that an image took of the two solvers with error control, at a tolerance, and how they rise as it falls.
# Measured on four models of the digits (T = 100 and 200, fixed and learned variance), 25 images each: samples 50 to 53
# at 1e-3, 26 to 27 at 1e-2, 133 to 178 at 1e-4; ode_nll 89 to 129 at 1e-4, 35 to 42 at 1e-3, 175 to 271 at 1e-5.
ADAPTIVE = {"samples": (52, 1e-3), "ode_nll": (104, 1e-4)}
ADAPTIVE_POWER = 0.37


def adaptive_evaluations(solver: str, tolerance: float) -> int:
    """What a plan of costs counts for an image of a solver with error control."""
    count, at = ADAPTIVE[solver]
    return round(count * (at / tolerance) ** ADAPTIVE_POWER)


def evaluations(sampler: SamplerConfig, T: int) -> int | None:
    """Evaluations of the network that a sample costs; None where the sampler's error control decides it."""
    steps = min(sampler.steps or T, T)
    match sampler.kind:
        case "heun":  # two a step, but for the last
            return 2 * steps - 1
        case "langevin":  # and one to remove what noise is left
            return steps * sampler.repeats + 1
        case "ode":
            return None
    return steps


class NLLConfig(Record):
    """The bound in bits/dim: every t, or t = 1 and a stratified sample of 2..T, drawn from `proposal` and weighted."""

    images: Count = "all"
    timesteps: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    proposal: Literal["uniform", "log_uniform"] = "log_uniform"


class FIDConfig(Record):
    """What is measured of samples: the Fréchet distance, and `also` others, between their features and real images'."""

    samples: int = Field(default=1000, ge=2)
    sampler: SamplerConfig = SamplerConfig()
    quantise: Literal["round", "truncate"] = "round"
    features: Literal["classifier", "inception"] = "classifier"
    reference: Literal["train", "held_out"] = "train"
    reference_images: Count = "all"
    also: tuple[Literal["kid", "precision_recall", "inception_score"], ...] = Field(
        default=("kid", "precision_recall"), strict=False
    )


class ODENLLConfig(Record):
    """bits/dim by the change of variables along the probability-flow ODE, of images dequantised uniformly."""

    images: Count = "all"
    probes: int = Field(default=1, ge=1, le=64, description="of Hutchinson's trace an image")
    tolerance: float = Field(default=1e-4, ge=1e-6, lt=1, description="of the solver's error a step")


class EvaluationConfig(Record):
    nll: NLLConfig | None = NLLConfig()
    fid: FIDConfig | None = FIDConfig()
    ode_nll: ODENLLConfig | None = None
    variance: Literal["fixed_small", "fixed_large"] | None = Field(
        default=None, description="of p_theta as it is measured; null: that of the checkpoint"
    )
    ema: float | None = Field(
        default=None, ge=0, lt=1, description="one of training.averages to measure; null: that of training.ema"
    )

    @model_serializer(mode="wrap")
    def _asked(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later than addresses were made counts only where it is set."""
        later = ("ode_nll", "variance", "ema")
        return {name: value for name, value in content(self).items() if name not in later or value is not None}


class Trial(Record):
    """One resolved configuration: all that training it and evaluating it take."""

    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()


class Measurement(Record):
    """What is measured of a checkpoint, whatever made it. `ema` is the length of its average, where it is known."""

    seed: int = Field(default=0, ge=0)
    data: DataConfig
    T: int = Field(ge=1)
    ema: float | None = None
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("evaluation")
    @classmethod
    def _in_one_spelling(cls, evaluation: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        """As many timesteps or steps as there are is all of them: one protocol has one address."""
        T, nll, fid = info.data.get("T", math.inf), evaluation.nll, evaluation.fid
        if nll and nll.timesteps != "all" and nll.timesteps >= T:
            nll = nll.model_copy(update={"timesteps": "all"})
        if fid and fid.sampler.steps and fid.sampler.steps >= T:
            fid = fid.model_copy(update={"sampler": fid.sampler.model_copy(update={"steps": None})})
        ema = None if evaluation.ema == info.data.get("ema") else evaluation.ema
        return evaluation.model_copy(update={"nll": nll, "fid": fid, "ema": ema})

    @staticmethod
    def of(trial: Trial) -> "Measurement":
        ema, T, evaluation = trial.training.ema, trial.diffusion.T, trial.evaluation
        if evaluation.variance == trial.diffusion.variance:
            evaluation = evaluation.model_copy(update={"variance": None})
        return Measurement(seed=trial.seed, data=trial.data, T=T, ema=ema, evaluation=evaluation)


# Settings of `training` that place or observe a run and leave its weights as they are.
NOT_ADDRESSED = ("workers", "cpus", "gpus", "validate_every", "checkpoint_every")


def digest(content: Any) -> str:
    """16 hex digits of the sha256 of `content` (anything JSON can hold), independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trained_by(row: str) -> str:
    """The address of the trial that a row of a sweep measures: several rows may measure one, each by a suffix."""
    return row.partition("-")[0]


def trial_digest(trial: Trial, data_digest: str) -> str:
    """The address of a trial: the digest of what changes its weights.

    The data count by their content (`data_digest`), not by the path they lie at; a setting that the chosen kind
    does not read (beta_start of a cosine schedule, gamma without min-SNR) does not count. A setting that came later
    counts from the first value on that is not its default, so that older trials keep their addresses.
    """
    content = trial.model_dump(mode="json", exclude={"evaluation"})
    content["data"] = {"digest": data_digest, "flip": trial.data.flip}
    for name in NOT_ADDRESSED:
        del content["training"][name]
    schedule, loss = content["diffusion"]["schedule"], content["loss"]
    content["diffusion"]["schedule"] = {name: schedule[name] for name in ("kind", *SCHEDULE_READS[schedule["kind"]])}
    read = {
        "objective": loss["objective"] != "mse",
        "weighting": True,
        "gamma": loss["weighting"] == "min_snr",
        "p2_gamma": loss["weighting"] == "p2",
        "p2_k": loss["weighting"] == "p2",
        "vlb_weight": loss["objective"] == "hybrid",
    }
    content["loss"] = {name: value for name, value in loss.items() if read[name]}
    if trial.training.timesteps == "uniform":
        del content["training"]["timesteps"]
    if not trial.training.averages:
        del content["training"]["averages"]
    return digest(content)
