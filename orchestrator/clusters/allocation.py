"""The job of a batch system that this command runs in, as `deploy/slurm.sbatch` tells of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

NODES, PAUSES_AT, JOB = "ORCHESTRATOR_NODES", "ORCHESTRATOR_PAUSES_AT", "ORCHESTRATOR_JOB"
LEAD, LEAD_S = "ORCHESTRATOR_LEAD", 120.0  # so long before its end the job pauses by itself: the --signal in the script
TASK, FIRST_TASK = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN"


@dataclass(frozen=True)
class Allocation:
    job: str
    nodes: int  # all of them are to join the job's Ray
    pauses_at: float | None = None  # shortly before its end, in seconds since the epoch; None where it has no limit
    lead_s: float = LEAD_S  # before that end
    suffix: str = ""  # of the name of its sweep: the tasks of an array are sweeps that share their trials

    def name(self, sweep: str) -> str:
        return f"{sweep}{self.suffix}"


def find_allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """The job that this process is part of; None where it is part of none."""
    if NODES not in environment:
        return None
    pauses_at, task = environment.get(PAUSES_AT), environment.get(TASK, "")
    lead_s = float(environment.get(LEAD) or LEAD_S)
    suffix = f"-{task}" if task and task != environment.get(FIRST_TASK) else ""
    return Allocation(
        environment[JOB], int(environment[NODES]), float(pauses_at) if pauses_at else None, lead_s, suffix
    )
