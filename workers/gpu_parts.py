"""How many GPUs a setting asks for: one, none, or a part of one."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field


def _check_gpus(gpus: object) -> object:
    if isinstance(gpus, int | float) and not 0 <= gpus <= 1:
        raise ValueError(
            f"{str(gpus)[:20]} is not auto, 0, 1 or a part of a GPU such as 0.25; a worker uses at most one GPU; "
            "for more take training.workers"
        )
    return gpus


Gpus = Annotated[Literal["auto", 0, 1] | Annotated[float, Field(ge=0.01, lt=1)], BeforeValidator(_check_gpus)]
