"""Which runs MLflow has of a sweep: its experiment, the runs by their rows, and how much of each is shipped.

The map of the runs is kept in the storage and held against what MLflow itself says once a command: what was deleted
there is noted, to be reported and to be made again.
"""

import logging
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.tracking import models
from orchestrator.tracking.glance import sees_all
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.server import connect, find_database, is_database, make_database, name_origin, resolve_uri
from workers.data.cache import find_default_cache
from workers.identity import compute_digest as digest_of
from workers.layout import name_sweep_folder
from workers.storage import Storage

log = logging.getLogger(__name__)

SWEEP = "sweep"  # what stands for a row at the parent run
OWN = "mlflow.db"  # the key, among places, of the database in the storage
ROW, STORAGE = "orchestrator.row", "orchestrator.storage"
PAUSE = 20  # so many times as long as what takes the longer the more runs there are, is the pause after it
VIEW = "mlflow.sharedViewState."  # begins the name of a view's tag


@dataclass
class Run:
    """A run of MLflow. The first four are kept in the storage, the others come from MLflow when it is reopened."""

    run_id: str
    lines: int = 0  # of the journal, shipped
    last: str = ""  # digest of the last of them
    artifacts: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: set[str] = field(default_factory=set)
    datasets: set[tuple[str, str]] = field(default_factory=set)
    is_in_bin: bool = False  # deleted in MLflow, and not for good
    images: set[int] = field(default_factory=set)  # the steps of its images
    points: dict[tuple[int, str], float] = field(default_factory=dict)  # that a command before this one has shipped
    files: set[str] = field(default_factory=set)  # the unique parts in the names of its images, as `points`
    opened: bool = False

    def make_image_id(self, entry: Mapping[str, Any]) -> str:
        """The unique part in the names of the files of an image, given by its line of the journal."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.run_id}/{entry['image']}/{entry['step']}"))

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Whether a line of the journal is among what the run was found to have."""
        if "image" in entry:
            return self.make_image_id(entry) in self.files
        return all(
            (entry["step"], name) in self.points or f"nonfinite.{name}" in self.tags
            for name in entry.get("metrics", {})
        )


class Catalogue:
    """The experiment of a sweep and its runs. But for what says so, a method belongs to the thread that ships."""

    def __init__(self, storage: Storage, name: str, uri: str | None, folder: str | None) -> None:
        """Raises Mistake where the URI cannot be used. Nothing is asked of MLflow yet."""
        self.uri, self._artifacts = resolve_uri(storage, uri)
        self.storage, self.name = storage, name
        self._state_path = f"{folder or name_sweep_folder(name)}/mlflow.json"
        self._state_key = OWN if uri is None else self.uri  # a local storage may be moved, database and all
        self.origin = name_origin(storage)
        self.client: Any = None
        self.experiment_id = ""
        self._shared: set[str] = set()  # names of the experiment's tags, as they were found
        self.runs: dict[str, Run] = {}
        self._lost: list[str] = []  # what MLflow had and has no more, until it is reported
        self.is_changed = False  # whether the map of runs differs from the one in the storage
        self._is_listed = False
        self._saved_at = self._save_pause_s = 0.0  # when the map was written, and how long not again

    def is_open(self, row_id: str) -> bool:
        """Whether the run of that row is there and was opened by this command. From any thread."""
        return row_id in self.runs and self.runs[row_id].opened

    def get_opened(self, row_id: str) -> Run:
        """The run of that row. Raises RuntimeError where MLflow refused to open it."""
        if not self.is_open(row_id):
            raise RuntimeError(f"{row_id} has no run, its opening was refused")
        return self.runs[row_id]

    def make_view_key(self, title: str) -> str:
        """Of the view of that title; the same for ever, so that a link that was given out leads to what is there."""
        return digest_of([self.origin, self.name, title])

    def ask(self) -> None:
        """One cheap request without repeats; raises where nobody answers, where it is no MLflow, or on a refusal."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        if not is_database(self.uri):
            host, endpoint = get_default_host_creds(self.uri), "/api/2.0/mlflow/experiments/search"
            once = {"max_retries": 0, "timeout": 30, "raise_on_status": False}
            response = http_request(host, endpoint, "POST", json={"max_results": 1}, **once)
            if 400 <= response.status_code < 500 and response.status_code != 429:  # JSON or not, MLflow or not
                raise ValueError(f"failed with error code {response.status_code}. Response body: '{response.text}'")
            verify_rest_response(response, endpoint)

    def connect(self) -> None:
        """Imports MLflow (seconds), opens the database or finds the server, and finds or makes the experiment."""
        self.ask()
        if is_database(self.uri):
            make_database(find_database(self.uri), find_default_cache())
        self.client = connect(self.uri)
        experiment = self.client.get_experiment_by_name(self.name)
        if experiment is None:
            self.experiment_id = self.client.create_experiment(self.name, self._artifacts)
            if self._read_kept():
                self._lost.append("the experiment")
            return
        self.experiment_id, self._shared = experiment.experiment_id, set(experiment.tags)
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(self.experiment_id)
            self._lost.append("the experiment (it was in its bin)")

    def save(self, when: Literal["now", "often", "now and then"]) -> None:
        """Writes the map of runs where it has changed. What it lacks is sent again, to no harm. From any thread.

        That takes the longer the more runs there are: `often` leaves a pause of many times as long, and `now and then`
        one of a second at least.
        """
        began = time.monotonic()
        pause_s = {"now": 0.0, "often": self._save_pause_s, "now and then": max(1.0, self._save_pause_s)}[when]
        if self.is_changed and began >= self._saved_at + pause_s:
            self.is_changed = False  # before the runs are read: what changes from then on is written the next time
            try:
                state = self.storage.read_sealed(self._state_path) or {}
                state[self._state_key] = {
                    row_id: {"run_id": r.run_id, "lines": r.lines, "last": r.last, "artifacts": dict(r.artifacts)}
                    for row_id, r in list(self.runs.items())
                }
                self.storage.write_sealed(self._state_path, state)
            except BaseException:
                self.is_changed = True
                raise
            self._saved_at = time.monotonic()
            self._save_pause_s = PAUSE * (self._saved_at - began)

    def _read_kept(self) -> dict[str, Run]:
        """What the storage knows of the runs here."""
        state = self.storage.read_sealed(self._state_path) or {}
        return {row_id: Run(**entry) for row_id, entry in state.get(self._state_key, {}).items()}

    def list_runs(self) -> None:
        """Reads once which runs MLflow has of this sweep, by the ids kept in the storage, else by their tags."""
        from mlflow.entities import LifecycleStage, ViewType

        if self._is_listed:
            return
        known = self._read_kept() | self.runs
        by_id: dict[str, Any] = {}
        token = None
        while page := self.client.search_runs(
            [self.experiment_id], run_view_type=ViewType.ALL, max_results=1000, page_token=token
        ):
            by_id |= {found.info.run_id: found for found in page}
            token = page.token
            if not token:
                break
        # The storage's own database holds its own runs alone, wherever they both were moved.
        is_own = self._state_key == OWN
        own = [found for found in by_id.values() if is_own or found.data.tags.get(STORAGE) == self.origin]
        own.sort(key=lambda found: bool(found.info.lifecycle_stage == LifecycleStage.ACTIVE))
        by_address = {found.data.tags[ROW]: found for found in own if ROW in found.data.tags}
        self.runs = {}
        for row_id in known.keys() | by_address.keys():
            run = known.get(row_id)
            found = (by_id.get(run.run_id) if run else None) or by_address.get(row_id)
            if found is None:
                continue  # deleted for good: a new run is made
            if run is None or run.run_id != found.info.run_id:
                run, self.is_changed = Run(found.info.run_id), True
            run.status, run.tags, run.params = found.info.status, dict(found.data.tags), dict(found.data.params)
            run.metrics = set(found.data.metrics)
            run.is_in_bin = found.info.lifecycle_stage == LifecycleStage.DELETED
            run.datasets = {(used.dataset.name, used.dataset.digest) for used in found.inputs.dataset_inputs}
            self.runs[row_id] = run
        self._is_listed = True

    def take_from_bin(self, run: Run) -> None:
        if run.is_in_bin:
            self.client.restore_run(run.run_id)
            run.is_in_bin = False

    def make_run(self, row_id: str, name: str, tags: dict[str, str], start_ms: int) -> Run:
        self._is_listed = False  # until it is known that the call came through: a lost answer leaves a run behind
        made = self.client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name)
        run = self.runs[row_id] = Run(made.info.run_id, tags=tags)
        self._is_listed = self.is_changed = True
        self.save("often")
        return run

    def say_restored(self) -> None:
        """Warns once of what MLflow had lost: what calls this ships it again."""
        if self._lost:
            lost, self._lost = ", ".join(self._lost), []
            log.warning("MLflow at %s had lost %s of the sweep %s: restored.", self.uri, lost, self.name)

    def sees_all(self, trials: Collection[str], candidate: Candidate | None) -> bool:
        """Whether a look at the database itself finds all that `Tracker.lacks` asks for. From any thread."""
        kept = self._read_kept()
        if not {SWEEP, *trials} <= kept.keys():
            return False
        runs, view = [kept[row_id].run_id for row_id in (SWEEP, *trials)], f"{VIEW}{self.make_view_key('all trials')}"
        tags = models.make_tags(candidate, self.origin) if candidate else None
        parent_id = kept[SWEEP].run_id
        return sees_all(
            find_database(self.uri), self.name, runs, parent_id, view=view, alias=models.CANDIDATE, tags=tags
        )

    def is_without(self, trials: Collection[str], candidate: Candidate | None) -> bool:
        """Whether MLflow itself lacks something that `Tracker.is_missing` asks for. It is noted, to be reported."""
        self.list_runs()
        wanted = {SWEEP, *trials}
        binned = sum(run.is_in_bin for row_id, run in self.runs.items() if row_id in wanted)
        ended = {a for a, run in self.runs.items() if run.status != "RUNNING" and not run.is_in_bin}
        if missing := len(wanted - ended):
            of_them = f" ({binned} of them in its bin)" if binned else ""
            self._lost.append(f"{missing} run{'s' if missing > 1 else ''}{of_them}")
        parent = self.runs.get(SWEEP)
        if parent and parent.artifacts and not self.client.list_artifacts(parent.run_id):
            self._lost.append("the files")
            for run in self.runs.values():
                run.lines, run.last, run.artifacts = 0, "", {}
            self.is_changed = True
        if f"{VIEW}{self.make_view_key('all trials')}" not in self._shared:
            self._lost.append("the comparison")
        here = self.client, self.experiment_id, self.name
        if candidate and not models.is_registered(*here, candidate, self.origin):
            self._lost.append("the registered model")
        return bool(self._lost)
