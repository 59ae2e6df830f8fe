"""The config files of a diffusers folder: what model_index.json, a UNet2DModel's and a scheduler's config.json mean.

`read_*` take a file's content as parsed JSON and raise ValueError with all that keeps the model from being measured
here, each mistake with its value. A key left out has the value that diffusers documents for it; as in diffusers, a
key that is not known is passed over.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.classes import WIDEST
from workers.code import drop_pin
from workers.config import DiffusionConfig, ScheduleConfig
from workers.diffusion import schedules
from workers.diffusion.bound import LAWS
from workers.diffusion.formulations import TIMES_TOLD, AnyProcess, Continuous, take_student
from workers.diffusion.process import Process
from workers.entries import is_outside
from workers.identity import collect_settings_read
from workers.kinds import FORMULATIONS, PREDICTIONS, VARIANCES
from workers.network.autoencoder_config import AUTOENCODER_DEFAULTS, DECODER
from workers.network.unet_config import CROSS, CROSS_DEFAULTS, DEFAULTS
from workers.sides import fold
from workers.students import Student

VERSION = "0.35.0"  # the diffusers release whose layout is written


# beta_schedule, variance_type and prediction_type of diffusers -> ours.
BETAS: dict[str, Callable[[ScheduleConfig, int], schedules.Betas]] = {
    "linear": schedules.linear,
    "scaled_linear": schedules.quadratic,
    "squaredcos_cap_v2": schedules.cosine,
    "sigmoid": schedules.sigmoid,
}
VARIANCE_TYPES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same variance, computed by way of its logarithm
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
    "learned_diagonal": "learned",  # ours: diffusers' own "learned" takes the second head for sigma_t^2 itself
}
# diffusers opens a checkpoint of a prediction that it does not have, and refuses to sample from it.
# One from outside goes by its own name, with what pins its code; and so does a variance.
PREDICTION_TYPES = {entry.diffusers or name: name for name, entry in PREDICTIONS.items()}

# Schedulers of the process of Ho et al. 2020, each with its defaults that are not DDPMScheduler's. What else one does
# (its order, its spacing of the times) is sampling, and the evaluation has samplers of its own.
_NO_CLIP: dict[str, Any] = {"clip_sample": False}
_LATENT_BETAS: dict[str, Any] = {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "PNDMScheduler": _NO_CLIP,
    "DEISMultistepScheduler": _NO_CLIP,
    "DPMSolverMultistepScheduler": _NO_CLIP,
    "DPMSolverSinglestepScheduler": _NO_CLIP,
    "UniPCMultistepScheduler": _NO_CLIP,
    "EulerDiscreteScheduler": _NO_CLIP,
    "EulerAncestralDiscreteScheduler": _NO_CLIP,
    "LMSDiscreteScheduler": _NO_CLIP,
    "HeunDiscreteScheduler": _LATENT_BETAS,
    "KDPM2DiscreteScheduler": _LATENT_BETAS,
    "KDPM2AncestralDiscreteScheduler": _LATENT_BETAS,
}
# Schedulers of continuous formulations. Shifts, orders and spacings are sampling here too.
CONTINUOUS = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}
WRITTEN = {"edm": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
OTHER_SCHEDULERS = {
    "KarrasVeScheduler": "variance exploding (Karras et al. 2022): continuous sigmas, x_t is not scaled down",
    "ScoreSdeVeScheduler": "a score SDE, variance exploding (Song et al. 2020b): x_t is not scaled down",
    "ScoreSdeVpScheduler": "a score SDE in continuous time (Song et al. 2020b): it has no beta_1..beta_T",
    "CMStochasticIterativeScheduler": "a consistency model: it has no p_theta(x_{t-1} | x_t)",
    "LCMScheduler": "a distilled consistency model: it has no p_theta(x_{t-1} | x_t)",
    "TCDScheduler": "a distilled consistency model: it has no p_theta(x_{t-1} | x_t)",
}

Size = Annotated[int, Field(ge=1, le=65536)]
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels
Colours = Annotated[int, Field(ge=1, le=64)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _Network(_Config):
    """The types of the fields of UNet2DModel's config that are built here; `UNet` checks the values."""

    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
    in_channels: Colours
    out_channels: Annotated[int, Field(ge=1, le=128)]
    freq_shift: int
    flip_sin_to_cos: bool
    down_block_types: list[str]
    up_block_types: list[str]
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Field(ge=1, le=64)]
    downsample_padding: Annotated[int, Field(ge=0, le=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    attention_head_dim: Size | None
    norm_num_groups: Size
    norm_eps: Annotated[float, Field(gt=0)]


class _Stage(_Config):
    """Those of the config of an autoencoder or a generator, which checks the values itself."""

    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
    in_channels: Colours
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Field(ge=1, le=64)]
    latent_channels: Size
    norm_num_groups: Size


class _CrossNetwork(_Network):
    """The same of UNet2DConditionModel's."""

    attention_head_dim: Size
    cross_attention_dim: Annotated[int, Field(ge=1, le=WIDEST)]
    encoder_hid_dim: Annotated[int, Field(ge=1, le=WIDEST)] | None


class _Foreign(_Config):
    """The fields of the config of a network that is not ours, but for its own settings."""

    sample_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    in_channels: Colours
    out_channels: Annotated[int, Field(ge=1, le=128)]
    sides: Annotated[list[Side], Field(min_length=1, max_length=3)] | None = None
    settings: dict[str, Any]


class _Gaussian(_Config):
    """The fields of a `GaussianDenoiser`'s config."""

    sample_size: Side
    in_channels: Colours
    out_channels: Colours
    standard_deviation: Annotated[float, Field(gt=0, le=1)]


class _Scheduler(_Config):
    """The fields of a scheduler's config that say what was trained, with DDPMScheduler's defaults."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[Annotated[float, Field(gt=0, le=1)]] | None = None
    variance_type: str | None = None
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    rescale_betas_zero_snr: bool = False
    use_flow_sigmas: bool = False


class _EDM(_Config):
    """The fields of the config of diffusers' schedulers of EDM that say what was trained, with their defaults."""

    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    prediction_type: Literal["epsilon"] = "epsilon"  # v_prediction has c_out of the other sign


class _Flow(_Config):
    """The same of flow matching: the network is told t times the number of them. `_t_min` and `_t_max` are our own."""

    num_train_timesteps: Literal[1000] = 1000  # TIMES_TOLD
    invert_sigmas: Literal[False] = False
    t_min: float = Field(default=0.001, gt=0, lt=1, alias="_t_min")
    t_max: float = Field(default=0.999, gt=0, lt=1, alias="_t_max")


class _Outside(_Config):
    """The fields of the config of a formulation from outside."""

    settings: dict[str, Any]


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler's config says of the model."""

    process: AnyProcess
    prediction: str  # a name in workers.diffusion.predictions.PREDICTIONS; of a continuous formulation its own
    clip: bool  # whether its own sampling clips x_0_hat to [-1, 1]
    student: Student | None = None

    @property
    def drawn_along(self) -> AnyProcess:
        """The process that samples come along, where a student has fewer steps."""
        return take_student(self.process, self.student)


def read_foreign(config: dict[str, Any]) -> tuple[int, int, int]:
    """Image shape (height, width, channels) of the config of a network that is not ours. Raises ValueError."""
    network = _check_config(_Foreign, config)
    if network.sides and fold(tuple(network.sides)) != tuple(network.sample_size):
        raise ValueError(f"sides {network.sides} are not those of sample_size {network.sample_size}")
    return network.sample_size[0], network.sample_size[1], network.in_channels


def read_stage(config: dict[str, Any]) -> tuple[int, int, int]:
    """Image shape (height, width, channels) of the config of an autoencoder or a generator. Raises ValueError."""
    network = _check_config(_Stage, {**AUTOENCODER_DEFAULTS, **config})
    size, halvings = network.sample_size, len(network.block_out_channels) - 1
    height, width = size if isinstance(size, list) else (size, size)
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(f"sample_size {size} cannot be halved {halvings} times, as block_out_channels asks")
    if (law := config.get(DECODER, "gaussian")) not in LAWS:
        raise ValueError(f"{DECODER}: {law!r:.40} is no law of p(x | z); choose from {list(LAWS)}")
    return height, width, network.in_channels


def read_network(config: dict[str, Any]) -> tuple[int, int, int]:
    """Image shape (height, width, channels) of a UNet2DModel's or UNet2DConditionModel's config. Raises ValueError."""
    name = config.get("_class_name", "UNet2DModel")
    if name not in ("UNet2DModel", CROSS):
        raise ValueError(
            f"a {name}, not a UNet2DModel or UNet2DConditionModel: other dimensions and other architectures cannot be "
            "measured here"
        )
    if kind := config.get("class_embed_type"):
        raise ValueError(f"class_embed_type {kind!r}: classes are told by an embedding of num_class_embeds rows alone")
    if config.get("sample_size") is None:
        raise ValueError("sample_size is missing: set it to the side, in pixels, of the images it was trained on")
    kind, defaults = (_CrossNetwork, CROSS_DEFAULTS) if name == CROSS else (_Network, DEFAULTS)
    network = _check_config(kind, {**defaults, **config})
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise ValueError(
            f"out_channels {network.out_channels} for in_channels {network.in_channels}: there must be as many, or "
            "twice as many, with a learned variance"
        )
    size = network.sample_size
    height, width = size if isinstance(size, list) else (size, size)
    halvings, waves = len(network.block_out_channels) - 1, network.block_out_channels[0]
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(f"sample_size {size} cannot be halved {halvings} times, as block_out_channels asks")
    if waves % 2 or waves // 2 <= network.freq_shift:
        raise ValueError(
            f"block_out_channels[0] {waves} is not half sines and half cosines, of which freq_shift "
            f"{network.freq_shift} leaves some"
        )
    return height, width, network.in_channels


def read_gaussian(config: dict[str, Any]) -> tuple[int, int, int]:
    """Image shape (height, width, channels) of a `GaussianDenoiser`'s config. Raises ValueError."""
    denoiser = _check_config(_Gaussian, config)
    return denoiser.sample_size, denoiser.sample_size, denoiser.in_channels


def read_scheduler(config: dict[str, Any]) -> Scheduler:
    """The process, prediction and clipping of a scheduler's config. Raises ValueError with all mistakes."""
    name = config.get("_class_name", "DDPMScheduler")
    if is_continuous(name):
        return _read_continuous(name, config)
    if not isinstance(name, str) or name not in SCHEDULERS:
        what = OTHER_SCHEDULERS.get(str(name), "not known here as a scheduler of the process of Ho et al. 2020")
        raise ValueError(f"_class_name: {name!r} is {what}; choose from {[*SCHEDULERS, *CONTINUOUS]}")
    s = _check_config(_Scheduler, {**SCHEDULERS[name], **config})
    variance = s.variance_type or "fixed_small"  # most schedulers have none; it is DDPMScheduler's default
    mistakes = [
        f"{field}: {value!r} is not supported; choose from {list(known)}"
        for field, value, known in (
            ("beta_schedule", s.beta_schedule, BETAS),
            ("variance_type", variance, VARIANCE_TYPES),
            ("prediction_type", s.prediction_type, PREDICTION_TYPES),
        )
        if value not in known and not (known is not BETAS and "@" in value)
    ]
    if s.rescale_betas_zero_snr:
        mistakes.append("rescale_betas_zero_snr: alpha_bar_T would be 0, where eps does not determine x_0")
    if s.use_flow_sigmas:
        mistakes.append("use_flow_sigmas: this is flow matching, which has no beta_1..beta_T")
    if s.thresholding:
        mistakes.append("thresholding: samplers here clip x_0_hat to [-1, 1]; set it to false to measure with that")
    if s.clip_sample and s.clip_sample_range != 1:
        mistakes.append(
            f"clip_sample_range: {s.clip_sample_range} says that pixels are not on [-1, 1], as they are here; "
            "set it to 1 if they are"
        )
    T = s.num_train_timesteps
    if s.trained_betas is not None and len(s.trained_betas) != T:
        mistakes.append(f"trained_betas: {len(s.trained_betas)} values for num_train_timesteps {T}; there must be {T}")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    if s.trained_betas is not None:
        betas = np.array(s.trained_betas, dtype=np.float64)
    else:
        betas = BETAS[s.beta_schedule](ScheduleConfig(beta_start=s.beta_start, beta_end=s.beta_end), T)
    alpha_bar = schedules.alpha_bars(betas)
    to_the_end = (betas[:-1] < 1).all() and betas[-1] == 1 and s.prediction_type != "epsilon"  # as schedule jsd
    if not ((alpha_bar[-1] > 0 or to_the_end) and alpha_bar[0] < 1):
        raise ValueError(
            f"the betas give alpha_bar from {alpha_bar[0]} to {alpha_bar[-1]}; it must lie strictly between 0 and 1, "
            "but for 0 at T where the network does not predict eps"
        )
    variance = VARIANCE_TYPES.get(variance, variance)
    assert VARIANCES[variance], "of one from outside the code is there"
    process = Process.of_betas(torch.from_numpy(betas), variance)
    return Scheduler(process, PREDICTION_TYPES.get(s.prediction_type, s.prediction_type), s.clip_sample)


def is_continuous(name: Any) -> bool:
    """Whether the scheduler of this class is of a continuous formulation, of diffusers or from outside."""
    if not isinstance(name, str):
        return False
    own = FORMULATIONS.get(drop_pin(name))
    return name in CONTINUOUS or is_outside(name) or bool(own and own.continuous)


def _read_continuous(name: str, config: dict[str, Any]) -> Scheduler:
    """Of a scheduler of continuous time. What the noise levels of the training were, it does not say."""
    formulation, settings = CONTINUOUS.get(name, name), dict[str, Any]()
    if formulation == name:
        settings = _check_config(_Outside, config).settings
    elif formulation == "edm":
        settings = _check_config(_EDM, config).model_dump(exclude={"prediction_type"})
    else:
        settings = _check_config(_Flow, config).model_dump(include={"t_min", "t_max"})
    diffusion = _check_config(DiffusionConfig, {"formulation": formulation, **settings})
    process = Continuous.of(diffusion)
    if process.ends[0] >= process.ends[1]:
        raise ValueError(f"the noise levels go from {process.ends[0]} to {process.ends[1]}; the second must be larger")
    return Scheduler(process, diffusion.formulation, False)


def _make_continuous_config(process: Continuous) -> dict[str, Any]:
    """Of edm and flow that of a scheduler of diffusers' that samples with the same network; else one of our own."""
    name = process.config.formulation
    settings = {n: v for n, v in collect_settings_read(process.config).items() if n != "formulation"}
    if name not in WRITTEN:
        return {"_class_name": name, "settings": settings}
    if name == "edm":
        own = {field: settings[field] for field in ("sigma_min", "sigma_max", "sigma_data")}
    else:  # names that begin with _ are kept by diffusers, and not read
        set_ = collect_settings_read(process.config, only_set=True)
        own = {f"_{field}": set_[field] for field in ("t_min", "t_max") if field in set_}
    return {"_class_name": WRITTEN[name], "_diffusers_version": VERSION, "num_train_timesteps": TIMES_TOLD, **own}


def make_scheduler_config(process: AnyProcess, prediction: str = "eps", *, clip: bool = True) -> dict[str, Any]:
    """The config of a diffusers DDPMScheduler that samples the same process, or of one of continuous time; `clip` says
    whether it clips x_0_hat to [-1, 1].

    With the prediction `mu` it raises an error at its first step, and so does its sampling with a learned diagonal.
    """
    if isinstance(process, Continuous):
        return _make_continuous_config(process)
    variance = process.variance
    prediction_type = next((theirs for theirs, ours in PREDICTION_TYPES.items() if ours == prediction), prediction)
    variance_type = next((theirs for theirs, ours in VARIANCE_TYPES.items() if ours == variance), variance)
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": process.T,
        "trained_betas": process.beta.tolist(),
        "variance_type": variance_type,
        "prediction_type": prediction_type,
        "clip_sample": clip,
    }


C = TypeVar("C", bound=BaseModel)


def _check_config(kind: type[C], config: dict[str, Any]) -> C:
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['input']!r:.60}: {e['msg']}" for e in error.errors()]
        raise ValueError("; ".join(mistakes)) from error
