"""The nightly file: which models are measured every night, how, when, and what counts as a regression.

    file + overrides -> load -> Suite

`load` tells all mistakes at once. Everything but the reading of the file is a pure function of its content.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.experiment.check import find_evaluation_mistakes
from orchestrator.experiment.load import open_code, parse_assignment
from orchestrator.experiment.metrics import BOUNDS, choose_bound, choose_likelihood
from orchestrator.experiment.records import ExperimentError, Name, TrackingConfig
from orchestrator.experiment.settings import find_invalid, list_paths, put, read_file, suggest_choice, suggest_path
from orchestrator.nights.calendar import Schedule
from workers.config import EvaluationConfig, Record, Seed
from workers.evaluation.blocks import list_comparable_metrics
from workers.kinds import SPACES

CHAMPION, CANDIDATE, NEWEST = "champion", "candidate", "newest"
EVERY = "*"
LONGEST_T = 100_000


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "not the name of an environment variable, such as NIGHTLY_WEBHOOK; the address itself stays out of the "
            "file, as whoever knows it can write there"
        )
    return name


def _refuse_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("[] is empty; give at least one")
    return values


Some = AfterValidator(_refuse_empty)


class Rule(Record):
    """A metric is worse where it rose by more than each bound that is given; better where it fell by as much."""

    metric: str = Field(description="a metric that is measured, lower being better")
    standard_errors: float | None = Field(
        default=None, gt=0, description="bound: so many standard errors of the difference"
    )
    relative: float | None = Field(default=None, gt=0, description="bound: that part of the value it is compared with")

    @model_validator(mode="after")
    def _check_bounded(self) -> "Rule":
        if self.standard_errors is None and self.relative is None:
            raise ValueError("takes standard_errors, relative or both: any change would be a regression")
        return self

    def __str__(self) -> str:
        bounds = [] if self.standard_errors is None else [f"{self.standard_errors:g} standard errors"]
        bounds += [] if self.relative is None else [f"{self.relative:.2%} of the value"]
        return f"{self.metric} by more than {' and '.join(bounds)}"


class Regression(Record):
    """A model against itself the night before, and a sweep's candidate against its champion, by every rule."""

    against: Annotated[tuple[Literal["last_night", "champion"], ...], Some] = Field(
        default=("last_night", "champion"), strict=False, description="what each model is compared with"
    )
    rules: Annotated[tuple[Rule, ...], Some] = Field(
        strict=False, description="a metric each, and by how much it may rise; every bound that is given must be passed"
    )


class Mail(Record):
    to: str = Field(description="who receives it")
    command: Annotated[tuple[str, ...], Some] = Field(
        default=("/usr/sbin/sendmail", "-t"), strict=False, description="takes the message as its input"
    )


class Hooks(Record):
    """Who hears of a regression or a canary: a URL that an environment variable holds, a command, a mail."""

    webhook: Annotated[str, AfterValidator(_check_variable)] | None = Field(
        default=None, description="name of the environment variable that holds the URL"
    )
    command: Annotated[tuple[str, ...], Some, Field(strict=False)] | None = Field(
        default=None, description="its words; takes the message as JSON"
    )
    mail: Mail | None = Field(default=None, description="a mail with the report's message")


class Suite(Record):
    """`models`: SWEEP@ALIAS or *@ALIAS of MLflow's registry, `newest` being an alias too, or what `evaluate` takes."""

    name: Name = Field(
        description="of the suite: its folder in the storage and, unless nightly, part of its jobs' names"
    )
    models: Annotated[tuple[str, ...], Some] = Field(
        strict=False, description="SWEEP@ALIAS or *@ALIAS of MLflow's registry, or what the command evaluate takes"
    )
    seed: Seed = Field(default=0, description="of the evaluation's noise")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="what is measured, as in an experiment file"
    )
    schedule: Schedule = Field(description="when a night begins")
    regression: Regression = Field(description="what counts as worse")
    hooks: Hooks = Field(default=Hooks(), description="who is told of a regression, a drift or a failed canary")
    promote: bool = Field(default=False, description="whether champion moves to a candidate that is clearly better")
    code: tuple[str, ...] = Field(
        default=(), strict=False, description="folders of modules of one's own, relative to this file"
    )
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="where MLflow is")

    @property
    def label(self) -> str:
        """What MLflow's experiment and the cluster's jobs are called."""
        return "nightly" if self.name == "nightly" else f"nightly-{self.name}"


SETTINGS = list_paths(Suite)


def split_registered(model: str) -> tuple[str, str] | None:
    """(sweep or *, alias) of a model that is looked up in the registry; None for a target of `evaluate`."""
    found = re.fullmatch(r"(\*|[A-Za-z0-9._-]+)@([A-Za-z0-9._-]+)", model)
    return (found[1], found[2]) if found else None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """The suite in a YAML file, with `a.b=value` overrides applied. Raises ExperimentError with all mistakes."""
    try:
        content, problems = read_file(Path(path), "a nightly file needs name, models, schedule and regression")
    except ValueError as mistake:
        raise ExperimentError([str(mistake)], str(path)) from None
    given: list[tuple[str, str, Any]] = []
    for text in overrides:
        try:
            given.append((text, *parse_assignment(text)))
        except ValueError as mistake:
            problems.append(f"override {text!r}: {mistake}")
    roots = {"code": content.get("code", ()), **{name: value for _, name, value in given if name == "code"}}["code"]
    problems += open_code(roots, Path(path).parent, [content, [value for _, _, value in given]])
    known = list_paths(Suite, own=True)
    for text, name, value in given:
        if name in known:
            content = put(content, name.split("."), value)
        else:
            problems.append(f"override {text!r}: unknown path{suggest_path(name, known)}")
    problems += open_code(content.get("code", ()), Path(path).parent, content)
    if problems := problems + find_mistakes(content):
        raise ExperimentError(problems, str(path))
    return Suite.model_validate(content)


def find_mistakes(content: Mapping[str, Any]) -> list[str]:
    """All mistakes in the content of a nightly file; empty if it is valid."""
    found = [f"{path}: {text}" for path, text in find_invalid(Suite, content)]
    return found or _find_contradictions(Suite.model_validate(content))


def _find_contradictions(suite: Suite) -> list[str]:
    """Settings, each valid by itself, that do not go together."""
    evaluation, found = suite.evaluation, find_evaluation_mistakes(suite.evaluation, LONGEST_T)
    if not evaluation.measures:
        found.append("evaluation: nothing is measured; give nll, fid, ode_nll or several")
    for name in ("nll", "ode_nll"):
        if (part := getattr(evaluation, name)) and part.images == 1:
            found.append(f"evaluation.{name}.images: a single image has no error to judge by; take 2 or more, or all")
    metrics = list_comparable(evaluation)
    for i, rule in enumerate(suite.regression.rules):
        where = f"regression.rules[{i}]"
        if rule.metric not in metrics:
            found.append(
                f"{where}.metric: {rule.metric!r} is not measured by this evaluation"
                f"{suggest_choice(rule.metric, metrics)}; valid: {', '.join(metrics) or 'none'}"
            )
        elif rule.standard_errors and not metrics[rule.metric]:
            found.append(
                f"{where}.standard_errors: {rule.metric} has no standard error with so few samples; take more of "
                "them, or leave it out and give relative"
            )
    names = [rule.metric for rule in suite.regression.rules]
    found += [f"regression.rules: {name} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    aliases = {alias for model in suite.models for _, alias in [split_registered(model) or ("", "")]}
    for setting, needed in (
        ("regression.against: champion", {CHAMPION} if CHAMPION in suite.regression.against else set()),
        ("promote: true", {CHAMPION, CANDIDATE} if suite.promote else set()),
    ):
        found += [
            f"{setting} takes a {alias}, and models names none; add '*@{alias}' to it"
            for alias in sorted(needed - aliases)
        ]
    return found


def list_comparable(evaluation: EvaluationConfig) -> dict[str, bool]:
    """The metrics that a rule may name, all of them better where lower; and whether each has a standard error."""
    found = dict.fromkeys(BOUNDS, True) if evaluation.nll else {}
    found |= dict.fromkeys(("eval/ode_nll_bpd", "eval/ode_density_bpd"), True) if evaluation.ode_nll else {}
    if fid := evaluation.fid:
        distance, *others = list_comparable_metrics(fid)
        found |= {distance: fid.samples > SPACES[fid.features].dimensions, **dict.fromkeys(others, True)}
    return found


def note_missing_rules(suite: Suite, model: str, levels: int | None, *, continuous: bool) -> Iterator[str]:
    """That a model's likelihood is of another kind than those that the rules name."""
    names = [rule.metric for rule in suite.regression.rules]
    told = set[str]()
    for name in names:
        own = choose_likelihood(choose_bound(continuous) if name in BOUNDS else name, levels)
        if own not in (*names, *told):
            told.add(own)
            yield f"{model}: what is measured of it is {own}, of which there is no rule; {name} is not compared"
