"""A driver on a cluster that is not this machine's own: it must run on one of the nodes, and brings its code along.

So the nodes need nothing installed but the libraries.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

import orchestrator
import workers
from orchestrator.clusters.allocation import find_allocation
from orchestrator.ray_internals import find_clusters
from workers.config import Mistake

TO_START_S, LOOK_S = 180.0, 0.5  # for the Ray of a job, which starts beside its driver
TOKEN = (
    "set RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN "
    "(`ray get-auth-token` on the head prints it)"
)


def describe_environment() -> dict[str, Any]:
    """The runtime environment that takes this code to the nodes. Nothing secret may be in one: it shows in logs."""
    packages = (Path(package.__file__ or "").parent for package in (orchestrator, workers))
    return {"py_modules": [str(package) for package in packages], "excludes": ["__pycache__"]}


def is_inside_job() -> bool:
    """Whether this process is the driver of a job, which has its code from it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_attachable(ray_address: str) -> None:
    """Raises Mistake where no driver can attach to `ray_address` from here: it must be a node of that cluster."""
    if ray_address.startswith(("http://", "https://")):
        raise Mistake(f"--address {ray_address} is that of a Jobs API: add --submit to send the sweep there as a job")
    if "://" in ray_address:
        raise Mistake(
            f"--address {ray_address}: a sweep cannot run through Ray's client. Submit it to the head's Jobs API "
            "(--address http://HEAD:8265 --submit), or attach on a node of the cluster (--address auto)"
        )
    if ray_address == "auto" and "RAY_ADDRESS" in os.environ:  # that of the cluster whose job this is
        return
    deadline = time.monotonic() + (TO_START_S if find_allocation() else 0)
    while True:
        found = find_clusters()
        if found and (ray_address == "auto" or any(_is_same_node(ray_address, other) for other in found)):
            return
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    here = f"it is one of {', '.join(sorted(found))}" if found else "no Ray runs here"
    raise Mistake(
        f"--address {ray_address}: this machine is no node of such a cluster ({here}). Attach on a node "
        "(--address auto), or submit the sweep to the head's Jobs API from anywhere "
        "(--address http://HEAD:8265 --submit)"
    )


def _is_same_node(ray_address: str, node: str) -> bool:
    """Whether `ray_address` is what Ray calls a node of this machine; it knows hosts by their numbers."""
    host, _, port = ray_address.rpartition(":")
    try:
        number = socket.gethostbyname(host)
    except OSError:
        return False
    return port == node.rpartition(":")[2] and (number.startswith("127.") or number == node.rpartition(":")[0])
