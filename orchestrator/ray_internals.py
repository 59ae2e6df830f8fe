"""What is private of Ray and used by the driver: the place to look at when Ray is upgraded.

That of Ray Tune, which takes seconds to load, is in `tune_internals`, the nodes' in `workers.ray_private`. Nothing else
of `orchestrator` touches a name of Ray that begins with `_`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants, services, utils
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray.core.generated.gcs_pb2 import AvailableResources, TotalResources

log = logging.getLogger(__name__)

TO_ANSWER_S = 5.0  # for Ray's GCS, before it is asked again
# What has a Ray of one machine, and Gloo in its workers, listen on the loopback interface alone.
LOOPBACK = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "GLOO_SOCKET_IFNAME": "lo"}


class _Accessor:
    """What Ray asks its GCS by, but for the questions that come again and again: those for resources.

    Ray's own aborts the process where the GCS dies, or another one comes to its address, while it is asked. These
    raise, and are asked again.
    """

    def __init__(self, accessor: Any, wait: Callable[[str], None]) -> None:
        self._accessor, self._wait = accessor, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accessor, name)

    def get_all_total_resources(self) -> list[bytes]:
        nodes = self._ask()
        return [TotalResources(node_id=n.node_id, resources_total=n.resources_total).SerializeToString() for n in nodes]

    def get_all_available_resources(self) -> list[bytes]:
        nodes = self._ask()
        return [
            AvailableResources(node_id=n.node_id, resources_available=n.resources_available).SerializeToString()
            for n in nodes
        ]

    def _ask(self) -> Any:
        while True:
            try:
                usage = ray_worker.global_worker.gcs_client.get_all_resource_usage(timeout=TO_ANSWER_S)
                return usage.resource_usage_data.batch
            except ray.exceptions.RayError as error:
                self._wait(str(error).strip().partition("\n")[0])


@contextmanager
def ask_after(wait: Callable[[str], None]) -> Iterator[None]:
    """Questions about the cluster, ours and Tune's, are asked after `wait`, which may raise.

    It is given why the last one was not answered, or nothing.
    """
    state = ray_state.state
    connect = state._connect_and_get_accessor

    def ask() -> Any:
        wait("")
        return _Accessor(connect(), wait)

    state._connect_and_get_accessor = ask
    try:
        yield
    finally:
        del state._connect_and_get_accessor


def log_line(data: dict[str, Any], ignore_prefix: bool) -> None:
    """What Ray has to say of its processes, pages of it: a line for the verbose. What matters is told by us."""
    for text in data["lines"]:
        log.info("Ray: %s", str(text).strip().partition("\n")[0])


def find_processes(names: Mapping[str, str]) -> dict[str, Any]:
    """The processes of a Ray of this machine by their names here; none where it was there before."""
    node = ray_worker._global_node
    started = node.all_processes if node else {}
    return {text: started[kind][0].process for kind, text in names.items() if kind in started}


@contextmanager
def start_few(environment: Mapping[str, str]) -> Iterator[None]:
    """A local Ray that starts within the block has `environment` in its processes, of which there are few.

    They listen on 127.0.0.1, their services and their metrics too: Ray does so on systems where it offers no clusters,
    and takes this for one of them. What nobody asks anything here is left out, as each takes a second or two of a core
    to load: the autoscaler's monitor, the log monitor, and the dashboard's server, for which Ray waits even where it
    is to have no dashboard. The agent of the latter is what it is without the packages of a dashboard.
    """
    start_process = services.start_ray_process

    def start(command: list[str], kind: str, fate_share: bool, env_updates: Any = None, **more: Any) -> Any:
        return start_process(command, kind, fate_share, {**(env_updates or {}), **environment}, **more)

    replaced = [
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        (services, "start_ray_process", start),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not asked for")),
        (services, "start_api_server", lambda *_, **__: ("", None)),
        (Node, "start_log_monitor", lambda _: None),
        (Node, "start_monitor", lambda _: None),
    ]
    with ExitStack() as block:
        block.enter_context(set_environment(LOOPBACK))
        for owner, name, value in replaced:
            block.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment has these variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def hear_ray() -> None:
    """What Ray prints of its processes goes to our log."""
    ray_worker.print_to_stdstream = log_line


def find_clusters() -> set[str]:
    """The addresses of the clusters that this machine is a node of, now: Ray keeps what it has found first."""
    services._thread_safe_find_gcs_addresses_cache_clear()
    return set(services.find_gcs_addresses())


def find_default_folder() -> Path:
    """Where Ray keeps its files by itself."""
    return Path(get_default_ray_temp_dir()).absolute()
