"""A trial's journal: every point that was measured, kept beside the trial before anyone ships it to MLflow.

`journal.jsonl` holds a line a point: {"step", "time_ms", "metrics": {...}} or {"step", "time_ms", "image", "path"}.
It is rewritten whole at each flush, so a reader never sees half a line. A point that is there already is not written
again: a run that resumes from a checkpoint measures the same values at the same steps, and the first stand.
"""

import json
import time
from typing import Any

from workers.storage import Storage


class Journal:
    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._path = storage, f"{folder}/journal.jsonl"
        text = storage.read(self._path).decode() if storage.exists(self._path) else ""
        self._lines = text.splitlines()
        self._values: dict[tuple[int, str], float | str] = {}
        for line in self._lines:
            self._index(json.loads(line))

    def _index(self, point: dict[str, Any]) -> None:
        entries = point["metrics"] if "metrics" in point else {point["image"]: point["path"]}
        self._values.update({(point["step"], name): value for name, value in entries.items()})

    def _append(self, point: dict[str, Any]) -> None:
        self._lines.append(json.dumps(point))
        self._index(point)

    def get(self, step: int, name: str) -> Any | None:
        return self._values.get((step, name))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        new = {name: value for name, value in values.items() if (step, name) not in self._values}
        if new:
            self._append({"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": new})

    def image(self, step: int, name: str, png: bytes) -> None:
        """Writes the PNG beside the journal and notes it."""
        path = f"{self._path.rpartition('/')[0]}/{name}/step-{step:08}.png"
        if (step, name) not in self._values:
            self._storage.write(path, png)
            self._append({"step": step, "time_ms": time.time_ns() // 1_000_000, "image": name, "path": path})

    def flush(self) -> None:
        self._storage.write(self._path, "".join(line + "\n" for line in self._lines).encode())
