"""The experiment file: read it, override it from the command line, check it, expand it into trials.

    file + overrides -> load -> Experiment -> expand -> Variants -> by_digest -> trials by their address

An experiment is a trial, and around it what to search and where to track it. A file may also say by which overrides it
becomes small (`smoke`); what is loaded has them applied, or not at all. `load` tells all mistakes at once, in words of
its own. Everything but the reading of the file is a pure function; neither torch nor ray is imported.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from orchestrator.settings import (
    invalid,
    leaves,
    meant_path,
    merge,
    overlap,
    paths,
    put,
    read_file,
    read_yaml,
    show,
    valid,
    write_yaml,
)
from workers.blocks import distance_name
from workers.config import (
    NOT_ADDRESSED,
    SAMPLERS,
    SCHEDULE_READS,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    Measurement,
    Mistake,
    Record,
    SamplerConfig,
    Trial,
    digest,
    sub_batches,
    trial_digest,
)

MOST_VARIANTS = 10_000
BATCH = 8  # trials a round of an adaptive search, where the file does not say


class ExperimentError(Mistake):
    """All mistakes found in an experiment, one text each in `problems`; `where` names the file."""

    def __init__(self, problems: Iterable[str], where: str = "the experiment") -> None:
        self.problems, self.where = list(problems), where
        super().__init__(self.problems, where)

    def __str__(self) -> str:
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        return "\n  ".join([f"{self.where}: {count}", *self.problems])


# ---- The records -----------------------------------------------------------------------------------------------


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,100}", name) or ".." in name:
        raise ValueError(
            f"{name!r} must stay inside the storage root: 1 to 100 letters, digits, '.', '_' or '-', "
            "without a dot in front or two in a row"
        )
    return name


Name = Annotated[str, AfterValidator(_safe_name)]


def _not_a_loss(metric: object) -> object:
    if isinstance(metric, str) and (metric.startswith("train/") or "loss" in metric):
        raise ValueError(
            f"{metric!r} is measured on the training objective, which is not comparable across weightings, targets "
            f"or T; valid: {', '.join(MEASURED_BY)}"
        )
    return metric


# The metrics to rank on, and the part of `evaluation` that measures each; and what else may be an objective.
MEASURED_BY = {
    "eval/nll_bpd": "nll",
    "eval/fid": "fid",
    "eval/fd_classifier": "fid",
    "eval/ode_nll_bpd": "ode_nll",
    "valid/nll_bpd": None,
}
OBJECTIVES = {**MEASURED_BY, "eval/network_evaluations": "fid"}
Metric = Annotated[
    Literal["eval/nll_bpd", "eval/fid", "eval/fd_classifier", "eval/ode_nll_bpd", "valid/nll_bpd"],
    BeforeValidator(_not_a_loss),
]
Objective = Annotated[
    Literal[
        "eval/nll_bpd",
        "eval/fid",
        "eval/fd_classifier",
        "eval/ode_nll_bpd",
        "valid/nll_bpd",
        "eval/network_evaluations",
    ],
    BeforeValidator(_not_a_loss),
]
EarlyMetric = Annotated[Literal["valid/nll_bpd"], BeforeValidator(_not_a_loss)]
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
    def _not_bare(cls, content: Any) -> Any:
        if isinstance(content, list | str | int | float):
            values = content if isinstance(content, list) else [content]
            raise ValueError(f"{show(content)} does not say how to search; write {{grid: {show(values)}}} to try each")
        return content

    @field_validator("grid", "choice")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values == ():
            raise ValueError("[] is an empty search: no trial would run; give at least one value")
        return values

    @field_validator("uniform", "loguniform", "int_uniform")
    @classmethod
    def _rising(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends and ends[0] > ends[1]:
            raise ValueError(f"{show(ends)} is reversed; write {show(ends[::-1])}")
        return ends

    @field_validator("loguniform")
    @classmethod
    def _positive(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends and ends[0] <= 0:
            raise ValueError(f"{show(ends)} has no logarithm at {show(ends[0])}; start above 0, or use uniform")
        return ends

    @model_validator(mode="after")
    def _one(self) -> "Axis":
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"takes exactly one of {', '.join(Axis.model_fields)}; given: {' and '.join(given) or 'none'}"
            )
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}

    @property
    def kind(self) -> str:
        return next(name for name, value in self if value is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a grid or choice, the two ends of a range."""
        return tuple(getattr(self, self.kind))


class SchedulerConfig(Record):
    """Stops trials early, after `grace` steps that are safe. SCHEDULERS says which kind reads what.

    `asha`: after each rung the best 1 in `reduction` go on. `median`: whoever's best is above the median of the others'
    means until the same step ends, once `others` of them have come so far.
    """

    kind: Literal["none", "asha", "median"] = "none"
    grace: int = Field(default=1000, ge=1, description="training steps before a trial may be stopped")
    reduction: int = Field(default=4, ge=2, description="of asha: one in so many goes on from a rung to the next")
    others: int = Field(default=3, ge=1, description="of median: trials that the median is taken of, at least")
    metric: EarlyMetric = "valid/nll_bpd"

    @model_serializer(mode="wrap")
    def _read(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later is left out where the kind does not read it, so that what was pruned before stays so."""
        return {n: v for n, v in content(self).items() if n in ("kind", "metric", *SCHEDULERS[self.kind])}


# The kinds of schedulers, each with the settings that it reads; `none` keeps those that its key has always held.
SCHEDULERS = {"none": ("grace", "reduction"), "asha": ("grace", "reduction"), "median": ("grace", "others")}


class SearchConfig(Record):
    """`space` maps dotted paths of the trial, sections included, to what they take; empty, it means one trial."""

    space: dict[str, Axis] = Field(default_factory=dict)
    without: tuple[dict[str, Any], ...] = Field(
        default=(), strict=False, description="values by path of the space: variants that have them all are left out"
    )
    algorithm: Literal["grid", "random", "sobol", "optuna"] = Field(
        default="grid", description="random and sobol (quasi-random) draw; optuna asks for rounds by what was measured"
    )
    samples: int | None = Field(
        default=None, ge=1, description="draws in all, each crossed with any grid; an optuna search has no grid"
    )
    batch: int | None = Field(default=None, ge=1, description=f"draws a round of an optuna search; null: {BATCH}")
    metric: Metric = "eval/nll_bpd"
    also: tuple[Objective, ...] = Field(
        default=(),
        strict=False,
        description="further objectives, lower being better: of an optuna search, and of the "
        "Pareto front that is shown",
    )
    mode: Literal["min", "max"] = "min"
    scheduler: SchedulerConfig = SchedulerConfig()
    max_concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    max_failures: int = Field(default=3, ge=0, description="restarts of a trial after faults of machines")

    @field_validator("samples", mode="before")
    @classmethod
    def _some(cls, samples: object) -> object:
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
    uri: str | None = Field(default=None, description="MLflow's; null: a local database under the storage root")


class PreflightConfig(Record):
    max_prior_bpd: float = Field(default=0.1, ge=0, description="largest prior gap L_T, in bits/dim")


class Experiment(Trial):
    """A trial, and what to make of it. `trial` is the part outside the search."""

    name: Name
    search: SearchConfig = SearchConfig()
    tracking: TrackingConfig = TrackingConfig()
    preflight: PreflightConfig = PreflightConfig()

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
    """One point of the search space: the searched values by path, and the trial that they make of the experiment."""

    params: dict[str, Any]
    trial: Trial

    def __str__(self) -> str:
        return ", ".join(f"{path}={show(value)}" for path, value in self.params.items()) or "the experiment itself"


# ---- Reading ---------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), smoke: bool = False) -> Experiment:
    """The experiment in a YAML file, with `a.b=value` overrides applied. Raises ExperimentError with all mistakes.

    An override replaces what is at its path, be it a whole section. `search.space.<path>.<kind>=[...]` replaces how
    a path is searched and `search.space.<path>=null` takes it out of the search. With `smoke` those of the file's own
    section come first, and the name gets a `-smoke`; without it they are checked all the same.
    """
    try:
        content, problems = read_file(Path(path), "an experiment needs name, data and training")
    except ValueError as mistake:
        raise ExperimentError([str(mistake)], str(path)) from None
    if smoke and not content.get("smoke"):
        problems.append("smoke: the file has no such section; add one, such as smoke: {training.steps: 4}")
    changed, wrong = _smoked(content) if smoke else (_whole(content), _smoke_mistakes(content))
    given: list[tuple[str, str, Any]] = []
    for text in overrides:
        try:
            given.append((f"override {text!r}", *assignment(text)))
        except ValueError as mistake:
            problems.append(f"override {text!r}: {mistake}")
    changed, without = _changed(changed, given)
    if smoke and isinstance(changed.get("name"), str):
        changed["name"] += "-smoke"
    if problems := [*problems, *wrong, *without, *_mistakes(changed)]:
        raise ExperimentError(problems, str(path))
    return Experiment.model_validate(changed)


def parse(content: Mapping[str, Any]) -> Experiment:
    """The experiment that `content` describes. Raises ExperimentError with all mistakes."""
    if problems := mistakes(content):
        raise ExperimentError(problems)
    return Experiment.model_validate(_whole(content))


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Every setting with its value, in plain types, name first: `parse` makes an equal experiment of it."""
    content = experiment.model_dump(mode="json")
    return {"name": content.pop("name"), **content}


def to_yaml(experiment: Experiment) -> str:
    """`resolved` as the text of an experiment file: `load` makes an equal experiment of it."""
    return write_yaml(resolved(experiment))


def assignment(text: str) -> tuple[str, Any]:
    """The path and the value of `a.b=value`. Raises ValueError."""
    path, equals, right = (part.strip() for part in text.partition("="))
    if not (path and equals and right):
        raise ValueError("write a.b=value, and null for no value")
    value, problems = read_yaml(right)
    if problems:
        raise ValueError("; ".join(problems))
    return path, value


def _whole(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file without what makes it small."""
    return {name: value for name, value in content.items() if name != "smoke"}


def _smoked(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a file as its own `smoke` changes it, and which of those overrides are wrong."""
    smoke = content.get("smoke", {})
    if not isinstance(smoke, Mapping):
        return _whole(content), [f"smoke: {show(smoke)} is not a mapping of paths, such as {{training.steps: 4}}"]
    return _changed(_whole(content), [(f"smoke.{path}", path, value) for path, value in smoke.items()])


def _changed(content: dict[str, Any], given: Sequence[tuple[str, str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """`content` with the overrides (how each is called, its path, its value), and which of them are wrong."""
    content, taken, problems = dict(content), list[tuple[str, str, Any]](), list[str]()
    for name, path, value in given:
        try:
            content = _override(content, path, value)
            taken.append((name, path, value))
        except ValueError as mistake:
            problems.append(f"{name}: {mistake}")
    return content, problems + [
        f"{name}: without effect, as search.space sets {key} in every trial; "
        f"override search.space.{key}.grid=[...], or end its search with search.space.{key}=null"
        for name, path, value in taken
        for key, axis in _axes(content).items()
        if overlap(leaves(path, value), _sets(key, axis))
    ]


def _override(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`content` with `value` at `path`, which may go through a key of search.space. Raises ValueError."""
    key = path.removeprefix("search.space.")
    if key == path:
        if path not in SETTINGS:
            raise ValueError(f"unknown path{meant_path(path, SETTINGS)}")
        return dict(put(content, path.split("."), value))
    stem, _, kind = key.rpartition(".")
    if stem and kind in Axis.model_fields:
        key, value = stem, {kind: value}
    space = _space(content)
    if value is None and key not in space:
        raise ValueError(f"{key} is not searched{meant_path(key, list(space))}")
    space = {name: axis for name, axis in {**space, key: value}.items() if axis is not None}
    return dict(put(content, ["search", "space"], space))


# ---- Checking --------------------------------------------------------------------------------------------------


def mistakes(content: Mapping[str, Any]) -> list[str]:
    """All mistakes in the content of an experiment file; empty if it is valid."""
    return _mistakes(_whole(content)) + _smoke_mistakes(content)


def _smoke_mistakes(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with a file's `smoke`, and with the experiment that it makes beside what is wrong anyway."""
    if content.get("smoke", {}) == {}:
        return []
    small, problems = _smoked(content)
    known = _mistakes(_whole(content))
    return problems + [f"smoke: {text}" for text in _mistakes(small) if text not in known]


def _mistakes(content: Mapping[str, Any]) -> list[str]:
    found = [f"{path}: {text}" for path, text in invalid(ExperimentFile, content)]
    trial = valid(Trial, {name: value for name, value in content.items() if name in Trial.model_fields})
    search = valid(SearchConfig, content.get("search", {}))
    for path, axis in _axes(content).items():
        found += _axis_mistakes(path, axis)
    found += trial_mistakes(trial) if trial else []
    found += _search_mistakes(search) if search else []
    found += _metric_mistakes(search, trial) if search and trial else []
    if found:
        return found
    variants = expand(Experiment.model_validate(content))
    if not variants:
        return ["search.without: leaves out every variant of the search; no trial would run"]
    return told(((text, variant) for variant in variants for text in trial_mistakes(variant.trial)), len(variants))


def told(found: Iterable[tuple[str, Variant]], total: int) -> list[str]:
    """Each text once, with the variants of which it holds where it does not hold of all."""
    variants: dict[str, list[Variant]] = {}
    for text, variant in found:
        variants.setdefault(text, []).append(variant)
    return [
        text if len(some) == total else f"{text} ({len(some)} of {total} variants; first: {some[0]})"
        for text, some in variants.items()
    ]


def _axis_mistakes(path: str, axis: Axis) -> list[str]:
    """What is wrong with a path of the search space and with each of its values, taken by itself."""
    where = f"search.space.{path}"
    if path not in TRIAL_SETTINGS:
        return [f"{where}: no such setting of a trial{meant_path(path, TRIAL_SETTINGS)}"]
    if all(re.match(NOT_TRAINED, leaf) for leaf in _sets(path, axis)):
        return [f"{where}: does not change what is trained: all its values are one and the same trial; set it outside"]
    found = []
    for index, value in enumerate(_tried(axis)):
        for wrong, text in invalid(Trial, merge(LEAST_TRIAL, put({}, path.split("."), value))):
            if axis.kind in ("uniform", "loguniform"):
                text = re.sub("; write .*", "; use int_uniform", text)
            found.append(f"{where}.{axis.kind}[{index}]{wrong.removeprefix(path)}: {text}")
    return found


def trial_mistakes(trial: Trial) -> list[str]:
    """Settings, each valid by itself, that do not go together."""
    T, training = trial.diffusion.T, trial.training
    found = [*_schedule_mistakes(trial.diffusion), *_objective_mistakes(trial)]
    parts = sub_batches(training.batch_size)
    if parts % training.workers:
        found.append(
            f"training.workers: {training.workers} workers cannot share a batch_size of {training.batch_size}, whose "
            f"noise comes in {parts} sub-batches of {training.batch_size // parts}; "
            f"valid: {', '.join(str(n) for n in range(1, parts + 1) if parts % n == 0)}"
        )
    kept, ema = (training.ema, *training.averages), trial.evaluation.ema
    if ema is not None and ema not in kept:
        found.append(
            f"evaluation.ema: {ema:g} is no average that is kept in training, which are {', '.join(map(str, kept))}; "
            "take one of them, or add it to training.averages"
        )
    found += flow_mistakes(trial.evaluation, trial.diffusion.prediction)
    fid, endless = trial.evaluation.fid, trial.diffusion.schedule.kind == "jsd"
    if endless and fid and fid.sampler.kind not in ("ancestral", "ddim"):
        found.append(
            f"evaluation.fid.sampler.kind: {fid.sampler.kind} goes through noise levels sigma, and "
            "diffusion.schedule.kind: jsd begins at sigma_T = inf; take ancestral or ddim, or another schedule"
        )
    if endless and trial.evaluation.ode_nll:
        found.append("evaluation.ode_nll: diffusion.schedule.kind: jsd ends at sigma_T = inf; leave one out")
    return found + evaluation_mistakes(trial.evaluation, T)


def _schedule_mistakes(diffusion: DiffusionConfig) -> Iterator[str]:
    s, reads = diffusion.schedule, SCHEDULE_READS[diffusion.schedule.kind]
    if "beta_start" in reads and s.beta_start > s.beta_end:
        yield (
            f"diffusion.schedule.beta_start: {s.beta_start:g} is above beta_end = {s.beta_end:g}; the range is reversed"
        )
    if s.kind == "log_snr" and s.log_snr_start <= s.log_snr_end:
        yield (
            f"diffusion.schedule.log_snr_start: {s.log_snr_start:g} is not above log_snr_end = {s.log_snr_end:g}, but "
            "t = 1 has more signal than T; swap them"
        )
    if s.kind != "list" and s.betas is not None:
        yield f"diffusion.schedule.betas: without effect on kind: {s.kind}; leave it out, or take kind: list"
    if s.kind == "list" and len(s.betas or ()) != diffusion.T:
        yield (
            f"diffusion.schedule.betas: kind: list needs one value for each of diffusion.T = {diffusion.T} timesteps; "
            f"given: {len(s.betas or ())}"
        )
    if s.kind == "list" and (outside := [beta for beta in s.betas or () if not 0 < beta < 1]):
        yield f"diffusion.schedule.betas: {show(outside[:5])} must lie between 0 and 1, both excluded"


def _objective_mistakes(trial: Trial) -> Iterator[str]:
    """What is predicted, its variance and the loss must go together."""
    d, loss = trial.diffusion, trial.loss
    if d.learned and loss.objective == "mse":
        yield (
            f"diffusion.variance: {d.variance} is not trained by loss.objective: mse, in which the variance has no "
            "part; take objective: hybrid or kl, or variance: fixed_small or fixed_large"
        )
    if not d.learned and loss.objective == "hybrid":
        yield (
            f"loss.objective: hybrid adds the bound to teach a variance, but diffusion.variance: {d.variance} is not "
            "learned; take variance: learned_range or learned, or objective: mse or kl"
        )
    if loss.objective == "kl" and loss.weighting != "simple":
        yield (
            f"loss.weighting: {loss.weighting} is without effect on objective: kl, the bound, which weighs t itself; "
            "leave it out, or take objective: mse"
        )
    if d.learned and loss.objective == "hybrid" and loss.weighting == "vlb":
        yield (
            f"loss.weighting: vlb weighs t by a fixed sigma_t^2, and diffusion.variance: {d.variance} has none; "
            "take objective: kl for the bound, or another weighting"
        )
    if d.prediction == "mu" and trial.training.precision == "bf16":
        yield (
            "training.precision: bf16 has not the digits in which diffusion.prediction: mu differs from x_t; "
            "take auto or float32, or another prediction"
        )


def flow_mistakes(evaluation: EvaluationConfig, prediction: str) -> list[str]:
    """Solvers that choose their own times need a network that says something between those of the training."""
    if prediction != "mu":
        return []
    fid, why = evaluation.fid, "asks for eps between the times of the training, where diffusion.prediction: mu has none"
    found = [f"evaluation.ode_nll: {why}; set it to null"] if evaluation.ode_nll else []
    if fid and fid.sampler.kind == "ode":
        found.append(f"evaluation.fid.sampler.kind: ode {why}; take heun or dpmpp")
    return found


def evaluation_mistakes(evaluation: EvaluationConfig, T: int) -> list[str]:
    """Settings of an evaluation, each valid by itself, that do not go together or with a chain of T steps."""
    found, nll, fid = [], evaluation.nll, evaluation.fid
    if nll and nll.timesteps != "all" and nll.timesteps > T:
        found.append(f"evaluation.nll.timesteps: {nll.timesteps} is more than diffusion.T = {T}; at most T, or all")
    found += _sampler_mistakes(fid.sampler, T) if fid else []
    if fid and "inception_score" in fid.also and fid.features != "inception":
        found.append(
            f"evaluation.fid.also: inception_score needs features: inception, not {fid.features}; leave one out"
        )
    return found


def _sampler_mistakes(sampler: SamplerConfig, T: int) -> list[str]:
    """Settings that the kind of sampler does not read, and more steps than there are times."""
    where, reads, found = "evaluation.fid.sampler", SAMPLERS[sampler.kind], []
    for name, field in SamplerConfig.model_fields.items():
        value = getattr(sampler, name)
        if name not in ("kind", *reads) and value != field.default:
            others = " or ".join(kind for kind, names in SAMPLERS.items() if name in names)
            found.append(
                f"{where}.{name}: {value:g} is without effect on the {sampler.kind} sampler, which reads "
                f"{', '.join(reads)}; leave it out, or take kind: {others}"
            )
    if "steps" in reads and sampler.steps and sampler.steps > T:
        found.append(f"{where}.steps: {sampler.steps} is more than diffusion.T = {T}; at most T, or null")
    return found


def _search_mistakes(search: SearchConfig) -> list[str]:
    """Whether the parts of the search go together."""
    found = []
    drawn = [path for path, axis in search.space.items() if axis.kind != "grid"]
    if search.algorithm == "grid":
        found += [
            f"search.space.{p}: {search.space[p].kind} is drawn; set search.algorithm: random, sobol or optuna"
            for p in drawn
        ]
        if search.samples is not None:
            found.append(f"search.samples: {search.samples} is without effect on algorithm: grid; leave it out")
    elif not drawn:
        kinds = ", ".join(DRAWS)
        found.append(
            f"search.algorithm: {search.algorithm} has nothing to draw; give a path of search.space one of {kinds}"
        )
    elif search.samples is None:
        found.append(f"search.samples: missing; algorithm: {search.algorithm} needs a number of draws")
    found += [*_round_mistakes(search), *_scheduler_mistakes(search.scheduler)]
    size = math.prod([search.samples or 1, *(len(a.values) for a in search.space.values() if a.kind == "grid")])
    if size > MOST_VARIANTS:
        found.append(f"search.space: {size:,} variants are more than {MOST_VARIANTS:,}; take fewer values or samples")
    for index, left_out in enumerate(search.without):
        known = list(search.space)
        found += [
            f"search.without[{index}].{p}: not a path of search.space{meant_path(p, known)}"
            for p in left_out
            if p not in known
        ]
        if not left_out:
            found.append(f"search.without[{index}]: {{}} would leave out every variant; name paths and values")
    for (one, ours), (other, theirs) in itertools.combinations(search.space.items(), 2):
        if overlap(_sets(one, ours), _sets(other, theirs)):
            found.append(f"search.space.{other}: sets what search.space.{one} sets too; keep one of them")
    return found


def _round_mistakes(search: SearchConfig) -> Iterator[str]:
    """What concerns a search in rounds, and its objectives."""
    if search.algorithm == "optuna":
        for path, axis in search.space.items():
            if axis.kind == "grid":
                yield (
                    f"search.space.{path}: grid would cross each draw of algorithm: optuna with all of its values; "
                    f"write {{choice: {show(list(axis.values))}}}, from which one is drawn"
                )
        if search.batch and search.samples and search.batch > search.samples:
            yield (
                f"search.batch: {search.batch} a round are more than search.samples = {search.samples} in all; take "
                "at most as many, and fewer for the search to learn anything"
            )
    elif search.batch is not None:
        yield f"search.batch: {search.batch} is without effect on algorithm: {search.algorithm}; leave it out"
    for name in dict.fromkeys(search.also):
        if search.objectives.count(name) > 1:
            yield f"search.also: {name} is an objective already; name each once"


def _scheduler_mistakes(scheduler: SchedulerConfig) -> Iterator[str]:
    reads = SCHEDULERS[scheduler.kind]
    for name in ("reduction", "others"):
        if name not in reads and getattr(scheduler, name) != SchedulerConfig.model_fields[name].default:
            kinds = " or ".join(kind for kind, names in SCHEDULERS.items() if name in names and kind != "none")
            yield (
                f"search.scheduler.{name}: {getattr(scheduler, name)} is without effect on kind: {scheduler.kind}; "
                f"leave it out, or take kind: {kinds}"
            )


def _metric_mistakes(search: SearchConfig, trial: Trial) -> list[str]:
    """A search must rank on something that is measured, and so its objectives; a single trial is not ranked."""
    found, fid = [], trial.evaluation.fid
    measured = ("eval/network_evaluations", f"eval/{distance_name(fid)}" if fid else "")
    for where, name in [("search.metric", search.metric), *(("search.also", name) for name in search.also)]:
        part = OBJECTIVES[name] if search.space else None
        if part and getattr(trial.evaluation, part) is None:
            found.append(f"{where}: {name} is not measured, as evaluation.{part} is null; take another metric")
        elif part == "fid" and name not in measured:
            found.append(f"{where}: {name} is not measured; these settings of evaluation.fid make {measured[1]}")
    return found


SETTINGS = paths(Experiment)
TRIAL_SETTINGS = paths(Trial)
LEAST_TRIAL = {"data": {"source": "digits"}, "training": {"steps": 1}}  # in which any one setting can be tried
NOT_TRAINED = rf"training\.({'|'.join(NOT_ADDRESSED)})$"


def _space(content: Mapping[str, Any]) -> dict[str, Any]:
    """search.space as the file has it, empty where it has none."""
    search = content.get("search")
    space = search.get("space") if isinstance(search, Mapping) else None
    return dict(space) if isinstance(space, Mapping) else {}


def _axes(content: Mapping[str, Any]) -> dict[str, Axis]:
    """The valid entries of the search space, whatever else is wrong."""
    return {path: axis for path, entry in _space(content).items() if (axis := valid(Axis, entry))}


def _tried(axis: Axis) -> tuple[Any, ...]:
    """The values that stand for all: those of a grid or choice, the ends of a range as they are drawn."""
    return tuple(map(float, axis.values)) if axis.kind in ("uniform", "loguniform") else axis.values


def _sets(path: str, axis: Axis) -> set[str]:
    """The settings that an axis of the search space sets in some trial."""
    return {leaf for value in _tried(axis) for leaf in leaves(path, value)}


# ---- Expanding -------------------------------------------------------------------------------------------------

# From u uniform in [0, 1) and the values or ends of an axis to the value drawn.
DRAWS: dict[str, Callable[[tuple[Any, ...], float], Any]] = {
    "choice": lambda values, u: values[int(u * len(values))],
    "uniform": lambda ends, u: ends[0] + u * (ends[1] - ends[0]),
    "loguniform": lambda ends, u: min(ends[0] * (ends[1] / ends[0]) ** u, ends[1]),
    "int_uniform": lambda ends, u: ends[0] + int(u * (ends[1] - ends[0] + 1)),
}


def uniform(*words: int | str) -> float:
    """A number in [0, 1) addressed by `words`: the same everywhere and for ever."""
    content = hashlib.sha256(json.dumps(words).encode()).digest()
    return (int.from_bytes(content[:8]) >> 11) / 2**53


def _random(paths: Sequence[str], n: int, seed: int) -> Iterator[dict[str, float]]:
    """A draw depends on the seed, its own number and its path alone: other paths of the space do not move it."""
    return ({path: uniform(seed, sample, path) for path in paths} for sample in range(n))


def _sobol(paths: Sequence[str], n: int, seed: int) -> Iterator[dict[str, float]]:
    """The points of a Sobol sequence scrambled by the seed (Owen 1998), a dimension a path: of any 2^k that follow
    each other from a multiple of 2^k on, each path has one in every 2^k-th of [0, 1)."""
    if not paths:
        return iter(())
    from scipy.stats.qmc import Sobol  # most of a second, and only this needs it

    points = Sobol(len(paths), rng=seed).random_base2(max(0, n - 1).bit_length())[:n]
    return (dict(zip(paths, map(float, point), strict=True)) for point in points)


# The numbers in [0, 1) that each algorithm draws for the paths that are drawn: a dict a draw, the first ones the same
# whatever their number. An optuna search asks for what comes after its first round: see orchestrator.search.
NUMBERS: dict[str, Callable[[Sequence[str], int, int], Iterator[dict[str, float]]]] = {
    "grid": _random,
    "random": _random,
    "sobol": _sobol,
    "optuna": _sobol,
}


def expand(experiment: Experiment) -> tuple[Variant, ...]:
    """Every trial that the experiment means, in the order of the file, the last path changing fastest; of an optuna
    search those of its first round.

    More samples keep the earlier draws. A search crosses each draw with the grids, which so see the same draws.
    """
    return variants_of(experiment, _points(experiment.search, experiment.seed))


def variants_of(experiment: Experiment, points: Iterable[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The trials at points of the search space, each its values by path."""
    base = experiment.trial.model_dump()
    return tuple(
        Variant(params=dict(params), trial=Trial.model_validate(merge(base, _update(params)))) for params in points
    )


def _points(search: SearchConfig, seed: int) -> Iterator[dict[str, Any]]:
    space = search.space
    paths = [path for path, axis in space.items() if axis.kind != "grid"]
    for numbers in NUMBERS[search.algorithm](paths, search.first, seed):
        drawn = {path: DRAWS[space[path].kind](space[path].values, u) for path, u in numbers.items()}
        points = itertools.product(*(a.values if p not in drawn else (drawn[p],) for p, a in space.items()))
        for point in (dict(zip(space, values, strict=True)) for values in points):
            if not left_out(search, point):
                yield point


def left_out(search: SearchConfig, point: Mapping[str, Any]) -> bool:
    return any(values.items() <= point.items() for values in search.without)


def _update(params: Mapping[str, Any]) -> dict[str, Any]:
    update: dict[str, Any] = {}
    for path, value in params.items():
        update = merge(update, put({}, path.split("."), value))
    return update


def by_digest(
    variants: Sequence[Variant], data_digests: Mapping[DataConfig, str], always: bool = False
) -> tuple[dict[str, Variant], list[str]]:
    """The rows of a sweep in order, each variant by the address of its trial, and warnings.

    Variants that differ only in how they are measured share a trial, which is trained once: the address of each is the
    trial's with a suffix for its measurement (`workers.config.trained_by` takes it off), and so `always` that of each
    row, where variants that are still to come may share its trial. Variants that are measured alike as well are one
    row: the first stands for all, and a warning names how many and why.
    """
    trained: dict[str, dict[str, list[Variant]]] = {}
    for variant in variants:
        measurements = trained.setdefault(trial_digest(variant.trial, data_digests[variant.trial.data]), {})
        measured = digest(Measurement.of(variant.trial).evaluation.model_dump(mode="json"))[:8]
        measurements.setdefault(measured, []).append(variant)
    found, repeats = dict[str, Variant](), list[set[str]]()
    for address, measurements in trained.items():
        for measured, (first, *others) in measurements.items():
            found[f"{address}-{measured}" if always or len(measurements) > 1 else address] = first
            for variant in others:
                ours, theirs = (leaves("", v.params).items() for v in (variant, first))
                same = [name for name, value in ours if (name, value) in theirs]
                repeats.append({n.removeprefix(".") for n, _ in [*ours, *theirs] if n not in same})
    if not repeats:
        return found, []
    names = ", ".join(sorted(set().union(*repeats)))
    why = f"differ from it only in {names}, which their other settings leave without effect" if names else "equal it"
    return found, [f"{len(variants)} variants are {len(found)} trials: {len(repeats)} repeat another one ({why})"]
