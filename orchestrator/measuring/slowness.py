"""Which trials are much slower than the others of their size: pure functions of rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.state.rows import Row
from workers.layout import RowId, get_trial_of_row

BELOW = 0.5  # of the median of the trials of its size
FEWEST = 3  # trials of a size, below which nobody can say which of them is the odd one
LONG_ENOUGH_S = 10.0  # of training; before that a trial's speed is mostly that of its first steps, which are slower


@dataclass(frozen=True)
class SlowTrial:
    row: RowId
    name: str
    host: str
    images_per_s: float
    median: float  # of the trials of its size, itself among them
    trials: int

    def __str__(self) -> str:
        share, alike = self.images_per_s / self.median, f"{self.trials} trials of its size"
        return (
            f"{self.row[:8]}  {self.name} on {self.host}: {self.images_per_s:,.0f} images/s, "
            f"{share:.0%} of the median {self.median:,.0f} of {alike}"
        )


def find_slow_trials(rows: Sequence[Row]) -> list[SlowTrial]:
    """The trials that train at less than `BELOW` of the median images/s of those of their size, where there are
    `FEWEST` of them, and have trained for `LONG_ENOUGH_S`. Rows that share a trial count once, and trials without a
    speed do not count.
    """
    sizes: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.images_per_s:
            sizes.setdefault(_describe_size(row), {}).setdefault(get_trial_of_row(row.digest), row)
    found = []
    for alike in sizes.values():
        middle = median(row.images_per_s or 0.0 for row in alike.values())
        for row in alike.values() if len(alike) >= FEWEST else ():
            rate = row.images_per_s or 0.0
            if rate < BELOW * middle and _sum_training_seconds(row, rate) >= LONG_ENOUGH_S:
                host = str((row.found.status or {}).get("host") or "an unknown host")
                found.append(SlowTrial(row.digest, row.name, host, rate, middle, len(alike)))
    return found


def _sum_training_seconds(row: Row, images_per_s: float) -> float:
    return int((row.found.status or {})["step"]) * row.variant.trial.training.batch_size / images_per_s


def _describe_size(row: Row) -> str:
    """What the speed of a trial should follow from: the network, its images, the batch, and what it is trained on."""
    trial, training = row.variant.trial, row.variant.trial.training
    placed = training.batch_size, training.precision, training.compile, training.workers, training.cpus, training.gpus
    return json.dumps([trial.model.model_dump(mode="json"), trial.data.source, trial.data.resolution, *placed])
