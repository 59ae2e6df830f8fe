"""What the thread that ships to MLflow does: opens the runs, sends what the journals hold, shows the comparison.

Each method may be cut off anywhere and made again.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.tracking import models, views
from orchestrator.tracking.catalogue import PAUSE, ROW, STORAGE, SWEEP, VIEW, Catalogue, Run
from orchestrator.tracking.line import CallLine
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.shipment import Opening, Status
from orchestrator.tracking.views import PARENT, ComparisonView
from orchestrator.tracking.writer import BATCH, TAG_LIMIT, Writer
from workers.identity import compute_digest as digest_of
from workers.journal import read_points
from workers.layout import get_trial_of_row, name_trial_folder

log = logging.getLogger(__name__)


def is_of_another_training(entries: Sequence[Mapping[str, Any]], points: Mapping[tuple[int, str], float]) -> bool:
    """Whether lines of a journal differ from points by (step, metric) that were shipped; speeds always do."""
    return any(
        key in points and not math.isclose(value, points[key], rel_tol=1e-12) and not name.endswith("_per_s")
        for entry in entries
        for name, value in entry.get("metrics", {}).items()
        if value is not None and math.isfinite(value) and (key := (entry["step"], name))
    )


def _digest_line(entry: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(entry))  # which may hold NaN


def read_clock_ms() -> int:
    return int(time.time() * 1000)


class Shipper:
    """Ships a sweep. `compare` and `description` are what `show` writes, `openings` what its trials are opened with."""

    def __init__(self, catalogue: Catalogue, writer: Writer, line: CallLine) -> None:
        self._catalogue, self._writer, self._line = catalogue, writer, line
        self.compare: ComparisonView | None = None
        self.description = ""
        self.openings: dict[str, Opening] = {}  # by row
        self.last_steps: dict[str, int] = {}  # of each row, where its trial may go on beyond it
        self.is_stale, self._show_at = False, 0.0  # whether what is shown is; it is shown anew, not before then
        self._shown: dict[str, str] = {}  # tags of the experiment, as they were written last

    def open(self, opening: Opening) -> None:
        """Starts a run or continues it. The sweep's own run is opened first."""
        catalogue, row_id, tags = self._catalogue, opening.row_id, opening.tags
        catalogue.list_runs()
        catalogue.say_restored()
        entries = [] if row_id == SWEEP else self._read_journal(row_id)
        run = self._find_run(row_id, entries)
        own = {ROW: row_id, STORAGE: catalogue.origin}
        if row_id != SWEEP:
            if SWEEP not in catalogue.runs:  # deleted, and the command is none of the sweep, which opens it first
                self.open(Opening(row_id=SWEEP, name=catalogue.name))
            own[PARENT] = catalogue.runs[SWEEP].run_id
        if run is None:
            start = opening.start_ms or (entries[0]["time_ms"] if entries else read_clock_ms())
            short = {key: text for key, text in tags.items() if len(text) <= TAG_LIMIT}  # the others take a call
            run = catalogue.make_run(row_id, opening.name, {**own, **short}, start)
        run.opened = True
        if row_id != SWEEP and run.status == "RUNNING":
            self._writer.resume(catalogue.runs[SWEEP])
        changed = self._writer.log_params(run, opening.name, opening.params)
        self._writer.tag(run, {**own, **tags, **changed})
        for used in opening.datasets:
            self._writer.log_input(run, used)

    def _find_run(self, row_id: str, entries: Sequence[Mapping[str, Any]]) -> Run | None:
        """The run that MLflow has of that row, unless it is of another training."""
        run = self._catalogue.runs.get(row_id)
        if run is None:
            return None
        self._catalogue.take_from_bin(run)
        if row_id != SWEEP and not run.opened:
            self._recall(run, entries)
            if is_of_another_training(entries, run.points):
                self._set_aside(row_id, run)
                return None
        return run

    def _recall(self, run: Run, entries: Sequence[Mapping[str, Any]]) -> None:
        """Reads which points and images a run has, unless the count of shipped lines says exactly that."""
        if run.lines and not (run.lines <= len(entries) and run.last == _digest_line(entries[run.lines - 1])):
            run.lines = 0  # the journal was restored, or begun again
        if run.lines and run.lines == len(entries):
            return
        for name in run.metrics:
            for point in self._catalogue.client.get_metric_history(run.run_id, name):
                run.points[point.step, name] = point.value
        if "mlflow.loggedImages" in run.tags:
            files = self._catalogue.client.list_artifacts(run.run_id, "images")
            # The second of an image's two files: both are there.
            run.files = {file.path.removesuffix("+compressed.webp").rpartition("+")[2] for file in files}
        for entry in entries[run.lines :]:  # a run that has all of it is not opened again
            if not run.has(entry):
                break
            run.lines, run.last, self._catalogue.is_changed = run.lines + 1, _digest_line(entry), True

    def _set_aside(self, row_id: str, run: Run) -> None:
        """The journal is of another training: the old run stays in MLflow, outside of the sweep's tree."""
        log.warning("Trial %s was trained anew: its run %s is kept as superseded, a new one made.", row_id, run.run_id)
        if run.status == "RUNNING":
            self._catalogue.client.set_terminated(run.run_id, "KILLED")
        self._catalogue.client.set_tag(run.run_id, "superseded", "true")
        for key in (PARENT, ROW):  # the row last: until it is gone, this is done again
            if key in run.tags:
                self._catalogue.client.delete_tag(run.run_id, key)
                del run.tags[key]
        del self._catalogue.runs[row_id]

    def _read_journal(self, digest: str) -> list[dict[str, Any]]:
        """The points of a row: those of its trial's journal that are whole, in their order, up to the row's step."""
        points = read_points(self._catalogue.storage, name_trial_folder(get_trial_of_row(digest)))
        last = self.last_steps.get(digest)
        return [point for point in points if last is None or point["step"] <= last]

    def ship(self, digest: str) -> None:
        """Sends what the journal of a trial has beyond what is shipped."""
        run, entries = self._catalogue.get_opened(digest), self._read_journal(digest)
        if is_of_another_training(entries[run.lines :], run.points):  # there was none yet when the run was opened
            self._set_aside(digest, run)
            self.open(self.openings[digest])
            run = self._catalogue.get_opened(digest)
        images = {entry["step"] for entry in entries if "image" in entry}
        if len(entries) <= run.lines:
            run.images = images
            return
        self._writer.resume(run)
        self._writer.resume(self._catalogue.runs[SWEEP])
        points: list[Any] = []
        for number, entry in enumerate(entries[run.lines :], start=run.lines + 1):
            points += self._writer.list_points(run, entry)
            if "image" in entry:
                self._writer.log_image(run, entry)
            if len(points) >= BATCH or number == len(entries):
                self._writer.log_points(run, points)
                points = []
                run.lines, run.last, self._catalogue.is_changed = number, _digest_line(entry), True
                self._catalogue.save("now and then")
        if run.images != images:
            run.images = images
            self.is_stale = bool(self.compare)  # the step that all trials have images of may be another now
            if self.is_stale and time.monotonic() >= self._show_at:
                self.show()

    def show(self) -> None:
        """Writes the experiment's note and the views, those that have changed since."""
        here, began = self._catalogue, time.monotonic()
        note = [self.description] if self.description else []
        if self.compare:
            trials = {row_id: run for row_id, run in here.runs.items() if row_id != SWEEP}
            going = [run.images for run in trials.values() if run.status in ("RUNNING", "FINISHED")]
            best = trials.get(self.compare.best)
            parent_id, best_id = here.runs[SWEEP].run_id, best.run_id if best else ""
            links = []
            for view in views.make_views(self.compare, parent_id, views.find_common_step(going), best_id):
                key = here.make_view_key(view.title)
                text = json.dumps(view.state)
                if self._shown.get(key) != text:
                    tag = views.make_tag(f"{here.name}: {view.title}", view.state, read_clock_ms())
                    here.client.set_experiment_tag(here.experiment_id, f"{VIEW}{key}", tag)
                    self._shown[key] = text
                links.append(f"[{view.title}]({views.address_page(here.experiment_id, key)})")
            note.append(f"Compare {', '.join(links)}.")
        text = "\n\n".join(note)[:TAG_LIMIT]
        if note and self._shown.get("note") != text:
            here.client.set_experiment_tag(here.experiment_id, "mlflow.note.content", text)
            self._shown["note"] = text
        self.is_stale, self._show_at = False, time.monotonic() + PAUSE * (time.monotonic() - began)

    def register(self, candidate: Candidate) -> None:
        """Makes the candidate the one of the registered model of the sweep's name."""
        here, run = self._catalogue, self._catalogue.get_opened(candidate.trial)
        models.register(here.client, here.experiment_id, here.name, run.run_id, candidate=candidate, origin=here.origin)

    def close_sweep(self, status: Status, note: str) -> None:
        """Ends every run of a trial that is still open, then the sweep's own."""
        for row_id, run in self._catalogue.runs.items():
            if row_id != SWEEP and run.status == "RUNNING" and not run.is_in_bin:
                log.warning("Trial %s was still open in MLflow: its run ends as KILLED.", row_id)
                run.opened = True
                self._writer.close(run, "KILLED")
        self._writer.close(self._catalogue.get_opened(SWEEP), status, note)

    def count_unsent(self) -> int:
        """How many points and images of the journals are not shipped. From any thread."""
        runs, count = self._catalogue.runs, 0
        for row_id in self.openings:
            sent = runs[row_id].lines if row_id in runs else 0
            count += sum(len(entry.get("metrics", ())) or 1 for entry in self._read_journal(row_id)[sent:])
        return count
