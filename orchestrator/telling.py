"""What a sweep tells while it works: lines in the terminal, events in the storage, runs in MLflow."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from orchestrator.execution import session
from orchestrator.output.speed_table import list_closing_lines
from orchestrator.output.table import make_footnote, make_table
from orchestrator.output.terminal import Display, Line
from orchestrator.standing import Standing
from orchestrator.state.events import EventLog, add_evaluation_seconds, sum_evaluation_seconds
from orchestrator.state.rows import list_asked, shorten_params
from orchestrator.tracking.runs import SweepRuns
from orchestrator.tracking.server import describe_server
from workers.layout import RowId, get_trial_of_row, name_sweep_file
from workers.speed import CORE, Spent

TO_CLOSE_S = 5.0  # for MLflow, where a command ends at once
STANDS_PAUSE = 20  # so many times as long as telling how the trials stand took is the pause after it
LOOK_S = 2.0  # at how busy the cluster is


class Telling:
    """Tells of the rows of a sweep. Nothing is written down before `started`: a refused command changes nothing."""

    def __init__(self, standing: Standing, console: Console, quiet: bool, verbose: bool) -> None:
        self.standing, self.console, self.storage = standing, console, standing.storage
        self.lines: dict[RowId, Line] = {}
        self.display = Display(self.lines, console, quiet, verbose)
        self.events = EventLog(self.storage, standing.experiment.name)
        standing.evaluation_s = sum_evaluation_seconds(self.events.events)
        self.record = SweepRuns(standing.experiment, standing.variants, standing.sources, self.storage)
        self.started, self._looked_at = False, 0.0
        self._linked = False  # whether the comparison's link was printed
        self._stale, self._stands_at = (
            False,
            0.0,
        )  # whether MLflow shows how trials stood before, and when it hears anew

    def add(self, row: RowId) -> None:
        variant = self.standing.variants[row]
        training = variant.trial.training
        self.lines[row] = Line(
            self.standing.make_row(row).name,
            training.steps,
            training.batch_size,
            shares=row != self.standing.find_furthest(get_trial_of_row(row)),
            params=shorten_params(variant),
        )

    def say(self, text: str, detail: bool = False) -> None:
        self.display.say(text, detail=detail)

    def say_of(self, row: str, text: str, detail: bool = False) -> None:
        """A line about a row or its trial."""
        self.display.say(f"{row[:8]}  {text}", detail=detail)

    def record_event(self, name: str, row: str = "", **what: Any) -> None:
        self.events.add(name, row, **what)
        add_evaluation_seconds(self.standing.evaluation_s, {"trial": row, **what})

    def end_row(self, row: RowId) -> None:
        """The row is done, or will not be."""
        self.display.show_change(row)
        self.record.end_trial(self.standing.make_row(row))
        self._stale = True
        self._tell_standing()

    def refresh(self, blocks_left: Mapping[RowId, int]) -> None:
        """What is due from time to time."""
        if not self._linked and self.record.tracker.is_open:
            self._linked = True
            self.say(f"comparison  {self.record.tracker.find_link()}")
        self.events.flush_when_due()
        self._tell_standing()
        if self.display.due:
            for row, left in blocks_left.items():
                self.lines[row].blocks_left = left
            if time.monotonic() - self._looked_at >= LOOK_S or not self.display.cluster:
                self._looked_at, self.display.cluster = time.monotonic(), session.describe_use()
            self.display.refresh()

    def _tell_standing(self) -> None:
        """Tells how all trials stand, which takes the longer the more there are: of thousands not at each that ends."""
        if self._stale and (now := time.monotonic()) > self._stands_at:
            self.record.show_standing(self.standing.rank_rows())
            self._stale, self._stands_at = False, time.monotonic() + STANDS_PAUSE * (time.monotonic() - now)

    def end(self, how: str, **what: str) -> None:
        """Closes the journal of what happened, if this command did anything."""
        if self.started:
            self.events.add(how, **what)
            self.events.flush()

    def end_at_once(self) -> None:
        """What is done even where the process ends in the middle of its work."""
        self.end("interrupted")
        if self.record.tracker.is_open:
            self.record.tracker.close_sweep("KILLED")
            self.record.tracker.flush(TO_CLOSE_S)

    def publish(self, to_ship_s: float | None = None) -> None:
        """Writes the results, and ships to MLflow what it does not have yet; `to_ship_s` bounds how long."""
        for row, line in self.lines.items():
            if line.state == "training":  # cut off: how far it came is known to its own files alone
                self.standing.look(row)
        self.record.end_sweep(self.standing.rank_rows(), to_ship_s)

    def conclude(self) -> None:
        """Prints the result."""
        every, metric = self.standing.rank_rows(), self.standing.experiment.search.metric
        rows = list_asked(every)
        self.console.print(make_table(rows, metric, self.console.width))
        if footnote := make_footnote(rows, metric):
            self.console.print(footnote, markup=False, highlight=False)
        for line in list_closing_lines(every):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        for row in every:
            if row.error:
                self.console.print(f"{row.digest[:8]} failed: {row.error}", markup=False, highlight=False)
        for name, file in (("results", "results.parquet"), ("report", "report.html")):
            path = name_sweep_file(self.standing.experiment.name, file)
            if file == "results.parquet" or self.storage.exists(path):
                self.console.print(f"{name:<10}  {self.storage.find_url(path)}", soft_wrap=True, highlight=False)
        self.console.print(f"comparison  {self.record.link}", soft_wrap=True, highlight=False)
        if server := describe_server(self.record.tracker.uri):
            self.console.print(f"shown by    {server}", soft_wrap=True, highlight=False, markup=False)
        if self.record.left:
            self.console.print(self.record.left, soft_wrap=True, highlight=False, markup=False)


def sum_seconds_used(spents: Mapping[str, Spent]) -> dict[str, Any]:
    """What the blocks of an evaluation used, in seconds of cores and of GPUs, and of both by kind of work; `spents` is
    by hardware. Features of real images are features."""
    used, kinds = {"core_s": 0.0, "gpu_s": 0.0}, dict[str, float]()
    for hardware, spent in spents.items():
        used["core_s" if hardware.endswith(CORE) else "gpu_s"] += sum(seconds for _, seconds in spent.values())
        for name, (_, seconds) in spent.items():
            kind = "features" if name in ("reference", "held_out") else name
            kinds[kind] = kinds.get(kind, 0.0) + seconds
    by_kind = {kind: round(seconds, 3) for kind, seconds in kinds.items()}
    return {**{unit: round(seconds, 3) for unit, seconds in used.items()}, "seconds": by_kind}
