"""A sweep in progress: decide what is missing, have it made, record it, and say how it ended.

The decisions are `planning`'s, the work is done by `execution`; `standing` knows how the rows stand, and `telling`
tells of them. This module holds them together. It runs in the thread that called it.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from rich.console import Console

from orchestrator import cli, interrupts
from orchestrator.clusters import cost
from orchestrator.clusters.allocation import find_allocation
from orchestrator.clusters.cluster import Cluster, find_cluster_of_head
from orchestrator.command import Command
from orchestrator.execution import local_ray, session, trials
from orchestrator.execution.halt import Halt
from orchestrator.execution.loss import ClusterLost, repeat_where_lost
from orchestrator.experiment.expand import expand
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.origins import keep_copies
from orchestrator.output.terminal import show_messages
from orchestrator.planning.decide import Decision
from orchestrator.planning.search import HeardTrial, group_round_by_row, make_heard, suggest_round
from orchestrator.progress import RowsInProgress
from orchestrator.standing import Standing
from orchestrator.state.events import was_begun_by
from orchestrator.state.saved import (
    explain_opening,
    is_older,
    keep_asked,
    keep_sweep,
    keep_trial,
    read_asked,
    set_aside_older,
)
from orchestrator.telling import Telling
from workers.bundles import check_code, keep_bundle
from workers.config import DataConfig, Mistake
from workers.data.dataset import prepare
from workers.data.sources import Source
from workers.evaluation.features import check_spaces
from workers.layout import SHARES, SPEEDS, RowId, get_trial_of_row, name_sweep_folder, name_sweep_lock
from workers.locks import lock
from workers.storage import Storage

TO_SHIP_S = 30.0  # so long an interrupted command waits for MLflow: the next one ships what is left


def run(
    experiment: Experiment,
    variants: Mapping[RowId, Variant],
    sources: Mapping[DataConfig, Source],
    command: Command,
) -> int:
    """Makes what is missing of the rows `variants` and prints the result. Returns the exit status.

    Raises Mistake for what shows only here: storage, Ray or tracking server; ClusterLost where Ray was lost.
    """
    storage = Storage(command.storage)
    console = Console(width=None if Console().is_terminal else 200)
    with ExitStack() as opened:
        opened.enter_context(show_messages(console, command.quiet, command.verbose))
        opened.enter_context(interrupts.allow_interrupts())
        opened.enter_context(lock(storage, name_sweep_lock(experiment.name)))
        storage.check_writable()
        for folder in (name_sweep_folder(experiment.name), SPEEDS, SHARES):
            storage.remove_leftovers(folder)
        if is_older(storage, experiment.name):
            if not command.fresh:
                raise Mistake(explain_opening(experiment.name))
            set_aside_older(storage, experiment.name)
        sweep = Sweep(experiment, variants, sources, console, command)
        job = find_allocation()  # one that was put into the queue again has begun anew before
        if command.fresh and not (job and was_begun_by(storage, experiment.name, job.job)):
            sweep.standing.forget()
            sweep = Sweep(experiment, variants, sources, console, command)
        opened.enter_context(interrupts.allow_interrupts(at_once=sweep.telling.end_at_once))
        telling = sweep.telling
        try:
            repeat_where_lost(sweep.make, sweep.lose, may=command.ray_address is None)
        except KeyboardInterrupt:
            interrupts.begin_ending()
            telling.end("interrupted")
            if telling.started:
                telling.publish(to_ship_s=TO_SHIP_S)
            how = "Paused" if interrupts.is_asked_to_pause() else "Interrupted"
            console.print(f"\n{how}. The same command resumes.", markup=False)
            return cli.INTERRUPTED
        except ClusterLost as lost:
            telling.end("interrupted")
            telling.publish()
            raise ClusterLost(f"{lost}. The same command resumes.") from lost
        try:
            telling.end("ended")
            telling.publish()
        except KeyboardInterrupt:  # all is done; what MLflow lacks the same command ships
            interrupts.begin_ending()
            telling.conclude()
            console.print("\nInterrupted. The same command ships to MLflow what it lacks.", markup=False)
            return cli.INTERRUPTED
        telling.conclude()
        return cli.SOME_FAILED if sweep.standing.errors else cli.DONE


class Sweep:
    """The rows of an experiment on their way.

    Those of an adaptive search grow by a round as often as all that are there have ended.
    """

    def __init__(
        self,
        experiment: Experiment,
        variants: Mapping[RowId, Variant],
        sources: Mapping[DataConfig, Source],
        console: Console,
        command: Command,
    ) -> None:
        self.experiment, self.command, self.storage = experiment, command, Storage(command.storage)
        self.standing = Standing(experiment, dict(sources), self.storage, self.say)
        self.telling = Telling(self.standing, console, command.quiet, command.verbose)
        self.progress: RowsInProgress | None = None  # while there is a session of Ray
        self.planned, self.began = "", time.monotonic()
        before = read_asked(self.storage, experiment) if experiment.search.algorithm == "optuna" else []
        self.asked = before or list(expand(experiment))  # the variants, in order; some may be one and the same row
        self._add(group_round_by_row(experiment, before, self.standing.get_source)[0] if before else variants)

    def _add(self, variants: Mapping[RowId, Variant]) -> list[RowId]:
        """Takes in the rows that are not there yet. Returns their ids."""
        new = self.standing.add(variants)
        for row in new:
            self.telling.add(row)
        return new

    def say(self, text: str) -> None:
        self.telling.say(text)

    # Making what is missing.

    def make(self) -> None:
        """Makes what is missing, and of an adaptive search one round after the other, in one session of Ray."""
        try:
            with ExitStack() as opened:
                self._make(list(self.standing.variants), opened)
                while new := self._ask_next_round():
                    self._make(new, opened)
        except ClusterLost:
            raise
        except Mistake as mistake:
            self.telling.end("refused", why=str(mistake))
            raise
        if self.telling.started:
            planned = f", {self.planned} planned" if self.planned else ""
            self.say(f"time       {cost.format_duration(time.monotonic() - self.began)}{planned}")

    def _ask_next_round(self) -> list[RowId]:
        """The rows that an adaptive search asks for next; empty where it is at its end."""
        search = self.experiment.search
        if search.algorithm != "optuna" or len(self.asked) >= (search.samples or 0):
            return []
        rows = {_format_point(row.variant): row for row in self.standing.make_rows() if not row.variant.role}
        if all(row.state == "failed" for v in self.asked[-search.first :] if (row := rows.get(_format_point(v)))):
            self.say("search     ends here: every trial of the last round failed")
            return []

        def hear(variant: Variant) -> HeardTrial | None:
            row = rows.get(_format_point(variant))
            return make_heard(search, row.variant, row.state, row.metrics) if row else None

        new = suggest_round(self.experiment, self.asked, hear, self.standing.get_source)
        known = sum(hear(v) is not None for v in self.asked)
        self.say(
            f"search     asks for {len(new)} trials after {len(self.asked)} of {search.samples}, by what "
            f"{known} of them say"
            if new
            else f"search     ends after {len(self.asked)} of {search.samples} trials: the space has nothing new"
        )
        self.asked += new
        keep_asked(self.storage, self.experiment, self.asked)
        return self._add(group_round_by_row(self.experiment, self.asked, self.standing.get_source)[0])

    def _make(self, rows: list[RowId], opened: ExitStack) -> None:
        """Makes what is missing of the rows; brings up Ray in `opened` the first time it has to."""
        self.standing.mend_starts(rows)
        decisions = {row: self.standing.decide(row) for row in rows}
        self._tell_decisions(decisions)
        missing = [row for row, decision in decisions.items() if decision.action != "nothing"]
        found = self.standing.found
        stuck = {row: found[row].unread or self.standing.explain_stuck(row) for row in rows}
        self.standing.errors |= {row: why for row, why in stuck.items() if why}
        if not missing:
            self._keep(rows)
            return
        first = not self.telling.started
        for bundle in check_code(self.standing.get_trial(row) for row in rows):
            keep_bundle(self.storage, bundle)
        keep_copies(self.experiment, map(self.standing.get_trial, missing), self.storage)
        check_spaces(self.standing.get_trial(row).evaluation.fid for row in rows)
        address = self.command.ray_address
        if not address:
            session.check_compiler(self.standing.get_trial(row).training for row in missing)
        cluster = self.command.cluster or (find_cluster_of_head() if address else None)
        time_plan = self._time_plan(missing, cluster) if cluster or not address else None
        self.planned = (
            cost.format_duration(time_plan.wall_s) if time_plan and first else ""
        )  # of all rounds nobody knows
        if first:
            self.telling.record.tracker.check()
        for config in dict.fromkeys(self.standing.get_trial(row).data for row in rows):
            prepare(config)
        progress = self._bring_up(opened) if first else self.progress
        assert progress
        progress.training = {row for row in missing if decisions[row].action == "train"}
        to_train = progress.make_jobs(missing, cluster)
        trials.measure_sizes(to_train, cluster)
        if first:
            self.telling.record.open()  # not before all is known that a user may have to mend
        self._begin(decisions, first)
        for row in missing:
            if decisions[row].action == "evaluate":
                progress.evaluate(row)
        with interrupts.pausable():
            while to_train:
                to_train = trials.train(to_train, self.experiment.search, progress, cluster)
                progress.halt.end(is_left=bool(progress.training))
                to_train = progress.wait_for_others(to_train)
            while progress.evaluations:
                local_ray.check_room()
                progress.halt.end(is_left=False)
                progress.tick(wait_s=0.5)
            if progress.evaluations.late:
                progress.halt.leave()

    def _bring_up(self, opened: ExitStack) -> RowsInProgress:
        """Ray, as long as `opened` is; and who hears what it tells."""
        opened.enter_context(self.telling.display)
        hang_s = self.experiment.search.hang_s
        watchdog = opened.enter_context(session.open_session(self.command.ray_address, hang_s=hang_s))
        allocation = find_allocation() if self.command.ray_address else None
        halt = Halt(allocation.pauses_at, self.say, allocation.lead_s) if allocation else Halt(None, self.say)
        self.progress = RowsInProgress(self.standing, self.telling, watchdog, halt)
        opened.callback(self.progress.evaluations.forget)
        session.check_seen(self.storage)
        return self.progress

    def _tell_decisions(self, decisions: Mapping[RowId, Decision]) -> None:
        states = {row.digest: row.state for row in self.standing.make_rows()}
        for row, decision in decisions.items():
            line, nothing = self.telling.lines[row], decision.action == "nothing"
            line.step = max(self.standing.found[row].step, self.standing.count_shared_steps(row))
            line.state = states[row] if nothing else "waiting"
            self.telling.say_of(row, f"{decision.action:<10}  {decision.why}  {line.name}", detail=nothing)

    def _keep(self, rows: Iterable[RowId]) -> None:
        """Writes down what the sweep is, and the trials of these rows."""
        rows, standing = list(rows), self.standing
        keep_sweep(self.storage, self.experiment, standing.variants, standing.sources)
        standing.keep_checkpoints(rows)
        for trial in dict.fromkeys(map(get_trial_of_row, rows)):
            first = min(standing.sharing[trial], key=lambda row: bool(standing.variants[row].role))
            keep_trial(self.storage, trial, standing.get_trial(first))

    def _begin(self, decisions: Mapping[RowId, Decision], first: bool) -> None:
        """Writes down what is to be made, now that nothing stands against it: a refused command changes nothing."""
        self._keep(decisions)
        self.telling.started = True
        rows, slots = len(self.standing.variants), session.count_slots()
        if first:
            allocation = find_allocation()
            job = {"slurm_job": allocation.job} if allocation else {}
            self.telling.record_event("started", host=socket.gethostname(), pid=os.getpid(), trials=rows, **job)
        for row, decision in decisions.items():
            self.telling.record_event("decided", row, action=decision.action, why=decision.why)
        if first:
            self.telling.record_event("cluster", cpus=slots["cpus"], gpus=slots["gpus"])

    def _time_plan(self, missing: Iterable[RowId], cluster: Cluster | None) -> cost.Plan | None:
        """How long it takes if nothing of the `missing` rows is there; None where speeds are not known."""
        variants = {row: self.standing.variants[row] for row in missing}
        machines = cost.list_machines(variants, self.experiment.search, cluster) if cluster else []
        found = cost.make_plan(variants, self.standing.sources, self.storage, self.experiment.search, machines)
        if isinstance(found, cost.Unknown):
            return None
        self.say(
            f"time       about {cost.format_duration(found.wall_s)}, at the throughput measured by {found.said_by}"
        )
        return found

    def lose(self, why: str) -> None:
        """Ray was lost: what stands in the storage is read again, and all that is missing there is made."""
        self.say(why)
        self.telling.record_event("lost", why=why)
        self.progress, self.telling.started = None, False
        self.standing.errors.clear()
        self.standing.look_at_all()


def _format_point(variant: Variant) -> str:
    return json.dumps(variant.params, sort_keys=True)
