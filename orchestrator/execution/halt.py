"""The end of a command's time: nothing new begins, what trains is kept, and the command ends as by an interrupt."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator import interrupts
from orchestrator.planning.deadline import compute_latest_begin, may_begin
from workers.signs import ask_to_pause

TO_PAUSE_S = 75.0  # for all trials to have written a checkpoint; then they are cut off


@dataclass
class Halt:
    """Whether the command pauses: it was asked to, or nothing more fits into its time."""

    pauses_at: float | None  # when the job asks it to that it is part of, in seconds since the epoch
    say: Callable[[str], None]
    began: float = field(default_factory=time.time)
    _asked_at: float | None = None  # when the processes were asked to pause, on the monotonic clock

    @property
    def is_near(self) -> bool:
        """Whether no trial is begun any more."""
        return interrupts.is_asked_to_pause() or not may_begin(time.time(), self.pauses_at, can_resume=True)

    def find_latest_block_begin(self, planned_s: float | None) -> float | None:
        """Until when blocks are begun that take so long, in seconds since the epoch; None: at any time.

        Those that are longer than the whole job are begun, as no later job would have more time for them.
        """
        if self.pauses_at is None:
            return None
        latest = compute_latest_begin(self.pauses_at, planned_s, can_resume=False)
        return latest if latest > self.began else None

    def tick(self) -> None:
        """Asks what runs to pause, once. Raises KeyboardInterrupt where it takes too long."""
        if self._asked_at is None and interrupts.is_asked_to_pause():
            self._asked_at = time.monotonic()
            self.say("pause      the time of this command is over soon: nothing begins, and what trains is kept")
            ask_to_pause()
        if self._asked_at is not None and time.monotonic() - self._asked_at > TO_PAUSE_S:
            self.say(f"pause      not all trials have paused in {TO_PAUSE_S:g} s: they are cut off")
            raise KeyboardInterrupt

    def end(self, is_left: bool) -> None:
        """To be called where nothing trains: raises KeyboardInterrupt where the command is to pause.

        `is_left` says whether something would be begun, if there was time.
        """
        if interrupts.is_asked_to_pause():
            raise KeyboardInterrupt
        if is_left and self.is_near:
            self.say("pause      what is left is not begun: it would come to nothing in the rest of the job's time")
            raise KeyboardInterrupt
