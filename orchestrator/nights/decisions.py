"""What a night decides: pure functions of the registry, of what is measured, and of the nights before.

    select    which checkpoints the suite names, by what the registry holds
    due       which of them are not measured yet
    compare   each with its numbers of an earlier night, and with its sweep's champion
    drifted   whether an unchanged checkpoint gives other numbers
    promotion whether the candidate is to be champion

A `Night` is all that a night found out. It is kept as nightly/<suite>/<date>/result.json, and the report, MLflow's
runs and the next night are made from it.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from pydantic import ConfigDict, Field

from orchestrator import cli
from orchestrator.experiment.metrics import list_other_kinds
from orchestrator.experiment.settings import suggest_choice
from orchestrator.measuring.differences import BY_IMAGE, compare_paired, list_protocol_differences
from orchestrator.nights.suite import CANDIDATE, CHAMPION, EVERY, NEWEST, Rule, Suite, split_registered
from orchestrator.tracking.registry import Version
from workers.config import Record
from workers.evaluation import canaries

# A metric of an unchanged checkpoint that moved by more than this part of its value did not do so by rounding.
ROUNDING = 1e-4

# Parts of a summary that hold values by image, which a night keeps.
PER_IMAGE = ("nll_per_image", "density_per_image", "ode_nll_per_image", "ode_density_per_image")

Verdict = Literal["better", "worse", "same", "unknown"]
State = Literal["complete", "incomplete", "not believed"]


class Kept(Record):
    """A record of a night. A metric that is not finite is a finding, and stays what it is."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")


class ModelNumbers(Kept):
    """One model and its numbers: as much of a summary (`workers.evaluation.summary`) as a comparison needs."""

    name: str  # SWEEP@ALIAS, or the target
    sweep: str | None = None
    alias: str | None = None
    version: int | None = None
    trial: str | None = None
    checkpoint: str = ""  # the digest
    url: str = ""
    step: int | None = None
    protocol: str = ""  # the key of what was asked for
    blocks_run: int = 0
    hash: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    passports: dict[str, Any] = Field(default_factory=dict)
    nll_per_image: tuple[float, ...] = ()
    density_per_image: tuple[float, ...] = ()  # of data that are not discrete, in its place
    ode_nll_per_image: tuple[float, ...] = ()
    ode_density_per_image: tuple[float, ...] = ()
    failed: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "passports": self.passports, **{key: getattr(self, key) for key in PER_IMAGE}}


class ModelComparison(Kept):
    """A metric of a model tonight minus what it is held against; `verdict` by the suite's rule."""

    model: str
    against: str  # the champion's name, or "last night (2026-11-23)"
    metric: str
    difference: float | None = None
    standard_error: float | None = None
    verdict: Verdict
    why: str

    def __str__(self) -> str:
        return f"{self.model} against {self.against}: {self.metric} {self.why}: {self.verdict}"


class NightFinding(Kept):
    """Something that a person should know; with an `alarm` the night ends with status 3."""

    kind: Literal["regression", "drift", "canary", "not measured", "hook", "note"]
    model: str = ""
    text: str
    alarm: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.model + ': ' * bool(self.model)}{self.text}"


class Promotion(Kept):
    """What was decided about a sweep's candidate, and why."""

    sweep: str
    version: int | None
    promoted: bool
    why: str


class CanaryResult(Kept):
    name: str
    measured: float | None
    expected: float
    tolerance: float
    passed: bool

    @staticmethod
    def of(verdict: canaries.Verdict) -> "CanaryResult":
        c = verdict.canary
        measured, passed = verdict.measured, verdict.passed
        return CanaryResult(name=c.name, measured=measured, expected=c.expected, tolerance=c.tolerance, passed=passed)


class Night(Kept):
    suite: str
    day: date
    schedule: str
    zone: str
    started: str  # with its offset from UTC
    ended: str = ""
    state: State = "complete"
    previous: date | None = None
    missed: tuple[date, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)  # of the libraries
    rules: tuple[str, ...] = ()
    canaries: tuple[CanaryResult, ...] = ()
    entries: tuple[ModelNumbers, ...] = ()
    comparisons: tuple[ModelComparison, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    findings: tuple[NightFinding, ...] = ()
    told: bool = True  # whether the hooks were called, where it takes that
    recorded: bool = False  # whether MLflow has all of it

    @property
    def status(self) -> int:
        """The exit status: an alarm, something that could not be measured, or done."""
        if any(finding.alarm for finding in self.findings):
            return cli.ALARM
        return cli.SOME_FAILED if any(entry.failed for entry in self.entries) else cli.DONE


Before = Mapping[str, tuple[Night, ModelNumbers]]  # a model's last believed numbers, and of which night


# ---- What to measure -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A model that the suite names: a version of the registry, or a target as `evaluate` takes it."""

    name: str
    version: Version | None = None
    alias: str | None = None
    explicit: bool = True  # not by *


def select(models: Sequence[str], versions: Sequence[Version]) -> tuple[list[Wanted], list[str], list[str]]:
    """Returns the models that the suite names, a note on each that * leaves out, and all mistakes."""
    wanted: dict[str, Wanted] = {}
    notes, problems = [], []
    sweeps = sorted({version.sweep for version in versions})
    for model in models:
        asked = split_registered(model)
        if asked is None:
            wanted[model] = Wanted(model)
            continue
        sweep, alias = asked
        explicit = sweep != EVERY
        if explicit and sweep not in sweeps:
            names = ", ".join(sweeps) or "none"
            problems.append(
                f"models: {model}: no model {sweep!r} is registered{suggest_choice(sweep, sweeps)}; registered: {names}"
            )
            continue
        if not sweeps:
            notes.append(f"{model}: no model is registered in MLflow; a sweep that ends registers its best trial")
        for one in [sweep] if explicit else sweeps:
            version, why = _pick(one, alias, versions)
            if version:
                wanted[f"{one}@{alias}"] = Wanted(f"{one}@{alias}", version, alias, explicit)
            elif explicit:
                problems.append(f"models: {model}: {why}")
            else:
                notes.append(f"{model}: {why}")
    return list(wanted.values()), notes, problems


def _pick(sweep: str, alias: str, versions: Sequence[Version]) -> tuple[Version | None, str]:
    """The version that an alias names, or why there is none."""
    own = [version for version in versions if version.sweep == sweep]
    named = own[-1:] if alias == NEWEST else [version for version in own if alias in version.aliases]
    if not named:
        there = ", ".join(f"{a} (version {v.number})" for v in own for a in v.aliases)
        close = suggest_choice(alias, [NEWEST, *(a for v in own for a in v.aliases)])
        return (
            None,
            f"{sweep} has no alias {alias!r}{close}; set: {there or 'none'}; set it on the model's page in MLflow",
        )
    [version] = named
    if not (version.path and version.trial and version.checkpoint):
        return None, f"version {version.number} of {sweep} does not say which checkpoint it is (orchestrator.path)"
    return version, ""


def find_due(asked: Mapping[str, str], measured: Collection[str]) -> dict[str, list[str]]:
    """The summaries that are still to be made, each with the models whose it is; models of one checkpoint share one.

    `asked` is the path of each model's summary, which its checkpoint and the protocol decide.
    """
    missing: dict[str, list[str]] = {}
    for name, path in asked.items():
        if path not in measured:
            missing.setdefault(path, []).append(name)
    return missing


# ---- What the numbers say --------------------------------------------------------------------------------------


def find_earlier_entries(history: Iterable[Night]) -> Before:
    """The last believed numbers of each model, and of which night; `history` has the newest night first."""
    found: dict[str, tuple[Night, ModelNumbers]] = {}
    for night in history:
        for entry in night.entries:
            if night.state != "not believed" and not entry.failed:
                found.setdefault(entry.name, (night, entry))
    return found


def compare(rules: Sequence[Rule], entries: Sequence[ModelNumbers], before: Before) -> list[ModelComparison]:
    """Each model against itself the night before, and against its sweep's champion of tonight.

    A rule of a likelihood is not for models whose likelihood is of another kind: of densities, in continuous time.
    """
    champions = {e.sweep: e for e in entries if e.alias == CHAMPION and not e.failed}
    found = []
    for entry in entries:
        if entry.failed:
            continue
        own = [r for r in rules if not any(other in entry.metrics for other in list_other_kinds(r.metric))]
        if entry.name in before:
            then, last = before[entry.name]
            found += [_compare_with(rule, entry, last, f"last night ({then.day})") for rule in own]
        champion = champions.get(entry.sweep) if entry.sweep and entry.alias != CHAMPION else None
        if champion:
            found += [_compare_with(rule, entry, champion, champion.name) for rule in own]
    return found


def _compare_with(rule: Rule, ours: ModelNumbers, theirs: ModelNumbers, against: str) -> ModelComparison:
    def make_comparison(
        verdict: Verdict, why: str, difference: float | None = None, se: float | None = None
    ) -> ModelComparison:
        return ModelComparison(
            model=ours.name, against=against, metric=rule.metric,
            difference=difference, standard_error=se, verdict=verdict, why=why,
        )  # fmt: skip

    by_image, kind = BY_IMAGE.get(rule.metric, ("", "samples"))
    if differing := list_protocol_differences(ours.summary, theirs.summary, kind):
        return make_comparison("unknown", f"not compared, as measured by another protocol ({'; '.join(differing)})")
    if ours.checkpoint == theirs.checkpoint and ours.hash == theirs.hash:
        return make_comparison("same", "the same checkpoint, and the same numbers to the bit", 0.0)
    value, base = (e.metrics.get(rule.metric, math.nan) for e in (ours, theirs))
    difference = value - base
    if not math.isfinite(difference):
        bad = not math.isfinite(value) and math.isfinite(base)
        return make_comparison("worse" if bad else "unknown", f"is {value:g}, against {base:g}")
    if ours.checkpoint == theirs.checkpoint:  # its noise is the same: what moved is the library, see `find_drifted`
        return make_comparison("unknown", f"{difference:+.4g}, of an unchanged checkpoint", difference)
    if len(ours.summary.get(by_image, ())) > 1:
        pair = compare_paired(ours.summary, theirs.summary, rule.metric)
        se: float | None = pair.standard_error
        text = f"{difference:+.4f} ± {se:.4f} bits/dim over {pair.n} images"
    else:
        errors = [e.metrics.get(f"{rule.metric}_se") for e in (ours, theirs)]
        se = None if None in errors else sum(e**2 for e in errors if e is not None) ** 0.5
        text = f"{difference:+.4g} ± {se:.2g}" if se is not None else f"{difference:+.4g}, without an error"
    share = f" ({difference / base:+.2%})" if base else ""
    return make_comparison(judge(rule, base, difference, se), text + share, difference, se)


def judge(rule: Rule, base: float, difference: float, se: float | None) -> Verdict:
    """`worse` where the metric rose by more than every bound of the rule, `better` where it fell by as much."""
    if rule.standard_errors is not None and se is None:
        return "unknown"
    bounds = [] if rule.standard_errors is None or se is None else [rule.standard_errors * se]
    bounds += [] if rule.relative is None else [rule.relative * abs(base)]
    if abs(difference) <= max(bounds):
        return "same"
    return "worse" if difference > 0 else "better"


def find_drifted(entries: Sequence[ModelNumbers], before: Before, versions: Mapping[str, str]) -> list[NightFinding]:
    """Checkpoints that did not change and, asked the same, give other numbers. Evaluation is exact: a library did it.

    `versions` are the libraries' of tonight. A hash that changed by rounding alone (another processor) is told without
    an alarm.
    """
    found = []
    for entry in entries:
        if entry.name not in before:
            continue
        then, last = before[entry.name]
        same = (entry.checkpoint, entry.protocol) == (last.checkpoint, last.protocol)
        if entry.failed or not same or entry.hash == last.hash:
            continue
        moved = {name: (last.metrics[name], value) for name, value in entry.metrics.items()
                 if name in last.metrics and not _is_close(value, last.metrics[name])}  # fmt: skip
        kinds = sorted(entry.passports.keys() | last.passports.keys())
        otherwise = [text for kind in kinds for text in list_protocol_differences(entry.summary, last.summary, kind)]
        told = [f"{name.removeprefix('eval/')} {a:.6g} -> {b:.6g}" for name, (a, b) in moved.items()] + otherwise
        text = f"{entry.checkpoint} is unchanged since {then.day}, its hash is not ({last.hash} -> {entry.hash})"
        text += f": {'; '.join(told)}" if told else ": within rounding"
        changed = [f"{name} {then.versions[name]} -> {v}" for name, v in versions.items()
                   if then.versions.get(name, v) != v]  # fmt: skip
        text += f"; since then: {', '.join(changed)}" if changed else "; no version changed, so perhaps the processor"
        found.append(NightFinding(kind="drift", model=entry.name, text=text, alarm=bool(told)))
    return found


def _is_close(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= ROUNDING * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b))


def find_regressions(
    suite: Suite, entries: Sequence[ModelNumbers], comparisons: Sequence[ModelComparison]
) -> list[NightFinding]:
    """What is worse than the suite's rules allow: any model than last night, and a candidate than its champion."""
    by_name = {entry.name: entry for entry in entries}
    found = []
    for c in comparisons:
        last_night = c.against.startswith("last night")
        held = "last_night" if last_night else CHAMPION
        judged = last_night or by_name[c.model].alias == CANDIDATE
        if c.verdict == "worse" and held in suite.regression.against and judged:
            text = f"{c.metric} {c.why}, worse than {c.against}"
            found.append(NightFinding(kind="regression", model=c.model, text=text, alarm=True))
    return found


def decide_promotions(
    entries: Sequence[ModelNumbers], comparisons: Sequence[ModelComparison], drift: bool
) -> list[Promotion]:
    """Of each sweep with a candidate and a champion: to be promoted only where the candidate is clearly better.

    That is: better by the rules in one metric or more, worse in none, and all of them could be compared.
    """
    by_name = {entry.name: entry for entry in entries}
    found = []
    for entry in entries:
        if entry.alias != CANDIDATE:
            continue
        champion = by_name.get(f"{entry.sweep}@{CHAMPION}")
        own = [c for c in comparisons if c.model == entry.name and champion and c.against == champion.name]
        told = "; ".join(f"{c.metric} {c.why}: {c.verdict}" for c in own)
        promoted = False
        if champion is None:
            why = f"{entry.sweep} has no champion to be better than; set the first by hand, on its page in MLflow"
        elif entry.failed or champion.failed:
            why = f"{entry.name if entry.failed else champion.name} was not measured"
        elif entry.checkpoint == champion.checkpoint:
            why = "the candidate is the champion"
        elif drift:
            why = "numbers of unchanged checkpoints have moved, so none is believed enough"
        elif any(c.verdict == "unknown" for c in own):
            why = f"not everything could be compared: {told}"
        else:
            promoted = any(c.verdict == "better" for c in own) and all(c.verdict != "worse" for c in own)
            why = f"{'clearly better' if promoted else 'not clearly better'} than version {champion.version}: {told}"
        found.append(Promotion(sweep=str(entry.sweep), version=entry.version, promoted=promoted, why=why))
    return found
