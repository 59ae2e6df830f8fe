"""What MLflow is told: one experiment a sweep, one parent run a sweep, one child run a trial.

The journal in the storage is the truth and MLflow a copy of it that can be made again at any time. `Tracker` takes
every call at once and makes it later, in order, on one thread of its own, so that a slow or dead server never holds
up training. Every call can be repeated without leaving anything twice (exact repeats of a point collapse in MLflow,
images and artifacts have names made of their address), so after a kill, a lost state file or a new server the same
command ships what is missing. Which run belongs to which trial, and how much of its journal is shipped, is kept in
`sweeps/<name>/mlflow.json`; the run's own tag `orchestrator.address` says it again.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.tracking import models, views
from orchestrator.tracking.line import Line
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.server import database_of, make_database, origin, resolve_uri, settle
from orchestrator.tracking.views import PARENT, Comparison
from workers.config import Mistake, trained_by
from workers.config import digest as digest_of
from workers.data import default_cache
from workers.storage import Storage

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Value = float | str | bool | None | Sequence[Any] | Mapping[str, Any]

BATCH = 100  # points a call
PARAM_LIMIT, TAG_LIMIT = 6000, 8000  # characters, beyond which MLflow cuts without a word
VIEWS = "views"  # among the addresses that wait to be shipped
SWEEP = "sweep"  # the address of the parent run; a trial's address is its digest
ADDRESS, STORAGE = "orchestrator.address", "orchestrator.storage"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The images a trial used. `shape` is that of one image (H, W, C), uint8; `profile` holds counts and levels."""

    name: str
    digest: str
    source: str
    shape: tuple[int, ...]
    profile: Mapping[str, Any] = field(default_factory=dict)
    context: Literal["training", "evaluation"] = "training"


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What `Tracker.flush` leaves: nothing if `complete`, else what to tell the user, in `str()`."""

    uri: str
    calls: int = 0
    points: int = 0
    failing: str = ""
    refused: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.calls and not self.refused

    def __str__(self) -> str:
        if self.complete:
            return f"MLflow at {self.uri} has everything."
        said = [f"MLflow at {self.uri} is without {text}" for text in self.refused]
        if self.calls:
            why = f"did not answer ({self.failing})" if self.failing else "is still at it"
            said.append(f"MLflow at {self.uri} {why}; {self.calls} calls wait.")
        return "\n".join(said) + (
            f"\n{self.points} points are safe in the journal; run the same command again to ship them."
        )


def param_text(value: Value) -> str:
    """Numbers as the UI's charts parse them (50, 0.0001), lists and mappings as JSON, null as `null`."""
    return value if isinstance(value, str) else json.dumps(value)


def _now_ms() -> int:
    return int(time.time() * 1000)


@dataclass
class _Run:
    """A run of MLflow. The first four are kept in the storage, the others come from MLflow when it is reopened."""

    run_id: str
    lines: int = 0  # of the journal, shipped
    head: str = ""  # digest of the journal's first line: another journal is another training
    artifacts: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: set[str] = field(default_factory=set)
    datasets: set[tuple[str, str]] = field(default_factory=set)
    images: set[int] = field(default_factory=set)  # the steps of its images
    opened: bool = False


class Tracker:
    """Everything a sweep tells MLflow. Methods return at once; an address of None is the sweep's own run."""

    def __init__(self, storage: Storage, name: str, uri: str | None = None, folder: str | None = None) -> None:
        """Raises Mistake where the URI cannot be used. Nothing is asked of MLflow yet but to get ready.

        The state is kept in `folder` of the storage, by default sweeps/<name>.
        """
        settle()
        self.uri, self._artifacts = resolve_uri(storage, uri)
        self.storage, self.name = storage, name
        self._state_path = f"{folder or f'sweeps/{name}'}/mlflow.json"
        self._state_key = "mlflow.db" if uri is None else self.uri  # a local storage may be moved, database and all
        self._origin = origin(storage)
        self._client: Any = None
        self._experiment_id = ""
        self._runs: dict[str, _Run] = {}
        self._listed = self._changed = False
        self._saved_at = 0.0
        self._compare: Comparison | None = None
        self._description = ""
        self._shown: dict[str, str] = {}  # tags of the experiment, as they were written last
        self._waiting: set[str] = set()  # addresses whose `ship` stands in line already
        self._line = Line(self._ask)
        self._put("the connection", self._connect)

    # What the sweep calls.

    def check(self, timeout_s: float = 60) -> None:
        """Raises Mistake where the server does not answer: to be called before anything costly starts."""
        if self.uri.startswith("sqlite:"):
            folder = database_of(self.uri).parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise Mistake(f"MLflow's database {self.uri} cannot be written: {error}") from error
            return
        line = self._line
        line.wait(lambda: bool(line.done or line.failing), timeout_s)
        if not line.done:
            raise Mistake(
                f"No MLflow server answers at tracking.uri={self.uri}: "
                f"{line.failing or f'silent for {timeout_s:.0f} s'}\n"
                "Start one (mlflow server --host 127.0.0.1 --port 5000), correct the address, or leave tracking.uri "
                "null to record into the storage itself."
            )

    def open_sweep(
        self,
        params: Mapping[str, Value],
        tags: Mapping[str, str],
        description: str = "",
        compare: Comparison | None = None,
    ) -> None:
        """Starts the parent run or continues it. `description` is markdown, shown on the experiment's page too."""
        self._compare, self._description = compare, description
        note = {"mlflow.note.content": description} if description else {}
        self._put("opening the sweep", lambda: self._open(SWEEP, self.name, params, {**tags, **note}, (), None))
        self._put("describing the experiment", self._show)

    def show(self, compare: Comparison) -> None:
        """Writes the views of the comparison again where they have changed."""
        self._compare = compare
        if VIEWS not in self._waiting:
            self._waiting.add(VIEWS)
            self._put("the comparison", self._show)

    def open_trial(
        self,
        digest: str,
        name: str,
        params: Mapping[str, Value],
        tags: Mapping[str, str],
        datasets: Sequence[Dataset] = (),
        start_ms: int | None = None,
    ) -> None:
        """Starts the run of a trial or continues it, and ships what its journal holds. The sweep is opened first."""
        self._put(f"opening trial {name}", lambda: self._open(digest, name, params, tags, datasets, start_ms))
        self.ship(digest)

    def ship(self, digest: str) -> None:
        """Sends the lines that the trial's journal has got since."""
        if digest not in self._waiting:
            self._waiting.add(digest)
            self._put(f"the journal of trial {digest}", lambda: self._ship(digest))

    def log_metrics(
        self, digest: str | None, metrics: Mapping[str, float], step: int = 0, time_ms: int | None = None
    ) -> None:
        """Points that are in no journal, such as those of the evaluation. Given again, they are not logged again."""
        at = time_ms or _now_ms()
        self._put(f"metrics {', '.join(metrics)}", lambda: self._log_metrics(digest or SWEEP, metrics, step, at))

    def log_image(self, digest: str, name: str, path: str, step: int) -> None:
        """A PNG file of the storage, beside the images of the trial's journal; given again, it takes its own place."""
        entry = {"image": name, "path": path, "step": step, "time_ms": step}
        self._put(f"image {name}", lambda: self._log_image(self._opened(digest), entry))

    def log_artifact(self, digest: str | None, content: bytes | Path, path: str) -> None:
        """A file, given by its bytes or its local path, as the artifact `path` (folders by forward slashes)."""
        self._put(f"artifact {path}", lambda: self._log_artifact(digest or SWEEP, content, path))

    def set_tags(self, digest: str, tags: Mapping[str, str]) -> None:
        """Tags of a trial's run that are known only later."""
        self._put(f"tags {', '.join(tags)}", lambda: self._tag(digest, tags))

    def register(self, candidate: Candidate) -> None:
        """Makes a trial's checkpoint the candidate of the registered model of the sweep's name; see `models`."""
        self._put(f"the model of trial {candidate.trial}", lambda: self._register(candidate))

    def close_trial(self, digest: str, status: Status, note: str = "", end_ms: int | None = None) -> None:
        """Ends the run after the rest of its journal; `note` is markdown."""
        self.ship(digest)
        self._put(f"closing trial {digest}", lambda: self._close(digest, status, note, end_ms))

    def close_sweep(self, status: Status, note: str = "") -> None:
        """Ends the parent run, and as KILLED every run of a trial that is still open, of this command or one before."""
        self._put("closing the sweep", lambda: self._close_sweep(status, note))

    def flush(self, timeout_s: float) -> Shipment:
        """Waits for the line to empty and says what is left. Calls go on being made as long as the process lives."""
        line = self._line
        line.wait(lambda: not len(line), timeout_s)
        points = 0
        if len(line) or line.refused:
            for address, run in list(self._runs.items()):
                lines = self._journal(address) if run.opened and address != SWEEP else []
                points += sum(len(json.loads(text).get("metrics", ())) or 1 for text in lines[run.lines :])
        left = Shipment(uri=self.uri, calls=len(line), points=points, failing=line.failing, refused=tuple(line.refused))
        if not left.complete:
            log.warning("%s", left)
        return left

    def link(self, timeout_s: float = 60) -> str:
        """Where a browser shows the trials side by side; the server's front page while the runs are not there yet."""
        base = "http://127.0.0.1:5000" if self.uri.startswith("sqlite:") else self.uri
        line = self._line
        line.wait(lambda: self.is_open or bool(line.failing or line.refused), timeout_s)
        if not self.is_open:
            return f"{base}/#/experiments?workflowType=machine_learning"
        key = self._view_key("all trials") if self._compare else ""
        return f"{base}/{views.page(self._experiment_id, key, self._runs[SWEEP].run_id)}"

    @property
    def is_open(self) -> bool:
        """Whether the sweep has its run, so that the link leads to it."""
        return self._is_open(SWEEP)

    def chart_link(self, timeout_s: float = 60) -> str:
        """Where a browser shows the points of the parent run itself, a chart a metric; else as `link`."""
        front = self.link(timeout_s).partition("?")[0]
        run = self._runs.get(SWEEP)
        return f"{front}/{run.run_id}/model-metrics?workflowType=machine_learning" if run and run.opened else front

    def _is_open(self, address: str) -> bool:
        return address in self._runs and self._runs[address].opened

    # What the thread does. Each may be cut off anywhere and made again.

    def _put(self, what: str, call: Callable[[], object]) -> None:
        def call_and_save() -> None:
            call()
            self._save()

        self._line.put(what, call_and_save)

    def _save(self, now: bool = False) -> None:
        """Writes the map of runs, at most once a second while calls wait: what it lacks is sent again, to no harm."""
        if self._changed and (now or len(self._line) <= 1 or time.monotonic() - self._saved_at > 1):
            state = self.storage.read_json(self._state_path) or {}
            state[self._state_key] = {
                address: {"run_id": r.run_id, "lines": r.lines, "head": r.head, "artifacts": r.artifacts}
                for address, r in self._runs.items()
            }
            self.storage.write_json(self._state_path, state)
            self._changed, self._saved_at = False, time.monotonic()

    def _ask(self) -> None:
        """One cheap request without repeats; raises where nobody answers, where it is no MLflow, or on a refusal."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        if not self.uri.startswith("sqlite:"):
            host, endpoint = get_default_host_creds(self.uri), "/api/2.0/mlflow/experiments/search"
            once = {"max_retries": 0, "timeout": 5, "raise_on_status": False}
            verify_rest_response(http_request(host, endpoint, "POST", json={"max_results": 1}, **once), endpoint)

    def _connect(self) -> None:
        """Imports MLflow (seconds), opens the database or finds the server, and finds or makes the experiment."""
        from mlflow import MlflowClient

        for noisy, level in (("mlflow", logging.WARNING), ("urllib3.connectionpool", logging.ERROR)):
            logging.getLogger(noisy).setLevel(level)
        self._ask()
        if self.uri.startswith("sqlite:"):
            make_database(database_of(self.uri), default_cache())
        self._client = MlflowClient(tracking_uri=self.uri)
        experiment = self._client.get_experiment_by_name(self.name)
        if experiment is None:
            self._experiment_id = self._client.create_experiment(self.name, self._artifacts)
            return
        self._experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            log.warning("The experiment %s was deleted in MLflow: it is restored, its name being taken.", self.name)
            self._client.restore_experiment(self._experiment_id)

    def _list(self) -> None:
        """Reads what MLflow has of this sweep: runs by the ids kept in the storage, else by their own address."""
        kept = (self.storage.read_json(self._state_path) or {}).get(self._state_key, {})
        known = {address: _Run(**entry) for address, entry in kept.items()} | self._runs
        by_id: dict[str, Any] = {}
        token = None
        while page := self._client.search_runs([self._experiment_id], max_results=1000, page_token=token):
            by_id |= {found.info.run_id: found for found in page}
            token = page.token
            if not token:
                break
        own = (found for found in by_id.values() if found.data.tags.get(STORAGE) == self._origin)
        by_address = {found.data.tags[ADDRESS]: found for found in own if ADDRESS in found.data.tags}
        self._runs = {}
        for address in known.keys() | by_address.keys():
            run = known.get(address)
            found = (by_id.get(run.run_id) if run else None) or by_address.get(address)
            if found is None:
                continue  # deleted in MLflow: a new run is made
            if run is None or run.run_id != found.info.run_id:
                run = _Run(found.info.run_id)
            run.status, run.tags, run.params = found.info.status, dict(found.data.tags), dict(found.data.params)
            run.metrics = set(found.data.metrics)
            run.datasets = {(used.dataset.name, used.dataset.digest) for used in found.inputs.dataset_inputs}
            self._runs[address] = run
        self._listed = True

    def _open(
        self,
        address: str,
        name: str,
        params: Mapping[str, Value],
        tags: Mapping[str, str],
        datasets: Sequence[Dataset],
        start_ms: int | None,
    ) -> None:
        from mlflow.entities import Param

        if not self._listed:
            self._list()
        lines = [] if address == SWEEP else self._journal(address)
        head = digest_of(lines[0]) if lines else ""
        run = self._runs.get(address)
        if run and (len(lines) < run.lines or (run.head and run.head != head)):
            self._set_aside(address, run)
            run = None
        own = {ADDRESS: address, STORAGE: self._origin}
        if address != SWEEP:
            own[PARENT] = self._runs[SWEEP].run_id
        if run is None:
            self._listed = False  # until it is known that the call came through: a lost answer leaves a run behind
            start = start_ms or (json.loads(lines[0])["time_ms"] if lines else _now_ms())
            made = self._client.create_run(self._experiment_id, start_time=start, tags=own, run_name=name)
            run = self._runs[address] = _Run(made.info.run_id, tags=own)
            self._listed = True
            self._changed = True
            self._save(now=True)
        run.opened = True
        if address != SWEEP and run.status == "RUNNING":
            self._resume(self._runs[SWEEP])
        wanted = {key: self._fitted(address, key, param_text(value), PARAM_LIMIT) for key, value in params.items()}
        for key in wanted.keys() & run.params.keys():
            if wanted[key] != run.params[key]:  # a param cannot be changed once it is logged
                log.warning("%s: MLflow keeps %s=%s; it is now %s", name, key, run.params[key], wanted[key])
                tags = {**tags, f"changed.{key}": wanted[key]}
        new = [Param(key, text) for key, text in wanted.items() if key not in run.params]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(run.run_id, params=new[start : start + BATCH])
        run.params = wanted | run.params
        self._tag(address, {**own, **tags})
        for used in datasets:
            self._log_input(run, used)

    def _set_aside(self, address: str, run: _Run) -> None:
        """The journal was started anew (--fresh): the old run stays in MLflow, outside of the sweep's tree."""
        log.warning("Trial %s was trained anew: its run %s is kept as superseded, a new one made.", address, run.run_id)
        if run.status == "RUNNING":
            self._client.set_terminated(run.run_id, "KILLED")
        self._client.set_tag(run.run_id, "superseded", "true")
        for key in (PARENT, ADDRESS):  # the address last: until it is gone, this is done again
            if key in run.tags:
                self._client.delete_tag(run.run_id, key)
                del run.tags[key]
        del self._runs[address]

    def _opened(self, address: str) -> _Run:
        if not self._is_open(address):
            raise RuntimeError(f"{address} has no run, its opening was refused")
        return self._runs[address]

    def _resume(self, run: _Run) -> None:
        if run.status != "RUNNING":
            self._client.update_run(run.run_id, status="RUNNING")
            run.status = "RUNNING"

    def _fitted(self, address: str, key: str, text: str, limit: int) -> str:
        """`text`, or where MLflow would cut it without a word: its beginning, and the whole of it as an artifact."""
        if len(text) <= limit:
            return text
        path = f"long/{key}.txt"
        self._log_artifact(address, text.encode(), path)
        return f"{text[: limit - 500 if limit == TAG_LIMIT else 100]} ... (the whole: artifact {path})"

    def _tag(self, address: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        run = self._runs[address]
        texts = {key: self._fitted(address, key, text, TAG_LIMIT) for key, text in tags.items()}
        new = [RunTag(key, text) for key, text in texts.items() if run.tags.get(key) != text]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(run.run_id, tags=new[start : start + BATCH])
        run.tags |= texts

    def _log_input(self, run: _Run, used: Dataset) -> None:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag

        digest = used.digest[:36]  # the longest that MLflow takes
        if (used.name, digest) in run.datasets:
            return
        images = {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, *used.shape]}}
        dataset = MlflowDataset(
            name=used.name,
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": used.source}),
            schema=json.dumps({"mlflow_tensorspec": {"features": json.dumps([images]), "targets": None}}),
            profile=json.dumps(dict(used.profile)),
        )
        self._client.log_inputs(run.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", used.context)])])
        run.datasets.add((used.name, digest))

    def _view_key(self, title: str) -> str:
        """Of the view of that title; the same for ever, so that a link that was given out leads to what is there."""
        return digest_of([self._origin, self.name, title])

    def _show(self) -> None:
        """Writes the experiment's note and the views, those that have changed since."""
        self._waiting.discard(VIEWS)
        note = [self._description] if self._description else []
        if self._compare:
            trials = {address: run for address, run in self._runs.items() if address != SWEEP}
            going = [run.images for run in trials.values() if run.status in ("RUNNING", "FINISHED")]
            best = trials.get(self._compare.best)
            parent_id, best_id = self._runs[SWEEP].run_id, best.run_id if best else ""
            links = []
            for view in views.views(self._compare, parent_id, views.common_step(going), best_id):
                key = self._view_key(view.title)
                text = json.dumps(view.state)
                if self._shown.get(key) != text:
                    tag = views.tag(f"{self.name}: {view.title}", view.state, _now_ms())
                    self._client.set_experiment_tag(self._experiment_id, f"mlflow.sharedViewState.{key}", tag)
                    self._shown[key] = text
                links.append(f"[{view.title}]({views.page(self._experiment_id, key)})")
            note.append(f"Compare {', '.join(links)}.")
        text = "\n\n".join(note)[:TAG_LIMIT]
        if note and self._shown.get("note") != text:
            self._client.set_experiment_tag(self._experiment_id, "mlflow.note.content", text)
            self._shown["note"] = text

    def _register(self, candidate: Candidate) -> None:
        run = self._opened(candidate.trial)
        models.register(self._client, self._experiment_id, self.name, run.run_id, candidate, self._origin)

    def _journal(self, digest: str) -> list[str]:
        try:
            return self.storage.read(f"trials/{trained_by(digest)}/journal.jsonl").decode().splitlines()
        except FileNotFoundError:
            return []

    def _ship(self, digest: str) -> None:
        from mlflow.entities import Metric

        self._waiting.discard(digest)  # a line written from here on gets a call of its own
        run, lines = self._opened(digest), self._journal(digest)
        images = {json.loads(line)["step"] for line in lines if '"image"' in line}
        if len(lines) <= run.lines:
            run.images = images
            return
        self._resume(run)
        self._resume(self._runs[SWEEP])
        run.head = digest_of(lines[0])
        points: list[Any] = []
        for number, line in enumerate(lines[run.lines :], start=run.lines + 1):
            entry = json.loads(line)
            finite = self._finite(digest, entry.get("metrics", {}), entry["step"])
            points += [Metric(key, value, entry["time_ms"], entry["step"]) for key, value in finite.items()]
            if "image" in entry:
                self._log_image(run, entry)
            if len(points) >= BATCH or number == len(lines):
                self._client.log_batch(run.run_id, metrics=points)
                points = []
                run.lines, self._changed = number, True
                self._save()
        if run.images != images:
            run.images = images
            if self._compare:  # the step that all trials have images of may be another now
                self._show()

    def _finite(self, address: str, metrics: Mapping[str, Any], step: int) -> dict[str, float]:
        """MLflow would turn infinity into 1.8e308: what is not finite becomes a tag, the first time it happens."""
        values = {key: math.nan if value is None else float(value) for key, value in metrics.items()}
        odd = {
            f"nonfinite.{key}": f"{value} at step {step}" for key, value in values.items() if not math.isfinite(value)
        }
        self._tag(address, {key: text for key, text in odd.items() if key not in self._runs[address].tags})
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def _log_image(self, run: _Run, entry: Mapping[str, Any]) -> None:
        """As MlflowClient.log_image names its files, but by the image's address: a repeat writes over itself."""
        from io import BytesIO

        from mlflow.tracking.multimedia import compress_image_size
        from PIL import Image

        try:
            png = self.storage.read(entry["path"])
        except FileNotFoundError:  # told, and no reason to hold back the points after it
            self._line.refuse(f"image {entry['path']}: no such file in {self.storage.url()}")
            return
        key = re.sub(r"[^\w\-. ]", "~", entry["image"], flags=re.ASCII)
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{run.run_id}/{entry['image']}/{entry['step']}")
        stem = f"images/{key}+step+{entry['step']}+timestamp+{entry['time_ms']}+{unique}"
        small = BytesIO()
        compress_image_size(Image.open(BytesIO(png))).save(small, format="WEBP")
        self._upload(run, png, f"{stem}.png")
        self._upload(run, small.getvalue(), f"{stem}+compressed.webp")
        if "mlflow.loggedImages" not in run.tags:
            self._client.set_tag(run.run_id, "mlflow.loggedImages", "True")
            run.tags["mlflow.loggedImages"] = "True"

    def _upload(self, run: _Run, content: bytes | Path, path: str) -> None:
        folder, _, file = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary, file)
            if isinstance(content, bytes):
                local.write_bytes(content)
            else:
                shutil.copyfile(content, local)
            self._client.log_artifact(run.run_id, str(local), folder or None)

    def _log_metrics(self, address: str, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        run = self._opened(address)
        finite = self._finite(address, metrics, step)
        logged = {
            (point.key, point.step, point.value)
            for key in finite.keys() & run.metrics
            for point in self._client.get_metric_history(run.run_id, key)
        }
        new = [Metric(key, value, time_ms, step) for key, value in finite.items() if (key, step, value) not in logged]
        if new:
            self._client.log_batch(run.run_id, metrics=new)

    def _log_artifact(self, address: str, content: bytes | Path, path: str) -> None:
        run = self._opened(address)
        mark = hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()[:16]
        if run.artifacts.get(path) != mark:
            self._upload(run, content, path)
            run.artifacts[path], self._changed = mark, True

    def _close(self, address: str, status: Status, note: str, end_ms: int | None) -> None:
        run = self._opened(address)
        if note:
            self._tag(address, {"mlflow.note.content": note})
        if run.status != status:
            self._client.set_terminated(run.run_id, status, end_ms)
            run.status = status

    def _close_sweep(self, status: Status, note: str) -> None:
        for address, run in self._runs.items():
            if address != SWEEP and run.status == "RUNNING":
                log.warning("Trial %s was still open in MLflow: its run ends as KILLED.", address)
                run.opened = True
                self._close(address, "KILLED", "", None)
        self._close(SWEEP, status, note, None)
