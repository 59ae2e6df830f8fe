"""This process among the data-parallel workers of a trial, and its share of what they do together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.pulse import Pulse
from workers.speed import Stopwatch


@dataclass(frozen=True)
class World:
    """This process among the data-parallel workers of a trial; torch.distributed is set up where size > 1."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pulse: Pulse = field(default_factory=Pulse)  # hears of each step
    clock: Stopwatch = field(default_factory=Stopwatch)  # counts from the moment that the trial is taken up
    gauge: Callable[[], None] = lambda: None  # called after each step
    gpus: float = 1  # the part of a GPU that is this process' own


def take_share(items: Any, world: World) -> Any:
    """This worker's contiguous share of a sequence; the sizes divide evenly, as the preflight has checked."""
    assert len(items) % world.size == 0, (len(items), world.size)
    n = len(items) // world.size
    return items[world.rank * n : (world.rank + 1) * n]
