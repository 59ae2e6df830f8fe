"""The config.json of an autoencoder, which is that of diffusers' AutoencoderKL, and what keeps one from being built."""

from collections.abc import Mapping
from typing import Any

from workers.config import LossConfig, ModelConfig
from workers.kinds import GENERATOR, OBJECTIVES
from workers.network.unet_config import choose_norm_groups, find_width_mistakes
from workers.sides import get_sides, show_resolution

AUTOENCODER_CLASS, GENERATOR_CLASS = "AutoencoderKL", "ImageGenerator"
# Ours in such a file, which diffusers keeps and passes over: the law of p(x | z), and how it was trained.
DECODER, BETA, ADVERSARIAL = "_decoder", "_beta", "_adversarial"
# What diffusers takes for a field that is left out.
AUTOENCODER_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def make_autoencoder_config(model: ModelConfig, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The config.json of the AutoencoderKL that `model` means for images of this shape (height, width, channels).

    Raises ValueError with all that `find_stage_mistakes` finds.
    """
    if mistakes := find_stage_mistakes(model, shape):
        raise ValueError("\n".join(mistakes))
    height, width, channels = shape
    levels = len(model.multipliers)
    return {
        "_class_name": AUTOENCODER_CLASS,
        **AUTOENCODER_DEFAULTS,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [model.channels * multiplier for multiplier in model.multipliers],
        "layers_per_block": model.blocks,
        "latent_channels": model.latent_channels,
        "norm_num_groups": choose_norm_groups(model),
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def make_generator_config(model: ModelConfig, shape: tuple[int, int, int]) -> dict[str, Any]:
    """That of a generator, which is the decoder of such an autoencoder."""
    return make_autoencoder_config(model, shape) | {"_class_name": GENERATOR_CLASS}


def find_stage_mistakes(model: ModelConfig, shape: tuple[int, int, int]) -> list[str]:
    """What keeps an autoencoder or a generator from being built for images of this shape, and what to do."""
    mistakes = find_width_mistakes(model)
    halvings, sides = len(model.multipliers) - 1, get_sides(shape[:2])
    if any(side % 2**halvings for side in sides):
        most = min((side & -side).bit_length() for side in sides)
        mistakes.append(
            f"model.multipliers: {halvings + 1} levels halve the image {halvings} times, but {show_resolution(sides)} "
            f"pixels can be halved only {most - 1} times; take at most {most} multipliers, or another data.resolution"
        )
    return mistakes


def find_discriminator_mistakes(loss: LossConfig, shape: tuple[int, int, int]) -> list[str]:
    """What keeps a discriminator from judging images of this shape."""
    least, layers = min(shape[:2]), loss.discriminator_layers
    if (loss.adversarial is None and OBJECTIVES[loss.objective].family != GENERATOR) or least >= 2**layers:
        return []
    return [
        f"loss.discriminator_layers: {layers} layers halve the image as often, and its smaller side has {least} "
        f"pixels; take at most {least.bit_length() - 1}"
    ]


def find_latent_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents, by a config.json."""
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    height, width = (side >> len(config["block_out_channels"]) - 1 for side in sides)
    return config["latent_channels"], height, width
