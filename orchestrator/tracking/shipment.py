"""What a sweep gives to MLflow and what is left of it: values alone, which know nothing of a server."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.tracking.line import SAID

Status = Literal["FINISHED", "FAILED", "KILLED"]
Value = float | str | bool | None | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoggedDataset:
    """The images a trial used. `shape` is that of one image (H, W, C); `profile` holds counts and levels."""

    name: str
    digest: str
    source: str
    shape: tuple[int, ...]
    dtype: str = "uint8"
    profile: Mapping[str, Any] = field(default_factory=dict)
    context: Literal["training", "evaluation"] = "training"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What is known of a run before it has points. `row_id` is a row's, or `catalogue.SWEEP`."""

    row_id: str
    name: str
    params: Mapping[str, Value] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[LoggedDataset] = ()
    start_ms: int | None = None  # None: the time of its first point, else now


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What `Tracker.flush` leaves: nothing if `complete`, else what to tell the user, in `str()`."""

    uri: str
    calls: int = 0
    points: int = 0
    failing: str = ""
    standing: bool = False  # whether it fails until somebody mends something
    refused: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.calls and not self.refused

    def __str__(self) -> str:
        if self.complete:
            return f"MLflow at {self.uri} has everything."
        parts = [f"MLflow at {self.uri} is without {text}" for text in self.refused[:SAID]]
        if len(self.refused) > SAID:
            parts.append(f"and {len(self.refused) - SAID} calls more.")
        if self.calls:
            how = "takes nothing" if self.standing else "did not answer"
            why = f"{how} ({self.failing})" if self.failing else "is still at it"
            parts.append(f"MLflow at {self.uri} {why}; {self.calls} calls wait.")
        then = "mend that, then run" if self.standing else "run"
        return "\n".join(parts) + (
            f"\n{self.points} points are safe in the journal; {then} the same command again to ship them."
        )


def format_param(value: Value) -> str:
    """Numbers as the UI's charts parse them (50, 0.0001), lists and mappings as JSON, null as `null`."""
    return value if isinstance(value, str) else json.dumps(value)
