"""The hosts of the training loop: what Ray calls to train a trial.

`OneWorker`, a Tune actor that is reused from trial to trial, and for several workers `workers.data_parallel`. Both find
their trial in a job, a plain dict as Tune wants it, and their files in the storage.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import tune
from ray.util.placement_group import PlacementGroup, remove_placement_group

from workers.bits import SEEN, find_validation
from workers.code import locate_error
from workers.config import Mistake
from workers.data.dataset import prepare
from workers.disk import Unwritable
from workers.jobs import Job, choose_device, look_for_code, read_trial
from workers.layout import name_trial_folder, name_trial_lock
from workers.locks import Held, lock
from workers.pulse import Pulse
from workers.sharing import Gauge, NeedsLess, correct_share, describe_share, double_share, free_memory, is_out_of_memory
from workers.signs import begin_telling
from workers.speed import name_hardware
from workers.storage import Storage
from workers.training import name_stop_file
from workers.training import train as training_loop
from workers.world import World

PENALTY_BPD = 100.0  # what schedulers and searchers are told of a trial that diverged or failed
# States of a trial that was not trained: its storage cannot be written, as that of all others; another sweep trains it;
# it goes on with another part of a GPU, as it was measured to need less, or ran out of memory beside others.
UNWRITABLE, HELD, MEASURED, CROWDED = "unwritable", "held", "measured", "crowded"


def lock_trial(job: Job) -> AbstractContextManager[None]:
    """Holds the trial of the job against other sweeps. Raises Held where one trains it."""
    return lock(Storage(job["storage"]), name_trial_lock(job["digest"]), job["owner"])


def report_results(job: Job, world: World) -> Generator[dict[str, Any], None, None]:
    """The training loop's progress as Tune results, each with a finite value of the metric that schedulers see."""
    look_for_code(job)
    torch.set_num_threads(read_trial(job).training.cpus)
    trial, storage, folder = read_trial(job), Storage(job["storage"]), name_trial_folder(job["digest"])
    if world.rank == 0:
        storage.remove_leftovers(folder)
    of = {"also_keep": job["also_keep"], "starts": job["starts"]}
    for progress in training_loop(trial, prepare(trial.data), storage, folder, world, **of):
        seen = find_validation(progress.metrics)
        yield {
            SEEN: progress.metrics[seen] if seen else PENALTY_BPD,
            **progress.metrics,
            "step": progress.step,
            "state": progress.state,
            "images_per_s": progress.images_per_s,
            "detail": progress.detail,
        }


def report_failure(error: BaseException) -> dict[str, Any]:
    """A fault of the program as a last Tune result: unlike the death of a process, it would only happen again."""
    state = "failed"
    detail = f"{type(error).__name__}: {error}" + ("" if isinstance(error, Mistake) else locate_error(error))
    if isinstance(error, Unwritable):
        state, detail = UNWRITABLE, str(error)
    elif isinstance(error, Held):
        state, detail = HELD, error.who
    return {SEEN: PENALTY_BPD, "state": state, "detail": detail}


def report_resized(job: Job, error: BaseException) -> dict[str, Any] | None:
    """The last Tune result of a trial that goes on with another part of a GPU; None where the error is of another kind.

    With a whole GPU out of memory is a fault, as there is no more to be had.
    """
    if isinstance(error, NeedsLess):
        state, gpus, detail = MEASURED, error.share, f"needs {describe_share(error.share)}, as its first steps show"
    elif is_out_of_memory(error) and 0 < job["gpus"] < 1:
        state, gpus = CROWDED, double_share(job["gpus"])
        detail = f"ran out of GPU memory beside others; goes on with {describe_share(gpus)}"
        if job["share"]:
            correct_share(Storage(job["storage"]), job["share"], name_hardware(choose_device(job["gpus"])), gpus)
    else:
        return None
    return {SEEN: PENALTY_BPD, "state": state, "gpus": gpus, "detail": detail}


class OneWorker(tune.Trainable):
    """Host of a one-worker trial: `step()` is the loop's next. An actor serves one trial after another."""

    NAME = "its worker"  # what it is called where signs of life are told

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        training = read_trial(config["job"]).training
        return tune.PlacementGroupFactory([{"CPU": training.cpus, "GPU": config["job"]["gpus"]}])

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config["job"]
        self.results = self.hold_alone(self.job, begin_telling(self.NAME, self.job["digest"]))

    def hold_alone(self, job: Job, pulse: Pulse) -> Generator[dict[str, Any], None, None]:
        """The results of the trial, which is locked against other sweeps until they end."""
        world = World(device=choose_device(job["gpus"]), pulse=pulse, gpus=job["gpus"])
        if job["measures"]:
            storage = Storage(job["storage"])
            gauge = Gauge(storage, job["share"], world.device, job["digest"][:8], job["makes_room"])
            world = replace(world, gauge=gauge)
        with lock_trial(job):
            yield from report_results(job, world)

    def step(self) -> dict[str, Any]:
        try:
            result = next(self.results)
        except Exception as error:  # noqa: BLE001 the host's edge: told to the driver, with its reason
            result = report_resized(self.job, error) or report_failure(error)
        if done := result["state"] != "running":
            self.results.close()  # another sweep may have the trial now
            free_memory()
            begin_telling("")
        return {**result, "done": done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.results.close()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        begin_telling("")
        self.results.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the loop keeps its own checkpoints, in the storage."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the loop resumes from the storage."""


def ask_to_stop(job: Job) -> None:
    """The training loop of the job ends as pruned at its next journal point."""
    Storage(job["storage"]).write(name_stop_file(name_trial_folder(job["digest"])), b"")


def free_workers(result: dict[str, Any]) -> None:
    """Frees the cores of a data-parallel trial whose actor died, from its last result.

    Ray Train's cleaner should do it, but asks the dashboard who is still there, and a local Ray has none.
    """
    if group := result.get("placement_group"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
