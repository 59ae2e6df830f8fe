"""What must run: pure functions of what the experiment asks for and what the storage holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.experiment.records import SchedulerConfig
from orchestrator.state.rows import Found
from workers.evaluation.blocks import Block
from workers.identity import collect_settings_read, compute_digest

Action = Literal["train", "evaluate", "nothing"]
NEW, NOT_EVALUATED = "new", "trained, not evaluated"


@dataclass(frozen=True)
class Decision:
    action: Action
    why: str


def decide(found: Found, scheduler: str, changed: str = "") -> Decision:
    """What to do about one trial. `scheduler` is the key of the rule that prunes, see `make_scheduler_key`.

    `changed` says which code from outside is another than when the sweep was begun last (`planning.changes`).
    """
    decision = _decide(found, scheduler)
    is_of_it = changed and decision.why in (NEW, NOT_EVALUATED)
    return Decision(decision.action, f"{decision.why}: {changed}") if is_of_it else decision


def _decide(found: Found, scheduler: str) -> Decision:
    status = found.status or {}
    if found.unread:
        return Decision("nothing", found.unread)
    match found.state:
        case "finished" if found.status is None:
            return Decision("train", "its status.json is gone: its last step is looked at again")
        case "finished" if found.unfinished:
            return Decision("train", "the end of its journal is gone: its last step is validated again")
        case "finished" if found.summary is None and found.is_measured:
            return Decision("evaluate", NOT_EVALUATED)
        case "finished":
            return Decision("nothing", "done")
        case "new" if found.resumes_at is not None:
            return Decision("train", "its status.json is gone: resumes from its last checkpoint")
        case "new":
            return Decision("train", NEW)
        case "diverged":
            return Decision("nothing", str(status.get("detail") or "diverged"))
        case "pruned" if status.get("scheduler") == scheduler:
            return Decision("nothing", f"pruned at step {status['step']}")
    step, state = int(status.get("step", 0)), status.get("state")
    if state == "finished" and step < found.steps:
        return Decision("train", f"goes on from step {step} to {found.steps}")
    if step >= found.steps:
        return Decision("train", f"its checkpoint of step {found.steps} is not there: it is made again")
    state = "cut off" if found.state == "running" else found.state
    after = f" from its checkpoint of step {found.resumes_at}" if found.resumes_at else ""
    return Decision("train", f"{state} at step {found.step} of {found.steps}: resumes{after}")


Turn = Literal["train", "wait", "take"]


def decide_turn(is_missing: bool, holder: str) -> Turn:
    """What to do about a trial that other sweeps may share: train it, wait for who trains it, or take what is there.

    `is_missing` says whether something of it has still to be trained, `holder` who trains it now, if anybody does.
    """
    if not is_missing:
        return "take"
    return "wait" if holder else "train"


def find_missing_blocks(planned: Sequence[Block], names_in: Callable[[str], Sequence[str]]) -> list[Block]:
    """The planned blocks that are not there; `names_in` lists a folder, and is asked once for each."""
    there = {folder: set(names_in(folder)) for folder in dict.fromkeys(block.folder for block in planned)}
    return [block for block in planned if block.name not in there[block.folder]]


def make_scheduler_key(scheduler: SchedulerConfig) -> str:
    """A trial stays pruned as long as the rule that pruned it does."""
    return compute_digest(collect_settings_read(scheduler, only_set=True))
