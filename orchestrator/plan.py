"""What must run: pure functions of what the experiment asks for and what the storage holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.blocks import Block
from workers.config import TrainingConfig, digest

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

DRIVER_CPUS = 0.01  # of the process that leads the workers of a data-parallel trial


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
    return any(_room(size, node) >= size.workers for node in nodes)


def can_hold(size: Size, nodes: Sequence[Node]) -> bool:
    """Whether the empty nodes hold the trial at all, in one or over several."""
    return sum(_room(size, node) for node in nodes) >= size.workers


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


def at_once(sizes: Sequence[Size], nodes: Sequence[Node], most: int | None = None) -> int:
    """How many of the trials run at once where all of them wait."""
    waiting, running = list(sizes), list[Size]()
    while (i := admit(waiting, running, nodes, spare=spare(nodes, False), most=most)) is not None:
        running.append(waiting.pop(i))
    return len(running)


def _room(size: Size, node: Node) -> int:
    """How many workers of the trial the node holds."""
    cpus = node.cpus - (DRIVER_CPUS if size.workers > 1 else 0)
    fit = math.floor(cpus / size.cpus + 1e-9) if size.cpus else size.workers
    if size.gpus:
        fit = min(fit, math.floor(node.gpus / size.gpus + 1e-9))
    return max(0, fit)


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
        fitting = [i for i, node in enumerate(free) if _room(size, node) >= size.workers]
        if not fitting:
            return None
        best = min(fitting, key=lambda i: (free[i].gpus, free[i].cpus))  # the fullest that holds it
        return [_less(node, size, size.workers) if i == best else node for i, node in enumerate(free)]
    return _spread(size, free) if can_hold(size, free) else None


def _spread(size: Size, free: list[Node]) -> list[Node]:
    """The trial over as few nodes as there must be: the emptiest first."""
    left, workers = list(free), size.workers
    for i in sorted(range(len(free)), key=lambda i: _room(size, free[i]), reverse=True):
        here = min(workers, _room(size, free[i]))
        left[i] = _less(free[i], size, here)
        workers -= here
    return left


def _less(node: Node, size: Size, workers: int) -> Node:
    driver = DRIVER_CPUS if size.workers > 1 and workers else 0
    return Node(node.cpus - workers * size.cpus - driver, node.gpus - workers * size.gpus)
