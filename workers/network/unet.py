"""eps_theta(x_t, t): the U-Net of Ho et al. 2020, appendix B, under diffusers' parameter names.

The modules are named and shaped as in diffusers' UNet2DModel, so that one set of weights opens in both; what they
compute is the same, how they compute it is not: see `Dropout`, `GroupNorm`, `Attention` and `UNet.forward`. With
conditions by cross-attention it is diffusers' UNet2DConditionModel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, Shaped
from torch import Tensor, nn

from workers.classes import Classes, Vectors
from workers.network.attention import GroupNorm, NoAttention, Vectored, make_attention
from workers.network.unet_config import CROSS, CROSS_DEFAULTS, DEFAULTS, count_rows, read_told, takes_nothing
from workers.shapes import NCHW, Conditions, Heads

Timed = Float[Tensor, "n time"]  # what the network makes of t
Wider = Float[Tensor, "n out h w"]
Resized = Float[Tensor, "n c height width"]
Steps = Shaped[Tensor, "n"]  # t - 1, in whole numbers or between them
Bits = Int16[Tensor, "parts bits"]  # a row for each sub-batch

# Fields of the config that are built here in more than one way. Every other field must have diffusers' default.
BUILT = {
    "sample_size",
    "in_channels",
    "out_channels",
    "freq_shift",
    "flip_sin_to_cos",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "dropout",
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "num_class_embeds",
}
BUILT_CROSS = {"cross_attention_dim", "encoder_hid_dim", "encoder_hid_dim_type"}
# By the class: the names of blocks, the second of which has attention.
DOWN = {"UNet2DModel": ("DownBlock2D", "AttnDownBlock2D"), CROSS: ("DownBlock2D", "CrossAttnDownBlock2D")}
UP = {"UNet2DModel": ("UpBlock2D", "AttnUpBlock2D"), CROSS: ("UpBlock2D", "CrossAttnUpBlock2D")}


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' default for each field left out; ValueError naming every field not supported here."""
    network, defaults, built = "UNet2DModel", DEFAULTS, BUILT
    if config.get("_class_name") == CROSS:
        network, defaults, built = CROSS, CROSS_DEFAULTS, BUILT - {"num_class_embeds"} | BUILT_CROSS
    full = {**defaults, **{name: value for name, value in config.items() if not name.startswith("_")}}
    mistakes = [
        f"{name}: {value!r} is not supported" + (f"; only {defaults[name]!r} is" if name in defaults else "")
        for name, value in full.items()
        if name not in built and (name not in defaults or value != defaults[name])
    ]
    if full.get("encoder_hid_dim_type") not in (None, "text_proj"):
        mistakes.append(f"encoder_hid_dim_type: {full['encoder_hid_dim_type']!r} is not supported; only 'text_proj' is")
    for field, known in (("down_block_types", DOWN[network]), ("up_block_types", UP[network])):
        mistakes += [
            f"{field}: {kind!r} is not supported; choose from {list(known)}"
            for kind in full[field]
            if kind not in known
        ]
        if len(full[field]) != len(full["block_out_channels"]):
            mistakes.append(f"{field}: {full[field]!r} must have a block for each of block_out_channels")
    if full["downsample_padding"] not in (0, 1):
        mistakes.append(f"downsample_padding: {full['downsample_padding']!r} is not supported; choose from [0, 1]")
    for width in full["block_out_channels"]:
        if width % full["norm_num_groups"]:
            mistakes.append(f"norm_num_groups: {full['norm_num_groups']} must divide the block_out_channels {width}")
        if width % (full["attention_head_dim"] or width):
            mistakes.append(
                f"attention_head_dim: {full['attention_head_dim']} must divide the block_out_channels {width}"
            )
    try:
        told = read_told(config)
        if isinstance(told, Vectors) and told.width != (full["encoder_hid_dim"] or full["cross_attention_dim"]):
            mistakes.append(f"_vectors: of {told.width} numbers each, which encoder_hid_dim is not")
    except ValueError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return full


class Dropout(nn.Module):
    """Dropout whose masks have addresses: drawn from generators handed over, never from the global one.

    With k generators the batch is k equal sub-batches in order, and the mask of the j-th comes from the j-th
    generator: however sub-batches are spread over workers, each meets the same mask. p is kept to 1/65536.
    `bits`, where they are handed instead, were drawn for all layers at once, and those from `place` on are its own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] | None = None
        self.bits: Bits | None = None
        self.place = 0

    def forward(self, x: NCHW) -> NCHW:
        if not self.training or self.p == 0:
            return x
        N, C, H, W = x.shape
        if self.bits is None:
            assert self.generators, "dropout in training needs its generators: build.hand_noise"
            assert N % len(self.generators) == 0, f"a batch of {N} is not {len(self.generators)} equal sub-batches"
            bits = draw_bits(self.generators, x.numel() // len(self.generators), x.device)
        else:
            bits = self.bits[:, self.place : self.place + x.numel() // len(self.bits)]
        dropped = round(self.p * 65536)
        kept = bits.reshape(N, H, W, C).permute(0, 3, 1, 2).ge(dropped - 32768).to(x.dtype)  # NHWC, as the memory is
        return (x * kept) * (65536 / (65536 - dropped))  # the factor apart: bfloat16 would round it in `kept`


def draw_bits(generators: Sequence[torch.Generator], n: int, device: torch.device) -> Bits:
    """n numbers of 16 random bits from each generator.

    Four of them come from each draw: on a CPU bernoulli_ takes three times as long, which is a tenth of a training
    step. There, what is drawn at once is what several draws of whole fours give.
    """
    words = torch.empty(len(generators), -(-n // 4), dtype=torch.int64, device=device)
    for row, generator in zip(words, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:, :n]


class ResnetBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))), with a 1x1 convolution of x where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config["block_out_channels"][0], out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = Dropout(config["dropout"])
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: NCHW, time: Timed) -> Wider:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        y: Tensor = self.conv_shortcut(x) + h
        return y


class Downsample(nn.Module):
    """H x W -> H/2 x W/2 by a convolution of stride 2; the paper's pads at the right and the bottom (TensorFlow)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: NCHW) -> Resized:
        y: Tensor = self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """H x W -> 2H x 2W by repeating pixels, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: NCHW) -> Resized:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class TimeEmbedding(nn.Module):
    """The Transformer's sinusoids of t, and two linear layers."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.waves, self.shift, self.cos_first = channels // 2, config["freq_shift"], config["flip_sin_to_cos"]
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Steps) -> Timed:
        index = torch.arange(self.waves, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10000) / (self.waves - self.shift) * index)
        waves = (angle.cos(), angle.sin()) if self.cos_first else (angle.sin(), angle.cos())
        y: Tensor = self.linear_2(F.silu(self.linear_1(torch.cat(waves, dim=1))))
        return y


class Down(nn.Module):
    """The blocks of one resolution on the way down. Pushes what they and the downsampling give onto `skips`."""

    def __init__(self, widths: Sequence[tuple[int, int]], attends: bool, last: bool, config: dict[str, Any]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, o, config) for i, o in widths)
        self.attentions = nn.ModuleList(make_attention(o, config) if attends else NoAttention() for _, o in widths)
        resize = [] if last else [Downsample(widths[-1][1], config["downsample_padding"])]
        self.downsamplers = nn.ModuleList(resize)

    def forward(
        self, h: NCHW, time: Timed, skips: list[Tensor], told: Vectored | None = None
    ) -> Float[Tensor, "n out height width"]:
        for block, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(block(h, time), told)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            skips.append(h)
        return h


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config) for _ in range(2))
        self.attentions = nn.ModuleList([make_attention(width, config)])

    def forward(self, h: NCHW, time: Timed, told: Vectored | None = None) -> NCHW:
        y: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](h, time), told), time)
        return y


class Up(nn.Module):
    """The blocks of one resolution on the way up. Each takes its part of the way down off `skips`."""

    def __init__(self, widths: Sequence[tuple[int, int]], attends: bool, last: bool, config: dict[str, Any]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, o, config) for i, o in widths)
        self.attentions = nn.ModuleList(make_attention(o, config) if attends else NoAttention() for _, o in widths)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(widths[-1][1])])

    def forward(
        self, h: NCHW, time: Timed, skips: list[Tensor], told: Vectored | None = None
    ) -> Float[Tensor, "n out height width"]:
        for block, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), time), told)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class UNet(nn.Module):
    """eps_theta, built from the config.json of a diffusers UNet2DModel or UNet2DConditionModel (see `unet_config`).

    The state dict has diffusers' names and shapes, and equal weights give equal outputs. Initial weights come from
    `generator` (None: torch's global one) and are the paper's: the last convolution of each residual block, the
    projection out of each attention, and the last convolution of all are zero, so that every block begins as the
    identity and eps_theta as 0. Raises ValueError for a config that asks for what is not built here.
    """

    def __init__(self, config: dict[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        c = check_config(config)
        widths, blocks, final = c["block_out_channels"], c["layers_per_block"], len(c["block_out_channels"]) - 1
        self.config = dict(config)
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], c)
        self.told, self.takes_no_label = read_told(config), takes_nothing(config)
        self.rows = count_rows(config) if isinstance(self.told, Classes) else 0
        self.crosses = "cross_attention_dim" in c
        self.projects = self.crosses and bool(c["encoder_hid_dim"])
        if self.projects:
            self.encoder_hid_proj = nn.Linear(c["encoder_hid_dim"], c["cross_attention_dim"])
        if self.rows and not self.crosses:
            self.class_embedding = nn.Embedding(self.rows, 4 * widths[0])

        # `skips` holds the widths of what forward() pushes on the way down and pops on the way up.
        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(c["down_block_types"]):
            out, last = widths[level], level == final
            shapes = [(width if j == 0 else out, out) for j in range(blocks)]
            self.down_blocks.append(Down(shapes, kind.endswith("AttnDownBlock2D"), last, c))
            skips += [out] * (blocks if last else blocks + 1)
            width = out

        self.mid_block = Middle(width, c)

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(final + 1)), c["up_block_types"], strict=True):
            out = widths[level]
            shapes = [((width if j == 0 else out) + skips.pop(), out) for j in range(blocks + 1)]
            self.up_blocks.append(Up(shapes, kind.endswith("AttnUpBlock2D"), level == 0, c))
            width = out
        assert not skips

        self.conv_norm_out = GroupNorm(c["norm_num_groups"], widths[0], eps=c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """The paper's initial weights: uniform with variance 1 / mean(fan in, fan out), biases 0, last layers 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                within = ".transformer_blocks." in name  # whose last layer is proj_out
                if name.endswith(("conv2", "to_out.0", "conv_out", "proj_out")) and not within:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
        if self.rows:  # last, so that all other weights are those of a network without labels
            embedding = self.encoder_hid_proj if self.crosses else self.class_embedding
            nn.init.normal_(embedding.weight, generator=generator)

    def _embed_told(self, told: Conditions) -> Vectored:
        """The sequence that is attended to: the vectors, or a single one of each label."""
        if self.rows:
            told = F.one_hot(told.remainder(self.rows), self.rows)[:, None]
        y: Tensor = self.encoder_hid_proj(told.to(self.conv_in.weight.dtype)) if self.projects else told
        return y

    def forward(self, x: NCHW, t: Steps, told: Conditions | None = None) -> Heads:
        """t is counted from 0: the paper's t - 1. It is told labels or vectors, as `self.told` says; NO_LABEL, a label
        of -1, is the last row of their embedding.

        The sinusoids are smooth in t, so that times between those of the training are asked for as any other.
        """
        time = self.time_embedding(t)
        sequence = None
        if self.told is not None:
            assert told is not None, "this network is told something of each image"
            if self.crosses:
                sequence = self._embed_told(told)
            else:
                time = time + self.class_embedding(told.remainder(self.rows)).to(time.dtype)
        time = F.silu(time)  # every block begins with the same SiLU of it
        # In channels_last a convolution on a CPU with AMX takes half the time in bfloat16, four fifths in float32.
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down_blocks:
            h = level(h, time, skips, sequence)
        h = self.mid_block(h, time, sequence)
        for level in self.up_blocks:
            h = level(h, time, skips, sequence)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return y.contiguous()
