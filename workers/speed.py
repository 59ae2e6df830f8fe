"""How fast this hardware does the work of a trial: measured in passing by whatever does it, or beforehand.

Work is counted in evaluations of the network, an image at a time (of training: a forward and a backward), in images
for features, and in pieces for the rest. Its seconds are those of one core (CPU time, so that neighbours do not count)
or of one GPU. Importing this module does not import torch.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers.config import ModelConfig, TrainingConfig, digest

Spent = dict[str, tuple[float, float]]  # by kind of work: how much of it, and its seconds
CORE = " core"  # how names of hardware end that is no GPU


def hardware(device: Any = None) -> str:
    """The name of the GPU, or of a core of the processor."""
    if device is not None and device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    names = (line.partition(":")[2].strip() for line in (info.read_text() if info.exists() else "").splitlines()
             if line.startswith("model name"))  # fmt: skip
    return (next(names, "") or platform.processor() or platform.machine()) + CORE


def model_key(model: ModelConfig, training: TrainingConfig, shape: tuple[int, ...]) -> str:
    """What the speed of a network depends on, beside the hardware."""
    return digest([model.model_dump(mode="json"), training.precision, list(shape)])


def training_kind(training: TrainingConfig) -> str:
    """The name of training work; it counts the images of one worker."""
    return f"training-{training.workers}x{training.batch_size // training.workers}"


class Meter:
    """Adds up what work of each kind took in this process."""

    def __init__(self, device: Any, share: float = 1.0) -> None:
        self.hardware, self.spent = hardware(device), dict[str, tuple[float, float]]()
        self.now = time.monotonic if device.type == "cuda" else time.process_time
        self._share = share if device.type == "cuda" else 1.0

    @contextmanager
    def of(self, kind: str, count: float) -> Iterator[None]:
        """Measures the block as so much work."""
        started = self.now()
        yield
        self.add(kind, count, self.now() - started)

    def add(self, kind: str, count: float, seconds: float) -> None:
        """`seconds` by the meter's clock; with a `share` of a GPU they are so much less of its time."""
        self.spent = added(self.spent, {kind: (count, seconds * self._share)})


def added(one: Spent, other: Spent) -> Spent:
    total = dict(one)
    for kind, (count, seconds) in other.items():
        before = total.get(kind, (0.0, 0.0))
        total[kind] = before[0] + count, before[1] + seconds
    return total
