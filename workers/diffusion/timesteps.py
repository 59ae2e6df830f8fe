"""How the t of a training batch are drawn: each way a function of (T, a part of the batch, its noise).

All but `importance` leave t uniform on 1..T; that one weighs the losses by 1 / (T p_t), so that all have the same mean.
`workers.kinds` lists them. A part is a sub-batch, whoever trains on it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workers.shapes import PerImage, PerImage64, PerTime, Times

KEPT = 10  # losses remembered of each t
UNIFORM = 0.001  # the share of p_t that is spread evenly, so that no t is forgotten


@dataclass(frozen=True)
class Part:
    """Sub-batch `index` of `count`, with n images each."""

    n: int
    index: int
    count: int


@dataclass(frozen=True)
class History:
    """The last KEPT losses of each t, on the CPU: the same on every worker, and a part of the checkpoint."""

    losses: Float64[Tensor, "T kept"]
    seen: Int64[Tensor, "T"]

    @staticmethod
    def empty(T: int) -> "History":
        return History(torch.zeros(T, KEPT, dtype=torch.float64), torch.zeros(T, dtype=torch.int64))

    def add(self, t: Times, loss: PerImage) -> None:
        """The losses of t, in the order of the batch."""
        for when, value in zip((t - 1).tolist(), loss.tolist(), strict=True):
            self.losses[when, self.seen[when] % KEPT] = value
            self.seen[when] += 1

    def probability(self) -> PerTime:
        """p_t ~ sqrt(E[L_t^2]): Nichol & Dhariwal 2021, eq. (18). Even until every t has KEPT losses."""
        T = len(self.seen)
        even = torch.full((T,), 1 / T, dtype=torch.float64)
        moment = self.losses.square().mean(1).sqrt()
        if (self.seen < KEPT).any() or not moment.sum() > 0:
            return even
        return (1 - UNIFORM) * moment / moment.sum() + UNIFORM * even


def uniform(T: int, part: Part, noise: torch.Generator, probability: PerTime) -> Times:
    """Each t by itself (Ho et al. 2020, Algorithm 1)."""
    return torch.randint(1, T + 1, (part.n,), generator=noise, device=noise.device)


def stratified(T: int, part: Part, noise: torch.Generator, probability: PerTime) -> Times:
    """One t from each of as many equal parts of 1..T as the global batch has images (as Kingma et al. 2021, I.1)."""
    place = part.index * part.n + torch.arange(part.n, device=noise.device)
    u = (place + _unit(part.n, noise)) / (part.n * part.count)
    return (u * T).long().clamp(max=T - 1) + 1


def antithetic(T: int, part: Part, noise: torch.Generator, probability: PerTime) -> Times:
    """Pairs t and T + 1 - t (the code of Song et al. 2020a); an odd sub-batch has one without its partner."""
    t = torch.randint(1, T + 1, ((part.n + 1) // 2,), generator=noise, device=noise.device)
    return torch.cat([t, T + 1 - t])[: part.n]


def importance(T: int, part: Part, noise: torch.Generator, probability: PerTime) -> Times:
    """Each t by itself, with probability p_t: `History`."""
    edges = probability.cumsum(0).to(noise.device)
    return torch.searchsorted(edges, _unit(part.n, noise), right=True).clamp(max=T - 1) + 1


def _unit(n: int, noise: torch.Generator) -> PerImage64:
    return torch.rand(n, generator=noise, device=noise.device, dtype=torch.float64)
