"""What two sweeps made, as plain values that can be compared."""

import json
import sqlite3
import textwrap
from bisect import bisect
from collections.abc import Iterable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

NAME = "soak"


def compare(folder: Path) -> tuple[dict[str, int], list[str]]:
    """How much of each kind is equal in both sweeps, and a line for each kind that isn't."""
    ours, theirs = folder / "disturbed", folder / "undisturbed"
    databases = folder / "mlflow/mlflow.db", theirs / "mlflow.db"
    kinds = {
        "statuses": (statuses(ours), statuses(theirs)),
        "rows of the results": (results(ours), results(theirs)),
        "blocks, summaries and references": (evaluated(ours), evaluated(theirs)),
        "checkpoints": (checkpoints(ours), checkpoints(theirs)),
        "points of journals": (journals(ours), journals(theirs)),
        "points in MLflow": tuple(map(points, databases)),
        "runs of MLflow": tuple(map(runs, databases)),
    }
    equal, problems = dict[str, int](), list[str]()
    for kind, (one, other) in kinds.items():
        different = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        equal[kind] = len(other) - len(set(different) & set(other))
        if different or not other:
            key = (different or [""])[0]
            problems.append(
                f"{kind}: {len(different)} of {len(other)} differ, the first {key}: {brief(one.get(key))}, "
                f"undisturbed {brief(other.get(key))}"
            )
    return equal, problems


def statuses(storage: Path) -> dict[str, Any]:
    found = {path.parent.name: json.loads(path.read_text()) for path in storage.glob("trials/*/status.json")}
    return {name: [status[key] for key in ("state", "step", "steps", "checkpoint")] for name, status in found.items()}


def results(storage: Path) -> dict[str, Any]:
    """All of the table but the speeds."""
    import pandas as pd

    path = storage / f"sweeps/{NAME}/results.parquet"
    if not path.exists():
        return {}
    table = pd.read_parquet(path)
    table = table.drop(columns=[name for name in map(str, table) if name == "images_per_s" or name.startswith("perf/")])
    return {row["trial"]: json.dumps(row, sort_keys=True, default=str) for row in table.to_dict("records")}


def evaluated(storage: Path) -> dict[str, str]:
    """The sums of all files of evaluations: blocks, summaries with their hashes, and feature spaces."""
    paths = (path for folder in ("evaluations", "references") for path in (storage / folder).rglob("*"))
    return {str(path.relative_to(storage)): sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def checkpoints(storage: Path) -> dict[str, Any]:
    """Which are kept, and the sums of their weights and of the optimizer's moments."""
    found = dict[str, Any]()
    for folder in storage.glob("trials/*/checkpoints/*"):
        manifest = folder / "manifest.json"
        sums = json.loads(manifest.read_text())["sha256"] if manifest.exists() else {}
        found[str(folder.relative_to(storage))] = {n: sums[n] for n in sorted(sums) if n.endswith(".safetensors")}
    return found


def journals(storage: Path) -> dict[str, Any]:
    """The values of each point, of which there must be one."""
    found: dict[str, Any] = {}
    for path in storage.glob("trials/*/journal.jsonl"):
        for line in path.read_text().splitlines():
            point = json.loads(line)
            images = {point["image"]: point["path"]} if "image" in point else {}
            for name, value in point.get("metrics", images).items():
                timed = name == "train/images_per_s"
                found.setdefault(f"{path.parent.name} {point['step']} {name}", []).append("" if timed else value)
    return found


def points(database: Path) -> dict[str, Any]:
    """The values of each metric's points, by trial and step: of each there must be one."""
    found: dict[str, Any] = {}
    for row, name, step, value in read_of_rows(database, "metrics", "key, step, value"):
        if not name.startswith("perf/"):  # what clocks say, of the commands that came through
            timed = name == "train/images_per_s"
            found.setdefault(f"{row} {step} {name}", []).append("" if timed else value)
    return found


def runs(database: Path) -> dict[str, Any]:
    """How the runs of each trial ended, of which there must be one."""
    found: dict[str, Any] = {}
    for row, status, stage in read_of_rows(database, "runs", "status, lifecycle_stage"):
        if stage == "active":
            found.setdefault(row, []).append(status)
    return found


def read_of_rows(database: Path, table: str, columns: str) -> list[tuple[Any, ...]]:
    """Columns of a table of MLflow that is by runs, behind the row of the sweep that each run is of."""
    named = ", ".join(f"{table}.{column.strip()}" for column in columns.split(","))
    tags = f"JOIN tags ON tags.run_uuid = {table}.run_uuid AND tags.key = 'orchestrator.row'"
    with closing(sqlite3.connect(database)) as opened:
        return opened.execute(f"SELECT tags.value, {named} FROM {table} {tags}").fetchall()


def progress(storage: Path) -> list[float]:
    """The times of day at which something was made: points of journals, blocks and summaries."""
    lines = (line for path in storage.glob("trials/*/journal.jsonl") for line in path.read_text().splitlines())
    points = (point["time_ms"] / 1000 for point in map(json.loads, lines) if "time_ms" in point)
    made = (path.stat().st_mtime for path in (storage / "evaluations").rglob("*") if path.is_file())
    return sorted([*points, *made])


def went_on_after(done: Iterable[tuple[float, str, str]], made: list[float]) -> dict[str, list[float]]:
    """Seconds from a fault until anything new was made, the median and the most of each kind.

    Other faults may come in between, so it is longer than what the kind takes by itself.
    """
    by_kind: dict[str, list[float]] = {}
    for at, kind, _ in done:
        if (after := bisect(made, at)) < len(made):
            by_kind.setdefault(kind, []).append(made[after] - at)
    return {kind: [round(median(s), 1), round(max(s), 1)] for kind, s in sorted(by_kind.items())}


def brief(value: object) -> str:
    return textwrap.shorten(repr(value), 200)
