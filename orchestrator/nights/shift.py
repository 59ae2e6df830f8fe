"""A night in progress: find the suite's models, measure what is due, hold it against what there is, tell of it.

What is decided is decided in `night`; the storage, Ray, MLflow and the hooks are here.
"""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from rich.console import Console

from orchestrator import canary, cli
from orchestrator.execution.loss import repeat_where_lost
from orchestrator.execution.measurements import Measured, measure
from orchestrator.execution.session import open_session
from orchestrator.experiment.preflight import describe_data
from orchestrator.experiment.records import ExperimentError
from orchestrator.measuring import subjects
from orchestrator.measuring.subjects import Subject
from orchestrator.nights import decisions as decide
from orchestrator.nights import hooks
from orchestrator.nights.calendar import compute_instant, format_time, list_missed, say
from orchestrator.nights.decisions import CanaryResult, ModelNumbers, Night, NightFinding, Promotion, State, Wanted
from orchestrator.nights.night_page import format_headline, to_html, to_markdown
from orchestrator.nights.suite import CANDIDATE, CHAMPION, Suite, note_missing_rules
from orchestrator.output.terminal import Display
from orchestrator.tracking import registry
from orchestrator.tracking.outside import record_measurement
from orchestrator.tracking.provenance import collect_provenance
from orchestrator.tracking.registry import Version
from orchestrator.tracking.runs import FLUSH_S
from orchestrator.tracking.server import name_origin
from orchestrator.tracking.tracker import Tracker
from workers.config import DataConfig, Mistake
from workers.data.sources import Source
from workers.evaluation.blocks import Images, make_protocol_key, name_summary
from workers.evaluation.canaries import Verdict
from workers.layout import name_nights_folder
from workers.locks import lock
from workers.storage import Storage

HISTORY = 30  # nights before, for trends and for models that were not measured last night


@dataclass(frozen=True)
class NightModel:
    """A model of the suite: what is known of it, and where the summary of its checkpoint is, or will be.

    Without a subject it cannot be measured, and the entry says why.
    """

    entry: ModelNumbers
    subject: Subject | None = None
    path: str = ""


def run(suite: Suite, day: date, storage_root: str, ray_address: str | None) -> int:
    """One night, its exit status. Raises Mistake."""
    storage, folder = Storage(storage_root), name_nights_folder(suite.name)
    with _lock_suite(storage, folder, day):
        storage.check_writable()
        storage.remove_leftovers(folder)
        night = _read_night(storage, f"{folder}/{day}")
        if night and night.state == "complete" and night.recorded and night.told:
            say(suite.schedule, f"the night of {day} ended at {night.ended} with status {night.status}; nothing to do")
            say(suite.schedule, f"report {storage.find_url(folder)}/{day}/report.html")
            return night.status
        history = _read_history(storage, folder, day)
        if night is None or night.state != "complete":
            night = _work_night(suite, day, storage, ray_address, history)
            night = night.model_copy(update={"told": night.status != cli.ALARM})
            _keep(storage, night, history)  # before what may fail, and is then tried again by itself
        if not night.told:
            night = _call_hooks(suite, storage, night)
        return _finish_night(suite, storage, night, history)


# ---- Nights that are there -------------------------------------------------------------------------------------


@contextmanager
def _lock_suite(storage: Storage, folder: str, day: date) -> Iterator[None]:
    """Holds the suite against another process, of whatever night. Raises Mistake where one is at it."""
    note = f"{folder}/running.json"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(storage, f"{folder}/lock"))
        except Mistake as refused:
            other = storage.read_sealed(note, "it says nothing of the night that runs")
            if other is None:
                raise
            raise Mistake(
                f"the night of {day} is skipped: that of {other['day']} is still running, since {other['started']}, "
                f"as process {other['process']} on {other['host']}"
            ) from refused
        mine = {"day": str(day), "process": os.getpid(), "host": socket.gethostname()}
        storage.write_sealed(note, {**mine, "started": datetime.now(UTC).isoformat(" ", "seconds")})
        try:
            yield
        finally:
            storage.delete(note)


def _read_night(storage: Storage, folder: str) -> Night | None:
    content = storage.read_sealed(f"{folder}/result.json", "the night is as good as not run")
    return None if content is None else Night.model_validate_json(json.dumps(content))


def _read_history(storage: Storage, folder: str, day: date) -> list[Night]:
    """The nights before, newest first."""
    days = [name for name in storage.list(folder) if re.fullmatch(r"\d{4}-\d\d-\d\d", name) and name < str(day)]
    nights = (_read_night(storage, f"{folder}/{name}") for name in sorted(days, reverse=True)[:HISTORY])
    return [night for night in nights if night]


# ---- Its work --------------------------------------------------------------------------------------------------


def _work_night(suite: Suite, day: date, storage: Storage, ray_address: str | None, history: Sequence[Night]) -> Night:
    """Finds the suite's models, measures those that are due, and holds their numbers against what there is."""
    started = format_time(suite.schedule)
    wanted, models, sources, notes = _find_models(suite, storage)
    asked = {model.entry.name: model.path for model in models if model.path}
    due = decide.find_due(asked, {path for path in asked.values() if storage.read_sealed(path) is not None})
    say(suite.schedule, f"the night of {day} of {suite.name}, due at {suite.schedule}: {_describe_due(asked, due)}")
    for line in describe_data(sources.values()):
        say(suite.schedule, line)
    verdicts, measured = _measure_due(suite, storage, ray_address, models=models, due=due, sources=sources)
    believed = all(verdict.passed for verdict in verdicts)
    entries = [
        _add_numbers(m.entry, storage.read_sealed(m.path), measured.get(m.path)) if m.path else m.entry
        for m in models
        if believed
    ]
    before = decide.find_earlier_entries(history)
    libraries = {k.removeprefix("version."): v for k, v in collect_provenance().items() if k.startswith("version.")}
    comparisons = decide.compare(suite.regression.rules, entries, before)
    drift = decide.find_drifted(entries, before, libraries)
    decided = decide.decide_promotions(entries, comparisons, any(finding.alarm for finding in drift))
    promotions, refused = _promote_models(
        suite, storage, decided, {w.name: w.version for w in wanted if w.version}, day
    )
    findings = [
        *(NightFinding(kind="canary", text=str(v), alarm=True) for v in verdicts if not v.passed),
        *decide.find_regressions(suite, entries, comparisons),
        *drift,
        *(NightFinding(kind="not measured", model=e.name, text=e.failed) for e in entries if e.failed),
        *refused,
        *(NightFinding(kind="note", text=text) for text in notes),
    ]
    whole: State = "incomplete" if any(entry.failed for entry in entries) else "complete"
    return Night(
        suite=suite.name,
        day=day,
        schedule=str(suite.schedule),
        zone=suite.schedule.zone,
        started=started,
        ended=format_time(suite.schedule),
        state=whole if believed else "not believed",
        previous=next((night.day for night in history if night.state != "not believed"), None),
        missed=tuple(list_missed(history[0].day if history else None, day)),
        versions=libraries,
        rules=tuple(map(str, suite.regression.rules)),
        canaries=tuple(CanaryResult.of(verdict) for verdict in verdicts),
        entries=tuple(entries),
        comparisons=tuple(comparisons),
        promotions=tuple(promotions),
        findings=tuple(findings),
    )


def _find_models(
    suite: Suite, storage: Storage
) -> tuple[list[Wanted], list[NightModel], dict[DataConfig, Source], list[str]]:
    """The suite's models with their checkpoints, their data, and notes. Raises Mistake with all that is not there."""
    wanted, notes, problems = decide.select(suite.models, registry.list_versions(storage, suite.tracking.uri))
    overrides = [f"seed={suite.seed}", f"evaluation={suite.evaluation.model_dump_json()}"]
    sources: dict[DataConfig, Source] = {}
    models: list[NightModel] = []
    for one in wanted:
        try:
            entries = _find_subjects(one, storage, overrides)
        except Mistake as mistake:
            if one.version is None:
                problems.append(f"models: {mistake}")
            elif one.version.storage != name_origin(storage) and not one.explicit:
                notes.append(f"{one.name}: its checkpoint lies in another storage, {one.version.storage}")
            else:
                models.append(NightModel(_make_entry(one, one.name).model_copy(update={"failed": str(mistake)})))
            continue
        for entry, subject in entries:
            try:
                its, warnings = subjects.check([subject])
            except Mistake as mistake:
                models.append(NightModel(entry.model_copy(update={"failed": str(mistake)})))
                continue
            sources |= its
            levels, continuous = its[subject.m.data].levels, subject.m.T is None
            told = [*warnings, *note_missing_rules(suite, entry.name, levels, continuous=continuous)]
            notes += [text for text in told if text not in notes]
            images, digest = Images.of(its[subject.m.data]), subject.checkpoint.digest
            entry = entry.model_copy(update={"protocol": make_protocol_key(subject.m, images)})
            models.append(NightModel(entry, subject, name_summary(subject.m, digest, images)))
    if not problems and not any(model.subject for model in models):
        why = [f"{model.entry.name}: {model.entry.failed}" for model in models]
        problems = ["models: there is nothing to measure", *why, *notes]
    if problems:
        raise ExperimentError(problems, f"suite {suite.name}")
    return wanted, models, sources, notes


def _find_subjects(one: Wanted, storage: Storage, overrides: Sequence[str]) -> list[tuple[ModelNumbers, Subject]]:
    """The checkpoints that a name of the suite stands for: several where it is a sweep. Raises Mistake."""
    if one.version is None:
        targets = subjects.find(one.name, storage, overrides, None)
        names = [one.name if len(targets) == 1 else f"{one.name}/{str(s.trial)[:8]}" for s in targets]
    else:
        targets, names = [subjects.open_at(one.version.path, storage, overrides)], [one.name]
        if targets[0].checkpoint.digest != one.version.checkpoint:
            raise Mistake(f"{one.version.path} was trained anew since it was registered as {one.version.checkpoint}")
    return [(_make_entry(one, name, subject), subject) for name, subject in zip(names, targets, strict=True)]


def _make_entry(one: Wanted, name: str, subject: Subject | None = None) -> ModelNumbers:
    version, checkpoint = one.version, subject.checkpoint if subject else None
    return ModelNumbers(
        name=name,
        sweep=version.sweep if version else None,
        alias=one.alias,
        version=version.number if version else None,
        trial=version.trial if version else subject.trial if subject else None,
        checkpoint=checkpoint.digest if checkpoint else version.checkpoint if version else "",
        url=checkpoint.url if checkpoint else "",
    )


def _measure_due(
    suite: Suite,
    storage: Storage,
    ray_address: str | None,
    *,
    models: Sequence[NightModel],
    due: Mapping[str, Sequence[str]],
    sources: Mapping[DataConfig, Source],
) -> tuple[list[Verdict], dict[str, Measured]]:
    """The canaries' verdicts, and what is due by the path of its summary. Where nothing is due, no Ray starts."""
    display = Display({}, Console(stderr=True), quiet=True)
    by_path = {model.path: model.subject for model in models if model.subject}

    def work() -> tuple[list[Verdict], dict[str, Measured]]:
        with open_session(ray_address) if due else nullcontext():
            verdicts = canary.judge_canaries(storage, display, ray_address, through_ray=bool(due))
            say(suite.schedule, f"canaries: {sum(v.passed for v in verdicts)} of {len(verdicts)} as expected")
            if not due or not all(verdict.passed for verdict in verdicts):
                return verdicts, {}
            found = measure([by_path[path] for path in due], sources, storage, display=display, ray_address=ray_address)
            return verdicts, dict(zip(due, found, strict=True))

    verdicts, measured = repeat_where_lost(work, lambda text: say(suite.schedule, text), may=ray_address is None)
    if measured and (left := record_measurement(storage, suite.tracking.uri, list(measured.values()), sources)):
        say(suite.schedule, left)
    return verdicts, measured


def _add_numbers(entry: ModelNumbers, summary: Mapping[str, Any] | None, measured: Measured | None) -> ModelNumbers:
    failed = measured.failed if measured else ""
    if failed or summary is None:
        return entry.model_copy(update={"failed": failed or "its summary is gone"})
    numbers: dict[str, Any] = {key: summary[key] for key in ("hash", "metrics", "passports")}
    numbers |= {key: tuple(summary.get(key, ())) for key in decide.PER_IMAGE}
    numbers["blocks_run"] = sum(measured.missing.values()) if measured else 0
    return entry.model_copy(update=numbers)


def _describe_due(asked: Mapping[str, str], due: Mapping[str, Sequence[str]]) -> str:
    checkpoints = f"{len(asked)} models of {len(set(asked.values()))} checkpoints"
    if not due:
        return f"{checkpoints}, all measured already"
    return f"{checkpoints}, {len(due)} due: {'; '.join(' = '.join(names) for names in due.values())}"


def _promote_models(
    suite: Suite, storage: Storage, decided: Sequence[Promotion], versions: Mapping[str, Version], day: date
) -> tuple[list[Promotion], list[NightFinding]]:
    """Moves the aliases that are to be moved, where that is asked for; and what MLflow refused."""
    done, refused = [], []
    for p in decided:
        if p.promoted and not suite.promote:
            p = p.model_copy(update={"promoted": False, "why": f"{p.why}; promotion was not asked for"})
        elif p.promoted:
            version = versions[f"{p.sweep}@{CANDIDATE}"]
            try:
                registry.promote(storage, suite.tracking.uri, version, CHAMPION, f"{suite.label} {day}: {p.why}")
            except Mistake as mistake:
                refused.append(NightFinding(kind="note", model=f"{p.sweep}@{CANDIDATE}", text=str(mistake)))
                p = p.model_copy(update={"promoted": False, "why": f"{p.why}; MLflow refused it"})
        say(suite.schedule, f"{p.sweep}: version {p.version} {'' if p.promoted else 'not '}promoted: {p.why}")
        done.append(p)
    return done, refused


# ---- Telling of it ---------------------------------------------------------------------------------------------


def _keep(storage: Storage, night: Night, history: Sequence[Night]) -> dict[str, bytes]:
    """Writes a night and its report. Returns the files of the report by name."""
    files = {"report.md": to_markdown(night).encode(), "report.html": to_html(night, history).encode()}
    for name, content in files.items():
        storage.write(f"{_name_place(night)}/{name}", content)
    _keep_result(storage, night)
    return files


def _keep_result(storage: Storage, night: Night) -> None:
    storage.write_sealed(f"{_name_place(night)}/result.json", json.loads(night.model_dump_json()))


def _name_place(night: Night) -> str:
    return f"{name_nights_folder(night.suite)}/{night.day}"


def _call_hooks(suite: Suite, storage: Storage, night: Night) -> Night:
    """The night after the hooks were called, with those that failed among its findings."""
    message = {
        "text": format_headline(night),
        "suite": night.suite,
        "date": str(night.day),
        "zone": night.zone,
        "status": night.status,
        "findings": [str(finding) for finding in night.findings if finding.alarm],
        "report": storage.find_url(f"{_name_place(night)}/report.html"),
    }
    failed = []
    for hook, why in hooks.call(suite.hooks, message, to_markdown(night)):
        say(suite.schedule, f"{hook} {'failed: ' + why if why else 'called'}")
        failed += [NightFinding(kind="hook", text=f"the {hook} failed: {why}")] if why else []
    return night.model_copy(update={"findings": (*night.findings, *failed), "told": True})


def _finish_night(suite: Suite, storage: Storage, night: Night, history: Sequence[Night]) -> int:
    """Tells MLflow of a night, notes that it has all of it, and says how the night was."""
    files = _keep(storage, night, history)
    begins = int(compute_instant(night.day, suite.schedule).timestamp() * 1000)
    link, left = record_night(storage, suite.tracking.uri, suite.label, night, files, begins_ms=begins)
    _keep_result(storage, night.model_copy(update={"recorded": not left}))
    for finding in night.findings:
        say(suite.schedule, str(finding))
    say(suite.schedule, format_headline(night))
    say(suite.schedule, f"report {storage.find_url(_name_place(night))}/report.html")
    say(suite.schedule, f"trends {link}")
    if left:
        say(suite.schedule, left)
    return night.status


def record_night(
    storage: Storage, uri: str | None, label: str, night: Night, files: Mapping[str, bytes], *, begins_ms: int
) -> tuple[str, str]:
    """A night in the MLflow experiment `label`: a run with its numbers, and its points on the run of all nights.

    The step is the day's number since 1970-01-01, so that a metric's chart on the run of all nights is its trend.
    Returns where a browser shows that, and what MLflow did not take, in words. Raises Mistake where it cannot be
    reached.
    """
    tracker = Tracker(storage, label, uri, folder=name_nights_folder(night.suite))
    tracker.check()
    about = f"Nights of `{night.suite}`, due at {night.schedule}: a run a night. Trends are on the run `{label}`."
    tags = collect_provenance()
    tracker.open_sweep({}, tags, about)
    date_id, day = str(night.day), night.day.toordinal() - date(1970, 1, 1).toordinal()
    checkpoints = {f"checkpoint.{_name_metric(e.name)}": e.checkpoint for e in night.entries}
    tracker.open_trial(date_id, date_id, {"date": date_id, "schedule": night.schedule}, {**tags, **checkpoints})
    metrics = {
        f"{_name_metric(entry.name)}/{name.removeprefix('eval/')}": value
        for entry in night.entries
        for name, value in entry.metrics.items()
    }
    for run in (date_id, None):
        tracker.log_metrics(run, {**metrics, "status": night.status}, day, begins_ms)
    for name, content in files.items():
        tracker.log_artifact(date_id, content, name)
    tracker.close_trial(date_id, "FAILED" if night.status else "FINISHED", files["report.md"].decode())
    tracker.close_sweep("FINISHED")
    shipment = tracker.flush(FLUSH_S)
    return tracker.find_chart_link(), "" if shipment.complete else str(shipment)


def _name_metric(model: str) -> str:
    """A model's name in the characters that MLflow takes, tiny@champion as tiny.champion."""
    return re.sub(r"[^\w.-]", ".", model).strip(".")
