"""The weights that a training begins with: read from a checkpoint, and held against the network that takes them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workers.code import drop_pin
from workers.config import Trial, What
from workers.data.sources import Source
from workers.diffusion.formulations import AnyProcess, Continuous, make_process, take_student
from workers.diffusion.predictions import Denoiser
from workers.identity import compute_digest
from workers.kinds import AUTOENCODER, DENOISER
from workers.network import checkpoint as checkpoints
from workers.network.autoencoder_config import find_latent_size
from workers.network.build import build_network, is_foreign, make_network_config
from workers.network.manifest import (
    AVERAGES,
    SAFE,
    STATE,
    Checkpoint,
    CheckpointError,
    choose_average,
    find_url,
    read_file,
    read_object,
)
from workers.noise import make_generator
from workers.storage import Storage
from workers.students import Student, describe_student
from workers.warm_start import ENCODER, INIT, TEACHER, list_models

Choice = Literal["ema", "raw"] | float
Shapes = Mapping[str, tuple[int, ...]]
RAW = "weights."  # what the names of weights begin with in the state of a training
LISTED = 12  # mismatches that a message names


def load_first_weights(checkpoint: Checkpoint, choice: Choice) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours by name. Raises CheckpointError where it has none of that choice, or its
    bytes are damaged."""
    if isinstance(choice, float):
        choose_average(checkpoint, choice)
        return checkpoints.load_averages(checkpoint, [choice])[choice]
    ema, state, _ = checkpoints.load_state(checkpoint)
    if choice == "ema":
        return ema
    if raw := {name.removeprefix(RAW): weights for name, weights in state.items() if name.startswith(RAW)}:
        return raw
    raise CheckpointError(f"{checkpoint.url} holds no weights of its last step; take weights: ema")


def load_teacher(checkpoint: Checkpoint, choice: Choice) -> Denoiser:
    """The model of a checkpoint with those of its weights, which nothing trains. Raises CheckpointError."""
    model, _ = checkpoints.load(checkpoint)
    if choice != "ema":
        model.network.load_state_dict(load_first_weights(checkpoint, choice))
    return model.requires_grad_(False)


def digest_content(checkpoint: Checkpoint) -> str:
    """16 hex digits of all weights that a checkpoint holds, wherever it lies."""
    more = {name: sha for name, sha in checkpoint.sums if name.startswith(AVERAGES) or name == STATE}
    return compute_digest([checkpoint.digest, more])


def keep_copy(storage: Storage, folder: str, checkpoint: Checkpoint) -> None:
    """Writes the weights of a checkpoint, wherever it lies, as one of ours at step 0 into `folder` of the storage.

    Raises CheckpointError where bytes are damaged.
    """
    names = [name.removeprefix(AVERAGES).removesuffix(SAFE) for name, _ in checkpoint.sums if name.startswith(AVERAGES)]
    averages = {float(name): dict(checkpoints.load_averages(checkpoint, [float(name)])[float(name)]) for name in names}
    state = checkpoints.load_state(checkpoint)[1] if STATE in dict(checkpoint.sums) else {}
    own: dict[str, Any] = {}
    if checkpoint.family == DENOISER:
        model, process = checkpoints.load(checkpoint)
        own = {"process": process, "prediction": model.prediction}
    snapshot = checkpoints.Snapshot(
        step=0,
        unet_config=_read_config(checkpoint),
        ema=checkpoints.load_network(checkpoint).state_dict(),
        averages=averages,
        state={name: weights for name, weights in state.items() if name.startswith(RAW)},
        **own,
    )
    checkpoints.save(storage, folder, snapshot, kept=True)


def _read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_object(read_file(checkpoint, checkpoint.config), find_url(checkpoint, checkpoint.config))


@dataclass(frozen=True)
class Offer:
    """What can be taken from a checkpoint: the shapes of its weights by name, which of them there are, and of which
    model they are."""

    shapes: Shapes
    choices: tuple[Choice, ...]
    family: str
    image: tuple[int, int, int]  # height, width and channels of what its network takes
    latents: tuple[int, int] | None = None  # of an autoencoder: their channels, and the halvings of an image
    process: AnyProcess | None = None  # of a denoiser
    prediction: str = ""
    told: What | None = None  # what its network is told of each image
    takes_no_label: bool = False  # and is also asked without


def describe_checkpoint(checkpoint: Checkpoint) -> Offer:
    """Raises CheckpointError as `load` does."""
    names = [name for name, _ in checkpoint.sums]
    averages = [float(name.removeprefix(AVERAGES).removesuffix(SAFE)) for name in names if name.startswith(AVERAGES)]
    raw: list[Choice] = ["raw"] if STATE in names else []
    shapes = measure_weights(checkpoints.load_network(checkpoint).state_dict())
    offer = _make_offer(shapes, ("ema", *raw, *averages), checkpoint.family, _read_config(checkpoint))
    if checkpoint.family != DENOISER:
        return offer
    model, process = checkpoints.load(checkpoint)
    told = model.told.KIND if model.told else None
    of: Any = {"prediction": model.prediction, "told": told, "takes_no_label": model.takes_no_label}
    return replace(offer, process=process, **of)


def describe_trial(trial: Trial, source: Source) -> Offer:
    """The same of what a trial will have made."""
    choices: tuple[Choice, ...] = ("ema", "raw", *trial.training.averages)
    offer = _make_offer(_measure_network(trial, source), choices, trial.model.family, _make_config(trial, source))
    if not trial.diffuses:
        return offer
    process = take_student(make_process(trial.diffusion), describe_student(trial.loss))
    told, dropped = trial.model.told, trial.training.label_dropout > 0
    of: Any = {"prediction": trial.diffusion.prediction, "told": told, "takes_no_label": dropped}
    return replace(offer, process=process, **of)


def _make_offer(shapes: Shapes, choices: tuple[Choice, ...], family: str, config: Mapping[str, Any]) -> Offer:
    """Of a network with this config.json."""
    side = config["sample_size"]
    height, width = side if isinstance(side, list) else (side, side)
    latents = None
    if family == AUTOENCODER:
        channels, rows, _ = find_latent_size(config)
        latents = channels, (height // rows).bit_length() - 1
    return Offer(shapes, choices, family, (height, width, config["in_channels"]), latents)


def find_misfits(slot: str, trial: Trial, source: Source, offer: Offer) -> list[str]:
    """What keeps a trial from going on with what is offered for one of its slots. Empty where it can."""
    model = list_models(trial)[slot]
    if model.weights not in offer.choices:
        return [f"has no weights {model.weights}; it has {', '.join(map(str, offer.choices))}"]
    return CHECKS[slot](trial, source, offer)


def _find_init_misfits(trial: Trial, source: Source, offer: Offer) -> list[str]:
    assert trial.training.init
    return compare_shapes(_measure_network(trial, source), offer.shapes, trial.training.init.fresh)


def _find_teacher_misfits(trial: Trial, source: Source, offer: Offer) -> list[str]:
    """A student sees the noise levels of its teacher, at the same times, and begins with its weights."""
    student, teacher = describe_student(trial.loss) or Student(trial.loss.objective, ""), trial.loss.teacher
    assert teacher
    if offer.process is None:
        return ["is no denoiser, and has nothing that a student could learn; take a model of noise"]
    found = compare_processes(take_student(make_process(trial.diffusion), student), offer.process)
    if offer.told != trial.model.told:
        found.append(f"its network is told {offer.told or 'nothing'}; let its student be told the same")
    if teacher.guidance not in (None, 1) and not offer.takes_no_label:
        found.append(
            f"loss.teacher.guidance: {teacher.guidance:g} needs a teacher that is told labels and was trained without "
            "them, too (training.label_dropout); take another, or leave it out"
        )
    if found or trial.training.init:
        return found
    if offer.prediction != trial.diffusion.prediction and not trial.diffusion.continuous:
        return [
            f"predicts {drop_pin(offer.prediction)}, and its student {drop_pin(trial.diffusion.prediction)}, which "
            "would begin with its weights; take the same, or name other first weights in training.init"
        ]
    differing = compare_shapes(_measure_network(trial, source), offer.shapes, ())
    return [text.replace("training.init.fresh", "training.init, fresh,") for text in differing]


def compare_processes(student: AnyProcess, teacher: AnyProcess) -> list[str]:
    """What keeps a student from learning from a teacher of that process."""
    own = student.student
    assert own
    if isinstance(student, Continuous) or isinstance(teacher, Continuous):
        names = [p.config.formulation if isinstance(p, Continuous) else "discrete" for p in (student, teacher)]
        if names[0] != names[1]:
            return [f"is of diffusion.formulation: {names[1]}, and its student of {names[0]}; take the same"]
        if teacher.student:
            return [f"is {teacher.student}, which teaches nobody; take its teacher"]
        assert isinstance(student, Continuous) and isinstance(teacher, Continuous)
        own_data, taught_data = student.config.sigma_data, teacher.config.sigma_data
        differs = own_data != taught_data
        return [f"has diffusion.sigma_data: {taught_data:g}, and its student {own_data:g}; take the same"] * differs
    if teacher.student and not (own.steps and teacher.student.steps == 2 * own.steps):
        wanted = f"one of {2 * own.steps} steps by {own.objective}, or " if own.steps else ""
        return [f"is {teacher.student}, and {own.objective} learns from {wanted}no student"]
    steps = own.steps or student.T
    last, taught = (int(p.times[-1]) for p in (student, teacher))
    if last != taught:
        return [f"has diffusion.T = {taught}, and its student {last}; take the same"]
    places = [round(teacher.T * k / steps) - 1 for k in range(1, steps + 1)]
    if not torch.allclose(teacher.noise_level[places], student.noise_level, rtol=1e-4):
        return ["has another noise schedule (diffusion.schedule); take the same"]
    return []


def _find_encoder_misfits(trial: Trial, source: Source, offer: Offer) -> list[str]:
    if offer.latents is None:
        return [
            f"is a {offer.family}, which encodes nothing; name a trial with model.kind: autoencoder, or "
            "the folder of diffusers' AutoencoderKL"
        ]
    if offer.image != source.shape:
        made, there = (f"{width}x{height} in {deep}" for height, width, deep in (offer.image, source.shape))
        return [
            f"encodes images of {made} channels, and those of {source.name} are {there}; name one of such, or "
            "set data.resolution"
        ]
    return []


# What keeps a trial from going on with a model that has the weights, by the slot that names it.
CHECKS: dict[str, Callable[[Trial, Source, Offer], list[str]]] = {
    INIT: _find_init_misfits,
    TEACHER: _find_teacher_misfits,
    ENCODER: _find_encoder_misfits,
}


def _make_config(trial: Trial, source: Source) -> dict[str, Any]:
    """The config.json of a trial's network for images of the data set."""
    learned, dropout, told = trial.diffusion.learned, trial.training.label_dropout, source.find_told(trial.model.told)
    of: Any = {"sides": source.sides, "told": told, "label_dropout": dropout}
    return make_network_config(trial.model, source.diffused, learned, **of)


def _measure_network(trial: Trial, source: Source) -> Shapes:
    """The shapes of the weights of that network."""
    config = _make_config(trial, source)
    if is_foreign(config):
        return measure_weights(build_network(config, make_generator(0)).state_dict())
    with torch.device("meta"):
        return measure_weights(build_network(config).state_dict())


def measure_weights(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def compare_shapes(own: Shapes, given: Shapes, fresh: Collection[str]) -> list[str]:
    """What keeps a network with the weights `own` from beginning with the `given` ones, apart from those that are
    `fresh`: each that differs is named. Empty where it can."""
    idle = [part for part in fresh if not any(is_part(name, [part]) for name in own)]
    if idle:
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in own))
        return [f"training.init.fresh: {', '.join(idle)} is no part of the network, which has {parts}"]
    found = []
    for name in dict.fromkeys((*own, *given)):
        if is_part(name, fresh) or own.get(name) == given.get(name):
            continue
        found.append(f"{name} ({_describe(own.get(name))} here, {_describe(given.get(name))} there)")
    if not found:
        return []
    more = f" and {len(found) - LISTED} more" * (len(found) > LISTED)
    return [
        f"{len(found)} of {len(own)} weights do not fit: {', '.join(found[:LISTED])}{more}; take a network of the same "
        "shapes, or name in training.init.fresh what may begin at random"
    ]


def is_part(name: str, parts: Collection[str]) -> bool:
    """Whether a weight is one of these, or inside one of these modules."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _describe(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else "x".join(map(str, shape)) or "a number"
