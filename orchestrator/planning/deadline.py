"""Whether work is begun so shortly before the job of a batch system pauses: pure functions of data.

A trial can resume: it writes a checkpoint as it pauses. A block of an evaluation is made whole or not at all.
"""

TO_BEGIN_S = 60.0  # until a trial that begins has come to anything; also for a block, where its time is not known


def compute_latest_begin(pauses_at: float, planned_s: float | None, *, can_resume: bool) -> float:
    """Until when work is begun that is planned to take `planned_s` seconds, in a job that pauses at `pauses_at`.

    What can resume needs no more than to come to anything. None: how long it takes is not known.
    """
    return pauses_at - (TO_BEGIN_S if can_resume or planned_s is None else planned_s)


def may_begin(now: float, pauses_at: float | None, planned_s: float | None = None, *, can_resume: bool) -> bool:
    """Whether it is begun now. All times are in seconds since the epoch; without an end it always is."""
    return pauses_at is None or now <= compute_latest_begin(pauses_at, planned_s, can_resume=can_resume)
