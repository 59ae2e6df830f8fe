"""What a sweep and its trials look like in MLflow: which params, tags, data sets, notes and artifacts, and when.

`tracking` knows how to tell MLflow; this module knows what. What was published is noted with the sweep, so that a
command that finds everything done and shipped does not ask MLflow at all.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.experiment import Experiment, Variant, resolved, to_yaml
from orchestrator.measuring import Measured
from orchestrator.reports import page as report
from orchestrator.reports import results
from orchestrator.reports.results import Row
from orchestrator.settings import leaves, write_yaml
from orchestrator.subjects import Subject
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.provenance import provenance
from orchestrator.tracking.server import resolve_uri
from orchestrator.tracking.tracker import Dataset, Status, Tracker
from orchestrator.tracking.views import FRONT, PARETO, PART, Comparison, pareto_tags, part
from workers import checkpoint as checkpoints
from workers.blocks import Images, distance_name, protocol_key
from workers.config import DataConfig, FIDConfig, Measurement, digest, trained_by
from workers.data import Source
from workers.storage import Storage
from workers.tasks import folder_of

FLUSH_S = 60.0  # how long the end of a sweep waits for MLflow
ELSEWHERE = "evaluations"  # the experiment of checkpoints that come from elsewhere
CURVE = "valid/nll_bpd"
ENDED = ("done", "pruned", "diverged")  # as a trial of a sweep should
STATUS: dict[str, Status] = {"done": "FINISHED", "pruned": "KILLED", "running": "KILLED"}  # else FAILED


@dataclass
class Record:
    experiment: Experiment
    trials: Mapping[str, Variant]
    sources: Mapping[DataConfig, Source]
    storage: Storage
    left: str = ""  # what MLflow did not take, in words
    _opened: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    _standing: dict[str, dict[str, str]] = field(default_factory=dict)  # tags of the opened trials, as told last

    @property
    def folder(self) -> str:
        return f"sweeps/{self.experiment.name}"

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.storage, self.experiment.name, self.experiment.tracking.uri)

    def open(self) -> None:
        """The sweep's own run. Raises Mistake where MLflow cannot be reached."""
        self.tracker.check()
        experiment, search = self.experiment, self.experiment.search
        trials = search.samples if search.algorithm == "optuna" else len(self.trials)  # of which some are still unknown
        self.tracker.open_sweep(
            {"trials": trials, **_flat(experiment.search.model_dump(mode="json"), "search")},
            self.tags,
            f"Sweep `{experiment.name}`: {trials} trials.",
            self.compare,
        )
        self.tracker.log_artifact(None, to_yaml(experiment).encode(), "experiment.yaml")

    @property
    def compare(self) -> Comparison:
        """The objectives of the search, where it has several; else the bound and the distances that the trials
        measure, the one that ranks them first."""
        trials, search, best = self.trials.values(), self.experiment.search, self.experiment.search.metric
        names = {f"eval/{distance_name(fid)}" for v in trials if (fid := v.trial.evaluation.fid)}
        names |= {"eval/nll_bpd" for v in trials if v.trial.evaluation.nll}
        return Comparison(
            params=tuple(sorted({leaf for v in trials for p, x in v.params.items() for leaf in leaves(p, x)})),
            metrics=search.objectives
            if search.also
            else tuple(sorted(names, key=lambda name: (name != best, name != "eval/nll_bpd", name))) or (CURVE,),
            curve=CURVE,
            images=("samples",),
            trials=len(self.trials),
        )

    def trial_went_on(self, address: str, name: str) -> None:
        """Opens the trial's run the first time; then ships what its journal has got since."""
        if address in self._opened:
            self.tracker.ship(address)
            return
        self._opened.add(address)
        trial = self.trials[address].trial
        source = self.sources[trial.data]
        profile = {"train": source.train, "held_out": source.held_out, "levels": source.levels}
        images = [
            Dataset(name=source.name, digest=source.digest, source=trial.data.source, shape=source.shape,
                    profile=profile, context=context)
            for context in ("training", "evaluation")
        ]  # fmt: skip
        params = _flat(trial.model_dump(mode="json"))
        tags = {**self.tags, "trial.digest": address, "data.digest": source.digest}
        tags[PART] = part(list(self.trials).index(address))
        self._standing[address] = pareto_tags(list(self.trials), {})[address]
        self.tracker.open_trial(address, name, params, tags | self._standing[address], images)
        self.tracker.log_artifact(address, write_yaml(trial.model_dump(mode="json")).encode(), "trial.yaml")

    def trial_ended(self, row: Row) -> None:
        """The evaluation's metrics, its passports and a note; then the trial's run ends."""
        self.trial_went_on(row.digest, row.name)
        self._ended.add(row.digest)
        status = row.found.status or {}
        measured = {name: value for name, value in row.metrics.items() if name.startswith("eval/")}
        if row.found.summary:
            self.tracker.log_metrics(row.digest, measured, status["step"], status["updated_ms"])
            content = json.dumps(row.found.summary, indent=2).encode()
            self.tracker.log_artifact(row.digest, content, "evaluation.json")
            self.tracker.set_tags(row.digest, {"evaluation.hash": row.found.summary["hash"]})
        self.tracker.close_trial(row.digest, STATUS.get(row.state, "FAILED"), _trial_note(row))

    def stands(self, rows: Sequence[Row]) -> None:
        """Shows how the trials stand, best first: the Pareto front in their colours, the differences from the best."""
        names = self.compare.metrics
        points = {
            row.digest: [row.metrics[name] for name in names]
            for row in rows
            if all(math.isfinite(row.metrics.get(name, math.nan)) for name in names)
        }
        standing = pareto_tags(list(self.trials), points)
        for address, tags in standing.items():
            if address in self._opened and tags != self._standing[address]:
                self._standing[address] = tags
                self.tracker.set_tags(address, tags)
        best = rows[0].digest if rows and self.experiment.search.metric in rows[0].metrics else ""
        front = sum(tags.get(PARETO) == FRONT for tags in standing.values())
        self.tracker.show(replace(self.compare, best=best, front=front))

    def sweep_ended(self, rows: Sequence[Row]) -> None:
        """Writes the results beside the sweep and ships them, unless just these were shipped before."""
        key = digest([resolved(self.experiment), [[r.digest, r.state, r.metrics, r.found.checkpoint] for r in rows]])
        published = self.storage.read_json(f"{self.folder}/published.json") or {}
        if published.get("key") == key and self._still_there(published["uri"]):
            return
        frame = results.frame(rows)
        files = {
            "results.parquet": _parquet(frame),
            "results.csv": frame.to_csv(index=False).encode(),
            "nll_and_distance.png": results.comparison_plot(rows),
            "nll_by_t.png": results.bits_plot(rows),
            "distance_by_evaluations.png": results.evaluations_plot(rows),
            "schedules.png": results.schedules_plot({row.digest: row.variant.trial for row in rows}),
        }
        self.storage.write(f"{self.folder}/experiment.yaml", to_yaml(self.experiment).encode())
        if "tracker" not in self.__dict__:
            self.open()
        for row in rows:  # what a command before this one may have been cut off from telling
            if row.found.status and row.digest not in self._ended:
                self.trial_ended(row)
        self.stands(rows)
        if (candidate := self._candidate(rows)) is not None:
            self.tracker.register(candidate)
        for name, content in files.items():
            if content is not None:
                self.storage.write(f"{self.folder}/{name}", content)
                self.tracker.log_artifact(None, content, name)
        content = report.page(report.gather(self.storage, self.experiment.name)).encode()
        self.storage.write(report.path(self.experiment.name), content)
        self.tracker.log_artifact(None, content, "report.html")
        done = all(row.state in ENDED for row in rows)
        self.tracker.close_sweep("FINISHED" if done else "FAILED", _sweep_note(self.experiment, rows))
        shipment = self.tracker.flush(FLUSH_S)
        self.left = "" if shipment.complete else str(shipment)
        link = self.tracker.link()
        if shipment.complete:
            self.storage.write_json(
                f"{self.folder}/published.json", {"key": key, "uri": self.tracker.uri, "link": link}
            )
        self.link = link

    def _candidate(self, rows: Sequence[Row]) -> Candidate | None:
        """The best of the rows, which come best first; None while some trial has still to be made."""
        best = next((row for row in rows if row.state == "done" and self.experiment.search.metric in row.metrics), None)
        if best is None or not all(row.state in (*ENDED, "failed") for row in rows):
            return None
        checkpoint = checkpoints.newest(self.storage, f"{folder_of(best.digest)}/checkpoints")
        assert checkpoint, best.digest
        trial = self.trials[best.digest].trial
        checkpoint = checkpoints.averaged(checkpoint, Measurement.of(trial).evaluation.ema)
        levels, fid = self.sources[trial.data].levels, trial.evaluation.fid or FIDConfig()
        variance = Measurement.of(trial).evaluation.variance
        said = f"{best.name}: {results.in_short(best)}"
        return Candidate(
            trial=best.digest, checkpoint=checkpoint, levels=levels, fid=fid, variance=variance, description=said
        )

    @cached_property
    def link(self) -> str:
        """Where a browser shows the trials side by side."""
        published = self.storage.read_json(f"{self.folder}/published.json")
        return str(published["link"]) if published else self.tracker.link()

    def _still_there(self, uri: str) -> bool:
        """Whether what was published can be seen: under the same URI, with its database where that is local."""
        return uri == resolve_uri(self.storage, self.experiment.tracking.uri)[0] and (
            self.experiment.tracking.uri is not None or self.storage.exists("mlflow.db")
        )

    @cached_property
    def tags(self) -> dict[str, str]:
        return provenance()


def record_measurement(
    storage: Storage, uri: str | None, measured: Sequence[Measured], sources: Mapping[DataConfig, Source]
) -> str:
    """Measurements made outside of a sweep: on the run of their trial, or else in the experiment `evaluations`.

    What is measured by another protocol than the trial's own gets names of its own, `eval.<key>/...`, so that no two
    protocols share an axis. Gives what MLflow did not take, in words. Raises Mistake where it cannot be reached.
    """
    trackers: dict[str, Tracker] = {}
    for m in measured:
        subject, source, summary = m.subject, sources[m.subject.m.data], m.summary
        if summary is None:
            continue
        sweep, own_uri = _sweep_of(storage, subject.trial)
        if uri is not None and uri != own_uri:  # the run of the trial is not there
            sweep, own_uri = ELSEWHERE, uri
        if sweep not in trackers:
            tracker = trackers[sweep] = Tracker(storage, sweep, own_uri)
            tracker.check()
            if sweep == ELSEWHERE:
                tracker.open_sweep({}, provenance(), "Checkpoints that no sweep of this storage has trained.")
        tracker = trackers[sweep]
        key = protocol_key(subject.m, Images.of(source))
        tags = {f"protocol.{key}": json.dumps(summary["passports"]), f"hash.{key}": summary["hash"]}
        if subject.trial and sweep != ELSEWHERE:
            address, prefix = subject.trial, "eval" if subject.m == subject.own else f"eval.{key}"
            tracker.open_trial(address, subject.name, {}, tags)
        else:  # a run for each protocol
            address, prefix = f"{subject.checkpoint.digest}-{key}", "eval"
            tracker.open_trial(address, subject.name, _flat(subject.m.model_dump(mode="json")), tags)
        metrics = {f"{prefix}/{name.removeprefix('eval/')}": value for name, value in summary["metrics"].items()}
        tracker.log_metrics(address, metrics, subject.checkpoint.step or 0)
        tracker.log_artifact(address, json.dumps(summary, indent=2).encode(), f"evaluation-{key}.json")
        if sweep == ELSEWHERE:
            tracker.close_trial(address, "FINISHED")
    for sweep, tracker in trackers.items():
        if sweep == ELSEWHERE:
            tracker.close_sweep("FINISHED")
    left = [tracker.flush(FLUSH_S) for tracker in trackers.values()]
    return "\n".join(str(shipment) for shipment in left if not shipment.complete)


def record_pictures(storage: Storage, uri: str | None, subject: Subject, paths: Mapping[str, str]) -> str:
    """Pictures of a checkpoint, PNG files of the storage by name, on its trial's run or in `evaluations`.

    Gives what MLflow did not take, in words. Raises Mistake where it cannot be reached.
    """
    sweep, own_uri = _sweep_of(storage, subject.trial)
    if uri is not None and uri != own_uri:
        sweep, own_uri = ELSEWHERE, uri
    tracker = Tracker(storage, sweep, own_uri)
    tracker.check()
    address = subject.trial if subject.trial and sweep != ELSEWHERE else f"{subject.checkpoint.digest}-pictures"
    if sweep == ELSEWHERE:
        tracker.open_sweep({}, provenance(), "Checkpoints that no sweep of this storage has trained.")
    tracker.open_trial(address, subject.name, {}, {})
    for name, path in paths.items():
        tracker.log_image(address, f"pictures/{name}", path, subject.checkpoint.step or 0)
    tracker.close_trial(address, "FINISHED")
    if sweep == ELSEWHERE:
        tracker.close_sweep("FINISHED")
    shipment = tracker.flush(FLUSH_S)
    return "" if shipment.complete else str(shipment)


def _sweep_of(storage: Storage, trial: str | None) -> tuple[str, str | None]:
    """The sweep in whose MLflow experiment the trial has a run, and the tracking URI of that."""
    for name in storage.list("sweeps") if trial else []:
        for key, runs in (storage.read_json(f"sweeps/{name}/mlflow.json") or {}).items():
            if trial in runs or any(trained_by(run) == trial for run in runs):
                return name, None if key == "mlflow.db" else str(key)
    return ELSEWHERE, None


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path; lists and empty mappings stay whole."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}.{name}" if prefix else name
        flat |= _flat(value, path) if isinstance(value, Mapping) and value else {path: value}
    return flat


def _parquet(frame: Any) -> bytes:
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False)
    return stream.getvalue()


def _trial_note(row: Row) -> str:
    status = row.found.status or {}
    measured = results.in_short(row)
    lines = [f"**{row.name}**: {row.state}{f', {measured}' if measured else ''}", ""]
    lines += [row.error or str(status.get("detail") or ""), ""]
    lines += [f"- `{n}`: {results.with_error(n, row.metrics, digits=4)}" for n in row.metrics if not n.endswith("_se")]
    lines += [f"- trained {status.get('step', 0)} steps at {row.images_per_s or 0:,.0f} images/s"]
    if row.found.summary:
        lines += ["", "What the numbers are:", "```json", json.dumps(row.found.summary["passports"], indent=2), "```"]
    return "\n".join(lines)


def _sweep_note(experiment: Experiment, rows: Sequence[Row]) -> str:
    best = rows[0] if rows and experiment.search.metric in rows[0].metrics else None
    head = f"Sweep `{experiment.name}`: {len(rows)} trials, ranked by `{experiment.search.metric}`."
    said = (
        f"Best: **{best.name}**, {results.with_error(experiment.search.metric, best.metrics)}."
        if best
        else "No trial is done yet."
    )
    table = results.markdown(rows, experiment.search.metric)
    note = results.footnote(rows, experiment.search.metric).replace("\n", "  \n")
    return (
        f"{head} {said}\n\n{table}\n\nNumbers are ± their standard errors; NLL is of held-out images.  \n{note}".strip()
    )
