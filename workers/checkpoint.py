"""Checkpoints: folders that commit by a manifest of sha256 sums, in the layout of diffusers' `DDPMPipeline`.

    step-00002000/  model_index.json
                    unet/config.json, unet/diffusion_pytorch_model.safetensors     the EMA weights: those to evaluate
                    scheduler/scheduler_config.json                                T, betas, variance
                    state/training.safetensors, state/progress.json                raw weights and Adam's moments
                    manifest.json                                                  written last

`DDPMPipeline.from_pretrained` opens such a folder. Safetensors only: no pickle is ever loaded.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from workers.config import Mistake, digest
from workers.diffusion.process import Process
from workers.storage import Storage
from workers.unet import UNet

UNET, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
STATE, PROGRESS = "state/training.safetensors", "state/progress.json"
VERSION = "0.35.0"  # the diffusers release whose layout this is


class CheckpointError(Mistake):
    """A checkpoint is incomplete or its bytes are not those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `digest` addresses what an evaluation sees: EMA weights, network and process."""

    path: str  # relative to the storage root
    step: int
    digest: str


def save(
    storage: Storage,
    folder: str,
    step: int,
    unet_config: dict[str, Any],
    process: Process,
    ema: dict[str, Tensor],
    state: dict[str, Tensor],
    progress: dict[str, Any],
) -> Checkpoint:
    """Writes `folder/step-<step>` whole; then removes the checkpoints before it, which it makes superfluous."""
    path = f"{folder}/step-{step:08}"
    files = {
        INDEX: _json(
            {
                "_class_name": "DDPMPipeline",
                "_diffusers_version": VERSION,
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
        ),
        UNET: _json(unet_config),
        WEIGHTS: _tensors(ema),
        SCHEDULER: _json(scheduler_config(process)),
        STATE: _tensors(state),
        PROGRESS: _json({**progress, "step": step}),
    }
    for name, content in files.items():
        storage.write(f"{path}/{name}", content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    storage.write_json(f"{path}/manifest.json", {"step": step, "sha256": sums})
    for other in storage.list(folder):
        if other < f"step-{step:08}":
            storage.delete(f"{folder}/{other}")
    return Checkpoint(path, step, _digest(sums))


def newest(storage: Storage, folder: str) -> Checkpoint | None:
    """The complete checkpoint of the highest step in `folder`; one without a manifest does not count."""
    for name in reversed(storage.list(folder)):
        path = f"{folder}/{name}"
        if storage.exists(f"{path}/manifest.json"):
            manifest = _manifest(storage, path)
            return Checkpoint(path, manifest["step"], _digest(manifest["sha256"]))
    return None


def load(storage: Storage, checkpoint: Checkpoint) -> tuple[UNet, Process]:
    """eps_theta with the EMA weights, in eval mode, and its process. Raises CheckpointError where bytes are damaged."""
    unet = UNet(json.loads(_read(storage, checkpoint, UNET)))
    unet.load_state_dict(safetensors.torch.load(_read(storage, checkpoint, WEIGHTS)))
    scheduler = json.loads(_read(storage, checkpoint, SCHEDULER))
    betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    return unet.eval(), Process.of_betas(betas, scheduler["variance_type"])


def load_state(storage: Storage, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(EMA weights, training state, progress), to resume from. Raises CheckpointError where bytes are damaged."""
    return (
        safetensors.torch.load(_read(storage, checkpoint, WEIGHTS)),
        safetensors.torch.load(_read(storage, checkpoint, STATE)),
        json.loads(_read(storage, checkpoint, PROGRESS)),
    )


def scheduler_config(process: Process) -> dict[str, Any]:
    """The config of a diffusers DDPMScheduler that samples the same process."""
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": process.T,
        "trained_betas": process.beta.tolist(),
        "variance_type": process.variance,
        "prediction_type": "epsilon",
        "clip_sample": True,
    }


def _manifest(storage: Storage, path: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(storage.read(f"{path}/manifest.json"))
        return {"step": int(manifest["step"]), "sha256": dict(manifest["sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{storage.url(path)}/manifest.json is damaged: restore or delete the folder") from error


def _read(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    expected = _manifest(storage, checkpoint.path)["sha256"].get(name)
    try:
        content = storage.read(f"{checkpoint.path}/{name}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{storage.url(checkpoint.path)} lacks {name}: restore or delete the folder") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(
            f"{storage.url(checkpoint.path)}/{name} is damaged: its sha256 differs from the manifest's; "
            "restore the file, or delete the folder and train again"
        )
    return content


def _digest(sums: dict[str, str]) -> str:
    return digest({name: sums.get(name) for name in (UNET, WEIGHTS, SCHEDULER)})


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _tensors(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
