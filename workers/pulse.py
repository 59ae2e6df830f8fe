"""Signs of life of the processes that work for a command, so that it sees one that hangs and ends it.

A process tells from a thread of its own that it runs: a stopped one does not, nor one whose machine hangs. Beside that
it tells how many steps it has made, for a loop that waits for ever makes none. See `workers.tasks` for how it tells.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Pulse:
    """What a process tells of its work. Steps are all of a kind; what lies between them may take any time."""

    steps: int = 0
    slowest_s: float = 0.0  # of the steps
    between: bool = True  # no step is under way, or how long one takes is not known yet
    is_asked_to_pause: bool = False  # by the driver: what is under way is kept, and nothing begins
    _began: float = field(default_factory=time.monotonic)

    def begin_step(self) -> None:
        """A step is done, and the next one begins."""
        now = time.monotonic()
        if not self.between:
            self.slowest_s = max(self.slowest_s, now - self._began)
        self.steps, self.between, self._began = self.steps + 1, False, now

    def rest(self) -> None:
        """The next step does not begin now: a validation, a checkpoint."""
        self.between = True


def read_birth(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did: with its id it is that process for ever.

    None where it is not there, 0 where the system has no /proc.
    """
    if not Path("/proc/self/stat").exists():
        return 0
    found = _read_stat(pid)
    return int(found[19]) if found else None


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine was stopped by a signal, and not yet continued."""
    return _read_stat(pid)[:1] == ["T"]


def _read_stat(pid: int) -> list[str]:
    """What the system says of a process, from its state on; empty where it is not there."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if found[0] in "ZX" else found


def send(pid: int, its_birth: int, number: int) -> bool:
    """Sends a signal to a process of this machine, 0 for none; whether it was there."""
    if read_birth(pid) != its_birth:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
