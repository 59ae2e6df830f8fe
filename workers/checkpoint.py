"""Checkpoints: folders that commit by a manifest of sha256 sums, in the layout of diffusers' `DDPMPipeline`.

    step-00002000/  model_index.json
                    unet/config.json, unet/diffusion_pytorch_model.safetensors     the EMA weights: those to evaluate
                    scheduler/scheduler_config.json                                T, betas, prediction, variance
                    averages/0.99.safetensors                                      EMA weights of other lengths
                    state/training.safetensors, state/progress.json                raw weights and Adam's moments
                    manifest.json                                                  written last

`DDPMPipeline.from_pretrained` opens such a folder. The other way round, `open_folder` opens what diffusers saves of an
unconditional model on pixels: the same layout without state and manifest, or its three files side by side. Safetensors
only: no pickle is ever loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workers.config import Mistake, digest
from workers.diffusers_config import VERSION, Scheduler, read_index, read_network, read_scheduler, scheduler_config
from workers.diffusion.gaussian import GaussianDenoiser
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process
from workers.storage import Storage
from workers.unet import UNet

UNET, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, INDEX, MANIFEST = "scheduler/scheduler_config.json", "model_index.json", "manifest.json"
STATE, PROGRESS = "state/training.safetensors", "state/progress.json"
AVERAGES, SAFE = "averages/", ".safetensors"
EVALUATED = (UNET, WEIGHTS, SCHEDULER)  # what an evaluation reads
PICKLES = (".bin", ".ckpt", ".pth", ".pt")

R = TypeVar("R")


class CheckpointError(Mistake):
    """A checkpoint is incomplete, its bytes are not those that were written, or it is of another kind of model."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: all that another process needs to load it, and to notice that it changed.

    `digest` addresses what an evaluation sees: weights, network and process. The same files have the same digest
    wherever they lie.
    """

    root: str  # of the storage
    path: str  # relative to the root; empty where the root is the checkpoint's folder
    step: int | None  # None where a folder that we did not write does not say
    digest: str
    sums: tuple[tuple[str, str], ...]  # (file below path, sha256 in hex), of every file that is read
    weights: str = WEIGHTS  # the file that is loaded

    @property
    def url(self) -> str:
        """Where a person finds it."""
        return Storage(self.root).url(self.path)


@dataclass(frozen=True)
class Description:
    """What the config files say of a checkpoint."""

    shape: tuple[int, int, int]  # height, width, channels of an image, as `Dataset.shape`
    T: int
    prediction: str  # a name in workers.diffusion.predictions.PREDICTIONS
    variance: str  # a name in workers.diffusion.process.VARIANCES or LEARNED
    clip: bool  # whether the model's own scheduler clips x_0_hat to [-1, 1]
    parameters: int


def save(
    storage: Storage,
    folder: str,
    step: int,
    unet_config: dict[str, Any],
    process: Process,
    ema: dict[str, Tensor],
    state: dict[str, Tensor],
    progress: dict[str, Any],
    prediction: str = "eps",
    averages: Mapping[float, dict[str, Tensor]] = MappingProxyType({}),
) -> Checkpoint:
    """Writes `folder/step-<step>` whole; then removes the checkpoints before it, which it makes superfluous."""
    path = f"{folder}/step-{step:08}"
    files = {
        INDEX: _index(),
        UNET: _json(unet_config),
        WEIGHTS: _tensors(ema),
        SCHEDULER: _json(scheduler_config(process, prediction)),
        STATE: _tensors(state),
        PROGRESS: _json({**progress, "step": step}),
        **{_average(decay): _tensors(weights) for decay, weights in averages.items()},
    }
    for name, content in files.items():
        storage.write(f"{path}/{name}", content)
    sums = {name: _sha256(content) for name, content in files.items()}
    storage.write_json(f"{path}/{MANIFEST}", {"step": step, "sha256": sums})
    for other in storage.list(folder):
        if other < f"step-{step:08}":
            storage.delete(f"{folder}/{other}")
    return _checkpoint(storage.root, path, step, sums)


def newest(storage: Storage, folder: str) -> Checkpoint | None:
    """The complete checkpoint of the highest step in `folder`; one without a manifest does not count.

    Raises CheckpointError where its manifest is damaged.
    """
    for name in reversed(storage.list(folder)):
        path = f"{folder}/{name}"
        if storage.exists(f"{path}/{MANIFEST}"):
            return committed(storage, path)
    return None


def open_folder(folder: str | Path) -> Checkpoint:
    """The checkpoint in one folder, given by its path or URI: one of ours, or what diffusers saved.

    Of diffusers' it takes an unconditional model on pixels: a pipeline's folder, whose two parts may lie in unet/ and
    scheduler/ or beside model_index.json, or a UNet2DModel's with a scheduler_config.json beside it. Such a folder is
    loaded once on the way. Raises CheckpointError with what is wrong with the folder and what to do.
    """
    try:
        storage = Storage(folder)
        parts = {part: storage.list(part) for part in ("", "unet", "scheduler") if not part or storage.exists(part)}
    except (Mistake, OSError) as error:
        raise CheckpointError(
            f"{folder} cannot be opened ({error.__cause__ or error}); give a folder, or a URI such as s3://bucket/path"
        ) from error
    if MANIFEST in parts[""]:
        return committed(storage, "")
    if not parts[""]:
        raise CheckpointError(
            f"{folder} is not a folder, or an empty one; give the folder that holds model_index.json or config.json. "
            f"A repository of the Hugging Face hub is downloaded first: hf download NAME --local-dir FOLDER"
        )
    if INDEX in parts[""]:
        _meant(storage.url(INDEX), read_index, _object(_bytes(storage, INDEX), storage.url(INDEX)))
    names = [_beside("unet", "config.json", parts), _beside("unet", PurePosixPath(WEIGHTS).name, parts)]
    names.append(_beside("scheduler", PurePosixPath(SCHEDULER).name, parts))
    there = {f"{part}/{name}".lstrip("/") for part, inside in parts.items() for name in inside}
    if missing := [name for name in names if name not in there]:
        raise CheckpointError(f"{storage.root} lacks {' and '.join(missing)}: {_advice(there)}")
    sums = {name: _sha256(_bytes(storage, name)) for name in names}
    checkpoint = _checkpoint(storage.root, "", None, sums)
    load(checkpoint)
    return checkpoint


def averaged(checkpoint: Checkpoint, ema: float | None) -> Checkpoint:
    """The same checkpoint with another of its averages to be loaded: another model, with a digest of its own.

    None is the average that the checkpoint was written for. Raises CheckpointError where it holds no such average.
    """
    if ema is None:
        return checkpoint
    sums = dict(checkpoint.sums)
    if _average(ema) not in sums:
        held = ", ".join(name.removeprefix(AVERAGES).removesuffix(SAFE) for name in sums if name.startswith(AVERAGES))
        raise CheckpointError(f"{checkpoint.url} holds no average of evaluation.ema = {ema}; it has {held or 'none'}")
    files = {name: sums[_file(sums, name)] for name in EVALUATED} | {WEIGHTS: sums[_average(ema)]}
    return replace(checkpoint, digest=digest(files), weights=_average(ema))


def models(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoint, and what each of its averages makes of it."""
    kept = [name.removeprefix(AVERAGES) for name, _ in checkpoint.sums if name.startswith(AVERAGES)]
    return [checkpoint, *(averaged(checkpoint, float(name.removesuffix(SAFE))) for name in kept)]


def load_averages(checkpoint: Checkpoint, decays: Iterable[float]) -> dict[float, dict[str, Tensor]]:
    """The further averages, to resume from. Raises CheckpointError where bytes are damaged."""
    return {decay: _weights(checkpoint, _average(decay)) for decay in decays}


def _average(decay: float) -> str:
    return f"{AVERAGES}{decay}{SAFE}"


def describe(checkpoint: Checkpoint) -> Description:
    """What the checkpoint holds, from its config files alone. Raises CheckpointError as `load` does."""
    unet, scheduler, shape = _configured(checkpoint)
    process = scheduler.process
    parameters = sum(p.numel() for p in unet.parameters())
    return Description(shape, process.T, scheduler.prediction, process.variance, scheduler.clip, parameters)


def load(checkpoint: Checkpoint) -> tuple[Denoiser, Process]:
    """The model as a module in eval mode, and its process.

    The module is called as a `Model` is, with t in 1..T, and gives a `Prediction` whatever its network predicts; its
    weights are float32. Raises CheckpointError where bytes are damaged or of another kind of model.
    """
    unet, scheduler, _ = _configured(checkpoint)
    if isinstance(unet, GaussianDenoiser):
        return Denoiser(unet, scheduler.process, "eps").eval(), scheduler.process
    where, weights = _url(checkpoint, checkpoint.weights), _weights(checkpoint, checkpoint.weights)
    for name, w in weights.items():
        if not (w.is_floating_point() and torch.isfinite(w).all()):
            raise CheckpointError(f"{where}: {name} ({w.dtype}) holds other things than finite numbers: save it again")
    try:
        unet.to_empty(device="cpu").load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{where} does not fit the config.json beside it, or one of the two is damaged: {error}"
        ) from error
    return Denoiser(unet, scheduler.process, scheduler.prediction).eval(), scheduler.process


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes what diffusers reads of a checkpoint to a local folder, without the state of the training.

    `DDPMPipeline.from_pretrained` and `open_folder` open it. Raises CheckpointError where bytes are damaged.
    """
    for name in (INDEX, *EVALUATED):
        content = _index() if name == INDEX else _read(checkpoint, checkpoint.weights if name == WEIGHTS else name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def process_of(checkpoint: Checkpoint) -> Process:
    """The process alone, from the config files. Raises CheckpointError as `load` does."""
    return _configured(checkpoint)[1].process


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(EMA weights, training state, progress), to resume from. Raises CheckpointError where bytes are damaged."""
    progress = _object(_read(checkpoint, PROGRESS), _url(checkpoint, PROGRESS))
    return _weights(checkpoint, WEIGHTS), _weights(checkpoint, STATE), progress


def committed(storage: Storage, path: str) -> Checkpoint:
    """The checkpoint of ours at `path`, from its manifest."""
    where = storage.url(_join(path, MANIFEST))
    manifest = _object(_bytes(storage, _join(path, MANIFEST)), where)
    try:
        sums = {name: str(manifest["sha256"][name]) for name in (INDEX, *EVALUATED, STATE, PROGRESS)}
        sums |= {name: str(sha) for name, sha in manifest["sha256"].items() if name.startswith(AVERAGES)}
        return _checkpoint(storage.root, path, int(manifest["step"]), sums)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where} is damaged: restore or delete the folder") from error


def _index() -> bytes:
    return _json(
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
    )


def _checkpoint(root: str, path: str, step: int | None, sums: dict[str, str]) -> Checkpoint:
    files = {name: sums[_file(sums, name)] for name in EVALUATED}
    return Checkpoint(root, path, step, digest(files), tuple(sorted(sums.items())))


def _configured(checkpoint: Checkpoint) -> tuple[nn.Module, Scheduler, tuple[int, int, int]]:
    """(network, scheduler, image shape) of the config files. A U-Net is on the meta device: without memory."""
    config, where = _object(_read(checkpoint, UNET), _url(checkpoint, UNET)), _url(checkpoint, UNET)
    if config.get("_class_name") == "GaussianDenoiser":  # the canary's
        scheduler = _meant(_url(checkpoint, SCHEDULER), read_scheduler, _object(_read(checkpoint, SCHEDULER), where))
        size, channels = config["sample_size"], config["in_channels"]
        return GaussianDenoiser(config, scheduler.process), scheduler, (size, size, channels)
    shape = _meant(where, read_network, config)
    try:
        with torch.device("meta"):
            unet = UNet(config)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} does not describe a network that can be built here: {error}") from error
    where = _url(checkpoint, SCHEDULER)
    scheduler = _meant(where, read_scheduler, _object(_read(checkpoint, SCHEDULER), where))
    if (config["out_channels"] == 2 * config["in_channels"]) != scheduler.process.learned:
        raise CheckpointError(
            f"{where}: the variance is {scheduler.process.variance}, but the network beside it has out_channels "
            f"{config['out_channels']} for in_channels {config['in_channels']}: a learned variance takes twice as "
            "many, a fixed one as many"
        )
    return unet, scheduler, shape


def _meant(where: str, read: Callable[[dict[str, Any]], R], content: dict[str, Any]) -> R:
    try:
        return read(content)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _beside(part: str, name: str, parts: dict[str, list[str]]) -> str:
    """Where diffusers looks for a file of `part`: in the folder of that name, or in the root if there is none."""
    return f"{part}/{name}" if part in parts else name


def _advice(there: set[str]) -> str:
    if pickles := sorted(name for name in there if name.endswith(PICKLES)):
        return (
            f"{', '.join(pickles)} may be weights as a pickle, which can run code and is not opened here; where you "
            "trust it, open it with diffusers and write pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    return (
        f"it holds {sorted(there)[:10]}; give a folder of pipeline.save_pretrained(folder, safe_serialization=True), "
        "or one of step-... with a manifest.json"
    )


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    """A file's content, checked against its sum before anything is made of it."""
    sums = dict(checkpoint.sums)
    content = _bytes(Storage(checkpoint.root), _join(checkpoint.path, _file(sums, name)))
    if _sha256(content) != sums[_file(sums, name)]:
        raise CheckpointError(
            f"{_url(checkpoint, name)} is damaged: its sha256 differs from "
            + (
                "that of the moment it was opened; run the command again when nothing writes to it"
                if checkpoint.step is None
                else "the manifest's; restore the file, or delete the folder and train again"
            )
        )
    return content


def _file(names: Iterable[str], name: str) -> str:
    """Which of `names` is our `name`; of diffusers' layouts, some have the same files without folders."""
    [found] = [n for n in names if PurePosixPath(n).name == PurePosixPath(name).name]
    return found


def _url(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.url}/{_file(dict(checkpoint.sums), name)}"


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _bytes(storage: Storage, path: str) -> bytes:
    try:
        return storage.read(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{storage.url(path)} is missing: restore it, or delete the folder") from error
    except OSError as error:
        raise CheckpointError(f"{storage.url(path)} cannot be read: {error}") from error


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is not JSON ({error}); restore or delete the folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is damaged: it holds no JSON object; restore or delete the folder")
    return found


def _weights(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    content = _read(checkpoint, name)
    try:
        return dict(safetensors.torch.load(content))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{_url(checkpoint, name)} is damaged: it is not safetensors ({error}); restore or save it again"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _tensors(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
