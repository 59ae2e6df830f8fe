"""The end of a command's time: nothing new begins, what trains is kept, and the command ends as by an interrupt."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator import interrupts
from orchestrator.clusters.allocation import LEAD_S
from orchestrator.planning.deadline import TO_BEGIN_S, compute_latest_begin, may_begin
from workers.config import Mistake
from workers.signs import ask_to_pause

TO_END_S = 45.0  # of the time between the signal and the end of a job: MLflow's, and that of Ray's end


@dataclass
class Halt:
    """Whether the command pauses: it was asked to, or nothing more fits into its time."""

    pauses_at: float | None  # when the job asks it to that it is part of, in seconds since the epoch
    say: Callable[[str], None]
    lead_s: float = LEAD_S  # so long before the job's end it is asked to
    has_worked: bool = False  # whether this command has begun anything
    began: float = field(default_factory=time.time)
    _asked_at: float | None = None  # when the processes were asked to pause, on the monotonic clock

    @property
    def is_near(self) -> bool:
        """Whether no trial is begun any more."""
        return interrupts.is_asked_to_pause() or not may_begin(time.time(), self.pauses_at, can_resume=True)

    def find_latest_block_begin(self, planned_s: float | None) -> float | None:
        """Until when blocks are begun that take so long, in seconds since the epoch; None: at any time.

        Those that the whole job is hardly long enough for are begun, as no later job would have more time for them.
        """
        if self.pauses_at is None:
            return None
        latest = compute_latest_begin(self.pauses_at, planned_s, can_resume=False)
        return latest if latest > self.began + 2 * TO_BEGIN_S else None

    def tick(self) -> None:
        """Asks what runs to pause, once. Raises KeyboardInterrupt where it takes too long."""
        if self._asked_at is None and interrupts.is_asked_to_pause():
            self._asked_at = time.monotonic()
            self.say("pause      the time of this command is over soon: nothing begins, and what trains is kept")
            ask_to_pause()
        if self._asked_at is not None and time.monotonic() - self._asked_at > (to_pause_s := self.lead_s - TO_END_S):
            self.say(f"pause      not all trials have paused in {to_pause_s:g} s: they are cut off")
            raise KeyboardInterrupt

    def end(self, is_left: bool) -> None:
        """To be called where nothing trains: raises KeyboardInterrupt where the command is to pause.

        `is_left` says whether something would be begun, if there was time.
        """
        if interrupts.is_asked_to_pause():
            raise KeyboardInterrupt
        if is_left and self.is_near:
            self.leave()

    def leave(self) -> None:
        """Leaves what is left to a later job, by KeyboardInterrupt. Raises Mistake where any would leave it again."""
        if not self.has_worked:
            left_s = max(0.0, (self.pauses_at or 0.0) - self.began)
            raise Mistake(
                f"the job's time is too short for anything to begin: it pauses {left_s:.0f} s after the sweep has "
                "started; ask for more (--time)"
            )
        self.say("pause      what is left is not begun: it would come to nothing in the rest of the job's time")
        interrupts.pause()
        raise KeyboardInterrupt
