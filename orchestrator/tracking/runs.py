"""What a sweep and its trials look like in MLflow: which params, tags, data sets, notes and artifacts, and when.

`tracking` knows how to tell MLflow; this module knows what. What was published is noted with the sweep, so that a
command that finds everything done and shipped only asks MLflow whether it is still there.
"""

import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.experiment.expand import find_starting_rows
from orchestrator.experiment.load import resolve, to_yaml
from orchestrator.experiment.metrics import choose_bound, choose_likelihood
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.experiment.settings import list_leaves, write_yaml
from orchestrator.experiment.starts import shorten_slot
from orchestrator.measuring.seeds import are_over_seeds, group_rows
from orchestrator.measuring.subjects import find_checkpoint
from orchestrator.output import page as report
from orchestrator.output.findings import gather
from orchestrator.output.table import (
    describe_row,
    format_means,
    format_metric,
    make_footnote,
    make_frame,
    make_markdown,
)
from orchestrator.state.rows import SEED, Row, drop_seed, join_repetitions, list_asked, name_variant
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.provenance import collect_provenance
from orchestrator.tracking.shipment import LoggedDataset, Status
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import (
    COLOUR,
    FRONT,
    PARETO,
    PART,
    SETTING,
    ComparisonView,
    choose_colour,
    make_pareto_tags,
    name_part,
)
from workers.bundles import collect_bundles
from workers.config import DataConfig, FIDConfig, Measurement, Mistake
from workers.data.decoding import choose_type
from workers.data.sources import Source
from workers.evaluation.blocks import name_distance
from workers.identity import compute_digest, list_outside
from workers.layout import RowId, name_published_file, name_report_file, name_sweep_folder
from workers.network import manifest
from workers.storage import Storage, tell_damage

FLUSH_S = 60.0  # how long the end of a sweep waits for MLflow
ASK_S = 10.0  # and how long a command that finds all published waits to hear whether it still is
CURVE = "valid/nll_bpd"
ENDED = ("done", "pruned", "diverged")  # as a trial of a sweep should
STATUS: dict[str, Status] = {  # else FAILED
    "done": "FINISHED",
    **dict.fromkeys(("pruned", "running", "paused", "finished"), "KILLED"),  # the last is trained, and not measured
}


@dataclass
class SweepRuns:
    experiment: Experiment
    trials: Mapping[RowId, Variant]
    sources: Mapping[DataConfig, Source]
    storage: Storage
    left: str = ""  # what MLflow did not take, in words
    _is_open: bool = False
    _opened: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    _joined: list[list[RowId]] = field(default_factory=list)  # rows that differ in the seed alone together
    _numbers: dict[RowId, tuple[int, int]] = field(default_factory=dict)  # of each row, and of its place in `_joined`
    _starts: dict[RowId, dict[str, RowId]] = field(default_factory=dict)  # the rows that each starts from, by slot
    _standing: dict[str, dict[str, str]] = field(default_factory=dict)  # tags of the opened trials, as told last

    @property
    def folder(self) -> str:
        return name_sweep_folder(self.experiment.name)

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.storage, self.experiment.name, self.experiment.tracking.uri)

    def open(self) -> None:
        """The sweep's own run. Raises Mistake where MLflow cannot be reached."""
        self.tracker.check()
        self._is_open = True
        experiment, search = self.experiment, self.experiment.search
        trials = search.samples if search.algorithm == "optuna" else len(self.trials)  # of which some are still unknown
        self.tracker.open_sweep(
            flatten_params(experiment.search.model_dump(mode="json"), "search"),
            {**self.tags, "sweep.trials": str(trials)},  # no param, as an edit of the file may change it
            f"Sweep `{experiment.name}`: {trials} trials.",
            self.compare,
        )
        self.tracker.log_artifact(None, to_yaml(experiment).encode(), "experiment.yaml")
        for digest, bundle in collect_bundles(variant.trial for variant in self.trials.values()).items():
            for module in bundle.modules.values():
                self.tracker.log_artifact(None, module.text.encode(), f"code/{digest}/{module.file}")

    @property
    def compare(self) -> ComparisonView:
        """The objectives of the search, where it has several; else the bound and the distances that the trials
        measure, the one that ranks them first."""
        trials, search, best = self.trials.values(), self.experiment.search, self.experiment.search.metric
        names = {f"eval/{name_distance(fid)}" for v in trials if (fid := v.trial.evaluation.fid)}
        levels = [self.sources[v.trial.data].levels for v in trials]
        bounds = {
            choose_likelihood(choose_bound(v.trial.continuous), n)
            for n, v in zip(levels, trials, strict=True)
            if v.trial.evaluation.nll
        }
        curve = CURVE if any(levels) else choose_likelihood(CURVE, None)
        return ComparisonView(
            params=tuple(sorted({leaf for v in trials for p, x in v.params.items() for leaf in list_leaves(p, x)})),
            metrics=search.objectives
            if search.also
            else tuple(sorted(names | bounds, key=lambda name: (name != best, name not in bounds, name))) or (curve,),
            curve=curve,
            images=("samples",),
            trials=len(self.trials),
            over_seeds=len(self._repetitions) < len(self.trials),
        )

    @property
    def _repetitions(self) -> list[list[RowId]]:
        """The ids of all rows, those that differ in the seed alone together."""
        if len(self._numbers) != len(self.trials):  # an adaptive search adds to them
            self._joined = join_repetitions(self.trials.items())
            hues = {row_id: hue for hue, group in enumerate(self._joined) for row_id in group}
            self._numbers = {row_id: (number, hues[row_id]) for number, row_id in enumerate(self.trials)}
            self._starts = find_starting_rows(self.trials, lambda config: self.sources[config].digest)
        return self._joined

    def _number_and_hue(self, row_id: RowId) -> tuple[int, int]:
        """The number of a row in the experiment, and that of the rows that it is a repetition of."""
        assert self._repetitions
        return self._numbers[row_id]

    def continue_trial(self, row_id: RowId, name: str) -> None:
        """Opens the trial's run the first time; then ships what its journal has got since."""
        if row_id in self._opened:
            self.tracker.ship(row_id)
            return
        self._opened.add(row_id)
        trial = self.trials[row_id].trial
        self.tracker.last_steps[row_id] = trial.training.steps
        source = self.sources[trial.data]
        values = {"span": list(source.span)} if source.span else {"levels": source.levels}
        profile = {"train": source.train, "held_out": source.held_out, **values}
        images = [
            LoggedDataset(name=source.name, digest=source.digest, source=trial.data.source, shape=source.shape,
                    dtype=choose_type(source.levels).__name__, profile=profile, context=context)
            for context in ("training", "evaluation")
        ]  # fmt: skip
        params = flatten_params(trial.model_dump(mode="json"))
        tags = {**self.tags, "trial.digest": row_id, "data.digest": source.digest}
        tags |= {f"code.{path}": ", ".join(names) for path, names in list_outside(trial).items()}
        number, hue = self._number_and_hue(row_id)
        tags |= {f"trial.starts_from.{shorten_slot(slot)}": row for slot, row in self._starts.get(row_id, {}).items()}
        tags |= {"trial.role": role} if (role := self.trials[row_id].role) else {}
        tags[PART] = name_part(number)
        if SEED in (variant := self.trials[row_id]).params:
            tags[SETTING] = name_variant(drop_seed(variant))
        self._standing[row_id] = {COLOUR: choose_colour(hue)}
        self.tracker.open_trial(row_id, name, params, tags | self._standing[row_id], images)
        self.tracker.log_artifact(row_id, lambda: write_yaml(trial.model_dump(mode="json")).encode(), "trial.yaml")

    def end_trial(self, row: Row) -> None:
        """The evaluation's metrics, its passports and a note; then the trial's run ends."""
        self.continue_trial(row.digest, row.name)
        self._ended.add(row.digest)
        summary, tags, metrics = row.found.summary, dict[str, str](), dict(row.speeds)
        if summary:
            metrics |= {name: value for name, value in row.metrics.items() if name.startswith("eval/")}
            tags["evaluation.hash"] = summary.get("hash", "")
            self.tracker.log_artifact(
                row.digest, lambda: json.dumps(summary, indent=2, default=list).encode(), "evaluation.json"
            )
        if status := row.found.status:
            self.tracker.log_metrics(row.digest, metrics, row.found.step, status.get("updated_ms"))
        self.tracker.close_trial(row.digest, STATUS.get(row.state, "FAILED"), _write_trial_note(row), tags=tags)

    def show_standing(self, rows: Sequence[Row]) -> None:
        """Shows how the trials stand, best first: the Pareto front in their colours, the differences from the best."""
        names, first = self.compare.metrics, {row_id: group[0] for group in self._repetitions for row_id in group}
        points: dict[str, list[float]] = {
            first[group.digest]: [group.metrics[name] for name in names]
            for group in group_rows(rows)
            if all(math.isfinite(group.metrics.get(name, math.nan)) for name in names)
        }
        standing = make_pareto_tags(self._repetitions, points)
        for row_id, tags in standing.items():
            if row_id in self._opened and tags != self._standing[row_id]:
                self._standing[row_id] = tags
                self.tracker.set_tags(row_id, tags)
        best = rows[0].digest if rows and self.experiment.search.metric in rows[0].metrics else ""
        front = sum(tags.get(PARETO) == FRONT for tags in standing.values())
        self.tracker.show(replace(self.compare, best=best, front=front))

    def end_sweep(self, rows: Sequence[Row], to_ship_s: float | None = None) -> None:
        """Writes the results beside the sweep and ships them, unless just these were shipped before.

        It waits for MLflow as long as calls get through, or no longer than `to_ship_s`.
        """
        key = compute_digest(
            [resolve(self.experiment), [[r.digest, r.state, r.metrics, r.found.checkpoint] for r in rows]]
        )
        published = self.storage.read_sealed(self._published) or {}
        is_whole = published.get("key") == key and self._are_whole(published["files"])
        if is_whole and published["uri"] == self.tracker.uri and not self._is_lost(rows):
            return
        from orchestrator.output.curves import draw_png_files  # matplotlib takes half a second

        frame, found = make_frame(list_asked(rows)), gather(self.storage, self.experiment.name)
        written = {
            "experiment.yaml": to_yaml(self.experiment).encode(),
            "results.parquet": _write_parquet(frame),
            "results.csv": frame.to_csv(index=False).encode(),
            **draw_png_files(found),
        }
        for name, content in written.items():
            self.storage.write(f"{self.folder}/{name}", content)
        if not self._is_open:
            self.open()
        for row in rows:  # what a command before this one may have been cut off from telling
            if row.found.status and row.digest not in self._ended:
                self.end_trial(row)
        self.show_standing(rows)
        if (candidate := self._choose_candidate(rows)) is not None:
            self.tracker.register(candidate)
        written["report.html"] = report.render_report(found).encode()
        self.storage.write(name_report_file(self.experiment.name), written["report.html"])
        for name, content in written.items():
            self.tracker.log_artifact(None, content, name)
        done = all(row.state in ENDED for row in rows)
        self.tracker.close_sweep("FINISHED" if done else "FAILED", _write_sweep_note(self.experiment, rows))
        shipment = self.tracker.flush(to_ship_s or FLUSH_S, while_it_goes=to_ship_s is None)
        self.left = "" if shipment.complete else str(shipment)
        link = self.tracker.find_link()
        if shipment.complete:
            sums = {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
            told = {"key": key, "uri": self.tracker.uri, "link": link, "files": sums}
            self.storage.write_sealed(self._published, told)
        self.link = link

    def _choose_candidate(self, rows: Sequence[Row]) -> Candidate | None:
        """The best of the rows, which come best first; None while some trial has still to be made."""
        best = next((row for row in rows if row.state == "done" and self.experiment.search.metric in row.metrics), None)
        if best is None or not all(row.state in (*ENDED, "failed") for row in rows):
            return None
        trial = self.trials[best.digest].trial
        checkpoint = find_checkpoint(self.storage, best.digest, trial)
        assert checkpoint, best.digest
        checkpoint = manifest.choose_weights(checkpoint, Measurement.of(trial).evaluation)
        source, fid = self.sources[trial.data], trial.evaluation.fid or FIDConfig()
        asked = Measurement.of(trial).evaluation
        return Candidate(
            trial=best.digest,
            checkpoint=checkpoint,
            levels=source.levels,
            span=source.span,
            fid=fid,
            variance=asked.variance,
            precision=asked.precision,
            description=f"{best.name}: {describe_row(best)}",
        )

    @cached_property
    def link(self) -> str:
        """Where a browser shows the trials side by side."""
        published = self.storage.read_sealed(self._published)
        return str(published["link"]) if published else self.tracker.find_link()

    @property
    def _published(self) -> str:
        return name_published_file(self.experiment.name)

    def _are_whole(self, sums: Mapping[str, str]) -> bool:
        """Whether the files beside the sweep are those that were written; what is not is told."""
        wrong = {}
        for name, sha256 in sums.items():
            path = f"{self.folder}/{name}"
            if not self.storage.exists(path):
                wrong[path] = "is gone"
            elif hashlib.sha256(self.storage.read(path)).hexdigest() != sha256:
                wrong[path] = "has changed"
        for path, how in wrong.items():
            tell_damage(self.storage.find_url(path), how, "it is written again")
        return not wrong

    def _is_lost(self, rows: Sequence[Row]) -> bool:
        """Whether something that was published is no longer in MLflow; where that cannot be asked, it is told."""
        try:
            if not self.tracker.is_missing(
                [row.digest for row in rows if row.found.status], self._choose_candidate(rows), ASK_S
            ):
                return False
            self.storage.delete(self._published)  # until all of it is there again
            return True
        except Mistake as mistake:
            self.left = str(mistake)
            return False

    @cached_property
    def tags(self) -> dict[str, str]:
        return collect_provenance()


def flatten_params(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path; lists and empty mappings stay whole."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        path = sys.intern(f"{prefix}.{name}" if prefix else name)  # kept by all trials
        flat |= flatten_params(value, path) if isinstance(value, Mapping) and value else {path: value}
    return flat


def _write_parquet(frame: Any) -> bytes:
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False)
    return stream.getvalue()


def _write_summary(summary: Mapping[str, Any]) -> bytes:
    return json.dumps(summary, indent=2, default=list).encode()


def _write_trial_note(row: Row) -> str:
    status = row.found.status or {}
    measured = describe_row(row)
    lines = [f"**{row.name}**: {row.state}{f', {measured}' if measured else ''}", ""]
    lines += [row.error or str(status.get("detail") or ""), ""]
    lines += [f"- `{n}`: {format_metric(n, row.metrics, digits=4)}" for n in row.metrics if not n.endswith("_se")]
    lines += [f"- trained {row.found.step} steps at {row.images_per_s or 0:,.0f} images/s"]
    if row.found.summary:
        lines += ["", "What the numbers are:", "```json", json.dumps(row.found.summary["passports"], indent=2), "```"]
    return "\n".join(lines)


def _write_sweep_note(experiment: Experiment, rows: Sequence[Row]) -> str:
    rows = list_asked(rows)
    metric, groups = experiment.search.metric, group_rows(rows)
    best = groups[0] if groups and metric in groups[0].metrics else None
    head = f"Sweep `{experiment.name}`: {len(rows)} trials, ranked by `{metric}`."
    verdict = f"Best: **{best.name}**, {format_means(metric, best)}." if best else "No trial is done yet."
    table = make_markdown(rows, metric)
    note = make_footnote(rows, metric).replace("\n", "  \n")
    if are_over_seeds(groups):
        note += "  \nEach seed has a run of its own below."
    errors = "Numbers are ± their standard errors; NLL is of held-out images."
    return f"{head} {verdict}\n\n{table}\n\n{errors}  \n{note}".strip()
