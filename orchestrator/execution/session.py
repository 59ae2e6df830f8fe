"""A session of Ray, on this machine or attached to a cluster, and what its nodes have."""

import gc
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import interrupts
from orchestrator.clusters.allocation import find_allocation
from orchestrator.clusters.attaching import TOKEN, check_attachable, describe_environment, is_inside_job
from orchestrator.clusters.cluster import Cluster
from orchestrator.execution.hangs import HANG_S, Watchdog
from orchestrator.execution.local_ray import (
    STARTING,
    WORKERS,
    end_early,
    is_early,
    prepare_environment,
    start_whole,
    take_or_start,
)
from orchestrator.execution.loss import Watch, find_marked
from orchestrator.planning.place import Node
from orchestrator.ray_internals import ask_after, find_processes
from workers.compiling import find_missing_compiler
from workers.config import EvaluationConfig, Mistake, TrainingConfig
from workers.sharing import round_as_ray
from workers.storage import Storage
from workers.tasks import sees

log = logging.getLogger(__name__)

TO_JOIN_S, LOOK_S = 180.0, 0.5  # for the nodes of a job to join the Ray that they start together
TO_ANSWER_S = 60.0  # for a node that is asked whether it sees the storage; one that is slower is believed
VITAL = {"gcs_server": "GCS", "raylet": "raylet"}  # Ray's names of its processes, and ours


@contextmanager
def open_session(ray_address: str | None, *, cpus: int | None = None, hang_s: float = HANG_S) -> Iterator[Watchdog]:
    """A Ray cluster: the one at `ray_address`, or one of this machine that ends with the block.

    `cpus` bounds the latter's logical cores, and so how many tasks run at once. Processes that hang for `hang_s` are
    ended. Within another session it is that one.
    """
    with STARTING, _open_session(ray_address, cpus, hang_s) as watchdog:
        yield watchdog


@contextmanager
def _open_session(ray_address: str | None, cpus: int | None, hang_s: float) -> Iterator[Watchdog]:
    if ray.is_initialized() and not is_early():
        yield _watches[-1][1] if _watches else Watchdog(hang_s, lambda: True)
        return
    if ray_address is not None:
        check_attachable(ray_address)
    left, marker = threading.Event(), uuid.uuid4().hex
    with ExitStack() as opened:
        opened.callback(left.set)
        opened.enter_context(interrupts.allow_interrupts())
        if ray_address is None:
            local = take_or_start(cpus)
            opened.enter_context(local.opened)
            marker = local.marker
        else:
            end_early()
            opened.callback(ray.shutdown)
            _attach(ray_address)
        watchdog = Watchdog(hang_s, lambda: bool(watch.explain_loss()))
        watch = Watch(
            find_processes(VITAL),
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


def _attach(ray_address: str) -> None:
    """Connects to a cluster. Raises Mistake where none answers."""
    prepare_environment()
    # A local Ray inherits them, and starts its processes faster with none to make.
    environment = {"env_vars": WORKERS} | ({} if is_inside_job() else describe_environment())
    with start_whole(""):
        try:
            ray.init(ray_address, logging_level="ERROR", log_to_driver=False, runtime_env=environment)
        except ConnectionError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Mistake(
                f"--address {ray_address}: no Ray cluster answers there ({reason}); where it wants a token, {TOKEN}"
            ) from error


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


def _find_addresses() -> dict[str, tuple[str, int]]:
    """What a cluster has to answer at: its head, and the raylet that this driver is connected to."""
    context = ray.get_runtime_context()
    [own] = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    host, _, port = context.gcs_address.rpartition(":")
    return {
        "Ray's GCS": (host.strip("[]"), int(port)),
        "Ray's raylet of this machine": (own["NodeManagerAddress"], own["NodeManagerPort"]),
    }


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
    """What a task failed of, and the last file and line of its trace that are of no library."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Mistake):
        return str(cause)
    if not cause:
        return str(error).strip().splitlines()[-1]
    places = [
        place for place in re.findall(r'File "([^"]+)", line (\d+)', str(error)) if "site-packages" not in place[0]
    ]
    return f"{type(cause).__name__}: {cause}" + (f" ({':'.join(places[-1])})" if places else "")
