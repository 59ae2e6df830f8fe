"""Which trial starts next, and where it fits: pure functions of what the machines have."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from workers.config import BLOCK_GPUS, DRIVER_CPUS, TrainingConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """What a machine has, or has left."""

    cpus: float
    gpus: float  # whole ones
    shared: tuple[float, ...] = ()  # and what is left of each of those that trials have a part of


@dataclass(frozen=True)
class Size:
    """What a trial takes: its workers, and the cores and GPUs of each."""

    workers: int = 1
    cpus: float = 1
    gpus: float = 0

    @staticmethod
    def of(training: TrainingConfig, gpus: float) -> "Size":
        return Size(training.workers, training.cpus, gpus)

    @property
    def order(self) -> tuple[float, float]:
        """The bigger the size, the bigger this: by GPUs, then by cores."""
        return self.workers * self.gpus, self.workers * self.cpus

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU{'s' * (self.cpus != 1)} and {self.gpus:g} GPU{'s' * (self.gpus != 1)}"
        return f"{self.workers} worker{'s' * (self.workers != 1)} of {each}"


class Queue(Generic[T]):
    """What waits for a place, in its order. Thousands of trials have few sizes, and a choice looks at those alone."""

    def __init__(self, items: Iterable[tuple[Size, T]] = ()) -> None:
        self._items: dict[Size, deque[tuple[int, T]]] = {}
        self._added = 0
        for size, item in items:
            self.add(size, item)

    def add(self, size: Size, item: T) -> None:
        self._items.setdefault(size, deque()).append((self._added, item))
        self._added += 1

    def take(self, size: Size) -> T:
        """The first that waits of this size, which no longer does."""
        _, item = self._items[size].popleft()
        if not self._items[size]:
            del self._items[size]
        return item

    def take_all(self) -> list[T]:
        """All that waits, in order; nothing does any more."""
        items = sorted((each for items in self._items.values() for each in items), key=lambda each: each[0])
        self._items.clear()
        return [item for _, item in items]

    @property
    def sizes(self) -> list[Size]:
        """The different sizes that wait, in the order of the first of each: what `admit` is asked."""
        return sorted(self._items, key=lambda size: self._items[size][0][0])

    def __bool__(self) -> bool:
        return bool(self._items)


def fits_one_node(size: Size, nodes: Sequence[Node]) -> bool:
    """Whether some node, empty, holds all workers of the trial: they then train inside of one."""
    return any(_count_room(size, _subtract_driver(size, node)) >= size.workers for node in nodes)


def can_hold(size: Size, nodes: Sequence[Node]) -> bool:
    """Whether the empty nodes hold the trial at all, in one or over several, wherever Ray puts its driver."""
    rooms = [_count_room(size, node) for node in nodes]
    lost = [
        room - _count_room(size, beside)
        for room, node in zip(rooms, nodes, strict=True)
        if (beside := _subtract_driver(size, node)).cpus >= 0
    ]
    return bool(lost) and sum(rooms) - max(lost) >= size.workers


def list_never_fitting(sizes: Iterable[Size], nodes: Sequence[Node]) -> list[str]:
    """A line for each size that the nodes never hold."""
    wrong = [size for size in dict.fromkeys(sizes) if not can_hold(size, nodes)]
    return [f"{_name_cause(size, nodes)}: {size} never fit a cluster of {describe_nodes(nodes)}" for size in wrong]


def _name_cause(size: Size, nodes: Sequence[Node]) -> str:
    """The setting that asks for too much."""
    if size.gpus > max((node.gpus for node in nodes), default=0):
        return "training.gpus"
    return "training.cpus" if size.cpus > max((node.cpus for node in nodes), default=0) else "training.workers"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """4 nodes of 32 CPUs and 8 GPUs, 1 node of 4 CPUs."""
    texts = []
    for node, n in Counter(nodes).items():
        gpus = f" and {node.gpus:g} GPU{'s' * (node.gpus != 1)}" if node.gpus else ""
        texts.append(f"{n} node{'s' * (n != 1)} of {node.cpus:g} CPU{'s' * (node.cpus != 1)}{gpus}")
    return ", ".join(texts) or "no nodes"


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
    nothing runs, the biggest starts in any case: a cluster that can grow sees by it what is needed. Only an evaluation
    that needs the last GPU has its turn first, so that results come from the first trial on.
    """
    if not waiting or (most is not None and len(running) >= most):
        return None
    by_size = sorted(range(len(waiting)), key=lambda i: waiting[i].order, reverse=True)
    if not running and not (spare and spare.gpus):
        return by_size[0]
    free = {
        kept: _pack([*running, *([kept] if kept else [])], nodes)
        for kept in {_reserve_beside(s, spare) for s in waiting}
    }
    tried: set[Size] = set()
    for i in by_size:
        size = waiting[i]
        if stuck and size.order < stuck.order:
            return None
        if (
            size not in tried
            and _place(size, free[_reserve_beside(size, spare)], fits_one_node(size, nodes)) is not None
        ):
            return i
        tried.add(size)
    return None


def reserve_spare(nodes: Sequence[Node], evaluating: bool) -> Size:
    """What is kept free for evaluation: a core, and a GPU as long as there is something to evaluate."""
    return Size(1, 1, int(evaluating and any(node.gpus for node in nodes)))


def _reserve_beside(size: Size, spare: Size | None) -> Size | None:
    """What is kept free beside a trial of that size. Trials that take no more of a GPU than a block of evaluation
    leave one block its part of a GPU from the start: the first of them to end is then measured beside the others."""
    if spare and not spare.gpus and 0 < size.gpus <= BLOCK_GPUS:
        return replace(spare, gpus=BLOCK_GPUS)
    return spare


def admit_at_once(sizes: Sequence[Size], nodes: Sequence[Node], most: int | None = None) -> list[Size]:
    """The trials that run at once to begin with, where all of them wait."""
    waiting, running = Queue((size, size) for size in sizes), list[Size]()
    while (
        i := admit(kinds := waiting.sizes, running, nodes, spare=reserve_spare(nodes, False), most=most)
    ) is not None:
        running.append(waiting.take(kinds[i]))
    return running


def find_nodes_in_use(sizes: Sequence[Size], nodes: Sequence[Node], most: int | None = None) -> list[int]:
    """Which of the nodes those trials lie on: those that a cluster which grows by what is asked of it would have."""
    left = _pack(admit_at_once(sizes, nodes, most), nodes)
    return [i for i, (before, after) in enumerate(zip(nodes, left, strict=True)) if before != after]


def _count_room(size: Size, node: Node) -> int:
    """How many workers of the trial the node holds."""
    fit = math.floor(node.cpus / size.cpus + 1e-9) if size.cpus else size.workers
    if 0 < size.gpus < 1:  # Ray places a part of a GPU on one GPU, whatever is left of all of them together
        fit = min(
            fit,
            sum(_count_times(size.gpus, left) for left in node.shared) + int(node.gpus) * _count_times(size.gpus, 1),
        )
    elif size.gpus:
        fit = min(fit, math.floor(node.gpus / size.gpus + 1e-9))
    return max(0, fit)


def _count_times(part: float, whole: float) -> int:
    """How often the part is in the whole: 3 for 0.3 in 1, and 10 for 0.1."""
    return math.floor(whole / part + 1e-6)


def _subtract_driver(size: Size, node: Node) -> Node:
    """What the driver of the trial leaves of the node; one of a single worker is itself the driver."""
    return replace(node, cpus=node.cpus - (DRIVER_CPUS if size.workers > 1 else 0))


def _pack(sizes: Sequence[Size], nodes: Sequence[Node]) -> list[Node]:
    """What is left of the nodes beside the trials, the biggest placed first. One that finds no place takes what there
    is, so that nothing else is started in its stead."""
    free = list(nodes)
    for size in sorted(sizes, key=lambda size: size.order, reverse=True):
        free = _place(size, free, fits_one_node(size, nodes)) or _spread(size, free)
    return free


def _place(size: Size, free: list[Node], together: bool) -> list[Node] | None:
    """What is left of the nodes after the trial has its place; None where it has none."""
    if together:
        fitting = [i for i, node in enumerate(free) if _count_room(size, _subtract_driver(size, node)) >= size.workers]
        if not fitting:
            return None
        best = min(fitting, key=lambda i: (free[i].gpus, sum(free[i].shared), free[i].cpus))  # the fullest of them
        taken = _subtract(_subtract_driver(size, free[best]), size, size.workers)
        return [taken if i == best else node for i, node in enumerate(free)]
    return _spread(size, free) if can_hold(size, free) else None


def _spread(size: Size, free: list[Node]) -> list[Node]:
    """The trial over as few nodes as there must be: the emptiest first."""
    left, workers = list(free), size.workers
    for i in sorted(range(len(free)), key=lambda i: _count_room(size, free[i]), reverse=True):
        here = min(workers, _count_room(size, free[i]))
        left[i] = _subtract(free[i], size, here)
        workers -= here
    if left:
        driver = max(range(len(left)), key=lambda i: left[i].cpus)
        left[driver] = _subtract_driver(size, left[driver])
    return left


def _subtract(node: Node, size: Size, workers: int) -> Node:
    cpus = node.cpus - workers * size.cpus
    if not 0 < size.gpus < 1:
        return replace(node, cpus=cpus, gpus=node.gpus - workers * size.gpus)
    gpus, shared = node.gpus, list(node.shared)
    for _ in range(workers):  # as Ray does: on the fullest GPU that has room
        fitting = [left for left in shared if _count_times(size.gpus, left)]
        if fitting:
            shared.remove(min(fitting))
        else:
            gpus -= 1
        shared.append(round(min(fitting, default=1.0) - size.gpus, 4))
    return Node(cpus, gpus, tuple(sorted(shared)))
