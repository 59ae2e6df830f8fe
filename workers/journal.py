"""A trial's journal: every point that was measured, kept beside the trial before anyone ships it to MLflow.

`journal.jsonl` holds a line a point: {"step", "time_ms", "metrics": {...}} or {"step", "time_ms", "image", "path",
"sha256"}, each with a seal, and a last line that says how many there are (`workers.seals`). It is rewritten whole at
each flush, so a reader never sees half a line. A point that is there already is not written again: a run that resumes
from a checkpoint measures the same values at the same steps, and the first stand.

Each checkpoint holds the journal as it was then (`network.checkpoint`), so that `restore` finds the points of a damaged
or deleted one there; those after it are measured again, or told to be lost.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

from workers.bits import find_validation
from workers.seals import Lines, open_lines, seal_lines
from workers.storage import Storage, tell_damage

Point = dict[str, Any]


class Journal:
    def __init__(self, storage: Storage, folder: str) -> None:
        """Goes on with the journal in `folder`."""
        self._storage, self._folder = storage, folder
        self._points: list[Point] = []
        self._values: dict[tuple[int, str], float | str] = {}
        for point in read_points(storage, folder):
            self._append(point)

    def _append(self, point: Point) -> None:
        self._points.append(point)
        self._values.update(list_point_values(point))

    def get(self, step: int, name: str) -> Any | None:
        return self._values.get((step, name))

    def add_metrics(self, step: int, values: dict[str, float]) -> None:
        new = {name: value for name, value in values.items() if (step, name) not in self._values}
        if new:
            self._append({"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": new})

    def add_image(self, step: int, name: str, png: bytes) -> None:
        """Writes the PNG beside the journal and notes it."""
        path = f"{self._folder}/{name}/step-{step:08}.png"
        if (step, name) not in self._values:
            self._storage.write(path, png)
            at = {"step": step, "time_ms": time.time_ns() // 1_000_000}
            self._append({**at, "image": name, "path": path, "sha256": hashlib.sha256(png).hexdigest()})

    def flush(self) -> None:
        self._storage.write(name_journal(self._folder), self.make_content())

    def make_content(self) -> bytes:
        """The file as `flush` writes it."""
        return seal_lines(self._points, name_journal(self._folder))


def name_journal(folder: str) -> str:
    return f"{folder}/journal.jsonl"


def list_point_values(point: Mapping[str, Any]) -> dict[tuple[int, str], Any]:
    """What a point measured, by step and name: numbers, or the path of an image."""
    entries = point["metrics"] if "metrics" in point else {point["image"]: point["path"]}
    return {(point["step"], name): value for name, value in entries.items()}


def read_points(storage: Storage, folder: str) -> list[Point]:
    """The points of the journal in `folder` that are whole, in their order; damage is told."""
    lines = _read(storage, folder)
    if lines.damage:
        tell_damage(
            storage.find_url(name_journal(folder)),
            f"is damaged: {lines.damage}",
            f"{len(lines.whole)} points of it are whole",
        )
    return list(lines.whole)


def find_validated_steps(storage: Storage, folder: str) -> set[int]:
    """The steps whose validation the journal holds."""
    return {point["step"] for point in read_points(storage, folder) if find_validation(point.get("metrics", {}))}


def read_image(storage: Storage, point: Mapping[str, Any]) -> bytes | None:
    """The PNG that a point notes; None where it is gone or damaged, which is told."""
    try:
        png = storage.read(point["path"])
    except FileNotFoundError:
        tell_damage(storage.find_url(point["path"]), "is not there", "it is left out")
        return None
    if hashlib.sha256(png).hexdigest() != point.get("sha256", hashlib.sha256(png).hexdigest()):
        tell_damage(
            storage.find_url(point["path"]), "is damaged: its sha256 is not that of the journal", "it is left out"
        )
        return None
    return png


def is_whole(storage: Storage, folder: str) -> bool:
    return storage.exists(name_journal(folder)) and not _read(storage, folder).damage


def restore(storage: Storage, folder: str, copy: bytes | None) -> str:
    """Makes a damaged or deleted journal whole from its checkpoint's `copy` and the lines that are whole.

    Returns what was wrong and what was found, in words. A damaged one is kept beside it, as journal.jsonl.damaged.
    """
    path, found = name_journal(folder), _read(storage, folder)
    is_there = storage.exists(path)
    copied = open_lines(copy or b"", path).whole
    points = _join_points(copied, found.whole)
    if is_there:
        storage.write(f"{path}.damaged", storage.read(path))
    storage.write(path, seal_lines(points, path))
    last = f" up to step {points[-1]['step']}" if points else ""
    return (
        f"{storage.find_url(path)} {'is damaged: ' + found.damage if is_there else 'was deleted'}; {len(points)} points"
        f"{last} were found again, {len(copied)} of them in its checkpoint"
    )


def _join_points(first: Iterable[Point], second: Iterable[Point]) -> list[Point]:
    """The points of both, each value once: that of the first where both have it."""
    points: list[Point] = []
    known: set[tuple[int, str]] = set()
    for point in (*first, *second):
        if "metrics" in point:
            new = {name: value for name, value in point["metrics"].items() if (point["step"], name) not in known}
            point = {**point, "metrics": new}
        elif (point["step"], point["image"]) in known:
            continue
        if point.get("metrics", True):
            points.append(point)
            known |= list_point_values(point).keys()
    return sorted(points, key=lambda point: int(point["step"]))


def _read(storage: Storage, folder: str) -> Lines:
    """What there is; a journal that is not there has no lines and no damage."""
    try:
        content = storage.read(name_journal(folder))
    except FileNotFoundError:
        return Lines([])
    return open_lines(content, name_journal(folder), _is_unsealed)


def _is_unsealed(line: Mapping[str, Any]) -> bool:
    """Whether a line is a point as versions wrote it that knew no seals."""
    if line.keys() == {"step", "time_ms", "metrics"}:
        return isinstance(line["step"], int) and isinstance(line["metrics"], dict)
    return line.keys() == {"step", "time_ms", "image", "path"} and isinstance(line["step"], int)
