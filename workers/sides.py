"""The size of an image as a setting has it: the side of a square, or [height, width]; and of what is no image.

Signals of one dimension and volumes are kept, noised and measured as images, as all that is computed of them goes pixel
by pixel: a signal as one row, a volume as its slices below each other. The network alone sees their own sides.
"""

import math
from typing import Annotated

from pydantic import Field

Side = Annotated[int, Field(ge=1)]
Resolution = Side | Annotated[tuple[Side, Side], Field(strict=False), "[height, width]"]


def get_sides(resolution: Resolution) -> tuple[int, int]:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def fold(sides: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of what has these sides: (length,), (height, width) or (depth, height, width)."""
    return math.prod(sides[:-1]), sides[-1]


def show_resolution(resolution: Resolution) -> str:
    height, width = get_sides(resolution)
    return str(height if height == width else [height, width])
