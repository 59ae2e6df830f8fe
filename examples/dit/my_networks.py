"""The entry of a network of one's own; no torch is imported here, so that a dry run is quick."""

from pydantic import BaseModel, Field

from workers.config import ModelConfig
from workers.kinds import NetworkEntry


class Settings(BaseModel):
    """They stand beside `kind` in the file."""

    width: int = Field(default=128, ge=8, le=4096, description="channels of a patch")
    depth: int = Field(default=4, ge=1, le=64, description="blocks")
    heads: int = Field(default=4, ge=1, le=64, description="of attention; they divide the width")
    patch: int = Field(default=2, ge=1, le=64, description="side of a patch in pixels; it divides the image")


def find_mistakes(model: ModelConfig, shape: tuple[int, int, int]) -> list[str]:
    """What keeps it from being built for images of this shape (height, width, channels)."""
    settings, mistakes = Settings.model_validate(model.model_extra), []
    if shape[0] % settings.patch or shape[1] % settings.patch:
        mistakes.append(f"model.patch: {settings.patch} does not divide images of {shape[0]} x {shape[1]} pixels")
    if settings.width % settings.heads:
        mistakes.append(f"model.heads: {settings.heads} does not divide the width {settings.width}")
    return mistakes


DIT = NetworkEntry(
    function="dit:DiT",
    about="a transformer of patches (Peebles & Xie 2023)",
    settings=Settings,
    check="my_networks:find_mistakes",
)
