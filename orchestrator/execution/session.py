"""A session of Ray, on this machine or attached to a cluster, and what its nodes have."""

import errno
import gc
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import interrupts
from orchestrator.clusters.allocation import find_allocation
from orchestrator.clusters.cluster import Cluster
from orchestrator.clusters.submission import TOKEN, check_attachable, describe_environment, is_inside_job
from orchestrator.execution.hangs import HANG_S, Watchdog
from orchestrator.execution.loss import MARKER, ClusterLost, Watch, find_marked, stop
from orchestrator.planning.place import Node
from orchestrator.ray_internals import (
    ask_after,
    find_default_folder,
    find_processes,
    hear_ray,
    keep_keys_out_of_logs,
    listen_on_loopback,
    set_environment,
)
from workers.compiling import find_missing_compiler
from workers.config import EvaluationConfig, Mistake, TrainingConfig
from workers.disk import StorageError, Unwritable, check_writable
from workers.sharing import round_as_ray
from workers.speed import count_cores
from workers.storage import Storage
from workers.tasks import sees

log = logging.getLogger(__name__)

TO_JOIN_S, LOOK_S = 180.0, 0.5  # for the nodes of a job to join the Ray that they start together
TO_ANSWER_S = 60.0  # for a node that is asked whether it sees the storage; one that is slower is believed
# In its temporary folder Ray keeps sockets, whose paths Linux bounds, logs, and what Tune notes of a sweep.
SOCKET, SOCKET_BYTES = "session_2026-11-26_15-21-23_069432_4194304/sockets/plasma_store", 107
ROOM_MB, FULL_MB = 32, 0.1  # to start in, and with so little left it is full
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
VITAL = {"gcs_server": "GCS", "raylet": "raylet"}  # Ray's names of its processes, and ours
SPARE = {"monitor": "monitor", "log_monitor": "log monitor", "dashboard": "dashboard"}
# Ray Train looks at reports once in 2 s by default; on a laptop a validation may come more often.
WORKERS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}


@contextmanager
def open_session(ray_address: str | None, *, cpus: int | None = None, hang_s: float = HANG_S) -> Iterator[Watchdog]:
    """A Ray cluster: the one at `ray_address`, or one of this machine that ends with the block.

    `cpus` bounds the latter's logical cores, and so how many tasks run at once. Processes that hang for `hang_s` are
    ended. Within another session it is that one.
    """
    with _ONE, _open_session(ray_address, cpus, hang_s) as watchdog:
        yield watchdog


_ONE = threading.RLock()  # a process has one Ray at a time: sweeps of several threads come one after the other


@contextmanager
def _open_session(ray_address: str | None, cpus: int | None, hang_s: float) -> Iterator[Watchdog]:
    if ray.is_initialized():
        yield _watches[-1][1] if _watches else Watchdog(hang_s, lambda: True)
        return
    if ray_address is not None:
        check_attachable(ray_address)
    os.environ.update({name: value for name, value in (QUIET | WORKERS).items() if name not in os.environ})
    keep_keys_out_of_logs()
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it prints a page of, `_Relay` tells in a line
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if ray_address is not None:  # a local Ray inherits them, and starts its processes faster with none to make
        options["runtime_env"] = {"env_vars": WORKERS} | ({} if is_inside_job() else describe_environment())
    else:
        # A logical core more than the machine has, so that evaluation blocks run while the others train.
        options |= {
            "num_cpus": cpus or count_cores() + 1,
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,
        }
    marker, left = uuid.uuid4().hex, threading.Event()
    with ExitStack() as opened:
        opened.callback(left.set)
        opened.enter_context(interrupts.allow_interrupts())
        if ray_address is None:
            options["_temp_dir"] = opened.enter_context(_make_temporary_folder())
            opened.callback(stop, marker)
        opened.callback(ray.shutdown)
        with _start_ray(marker if ray_address is None else ""):
            try:
                ray.init(ray_address or "local", **options)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                if ray_address is None:  # whatever Ray raises, where a part of it died or hung as it started
                    raise ClusterLost(f"Ray did not start ({reason})") from error
                if isinstance(error, ConnectionError):
                    raise Mistake(
                        f"--address {ray_address}: no Ray cluster answers there ({reason}); "
                        f"where it wants a token, {TOKEN}"
                    ) from error
                raise
        watchdog = Watchdog(hang_s, lambda: bool(watch.explain_loss()))
        watch = Watch(
            find_processes(VITAL),
            find_processes(SPARE),
            {} if ray_address is None else _find_addresses(),
            marker,
            left,
            also=lambda: watchdog.look_for_stopped(lambda: find_marked(marker)),
        )
        # What is of Ray and is nobody's goes while Ray is there: between two of them it would end the process.
        opened.callback(lambda: watch.explain_loss() or gc.collect())
        _watches.append((watch, watchdog))
        opened.callback(_watches.clear)
        opened.enter_context(watch.keep_looking())
        opened.enter_context(ask_after(watch.wait))
        opened.enter_context(watchdog.keep_looking())
        if allocation := find_allocation() if ray_address is not None else None:
            _await_nodes(allocation.nodes)
        yield watchdog


def _await_nodes(number: int) -> None:
    """Returns when so many nodes have joined, or have had their time to."""
    deadline = time.monotonic() + TO_JOIN_S
    while (there := sum(node["Alive"] for node in ray.nodes())) < number:
        check()
        if time.monotonic() > deadline:
            log.warning("%d of the job's %d nodes have joined its Ray in %g s", there, number, TO_JOIN_S)
            return
        time.sleep(LOOK_S)


_watches: list[tuple[Watch, Watchdog]] = []  # those of the session under way


def is_open() -> bool:
    """Whether a session is under way."""
    return bool(_watches)


def check() -> None:
    """Raises ClusterLost where the session's Ray is gone, and KeyboardInterrupt where one was swallowed."""
    interrupts.check()
    for watch, _ in _watches:
        watch.check()


@contextmanager
def _start_ray(marker: str) -> Iterator[None]:
    """Ray is brought up in the block, whole or not at all; where there is a `marker`, as a Ray of this machine alone.

    The signals stay ours: Ray would end a driver by sys.exit.
    """
    with ExitStack() as opened:
        opened.enter_context(interrupts.defer_interrupts())
        if marker:
            opened.enter_context(set_environment({MARKER: marker}))
            opened.enter_context(listen_on_loopback())
        if threading.current_thread() is threading.main_thread():
            opened.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        hear_ray()
        yield


def _find_addresses() -> dict[str, tuple[str, int]]:
    """What a cluster has to answer at: its head, and the raylet that this driver is connected to."""
    context = ray.get_runtime_context()
    [own] = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    host, _, port = context.gcs_address.rpartition(":")
    return {
        "Ray's GCS": (host.strip("[]"), int(port)),
        "Ray's raylet of this machine": (own["NodeManagerAddress"], own["NodeManagerPort"]),
    }


_in_use: list[Path] = []  # the temporary folder of a Ray of this machine, while there is one


@contextmanager
def _make_temporary_folder() -> Iterator[str]:
    """Where a local Ray keeps its files: where it does so by itself, or else in /tmp/ray. Raises Mistake."""
    try:
        tempfile.gettempdir()  # Tune's place
    except FileNotFoundError as error:
        raise Mistake(f"{error.strerror}; set the environment variable TMPDIR to one that can be written") from error
    folder, unfit = find_folder([find_default_folder(), Path("/tmp/ray")])
    if folder is None:
        raise Mistake(
            f"{'; '.join(unfit)}. Set the environment variable RAY_TMPDIR to a short path with {ROOM_MB} MB free"
        )
    if unfit:
        log.warning("%s; Ray uses %s instead", "; ".join(unfit), folder)
    _in_use.append(folder)
    try:
        yield str(folder)
    finally:
        _in_use.remove(folder)


def find_folder(choices: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The first folder that Ray can work in, and why it cannot in those before it."""
    unfit: list[str] = []
    for folder in dict.fromkeys(choices):
        if not (why := _explain_unfit(folder)):
            return folder, unfit
        unfit.append(why)
    return None, unfit


def _explain_unfit(folder: Path) -> str:
    if (excess := len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES) > 0:
        return f"the temporary folder {folder} is a path {excess} bytes too long for the sockets of Ray"
    try:
        check_writable(folder)
        free = shutil.disk_usage(folder).free / 2**20
    except (StorageError, OSError) as error:
        return f"the temporary folder {str(error).partition('. ')[0]}"
    return "" if free >= ROOM_MB else f"the temporary folder {folder} has {free:.1f} MB free, and Ray needs {ROOM_MB}"


def check_room() -> None:
    """Raises Unwritable where the folder of a local Ray is full: its processes then die, or wait for ever."""
    for folder in _in_use:
        try:
            free = shutil.disk_usage(folder).free / 2**20
        except OSError as error:
            raise Unwritable.of(folder, error) from error
        if free < FULL_MB:
            raise Unwritable.of(folder, OSError(errno.ENOSPC, "the disk of Ray's files is full"))


def is_on_this_machine() -> bool:
    """Whether the session is of this machine alone."""
    return str(ray.get_runtime_context().gcs_address).startswith("127.0.0.1:")


def count_slots() -> dict[str, float]:
    """What the cluster has to give, as Ray counts it."""
    resources = ray.cluster_resources()
    return {"cpus": resources.get("CPU", 0.0), "gpus": resources.get("GPU", 0.0)}


def describe_use() -> str:
    """How much of the cluster is taken just now, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [(kind, total.get(kind, 0.0)) for kind in ("CPU", "GPU")]
    return ", ".join(f"{all_ - free.get(kind, 0.0):g} of {all_:g} {kind}s busy" for kind, all_ in kinds if all_)


def list_nodes_now() -> list[Node]:
    """The nodes of the cluster."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in alive]


def list_nodes_ever(cluster: Cluster | None) -> list[Node]:
    """The nodes that the cluster can have: by its file where that is known, else those that it has."""
    return cluster.nodes() if cluster else list_nodes_now()


def list_gpu_types() -> set[str]:
    """What kinds of GPUs the nodes have, as Ray calls them; empty where it does not know."""
    prefix, alive = "accelerator_type:", (node["Resources"] for node in ray.nodes() if node["Alive"])
    names = (name for resources in alive if resources.get("GPU") for name in resources)
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def count_gpus_a_worker(training: TrainingConfig, nodes: Sequence[Node]) -> float:
    """`training.gpus` on these nodes. Raises Mistake where it asks for a GPU and there is none."""
    available = any(node.gpus for node in nodes)
    if training.gpus == "auto":
        return int(available)
    if training.gpus and not available:
        raise Mistake(f"training.gpus: {training.gpus:g}, but no node of the cluster has a GPU; set it to 0 or auto")
    return round_as_ray(training.gpus)


def check_precision(evaluation: EvaluationConfig, nodes: Sequence[Node]) -> None:
    """Raises Mistake where the evaluation asks for TF32 and no node has a GPU."""
    if evaluation.precision == "tf32" and not any(node.gpus for node in nodes):
        raise Mistake("evaluation.precision: tf32, but no node of the cluster has a GPU; take float32 or bf16")


def check_compiler(trainings: Iterable[TrainingConfig]) -> None:
    """Raises Mistake where a trial on this machine must be compiled, and nothing here can do it."""
    missing = find_missing_compiler()
    if missing and any(training.compile == "always" for training in trainings):
        raise Mistake(f"training.compile: always, but {missing}; or set it to auto or never")


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
            sees.options(
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
                log.warning("%s was not asked for the storage: %s", asked[ref], shorten_reason(error))
    finally:
        storage.delete(note)
    if blind:
        raise Mistake(
            f"--storage {storage.root}: not seen by {', '.join(blind)} of the cluster. Give a folder that all nodes "
            "share, such as one on NFS, or a URI such as s3://bucket/path"
        )


def shorten_reason(error: ray.exceptions.RayError) -> str:
    """What a task failed of, without the trace."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Mistake):
        return str(cause)
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
