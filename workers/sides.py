"""The size of an image as a setting has it: the side of a square, or [height, width]."""

from typing import Annotated

from pydantic import Field

Side = Annotated[int, Field(ge=1)]
Resolution = Side | Annotated[tuple[Side, Side], Field(strict=False), "[height, width]"]


def get_sides(resolution: Resolution) -> tuple[int, int]:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def show_resolution(resolution: Resolution) -> str:
    height, width = get_sides(resolution)
    return str(height if height == width else [height, width])
