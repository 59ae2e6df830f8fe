"""What a cluster can have, from the file that `ray up` is given: its node types, and how many of each.

Ray tells its drivers what there is now, not how far its autoscaler may grow: that stands in the file alone. `ray up`
leaves a copy of it on the head, where a sweep that runs there finds it by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.experiment.settings import read_text, read_yaml, show, suggest_choice
from orchestrator.planning.place import Node
from workers.config import Mistake

ON_THE_HEAD = Path("~/ray_bootstrap_config.yaml")  # ray.autoscaler's copy of the file, also where Tune looks for it


MOST = 100_000  # of nodes, and of a node's cores


@dataclass(frozen=True)
class NodeType:
    name: str
    node: Node
    most: int  # such nodes at once, besides the head
    instance: str | None = None  # the provider's name of the machine, which has a price
    spot: bool = False


@dataclass(frozen=True)
class Cluster:
    types: tuple[NodeType, ...]  # the head's first
    most: int  # nodes at once besides the head

    def nodes(self) -> list[Node]:
        """All nodes that there can be at once: where types share the limit, those with the most GPUs first."""
        return [kind.node for kind in self.kinds()]

    def kinds(self) -> list[NodeType]:
        """The type of each of `nodes`."""
        by_size = sorted(self.types, key=lambda kind: (kind.node.gpus, kind.node.cpus), reverse=True)
        return [self.types[0], *(kind for kind in by_size for _ in range(kind.most))][: self.most + 1]


def read_cluster(path: Path) -> Cluster:
    """The cluster that a file for `ray up` describes. Raises Mistake with all that is wrong with it."""
    try:
        content, problems = read_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise Mistake(f"--cluster {path}: cannot be read: {error}") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("available_node_types"), Mapping):
        has = ", ".join(map(str, content)) if isinstance(content, Mapping) else show(content)[:60]
        raise Mistake(
            f"--cluster {path}: not a cluster file of Ray with available_node_types; it has {has or 'nothing'}. "
            "cluster.yaml is one"
        )
    kinds, head, most = content["available_node_types"], content.get("head_node_type"), content.get("max_workers", 2)
    if not isinstance(head, str) or head not in kinds:
        problems.append(
            f"head_node_type: {show(head)} is none of available_node_types{suggest_choice(str(head), kinds)}"
        )
    if not _is_count(most):
        problems.append(f"max_workers: {show(most)} is not a number of nodes")
    for name, kind in kinds.items():
        problems += [f"available_node_types.{name}.{problem}" for problem in _find_problems(kind)]
    if problems:
        raise Mistake("\n  ".join([f"--cluster {path}:", *problems]))
    first = [str(head), *(name for name in kinds if name != head)]
    return Cluster(tuple(_read_type(name, kinds[name], most, name == head) for name in first), most)


def find_cluster_of_head() -> Cluster | None:
    """The cluster whose head this machine is; None where it is none, or its file does not say what nodes have."""
    path = ON_THE_HEAD.expanduser()
    try:
        return read_cluster(path) if path.exists() else None
    except Mistake:
        return None  # of machines that one has (provider local), those that are there are all


def _find_problems(kind: Any) -> list[str]:
    if not isinstance(kind, Mapping):
        return [f" {show(kind)} is not a node type"]
    resources = kind.get("resources")
    if (
        not isinstance(resources, Mapping)
        or not _is_count(resources.get("CPU"))
        or not _is_count(resources.get("GPU", 0))
    ):
        return [f"resources: {show(resources)} does not say what such a node has; write {{CPU: 8, GPU: 1}}, say"]
    if not _is_count(kind.get("max_workers", 0)):
        return [f"max_workers: {show(kind['max_workers'])} is not a number of nodes"]
    config = kind.get("node_config") or {}
    market = config.get("InstanceMarketOptions") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(market or {}, Mapping):
        return [f"node_config: {show(config)} is not what `ray up` takes: it and InstanceMarketOptions are mappings"]
    for name in ("InstanceType", "machineType"):
        if not isinstance(config.get(name, ""), str):
            return [f"node_config.{name}: {show(config[name])} is not the name of a kind of machine"]
    return []


def _read_type(name: str, kind: Mapping[str, Any], most: int, head: bool) -> NodeType:
    resources, config = kind["resources"], kind.get("node_config") or {}
    market = config.get("InstanceMarketOptions") or {}
    return NodeType(
        name,
        Node(resources["CPU"], resources.get("GPU", 0)),
        min(most, kind.get("max_workers", 0 if head else most)),
        config.get("InstanceType") or config.get("machineType"),
        market.get("MarketType") == "spot",
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
