"""The shape of eps_theta as data: from our `ModelConfig` to the config.json of diffusers' UNet2DModel.

Pure Python, so that an experiment file can be checked, and its mistakes told, without importing torch.
"""

from collections.abc import Mapping
from typing import Any

from workers.classes import MOST_CLASSES, Classes
from workers.config import ModelConfig
from workers.sides import Resolution, get_sides, show_resolution

# The fields of UNet2DModel's config.json with the values it takes for a field that is left out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
UNET = "unet"  # what it is called in an experiment file
MOST_WEIGHTS = 20e9  # 80 GB in float32, and four times that in training
LABELS = "_labels"  # ours in such a file, which diffusers keeps and passes over: [name, images], a class each


def choose_norm_groups(model: ModelConfig) -> int:
    """Groups of the group norms: `model.norm_groups`, but at least 4 channels a group, as in the paper (128 in 32).

    A group of one channel would subtract the time embedding, which is constant over the image, right after it is
    added: the network would not know t.
    """
    return max(1, min(model.norm_groups, model.channels // 4))


def find_mistakes(model: ModelConfig, shape: tuple[int, int, int]) -> list[str]:
    """`find_unet_mistakes` of images of this shape (height, width, channels)."""
    return find_unet_mistakes(model, resolution=shape[:2])


def find_unet_mistakes(model: ModelConfig, *, resolution: Resolution) -> list[str]:
    """What keeps `model` from being built for images of that size, and what to do; empty if nothing does."""
    mistakes = []
    groups, levels = choose_norm_groups(model), len(model.multipliers)
    if model.channels < 4 or model.channels % 2:
        mistakes.append(
            f"model.channels: {model.channels} must be even and at least 4, "
            "as the time embedding is half sines and half cosines"
        )
    elif model.channels % groups:
        below = model.channels // groups * groups
        mistakes.append(
            f"model.channels: {model.channels} cannot be split into {groups} equal groups for the group norms; "
            f"take {below} or {below + groups} channels, or another model.norm_groups"
        )
    if any(multiplier < 1 for multiplier in model.multipliers):
        mistakes.append(f"model.multipliers: {list(model.multipliers)} must all be at least 1")
    halvings, sides = levels - 1, get_sides(resolution)
    if any(side % 2**halvings for side in sides):
        most = min((side & -side).bit_length() for side in sides)
        near = [[side // 2**halvings * 2**halvings, -(-side // 2**halvings) * 2**halvings] for side in sides]
        sizes = [show_resolution((height, width)) for height, width in zip(*near, strict=True) if height and width]
        mistakes.append(
            f"model.multipliers: {levels} levels halve the image {halvings} times, but {show_resolution(sides)} pixels "
            f"can be halved only {most - 1} times; take at most {most} multipliers, "
            f"or data.resolution: {' or '.join(sizes)}"
        )
    else:
        present = list_resolutions(model, resolution)
        absent = [size for size in model.attention if size not in present]
        if absent:
            mistakes.append(
                f"model.attention: {absent} is at none of the network's resolutions; "
                f"choose from {present}, or [] for attention in the middle only"
            )
    if not mistakes and (n := count_weights(model, resolution=resolution)) > MOST_WEIGHTS:
        mistakes.append(
            f"model: channels {model.channels}, multipliers {list(model.multipliers)} and blocks {model.blocks} make "
            f"about {n:.2g} weights, more than {MOST_WEIGHTS:.2g}; take fewer"
        )
    return mistakes


def list_resolutions(model: ModelConfig, resolution: Resolution) -> list[int]:
    """What `model.attention` calls each level: the smaller side of the image there."""
    return [min(get_sides(resolution)) >> level for level in range(len(model.multipliers))]


def count_weights(model: ModelConfig, *, resolution: Resolution) -> int:
    """How many weights the matrices and kernels of the network have: all but some in a thousand."""
    c, levels = model.channels, len(model.multipliers)
    widths = [c * multiplier for multiplier in model.multipliers]
    attends = [size in model.attention for size in list_resolutions(model, resolution)]

    def count_block(before: int, width: int) -> int:
        return 9 * width * (before + width) + 4 * c * width + before * width * (before != width)

    total, before, skips = 4 * c * c + 16 * c * c, c, [c]
    for level, width in enumerate(widths):
        last = level == levels - 1
        total += sum(count_block(before if k == 0 else width, width) for k in range(model.blocks))
        total += 4 * width**2 * model.blocks * attends[level] + 9 * width**2 * (not last)
        skips += [width] * (model.blocks + (not last))
        before = width
    total += 2 * count_block(before, before) + 4 * before**2
    for level in reversed(range(levels)):
        width = widths[level]
        total += sum(count_block((before if k == 0 else width) + skips.pop(), width) for k in range(model.blocks + 1))
        total += 4 * width**2 * (model.blocks + 1) * attends[level] + 9 * width**2 * (level > 0)
        before = width
    return total


def read_classes(config: Mapping[str, Any]) -> Classes | None:
    """The classes that a network of this config.json is told; None where it is told none.

    A row of its embedding beyond theirs stands for no label. Without our field every row is a class, and none is more
    frequent than another. Raises ValueError.
    """
    rows = config.get("num_class_embeds")
    if rows is None:
        return None
    if not isinstance(rows, int) or not 1 <= rows <= MOST_CLASSES:
        raise ValueError(f"num_class_embeds: {rows!r} is no number of 1 to {MOST_CLASSES:,}")
    listed = config.get(LABELS) or [[str(label), 1] for label in range(rows)]
    try:
        names, images = zip(*((str(name), int(count)) for name, count in listed), strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{LABELS}: {listed!r:.60} is no list of [name, number of images]") from error
    if len(names) not in (rows, rows - 1) or min(images) < 0 or max(images) < 1:
        raise ValueError(
            f"{LABELS}: {len(names)} classes with {sum(images)} images in all for num_class_embeds {rows}; there must "
            "be as many, or one fewer"
        )
    return Classes(names, images)


def make_class_fields(model: ModelConfig, classes: Classes | None, label_dropout: float) -> dict[str, Any]:
    """What a config.json says of the classes that the network is told; nothing where it is told none."""
    if not model.labels:
        return {}
    assert classes, "model.labels needs data with labels"
    listed = [[name, images] for name, images in zip(classes.names, classes.images, strict=True)]
    return {"num_class_embeds": len(listed) + (label_dropout > 0), LABELS: listed}


def make_unet_config(
    model: ModelConfig,
    *,
    image_channels: int,
    resolution: Resolution,
    learned: bool = False,
    classes: Classes | None = None,
    label_dropout: float = 0.0,
) -> dict[str, Any]:
    """The config.json of the UNet2DModel that `model` means for images of that size.

    With a `learned` variance the last convolution has twice the channels: the second head is its second half. A network
    that is told labels has a row of its class embedding for each of the `classes`, and with `label_dropout` a last one
    for no label.

    `ModelConfig()` with 3 channels at 32 x 32 gives google/ddpm-cifar10-32 (Ho et al. 2020, appendix B). Raises
    ValueError with all that `find_unet_mistakes` finds.
    """
    if mistakes := find_unet_mistakes(model, resolution=resolution):
        raise ValueError("\n".join(mistakes))
    attends = [size in model.attention for size in list_resolutions(model, resolution)]
    height, width = get_sides(resolution)
    return {
        "_class_name": "UNet2DModel",
        **DEFAULTS,
        **make_class_fields(model, classes, label_dropout),
        "sample_size": height if height == width else [height, width],
        "in_channels": image_channels,
        "out_channels": image_channels * (1 + learned),
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": [model.channels * multiplier for multiplier in model.multipliers],
        "layers_per_block": model.blocks,
        "downsample_padding": 0,
        "dropout": model.dropout,
        "attention_head_dim": None,  # one head of the full width
        "norm_num_groups": choose_norm_groups(model),
        "norm_eps": 1e-6,
    }
