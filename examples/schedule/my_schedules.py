"""A noise schedule of one's own, with a setting of its own."""

import numpy as np
from pydantic import BaseModel, Field

from workers.config import ScheduleConfig
from workers.diffusion.schedules import Betas
from workers.kinds import ScheduleEntry


class Settings(BaseModel):
    """They stand beside `kind` in the file."""

    power: float = Field(default=3.0, gt=0, le=10, description="beta_t^(1 / power) is linear in t")


def rise(schedule: ScheduleConfig, T: int) -> Betas:
    """beta_1..beta_T between beta_start and beta_end; power 1 is `linear`, and 2 `quadratic`."""
    power: float = schedule.power  # type: ignore[attr-defined]
    return (
        np.linspace(schedule.beta_start ** (1 / power), schedule.beta_end ** (1 / power), T, dtype=np.float64) ** power
    )


POWER = ScheduleEntry(
    function=rise, about="a root of beta_t linear in t", reads=("beta_start", "beta_end"), settings=Settings
)
