"""Rows in progress: what Ray tells of trials and evaluations, and what follows from it for the rows of a sweep.

`RowsInProgress` is what `execution.trials` tells its events of trials to; each goes to the rows that wait for it.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.clusters import cost
from orchestrator.clusters.cluster import Cluster
from orchestrator.execution import local_ray, session
from orchestrator.execution.evaluations import Evaluations
from orchestrator.execution.halt import Halt
from orchestrator.execution.hangs import Watchdog
from orchestrator.planning.decide import Turn, decide, decide_turn, find_missing_blocks
from orchestrator.planning.place import Node
from orchestrator.standing import Standing, explain_absent
from orchestrator.telling import Telling, sum_seconds_used
from workers.bits import SEEN, find_validation
from workers.config import Measurement, Trial
from workers.evaluation.blocks import Block, Images, list_blocks
from workers.hosts import CROWDED, HELD, MEASURED, UNWRITABLE
from workers.jobs import Job, make_job
from workers.layout import RowId, TrialId, get_trial_of_row, name_share_file, name_status_file, name_trial_folder
from workers.network import manifest
from workers.speed import Spent, make_model_key
from workers.tasks import Order, make_order
from workers.training import name_stop_file

# Why a scheduler has stopped a trial at a step, after its last validation.
PRUNED = {
    "asha": "its best validation is not among the best of its rung",
    "median": "its best validation is above the median of the other trials' running means at this step",
}
LOOK_S = 0.5  # at the trials that other sweeps train, where nothing else is left to train


class RowsInProgress:
    """The rows of a sweep while they are made. One for each session of Ray."""

    def __init__(self, standing: Standing, telling: Telling, watchdog: Watchdog, halt: Halt) -> None:
        self.standing, self.telling, self.watchdog, self.halt = standing, telling, watchdog, halt
        self.storage = standing.storage
        self.evaluations = Evaluations()
        self.jobs: dict[TrialId, Job] = {}
        self.groups: dict[TrialId, str] = {}  # the placement group of each data-parallel trial
        self.training: set[RowId] = set()  # the rows whose checkpoints are to be made
        self.elsewhere: dict[TrialId, str] = {}  # the trials that other sweeps train, and who
        self.began, self.start_s = time.monotonic(), 0.0  # the latter until the first trial tells of itself

    def say(self, text: str) -> None:
        self.telling.say(text)

    # Trials that other sweeps train.

    def make_jobs(self, rows: Iterable[RowId], cluster: Cluster | None) -> list[Job]:
        """A job for each trial that the rows need; those that are to be trained, each as far as its furthest row."""
        self.evaluations.cluster, nodes, to_train = cluster, session.list_nodes_ever(cluster), []
        for trial in dict.fromkeys(map(get_trial_of_row, rows)):
            self.jobs[trial] = _make_job(self.standing, trial, nodes)
            if any(row in self.training for row in self.standing.sharing[trial]):
                to_train.append(self.jobs[trial])
        return to_train

    def wait_for_others(self, jobs: list[Job]) -> list[Job]:
        """Waits for trials that other sweeps train, until one is to be trained here after all; those that are left."""
        while jobs:
            self.halt.end(is_left=True)
            self.halt.has_worked = True  # as those have that it waits for
            turns = {job["digest"]: self.decide_turn(job["digest"]) for job in jobs}
            jobs = [job for job in jobs if turns[job["digest"]] != "take"]
            if "train" in turns.values():
                break
            local_ray.check_room()
            self.tick()
            time.sleep(LOOK_S)
        return jobs

    def decide_turn(self, trial: TrialId) -> Turn:
        """Whether the trial is to be trained now: not while another sweep does, nor after it has, when it is taken; nor
        before what it starts from is there."""
        rows = self._list_waiting(trial)
        if not rows:  # what it starts from could not be made
            return "take"
        if any(start in self.training for row in rows for start in self.standing.starts.get(row, {}).values()):
            return "wait"
        holder, scheduler = self.standing.find_holder(trial), self.standing.scheduler
        taken = [row for row in rows if decide(self.standing.look(row), scheduler).action != "train"]
        left = [row for row in rows if row not in taken]
        turn = decide_turn(bool(left), holder)
        before = self.elsewhere.pop(trial, "")
        if turn == "wait":
            self.elsewhere[trial] = holder
            for row in rows:
                self.telling.lines[row].state = "waiting"
            if holder != before:
                self.telling.record_event("waits", rows[0], why=f"it is being trained by {holder}")
                self.telling.say_of(trial, f"is being trained by {holder}; waits for it")
        elif turn == "take":
            self.telling.say_of(trial, f"was trained by {before or 'another sweep'} meanwhile")
        else:
            self.storage.delete(name_stop_file(name_trial_folder(trial)))  # of an earlier command
            if before:
                self.telling.say_of(trial, f"is no longer trained by {before}; it is trained here")
        for row in taken if not holder or not left else []:
            self._end_row_training(row)
        return turn

    def _list_waiting(self, trial: TrialId) -> list[RowId]:
        """The rows of a trial whose checkpoints are still to be made, the earliest step first."""
        rows = [row for row in self.standing.sharing[trial] if row in self.training]
        return sorted(rows, key=lambda row: self.standing.get_trial(row).training.steps)

    # What the training tells of a trial goes to the rows that wait for it, and is printed for the first.

    def begin_trial(self, trial: TrialId) -> None:
        training, [row, *_] = (
            self.standing.get_trial(self.standing.find_furthest(trial)).training,
            self._list_waiting(trial),
        )
        of_one = {"cpus": training.cpus, "gpus": self.jobs[trial]["gpus"]}
        step = self.standing.look(row).step or self.standing.count_shared_steps(row)
        held = {name: n * training.workers for name, n in of_one.items()}
        self.halt.has_worked = True
        self.telling.record_event("began", row, step=step, **held)
        self.telling.lines[row].state = "training"
        compiles = "; compiles its network first, which takes minutes" * (training.compile == "always")
        self.telling.say_of(trial, f"begins at step {step}{compiles}", detail=not compiles)

    def note_progress(self, trial: TrialId, result: dict[str, Any]) -> None:
        if result["state"] in ("failed", UNWRITABLE, HELD, MEASURED, CROWDED):
            return
        self.start_s = self.start_s or time.monotonic() - self.began
        group = result.get("placement_group", "")
        if self.groups.setdefault(trial, group) != group:
            self.groups[trial] = group
            self._note_restart(trial, "a worker of its group died; all of them start")
        for place, row in enumerate(self._list_waiting(trial)):
            line, steps = self.telling.lines[row], self.standing.get_trial(row).training.steps
            line.state, line.step, line.images_per_s = "training", min(result["step"], steps), result["images_per_s"]
            if result["state"] in ("running", "finished"):
                line.validation, line.valid_bpd = find_validation(result) or line.validation, result[SEEN]
            self.telling.record.continue_trial(row, line.name)
            if place == 0:
                self.telling.display.show_change(row)
            if result["state"] == "running" and result["step"] >= steps and self.standing.look(row).checkpoint:
                self._end_row_training(row)  # the trial goes on for other rows

    def end_training(self, trial: TrialId, result: dict[str, Any]) -> None:
        waiting = self._list_waiting(trial)
        if result["state"] in ("running", "pruned") and waiting:  # the scheduler stopped it, or had it stop
            _note_pruned(self.standing, trial, self.telling.lines[waiting[0]])
        for row in waiting:
            self.standing.look(row)
        status = self.standing.found[self.standing.find_furthest(trial)].status
        if waiting and status and "spent" in status:
            spent = {**status["spent"], "start": (1, self.start_s)}
            _learn(self.standing, waiting[-1], {status["hardware"]: spent})
        for row in waiting:
            self._end_row_training(row)

    def _end_row_training(self, row: RowId) -> None:
        """A row's trial has come to its step, or has ended before: it is measured next, unless it did not work."""
        found, line = self.standing.found[row], self.telling.lines[row]
        status = found.status or {}
        self.training.discard(row)
        self.standing.errors.pop(row, None)  # of a row that shares the trial, and could not be made before
        line.step = found.step
        self.telling.record_event("trained", row, state=found.state, step=line.step, why=status.get("detail", ""))
        if found.state == "finished":
            self.standing.keep_checkpoints([row])
            if found.is_measured:
                self.evaluate(row)
            else:
                line.state = "done"
                self.telling.end_row(row)
        else:
            line.state = found.state
            self.telling.say_of(row, str(status.get("detail")))
            self.telling.end_row(row)
            self._fail_those_on(row, str(status.get("detail")))

    def _fail_those_on(self, row: RowId, why: str) -> None:
        """What starts from the row cannot be made."""
        for other, slot in [user for user in self.standing.list_users(row) if user[0] in self.training]:
            self.training.discard(other)
            self._fail_row(other, explain_absent(slot, row, why))

    def restart_trial(self, trial: TrialId, why: str) -> None:
        session.check()  # with Ray itself gone it does not start again
        self._watch()
        self.groups.pop(trial, None)
        self._note_restart(trial, f"{why.rstrip('.')}; it starts")

    def _note_restart(self, trial: TrialId, why: str) -> None:
        row = next(iter(self._list_waiting(trial)), self.standing.find_furthest(trial))
        step = self.telling.lines[row].step
        self.telling.record_event("restarted", row, step=step, why=f"{why} again from its last checkpoint")
        self.telling.say_of(trial, f"{why} again from its last checkpoint")

    def resize_trial(self, trial: TrialId, result: dict[str, Any]) -> None:
        """The trial goes on from its last checkpoint with another part of a GPU, when there is one for it."""
        row = next(iter(self._list_waiting(trial)), self.standing.find_furthest(trial))
        self.telling.lines[row].state = "waiting"
        event = "restarted" if result["state"] == CROWDED else "resized"  # the one is a fault
        self.telling.record_event(event, row, step=self.telling.lines[row].step, why=result["detail"])
        self.telling.say_of(trial, result["detail"])

    def is_halting(self) -> bool:
        return self.halt.is_near

    def pause_trial(self, trial: TrialId, result: dict[str, Any]) -> None:
        """The trial has written a checkpoint, from which the next command goes on."""
        for row in (rows := self._list_waiting(trial)):
            self.telling.lines[row].state = "paused"
            self.standing.look(row)
        self.telling.record_event("paused", rows[0], step=result["step"])
        self.telling.say_of(trial, result["detail"])

    def fail_trial(self, trial: TrialId, why: str) -> None:
        session.check()
        for row in self._list_waiting(trial):
            self.training.discard(row)
            self._fail_row(row, why)

    def _fail_row(self, row: RowId, why: str, took: Mapping[str, Any] | None = None) -> None:
        self.standing.errors[row] = why
        self.telling.record_event("failed", row, why=why, **(took or {}))
        self.telling.lines[row].state = "failed"
        self.standing.look(row)
        self.telling.say_of(row, f"failed: {why}")
        self.telling.end_row(row)
        if not self.standing.found[row].checkpoint:
            self._fail_those_on(row, why)

    def is_evaluating(self) -> bool:
        return bool(self.evaluations)

    def tick(self, wait_s: float = 0) -> None:
        session.check()
        self.halt.tick()
        for name, why in self.evaluations.poll(wait_s):
            row = RowId(name)
            spents = self.evaluations.spent.pop(name, {})
            if why:
                session.check()
                self._fail_row(row, f"evaluation: {why}", sum_seconds_used(spents))
            else:
                self._end_measurement(row, spents)
        for name, piece, why in self.evaluations.take_retried():
            self.telling.record_event("retried", name, piece=piece, why=why)
            self.telling.say_of(name, f"{piece}: {why}")
        self._watch()
        self.telling.refresh({row: self.evaluations.count_left(row) for row in self.telling.lines})

    def _watch(self) -> None:
        """Tells of processes that hang."""
        for name, why in self.watchdog.take():
            trial = TrialId(name)
            row = next(iter(self._list_waiting(trial)), self.standing.find_furthest(trial)) if trial else ""
            self.telling.record_event("hangs", row, why=why)
            self.say(f"{trial[:8]}  {why}" if trial else why)
        for trial, rows in self.standing.sharing.items():
            for row in rows:
                self.telling.lines[row].silent_s = self.watchdog.silent.get(trial, 0.0)

    # Measuring.

    def evaluate(self, row: RowId) -> None:
        """Starts the blocks of a trained row that are not there."""
        line, gpus = self.telling.lines[row], self.jobs[get_trial_of_row(row)]["gpus"]
        order, planned, missing = _order_blocks(self.standing, row, gpus, self.halt)
        line.state, line.blocks, line.blocks_left, line.step = "evaluating", len(planned), len(missing), line.steps
        self.evaluations.submit(row, order, planned, missing)
        self.halt.has_worked = True
        self.telling.record_event("evaluating", row, blocks=len(planned), missing=len(missing))
        self.telling.say_of(row, f"evaluates: {len(missing)} of {len(planned)} blocks are missing", detail=True)
        self.telling.display.show_change(row)

    def _end_measurement(self, row: RowId, spents: Mapping[str, Spent]) -> None:
        trial = self.standing.get_trial(row)
        source = self.standing.sources[trial.data]
        _learn(self.standing, row, {h: cost.split_spent(s, trial, source) for h, s in spents.items()})
        self.standing.look(row)
        self.telling.record_event("measured", row, **sum_seconds_used(spents))
        self.telling.lines[row].state = "done"
        self.telling.end_row(row)


def _make_job(standing: Standing, trial: TrialId, nodes: Sequence[Node]) -> Job:
    """The trial as far as the furthest of its rows asks."""
    row = standing.find_furthest(trial)
    config = standing.get_trial(row)
    gpus = session.count_gpus_a_worker(config.training, nodes)
    session.check_precision(config.evaluation, nodes)
    steps = standing.list_further_steps(trial)
    share, starts = _share_file(config, standing) if gpus else "", standing.find_start_folders(row)
    of = standing.storage, trial, config, gpus, standing.owner
    return make_job(*of, also_keep=steps, share=share, starts=starts)


def _order_blocks(standing: Standing, row: RowId, gpus: float, halt: Halt) -> tuple[Order, list[Block], list[Block]]:
    """How a trained row is measured, all of the blocks of that, and those that are not there."""
    trial = standing.get_trial(row)
    source, m = standing.sources[trial.data], Measurement.of(trial)
    checkpoint = manifest.choose_weights(standing.open_checkpoint(row), m.evaluation)
    planned = list_blocks(m, checkpoint.digest, Images.of(source))
    missing = find_missing_blocks(planned, standing.storage.list)
    block_s = cost.estimate_longest_block_s(standing.storage, trial, source, on_gpu=gpus > 0)
    order = make_order(standing.storage, m, checkpoint, gpus, until=halt.find_latest_block_begin(block_s))
    return order, planned, missing


def _learn(standing: Standing, row: RowId, spents: Mapping[str, Spent]) -> None:
    """Keeps what work of the trial took, for the plans of later sweeps."""
    trial = standing.get_trial(row)
    for hardware, spent in spents.items():
        cost.learn(standing.storage, trial, standing.sources[trial.data], hardware, spent, said_by=row[:8])


def _share_file(trial: Trial, standing: Standing) -> str:
    """Where what part of a GPU the trial needs is noted; empty where its experiment says it, or it has workers."""
    training = trial.training
    if training.gpus != "auto" or training.workers > 1:
        return ""
    model = make_model_key(trial.model, training, standing.sources[trial.data].diffused)
    return name_share_file(model, training.batch_size)


def _note_pruned(standing: Standing, trial: TrialId, line: Any) -> None:
    path, why = name_status_file(trial), PRUNED[standing.experiment.search.scheduler.kind]
    detail = f"pruned at step {line.step}, with {line.validation} {line.valid_bpd:.3f}: {why}"
    pruned = {"state": "pruned", "scheduler": standing.scheduler, "detail": detail}
    standing.storage.write_sealed(path, {**(standing.storage.read_sealed(path) or {}), **pruned})
