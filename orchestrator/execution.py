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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from orchestrator.experiment import SearchConfig
from orchestrator.plan import concurrency
from orchestrator.submission import TOKEN, check_attachable, code, inside_a_job
from workers import tasks
from workers.blocks import Block
from workers.config import DataConfig, Mistake, TrainingConfig

TO_DIE_S = 5.0  # until the processes of a dead trial are gone: freed before, Ray Train would take its cores again
BLOCK_CPUS = 0.9  # not a whole one: the drivers of data-parallel trials take a little of the core that is kept free
BLOCK_GPUS = 0.25  # of a GPU, for an evaluation block where trials train on GPUs
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our journal
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctrl-C reaches us
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray Train looks at reports once in 2 s by default; on a laptop a validation may come more often.
WORKERS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}


class Events(Protocol):
    """What a sweep wants to know of its training."""

    def progress(self, digest: str, result: dict[str, Any]) -> None: ...
    def trained(self, digest: str, result: dict[str, Any]) -> None: ...
    def restarted(self, digest: str) -> None: ...
    def failed(self, digest: str, why: str) -> None: ...
    def tick(self) -> None: ...


@contextmanager
def session(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """A Ray cluster: the one at `address`, or one of this machine that ends with the block.

    `cpus` bounds the latter's logical cores, and so how many tasks run at once.
    """
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


def gpus_available() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpus_a_worker(training: TrainingConfig) -> int:
    """`training.gpus` on this cluster. Raises Mistake where it asks for a GPU and there is none."""
    available = gpus_available()
    if training.gpus == "auto":
        return int(available > 0)
    if training.gpus and not available:
        raise Mistake("training.gpus: 1, but no node of the cluster has a GPU; set it to 0 or auto")
    return training.gpus


def train(jobs: Sequence[tasks.Job], search: SearchConfig, events: Events) -> None:
    """Trains all jobs and returns when all have ended. Jobs of one shape share a Tuner; one-worker trials come first.

    Raises Mistake where the cluster cannot hold a trial.
    """

    def shape(job: tasks.Job) -> tuple[int, int, int]:
        training = tasks.trial_of(job).training
        return training.workers, training.cpus, job["gpus"]

    resources = ray.cluster_resources()
    batches = []
    for _, group in groupby(sorted(jobs, key=shape), key=shape):
        batch = list(group)
        training, gpus = tasks.trial_of(batch[0]).training, batch[0]["gpus"]
        most = concurrency(training, gpus, resources.get("CPU", 0), resources.get("GPU", 0))
        if most == 0:
            raise Mistake(
                f"training.workers: {training.workers} workers of {training.cpus} CPUs and {gpus} GPUs never fit a "
                f"cluster of {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
            )
        batches.append((batch, training.workers, most if search.max_concurrent == "auto" else search.max_concurrent))
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        for batch, workers, concurrent in batches:
            _tune(batch, workers, concurrent, search, events, scratch)


def _tune(
    jobs: list[tasks.Job], workers: int, concurrent: int, search: SearchConfig, events: Events, scratch: str
) -> None:
    space: dict[str, Any] = {"job": tune.grid_search(jobs)}
    trainable: Any = tasks.OneWorker
    if workers > 1:
        # Its driver takes next to nothing: the workers' cores are asked for by Ray Train.
        trainable = tune.with_resources(tasks.data_parallel, {"CPU": 0.01})
        space |= {"scratch": scratch, "max_failures": search.max_failures}
    tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(search, max(tasks.trial_of(job).training.steps for job in jobs)),
            max_concurrent_trials=concurrent,
            reuse_actors=workers == 1,
            trial_name_creator=_digest,
            trial_dirname_creator=_digest,
        ),
        run_config=tune.RunConfig(
            name=f"workers-{workers}",
            storage_path=scratch,
            callbacks=[_Relay(events)],
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


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

    def __init__(self, events: Events) -> None:
        self._events = events
        self._left_behind: list[tuple[float, dict[str, Any]]] = []  # (when to free it, last result of a dead trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks into a snapshot, which nobody restores here

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
        self._events.restarted(_digest(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._left_behind.append((time.monotonic() + TO_DIE_S, trial.last_result))
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
    summary: Any  # the task at the end, which waits for all blocks
    left: set[Any]
    failed: str = ""


@dataclass
class Evaluations:
    """Evaluations in flight, each under a name. `submit` starts one, `poll` takes what has ended."""

    _open: dict[str, _Evaluation] = field(default_factory=dict)
    _owner: dict[Any, str] = field(default_factory=dict)  # the evaluation of each task in flight
    _spaces: dict[tuple[DataConfig, str], Any] = field(default_factory=dict)
    _shared: dict[str, Any] = field(default_factory=dict)  # blocks of real images in the making, by path

    def submit(self, name: str, order: tasks.Order, planned: list[Block], missing: list[Block]) -> None:
        """Starts the `missing` ones of the `planned` blocks, and after them the summary."""
        options = {"num_cpus": BLOCK_CPUS, "num_gpus": BLOCK_GPUS if order.gpus else 0}
        space = self._space(order)
        made: dict[str, Any] = {}
        others = []  # what another evaluation on the same data is making
        for block in missing:
            if block.path in self._shared:
                others.append(self._shared[block.path])
                continue
            after = [made[b.path] for b in block.needs if b.path in made]
            after += [space] if space is not None and block.kind in ("features", "reference") else []
            made[block.path] = tasks.make_block.options(**options).remote(order, block, *after)
            if block.kind == "reference":
                self._shared[block.path] = made[block.path]
        refs = list(made.values())
        summary = tasks.make_summary.options(**options).remote(order, *refs, *others)
        self._open[name] = _Evaluation(order, planned, summary, {*refs, summary})
        self._owner |= dict.fromkeys(refs, name) | {summary: name}

    def _space(self, order: tasks.Order) -> Any:
        """The feature space of a data set is made once, before the blocks that use it."""
        if not order.m.evaluation.fid:
            return None
        key = (order.m.data, order.m.evaluation.fid.features)
        if key not in self._spaces:
            self._spaces[key] = tasks.make_space.options(num_cpus=BLOCK_CPUS).remote(order)
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
            lacking = ray.get(ref)
        except ray.exceptions.RayError as error:  # of the task, or of the machine that it ran on
            evaluation.failed = evaluation.failed or _reason(error)
            self._shared = {path: other for path, other in self._shared.items() if other != ref}
            # The summary fails by itself, and others may wait for what is shared.
            for other in evaluation.left - {evaluation.summary} - set(self._shared.values()):
                ray.cancel(other)
            return
        if ref == evaluation.summary and lacking:
            for block in lacking:
                self._shared.pop(block.path, None)
            self.submit(name, evaluation.order, evaluation.planned, lacking)


def _reason(error: ray.exceptions.RayError) -> str:
    """What a task failed of, without the trace."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Mistake):
        return str(cause)
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
