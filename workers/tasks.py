"""The door: what Ray calls on a node. The only module of `workers` that imports ray.

Two hosts of the training loop (`OneWorker`, a Tune actor that is reused from trial to trial; `data_parallel`, a Tune
function around a Ray Train `TorchTrainer`) and two tasks of evaluation (`make_reference`, `make_block`). All of them
find their trial in a job, a plain dict that crosses processes, and their files in the storage.
"""

import uuid
from collections.abc import Generator
from functools import lru_cache
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from ray import train, tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from workers import checkpoint as checkpoints
from workers.config import Trial
from workers.data import absolute, prepare
from workers.evaluation import Block, Model, run_block
from workers.frechet import Reference, prepare_reference, reference_path
from workers.storage import Storage
from workers.training import World, stop_path
from workers.training import train as training_loop

PENALTY_BPD = 100.0  # what schedulers and searchers are told of a trial that diverged or failed
Job = dict[str, Any]  # {"storage": root, "digest": address, "trial": Trial as JSON, "gpus": GPUs a worker}


def make_job(storage: Storage, digest: str, trial: Trial, gpus: int) -> Job:
    trial = trial.model_copy(update={"data": absolute(trial.data)})
    return {"storage": storage.root, "digest": digest, "trial": trial.model_dump_json(), "gpus": gpus}


def trial_of(job: Job) -> Trial:
    return TypeAdapter(Trial).validate_json(job["trial"])


def folder_of(digest: str) -> str:
    return f"trials/{digest}"


def results(job: Job, world: World) -> Generator[dict[str, Any], None, None]:
    """The training loop's progress as Tune results, each with a finite value of the metric that schedulers see."""
    torch.set_num_threads(trial_of(job).training.cpus)
    trial = trial_of(job)
    loop = training_loop(trial, prepare(trial.data), Storage(job["storage"]), folder_of(job["digest"]), world)
    for progress in loop:
        yield {
            "valid/nll_bpd": PENALTY_BPD,
            **progress.metrics,
            "step": progress.step,
            "state": progress.state,
            "images_per_s": progress.images_per_s,
            "detail": progress.detail,
        }


def failure(error: BaseException) -> dict[str, Any]:
    """A fault of the program as a last Tune result: unlike the death of a process, it would only happen again."""
    return {"valid/nll_bpd": PENALTY_BPD, "state": "failed", "detail": f"{type(error).__name__}: {error}"}


class OneWorker(tune.Trainable):
    """Host of a one-worker trial: `step()` is the loop's next. An actor serves one trial after another."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        training = trial_of(config["job"]).training
        return tune.PlacementGroupFactory([{"CPU": training.cpus, "GPU": config["job"]["gpus"]}])

    def setup(self, config: dict[str, Any]) -> None:
        self.results = results(config["job"], World(device=_device(config["job"]["gpus"])))

    def step(self) -> dict[str, Any]:
        try:
            result = next(self.results)
        except Exception as error:  # noqa: BLE001 the host's edge: told to the driver, with its reason
            return {**failure(error), "done": True}
        return {**result, "done": result["state"] != "running"}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.results.close()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self.results.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the loop keeps its own checkpoints, in the storage."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the loop resumes from the storage."""


def data_parallel(config: dict[str, Any]) -> None:
    """Host of a trial of several workers: a Tune function that runs a TorchTrainer and reports its progress."""
    job = config["job"]
    training = trial_of(job).training
    trainer = TorchTrainer(
        _data_parallel_worker,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=job["gpus"] > 0,
            resources_per_worker={"CPU": training.cpus, "GPU": job["gpus"]},
        ),
        run_config=train.RunConfig(
            # A name of its own each time: Ray Train would take a finished run of the same name for this one.
            name=f"{job['digest']}-{uuid.uuid4().hex[:8]}",
            storage_path=config["scratch"],
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=config["max_failures"]),
        ),
    )
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        tune.report(failure(error))


def _data_parallel_worker(job: Job) -> None:
    context = train.get_context()
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    group = ray.util.get_current_placement_group().id.hex()  # for `free_workers`
    for result in results(job, World(context.get_world_rank(), context.get_world_size(), device)):
        train.report({**result, "placement_group": group})


def ask_to_stop(job: Job) -> None:
    """The training loop of the job ends as pruned at its next journal point."""
    Storage(job["storage"]).write(stop_path(folder_of(job["digest"])), b"")


def free_workers(result: dict[str, Any]) -> None:
    """Gives back the cores of a data-parallel trial whose actor died, from its last result.

    Ray Train's cleaner should do it, but asks the dashboard who is still there, and a local Ray has none.
    """
    if group := result.get("placement_group"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


@ray.remote(max_retries=3)
def make_reference(storage_root: str, trial_json: str) -> None:
    """The feature space of the trial's data set, unless it is there."""
    trial = Trial.model_validate_json(trial_json)
    assert trial.evaluation.fid
    prepare_reference(Storage(storage_root), prepare(trial.data), trial.evaluation.fid.features)


@ray.remote(max_retries=3)
def make_block(job: Job, checkpoint: checkpoints.Checkpoint, block: Block, reference_made: None = None) -> Block:
    """Runs one block of an evaluation and gives it back. A process that dies is retried; the block is then whole."""
    torch.set_num_threads(1)
    trial, storage = trial_of(job), Storage(job["storage"])
    dataset = prepare(trial.data)
    fid = trial.evaluation.fid
    reference = _reference(job["storage"], dataset.digest, fid.features) if fid else None
    model = _model(checkpoint, job["gpus"])
    run_block(storage, trial, dataset, model, reference, checkpoint.digest, block)
    return block


@lru_cache(maxsize=2)
def _model(checkpoint: checkpoints.Checkpoint, gpus: float) -> Model:
    """The checkpoint, loaded once by a process that runs many blocks of it."""
    device = _device(gpus)
    network, process = checkpoints.load(checkpoint)
    return Model(network.to(device), process, device)


@lru_cache(maxsize=2)
def _reference(storage_root: str, data_digest: str, features: str) -> Reference:
    return Reference.from_bytes(Storage(storage_root).read(reference_path(data_digest, features)))


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
