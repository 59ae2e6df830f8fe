"""Checkpoints: folders that commit by a manifest of sha256 sums, in the layout of diffusers' `DDPMPipeline`.

    step-00002000/  model_index.json
                    unet/config.json, unet/diffusion_pytorch_model.safetensors     the EMA weights: those to evaluate
                    scheduler/scheduler_config.json                                T, betas, prediction, variance;
                                                                                   or that of a continuous formulation
                    averages/0.99.safetensors                                      EMA weights of other lengths
                    state/training.safetensors, state/progress.json                raw weights and Adam's moments
                    state/journal.jsonl                                            the journal up to this step
                    manifest.json                                                  written last

An autoencoder's has vae/, as diffusers' pipelines of latents have, in place of unet/ and scheduler/, and that of a
generator, which diffusers does not know, generator/. That of a model of latents holds its autoencoder in vqvae/, and
`LDMPipeline` opens it.
`DDPMPipeline.from_pretrained` opens such a folder; of a network that is told labels its unet alone is of use, as that
pipeline has none to tell, and of EDM its unet and its scheduler, as it would not feed them. The other way round,
`open_folder` opens what diffusers saves of an unconditional model on pixels: the same layout without state and
manifest, or its files side by side; the weights in one file, in several with an index, or as a variant such as fp16
where that is all there is. Safetensors only: no pickle is ever loaded.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from workers import consent
from workers.bundles import keep_code
from workers.classes import Classes, Told
from workers.config import Mistake
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.gaussian import GaussianDenoiser
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process
from workers.kinds import DENOISER
from workers.network.autoencoder import Autoencoder, FromLatents
from workers.network.averages import load_averages as load_averages
from workers.network.averages import load_chosen
from workers.network.build import CLASS, Unfolding, build_network, find_family, is_foreign
from workers.network.diffusers_config import (
    Scheduler,
    read_foreign,
    read_gaussian,
    read_network,
    read_stage,
)
from workers.network.manifest import (
    EVALUATED,
    INDEX,
    JOURNAL,
    MANIFEST,
    PROGRESS,
    SCHEDULER,
    STAGE,
    STAGE_FILES,
    STATE,
    Checkpoint,
    CheckpointError,
    find_url,
    hash_bytes,
    is_kept,
    make_checkpoint,
    name_average,
    name_step,
    name_width,
    open_committed,
    open_stage,
    read_bytes,
    read_file,
    read_object,
    write_manifest,
)
from workers.network.pipeline_index import check_latents, make_index, read_index
from workers.network.student_config import make_config, read_config
from workers.network.weights import find_weights, load_weights, read_shards, write_tensors
from workers.noise import make_generator
from workers.storage import Storage
from workers.students import Student

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The weights of a network as diffusers names them, a variant's among them, or the index of several files with them.
PICKLES = (".bin", ".ckpt", ".pth", ".pt")
NETWORKS = tuple(PurePosixPath(config).parts[0] for config, *_ in EVALUATED.values())  # the folders of networks
R = TypeVar("R")


@dataclass(frozen=True)
class Description:
    """What the config files say of a checkpoint."""

    shape: tuple[int, int, int]  # height, width, channels of an image, as `Dataset.shape`
    T: int | None  # None where it is continuous
    prediction: str  # a name in workers.diffusion.predictions.PREDICTIONS; of a continuous formulation its own
    variance: str  # a name in workers.kinds.VARIANCES; of a continuous formulation empty
    clip: bool  # whether the model's own scheduler clips x_0_hat to [-1, 1]
    parameters: int
    told: Told | None = None  # what its network is told of each image
    takes_no_label: bool = False  # whether it was trained without that, too, so that it can be guided
    sides: tuple[int, ...] = ()  # of signals and volumes, which are folded into `shape` (`workers.sides`)
    family: str = DENOISER  # of another one T is None, prediction and variance are empty
    student: Student | None = None  # what it is where it has no bound
    latent: bool = False  # whether it diffuses the latents of an autoencoder

    @property
    def classes(self) -> Classes | None:
        """The classes that its network is told; None where it is told none."""
        return self.told if isinstance(self.told, Classes) else None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint is written from: all that an evaluation and the training's next step need."""

    step: int
    unet_config: dict[str, Any]  # the network's, of any family
    stage: tuple[dict[str, Any], Mapping[str, Tensor]] | None = None  # of a model of latents its autoencoder's, weights
    process: AnyProcess | None = None  # of a denoiser: of all times that the network is told
    student: Student | None = None
    prediction: str = "eps"
    ema: Mapping[str, Tensor]
    averages: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    widths: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    posthoc: Mapping[str, str] = field(default_factory=dict)  # the files of `workers.network.averages`, by sha256
    state: Mapping[str, Tensor] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    journal: bytes = b""  # the trial's, as it is at that step


def save(storage: Storage, folder: str, snapshot: Snapshot, kept: bool = False) -> Checkpoint:
    """Writes `folder/step-<step>` whole; then removes those before it that no row of a sweep asks for (`kept`)."""
    path = f"{folder}/{name_step(snapshot.step)}"
    family, process = find_family(snapshot.unet_config), snapshot.process
    config, weights, *_ = EVALUATED[family]
    latent, of = snapshot.stage is not None, (snapshot.prediction, snapshot.student)
    scheduler = make_config(process, *of, clip=not latent) if process else {}
    stage = [_write_json(snapshot.stage[0]), write_tensors(snapshot.stage[1])] if snapshot.stage else []
    files = {
        INDEX: _write_json(make_index(snapshot.unet_config, scheduler, latent=latent)),
        config: _write_json(snapshot.unet_config),
        weights: write_tensors(snapshot.ema),
        **({SCHEDULER: _write_json(scheduler)} if scheduler else {}),
        STATE: write_tensors(snapshot.state),
        PROGRESS: _write_json({**snapshot.progress, "step": snapshot.step}),
        JOURNAL: snapshot.journal,
        **dict(zip(STAGE_FILES, stage, strict=False)),
        **{name_average(decay): write_tensors(weights) for decay, weights in snapshot.averages.items()},
        **{name_width(width): write_tensors(weights) for width, weights in snapshot.widths.items()},
    }
    for name, content in files.items():
        storage.write(f"{path}/{name}", content)
    sums = {name: hash_bytes(content) for name, content in files.items()}
    write_manifest(storage, path, snapshot.step, sums, kept, posthoc=snapshot.posthoc)
    for other in storage.list(folder):
        if other < name_step(snapshot.step) and not is_kept(storage, f"{folder}/{other}"):
            storage.delete(f"{folder}/{other}")
    return make_checkpoint(storage.root, path, snapshot.step, sums, family=family, kept=kept, posthoc=snapshot.posthoc)


def open_folder(folder: str | Path) -> Checkpoint:
    """The checkpoint in one folder, given by its path or URI: one of ours, or what diffusers saved.

    Of diffusers' it takes an unconditional model on pixels: a pipeline's folder, whose two parts may lie in unet/ and
    scheduler/ or beside model_index.json, or a UNet2DModel's with a scheduler_config.json beside it; and the folder of
    an AutoencoderKL. Such a folder is loaded once on the way. Raises CheckpointError with what is wrong with the folder
    and what to do.
    """
    try:
        storage = Storage(folder)
        folders = ("", *NETWORKS, "scheduler", STAGE)
        parts = {part: storage.list(part) for part in folders if not part or storage.exists(part)}
    except Mistake as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be opened ({error}); give a folder, or a URI such as s3://bucket/path"
        ) from error
    consent.look_in(storage)
    if MANIFEST in parts[""]:
        return open_committed(storage, "")
    if not parts[""]:
        raise CheckpointError(
            f"{folder} is not a folder, or an empty one; give the folder that holds model_index.json or config.json. "
            "A repository of the Hugging Face hub is downloaded first: hf download NAME --local-dir FOLDER"
        )
    part = next((name for name in NETWORKS if name in parts), NETWORKS[0])
    if INDEX in parts[""] and part == NETWORKS[0]:
        _read_meant(
            storage.find_url(INDEX), read_index, read_object(read_bytes(storage, INDEX), storage.find_url(INDEX))
        )
    weights = _place_in_folder(part, find_weights(storage.root, parts.get(part, parts[""])), parts)
    names, family = [_place_in_folder(part, "config.json", parts), weights], DENOISER
    if part != NETWORKS[0] or names[0] in parts[""]:
        family = find_family(read_object(read_bytes(storage, names[0]), storage.find_url(names[0])))
    if family == DENOISER:
        names.append(_place_in_folder("scheduler", PurePosixPath(SCHEDULER).name, parts))
    there = {f"{part}/{name}".lstrip("/") for part, inside in parts.items() for name in inside}
    if weights in there and weights.endswith(".json"):
        shards = read_shards(read_bytes(storage, weights), storage.find_url(weights))
        names += [_place_in_folder(part, shard, parts) for shard in sorted(set(shards.values()))]
    names += STAGE_FILES if STAGE in parts else ()
    if missing := [name for name in names if name not in there]:
        raise CheckpointError(f"{storage.root} lacks {' and '.join(missing)}: {_advise(there)}")
    sums = {name: hash_bytes(read_bytes(storage, name)) for name in names}
    checkpoint = make_checkpoint(storage.root, "", None, sums, weights, family=family)
    for whole in filter(None, (checkpoint, open_stage(checkpoint))):
        load_network(whole)
    describe(checkpoint)
    return checkpoint


def describe(checkpoint: Checkpoint) -> Description:
    """What the checkpoint holds, from its config files alone. Raises CheckpointError as `load` does."""
    network, scheduler, shape = _load_configured(checkpoint)
    parameters = sum(p.numel() for p in network.parameters())
    if scheduler is None:
        return Description(shape, None, "", "", False, parameters, family=checkpoint.family)
    if stage := open_stage(checkpoint):
        _read_meant(checkpoint.url, partial(check_latents, shape), _read_object_of(stage, stage.config))
        shape = describe(stage).shape
    process = scheduler.drawn_along
    told = Denoiser(network, scheduler.process, scheduler.prediction)
    variance = process.variance if isinstance(process, Process) else ""
    of = shape, process.T, scheduler.prediction, variance, scheduler.clip, parameters
    sides = network.sides if isinstance(network, Unfolding) else ()
    more: dict[str, Any] = {"student": scheduler.student, "latent": stage is not None}
    return Description(*of, told.told, told.takes_no_label, sides, **more)


def load(checkpoint: Checkpoint) -> tuple[Denoiser, AnyProcess]:
    """The model of a denoiser as a module in eval mode, and its process, of a student that of its own steps.

    The module is called as a `Model` is, with t in 1..T or real t, and returns a `Prediction` whatever its network
    predicts; its weights are float32. Raises CheckpointError where bytes are damaged or of another kind of model.
    """
    network, scheduler = _load_whole(checkpoint)
    if scheduler is None:
        raise CheckpointError(
            f"{checkpoint.url} holds no denoiser, but a model of the {checkpoint.family}s; give a trial of a network "
            "that is one, such as model.kind: unet"
        )
    prediction = "eps" if isinstance(network, GaussianDenoiser) else scheduler.prediction
    return Denoiser(network, scheduler.process, prediction).eval(), scheduler.drawn_along


def load_autoencoder(checkpoint: Checkpoint) -> Autoencoder:
    """The autoencoder of a checkpoint in eval mode, its weights float32. Raises CheckpointError as `load` does."""
    network = load_network(checkpoint)
    if not isinstance(network, Autoencoder):
        raise CheckpointError(
            f"{checkpoint.url} holds no autoencoder, but a model of the {checkpoint.family}s; give a trial with "
            "model.kind: autoencoder, or the folder of diffusers' AutoencoderKL"
        )
    return network


def load_decoder(checkpoint: Checkpoint) -> FromLatents:
    """What makes images of z, in eval mode. Raises CheckpointError as `load` does."""
    network = load_network(checkpoint)
    return network if isinstance(network, FromLatents) else load_autoencoder(checkpoint)


def load_network(checkpoint: Checkpoint) -> nn.Module:
    """The network alone, of any family, in eval mode. Raises CheckpointError as `load` does."""
    return _load_whole(checkpoint)[0].eval()


def _load_whole(checkpoint: Checkpoint) -> tuple[nn.Module, Scheduler | None]:
    network, scheduler, _ = _load_configured(checkpoint)
    if isinstance(network, GaussianDenoiser):
        return network, scheduler
    where, weights = find_url(checkpoint, checkpoint.weights), load_chosen(checkpoint)
    for name, w in weights.items():
        if w.dtype not in FLOATS or not torch.isfinite(w.float()).all():
            raise CheckpointError(f"{where}: {name} ({w.dtype}) holds other things than finite numbers: save it again")
    is_ours = next(network.parameters()).is_meta
    try:  # of one of ours first without memory for what the config claims
        network.load_state_dict({name: w.to("meta") if is_ours else w for name, w in weights.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{where} does not fit the config.json beside it, or one of the two is damaged: {error}"
        ) from error
    if is_ours:
        network.to_empty(device="cpu").load_state_dict(weights)
    return network, scheduler


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes what diffusers reads of a checkpoint to a local folder, without the state of the training; of a network,
    prediction or variance from outside, its code as well.

    `DDPMPipeline.from_pretrained` and `open_folder` open it. Raises CheckpointError where bytes are damaged.
    """
    config_name, weights_name, *others = EVALUATED[checkpoint.family]
    config = _read_object_of(checkpoint, config_name)
    scheduler = _read_object_of(checkpoint, SCHEDULER) if others else {}
    kinds = (config.get(CLASS), scheduler.get(CLASS), scheduler.get("prediction_type"), scheduler.get("variance_type"))
    keep_code(Storage(folder), (kind for kind in kinds if isinstance(kind, str)))
    stage = STAGE_FILES if open_stage(checkpoint) else ()
    for name in (INDEX, *EVALUATED[checkpoint.family], *stage):
        if name == INDEX:
            content = _write_json(make_index(config, scheduler, latent=bool(stage)))
        elif name == weights_name and (checkpoint.width is not None or checkpoint.weights.endswith(".json")):
            content = write_tensors(load_chosen(checkpoint))
        else:
            content = read_file(checkpoint, checkpoint.weights if name == weights_name else name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def load_process(checkpoint: Checkpoint) -> AnyProcess:
    """The process of a denoiser alone, from the config files. Raises CheckpointError as `load` does."""
    scheduler = _load_configured(checkpoint)[1]
    assert scheduler, checkpoint.family
    return scheduler.drawn_along


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(EMA weights, training state, progress), to resume from. Raises CheckpointError where bytes are damaged."""
    progress = _read_object_of(checkpoint, PROGRESS)
    return load_weights(checkpoint, EVALUATED[checkpoint.family][1]), load_weights(checkpoint, STATE), progress


def _load_configured(checkpoint: Checkpoint) -> tuple[nn.Module, Scheduler | None, tuple[int, int, int]]:
    """(network, scheduler of a denoiser, image shape) of the config files. A network of ours is on the meta device:
    without memory."""
    config, where = _read_object_of(checkpoint, checkpoint.config), find_url(checkpoint, checkpoint.config)
    if config.get("_class_name") == "GaussianDenoiser":  # the canary's
        shape, beside = _read_meant(where, read_gaussian, config), find_url(checkpoint, SCHEDULER)
        scheduler = _read_meant(beside, read_config, _read_object_of(checkpoint, SCHEDULER))
        if not isinstance(scheduler.process, Process):
            raise CheckpointError(f"{beside}: a GaussianDenoiser goes with a process of T times")
        return GaussianDenoiser(config, scheduler.process), scheduler, shape
    is_stage = checkpoint.family != DENOISER
    read = read_stage if is_stage else read_foreign if is_foreign(config) else read_network
    shape = _read_meant(where, read, config)
    try:
        with nullcontext() if is_foreign(config) else torch.device("meta"):
            network = build_network(config, make_generator(0) if is_foreign(config) else None)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} does not describe a network that can be built here: {error}") from error
    if is_stage:
        return network, None, shape
    where = find_url(checkpoint, SCHEDULER)
    scheduler = _read_meant(where, read_config, _read_object_of(checkpoint, SCHEDULER))
    if (config["out_channels"] == 2 * config["in_channels"]) != scheduler.process.learned:
        variance = "none" if isinstance(scheduler.process, Continuous) else scheduler.process.variance
        raise CheckpointError(
            f"{where}: the variance is {variance}, but the network beside it has out_channels "
            f"{config['out_channels']} for in_channels {config['in_channels']}: a learned variance takes twice as "
            "many, a fixed one as many"
        )
    return network, scheduler, shape


def _read_object_of(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return read_object(read_file(checkpoint, name), find_url(checkpoint, name))


def _read_meant(where: str, read: Callable[[dict[str, Any]], R], content: dict[str, Any]) -> R:
    try:
        return read(content)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _place_in_folder(part: str, name: str, parts: dict[str, list[str]]) -> str:
    """Where diffusers looks for a file of `part`: in the folder of that name, or in the root if there is none."""
    return f"{part}/{name}" if part in parts else name


def _advise(there: set[str]) -> str:
    if pickles := sorted(name for name in there if name.endswith(PICKLES)):
        return (
            f"{', '.join(pickles)} may be weights as a pickle, which can run code and is not opened here; where you "
            "trust it, open it with diffusers and write pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    return (
        f"it holds {sorted(there)[:10]}; give a folder of pipeline.save_pretrained(folder, safe_serialization=True), "
        "or one of step-... with a manifest.json"
    )


def _write_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
