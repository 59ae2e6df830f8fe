"""The host of trials of several workers: a Ray Train `TorchTrainer` whose workers train one trial after another.

It is apart from `workers.hosts`, as Ray Train takes most of a second to load and no other trial needs it.

Ray Train takes 12 to 40 s for its controller and its workers. So they stay for the next trial of the same size, as the
actor does that Tune hands from trial to trial. What they are to train and what they report goes by Ray's own store of
keys: jobs from that actor to the workers, results from the controller to the actor.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Generator
from typing import Any

import ray
import torch
from ray import train, tune
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from workers.config import DRIVER_CPUS
from workers.disk import Unwritable
from workers.hosts import OneWorker, free_workers, lock_trial, report_failure, report_results
from workers.jobs import Job, look_for_code, read_trial
from workers.pulse import Pulse
from workers.ray_private import delete_key, put_key, read_keys
from workers.ray_train import MeetInAFolder
from workers.sharing import free_memory
from workers.signs import AT_WORK, begin_telling
from workers.world import World

log = logging.getLogger(__name__)

GROUPS = b"orchestrator-groups"  # the namespace in Ray's own store of keys, which ends with the cluster
LOOK_S = 0.1  # at the job, at results
TO_END_S = 30.0  # for a group that is handed no further job


class WorkerGroup:
    """The controller and the workers of one Ray Train run, which train what they are handed until they are let go.

    Ray Train replaces all workers where one dies, and a new worker begins with the job that its group was handed last.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.shape = self.read_shape(config)
        self._key, self._number, self._trains = uuid.uuid4().hex, 0, False
        self._placed: dict[str, Any] = {}  # where its workers are, for `free_workers`
        self._error: Exception | None = None
        trainer = self._make_trainer(config)
        self._run = threading.Thread(target=self._fit, args=(trainer,), name="ray-train", daemon=True)

    @staticmethod
    def read_shape(config: dict[str, Any]) -> tuple[object, ...]:
        """What a group is made for: it can train the trials of an equal one."""
        training = read_trial(config["job"]).training
        return training.workers, training.cpus, config["job"]["gpus"], config["strategy"]

    def _make_trainer(self, config: dict[str, Any]) -> TorchTrainer:
        job, training = config["job"], read_trial(config["job"]).training
        return TorchTrainer(
            _run_worker,
            train_loop_config={"group": self._key},
            torch_config=MeetInAFolder(folder=config["scratch"]) if config["one_machine"] else TorchConfig(),
            scaling_config=train.ScalingConfig(
                num_workers=training.workers,
                use_gpu=job["gpus"] > 0,
                resources_per_worker={"CPU": training.cpus, "GPU": job["gpus"]},
                placement_strategy=config["strategy"],
            ),
            run_config=train.RunConfig(
                # A name of its own each time: Ray Train would take a finished run of the same name for this one.
                name=f"{job['digest']}-{self._key[:8]}",
                storage_path=config["scratch"],
                callbacks=[_Reports(self._key)],
                failure_config=train.FailureConfig(max_failures=config["max_failures"]),
            ),
        )

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 raised by `train`, in the actor's own thread
            self._error = error

    def train(self, job: Job) -> Generator[dict[str, Any], None, None]:
        """Hands the workers a trial; its results. Raises what Ray Train ends by where they have died too often."""
        self._hand(job)
        if self._number == 1:
            self._run.start()
        while self._trains:
            has_ended = not self._run.is_alive()
            for key, told in sorted(read_keys(f"{self._key}:result:", GROUPS).items()):
                delete_key(key, GROUPS)
                result = json.loads(told)
                self._placed = result if "placement_group" in result else self._placed
                if result.pop("number") == self._number:
                    self._trains = result["state"] == "running"
                    yield result
            if has_ended and self._trains:
                raise self._error or RuntimeError("the workers of the trial have ended without a result")
            time.sleep(LOOK_S)

    def _hand(self, job: Job | None) -> None:
        self._number, self._trains = self._number + 1, job is not None
        put_key(f"{self._key}:job", json.dumps({"number": self._number, "job": job}), GROUPS)

    def can_train(self, config: dict[str, Any]) -> bool:
        """Whether the next trial can be handed to it. Where a worker died it goes: a trial has its own failures."""
        starts = read_keys(f"{self._key}:starts", GROUPS)
        return self._run.is_alive() and len(starts) == 1 and self.shape == self.read_shape(config)

    def let_go(self) -> None:
        """Ends the workers, also in the middle of a trial, and gives back what they hold."""
        trained = self._trains
        self._hand(None)
        if trained:
            free_workers(self._placed)
        self._run.join(TO_END_S)
        if self._run.is_alive():
            log.warning("Ray Train has not ended within %g s; its workers' resources are given back", TO_END_S)
        free_workers(self._placed)
        for key in read_keys(f"{self._key}:", GROUPS):
            delete_key(key, GROUPS)


class SeveralWorkers(OneWorker):
    """Host of trials of several workers: `step()` is the next result of its group. An actor serves several trials."""

    NAME = "the driver of its workers"
    _group: WorkerGroup | None = None

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Next to nothing, as Ray Train asks for the workers. See `DriverResources`."""
        training = read_trial(config["job"]).training
        return DriverResources(training.workers, training.cpus, config["job"]["gpus"])

    def setup(self, config: dict[str, Any]) -> None:
        self.config_now = config
        super().setup(config)

    def hold_alone(self, job: Job, pulse: Pulse) -> Generator[dict[str, Any], None, None]:
        look_for_code(job)
        with lock_trial(job):
            if self._group and not self._group.can_train(self.config_now):
                self.let_go()
            self._group = self._group or WorkerGroup(self.config_now)
            yield from self._group.train(job)

    def let_go(self) -> None:
        group, self._group = self._group, None
        if group:
            group.let_go()

    def cleanup(self) -> None:
        self.let_go()
        super().cleanup()


class DriverResources(tune.PlacementGroupFactory):
    """What the actor of data-parallel trials asks for, which its workers' resources are not part of.

    Two are equal where their trials are of one size: Tune hands an actor, and so its workers, to those alone.
    """

    def __init__(self, *size: float) -> None:
        self._size = size
        super().__init__([{"CPU": DRIVER_CPUS}])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DriverResources) and self._size == other._size

    def __hash__(self) -> int:
        return hash(self._size)


class _Reports(train.UserCallback):
    """Passes on what the workers report, and at once where the storage cannot be written: Ray Train would try again.

    It is Ray Train's controller that calls it, which tells that it runs from its first report on.
    """

    def __init__(self, group: str) -> None:
        self._group, self._count = group, 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        result = {**metrics[0]}
        trial = result.pop("trial")
        if result["state"] != "running":
            begin_telling("")
        elif AT_WORK.get("trial") != trial:
            begin_telling("the controller of its workers", trial)
        self._pass_on(result)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, Unwritable):
                self._pass_on({**report_failure(error), "number": _read_handed(self._group)[0]})

    def _pass_on(self, result: dict[str, Any]) -> None:
        self._count += 1
        put_key(f"{self._group}:result:{self._count:09}", json.dumps(result, default=float), GROUPS)


def _read_handed(group: str) -> tuple[int, Job | None]:
    """The number of the job that a group was handed last, and the job; None where it is to end."""
    [told] = read_keys(f"{group}:job", GROUPS).values()
    handed = json.loads(told)
    return handed["number"], handed["job"]


def _run_worker(config: dict[str, Any]) -> None:
    """A worker: trains what its group is handed until that is nothing."""
    context = train.get_context()
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    group = ray.util.get_current_placement_group().id.hex()  # for `free_workers`
    rank, size, done = context.get_world_rank(), context.get_world_size(), -1
    if rank == 0:
        put_key(f"{config['group']}:starts:{group}", "", GROUPS)
    while True:
        number, job = _read_handed(config["group"])
        if number == done:
            time.sleep(LOOK_S)
            continue
        if job is None:
            return
        pulse = begin_telling(f"worker {rank} of {size}", job["digest"])
        for result in report_results(job, World(rank, size, device, pulse)):
            train.report({**result, "placement_group": group, "trial": job["digest"], "number": number})
        done = number
        free_memory()
        begin_telling("")
