"""A sweep that is shipped from its journals to MLflow, and what MLflow holds of it."""

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import Server
from PIL import Image

from orchestrator.tracking.shipment import LoggedDataset
from orchestrator.tracking.tracker import Tracker
from workers.storage import Storage

PARAMS: dict[str, Any] = {
    "diffusion.T": 50,
    "training.lr": 1e-4,
    "model.multipliers": [1, 2],
    "loss.weighting": "simple",
}
DIGITS = LoggedDataset(name="digits", digest="d" * 64, source="digits", shape=(8, 8, 1), profile={"training": 1617})
START_MS = 1_764_000_000_000


def write_journal(
    storage: Storage, digest: str, steps: int, name: str = "a", images_every: int = 3, best: float = 3.5
) -> list[dict[str, Any]]:
    """`steps` lines of metrics and an image at every third step; returns the lines. Times and speeds go by `name`."""
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        at = START_MS + 10 * step + ord(name)
        metrics = {"train/loss_simple": 1 / (step + 1), "valid/nll_bpd": best, "train/images_per_s": at % 997}
        lines.append({"step": step, "time_ms": at, "metrics": metrics})
        if step % images_every == 0:
            png = BytesIO()
            Image.new("RGB", (300, 200), (step, 0, 200)).save(png, format="PNG")
            path = f"trials/{digest}/samples/step-{step:08d}.png"
            storage.write(path, png.getvalue())
            lines.append({"step": step, "time_ms": at, "image": "eval/samples", "path": path})
    storage.write(f"trials/{digest}/journal.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines


def points_of(lines: list[dict[str, Any]], key: str) -> list[tuple[int, int, float]]:
    return [(line["step"], line["time_ms"], line["metrics"][key]) for line in lines if key in line.get("metrics", {})]


def client_of(tracker: Tracker) -> Any:
    return MlflowClient(tracking_uri=tracker.uri)


def runs_of(tracker: Tracker) -> dict[str, list[Any]]:
    """The active runs of the sweep's experiment by their address."""
    client = client_of(tracker)
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([client.get_experiment_by_name(tracker.name).experiment_id]):
        found.setdefault(run.data.tags.get("orchestrator.row", ""), []).append(run)
    return found


def history_of(tracker: Tracker, run: Any, key: str) -> list[tuple[int, int, float]]:
    points = client_of(tracker).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def run_sweep(storage: Storage, name: str, digests: tuple[str, ...], uri: str | None = None) -> Tracker:
    tracker = Tracker(storage, name, uri)
    tracker.open_sweep({"search.algorithm": "grid"}, {"note": "of the sweep"}, "# A sweep")
    for digest in digests:
        tracker.open_trial(digest, f"T=50 {digest}", PARAMS, {"kind": "trial"}, [DIGITS])
        tracker.log_metrics(digest, {"eval/nll_bpd": 3.25}, step=9)
        tracker.close_trial(digest, "FINISHED", "**3.25** bits/dim")
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert left.complete, str(left)
    return tracker


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """One database for the module, a sweep's name for a test: making the database takes seconds.

    Its path has all that a URI would take for something else.
    """
    root = tmp_path_factory.mktemp("runs") / "a%20b?c=d#e ü"
    yield Storage(root)
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # MLflow made nothing elsewhere


@pytest.fixture(scope="module")
def done(storage: Storage) -> tuple[Tracker, dict[str, list[dict[str, Any]]]]:
    lines = {digest: write_journal(storage, digest, 70) for digest in ("d0", "d1")}
    return run_sweep(storage, "done", ("d0", "d1")), lines


def image_files(tracker: Tracker, run: Any) -> list[str]:
    return sorted(file.path for file in client_of(tracker).list_artifacts(run.info.run_id, "images"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.stop()
