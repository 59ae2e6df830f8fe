"""The tasks of evaluation: what Ray calls to make a feature space, a block or a summary.

Each finds its work in an `Order` and its files in the storage.
"""

import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import torch

from workers.bundles import look_in
from workers.config import BLOCK_GPUS, Measurement
from workers.data.dataset import prepare
from workers.data.locate import make_absolute
from workers.evaluation.blocks import Block, Images, list_blocks, name_summary
from workers.evaluation.make import Bench, find_unusable, make
from workers.evaluation.rates import Stage
from workers.evaluation.summary import summarise
from workers.jobs import choose_device
from workers.kinds import DENOISER
from workers.layout import REFERENCES, name_evaluation_folder
from workers.network.averages import measure_error
from workers.network.checkpoint import load_process
from workers.network.manifest import Checkpoint
from workers.ray_private import count_attempts
from workers.sharing import free_memory, is_out_of_memory
from workers.signs import tell_within
from workers.speed import Meter, Spent
from workers.storage import Storage

PAUSES_S = (5, 20, 60)  # of a block whose GPU is full, before it tries again
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """An evaluation as it crosses processes: where to write, what to measure, of which checkpoint, on how much GPU."""

    storage: str
    measurement: str  # as JSON
    checkpoint: Checkpoint
    gpus: float
    until: float | None = None  # in seconds since the epoch: no block is begun later, as it would not be done in time

    @property
    def m(self) -> Measurement:
        return Measurement.model_validate_json(self.measurement)


def make_order(
    storage: Storage, m: Measurement, checkpoint: Checkpoint, gpus: float, *, until: float | None = None
) -> Order:
    m = m.model_copy(update={"data": make_absolute(m.data)})
    return Order(storage.root, m.model_dump_json(), checkpoint, gpus, until)


@ray.remote(max_retries=3)
def make_space(order: Order) -> list[str]:
    """Makes the feature space of the order's data set where it is learned and not there yet; fails where it cannot be.

    Returns what was warned of meanwhile, such as damage: nobody reads the log of this process.
    """
    heard = _Heard(logging.WARNING)
    logging.getLogger("workers").addHandler(heard)
    try:
        with tell_within("the feature space of an evaluation"):
            _ = _load_bench(order).space
    finally:
        free_memory()
        logging.getLogger("workers").removeHandler(heard)
    return heard.messages


class _Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclass(frozen=True)
class Made:
    """What making a block took."""

    hardware: str
    spent: Spent
    attempts: int  # how often Ray began it: again where the process died, or the machine
    again: dict[Block, str]  # what it needs, was damaged and is made again, and what was wrong with it
    waits: int  # how often its GPU was full


@ray.remote(max_retries=3)
def make_block(order: Order, block: Block, *after: Any) -> Made | None:
    """Makes one block of an evaluation. A process that dies is retried; the block is then whole.

    None where it was not begun, as the time of the driver's job is over soon.
    """
    with tell_within(block.path) as pulse:
        if pulse.is_asked_to_pause or (order.until and time.time() > order.until) or None in after:
            return None
        bench = _load_bench(order)
        meter = Meter(bench.device, share=BLOCK_GPUS)
        again, waits = _make_with_room(bench, block, meter)
    return Made(meter.hardware, meter.spent, count_attempts(), again, waits)


def _make_with_room(bench: Bench, block: Block, meter: Meter) -> tuple[dict[Block, str], int]:
    """As `make`; where the GPU is full of others' tensors it waits, and tries again. Also how often it has waited."""
    waits = 0
    while True:
        try:
            with meter.measure(block.kind, 1):
                return make(bench, block), waits
        except RuntimeError as error:
            if waits == len(PAUSES_S) or not is_out_of_memory(error):
                raise
        finally:
            free_memory()  # others may take it while this process waits
        time.sleep(PAUSES_S[waits])
        waits += 1


@ray.remote(max_retries=3)
def make_summary(order: Order, *after: Any) -> tuple[int, dict[Block, str]] | None:
    """Writes the summary of an evaluation whose blocks are there; nothing where some were not begun.

    Returns how often Ray began it, and the blocks that turned out to be damaged, with what was wrong, and were removed:
    with them made again it can be called again.
    """
    if None in after:
        return None
    with tell_within("the summary of an evaluation"):
        bench = _load_bench(order)
        images, digest = Images.of(bench.dataset), order.checkpoint.digest
        space = bench.space if bench.m.evaluation.fid else None
        if unusable := find_unusable(bench.storage, list_blocks(bench.m, digest, images), space):
            return count_attempts(), unusable
        process = load_process(order.checkpoint) if bench.m.family == DENOISER else Stage.of(order.checkpoint)
        summary = summarise(bench.storage, bench.m, bench.dataset, process, digest, space=space)
        if (width := order.checkpoint.width) is not None:
            summary["average"] = measure_error(order.checkpoint, width)
        bench.storage.write_sealed(name_summary(bench.m, digest, images), summary)
        for folder in (name_evaluation_folder(digest), REFERENCES):
            bench.storage.remove_leftovers(folder)
    return count_attempts(), {}


@ray.remote(num_cpus=0, max_retries=0)
def sees(storage: str, path: str) -> bool:
    """Whether the node that runs this has the file `path` of the storage."""
    return Storage(storage).exists(path)


@lru_cache(maxsize=2)
def _load_bench(order: Order) -> Bench:
    """What a process that makes many blocks of one evaluation loads once."""
    torch.set_num_threads(1)
    storage = Storage(order.storage)
    look_in(storage)  # for code from outside, which the driver knows already
    return Bench(storage, order.m, prepare(order.m.data), order.checkpoint, choose_device(order.gpus))
