"""Evaluation blocks to Ray tasks, on whatever the training leaves free."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.clusters.cluster import Cluster
from orchestrator.execution.session import list_nodes_ever, shorten_reason
from workers.config import BLOCK_GPUS, DataConfig
from workers.disk import Unwritable
from workers.evaluation.blocks import Block
from workers.speed import Spent, add_spent
from workers.tasks import Order, make_block, make_space, make_summary

# So many tasks for each that can run keep the cluster busy: of the two about one waits for another's result.
TASKS_A_SLOT = 2
BLOCK_CPUS = 0.9  # not a whole one: the drivers of data-parallel trials take a little of the core that is kept free


@dataclass
class _Evaluation:
    order: Order
    planned: list[Block]
    blocks: Mapping[Any, str]  # the path of each task's block
    summary: Any  # the task at the end, which waits for all blocks
    left: set[Any]
    failed: str = ""


# Kinds of blocks that measurements of one checkpoint, or on one data set, have in common: while one makes them, the
# others wait for them.
SHARED = ("nll", "ode_nll", "samples", "reference")


@dataclass
class Evaluations:
    """Evaluations, each under a name: `submit` takes one, `poll` starts them in turn and tells which have ended.

    Ray has no order among tasks: of many evaluations it would make a piece of each, and all would end at the end. So
    one is started where the tasks of those before it no longer keep the cluster busy, as far as `cluster` says that it
    can grow.
    """

    cluster: Cluster | None = None
    _waiting: dict[str, tuple[Order, list[Block], list[Block]]] = field(default_factory=dict)
    _open: dict[str, _Evaluation] = field(default_factory=dict)
    _owner: dict[Any, str] = field(default_factory=dict)  # the evaluation of each task in flight
    _spaces: dict[tuple[DataConfig, str], Any] = field(default_factory=dict)
    _asking: dict[Any, str] = field(default_factory=dict)  # the evaluation that each space is made for first
    _shared: dict[str, Any] = field(default_factory=dict)  # blocks that several evaluations may need, by path
    spent: dict[str, dict[str, Spent]] = field(default_factory=dict)  # what blocks took, by evaluation and hardware
    late: set[str] = field(default_factory=set)  # evaluations with blocks that were not begun, for want of time
    retried: list[tuple[str, str, str]] = field(default_factory=list)  # (name, piece of work, why) of what was redone

    def submit(self, name: str, order: Order, planned: list[Block], missing: list[Block]) -> None:
        """Takes an evaluation of which these of the `planned` blocks are `missing`; the summary comes after them."""
        self._waiting[name] = order, planned, missing
        self._start_some()

    def _start_some(self) -> None:
        """Starts those that wait, the first of them first, until the cluster is busy."""
        while self._waiting:
            name, evaluation = next(iter(self._waiting.items()))
            if len(self._owner) >= TASKS_A_SLOT * self._count_at_once(evaluation[0]):
                return
            del self._waiting[name]
            self._start(name, *evaluation)

    def _count_at_once(self, order: Order) -> float:
        """How many tasks of the evaluation the cluster can run at once, where nothing else runs."""
        nodes = list_nodes_ever(self.cluster)
        slots = sum(n.gpus for n in nodes) / BLOCK_GPUS if order.gpus else sum(n.cpus for n in nodes) / BLOCK_CPUS
        return max(1.0, slots)

    def _start(self, name: str, order: Order, planned: list[Block], missing: list[Block]) -> None:
        options = _make_options(order)
        space = self._make_space(name, order)
        made: dict[str, Any] = {}
        others = []  # what another evaluation on the same data is making
        for block in missing:
            if block.path in self._shared:
                others.append(self._shared[block.path])
                continue
            after = [ref for b in block.needs if (ref := made.get(b.path, self._shared.get(b.path))) is not None]
            after += [space] if space is not None and block.kind in ("features", "reference") else []
            made[block.path] = make_block.options(**options).remote(order, block, *after)
            if block.kind in SHARED:
                self._shared[block.path] = made[block.path]
        paths = {ref: path for path, ref in made.items()}
        summary = make_summary.options(**options).remote(order, *paths, *others)
        self._open[name] = _Evaluation(order, planned, paths, summary, {*paths, summary})
        self._owner |= dict.fromkeys(paths, name) | {summary: name}

    def _make_space(self, name: str, order: Order) -> Any:
        """The feature space of a data set is made once, before the blocks that use it."""
        if not order.m.evaluation.fid:
            return None
        key = (order.m.data, order.m.evaluation.fid.features)
        if key not in self._spaces:
            self._spaces[key] = make_space.options(**_make_options(order)).remote(order)
            self._asking[self._spaces[key]] = name
        return self._spaces[key]

    def __len__(self) -> int:
        return len(self._open) + len(self._waiting)

    def forget(self) -> None:
        """Lets go of all tasks, before their Ray ends: what refers to one later may end the process."""
        for kept in (self._waiting, self._open, self._owner, self._spaces, self._asking, self._shared):
            kept.clear()

    def count_left(self, name: str) -> int:
        """Blocks of an evaluation still to come."""
        if name in self._waiting:
            return len(self._waiting[name][2])
        return max(0, len(self._open[name].left) - 1) if name in self._open else 0

    def poll(self, timeout_s: float = 0) -> list[tuple[str, str]]:
        """(name, what failed or "") of each evaluation that has ended since, its summary written if nothing failed.

        Those that are `late` are not told. Raises Unwritable where the storage could not be written, which would fail
        all others, too.
        """
        if self._owner:
            ready, _ = ray.wait(list(self._owner), num_returns=len(self._owner), timeout=timeout_s)
            for ref in ready:
                self._take(ref)
            self._hear_spaces()
        ended = {name: e for name, e in self._open.items() if not e.left}
        for name in ended:
            del self._open[name]
        self._start_some()
        return [(name, e.failed) for name, e in ended.items() if e.failed or name not in self.late]

    def _hear_spaces(self) -> None:
        """Notes what happened as feature spaces were made. The blocks that need one tell that it could not be made."""
        for ref in ray.wait(list(self._asking), num_returns=len(self._asking), timeout=0)[0] if self._asking else []:
            name = self._asking.pop(ref)
            with suppress(ray.exceptions.RayError):
                self.retried += [(name, "the feature space", text) for text in ray.get(ref)]

    def _take(self, ref: Any) -> None:
        name = self._owner.pop(ref)
        evaluation = self._open[name]
        evaluation.left.discard(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:  # of the task, or of the machine that it ran on
            if isinstance(cause := getattr(error, "cause", None), Unwritable):
                raise cause from None
            evaluation.failed = evaluation.failed or shorten_reason(error)
            self._shared = {path: other for path, other in self._shared.items() if other != ref}
            # The summary fails by itself, and others may wait for what is shared.
            for other in evaluation.left - {evaluation.summary} - set(self._shared.values()):
                ray.cancel(other)
            return
        if result is None:
            self.late.add(name)
            return
        if ref != evaluation.summary:
            spents = self.spent.setdefault(name, {})
            spents[result.hardware] = add_spent(spents.get(result.hardware, {}), result.spent)
            if result.waits:
                why = "its GPU was full; it waited, and was made when there was room"
                self.retried.append((name, evaluation.blocks[ref], why))
            self._note_redone(name, evaluation.blocks[ref], result.attempts, result.again)
            return
        attempts, damaged = result
        self._note_redone(name, "the summary", attempts, damaged)
        if damaged:
            for block in damaged:
                self._shared.pop(block.path, None)
            self._start(name, evaluation.order, evaluation.planned, list(damaged))

    def _note_redone(self, name: str, piece: str, attempts: int, again: Mapping[Block, str]) -> None:
        """Notes what a task says of faults: Ray began it more than once, or blocks were damaged."""
        if attempts > 1:
            why = f"its process or its machine died; Ray ran it again, and attempt {attempts} made it"
            self.retried.append((name, piece, why))
        self.retried += [(name, block.path, f"{why}; it is made again") for block, why in again.items()]

    def take_retried(self) -> list[tuple[str, str, str]]:
        """(name, piece of work, why) of all that was made again since the last call."""
        retried, self.retried = self.retried, []
        return retried


def _make_options(order: Order) -> dict[str, float]:
    """What a task of an evaluation asks of the node it runs on."""
    return {"num_cpus": BLOCK_CPUS, "num_gpus": BLOCK_GPUS if order.gpus else 0}
