"""Trials to Ray Tune: `train` runs them until all have ended, and tells what happens to `admission.Events`.

Everything happens in the caller's thread: Tune's loop calls `Events.tick` some ten times a second.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.clusters.cluster import Cluster
from orchestrator.execution.admission import Admission, Events, get_trial_id
from orchestrator.execution.early_stopping import make_scheduler
from orchestrator.execution.local_ray import check_room
from orchestrator.execution.loss import ClusterLost
from orchestrator.execution.scratch import make_scratch_folder
from orchestrator.execution.session import is_on_this_machine, list_nodes_ever
from orchestrator.experiment.records import SearchConfig
from orchestrator.planning.place import Size, admit_at_once, describe_nodes, fits_one_node, list_never_fitting
from orchestrator.tune_internals import choose_environments, count_no_loggers, treat_out_of_memory_as_death
from workers.config import Mistake
from workers.disk import Unwritable
from workers.hosts import CROWDED, HELD, MEASURED, UNWRITABLE, OneWorker, free_workers
from workers.jobs import Job, read_trial

LOOK_S = 0.5  # at an evaluation that has its turn
TO_DIE_S = 5.0  # until the processes of a dead trial are gone: freed before, Ray Train would take its cores again


def choose_hosts(sizes: Iterable[Size]) -> dict[str, Any]:
    """How trials are hosted, by name: what Tune calls for one worker, and where there are such for several."""
    found: dict[str, Any] = {"one_worker": OneWorker}
    if any(size.workers > 1 for size in sizes):
        from workers.data_parallel import SeveralWorkers  # Ray Train loads here, most of a second

        found["data_parallel"] = SeveralWorkers
    return found


def measure_sizes(jobs: Sequence[Job], cluster: Cluster | None) -> dict[str, Size]:
    """What each trial takes, by its id. Raises Mistake where the cluster can never hold one."""
    sizes = {job["digest"]: Size.of(read_trial(job).training, job["gpus"]) for job in jobs}
    if problems := list_never_fitting(sizes.values(), list_nodes_ever(cluster)):
        raise Mistake("\n".join(problems) + ("" if cluster else "; if it can grow, name its file by --cluster"))
    return sizes


def train(
    jobs: Sequence[Job],
    search: SearchConfig,
    events: Events,
    cluster: Cluster | None = None,
    hosts: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Trains all jobs, of whatever sizes, and returns when all have ended. `cluster` says how far Ray's can grow.

    Those that other sweeps train, by `Events.turn`, are put aside. What is left of these when nothing else is to be
    trained is returned.

    Raises Mistake where the cluster can never hold a trial, and Unwritable where a disk is full.
    """
    nodes, sizes = list_nodes_ever(cluster), measure_sizes(jobs, cluster)
    most = None if search.max_concurrent == "auto" else search.max_concurrent
    together = len(admit_at_once(list(sizes.values()), nodes, most))
    events.say(f"placement  {len(jobs)} trials on {describe_nodes(nodes)}, {together} at once to begin with")
    for size in dict.fromkeys(size for size in sizes.values() if not fits_one_node(size, nodes)):
        events.say(f"placement  {size}: more than a node holds, so such a trial trains over several nodes (PACK)")
    hosts = hosts or choose_hosts(sizes.values())
    choose_environments(local=is_on_this_machine())
    count_no_loggers()
    for name, host in hosts.items():
        tune.register_trainable(name, host)
    scheduler = make_scheduler(search, max(read_trial(job).training.steps for job in jobs))
    with make_scratch_folder() as scratch, treat_out_of_memory_as_death(), _raise_what_it_carries():
        admission = Admission(jobs, sizes, search, events, cluster=cluster, scratch=scratch)
        relay = _Relay(events, admission)
        for part in itertools.count(1):
            tune.Tuner(
                hosts["one_worker"],
                tune_config=tune.TuneConfig(search_alg=admission, scheduler=scheduler, reuse_actors=True),
                run_config=tune.RunConfig(
                    name=f"sweep-{part}",
                    storage_path=scratch,
                    callbacks=[relay],
                    failure_config=tune.FailureConfig(max_failures=search.max_failures),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    verbose=0,
                ),
            ).fit()
            if events.is_halting() or not admission.waits:
                break
            # It has ended since evaluation has its turn on the only GPU: Tune keeps an actor and what that holds.
            while events.is_evaluating() and not events.is_halting():
                check_room()
                events.tick(wait_s=LOOK_S)
    return list(admission.aside)


@contextmanager
def _raise_what_it_carries() -> Iterator[None]:
    try:
        yield
    except _Lost as carrier:
        assert isinstance(carrier.__cause__, ClusterLost)
        raise carrier.__cause__ from None


class _Lost(BaseException):
    """Carries ClusterLost through Tune, which after an Exception asks the Ray that is lost to end the trials."""


class _Relay(tune.Callback):
    """Tune's callbacks in the sweep's words.

    An error in one of them Tune would take for a fault of the trial, and try that again. It is raised between two steps
    of Tune's, which ends the training.
    """

    def __init__(self, events: Events, admission: Admission) -> None:
        self._events, self._admission = events, admission
        self._error: Exception | None = None
        self._left_behind: list[tuple[float, dict[str, Any]]] = []  # (when to free it, last result of a dead trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks into a snapshot, which nobody restores here

    def _tell(self, event: Callable[..., None], *what: Any) -> None:
        if self._error:
            return
        try:
            event(*what)
        except Exception as error:  # noqa: BLE001 raised by `on_step_end`
            self._error = error

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(self._events.begin_trial, get_trial_id(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("state") == UNWRITABLE:
            self._error = self._error or Unwritable(result["detail"])
        self._tell(self._events.note_progress, get_trial_id(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        result = trial.last_result
        if result.get("state") == "failed":
            self._tell(self._events.fail_trial, get_trial_id(trial), str(result["detail"]))
        elif result.get("state") == HELD:
            self._admission.put_aside(trial)
        elif result.get("state") in (MEASURED, CROWDED):
            self._admission.resize(trial, float(result["gpus"]))
            self._tell(self._events.resize_trial, get_trial_id(trial), result)
        elif result.get("state") == "paused":
            self._tell(self._events.pause_trial, get_trial_id(trial), result)
        else:
            self._tell(self._events.end_training, get_trial_id(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._left_behind.append((time.monotonic() + TO_DIE_S, trial.last_result))
        self._tell(
            self._events.restart_trial, get_trial_id(trial), _find_last_line(trial.error_file) or "its process died"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._left_behind.append((time.monotonic() + TO_DIE_S, trial.last_result))
        if self._admission.put_back(trial):
            self._tell(
                self._events.restart_trial, get_trial_id(trial), _find_last_line(trial.error_file) or "its process died"
            )
            return
        self._tell(
            self._events.fail_trial,
            get_trial_id(trial),
            _find_last_line(trial.error_file) or "its process died too often",
        )

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        try:
            if self._error:
                raise self._error
            check_room()
            self._events.tick()
        except ClusterLost as lost:
            raise _Lost from lost
        while self._left_behind and self._left_behind[0][0] < time.monotonic():
            free_workers(self._left_behind.pop(0)[1])


def _find_last_line(path: str | None) -> str:
    """The last line of an error, without Ray's guesses at its causes."""
    lines = Path(path).read_text(errors="replace").split("\n") if path and Path(path).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "").partition(" Some common causes")[0]
