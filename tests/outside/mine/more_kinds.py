"""One of each other kind."""

from pydantic import Field

from workers.kinds import (
    MEASURES,
    NETWORKS,
    PREDICTIONS,
    SCHEDULES,
    TIMESTEPS,
    WEIGHTINGS,
    DrawEntry,
    MeasureEntry,
    NetworkEntry,
    PredictionEntry,
    ScheduleEntry,
    WeightingEntry,
)

NETWORKS["plain"] = NetworkEntry(
    function="mine.network:Plain",
    about="three convolutions",
    settings={"width": (int, Field(default=16, ge=1, le=1024, description="channels between the convolutions"))},
)
SCHEDULES["cubic"] = ScheduleEntry(
    function="mine.functions:cubic", about="the cube root linear in t", reads=("beta_start", "beta_end")
)
PREDICTIONS["minus_v"] = PredictionEntry(function="mine.functions:MINUS_V", about="-v")
WEIGHTINGS["root_snr"] = WeightingEntry(function="mine.functions:root_snr", about="sqrt(SNR_t)")
TIMESTEPS["late"] = DrawEntry(function="mine.functions:late", about="the larger of two uniform t")
MEASURES["energy"] = MeasureEntry(
    function="mine.functions:energy", about="the energy distance (Székely & Rizzo 2013)", lower=("energy",)
)
