"""How long the work takes on some machines: a simulation by the rules of `place`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.place import Node, Queue, Size, admit, reserve_spare


@dataclass(frozen=True)
class Work:
    """A trial to come: the seconds that its workers train and validate, and those of a core or GPU to measure it."""

    size: Size
    training_s: float
    evaluation_s: float


def compute_makespan(works: Sequence[Work], nodes: Sequence[Node], cores: float, most: int | None = None) -> float:
    """Seconds until all is trained and measured, by the rules of `admit`; evaluation takes what training leaves.

    Where the nodes have GPUs, those are what work takes, else `cores`: fewer than the nodes say on a laptop, where one
    logical core is added for evaluation. As soon as more runs than there are cores, all of it is that much slower.
    """
    on_gpus = any(node.gpus for node in nodes)
    total = sum(node.gpus if on_gpus else node.cpus for node in nodes)
    units = total if on_gpus else cores
    waiting, running, left, pool, now = Queue((w.size, w) for w in works), list[Work](), list[float](), 0.0, 0.0
    choices: dict[Any, Size | None] = {}  # by the state, which comes again and again where trials have few sizes
    while True:
        while True:
            kinds, sizes = waiting.sizes, [w.size for w in running]
            state = (tuple(kinds), frozenset(Counter(sizes).items()), pool > 0)
            if state not in choices:
                i = admit(kinds, sizes, nodes, spare=reserve_spare(nodes, pool > 0), most=most)
                choices[state] = None if i is None else kinds[i]
            if (size := choices[state]) is None:
                break
            running.append(waiting.take(size))
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
