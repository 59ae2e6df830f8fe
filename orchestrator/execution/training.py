"""Trials to Ray Tune: `train` runs them until all have ended, and tells what happens to `Events`.

Everything happens in the caller's thread: Tune's loop calls `Events.tick` some ten times a second.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import SearchAlgorithm

from orchestrator.clusters.cluster import Cluster
from orchestrator.execution.session import nodes_ever, nodes_now
from orchestrator.experiment import SearchConfig
from orchestrator.plan import Size, admit, at_once, can_hold, in_one_node, never, nodes_text, spare
from workers import tasks
from workers.config import Mistake

TO_DIE_S = 5.0  # until the processes of a dead trial are gone: freed before, Ray Train would take its cores again
LOOK_AGAIN_S = 1.0  # at the nodes, and at the placements that wait for room


class Events(Protocol):
    """What a sweep wants to know of its training."""

    def begins(self, digest: str) -> None: ...
    def progress(self, digest: str, result: dict[str, Any]) -> None: ...
    def trained(self, digest: str, result: dict[str, Any]) -> None: ...
    def restarted(self, digest: str, why: str) -> None: ...
    def failed(self, digest: str, why: str) -> None: ...
    def tick(self) -> None: ...
    def say(self, text: str) -> None: ...
    def evaluating(self) -> bool: ...


# How trials are hosted, by name: what Tune calls for one worker, and for several.
HOSTS = {
    "one_worker": tasks.OneWorker,
    "data_parallel": tune.with_resources(tasks.data_parallel, lambda config: tasks.DriverResources()),
}


def sizes_of(jobs: Sequence[tasks.Job], cluster: Cluster | None) -> dict[str, Size]:
    """What each trial takes, by its address. Raises Mistake where the cluster can never hold one."""
    sizes = {job["digest"]: Size.of(tasks.trial_of(job).training, job["gpus"]) for job in jobs}
    if said := never(sizes.values(), nodes_ever(cluster)):
        raise Mistake("\n".join(said) + ("" if cluster else "; if it can grow, name its file by --cluster"))
    return sizes


def train(
    jobs: Sequence[tasks.Job],
    search: SearchConfig,
    events: Events,
    cluster: Cluster | None = None,
    hosts: Mapping[str, Any] = HOSTS,
) -> None:
    """Trains all jobs, of whatever sizes, and returns when all have ended. `cluster` says how far Ray's can grow.

    Raises Mistake where the cluster can never hold a trial.
    """
    nodes, sizes = nodes_ever(cluster), sizes_of(jobs, cluster)
    most = None if search.max_concurrent == "auto" else search.max_concurrent
    together = len(at_once(list(sizes.values()), nodes, most))
    events.say(f"placement  {len(jobs)} trials on {nodes_text(nodes)}, {together} at once to begin with")
    for size in dict.fromkeys(size for size in sizes.values() if not in_one_node(size, nodes)):
        events.say(f"placement  {size}: more than a node holds, so such a trial trains over several nodes (PACK)")
    for name, host in hosts.items():
        tune.register_trainable(name, host)
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch, _out_of_memory_is_a_death():
        admission = _Admission(jobs, sizes, search, events, cluster, scratch)
        tune.Tuner(
            hosts["one_worker"],
            tune_config=tune.TuneConfig(
                search_alg=admission,
                scheduler=_scheduler(search, max(tasks.trial_of(job).training.steps for job in jobs)),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                callbacks=[_Relay(events, admission)],
                failure_config=tune.FailureConfig(max_failures=search.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()


@contextmanager
def _out_of_memory_is_a_death() -> Iterator[None]:
    """Has Tune treat a trial whose process Ray killed on a full machine as one whose process died.

    Ray's memory monitor gives the calls of such a process an error that Tune 2.60 does not count among the deaths of
    an actor, and ends the whole sweep by.
    """
    task_failed, first_result = RayActorManager._actor_task_failed, Trial._get_default_result_or_future

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, ray.exceptions.OutOfMemoryError):
            why = f"its machine was full, and Ray ended its process: {str(exception).splitlines()[0]}"
            exception = ray.exceptions.RayActorError(error_msg=why)
        task_failed(manager, tracked_actor_task, exception)

    def result(trial: Trial) -> dict[str, Any] | None:
        try:
            return first_result(trial)
        except ray.exceptions.OutOfMemoryError:  # it died before it had told anything
            trial._default_result_or_future = None
            return None

    RayActorManager._actor_task_failed, Trial._get_default_result_or_future = failed, result
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, Trial._get_default_result_or_future = task_failed, first_result


class _Admission(SearchAlgorithm):
    """Gives Tune its next trial as soon as `plan.admit` finds room for it.

    So the drivers that exist are those that fit, whatever the sizes. Tune keeps the actor of a trial that has ended
    for the next one until it hears that there is no next one: see `is_finished`.
    """

    def __init__(
        self,
        jobs: Sequence[tasks.Job],
        sizes: Mapping[str, Size],
        search: SearchConfig,
        events: Events,
        cluster: Cluster | None,
        scratch: str,
    ) -> None:
        self._waiting, self._sizes = list(jobs), sizes
        self._search, self._events, self._cluster, self._scratch = search, events, cluster, scratch
        self._running: dict[str, Size] = {}  # by Tune's id of the trial
        self._nodes, self._looked = nodes_ever(cluster), time.monotonic()
        self._stuck: Size | None = None
        self._again: Counter[str] = Counter()
        self._choice: int | None = None
        self._chosen = False  # whether `_choice` is still that of the present state

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as for `_Relay`

    def add_configurations(self, experiments: Any) -> None:
        self._storage = experiments[0].spec["storage"]

    @property
    def total_samples(self) -> int:
        return len(self._sizes)

    def next_trial(self) -> Trial | None:
        i = self._next()
        if i is None:
            return None
        job = self._waiting.pop(i)
        size = self._sizes[job["digest"]]
        if not self._running and not can_hold(size, nodes_now()):
            self._events.say(f"placement  {job['digest'][:8]} waits for a node that holds {size}")
        config: dict[str, Any] = {"job": job}
        if size.workers > 1:
            strategy = "STRICT_PACK" if in_one_node(size, self._nodes) else "PACK"
            config |= {"scratch": self._scratch, "max_failures": self._search.max_failures, "strategy": strategy}
        trial = Trial(
            "data_parallel" if size.workers > 1 else "one_worker",
            config=config,
            storage=self._storage,
            max_failures=self._search.max_failures,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            trial_name_creator=_digest,
            trial_dirname_creator=_digest,
        )
        self._running[trial.trial_id], self._chosen = size, False
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.pop(trial_id, None)
        self._chosen = False

    def again(self, trial: Trial) -> bool:
        """Puts a trial that Tune gave up back into the queue, unless it has failed too often: then it gives False.

        Tune does not retry a trial whose actor dies as it is handed over from another trial.
        """
        job, most = trial.config["job"], self._search.max_failures
        self._again[job["digest"]] += 1
        if trial.run_metadata.num_failures > most or self._again[job["digest"]] > most:
            return False
        self._waiting.append(job)
        self._chosen = False
        return True

    def is_finished(self) -> bool:
        """Whether no trial comes now, none ever or none before a running one ends.

        Tune asks again at each of its steps, and until then gives back the resources of actors that it kept: an
        evaluation may need them, or a trial whose node was lost.
        """
        return not self._waiting or (bool(self._running) and self._next() is None)

    def _next(self) -> int | None:
        """The place in the queue of the trial that starts next."""
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self._nodes, self._stuck = nodes_ever(self._cluster), self._without_place()
            self._looked, self._chosen = time.monotonic(), False
        if not self._chosen:
            self._choice = admit(
                [self._sizes[job["digest"]] for job in self._waiting],
                list(self._running.values()),
                self._nodes,
                spare=spare(self._nodes, self._events.evaluating()),
                most=None if self._search.max_concurrent == "auto" else self._search.max_concurrent,
                stuck=self._stuck,
            )
            self._chosen = True
        return self._choice

    def _without_place(self) -> Size | None:
        """The biggest of the running trials that Ray has no room for now, and would have on the nodes of now."""
        if not self._waiting:
            return None
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] in ("PENDING", "RESCHEDULING")]
        bundles = [list(group["bundles"].values()) for group in groups]
        sizes = {Size(len(b), b[0].get("CPU", 0), b[0].get("GPU", 0)) for b in bundles} & set(self._running.values())
        now = nodes_now() if sizes else []
        return max((size for size in sizes if can_hold(size, now)), key=lambda size: size.order, default=None)


def _scheduler(search: SearchConfig, steps: int) -> TrialScheduler:
    scheduler = search.scheduler
    seen: dict[str, Any] = {  # not Tune's iteration: that starts again when an actor does
        "time_attr": "step",
        "metric": scheduler.metric,
        "mode": "min",
        "grace_period": min(scheduler.grace, steps),
    }
    match scheduler.kind:
        case "none":
            return FIFOScheduler()
        case "asha":
            return _Asha(max_t=steps, reduction_factor=scheduler.reduction, **seen)
        case "median":  # which would pause a trial as long as there are too few others, and ours cannot be paused
            return _Median(min_samples_required=scheduler.others, min_time_slice=math.inf, **seen)


class _Asking(TrialScheduler):
    """Asks a data-parallel trial to stop, where Tune would kill it.

    Killed, it would leave its workers' cores taken: Ray Train's cleaner asks the dashboard whether the trial is still
    there, and a local Ray has none. Asked, it ends by itself at its next journal point.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._asked: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        job = trial.config["job"]
        if job["digest"] in self._asked:
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision != TrialScheduler.STOP or tasks.trial_of(job).training.workers == 1:
            return decision
        if result["state"] == "running":  # else it is at its last step, or ends by itself
            self._asked.add(job["digest"])
            tasks.ask_to_stop(job)
        return str(TrialScheduler.CONTINUE)


class _Asha(_Asking, AsyncHyperBandScheduler):
    pass


class _Median(_Asking, MedianStoppingRule):
    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last result of a trial that failed has no step, at which Tune's rule would fall over."""
        if "step" in result:
            super().on_trial_complete(tune_controller, trial, result)


def _digest(trial: Any) -> str:
    return str(trial.config["job"]["digest"])


class _Relay(tune.Callback):
    """Tune's callbacks in the sweep's words."""

    def __init__(self, events: Events, admission: _Admission) -> None:
        self._events, self._admission = events, admission
        self._left_behind: list[tuple[float, dict[str, Any]]] = []  # (when to free it, last result of a dead trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks into a snapshot, which nobody restores here

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._events.begins(_digest(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._events.progress(_digest(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        result = trial.last_result
        if result.get("state") == "failed":
            self._events.failed(_digest(trial), str(result["detail"]))
        else:
            self._events.trained(_digest(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._left_behind.append((time.monotonic() + TO_DIE_S, trial.last_result))
        self._events.restarted(_digest(trial), _last_line(trial.error_file) or "its process died")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._left_behind.append((time.monotonic() + TO_DIE_S, trial.last_result))
        if self._admission.again(trial):
            self._events.restarted(_digest(trial), _last_line(trial.error_file) or "its process died")
            return
        self._events.failed(_digest(trial), _last_line(trial.error_file) or "its process died too often")

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._events.tick()
        while self._left_behind and self._left_behind[0][0] < time.monotonic():
            tasks.free_workers(self._left_behind.pop(0)[1])


def _last_line(path: str | None) -> str:
    lines = Path(path).read_text().split("\n") if path and Path(path).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
