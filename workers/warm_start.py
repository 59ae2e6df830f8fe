"""What a training begins with in place of random weights: how a file says it, and how the program pins it.

A source in a trial is pinned: `base@0f3a9c5d2b7e4816`, of which the digest alone counts in ids. It is that of the id
and the step of a trial of the same sweep, which are known before that is trained, and else of a checkpoint's content.
"""

import re
from typing import Annotated, Literal

from pydantic import Field

from workers.mistakes import Open
from workers.sections import Record


class InitConfig(Record):
    """The weights that a training begins with."""

    source: Open = Field(
        description="a name of `needs`, a sweep (its best trial), a trial's id, a registered model NAME@ALIAS, or the "
        "path or URI of a checkpoint's folder, ours or diffusers'"
    )
    weights: Literal["ema", "raw"] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default="ema",
        description="which of its weights: the average that is measured, those of the last step, or one of its "
        "training.averages",
    )
    fresh: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="modules or weights of the network that are random all the same, such as conv_out",
    )


def split_pin(source: str) -> tuple[str, str]:
    """What a file says of a source, and the 16 hex digits that it is pinned to; the latter empty where it is not."""
    found = re.fullmatch(r"(.+)@([0-9a-f]{16})", source, flags=re.DOTALL)
    return (found[1], found[2]) if found else (source, "")
