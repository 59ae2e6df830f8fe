"""How much of a GPU a trial needs: measured in its first steps, and noted in the storage for others of its kind.

Trials are of one kind where their network, the size and precision of their batch and the name of their GPU are the
same. What is measured is the peak of a trial's memory and the part of the time in which its GPU is busy; so many trials
share a GPU as both allow. Importing this module does not import torch.
"""

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.speed import name_hardware, wait_for
from workers.storage import Storage

WARM_UP, MEASURED = 5, 20  # steps: after the first ones, so many are measured
MEASURED_S = 2.0  # of a GPU at least, as what it says of its use is a mean over up to a second
MOST = 8  # trials on one GPU
MARGIN = 1.25  # times the measured peak: the allocator keeps more than tensors take, and trials of a kind differ a bit
CONTEXT_BYTES = 2**29  # of a process on a GPU, beside its tensors
RAY_COUNTS = 10_000  # the least part of a resource that Ray tells from another
REMEASURED = "the next trial of its kind is measured again"


class NeedsLess(Exception):
    """The trial was measured to need no more than this part of a GPU, and others of its kind wait for the rest."""

    def __init__(self, share: float) -> None:
        super().__init__(share)
        self.share = share


# ---- What follows from measured numbers: pure functions -----------------------------------------------------------


def round_as_ray(gpus: float) -> float:
    """So much of a GPU as Ray takes it, which rounds to the fourth digit: down, so that 6 times a sixth is no more than
    one."""
    return math.floor(gpus * RAY_COUNTS + 1e-6) / RAY_COUNTS


def compute_memory_part(peak_bytes: float, total_bytes: float) -> float:
    """The part of a GPU's memory that a trial is to have, of which its tensors took `peak_bytes` at most."""
    return (peak_bytes * MARGIN + CONTEXT_BYTES) / total_bytes


def count_trials_a_gpu(memory: float | None, use: float | None) -> int:
    """How many trials share a GPU: the most that both the part of its memory and that of its time allow, which each
    needs. Where its use could not be measured memory alone decides, and without that nothing is shared."""
    if memory is None:
        return 1
    return max(1, min(MOST, *(math.floor(1 / part + 1e-6) for part in (memory, use) if part)))


def compute_share(memory: float | None, use: float | None) -> float:
    """The part of a GPU that a trial asks for."""
    return round_as_ray(1 / count_trials_a_gpu(memory, use))


def double_share(share: float) -> float:
    """What a trial asks for that ran out of memory with that part of a GPU."""
    return min(1.0, round_as_ray(2 * share))


def describe_share(share: float) -> str:
    names = {1.0: "a whole GPU", 0.5: "half a GPU", 0.3333: "a third of a GPU", 0.25: "a quarter of a GPU"}
    return names.get(share, f"{share:.2g} of a GPU")


def find_share(noted: Mapping[str, Mapping[str, Any]], types: Collection[str]) -> float | None:
    """The part of a GPU that a trial of a kind asks for, by what is noted of it for each name of a GPU.

    `types` are those of the cluster, as Ray has them (A100 of NVIDIA A100-SXM4-80GB). Where there are several it is the
    most that one of them asks for, as nobody knows on which the trial will lie; None where nothing is noted of one.
    """
    shares = {name: float(each["share"]) for name, each in noted.items()}
    of_types = [[share for name, share in shares.items() if _is_share(kind, name)] for kind in types] or [
        [*shares.values()]
    ]
    return max(max(found) for found in of_types) if all(of_types) else None


def _is_share(kind: str, name: str) -> bool:
    return set(kind.split("-")) <= set(name.replace("-", " ").split())


# ---- The note in the storage ----------------------------------------------------------------------------------


def read_share(storage: Storage, path: str, types: Collection[str]) -> float | None:
    return find_share(storage.read_sealed(path, REMEASURED) or {}, types)


def note_share(storage: Storage, path: str, name: str, share: float, **measured: Any) -> None:
    """Notes what a trial on the GPU of that name needs."""
    noted = storage.read_sealed(path, REMEASURED) or {}
    entry = {"share": share, "date": time.strftime("%Y-%m-%d"), **measured}
    storage.write_sealed(path, {**noted, name: {**noted.get(name, {}), **entry}})


def correct_share(storage: Storage, path: str, name: str, share: float) -> None:
    """Notes that a trial needs at least so much, as it ran out of memory with less."""
    noted = storage.read_sealed(path, REMEASURED) or {}
    note_share(storage, path, name, max(share, noted.get(name, {}).get("share", 0.0)), corrected=True)


# ---- Measuring ------------------------------------------------------------------------------------------------
# What these functions do with CUDA was not run where they were written: there was no GPU.


def forget_peak(device: Any) -> None:
    """The next peak is that of what comes now, and not of the trial that the process trained before."""
    if device.type != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def read_peak_memory(device: Any) -> tuple[int, int] | None:
    """The most bytes that this process' tensors took of the GPU, and those that it has; None without a GPU."""
    if device.type == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory


def read_utilisation(device: Any) -> float | None:
    """The part of the last moments in which the GPU was busy; None without one, or where it does not say so.

    NVIDIA's library says it of the whole GPU, so it is asked only by a trial that has one for itself.
    """
    if device.type == "cpu":
        return None
    import pynvml
    import torch

    try:
        return torch.cuda.utilization(device) / 100
    except pynvml.NVMLError:  # such as of a part of a GPU by MIG
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU was full: its allocator says so by a type of its own, a context or a library by its text alone."""
    import torch

    texts = "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    is_told = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return isinstance(error, torch.OutOfMemoryError) or is_told


def free_memory() -> None:
    """Frees what the allocator keeps for the next tensors: the process may wait while others need it."""
    import torch

    torch.cuda.empty_cache()  # does nothing where no GPU was used


@dataclass
class Gauge:
    """Measures a trial that has a GPU for itself, when it is called after each of its steps, and notes its share."""

    storage: Storage
    path: str  # of the note
    device: Any
    said_by: str
    makes_room: bool  # whether others of its kind wait: then the trial starts again with its share, where it is a part
    steps: int = 0
    used: list[float] = field(default_factory=list)
    until: float | None = None  # by the clock, at the earliest; None before the warm-up is over
    done: bool = False

    def __post_init__(self) -> None:
        forget_peak(self.device)

    def __call__(self) -> None:
        """Raises NeedsLess where the trial is to make room."""
        self.steps += 1
        if self.done or self.steps < WARM_UP:
            return
        if self.until is None:
            wait_for(self.device)
            self.until = time.monotonic() + (MEASURED_S if self.device.type != "cpu" else 0.0)
            return
        if (used := read_utilisation(self.device)) is not None:
            self.used.append(used)
        if self.steps >= WARM_UP + MEASURED and time.monotonic() >= self.until:
            self.done = True
            self._note()

    def _note(self) -> None:
        peak = read_peak_memory(self.device)
        memory = compute_memory_part(*peak) if peak else None
        use = sum(self.used) / len(self.used) if self.used else None
        share = compute_share(memory, use)
        of = self.storage, self.path, name_hardware(self.device), share
        note_share(*of, memory=memory, use=use, said_by=self.said_by)
        if self.makes_room and share < 1:
            raise NeedsLess(share)
