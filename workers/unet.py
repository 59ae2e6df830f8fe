"""eps_theta(x_t, t): the U-Net of Ho et al. 2020, appendix B, under diffusers' parameter names.

The modules are named and shaped as in diffusers' UNet2DModel, so that one set of weights opens in both; what they
compute is the same, how they compute it is not: see `group_norm` and `Attention`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.unet_config import DEFAULTS

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
}
DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}  # name -> whether it has attention
UP = {"UpBlock2D": False, "AttnUpBlock2D": True}


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' default for each field left out; ValueError naming every field not supported here."""
    full = {**DEFAULTS, **{name: value for name, value in config.items() if not name.startswith("_")}}
    mistakes = [
        f"{name}: {value!r} is not supported" + (f"; only {DEFAULTS[name]!r} is" if name in DEFAULTS else "")
        for name, value in full.items()
        if name not in BUILT and (name not in DEFAULTS or value != DEFAULTS[name])
    ]
    for field, known in (("down_block_types", DOWN), ("up_block_types", UP)):
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
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return full


class Dropout(nn.Module):
    """Dropout whose masks have addresses: drawn from generators handed over, never from the global one.

    With k generators the batch is k equal sub-batches in order, and the mask of the j-th comes from the j-th
    generator: however sub-batches are spread over workers, each meets the same mask.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:  # NCHW -> NCHW
        if not self.training or self.p == 0:
            return x
        assert self.generators, "dropout in training needs UNet.set_noise(generators)"
        N, k = len(x), len(self.generators)
        assert N % k == 0, f"a batch of {N} is not {k} equal sub-batches"
        keep = torch.empty_like(x)
        for part, generator in zip(keep.chunk(k), self.generators, strict=True):
            part.bernoulli_(1 - self.p, generator=generator)
        return x * keep.div_(1 - self.p)


class ResnetBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = Dropout(config["dropout"])
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # (N, in, H, W), (N, time_channels) -> (N, out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """x + self-attention over the H x W positions of norm(x)."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads = channels // (config["attention_head_dim"] or channels)
        self.group_norm = nn.GroupNorm(config["norm_num_groups"], channels, eps=config["norm_eps"])
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Weights published in 2022, google/ddpm-cifar10-32's among them, have other names for the four layers."""
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            for part in ("weight", "bias"):
                if f"{prefix}{old}.{part}" in state_dict:
                    state_dict[f"{prefix}{new}.{part}"] = state_dict.pop(f"{prefix}{old}.{part}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:  # NCHW -> NCHW
        N, C, H, W = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, HW, C)
        q, k, v = (
            to(tokens).view(N, H * W, self.heads, -1).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )  # (N, heads, HW, C / heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, H * W, C)
        return x + self.to_out[0](out).transpose(1, 2).reshape(N, C, H, W)


class Downsample(nn.Module):
    """H x W -> H/2 x W/2 by a convolution of stride 2; the paper's pads at the right and the bottom (TensorFlow)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H/2, W/2)
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """H x W -> 2H x 2W by repeating pixels, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeEmbedding(nn.Module):
    """Transformer sinusoids of t and two linear layers."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.half, self.shift, self.flip = channels // 2, config["freq_shift"], config["flip_sin_to_cos"]
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:  # int64 (N,) -> (N, 4 * channels)
        index = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angle = t[:, None] * torch.exp(-math.log(10000) / (self.half - self.shift) * index)
        waves = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        return self.linear_2(F.silu(self.linear_1(torch.cat(waves, dim=1))))


class Level(nn.Module):
    """The blocks of one resolution, with diffusers' names for them; `UNet.forward` says how they are wired."""

    def __init__(
        self, widths: Sequence[tuple[int, int]], attends: bool, resize: nn.Module | None, config: dict[str, Any]
    ) -> None:
        super().__init__()
        time_channels = 4 * config["block_out_channels"][0]
        self.resnets = nn.ModuleList(ResnetBlock(i, o, time_channels, config) for i, o in widths)
        self.attentions = nn.ModuleList(Attention(o, config) if attends else nn.Identity() for _, o in widths)
        self.downsamplers = nn.ModuleList([resize] if isinstance(resize, Downsample) else [])
        self.upsamplers = nn.ModuleList([resize] if isinstance(resize, Upsample) else [])


class UNet(nn.Module):
    """eps_theta, built from the config.json of a diffusers UNet2DModel (`workers.unet_config.unet_config` makes one).

    The state dict has diffusers' names and shapes, and equal weights give equal outputs. Initial weights come from
    `generator` (None: torch's global one) and are the paper's: the last convolution of each residual block, the
    projection out of each attention, and the last convolution of all are zero, so that every block begins as the
    identity and eps_theta as 0. Raises ValueError for a config that asks for what is not built here.
    """

    def __init__(self, config: dict[str, Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        c = checked(config)
        widths, blocks, levels = c["block_out_channels"], c["layers_per_block"], len(c["block_out_channels"])
        self.config = dict(config)
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], c)

        # `skips` is the stack of widths that forward() pushes on the way down and pops on the way up.
        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(c["down_block_types"]):
            last = i == levels - 1
            shapes = [(width if j == 0 else widths[i], widths[i]) for j in range(blocks)]
            resize = None if last else Downsample(widths[i], c["downsample_padding"])
            self.down_blocks.append(Level(shapes, DOWN[kind], resize, c))
            skips += [widths[i]] * (blocks if last else blocks + 1)
            width = widths[i]

        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([Attention(width, c)])
        self.mid_block.resnets = nn.ModuleList(ResnetBlock(width, width, 4 * widths[0], c) for _ in range(2))

        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(c["up_block_types"]):
            out = widths[levels - 1 - i]
            shapes = [((width if j == 0 else out) + skips.pop(), out) for j in range(blocks + 1)]
            self.up_blocks.append(Level(shapes, UP[kind], None if i == levels - 1 else Upsample(out), c))
            width = out
        assert not skips

        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], eps=c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """The paper's initial weights: uniform with variance 1 / mean(fan in, fan out), biases 0, last layers 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "to_out.0", "conv_out")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)

    def set_noise(self, generators: Sequence[torch.Generator] | None) -> None:
        """Hand over the generators of the dropout masks, one a sub-batch, for the training steps that follow."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generators = generators

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps_theta(x_t, t): x float (N, C, H, W); t int64 (N,), counted from 0 (the paper's t - 1) -> (N, C, H, W)."""
        time = F.silu(self.time_embedding(t))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(block(h, time))
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)
        first, last = self.mid_block.resnets
        h = last(self.mid_block.attentions[0](first(h, time)), time)
        for level in self.up_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), time))
            for upsample in level.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
