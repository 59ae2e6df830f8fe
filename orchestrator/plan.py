"""What must run: pure functions of what the experiment asks for and what the storage holds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.blocks import Block
from workers.config import DRIVER_CPUS, TrainingConfig, digest

Action = Literal["train", "evaluate", "nothing"]


@dataclass(frozen=True)
class Found:
    """What the storage holds of a trial."""

    status: Mapping[str, Any] | None = None  # status.json
    checkpoint: str | None = None  # the digest of its newest complete checkpoint
    summary: Mapping[str, Any] | None = None  # of the evaluation that is asked for, of that checkpoint

    @property
    def state(self) -> str:
        return str(self.status["state"]) if self.status else "new"


@dataclass(frozen=True)
class Decision:
    action: Action
    why: str


def decide(found: Found, scheduler: str) -> Decision:
    """What to do about one trial. `scheduler` is the key of the rule that prunes, see `scheduler_key`."""
    status = found.status or {}
    match found.state:
        case "new":
            return Decision("train", "new")
        case "diverged":
            return Decision("nothing", str(status.get("detail") or "diverged"))
        case "pruned" if status.get("scheduler") == scheduler:
            return Decision("nothing", f"pruned at step {status['step']}")
        case "finished" if found.checkpoint and found.checkpoint == status.get("checkpoint"):
            if found.summary is None:
                return Decision("evaluate", "trained, not evaluated")
            return Decision("nothing", "done")
        case "finished":
            return Decision("train", "its final checkpoint is gone")
    return Decision("train", f"{found.state} at step {status.get('step', 0)} of {status.get('steps', '?')}: resumes")


def missing(planned: Sequence[Block], names_in: Callable[[str], Sequence[str]]) -> list[Block]:
    """The planned blocks that are not there; `names_in` lists a folder, and is asked once for each."""
    there = {folder: set(names_in(folder)) for folder in dict.fromkeys(block.folder for block in planned)}
    return [block for block in planned if block.name not in there[block.folder]]


def scheduler_key(scheduler: Mapping[str, Any]) -> str:
    """A trial stays pruned as long as the rule that pruned it does."""
    return digest(dict(scheduler))


# ---- Placement: which trial starts next ------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """What a machine has, or has left."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Size:
    """What a trial takes: its workers, and the cores and GPUs of each."""

    workers: int = 1
    cpus: float = 1
    gpus: float = 0

    @staticmethod
    def of(training: TrainingConfig, gpus: int) -> "Size":
        return Size(training.workers, training.cpus, gpus)

    @property
    def order(self) -> tuple[float, float]:
        """The bigger the size, the bigger this: by GPUs, then by cores."""
        return self.workers * self.gpus, self.workers * self.cpus

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU{'s' * (self.cpus != 1)} and {self.gpus:g} GPU{'s' * (self.gpus != 1)}"
        return f"{self.workers} worker{'s' * (self.workers != 1)} of {each}"


def in_one_node(size: Size, nodes: Sequence[Node]) -> bool:
    """Whether some node, empty, holds all workers of the trial: they then train inside of one."""
    return any(_room(size, _beside_driver(size, node)) >= size.workers for node in nodes)


def can_hold(size: Size, nodes: Sequence[Node]) -> bool:
    """Whether the empty nodes hold the trial at all, in one or over several, wherever Ray puts its driver."""
    rooms = [_room(size, node) for node in nodes]
    lost = [
        room - _room(size, beside)
        for room, node in zip(rooms, nodes, strict=True)
        if (beside := _beside_driver(size, node)).cpus >= 0
    ]
    return bool(lost) and sum(rooms) - max(lost) >= size.workers


def never(sizes: Iterable[Size], nodes: Sequence[Node]) -> list[str]:
    """A line for each size that the nodes never hold."""
    wrong = [size for size in dict.fromkeys(sizes) if not can_hold(size, nodes)]
    return [f"training.workers: {size} never fit a cluster of {nodes_text(nodes)}" for size in wrong]


def nodes_text(nodes: Sequence[Node]) -> str:
    """4 nodes of 32 CPUs and 8 GPUs, 1 node of 4 CPUs."""
    said = []
    for node, n in Counter(nodes).items():
        gpus = f" and {node.gpus:g} GPU{'s' * (node.gpus != 1)}" if node.gpus else ""
        said.append(f"{n} node{'s' * (n != 1)} of {node.cpus:g} CPU{'s' * (node.cpus != 1)}{gpus}")
    return ", ".join(said) or "no nodes"


def admit(
    waiting: Sequence[Size],
    running: Sequence[Size],
    nodes: Sequence[Node],
    *,
    spare: Size | None = None,
    most: int | None = None,
    stuck: Size | None = None,
) -> int | None:
    """Which of the `waiting` trials starts next beside the `running` ones; None where one of them must end first.

    The biggest that fits; of equal sizes the first. `nodes` are those that the cluster has or can get, `spare` is room
    kept for evaluation, `most` a bound on trials at once. `stuck` is the biggest trial that was started and finds no
    place, since smaller ones lie on every node (a node was lost): nothing smaller starts before it has one. Where
    nothing runs, the biggest starts in any case: a cluster that can grow sees by it what is needed.
    """
    if not waiting or (most is not None and len(running) >= most):
        return None
    by_size = sorted(range(len(waiting)), key=lambda i: waiting[i].order, reverse=True)
    if not running:
        return by_size[0]
    free = _packed([*running, *([spare] if spare else [])], nodes)
    tried: set[Size] = set()
    for i in by_size:
        size = waiting[i]
        if stuck and size.order < stuck.order:
            return None
        if size not in tried and _place(size, free, in_one_node(size, nodes)) is not None:
            return i
        tried.add(size)
    return None


def spare(nodes: Sequence[Node], evaluating: bool) -> Size:
    """What is kept free for evaluation: a core, and a GPU as long as there is something to evaluate."""
    return Size(1, 1, int(evaluating and any(node.gpus for node in nodes)))


def at_once(sizes: Sequence[Size], nodes: Sequence[Node], most: int | None = None) -> list[Size]:
    """The trials that run at once to begin with, where all of them wait."""
    waiting, running = list(sizes), list[Size]()
    while (i := admit(waiting, running, nodes, spare=spare(nodes, False), most=most)) is not None:
        running.append(waiting.pop(i))
    return running


def nodes_in_use(sizes: Sequence[Size], nodes: Sequence[Node], most: int | None = None) -> list[int]:
    """Which of the nodes those trials lie on: those that a cluster which grows by what is asked of it would have."""
    left = _packed(at_once(sizes, nodes, most), nodes)
    return [i for i, (before, after) in enumerate(zip(nodes, left, strict=True)) if before != after]


def _room(size: Size, node: Node) -> int:
    """How many workers of the trial the node holds."""
    fit = math.floor(node.cpus / size.cpus + 1e-9) if size.cpus else size.workers
    if size.gpus:
        fit = min(fit, math.floor(node.gpus / size.gpus + 1e-9))
    return max(0, fit)


def _beside_driver(size: Size, node: Node) -> Node:
    """What the driver of the trial leaves of the node; one of a single worker is itself the driver."""
    return Node(node.cpus - (DRIVER_CPUS if size.workers > 1 else 0), node.gpus)


def _packed(sizes: Sequence[Size], nodes: Sequence[Node]) -> list[Node]:
    """What is left of the nodes beside the trials, the biggest placed first. One that finds no place takes what there
    is, so that nothing else is started in its stead."""
    free = list(nodes)
    for size in sorted(sizes, key=lambda size: size.order, reverse=True):
        free = _place(size, free, in_one_node(size, nodes)) or _spread(size, free)
    return free


def _place(size: Size, free: list[Node], together: bool) -> list[Node] | None:
    """What is left of the nodes after the trial has its place; None where it has none."""
    if together:
        fitting = [i for i, node in enumerate(free) if _room(size, _beside_driver(size, node)) >= size.workers]
        if not fitting:
            return None
        best = min(fitting, key=lambda i: (free[i].gpus, free[i].cpus))  # the fullest that holds it
        taken = _less(_beside_driver(size, free[best]), size, size.workers)
        return [taken if i == best else node for i, node in enumerate(free)]
    return _spread(size, free) if can_hold(size, free) else None


def _spread(size: Size, free: list[Node]) -> list[Node]:
    """The trial over as few nodes as there must be: the emptiest first."""
    left, workers = list(free), size.workers
    for i in sorted(range(len(free)), key=lambda i: _room(size, free[i]), reverse=True):
        here = min(workers, _room(size, free[i]))
        left[i] = _less(free[i], size, here)
        workers -= here
    if left:
        driver = max(range(len(left)), key=lambda i: left[i].cpus)
        left[driver] = _beside_driver(size, left[driver])
    return left


def _less(node: Node, size: Size, workers: int) -> Node:
    return Node(node.cpus - workers * size.cpus, node.gpus - workers * size.gpus)


# ---- How long it takes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A trial to come: the seconds that its workers train and validate, and those of a core or GPU to measure it."""

    size: Size
    training_s: float
    evaluation_s: float


def makespan(works: Sequence[Work], nodes: Sequence[Node], cores: float, most: int | None = None) -> float:
    """Seconds until all is trained and measured, by the rules of `admit`; evaluation takes what training leaves.

    Where the nodes have GPUs, those are what work takes, else `cores`: fewer than the nodes say on a laptop, where one
    logical core is added for evaluation. As soon as more runs than there are cores, all of it is that much slower.
    """
    on_gpus = any(node.gpus for node in nodes)
    total = sum(node.gpus if on_gpus else node.cpus for node in nodes)
    units = total if on_gpus else cores
    waiting, running, left, pool, now = list(works), list[Work](), list[float](), 0.0, 0.0
    while True:
        while (i := _next(waiting, running, nodes, pool > 0, most)) is not None:
            running.append(waiting.pop(i))
            left.append(running[-1].training_s)
        busy = sum(w.size.workers * (w.size.gpus if on_gpus else w.size.cpus) for w in running)
        measuring = max(0.0, total - busy) if pool > 0 else 0.0
        if not busy and not measuring:
            return now
        rate = min(1.0, units / (busy + measuring))
        step = min([*(s / rate for s in left), *([pool / (measuring * rate)] if measuring else [])])
        now += step
        pool = max(0.0, pool - step * rate * measuring)
        pool = 0.0 if pool < 1e-9 else pool
        left = [s - step * rate for s in left]
        pool += sum(w.evaluation_s for w, s in zip(running, left, strict=True) if s < 1e-9)
        running = [w for w, s in zip(running, left, strict=True) if s >= 1e-9]
        left = [s for s in left if s >= 1e-9]


def _next(
    waiting: Sequence[Work], running: Sequence[Work], nodes: Sequence[Node], measuring: bool, most: int | None
) -> int | None:
    sizes, busy = [w.size for w in waiting], [w.size for w in running]
    return admit(sizes, busy, nodes, spare=spare(nodes, measuring), most=most)
