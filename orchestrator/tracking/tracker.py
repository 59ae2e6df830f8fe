"""What MLflow is told: one experiment a sweep, one parent run a sweep, one child run a trial.

The journal in the storage is the truth and MLflow a copy of it that can be made again at any time. `Tracker` takes
every call at once and makes it later, in order, on one thread of its own, so that a slow or dead server never holds
up training. Every call can be repeated without leaving anything twice (exact repeats of a point collapse in MLflow,
images and artifacts have names made of what they are of), so after a kill, a lost state file or a new server the same
command ships what is missing. Which run belongs to which trial, and how much of its journal is shipped, is kept in
`sweeps/<name>/mlflow.json`; the run's own tag `orchestrator.row` says it again. Where that count does not go with
the journal, or a command before this one was cut off, MLflow is asked which points it has: a journal that was restored
or continued at other times goes on in the same run, and no point of it is sent twice. One that says other values at
the same steps is of another training, and gets a run of its own.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from orchestrator.tracking import views
from orchestrator.tracking.catalogue import SWEEP, Catalogue
from orchestrator.tracking.line import CallLine
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.server import (
    check_writable,
    find_database,
    is_database,
    ready_database,
    say_unused,
    set_defaults,
)
from orchestrator.tracking.shipment import LoggedDataset, Opening, Shipment, Status, Value
from orchestrator.tracking.shipper import Shipper, read_clock_ms
from orchestrator.tracking.views import ComparisonView
from orchestrator.tracking.writer import Writer
from workers.config import Mistake
from workers.storage import Storage

log = logging.getLogger(__name__)

VIEWS = "views"  # among what waits to be shipped


class Tracker:
    """Everything a sweep tells MLflow. Methods return at once; a row of None is the sweep's own run."""

    def __init__(self, storage: Storage, name: str, uri: str | None = None, folder: str | None = None) -> None:
        """Raises Mistake where the URI cannot be used. Nothing is asked of MLflow yet but to get ready.

        The state is kept in `folder` of the storage, by default sweeps/<name>.
        """
        set_defaults()
        self._catalogue = Catalogue(storage, name, uri, folder)
        self.uri, self.storage, self.name = self._catalogue.uri, storage, name
        say_unused(self.uri)
        self._line = CallLine(self.uri, self._catalogue.ask)
        self._writer = Writer(self._catalogue, self._line)
        self._shipper = Shipper(self._catalogue, self._writer, self._line)
        self.last_steps = self._shipper.last_steps  # of each row, where its trial may go on beyond it
        self._waiting: set[str] = set()  # row_ids whose `ship` stands in line already
        self._is_connecting = False

    # What the sweep calls.

    def check(self, timeout_s: float = 60) -> None:
        """Raises Mistake where the server does not answer: to be called before anything costly starts."""
        if is_database(self.uri):
            check_writable(find_database(self.uri))
            ready_database(find_database(self.uri))
            return
        line = self._line
        self._begin()
        line.wait(lambda: bool(line.done or line.standing), timeout_s)
        if not line.done:
            why = line.failing or f"silent for {timeout_s:.0f} s"
            raise Mistake(
                (
                    f"tracking.uri={self.uri} cannot be used: {why}\n"
                    if line.standing
                    else f"No MLflow server answers at tracking.uri={self.uri} for {timeout_s:.0f} s: {why}\n"
                )
                + "Start one (mlflow server --host 127.0.0.1 --port 5000), correct the address, or leave tracking.uri "
                "null to record into the storage itself."
            )

    def is_missing(self, trials: Collection[str], candidate: Candidate | None, timeout_s: float = 60) -> bool:
        """Whether MLflow is without something that this sweep has shipped: its experiment, a run of it or of `trials`,
        the files, the comparison, or the registered model. What was put into MLflow's bin is taken out of it.

        What is missing is reported, and shipped again, when the sweep and its trials are opened. Raises Mistake where
        MLflow cannot be asked.
        """
        if is_database(self.uri):
            ready_database(find_database(self.uri))
            if self._catalogue.sees_all(trials, candidate):
                return False
            check_writable(find_database(self.uri))
        line, found = self._line, list[bool]()
        self._put("what is there", lambda: found.append(self._catalogue.is_without(trials, candidate)))
        since = time.monotonic()

        def is_settled() -> bool:
            fails = bool(line.failing) and time.monotonic() - since > timeout_s
            return bool(found or line.standing or line.refused or fails)

        line.wait(is_settled, max(60.0, timeout_s))  # what is slow, and does not fail, gets a minute
        if not found:
            why = "; ".join(line.refused) or line.failing or "no answer within a minute"
            raise Mistake(f"MLflow at {self.uri} was not asked whether it still has all of this ({why})")
        return found[0]

    def open_sweep(
        self,
        params: Mapping[str, Value],
        tags: Mapping[str, str],
        description: str = "",
        compare: ComparisonView | None = None,
    ) -> None:
        """Starts the parent run or continues it. `description` is markdown, shown on the experiment's page too."""
        self._shipper.compare, self._shipper.description = compare, description
        note = {"mlflow.note.content": description} if description else {}
        opening = Opening(row_id=SWEEP, name=self.name, params=params, tags={**tags, **note})
        self._put("opening the sweep", lambda: self._shipper.open(opening))
        self._put("describing the experiment", self._shipper.show)

    def show(self, compare: ComparisonView) -> None:
        """Writes the views of the comparison again where they have changed."""
        self._shipper.compare = compare
        self._put_once(VIEWS, "the comparison", self._shipper.show)

    def open_trial(
        self,
        digest: str,
        name: str,
        params: Mapping[str, Value],
        tags: Mapping[str, str],
        datasets: Sequence[LoggedDataset] = (),
        *,
        start_ms: int | None = None,
    ) -> None:
        """Starts the run of a trial or continues it, and ships what its journal holds. The sweep is opened first."""
        opening = Opening(row_id=digest, name=name, params=params, tags=tags, datasets=datasets, start_ms=start_ms)
        self._shipper.openings[digest] = opening
        self._put(f"opening trial {name}", lambda: self._shipper.open(opening))
        self.ship(digest)

    def ship(self, digest: str) -> None:
        """Sends the lines that the trial's journal has got since."""
        self._put_once(digest, f"the journal of trial {digest}", lambda: self._shipper.ship(digest))

    def log_metrics(
        self, digest: str | None, metrics: Mapping[str, float], step: int = 0, time_ms: int | None = None
    ) -> None:
        """Points that are in no journal, such as those of the evaluation. Given again, they are not logged again."""
        at = time_ms or read_clock_ms()
        self._put(
            f"metrics {', '.join(metrics)}",
            lambda: self._writer.log_metrics(self._catalogue.get_opened(digest or SWEEP), metrics, step, at),
        )

    def log_image(self, digest: str, name: str, path: str, step: int) -> None:
        """A PNG file of the storage, beside the images of the trial's journal; given again, it takes its own place."""
        entry = {"image": name, "path": path, "step": step, "time_ms": step}
        self._put(f"image {name}", lambda: self._writer.log_image(self._catalogue.get_opened(digest), entry))

    def log_artifact(self, digest: str | None, content: bytes | Path | Callable[[], bytes], path: str) -> None:
        """A file, given by its bytes or its local path, as the artifact `path` (folders by forward slashes).

        Where thousands may wait in line, by what makes the bytes when its turn comes.
        """

        def log_made() -> None:
            made = content() if callable(content) else content
            self._writer.log_artifact(self._catalogue.get_opened(digest or SWEEP), made, path)

        self._put(f"artifact {path}", log_made)

    def set_tags(self, digest: str, tags: Mapping[str, str]) -> None:
        """Tags of a trial's run that are known only later."""
        self._put(f"tags {', '.join(tags)}", lambda: self._writer.tag(self._catalogue.runs[digest], tags))

    def register(self, candidate: Candidate) -> None:
        """Makes a trial's checkpoint the candidate of the registered model of the sweep's name; see `models`."""
        self._put(f"the model of trial {candidate.trial}", lambda: self._shipper.register(candidate))

    def close_trial(
        self,
        digest: str,
        status: Status,
        note: str = "",
        end_ms: int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Ends the run after the rest of its journal; `note` is markdown, and `tags` are those known only now."""
        self.ship(digest)
        self._put(
            f"closing trial {digest}",
            lambda: self._writer.close(self._catalogue.get_opened(digest), status, note, end_ms, tags),
        )

    def close_sweep(self, status: Status, note: str = "") -> None:
        """Ends the parent run, and as KILLED every run of a trial that is still open, of this command or one before."""
        self._put("closing the sweep", lambda: self._shipper.close_sweep(status, note))

    def flush(self, timeout_s: float, while_it_goes: bool = False) -> Shipment:
        """Waits for the line to empty and says what is left. Calls go on being made as long as the process lives.

        It waits no longer than `timeout_s`, or `while_it_goes` no longer than that for any call to get through.
        """
        line = self._line
        wait = line.wait_while_it_goes if while_it_goes else line.wait_empty
        wait(timeout_s)
        if not len(line) and self._shipper.is_stale:
            self._put_once(VIEWS, "the comparison", self._shipper.show)
            wait(timeout_s)
        if not len(line):
            self._catalogue.save("now")
        left = Shipment(
            uri=self.uri,
            calls=len(line),
            points=self._shipper.count_unsent() if len(line) or line.refused else 0,
            failing=line.failing,
            standing=line.standing,
            refused=tuple(line.refused),
        )
        if not left.complete:
            log.info("%s", left)  # a warning has told why, and whoever asks tells the rest
        return left

    def find_link(self, timeout_s: float = 60) -> str:
        """Where a browser shows the trials side by side; the server's front page while the runs are not there yet."""
        base = "http://127.0.0.1:5000" if is_database(self.uri) else self.uri
        line = self._line
        self._begin()
        line.wait(lambda: self.is_open or bool(line.failing or line.refused), timeout_s)
        if not self.is_open:
            return f"{base}/#/experiments?workflowType=machine_learning"
        here, compare = self._catalogue, self._shipper.compare
        key = here.make_view_key(compare.title) if compare else ""
        return f"{base}/{views.address_page(here.experiment_id, key, here.runs[SWEEP].run_id)}"

    @property
    def is_open(self) -> bool:
        """Whether the sweep has its run, so that the link leads to it."""
        return self._catalogue.is_open(SWEEP)

    def find_chart_link(self, timeout_s: float = 60) -> str:
        """Where a browser shows the points of the parent run itself, a chart a metric; else as `find_link`."""
        front = self.find_link(timeout_s).partition("?")[0]
        run = self._catalogue.runs.get(SWEEP)
        return f"{front}/{run.run_id}/model-metrics?workflowType=machine_learning" if run and run.opened else front

    # How calls get in line.

    def _begin(self) -> None:
        """The connection is the first call in line. Importing MLflow for it takes seconds."""
        if not self._is_connecting:
            self._is_connecting = True
            self._line.put("the connection", self._catalogue.connect)

    def _put(self, what: str, call: Callable[[], object]) -> None:
        self._begin()

        def call_and_save() -> None:
            call()
            self._catalogue.save("now and then" if len(self._line) > 1 else "often")

        self._line.put(what, call_and_save)

    def _put_once(self, row_id: str, what: str, call: Callable[[], object]) -> None:
        """Puts the call in line unless one of that row waits there already."""
        if row_id in self._waiting:
            return
        self._waiting.add(row_id)

        def begin_and_call() -> None:
            self._waiting.discard(row_id)  # what is new from here on gets a call of its own
            call()

        self._put(what, begin_and_call)
