"""A session of Ray, on this machine or attached to a cluster, and what its nodes have."""

import logging
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.clusters.cluster import Cluster
from orchestrator.clusters.submission import TOKEN, check_attachable, code, inside_a_job
from orchestrator.plan import Node
from workers import tasks
from workers.config import Mistake, TrainingConfig
from workers.storage import Storage

log = logging.getLogger(__name__)

TO_ANSWER_S = 60.0  # for a node that is asked whether it sees the storage; one that is slower is believed
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
                log.warning("%s was not asked for the storage: %s", asked[ref], reason(error))
    finally:
        storage.delete(note)
    if blind:
        raise Mistake(
            f"--storage {storage.root}: not seen by {', '.join(blind)} of the cluster. Give a folder that all nodes "
            "share, such as one on NFS, or a URI such as s3://bucket/path"
        )


def reason(error: ray.exceptions.RayError) -> str:
    """What a task failed of, without the trace."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Mistake):
        return str(cause)
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
