"""How fast this hardware does the work of a trial: measured in passing by whatever does it, or beforehand.

Work is counted in evaluations of the network, an image at a time (of training: a forward and a backward), in images
for features, and in pieces for the rest. Its seconds are those of one core (CPU time, so that neighbours do not count)
or of one GPU. Importing this module does not import torch.
"""

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from workers.config import ModelConfig, TrainingConfig
from workers.identity import compute_digest

Spent = dict[str, tuple[float, float]]  # by kind of work: how much of it, and its seconds
CORE = " core"  # how names of hardware end that is no GPU


def name_hardware(device: Any = None) -> str:
    """The name of the GPU, or of a core of the processor."""
    if device is not None and device.type != "cpu":
        import torch

        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    names = (line.partition(":")[2].strip() for line in (info.read_text() if info.exists() else "").splitlines()
             if line.startswith("model name"))  # fmt: skip
    return (next(names, "") or platform.processor() or platform.machine()) + CORE


def wait_for(device: Any) -> None:
    """Waits until a GPU has done what it was told; it is told more, and faster, than it does."""
    if device.type != "cpu":
        import torch

        torch.cuda.synchronize(device)


def count_cores() -> int:
    """How many cores of this machine this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_model_key(
    model: ModelConfig, training: TrainingConfig, shape: tuple[int, ...], measured_in: str = "float32"
) -> str:
    """What the speed of a network depends on, beside the hardware; it is `measured_in` the evaluation's precision."""
    how = [word for word, default in ((training.compile, "auto"), (measured_in, "float32")) if word != default]
    return _make_model_key(model, (training.precision, *how), shape)


@lru_cache
def _make_model_key(model: ModelConfig, precisions: tuple[str, ...], shape: tuple[int, ...]) -> str:
    return compute_digest([model.model_dump(mode="json"), *precisions, list(shape)])


def name_training_kind(training: TrainingConfig) -> str:
    """The name of training work; it counts the images of one worker."""
    return f"training-{training.workers}x{training.batch_size // training.workers}"


class Meter:
    """Adds up what work of each kind took in this process."""

    def __init__(self, device: Any, share: float = 1.0) -> None:
        self.hardware, self.spent = name_hardware(device), dict[str, tuple[float, float]]()
        self.now = time.monotonic if device.type != "cpu" else time.process_time
        self._share = share if device.type != "cpu" else 1.0

    @contextmanager
    def measure(self, kind: str, count: float) -> Iterator[None]:
        """Measures the block as so much work."""
        started = self.now()
        yield
        self.add(kind, count, self.now() - started)

    def add(self, kind: str, count: float, seconds: float) -> None:
        """`seconds` by the meter's clock; with a `share` of a GPU they are so much less of its time."""
        self.spent = add_spent(self.spent, {kind: (count, seconds * self._share)})


class Stopwatch:
    """The seconds of a trial on the clock, by kind of work: every moment counts for the kind that was named last.

    Begins with `waiting`: the start of the process' work, and later every wait for the driver.
    """

    def __init__(self) -> None:
        self._kind, self._since = "waiting", time.monotonic()
        self._before, self._own = dict[str, float](), dict[str, float]()

    def turn_to(self, kind: str) -> None:
        now = time.monotonic()
        self._own[self._kind] = self._own.get(self._kind, 0.0) + now - self._since
        self._kind, self._since = kind, now

    def resume(self, seconds: Mapping[str, float]) -> None:
        """Goes on from a checkpoint that was made after `seconds`. What this process did beyond it is not in them; only
        that it has waited remains."""
        self.turn_to(self._kind)
        self._before, self._own = dict(seconds), {k: s for k, s in self._own.items() if k == "waiting"}

    @property
    def seconds(self) -> dict[str, float]:
        self.turn_to(self._kind)
        kinds = dict.fromkeys([*self._before, *self._own])
        return {kind: self._before.get(kind, 0.0) + self._own.get(kind, 0.0) for kind in kinds}


def add_spent(one: Spent, other: Spent) -> Spent:
    total = dict(one)
    for kind, (count, seconds) in other.items():
        before = total.get(kind, (0.0, 0.0))
        total[kind] = before[0] + count, before[1] + seconds
    return total
