"""A diffusion transformer, DiT (Peebles & Xie 2023), with adaLN-Zero blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.network.build import Signature

WAVES = 64  # half sines and half cosines, of t


class Block(nn.Module):
    """Attention between patches and a network of each patch; scales, shifts and gates come of t, the gates from 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(time)[:, None].chunk(6, dim=2)
        h = h + gate_1 * self.attend(modulate(h, shift_1, scale_1))
        mixed: Tensor = h + gate_2 * self.mlp(modulate(h, shift_2, scale_2))
        return mixed

    def attend(self, h: Tensor) -> Tensor:
        q, k, v = self.to_qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class DiT(nn.Module):
    """The contract of a network: built of (settings, signature), called with x (n, channels, height, width), t (n,),
    which is counted from 0, and labels (n,) where there are classes; it returns (n, outputs, height, width)."""

    def __init__(self, settings: ModelConfig, of: Signature) -> None:
        super().__init__()
        width, depth, heads, self.patch = (settings.model_extra[n] for n in ("width", "depth", "heads", "patch"))  # type: ignore[index]
        self.rows, self.columns = of.height // self.patch, of.width // self.patch
        self.embed = nn.Conv2d(of.channels, width, self.patch, stride=self.patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, self.rows * self.columns, width))
        self.time = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.label = nn.Embedding(of.classes, width) if of.classes else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, self.patch**2 * of.outputs)
        for zero in (self.modulation, self.last):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(WAVES // 2, device=x.device) / (WAVES // 2))
        angles = t[:, None].float() * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label is not None and labels is not None:
            time = time + self.label(labels.remainder(self.label.num_embeddings))  # -1, no label, is the last row
        h = self.embed(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h, time)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=2)
        y = self.last(modulate(h, shift, scale)).unflatten(1, (self.rows, self.columns))
        y = y.unflatten(3, (-1, self.patch, self.patch))  # n rows columns outputs patch patch
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).contiguous()
