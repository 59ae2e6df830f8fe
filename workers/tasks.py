"""The door: what Ray calls on a node. The only module of `workers` that imports ray.

Two hosts of the training loop (`OneWorker`, a Tune actor that is reused from trial to trial; `data_parallel`, a Tune
function around a Ray Train `TorchTrainer`) and the tasks of evaluation (`make_space`, `make_block`, `make_summary`).
The hosts find their trial in a job, a plain dict as Tune wants it, the tasks their work in an `Order`; both find their
files in the storage.
"""

import uuid
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from ray import train, tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from workers.blocks import Block, Images, blocks, summary_path
from workers.checkpoint import Checkpoint, process_of
from workers.config import DRIVER_CPUS, Measurement, Trial, trained_by
from workers.data import absolute, prepare
from workers.evaluation import Bench, make, remove_damaged
from workers.speed import Meter, Spent
from workers.storage import Storage
from workers.summary import summarise
from workers.training import World, stop_path
from workers.training import train as training_loop

PENALTY_BPD = 100.0  # what schedulers and searchers are told of a trial that diverged or failed
BLOCK_GPUS = 0.25  # of a GPU, for an evaluation block where trials train on GPUs
Job = dict[str, Any]  # {"storage": root, "digest": address, "trial": Trial as JSON, "gpus": GPUs a worker}


def make_job(storage: Storage, digest: str, trial: Trial, gpus: int) -> Job:
    trial = trial.model_copy(update={"data": absolute(trial.data)})
    return {"storage": storage.root, "digest": digest, "trial": trial.model_dump_json(), "gpus": gpus}


def trial_of(job: Job) -> Trial:
    return TypeAdapter(Trial).validate_json(job["trial"])


def folder_of(row: str) -> str:
    """The folder of the trial with this address, or that a row of a sweep measures."""
    return f"trials/{trained_by(row)}"


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


class DriverResources(tune.PlacementGroupFactory):
    """What the driver of a data-parallel trial asks for: next to nothing, as Ray Train asks for its workers.

    No two are equal, so that Tune never hands the driver's actor to another trial: a second TorchTrainer in the same
    process sometimes does not return after an early stop.
    """

    def __init__(self) -> None:
        super().__init__([{"CPU": DRIVER_CPUS}])

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


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
            placement_strategy=config["strategy"],
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


@dataclass(frozen=True)
class Order:
    """An evaluation as it crosses processes: where to write, what to measure, of which checkpoint, on how much GPU."""

    storage: str
    measurement: str  # as JSON
    checkpoint: Checkpoint
    gpus: float

    @property
    def m(self) -> Measurement:
        return Measurement.model_validate_json(self.measurement)


def make_order(storage: Storage, m: Measurement, checkpoint: Checkpoint, gpus: float) -> Order:
    m = m.model_copy(update={"data": absolute(m.data)})
    return Order(storage.root, m.model_dump_json(), checkpoint, gpus)


@ray.remote(max_retries=3)
def make_space(order: Order) -> None:
    """The feature space of the order's data set, where it is learned and not there yet; fails where it cannot be."""
    _ = _bench(order).space


@ray.remote(max_retries=3)
def make_block(order: Order, block: Block, *after: Any) -> tuple[str, Spent]:
    """Makes one block of an evaluation. A process that dies is retried; the block is then whole.

    Gives the hardware, and what it took.
    """
    bench = _bench(order)
    meter = Meter(bench.device, share=BLOCK_GPUS)
    with meter.of(block.kind, 1):
        make(bench, block)
    return meter.hardware, meter.spent


@ray.remote(max_retries=3)
def make_summary(order: Order, *after: Any) -> list[Block]:
    """Writes the summary of an evaluation whose blocks are there.

    Gives the blocks that turned out to be damaged, and were removed: with them made again it can be called again.
    """
    bench = _bench(order)
    images, digest = Images.of(bench.dataset), order.checkpoint.digest
    space = bench.space if bench.m.evaluation.fid else None
    if lacking := remove_damaged(bench.storage, blocks(bench.m, digest, images), space):
        return lacking
    summary = summarise(bench.storage, bench.m, bench.dataset, process_of(order.checkpoint), digest, space)
    bench.storage.write_sealed(summary_path(bench.m, digest, images), summary)
    return []


@ray.remote(num_cpus=0, max_retries=0)
def sees(storage: str, path: str) -> bool:
    """Whether the node that runs this has the file `path` of the storage."""
    return Storage(storage).exists(path)


@lru_cache(maxsize=2)
def _bench(order: Order) -> Bench:
    """What a process that makes many blocks of one evaluation loads once."""
    torch.set_num_threads(1)
    return Bench(Storage(order.storage), order.m, prepare(order.m.data), order.checkpoint, _device(order.gpus))


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
