"""A sweep in progress: decide what is missing, have it made, record it, and say how it ended.

The decisions are `plan`'s, the work is done by `execution`, MLflow is told by `tracking`; this module holds them
together. It runs in the thread that called it.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from orchestrator import plan
from orchestrator.clusters import cost
from orchestrator.clusters.cluster import Cluster, cluster_of_the_head
from orchestrator.execution import evaluations, session, training
from orchestrator.experiment import Experiment, Variant, expand
from orchestrator.reports import archive, results
from orchestrator.reports.results import Row
from orchestrator.search import Told, next_round, rows_of, tell
from orchestrator.settings import write_yaml
from orchestrator.terminal import Display, Line, listening
from orchestrator.tracking.record import Record
from workers import checkpoint as checkpoints
from workers import tasks
from workers.blocks import Images, blocks, summary_path
from workers.config import DataConfig, Measurement, trained_by
from workers.data import Source, describe, prepare
from workers.features import check_spaces
from workers.speed import CORE, Spent
from workers.storage import Storage
from workers.training import stop_path

# Why a scheduler has stopped a trial, after its last `valid/nll_bpd`.
PRUNED = {
    "asha": "was not among the best of its rung",
    "median": "was, as all before it, above the median of what the others had on average until this step",
}


def run(
    experiment: Experiment,
    trials: Mapping[str, Variant],
    sources: Mapping[DataConfig, Source],
    storage_root: str,
    address: str | None,
    fresh: bool,
    quiet: bool,
    cluster: Cluster | None = None,
    verbose: bool = False,
) -> int:
    """Makes what is missing of `trials` and prints the result. Gives the exit status.

    Raises Mistake for what shows only here: storage, address or tracking server.
    """
    storage = Storage(storage_root)
    console = Console(width=None if Console().is_terminal else 200)
    with listening(console, quiet, verbose), storage.lock(f"sweeps/{experiment.name}/lock"):
        sweep = Sweep(experiment, trials, sources, storage, console, quiet, verbose)
        if fresh:
            sweep.forget()
            sweep = Sweep(experiment, trials, sources, storage, console, quiet, verbose)
        try:
            sweep.make(address, cluster)
        except KeyboardInterrupt:
            sweep.end("interrupted")
            sweep.publish()
            console.print("\nInterrupted. The same command resumes.", markup=False)
            return 128 + signal.SIGINT
        sweep.end("ended")
        sweep.publish()
        return sweep.conclude()


class Sweep:
    """The trials of an experiment on their way; it is what `training.train` tells its events to.

    Those of an adaptive search grow by a round as often as all that are there have ended.
    """

    def __init__(
        self,
        experiment: Experiment,
        trials: Mapping[str, Variant],
        sources: Mapping[DataConfig, Source],
        storage: Storage,
        console: Console,
        quiet: bool,
        verbose: bool = False,
    ) -> None:
        self.experiment, self.sources = experiment, dict(sources)
        self.storage, self.console = storage, console
        self.trials: dict[str, Variant] = {}
        self.folder = f"sweeps/{experiment.name}"
        self.sharing: dict[str, list[str]] = {}  # the rows that measure each trial
        self.scheduler = plan.scheduler_key(experiment.search.scheduler.model_dump(mode="json"))
        self.errors: dict[str, str] = {}
        self.found: dict[str, plan.Found] = {}
        self.lines: dict[str, Line] = {}
        self.display = Display(self.lines, console, quiet, verbose)
        self.events = archive.Events(storage, experiment.name)
        self.started, self.planned = False, ""
        self.evaluations = evaluations.Evaluations()
        self.jobs: dict[str, tasks.Job] = {}
        self.groups: dict[str, str] = {}  # the placement group of each data-parallel trial
        self.looked_at = 0.0
        self.record = Record(experiment, self.trials, self.sources, storage)
        self.told = False  # where the comparison is
        self.began, self.start_s = time.monotonic(), 0.0  # the latter until the first trial tells of itself
        before = archive.asked_before(storage, experiment) if experiment.search.algorithm == "optuna" else []
        self.asked = before or list(expand(experiment))  # the variants, in order; some may be one and the same trial
        self._add(rows_of(experiment, before, self._source)[0] if before else trials)

    def _add(self, trials: Mapping[str, Variant]) -> list[str]:
        """Takes in the trials that are not there yet. Gives their addresses."""
        new = [address for address in trials if address not in self.trials]
        for address in new:
            variant = self.trials[address] = trials[address]
            self.found[address] = self._look(address)
            sharing = self.sharing.setdefault(trained_by(address), [])
            sharing.append(address)
            name, training = Row(address, variant, self.found[address]).name, variant.trial.training
            self.lines[address] = Line(
                name, training.steps, training.batch_size, shares=len(sharing) > 1, params=results.short_params(variant)
            )
        return new

    def _source(self, config: DataConfig) -> Source:
        if config not in self.sources:
            self.sources[config] = describe(config)
        return self.sources[config]

    # What is there.

    def _look(self, address: str) -> plan.Found:
        """What the storage holds of a trial."""
        trial, folder = self.trials[address].trial, tasks.folder_of(address)
        status = self.storage.read_json(f"{folder}/status.json")
        newest = checkpoints.newest(self.storage, f"{folder}/checkpoints")
        images = Images.of(self._source(trial.data))
        m = Measurement.of(trial)
        path = summary_path(m, checkpoints.averaged(newest, m.evaluation.ema).digest, images) if newest else None
        summary = self.storage.read_sealed(path) if path else None
        return plan.Found(status, newest.digest if newest else None, summary)

    def rows(self) -> list[Row]:
        return [
            Row(address, v, self.found[address], self.errors.get(address, "")) for address, v in self.trials.items()
        ]

    def ranked(self) -> list[Row]:
        return results.ranked(self.rows(), self.experiment.search.metric, self.experiment.search.mode)

    def forget(self) -> None:
        """Removes what the storage holds of these trials and of the measurements of their checkpoints."""
        for address in self.found:
            newest = checkpoints.newest(self.storage, f"{tasks.folder_of(address)}/checkpoints")
            for model in checkpoints.models(newest) if newest else []:
                self.storage.delete(f"evaluations/{model.digest}")
            self.storage.delete(tasks.folder_of(address))
        self.storage.delete(f"{self.folder}/events.jsonl")
        archive.forget_asked(self.storage, self.experiment)

    # Making what is missing.

    def make(self, address: str | None, cluster: Cluster | None = None) -> None:
        """Makes what is missing, and of an adaptive search one round after the other, in one session of Ray."""
        with ExitStack() as opened:
            self._make(self.trials, address, cluster, opened)
            while new := self._next_round():
                self._make(new, address, cluster, opened)
        if self.started:
            planned = f", {self.planned} planned" if self.planned else ""
            self.display.say(f"time       {cost.duration(time.monotonic() - self.began)}{planned}")

    def _next_round(self) -> list[str]:
        """The addresses of the trials that an adaptive search asks for next; empty where it is at its end."""
        search = self.experiment.search
        if search.algorithm != "optuna" or len(self.asked) >= (search.samples or 0):
            return []
        rows = {_point(row.variant): row for row in self.rows()}
        if all(row.state == "failed" for v in self.asked[-search.first :] if (row := rows.get(_point(v)))):
            self.say("search     ends here: every trial of the last round failed")
            return []

        def hear(variant: Variant) -> Told | None:
            row = rows.get(_point(variant))
            return tell(search, row.variant, row.state, row.metrics) if row else None

        new = next_round(self.experiment, self.asked, hear, self._source)
        known = sum(hear(v) is not None for v in self.asked)
        self.say(
            f"search     asks for {len(new)} trials after {len(self.asked)} of {search.samples}, by what "
            f"{known} of them say"
            if new
            else f"search     ends after {len(self.asked)} of {search.samples} trials: the space has nothing new"
        )
        self.asked += new
        archive.keep_asked(self.storage, self.experiment, self.asked)
        return self._add(rows_of(self.experiment, self.asked, self._source)[0])

    def _make(self, addresses: Iterable[str], address: str | None, cluster: Cluster | None, opened: ExitStack) -> None:
        """Makes what is missing of the trials at `addresses`; brings up Ray in `opened` the first time it has to."""
        decisions = {a: plan.decide(self.found[a], self.scheduler) for a in addresses}
        states = {row.digest: row.state for row in self.rows()}
        for a in decisions:
            line = self.lines[a]
            line.step = int((self.found[a].status or {}).get("step", 0))
            line.state = "waiting" if decisions[a].action != "nothing" else states[a]
            text = f"{a[:8]}  {decisions[a].action:<10}  {decisions[a].why}  {line.name}"
            self.display.say(text, detail=decisions[a].action == "nothing")
        missing = {a for a, decision in decisions.items() if decision.action != "nothing"}
        archive.keep(self.storage, self.experiment, self.trials, self.sources)
        if not missing:
            return
        first, self.started = not self.started, True
        if first:
            self.events.add("started", host=socket.gethostname(), pid=os.getpid(), trials=len(self.trials))
        for a, decision in decisions.items():
            self.events.add("decided", a, action=decision.action, why=decision.why)
        check_spaces(self.trials[a].trial.evaluation.fid for a in decisions)
        cluster = cluster or (cluster_of_the_head() if address else None)
        time_plan = self._time_plan(missing, cluster) if cluster or not address else None
        self.planned = cost.duration(time_plan.wall_s) if time_plan and first else ""  # of all rounds nobody knows
        if first:
            self.record.tracker.check()
        for config in dict.fromkeys(self.trials[a].trial.data for a in decisions):
            prepare(config)
        if first:
            opened.enter_context(self.display)
            opened.enter_context(session.session(address))
            session.check_seen(self.storage)
            slots = session.slots()
            self.events.add("cluster", cpus=slots["cpus"], gpus=slots["gpus"])
        nodes = session.nodes_ever(cluster)
        for a in (a for a in decisions if a in missing):
            trial = self.trials[a].trial
            gpus = session.gpus_a_worker(trial.training, nodes)
            job = self.jobs[a] = tasks.make_job(self.storage, trained_by(a), trial, gpus)
            if a == self.sharing[trained_by(a)][0]:
                content = write_yaml(json.loads(job["trial"])).encode()
                self.storage.write(f"{tasks.folder_of(a)}/trial.yaml", content)
        train = [a for a in decisions if decisions[a].action == "train"]
        to_train = list({trained_by(a): self.jobs[a] for a in reversed(train)}.values())[::-1]
        training.sizes_of(to_train, cluster)
        if first:
            self.record.open()  # not before all is known that a user may have to mend
        for a in missing:
            if decisions[a].action == "evaluate":
                self._evaluate(a)
        for job in to_train:
            self.storage.delete(stop_path(tasks.folder_of(job["digest"])))
        if to_train:
            training.train(to_train, self.experiment.search, self, cluster)
        while self.evaluations:
            self.tick(wait_s=0.5)

    def _time_plan(self, missing: set[str], cluster: Cluster | None) -> cost.Plan | None:
        """How long it takes if nothing of the `missing` trials is there; None where speeds are not known."""
        trials = {a: v for a, v in self.trials.items() if a in missing}
        machines = cost.machines_for(trials, self.experiment.search, cluster) if cluster else []
        found = cost.planned(trials, self.sources, self.storage, self.experiment.search, machines)
        if isinstance(found, cost.Unknown):
            return None
        self.display.say(
            f"time       about {cost.duration(found.wall_s)}, at the throughput measured by {found.said_by}"
        )
        return found

    def say(self, text: str) -> None:
        self.display.say(text)

    def evaluating(self) -> bool:
        return bool(self.evaluations)

    # What the training tells of a trial goes to all rows that measure it, and is said of the first.

    def begins(self, address: str) -> None:
        row = self.sharing[address][0]
        training = self.trials[row].trial.training
        of_one = {"cpus": training.cpus, "gpus": self.jobs[row]["gpus"]}
        step = int((self.storage.read_json(f"{tasks.folder_of(address)}/status.json") or {}).get("step", 0))
        self.events.add("began", row, step=step, **{name: n * training.workers for name, n in of_one.items()})
        self.lines[row].state = "training"
        self.display.say(f"{address[:8]}  begins at step {step}", detail=True)

    def progress(self, address: str, result: dict[str, Any]) -> None:
        for row in self.sharing[address]:
            self._progress(row, result)

    def trained(self, address: str, result: dict[str, Any]) -> None:
        for row in self.sharing[address]:
            self._trained(row, result)

    def failed(self, address: str, why: str) -> None:
        for row in self.sharing[address]:
            self._failed(row, why)

    def _progress(self, address: str, result: dict[str, Any]) -> None:
        if result["state"] == "failed":
            return
        self.start_s = self.start_s or time.monotonic() - self.began
        group = result.get("placement_group", "")
        if not self.lines[address].shares and self.groups.setdefault(address, group) != group:
            self.groups[address] = group
            self._restarts(address, "a worker of its group died; all of them start")
        line = self.lines[address]
        line.state, line.step, line.images_per_s = "training", result["step"], result["images_per_s"]
        if result["state"] in ("running", "finished"):
            line.nll_bpd = result["valid/nll_bpd"]
        self.record.trial_went_on(address, line.name)
        if not line.shares:
            self.display.changed(address)

    def _trained(self, address: str, result: dict[str, Any]) -> None:
        line = self.lines[address]
        if result["state"] in ("running", "pruned"):  # the scheduler stopped it, or had it stop
            path = f"{tasks.folder_of(address)}/status.json"
            status = self.storage.read_json(path) or {}
            why = PRUNED[self.experiment.search.scheduler.kind]
            detail = f"pruned at step {line.step}: valid/nll_bpd {line.nll_bpd:.3f} {why}"
            self.storage.write_json(path, {**status, "state": "pruned", "scheduler": self.scheduler, "detail": detail})
        self.found[address] = self._look(address)
        self.errors.pop(address, None)  # of a row that shares the trial, and could not be made before
        status = self.found[address].status or {}
        self.events.add(
            "trained", address, state=self.found[address].state, step=line.step, why=status.get("detail", "")
        )
        if "spent" in status:
            self._learn(address, {status["hardware"]: {**status["spent"], "start": (1, self.start_s)}})
        if self.found[address].state == "finished":
            self._evaluate(address)
        else:
            line.state = self.found[address].state
            self.display.changed(address)
            self.display.say(f"{address[:8]}  {(self.found[address].status or {}).get('detail')}")
            self._record(address)

    def restarted(self, address: str, why: str) -> None:
        row = self.sharing[address][0]
        self.groups.pop(row, None)
        self._restarts(row, f"{why.rstrip('.')}; it starts")

    def _restarts(self, address: str, why: str) -> None:
        self.events.add(
            "restarted", address, step=self.lines[address].step, why=f"{why} again from its last checkpoint"
        )
        self.display.say(f"{address[:8]}  {why} again from its last checkpoint")

    def _failed(self, address: str, why: str, took: Mapping[str, Any] | None = None) -> None:
        self.errors[address] = why
        self.events.add("failed", address, why=why, **(took or {}))
        self.lines[address].state = "failed"
        self.found[address] = self._look(address)
        self.display.changed(address)
        self.display.say(f"{address[:8]}  failed: {why}")
        self._record(address)

    def tick(self, wait_s: float = 0) -> None:
        for address, why in self.evaluations.poll(wait_s):
            spents = self.evaluations.spent.pop(address, {})
            if why:
                self._failed(address, f"evaluation: {why}", _seconds(spents))
            else:
                self._measured(address, spents)
        for address, piece, why in self.evaluations.take_retried():
            self.events.add("retried", address, piece=piece, why=why)
            self.display.say(f"{address[:8]}  {piece}: {why}")
        if not self.told and self.record.tracker.is_open:
            self.told = True
            self.display.say(f"comparison  {self.record.tracker.link()}")
        self.events.flush_when_due()
        if self.display.due:
            for address, line in self.lines.items():
                line.blocks_left = self.evaluations.left(address)
            self.display.cluster = self._cluster()
            self.display.refresh()

    def _cluster(self) -> str:
        if time.monotonic() - self.looked_at < 2 and self.display.cluster:
            return self.display.cluster
        self.looked_at = time.monotonic()
        return session.use()

    def _evaluate(self, address: str) -> None:
        """Starts the blocks of a trained trial that are not there."""
        trial, line = self.trials[address].trial, self.lines[address]
        checkpoint = checkpoints.newest(self.storage, f"{tasks.folder_of(address)}/checkpoints")
        assert checkpoint
        m, images = Measurement.of(trial), Images.of(self.sources[trial.data])
        checkpoint = checkpoints.averaged(checkpoint, m.evaluation.ema)
        planned = blocks(m, checkpoint.digest, images)
        missing = plan.missing(planned, self.storage.list)
        line.state, line.blocks, line.blocks_left, line.step = "evaluating", len(planned), len(missing), line.steps
        order = tasks.make_order(self.storage, m, checkpoint, self.jobs[address]["gpus"])
        self.evaluations.submit(address, order, planned, missing)
        self.events.add("evaluating", address, blocks=len(planned), missing=len(missing))
        self.display.say(f"{address[:8]}  evaluates: {len(missing)} of {len(planned)} blocks are missing", detail=True)
        self.display.changed(address)

    def _learn(self, address: str, spents: Mapping[str, Spent]) -> None:
        """Keeps what work of the trial took, for the plans of later sweeps."""
        trial = self.trials[address].trial
        for hardware, spent in spents.items():
            cost.learn(self.storage, trial, self.sources[trial.data], hardware, spent, address[:8])

    def _measured(self, address: str, spents: Mapping[str, Spent]) -> None:
        trial = self.trials[address].trial
        source = self.sources[trial.data]
        self._learn(address, {h: cost.evaluation_spent(s, trial, source) for h, s in spents.items()})
        self.found[address] = self._look(address)
        self.events.add("measured", address, **_seconds(spents))
        self.lines[address].state = "done"
        self.display.changed(address)
        self._record(address)

    # Telling of it.

    def _record(self, address: str) -> None:
        rows = self.ranked()
        [row] = [row for row in rows if row.digest == address]
        self.record.trial_ended(row)
        self.record.stands(rows)

    def end(self, how: str) -> None:
        """Closes the journal of what happened, if this command did anything."""
        if self.started:
            self.events.add(how)
            self.events.flush()

    def publish(self) -> None:
        """Writes the results, and ships to MLflow what it does not have yet."""
        self.record.sweep_ended(self.ranked())

    def conclude(self) -> int:
        """Prints the result; gives the exit status."""
        rows = self.ranked()
        metric = self.experiment.search.metric
        self.console.print(results.table(rows, metric, self.console.width))
        if footnote := results.footnote(rows, metric):
            self.console.print(footnote, markup=False, highlight=False)
        for row in rows:
            if row.error:
                self.console.print(f"{row.digest[:8]} failed: {row.error}", markup=False, highlight=False)
        self.console.print(
            f"results     {self.storage.url(self.folder)}/results.parquet", soft_wrap=True, highlight=False
        )
        if self.storage.exists(f"{self.folder}/report.html"):
            self.console.print(
                f"report      {self.storage.url(self.folder)}/report.html", soft_wrap=True, highlight=False
            )
        self.console.print(f"comparison  {self.record.link}", soft_wrap=True, highlight=False)
        if self.record.left:
            self.console.print(self.record.left, soft_wrap=True, highlight=False, markup=False)
        return 1 if self.errors else 0


def _point(variant: Variant) -> str:
    return json.dumps(variant.params, sort_keys=True)


def _seconds(spents: Mapping[str, Spent]) -> dict[str, float]:
    """What the blocks of an evaluation used, in seconds of cores and of GPUs; `spents` is by hardware."""
    used = {"core_s": 0.0, "gpu_s": 0.0}
    for hardware, spent in spents.items():
        used["core_s" if hardware.endswith(CORE) else "gpu_s"] += sum(seconds for _, seconds in spent.values())
    return {kind: round(seconds, 3) for kind, seconds in used.items()}
