"""The shape of eps_theta as data: from our `ModelConfig` to the config.json of diffusers' UNet2DModel, and of its
UNet2DConditionModel where conditions enter by cross-attention.

Pure Python, so that an experiment file can be checked, and its mistakes told, without importing torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from workers.classes import LONGEST, MOST_CLASSES, WIDEST, Classes, Told, Vectors
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
CROSS = "UNet2DConditionModel"
_SHARED = ("sample_size", "center_input_sample", "freq_shift", "flip_sin_to_cos", "layers_per_block",
           "mid_block_scale_factor", "downsample_padding", "dropout", "act_fn", "attention_head_dim", "norm_num_groups",
           "norm_eps", "class_embed_type", "num_class_embeds", "time_embedding_type", "time_embedding_dim",
           "resnet_time_scale_shift")  # fmt: skip
# The same of UNet2DConditionModel. Its attention_head_dim is the number of heads, whatever it is called.
CROSS_DEFAULTS: dict[str, Any] = {
    **{name: DEFAULTS[name] for name in _SHARED},
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "upcast_attention": False,
    "attention_type": "default",
    "cross_attention_norm": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "addition_embed_type_num_heads": 64,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "class_embeddings_concat": False,
}
UNET = "unet"  # what it is called in an experiment file
MOST_WEIGHTS = 20e9  # 80 GB in float32, and four times that in training
# Ours in such a file, which diffusers keeps and passes over.
LABELS = "_labels"  # [name, images], a class each
VECTORS = "_vectors"  # [length, width, whether it was trained without them, too]


def choose_norm_groups(model: ModelConfig) -> int:
    """Groups of the group norms: `model.norm_groups`, but at least 4 channels a group, as in the paper (128 in 32).

    A group of one channel would subtract the time embedding, which is constant over the image, right after it is
    added: the network would not know t.
    """
    return max(1, min(model.norm_groups, model.channels // 4))


def find_mistakes(model: ModelConfig, shape: tuple[int, int, int]) -> list[str]:
    """`find_unet_mistakes` of images of this shape (height, width, channels)."""
    return find_unet_mistakes(model, resolution=shape[:2])


def find_width_mistakes(model: ModelConfig, of_channels: Sequence[str] = ()) -> list[str]:
    """What is wrong with its channels, beside what is known `of_channels` already, and with their multipliers."""
    mistakes, groups = list(of_channels), choose_norm_groups(model)
    if model.channels % groups and not mistakes:
        below = model.channels // groups * groups
        mistakes.append(
            f"model.channels: {model.channels} cannot be split into {groups} equal groups for the group norms; "
            f"take {below} or {below + groups} channels, or another model.norm_groups"
        )
    if any(multiplier < 1 for multiplier in model.multipliers):
        mistakes.append(f"model.multipliers: {list(model.multipliers)} must all be at least 1")
    return mistakes


def find_unet_mistakes(model: ModelConfig, *, resolution: Resolution) -> list[str]:
    """What keeps `model` from being built for images of that size, and what to do; empty if nothing does."""
    of_time, levels = [], len(model.multipliers)
    if model.channels < 4 or model.channels % 2:
        of_time.append(
            f"model.channels: {model.channels} must be even and at least 4, "
            "as the time embedding is half sines and half cosines"
        )
    mistakes = find_width_mistakes(model, of_time)
    halvings, sides = levels - 1, get_sides(resolution)
    if any(side % 2**halvings for side in sides):
        most = min((side & -side).bit_length() for side in sides)
        near = [[side // 2**halvings * 2**halvings, -(-side // 2**halvings) * 2**halvings] for side in sides]
        sizes = [show_resolution((height, width)) for height, width in zip(*near, strict=True) if height and width]
        mistakes.append(
            f"model.multipliers: {levels} levels halve the image {halvings} times, but {show_resolution(sides)} pixels "
            f"can be halved only {most - 1} times; take at most {most} multipliers, "
            f"or data.resolution: {' or '.join(sizes)}, or a network of your own (docs/extending.md)"
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

    def count_attention(width: int) -> int:
        return 20 * width**2 + 8 * c * width if model.conditions else 4 * width**2

    total, before, skips = 4 * c * c + 16 * c * c, c, [c]
    for level, width in enumerate(widths):
        last = level == levels - 1
        total += sum(count_block(before if k == 0 else width, width) for k in range(model.blocks))
        total += count_attention(width) * model.blocks * attends[level] + 9 * width**2 * (not last)
        skips += [width] * (model.blocks + (not last))
        before = width
    total += 2 * count_block(before, before) + count_attention(before)
    for level in reversed(range(levels)):
        width = widths[level]
        total += sum(count_block((before if k == 0 else width) + skips.pop(), width) for k in range(model.blocks + 1))
        total += count_attention(width) * (model.blocks + 1) * attends[level] + 9 * width**2 * (level > 0)
        before = width
    return total


def read_told(config: Mapping[str, Any]) -> Told | None:
    """What a network of this config.json is told of each image; None where it is told nothing. Raises ValueError."""
    kind = config.get("_class_name", "UNet2DModel")
    crosses = kind == CROSS
    if crosses and LABELS in config:
        return _read_classes(config, "encoder_hid_dim")
    if config.get("num_class_embeds") is not None:
        return _read_classes(config, "num_class_embeds")
    if kind == "UNet2DModel":
        return None
    if VECTORS not in config:  # one that was trained elsewhere takes a sequence of any length
        width = config.get("encoder_hid_dim") or config.get(
            "cross_attention_dim", CROSS_DEFAULTS["cross_attention_dim"]
        )
        return Vectors(0, width) if crosses else None
    match config[VECTORS]:
        case [int(length), int(width), bool(withheld)] if 0 < length <= LONGEST and 0 < width <= WIDEST:
            return Vectors(length, width, withheld)
    raise ValueError(f"{VECTORS}: {config[VECTORS]!r:.60} is no [length, width, whether they were withheld, too]")


def takes_nothing(config: Mapping[str, Any]) -> bool:
    """Whether a network of this config.json was trained without what it is told, too. Raises ValueError."""
    match read_told(config):
        case Classes(names):
            return count_rows(config) > len(names)
        case Vectors(withheld=withheld):
            return withheld
    return False


def count_rows(config: Mapping[str, Any]) -> int:
    """The rows of the embedding of classes that a network of this config.json has, whichever way they enter."""
    rows = config.get("encoder_hid_dim") if config.get("_class_name") == CROSS else config.get("num_class_embeds")
    return rows or 0


def _read_classes(config: Mapping[str, Any], of: str) -> Classes:
    """The classes, of whose embedding the field `of` says the rows.

    A row beyond theirs stands for no label. Without our field every row is a class, and none is more frequent than
    another. Raises ValueError.
    """
    rows = config.get(of)
    if not isinstance(rows, int) or not 1 <= rows <= MOST_CLASSES:
        raise ValueError(f"{of}: {rows!r} is no number of 1 to {MOST_CLASSES:,}")
    listed = config.get(LABELS) or [[str(label), 1] for label in range(rows)]
    try:
        names, images = zip(*((str(name), int(count)) for name, count in listed), strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{LABELS}: {listed!r:.60} is no list of [name, number of images]") from error
    if len(names) not in (rows, rows - 1) or min(images) < 0 or max(images) < 1:
        raise ValueError(
            f"{LABELS}: {len(names)} classes with {sum(images)} images in all for {of} {rows}; there must be as many, "
            "or one fewer"
        )
    return Classes(names, images)


def make_told_fields(told: Told | None, label_dropout: float, rows: str = "num_class_embeds") -> dict[str, Any]:
    """What a config.json says of what the network is told; nothing where it is told nothing.

    The field `rows` is that of an embedding of classes.
    """
    match told:
        case Classes(names, images):
            listed = [[name, count] for name, count in zip(names, images, strict=True)]
            return {rows: len(listed) + (label_dropout > 0), LABELS: listed}
        case Vectors(length, width):
            return {VECTORS: [length, width, label_dropout > 0]}
    return {}


def make_unet_config(
    model: ModelConfig,
    *,
    image_channels: int,
    resolution: Resolution,
    learned: bool = False,
    told: Told | None = None,
    label_dropout: float = 0.0,
) -> dict[str, Any]:
    """The config.json of the UNet2DModel that `model` means for images of that size, or of the UNet2DConditionModel.

    With a `learned` variance the last convolution has twice the channels: the second head is its second half. A network
    that is `told` classes has a row of an embedding for each of them, and with `label_dropout` a last one for no label.

    `ModelConfig()` with 3 channels at 32 x 32 gives google/ddpm-cifar10-32 (Ho et al. 2020, appendix B). Raises
    ValueError with all that `find_unet_mistakes` finds.
    """
    if mistakes := find_unet_mistakes(model, resolution=resolution):
        raise ValueError("\n".join(mistakes))
    attends = [size in model.attention for size in list_resolutions(model, resolution)]
    height, width = get_sides(resolution)
    return {
        **_make_attention_fields(model, attends, told, label_dropout),
        "sample_size": height if height == width else [height, width],
        "in_channels": image_channels,
        "out_channels": image_channels * (1 + learned),
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "block_out_channels": [model.channels * multiplier for multiplier in model.multipliers],
        "layers_per_block": model.blocks,
        "downsample_padding": 0,
        "dropout": model.dropout,
        "norm_num_groups": choose_norm_groups(model),
        "norm_eps": 1e-6,
    }


def _make_attention_fields(
    model: ModelConfig, attends: Sequence[bool], told: Told | None, label_dropout: float
) -> dict[str, Any]:
    """The class of the network with its defaults, its attention, of one head of the full width, and what it is told.

    Vectors and one-hot labels go through a linear layer, and become as wide as the time embedding is.
    """
    kind, defaults, heads = ("CrossAttn", CROSS_DEFAULTS, 1) if model.conditions else ("Attn", DEFAULTS, None)
    found = {
        "_class_name": CROSS if model.conditions else "UNet2DModel",
        **defaults,
        "down_block_types": [f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": [f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": heads,
    }
    if not model.conditions:
        return found | make_told_fields(told, label_dropout)
    fields = make_told_fields(told, label_dropout, rows="encoder_hid_dim")
    width = told.width if isinstance(told, Vectors) else fields["encoder_hid_dim"]
    of = {"cross_attention_dim": 4 * model.channels, "encoder_hid_dim": width, "encoder_hid_dim_type": "text_proj"}
    return found | fields | of
