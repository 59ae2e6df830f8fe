"""What is private of Ray and used on the nodes: the place to look at when Ray is upgraded.

The driver's is `orchestrator.ray_internals`. What is of Ray Train is in `workers.ray_train`, which data-parallel trials
alone load: it takes most of a second.
"""

import ray
from ray.experimental import internal_kv


def count_attempts() -> int:
    """How often Ray has begun this task, which it begins again by itself where a process or a machine dies."""
    return 1 + int(ray.get_runtime_context().worker.core_worker.get_current_task_attempt_number())


def put_key(key: str, value: str, namespace: bytes) -> None:
    """Writes to Ray's own store of keys, which ends with the cluster."""
    internal_kv._internal_kv_put(key, value, namespace=namespace)


def read_keys(prefix: str, namespace: bytes) -> dict[bytes, bytes]:
    """What stands under the keys that begin so."""
    found = {key: internal_kv._internal_kv_get(key, namespace=namespace)
             for key in internal_kv._internal_kv_list(prefix, namespace=namespace)}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def delete_key(key: bytes, namespace: bytes) -> None:
    internal_kv._internal_kv_del(key, namespace=namespace)
