"""What must run: pure functions of what the experiment asks for and what the storage holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.blocks import Block
from workers.config import TrainingConfig, digest

Action = Literal["train", "evaluate", "nothing"]


@dataclass(frozen=True)
class Found:
    """What the storage holds of a trial."""

    status: Mapping[str, Any] | None = None  # status.json
    checkpoint: str | None = None  # the digest of its newest complete checkpoint
    summary: Mapping[str, Any] | None = None  # of the evaluation that is asked for, of that checkpoint

    @property
    def state(self) -> str:
        return str(self.status["state"]) if self.status else "new"


@dataclass(frozen=True)
class Decision:
    action: Action
    why: str


def decide(found: Found, scheduler: str) -> Decision:
    """What to do about one trial. `scheduler` is the key of the rule that prunes, see `scheduler_key`."""
    status = found.status or {}
    match found.state:
        case "new":
            return Decision("train", "new")
        case "diverged":
            return Decision("nothing", str(status.get("detail") or "diverged"))
        case "pruned" if status.get("scheduler") == scheduler:
            return Decision("nothing", f"pruned at step {status['step']}")
        case "finished" if found.checkpoint and found.checkpoint == status.get("checkpoint"):
            if found.summary is None:
                return Decision("evaluate", "trained, not evaluated")
            return Decision("nothing", "done")
        case "finished":
            return Decision("train", "its final checkpoint is gone")
    return Decision("train", f"{found.state} at step {status.get('step', 0)} of {status.get('steps', '?')}: resumes")


def missing(planned: Sequence[Block], names_in: Callable[[str], Sequence[str]]) -> list[Block]:
    """The planned blocks that are not there; `names_in` lists a folder, and is asked once for each."""
    there = {folder: set(names_in(folder)) for folder in dict.fromkeys(block.folder for block in planned)}
    return [block for block in planned if block.name not in there[block.folder]]


def scheduler_key(scheduler: Mapping[str, Any]) -> str:
    """A trial stays pruned as long as the rule that pruned it does."""
    return digest(dict(scheduler))


def concurrency(training: TrainingConfig, gpus: int, cluster_cpus: float, cluster_gpus: float) -> int:
    """Trials of this size that the cluster holds at once, one core left to evaluation; 0 if it cannot hold one."""
    cpus = training.cpus * training.workers
    fit = int((cluster_cpus - 1) // cpus) if cluster_cpus - 1 >= cpus else int(cluster_cpus // cpus)
    return min(fit, int(cluster_gpus // (gpus * training.workers))) if gpus else fit
