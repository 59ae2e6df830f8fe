"""The host of a trial of several workers: a Tune function around a Ray Train `TorchTrainer`.

It is apart from `workers.hosts`, as Ray Train takes most of a second to load and no other trial needs it.
"""

import uuid
from typing import Any

import ray
import torch
from ray import train, tune
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from workers.disk import Unwritable
from workers.hosts import lock_trial, report_failure, report_results
from workers.jobs import Job, look_for_code, read_trial
from workers.locks import Held
from workers.ray_train import MeetInAFolder, end_with
from workers.signs import AT_WORK, begin_telling
from workers.world import World


class _Reports(TuneReportCallback):
    """Tells Tune what a worker reports, and at once where the storage cannot be written: Ray Train would try again.

    It is Ray Train's controller that calls it, which tells that it runs from its first report on.
    """

    def __init__(self, digest: str) -> None:
        super().__init__()
        self._digest = digest

    def after_report(self, *told: Any, **named: Any) -> None:
        if not AT_WORK:
            begin_telling("the controller of its workers", self._digest)
        super().after_report(*told, **named)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, Unwritable):
                end_with(self, report_failure(error))


def host_data_parallel(config: dict[str, Any]) -> None:
    """Host of a trial of several workers: a Tune function that runs a TorchTrainer and reports its progress."""
    job = config["job"]
    look_for_code(job)
    training = read_trial(job).training
    begin_telling("the driver of its workers", job["digest"])
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config=job,
        torch_config=MeetInAFolder(folder=config["scratch"]) if config["one_machine"] else TorchConfig(),
        scaling_config=train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=job["gpus"] > 0,
            resources_per_worker={"CPU": training.cpus, "GPU": job["gpus"]},
            placement_strategy=config["strategy"],
        ),
        run_config=train.RunConfig(
            # A name of its own each time: Ray Train would take a finished run of the same name for this one.
            name=f"{job['digest']}-{uuid.uuid4().hex[:8]}",
            storage_path=config["scratch"],
            callbacks=[_Reports(job["digest"])],
            failure_config=train.FailureConfig(max_failures=config["max_failures"]),
        ),
    )
    try:
        with lock_trial(job):
            trainer.fit()
    except (train.TrainingFailedError, Held, Unwritable) as error:
        tune.report(report_failure(error))


def _run_worker(job: Job) -> None:
    context = train.get_context()
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    group = ray.util.get_current_placement_group().id.hex()  # for `free_workers`
    rank, size = context.get_world_rank(), context.get_world_size()
    pulse = begin_telling(f"worker {rank} of {size}", job["digest"])
    for result in report_results(job, World(rank, size, device, pulse)):
        train.report({**result, "placement_group": group})
