"""A trial as it crosses processes: where its files are, and who trains it."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from pydantic import TypeAdapter

from workers.bundles import look_in
from workers.config import Trial
from workers.data.locate import make_absolute
from workers.storage import Storage

# {"storage": root, "digest": the id of the trial, "trial": Trial as JSON, "gpus": GPUs per worker, "owner": for whom it
# is trained, "also_keep": the steps whose checkpoints stay, "share": where the storage notes what part of a GPU trials
# of its kind need, or "" where the experiment says it, "measures": whether this one is measured for that, "makes_room":
# whether others wait for it, "starts": the folder of the checkpoint, below the root, of each slot of what it
# starts from (`workers.warm_start`)}
Job = dict[str, Any]


def make_job(
    storage: Storage,
    digest: str,
    trial: Trial,
    gpus: float,
    owner: str,
    *,
    also_keep: Collection[int] = (),
    share: str = "",
    starts: Mapping[str, str] = MappingProxyType({}),
) -> Job:
    trial = trial.model_copy(update={"data": make_absolute(trial.data)})
    job = {"storage": storage.root, "digest": digest, "trial": trial.model_dump_json(), "gpus": gpus}
    of_share = {"share": share, "measures": False, "makes_room": False}
    return {**job, **of_share, "owner": owner, "also_keep": sorted(also_keep), "starts": dict(starts)}


def read_trial(job: Job) -> Trial:
    """Raises ValidationError where it names code from outside that this process does not know (`look_for_code`)."""
    return TypeAdapter(Trial).validate_json(job["trial"])


def look_for_code(job: Job) -> None:
    """On a node: the trial's code from outside is in its storage."""
    look_in(Storage(job["storage"]))


def choose_device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
