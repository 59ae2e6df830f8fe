"""Ray's side of a sweep: trials to Ray Tune, evaluation blocks to Ray tasks.

`session` brings Ray up and down; `train` runs trials until all have ended and tells what happens to `Events`;
`Evaluations` runs the blocks of trials that are trained, on whatever the training leaves free. Everything happens in
the caller's thread: Tune's loop calls `Events.tick` some ten times a second.
"""

import logging
import os
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.clusters.cluster import Cluster
from orchestrator.clusters.submission import TOKEN, check_attachable, code, inside_a_job
from orchestrator.experiment import SearchConfig
from orchestrator.plan import Node, Size, admit, at_once, can_hold, in_one_node, never, nodes_text, spare
from workers import tasks
from workers.blocks import Block
from workers.config import DataConfig, Mistake, TrainingConfig
from workers.speed import Spent, added
from workers.storage import Storage

log = logging.getLogger(__name__)

TO_DIE_S = 5.0  # until the processes of a dead trial are gone: freed before, Ray Train would take its cores again
BLOCK_CPUS = 0.9  # not a whole one: the drivers of data-parallel trials take a little of the core that is kept free
TO_ANSWER_S = 60.0  # for a node that is asked whether it sees the storage; one that is slower is believed
LOOK_AGAIN_S = 1.0  # at the nodes, and at the placements that wait for room
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our journal
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctrl-C reaches us
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # how many may be started is `_Admission`'s to say
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray Train looks at reports once in 2 s by default; on a laptop a validation may come more often.
WORKERS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}


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


@contextmanager
def session(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """A Ray cluster: the one at `address`, or one of this machine that ends with the block.

    `cpus` bounds the latter's logical cores, and so how many tasks run at once. Within another session it is that one.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None:
        check_attachable(address)
    os.environ.update({name: value for name, value in (QUIET | WORKERS).items() if name not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it prints a page of, `_Relay` tells in a line
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is not None:  # a local Ray inherits them, and starts its processes faster without an environment to make
        options["runtime_env"] = {"env_vars": WORKERS} | ({} if inside_a_job() else code())
    else:
        # A logical core more than the machine has, so that evaluation blocks run while the others train.
        options |= {"num_cpus": cpus or cores() + 1, "include_dashboard": False, "object_store_memory": 256 * 2**20}
    try:
        ray.init(address or "local", **options)
    except ConnectionError as error:
        raise Mistake(
            f"--address {address}: no Ray cluster answers there ({error}); where it wants a token, {TOKEN}"
        ) from error
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a reclaimed machine is ctrl-C to us
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots() -> dict[str, float]:
    """What the cluster has to give, as Ray counts it."""
    resources = ray.cluster_resources()
    return {"cpus": resources.get("CPU", 0.0), "gpus": resources.get("GPU", 0.0)}


def use() -> str:
    """How much of the cluster is taken just now, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [(kind, total.get(kind, 0.0)) for kind in ("CPU", "GPU")]
    return ", ".join(f"{all_ - free.get(kind, 0.0):g} of {all_:g} {kind}s busy" for kind, all_ in kinds if all_)


def nodes_now() -> list[Node]:
    """The nodes of the cluster."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in alive]


def nodes_ever(cluster: Cluster | None) -> list[Node]:
    """The nodes that the cluster can have: by its file where that is known, else those that it has."""
    return cluster.nodes() if cluster else nodes_now()


def gpus_a_worker(training: TrainingConfig, nodes: Sequence[Node]) -> int:
    """`training.gpus` on these nodes. Raises Mistake where it asks for a GPU and there is none."""
    available = any(node.gpus for node in nodes)
    if training.gpus == "auto":
        return int(available)
    if training.gpus and not available:
        raise Mistake("training.gpus: 1, but no node of the cluster has a GPU; set it to 0 or auto")
    return training.gpus


def check_seen(storage: Storage) -> None:
    """Raises Mistake where the storage is a folder that some node of the cluster does not see.

    A node that comes later is not asked: where the cluster grows, the storage is a URI or a share of its file.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU")]
    if not storage.is_local or not others:
        return
    note = f"seen-{uuid.uuid4().hex}"
    storage.write(note, b"")
    try:
        asked = {
            tasks.sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(storage.root, note): node["NodeManagerAddress"]
            for node in others
        }  # fmt: skip
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=TO_ANSWER_S)
        blind = []
        for ref in answered:
            try:
                blind += [] if ray.get(ref) else [asked[ref]]
            except ray.exceptions.RayError as error:  # it has left, and holds no trial
                log.warning("%s was not asked for the storage: %s", asked[ref], _reason(error))
    finally:
        storage.delete(note)
    if blind:
        raise Mistake(
            f"--storage {storage.root}: not seen by {', '.join(blind)} of the cluster. Give a folder that all nodes "
            "share, such as one on NFS, or a URI such as s3://bucket/path"
        )


# How trials are hosted, by name: what Tune calls for one worker, and for several.
HOSTS = {
    "one_worker": tasks.OneWorker,
    "data_parallel": tune.with_resources(tasks.data_parallel, lambda config: tasks.DriverResources()),
}


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
    nodes = nodes_ever(cluster)
    sizes = {job["digest"]: Size.of(tasks.trial_of(job).training, job["gpus"]) for job in jobs}
    if said := never(sizes.values(), nodes):
        raise Mistake("\n".join(said) + ("" if cluster else "; if it can grow, name its file by --cluster"))
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
    if scheduler.kind == "none":
        return FIFOScheduler()
    return _Asha(
        time_attr="step",  # not Tune's iteration: that starts again when an actor does
        metric=scheduler.metric,
        mode="min",
        max_t=steps,
        grace_period=min(scheduler.grace, steps),
        reduction_factor=scheduler.reduction,
    )


class _Asha(AsyncHyperBandScheduler):
    """Asks a data-parallel trial to stop, where Tune would kill it.

    Killed, it would leave its workers' cores taken: Ray Train's cleaner asks the dashboard whether the trial is still
    there, and a local Ray has none. Asked, it ends by itself at its next journal point.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        job = trial.config["job"]
        if decision != TrialScheduler.STOP or tasks.trial_of(job).training.workers == 1:
            return decision
        if result["state"] == "running":  # else it is at its last step, or ends by itself
            tasks.ask_to_stop(job)
        return str(TrialScheduler.CONTINUE)


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


@dataclass
class _Evaluation:
    order: tasks.Order
    planned: list[Block]
    blocks: Mapping[Any, str]  # the path of each task's block
    summary: Any  # the task at the end, which waits for all blocks
    left: set[Any]
    failed: str = ""


# Kinds of blocks that measurements of one checkpoint, or on one data set, have in common: while one makes them, the
# others wait for them.
SHARED = ("nll", "ode_nll", "reference")


@dataclass
class Evaluations:
    """Evaluations in flight, each under a name. `submit` starts one, `poll` takes what has ended."""

    _open: dict[str, _Evaluation] = field(default_factory=dict)
    _owner: dict[Any, str] = field(default_factory=dict)  # the evaluation of each task in flight
    _spaces: dict[tuple[DataConfig, str], Any] = field(default_factory=dict)
    _shared: dict[str, Any] = field(default_factory=dict)  # blocks that several evaluations may need, by path
    spent: dict[str, dict[str, Spent]] = field(default_factory=dict)  # what blocks took, by evaluation and hardware
    retried: list[tuple[str, str, str]] = field(default_factory=list)  # (name, piece of work, why) of what was redone

    def submit(self, name: str, order: tasks.Order, planned: list[Block], missing: list[Block]) -> None:
        """Starts the `missing` ones of the `planned` blocks, and after them the summary."""
        options = _needs(order)
        space = self._space(order)
        made: dict[str, Any] = {}
        others = []  # what another evaluation on the same data is making
        for block in missing:
            if block.path in self._shared:
                others.append(self._shared[block.path])
                continue
            after = [ref for b in block.needs if (ref := made.get(b.path, self._shared.get(b.path))) is not None]
            after += [space] if space is not None and block.kind in ("features", "reference") else []
            made[block.path] = tasks.make_block.options(**options).remote(order, block, *after)
            if block.kind in SHARED:
                self._shared[block.path] = made[block.path]
        paths = {ref: path for path, ref in made.items()}
        summary = tasks.make_summary.options(**options).remote(order, *paths, *others)
        self._open[name] = _Evaluation(order, planned, paths, summary, {*paths, summary})
        self._owner |= dict.fromkeys(paths, name) | {summary: name}

    def _space(self, order: tasks.Order) -> Any:
        """The feature space of a data set is made once, before the blocks that use it."""
        if not order.m.evaluation.fid:
            return None
        key = (order.m.data, order.m.evaluation.fid.features)
        if key not in self._spaces:
            self._spaces[key] = tasks.make_space.options(**_needs(order)).remote(order)
        return self._spaces[key]

    def __len__(self) -> int:
        return len(self._open)

    def left(self, name: str) -> int:
        """Blocks of an evaluation still to come."""
        return max(0, len(self._open[name].left) - 1) if name in self._open else 0

    def poll(self, timeout_s: float = 0) -> list[tuple[str, str]]:
        """(name, what failed or "") of each evaluation that has ended since, its summary written if nothing failed."""
        if self._owner:
            ready, _ = ray.wait(list(self._owner), num_returns=len(self._owner), timeout=timeout_s)
            for ref in ready:
                self._take(ref)
        ended = {name: e for name, e in self._open.items() if not e.left}
        for name in ended:
            del self._open[name]
        return [(name, e.failed) for name, e in ended.items()]

    def _take(self, ref: Any) -> None:
        name = self._owner.pop(ref)
        evaluation = self._open[name]
        evaluation.left.discard(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:  # of the task, or of the machine that it ran on
            evaluation.failed = evaluation.failed or _reason(error)
            self._shared = {path: other for path, other in self._shared.items() if other != ref}
            # The summary fails by itself, and others may wait for what is shared.
            for other in evaluation.left - {evaluation.summary} - set(self._shared.values()):
                ray.cancel(other)
            return
        if ref != evaluation.summary:
            spents = self.spent.setdefault(name, {})
            spents[result.hardware] = added(spents.get(result.hardware, {}), result.spent)
            self._redone(name, evaluation.blocks[ref], result.attempts, result.again)
            return
        attempts, lacking = result
        self._redone(name, "the summary", attempts, lacking)
        if lacking:  # blocks that the summary found damaged
            for block in lacking:
                self._shared.pop(block.path, None)
            self.submit(name, evaluation.order, evaluation.planned, list(lacking))

    def _redone(self, name: str, piece: str, attempts: int, again: Mapping[Block, str]) -> None:
        """Notes what a task says of faults: Ray began it more than once, or blocks were damaged."""
        if attempts > 1:
            why = f"its process or its machine died; Ray ran it again, and attempt {attempts} made it"
            self.retried.append((name, piece, why))
        self.retried += [(name, block.path, f"{why}; it is made again") for block, why in again.items()]

    def take_retried(self) -> list[tuple[str, str, str]]:
        """(name, piece of work, why) of all that was made again since the last call."""
        retried, self.retried = self.retried, []
        return retried


def _needs(order: tasks.Order) -> dict[str, float]:
    """What a task of an evaluation asks of the node it runs on."""
    return {"num_cpus": BLOCK_CPUS, "num_gpus": tasks.BLOCK_GPUS if order.gpus else 0}


def _reason(error: ray.exceptions.RayError) -> str:
    """What a task failed of, without the trace."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Mistake):
        return str(cause)
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
