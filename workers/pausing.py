"""When a trial pauses: its driver asks it to, and all of its workers do so after the same step.

A worker alone looks at its pulse after each step. Several have to agree, by an exchange that would cost a part of every
step, so they look together after so many steps as take some LOOK_S seconds.
"""

import time
from dataclasses import dataclass, field

import torch

from workers.pulse import Pulse

LOOK_S = 2.0


class Paused(Exception):
    """The driver asked the trial to pause."""


@dataclass
class Lookout:
    """Looks whether the trial is to pause. Each of its workers has one, and asks it after each step."""

    pulse: Pulse
    workers: int
    device: torch.device
    every: int = 1  # steps from one look to the next; the same in all workers
    left: int = 1  # steps until the next one
    began: float = field(default_factory=time.monotonic)  # when the last one was

    def sees_pause(self) -> bool:
        """Whether the trial is to pause after the step just made."""
        if self.workers == 1:
            return self.pulse.is_asked_to_pause
        self.left -= 1
        if self.left:
            return False
        now = time.monotonic()
        told = torch.tensor([self.pulse.is_asked_to_pause, now - self.began], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        asked, took_s = told.tolist()
        self.every = self.left = choose_interval(self.every, took_s)
        self.began = now
        return bool(asked)


def choose_interval(steps: int, took_s: float) -> int:
    """After how many steps to look again, where the last so many took `took_s` seconds."""
    return max(1, min(2 * steps, int(steps * LOOK_S / max(took_s, 1e-9))))
