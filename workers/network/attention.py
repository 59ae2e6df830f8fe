"""Attention over the positions of an image: to each other, and to what the network is told.

Modules have diffusers' names and shapes: `Attention` those of its Attention, `CrossAttention` of its
Transformer2DModel, so that one set of weights opens in both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from workers.shapes import NCHW

Tokens = Float[Tensor, "n tokens width"]
Vectored = Float[Tensor, "n length context"]  # of vectors: what it is told


def make_attention(channels: int, config: dict[str, Any]) -> nn.Module:
    """Self-attention, and attention to what the network is told where that enters so."""
    return CrossAttention(channels, config) if "cross_attention_dim" in config else Attention(channels, config)


class NoAttention(nn.Module):
    """In the place of one."""

    def forward(self, x: NCHW, told: Vectored | None = None) -> NCHW:
        return x


class GroupNorm(nn.GroupNorm):
    """Group norm in the dtype of its weights, float32, under autocast too, as CUDA's autocast has it.

    The CPU's kernel for bfloat16 in channels_last takes a quarter of a training step; the casts cost less.
    """

    def forward(self, x: NCHW) -> NCHW:
        if torch.compiler.is_compiling():
            return self.reduce(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    def reduce(self, x: NCHW) -> NCHW:
        """The same as plain reductions in the order of channels_last, for a compiler, which makes two passes of it that
        hold the casts, the SiLU and the dropout after it too. CUDA's own kernel goes to NCHW and back."""
        N, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(N, H * W, self.num_groups, -1).to(self.weight.dtype)
        variance, mean = torch.var_mean(pixels, dim=(1, 3), correction=0, keepdim=True)
        y = ((pixels - mean) * torch.rsqrt(variance + self.eps)).view(N, H, W, C) * self.weight + self.bias
        return y.permute(0, 3, 1, 2).to(x.dtype)


class Attention(nn.Module):
    """x + self-attention over the H x W positions of norm(x)."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads = channels // (config["attention_head_dim"] or channels)
        self.group_norm = GroupNorm(config["norm_num_groups"], channels, eps=config["norm_eps"])
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

    def forward(self, x: NCHW, told: None = None) -> NCHW:
        N, C, H, W = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, HW, C)
        q, k, v = (
            to(tokens).view(N, H * W, self.heads, -1).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )  # (N, heads, HW, C / heads)
        # Two plain products: with few tokens the backward pass of scaled_dot_product_attention on a CPU is so slow in
        # bfloat16 that it takes a third of a small model's training step.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (N, heads, HW, HW)
        mixed = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(N, H * W, C)
        y: Tensor = x + self.to_out[0](mixed).transpose(1, 2).view(N, C, H, W)
        return y


class CrossAttention(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))) over the H x W positions. A block is self-attention, attention to the
    sequence that is told, and a gated layer: the SpatialTransformer of Rombach et al. 2022, section 3.3 and appendix
    E.2.1. `config` is that of a UNet2DConditionModel."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm = GroupNorm(config["norm_num_groups"], channels, eps=1e-6)  # as diffusers has it, not norm_eps
        self.proj_in = nn.Conv2d(channels, channels, 1)
        heads, context = config["attention_head_dim"], config["cross_attention_dim"]  # diffusers calls the heads so
        self.transformer_blocks = nn.ModuleList([_Block(channels, heads, context)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: NCHW, told: Vectored) -> NCHW:
        N, C, H, W = x.shape
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (N, HW, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, told)
        y: Tensor = x + self.proj_out(tokens.transpose(1, 2).reshape(N, C, H, W))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _Attention(width, heads, width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = _Attention(width, heads, context)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, tokens: Tokens, told: Vectored) -> Tokens:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed)
        tokens = tokens + self.attn2(self.norm2(tokens), told)
        y: Tensor = tokens + self.ff(self.norm3(tokens))
        return y


class _Attention(nn.Module):
    """Of `tokens` to `others`, which are as wide as `context` says."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, tokens: Tokens, others: Vectored) -> Tokens:
        N, n, width = tokens.shape
        q, k, v = (
            y.view(N, y.shape[1], self.heads, -1).transpose(1, 2)
            for y in (self.to_q(tokens), self.to_k(others), self.to_v(others))
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (N, heads, tokens, others); as in `Attention`
        y: Tensor = self.to_out[0]((scores.softmax(dim=3) @ v).transpose(1, 2).reshape(N, n, width))
        return y


class _FeedForward(nn.Module):
    """Two linear layers and a gated GELU between them (Shazeer 2020, GEGLU), the hidden one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, tokens: Tokens) -> Tokens:
        y: Tensor = self.net[2](self.net[0](tokens))
        return y


class _Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, tokens: Tokens) -> Float[Tensor, "n tokens hidden"]:
        y, gate = self.proj(tokens).chunk(2, dim=2)
        return y * F.gelu(gate)
