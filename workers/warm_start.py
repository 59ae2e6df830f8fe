"""Other models that a trial names: those that its training begins with, goes by or is encoded by. How a file says it,
and how the program pins it.

A source in a trial is pinned: `base@0f3a9c5d2b7e4816`, of which the digest alone counts in ids. It is that of the id
and the step of a trial of the same sweep, which are known before that is trained, and else of a checkpoint's content.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from workers.mistakes import Open
from workers.sections import Record

# The settings that name another model, by their path in a trial: each is a `ModelSource`, or null. A trial is made when
# all that it names are. With the trunk, of which it goes on, these are the slots of what a trial starts from.
INIT, TEACHER, ENCODER = "training.init", "loss.teacher", "data.encoder"
SLOTS = (INIT, TEACHER, ENCODER)
TRUNK = "trunk"
BEGINNINGS = (TRUNK, INIT)  # what a training needs to begin, and not to go on

SettingsT = TypeVar("SettingsT", bound=Record)


class ModelSource(Record):
    """Another model, and which of its weights."""

    source: Open = Field(
        description="a name of `needs`, a sweep (its best trial), a trial's id, a registered model NAME@ALIAS, or the "
        "path or URI of a checkpoint's folder, ours or diffusers'"
    )
    weights: Literal["ema", "raw"] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default="ema",
        description="which of its weights: the average that is measured, those of the last step, or one of its "
        "training.averages",
    )


class InitConfig(ModelSource):
    """The weights that a training begins with."""

    fresh: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="modules or weights of the network that are random all the same, such as conv_out",
    )


class EncoderConfig(ModelSource):
    """The autoencoder whose latents are diffused."""

    latents: Annotated[tuple[int, int], Field(strict=False), "[channels, halvings]"] | None = Field(
        default=None,
        description="their channels, and how often an image is halved: found by the program, and never set",
    )


def find_latent_shape(encoder: EncoderConfig | None, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """(height, width, channels) of the latents of images of that shape; None where nothing is encoded, or where it is
    not known yet."""
    if encoder is None or encoder.latents is None:
        return None
    channels, halvings = encoder.latents
    return shape[0] >> halvings, shape[1] >> halvings, channels


def split_pin(source: str) -> tuple[str, str]:
    """What a file says of a source, and the 16 hex digits that it is pinned to; the latter empty where it is not."""
    found = re.fullmatch(r"(.+)@([0-9a-f]{16})", source, flags=re.DOTALL)
    return (found[1], found[2]) if found else (source, "")


def list_models(trial: Record) -> dict[str, Any]:
    """The `ModelSource` of each slot of a trial, or of an experiment, that names one and reads it."""
    found = {}
    for slot in SLOTS:
        section, name = (getattr(trial, slot.partition(".")[0]), slot.partition(".")[2])
        model = getattr(section, name, None)
        if model is not None and _reads(section, name):
            found[slot] = model
    return found


def _reads(section: Record, name: str) -> bool:
    """Whether what is chosen in a section reads a setting of it (`Record.READS`)."""
    choosers = [field for field, choices in section.READS.items() if any(name in names for names in choices.values())]
    return all(name in section.READS[field][getattr(section, field)] for field in choosers)


def replace_models(trial: SettingsT, models: Mapping[str, ModelSource | None]) -> SettingsT:
    """The same trial or experiment with other models in these slots."""
    for slot, model in models.items():
        section, _, name = slot.partition(".")
        changed = getattr(trial, section).model_copy(update={name: model})
        trial = trial.model_copy(update={section: changed})
    return trial


def pin_models(
    trial: SettingsT, pins: Mapping[str, str], latents: Mapping[str, tuple[int, int]] = MappingProxyType({})
) -> SettingsT:
    """The same with the sources pinned of which the pins are known, and an encoder with its latents."""
    pinned = {}
    for slot, model in list_models(trial).items():
        if model.source in pins:
            known = {"latents": latents.get(model.source)} if slot == ENCODER else {}
            pinned[slot] = model.model_copy(update={"source": f"{model.source}@{pins[model.source]}", **known})
    return replace_models(trial, pinned)
