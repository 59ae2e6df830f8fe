"""Schedulers of Tune that stop a trial early, as the sweep asks for it."""

import math
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.experiment.records import SearchConfig
from workers.bits import SEEN
from workers.hosts import ask_to_stop
from workers.jobs import read_trial


def make_scheduler(search: SearchConfig, steps: int) -> TrialScheduler:
    scheduler = search.scheduler
    seen: dict[str, Any] = {  # not Tune's iteration: that starts again when an actor does
        "time_attr": "step",
        "metric": SEEN,
        "mode": "min",
        "grace_period": min(scheduler.grace, steps),
    }
    match scheduler.kind:
        case "none":
            return FIFOScheduler()
        case "asha":
            return _Asha(max_t=steps, reduction_factor=scheduler.reduction, **seen)
        case "median":  # which would pause a trial as long as there are too few others, and ours cannot be paused
            return _Median(min_samples_required=scheduler.others, min_time_slice=math.inf, **seen)


class _Asking(TrialScheduler):
    """Asks a data-parallel trial to stop, where Tune would kill it.

    Killed, it would leave its workers' cores taken: Ray Train's cleaner asks the dashboard whether the trial is still
    there, and a local Ray has none. Asked, it ends by itself at its next journal point.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._asked: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        job = trial.config["job"]
        if job["digest"] in self._asked:
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision != TrialScheduler.STOP or read_trial(job).training.workers == 1:
            return decision
        if result["state"] == "running":  # else it is at its last step, or ends by itself
            self._asked.add(job["digest"])
            ask_to_stop(job)
        return str(TrialScheduler.CONTINUE)


class _Asha(_Asking, AsyncHyperBandScheduler):
    pass


class _Median(_Asking, MedianStoppingRule):
    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last result of a trial that failed has no step, at which Tune's rule would fall over."""
        if "step" in result:
            super().on_trial_complete(tune_controller, trial, result)
