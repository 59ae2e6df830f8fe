"""What an experiment file says: the records of the search, of tracking and of the preflight around a trial.

Neither torch nor Ray is imported by any module of this room.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from orchestrator.experiment.metrics import METRICS, RANKS, list_metrics
from orchestrator.experiment.settings import show
from workers.code import drop_digests
from workers.config import (
    MOST_STEPS,
    Mistake,
    Open,
    Record,
    Trial,
    hide_secrets,
)

MOST_VARIANTS = 10_000
BATCH = 8  # trials per round of an adaptive search, where the file does not say


class ExperimentError(Mistake):
    """All mistakes found in an experiment, one text each in `problems`; `where` names the file."""

    def __init__(self, problems: Iterable[str], where: str = "the experiment") -> None:
        self.problems, self.where = [drop_digests(text) for text in problems], where
        super().__init__(self.problems, where)

    def __str__(self) -> str:
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        return hide_secrets("\n  ".join([f"{self.where}: {count}", *self.problems]))


def _check_name(name: str) -> str:
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,100}", name) or ".." in name:
        raise ValueError(
            f"{name!r} is to be the name of a folder below the storage root: 1 to 100 of the letters A to Z and a to "
            "z, digits, '.', '_' and '-', without spaces, a dot in front or two in a row"
        )
    return name


Name = Annotated[str, AfterValidator(_check_name)]


def _refuse_loss(metric: object) -> object:
    if isinstance(metric, str) and (metric.startswith("train/") or "loss" in metric):
        raise ValueError(
            f"{metric!r} is measured on the training objective, which is not comparable across weightings, targets "
            f"or T; valid: {', '.join(RANKS)}"
        )
    return metric


def _allow_own(metric: object, check: Callable[[object], object]) -> object:
    """A metric of a measure from outside is as those of ours."""
    return metric if metric in list_metrics().keys() - METRICS.keys() else check(metric)


def _describe_names(names: Iterable[str]) -> WithJsonSchema:
    """Of a metric's name in a file: an editor does not know those of measures from outside."""
    return WithJsonSchema(
        {"anyOf": [{"enum": list(names), "type": "string"}, {"pattern": r"^eval/[\w.]+$", "type": "string"}]}
    )


# The names of metrics are those of their table.
if TYPE_CHECKING:
    MetricName = str
    TradedName = str
else:
    MetricName = Annotated[
        Literal[RANKS], BeforeValidator(_refuse_loss), WrapValidator(_allow_own), _describe_names(RANKS)
    ]
    TradedName = Annotated[
        Literal[tuple(METRICS)], BeforeValidator(_refuse_loss), WrapValidator(_allow_own), _describe_names(METRICS)
    ]
Values = Annotated[tuple[Any, ...], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]
WholeRange = Annotated[tuple[int, int], Field(strict=False)]


class Axis(Record):
    """What one path of the search space takes: exactly one of these. Ranges include both ends."""

    grid: Values | None = Field(default=None, description="each of these values")
    choice: Values | None = Field(default=None, description="one of these values, drawn")
    uniform: Range | None = Field(default=None, description="drawn from [low, high]")
    loguniform: Range | None = Field(default=None, description="drawn from [low, high], uniform in the logarithm")
    int_uniform: WholeRange | None = Field(default=None, description="a whole number drawn from low..high")

    @model_validator(mode="before")
    @classmethod
    def _refuse_bare(cls, content: Any) -> Any:
        if isinstance(content, list | str | int | float):
            values = content if isinstance(content, list) else [content]
            raise ValueError(f"{show(content)} does not say how to search; write {{grid: {show(values)}}} to try each")
        return content

    @field_validator("grid", "choice")
    @classmethod
    def _refuse_empty(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values == ():
            raise ValueError("[] is an empty search: no trial would run; give at least one value")
        return values

    @field_validator("uniform", "loguniform", "int_uniform")
    @classmethod
    def _check_rising(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends and ends[0] > ends[1]:
            raise ValueError(f"{show(ends)} is reversed; write {show(ends[::-1])}")
        return ends

    @field_validator("loguniform")
    @classmethod
    def _check_positive(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends and ends[0] <= 0:
            raise ValueError(f"{show(ends)} has no logarithm at {show(ends[0])}; start above 0, or use uniform")
        return ends

    @model_validator(mode="after")
    def _check_one_form(self) -> "Axis":
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"takes exactly one of {', '.join(Axis.model_fields)}; given: {' and '.join(given) or 'none'}"
            )
        return self

    @model_serializer
    def _write_given(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}

    @property
    def kind(self) -> str:
        return next(name for name, value in self if value is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a grid or choice, the two ends of a range."""
        return tuple(getattr(self, self.kind))


# The kinds of schedulers, each with the settings that it reads.
SCHEDULERS: dict[str, tuple[str, ...]] = {"none": (), "asha": ("grace", "reduction"), "median": ("grace", "others")}


class SchedulerConfig(Record):
    """Stops trials early by their validation, after `grace` steps that are safe.

    `asha`: after each rung the best 1 in `reduction` go on. `median`: whoever's best is above the median of the others'
    means until the same step ends, once `others` of them have come so far.
    """

    READS: ClassVar = {"kind": SCHEDULERS}

    kind: Literal["none", "asha", "median"] = Field(default="none", description="how trials are stopped early")
    grace: int = Field(default=1000, ge=1, le=MOST_STEPS, description="training steps before a trial may be stopped")
    reduction: int = Field(
        default=4, ge=2, le=MOST_VARIANTS, description="of asha: one in so many goes on from a rung to the next"
    )
    others: int = Field(
        default=3, ge=1, le=MOST_VARIANTS, description="of median: trials that the median is taken of, at least"
    )


# The ways to search, each with the settings that it reads.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grid": (),
    "random": ("samples",),
    "sobol": ("samples",),
    "optuna": ("samples", "batch"),
}


class SearchConfig(Record):
    """`space` maps dotted paths of the trial, sections included, to what they take; empty, it means one trial."""

    READS: ClassVar = {"algorithm": ALGORITHMS}

    space: dict[str, Axis] = Field(
        default_factory=dict, description="dotted paths of settings, each with the values that it takes"
    )
    without: tuple[dict[str, Any], ...] = Field(
        default=(),
        strict=False,
        description="values by path of the space, or lists of them: variants that have one of each are left out",
    )
    algorithm: Literal["grid", "random", "sobol", "optuna"] = Field(
        default="grid", description="random and sobol (quasi-random) draw; optuna asks for rounds by what was measured"
    )
    samples: int | None = Field(
        default=None, ge=1, description="draws in all, each crossed with any grid; an optuna search has no grid"
    )
    batch: int | None = Field(default=None, ge=1, description=f"draws per round of an optuna search; null: {BATCH}")
    metric: MetricName = Field(default="eval/nll_bpd", description="what trials are ranked by")
    also: tuple[TradedName, ...] = Field(
        default=(),
        strict=False,
        description="further objectives, lower being better: of an optuna search, and of the "
        "Pareto front that is shown",
    )
    scheduler: SchedulerConfig = Field(default=SchedulerConfig(), description="stops trials early")
    max_concurrent: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_VARIANTS)] = Field(
        default="auto", description="trials that train at once; auto: as many as fit"
    )
    max_failures: int = Field(default=3, ge=0, le=1000, description="restarts of a trial after faults of machines")
    hang_s: float = Field(
        default=60.0,
        ge=20.0,
        le=1e6,
        description="a process of a trial that is not heard for so long is ended, and the trial starts again from its "
        "last checkpoint; as is one that is heard, but makes no step in ten times that (or ten times its slowest step)",
    )

    @field_validator("samples", mode="before")
    @classmethod
    def _refuse_none(cls, samples: object) -> object:
        if samples == 0:
            raise ValueError("0 is an empty search: no trial would run; take at least 1")
        return samples

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metric that ranks the trials, and after it the others."""
        return self.metric, *self.also

    @property
    def first(self) -> int:
        """How many draws are known before anything is measured: all, or the first round of an optuna search."""
        samples = self.samples or 1
        return min(self.batch or BATCH, samples) if self.algorithm == "optuna" else samples


class TrackingConfig(Record):
    uri: Open | None = Field(default=None, description="MLflow's; null: a local database under the storage root")


class PreflightConfig(Record):
    max_prior_bpd: float = Field(default=0.1, ge=0, description="largest prior gap L_T, in bits/dim")


class Experiment(Trial):
    """A trial, and what to make of it. `trial` is the part outside the search."""

    name: Name = Field(description="of the sweep: its folder in the storage and its experiment in MLflow")
    code: tuple[str, ...] = Field(
        default=(), strict=False, description="folders of modules of one's own, relative to this file"
    )
    search: SearchConfig = Field(default=SearchConfig(), description="which trials to run; without it there is one")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="where MLflow is")
    needs: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="trials that others start from, by a name for training.init.source or loss.teacher.source: "
        "overrides by their path, which make each of what stands outside of the search",
    )
    preflight: PreflightConfig = Field(default=PreflightConfig(), description="what is refused before anything starts")

    _pins: dict[str, str] = PrivateAttr(default_factory=dict)
    _latents: dict[str, tuple[int, int]] = PrivateAttr(default_factory=dict)

    @property
    def pins(self) -> Mapping[str, str]:
        """What the sources of `training.init` are pinned to: see `workers.warm_start`."""
        return self._pins

    @property
    def latents(self) -> Mapping[str, tuple[int, int]]:
        """Channels and halvings of the latents of those sources that are autoencoders."""
        return self._latents

    def pin(self, pins: Mapping[str, str], latents: Mapping[str, tuple[int, int]]) -> "Experiment":
        """The same with these pins, and with these latents."""
        pinned = self.model_copy()
        pinned._pins, pinned._latents = dict(pins), dict(latents)
        return pinned

    @property
    def trial(self) -> Trial:
        return Trial(**{name: getattr(self, name) for name in Trial.model_fields})


class ExperimentFile(Experiment):
    """An experiment as its file has it."""

    smoke: dict[str, Any] = Field(
        default_factory=dict, description="overrides by their path, which `--smoke` applies: the same sweep in seconds"
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One point of the search space: the searched values by path, and the trial that they make of the experiment.

    One with a `role` is none: it is made, and not measured, as others start from it (`experiment.starts`).
    """

    params: dict[str, Any]
    trial: Trial
    role: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{path}={show(value)}" for path, value in self.params.items()) or "the experiment itself"
