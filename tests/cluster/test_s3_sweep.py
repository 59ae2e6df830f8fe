"""A sweep whose storage, data and artifacts are on S3, with MLflow behind HTTP; its driver is killed in the middle."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import aws
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Started, run, sweep
from mlflow import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits

from orchestrator.ui import LIGHT
from workers.storage import Storage

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """In a bucket that also holds the data; the nodes' cache is empty at the start."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    with aws.moto() as endpoint:
        aws.client("s3", endpoint).create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": aws.REGION}
        )
        yield Storage("s3://bucket/runs")


@pytest.fixture
def mlflow(storage: Storage, tmp_path: Path) -> Iterator[str]:
    """A server whose artifacts are in the bucket as well."""
    port = aws.free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        "s3://bucket/mlflow",
    ]
    with (tmp_path / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | LIGHT, start_new_session=True, stdout=log, stderr=log)
    try:
        aws.wait_for(f"http://127.0.0.1:{port}/health", server, timeout_s=180)
        yield f"http://127.0.0.1:{port}"
    finally:
        aws.end(server)


def digits_as_parquet() -> bytes:
    """300 of scikit-learn's digits as PNG, in 256 levels."""
    digits, rows = load_digits(), []
    for pixels in (digits.images[:300] * 15.9).astype(np.uint8):
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    stream = BytesIO()
    pq.write_table(pa.table({"image": rows, "label": digits.target[:300]}), stream)
    return stream.getvalue()


def test_a_killed_sweep_on_s3_resumes_and_is_measured_there(
    tiny: Path, storage: Storage, mlflow: str, tmp_path: Path
) -> None:
    storage.write("data/digits.parquet", digits_as_parquet())
    arguments = (
        tiny, f"data.source={storage.find_url('data/digits.parquet')}", "--storage", storage.root,
        "--tracking-uri", mlflow,
        "training.steps=300", "training.validate_every=100", "training.checkpoint_every=50",
    )  # fmt: skip

    def committed() -> list[str]:
        return [
            path
            for trial in storage.list("trials")
            for step in storage.list(f"trials/{trial}/checkpoints")
            if storage.exists(path := f"trials/{trial}/checkpoints/{step}/manifest.json")
        ]

    started = Started(*arguments)
    try:
        started.wait_until(lambda: bool(committed()))
        started.kill()
    finally:
        started.end()
    assert storage.exists("sweeps/tiny/lock")

    resumed = sweep(*arguments)
    print(resumed.stdout, resumed.stderr)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "seeing for 20 s whether it is alive" in resumed.stdout and "resume" in resumed.stdout
    assert "s3://bucket/runs/sweeps/tiny/results.parquet" in resumed.stdout and mlflow in resumed.stdout
    frame = pd.read_parquet(BytesIO(storage.read("sweeps/tiny/results.parquet")))
    assert list(frame["state"]) == ["done", "done"] and (frame["eval/fd_classifier"] > 0).all()
    assert not storage.exists("sweeps/tiny/lock")
    assert len(list((tmp_path / "cache/sources").rglob("*.parquet"))) == 1
    assert len(list((tmp_path / "cache/data").glob("*/images.npy"))) == 1

    client = MlflowClient(mlflow)
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    assert len(children) == 2 and {r.info.status for r in found} == {"FINISHED"}
    for child in children:
        loss = client.get_metric_history(child.info.run_id, f"train/loss_{child.data.params['loss.weighting']}")
        assert len({m.step for m in loss}) == len(loss) and loss[-1].step == 300  # no point twice
        assert "evaluation.json" in {a.path for a in client.list_artifacts(child.info.run_id)}
    assert storage.list("../mlflow".removeprefix("../")) == []  # artifacts are beside the storage, not in it

    again = sweep(*arguments)
    assert again.returncode == 0 and again.stdout == resumed.stdout[resumed.stdout.index("trial ") :]

    trial = frame["trial"][0]
    more = run(
        "orchestrator.evaluate", trial, "evaluation.fid.samples=200", "--storage", storage.root, "--json",
        "--tracking-uri", mlflow,
    )  # fmt: skip
    assert more.returncode == 0, more.stdout + more.stderr
    [measured] = json.loads(more.stdout)
    print(measured)
    [step] = storage.list(f"trials/{trial}/checkpoints")
    by_folder = run(
        "orchestrator.evaluate", storage.find_url(f"trials/{trial}/checkpoints/{step}"), "--storage", storage.root,
        "evaluation.fid.samples=200", "--json", "--tracking-uri", mlflow,
    )  # fmt: skip
    assert by_folder.returncode == 0, by_folder.stdout + by_folder.stderr
    assert json.loads(by_folder.stdout)[0]["hash"] == measured["hash"]
    compared = run("orchestrator.compare", *frame["trial"], "--storage", storage.root)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    print(compared.stdout)
