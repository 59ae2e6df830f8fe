"""The command as a user runs it, on a real local Ray and a real MLflow store."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, run, runs, statuses, sweep
from mlflow import MlflowClient
from mlflow.cli import gc
from PIL import Image
from scipy.stats import ttest_rel

from orchestrator.experiment.load import load
from orchestrator.standing import Standing
from orchestrator.sweep import list_trials
from workers.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore")


def test_ends_with_a_table_a_path_and_a_link(finished: tuple[Path, Path, str]) -> None:
    _, storage, output = finished
    assert "NLL bits/dim" in output and "fd_classifier" in output and "images/s" in output
    assert f"{storage}/sweeps/tiny/results.parquet" in output
    assert "http://127.0.0.1:5000/#/experiments/" in output and "workflowType=machine_learning" in output
    assert output.count(" ± ") == 4  # NLL and distance of two trials


def test_writes_a_frame_with_a_row_a_trial(finished: tuple[Path, Path, str]) -> None:
    _, storage, _ = finished
    frame = pd.read_parquet(storage / "sweeps/tiny/results.parquet")
    assert list(frame["state"]) == ["done", "done"]
    assert set(frame["loss.weighting"]) == {"simple", "vlb"}
    assert frame["eval/nll_bpd"].between(0, 10).all() and frame["eval/nll_bpd"].is_monotonic_increasing
    assert (frame["eval/fd_classifier"] > 0).all() and (frame["images_per_s"] > 0).all()


def test_mlflow_holds_everything(finished: tuple[Path, Path, str]) -> None:
    _, storage, _ = finished
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent, children = runs(storage)
    assert parent.info.status == "FINISHED" and len(children) == 2
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"experiment.yaml", "results.parquet", "report.html", "nll_and_distance.png", "nll_by_t.png"} <= artifacts
    assert "| trial |" in parent.data.tags["mlflow.note.content"]
    for child in children:
        run_id, params, tags = child.info.run_id, child.data.params, child.data.tags
        assert child.info.status == "FINISHED"
        assert float(params["diffusion.T"]) == 50 and float(params["training.lr"]) == 0.002
        assert params["loss.weighting"] in ("simple", "vlb")
        loss = client.get_metric_history(run_id, f"train/loss_{params['loss.weighting']}")
        assert [m.step for m in loss] == list(range(1, 21))
        assert [m.step for m in client.get_metric_history(run_id, "valid/nll_bpd")] == [0, 10, 20]
        assert [m.step for m in client.get_metric_history(run_id, "eval/nll_bpd")] == [20]
        assert {"eval/nll_bpd_se", "eval/fd_classifier"} <= set(child.data.metrics)
        images = [a.path for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]
        assert sorted(int(re.findall(r"step\D(\d+)", path)[0]) for path in images) == [0, 10, 20]
        assert {"trial.yaml", "evaluation.json"} <= {a.path for a in client.list_artifacts(run_id)}
        assert {used.dataset.name for used in child.inputs.dataset_inputs} == {"digits"}
        assert len(tags["trial.digest"]) == 16 and len(tags["data.digest"]) == 16
        assert "eval/nll_bpd" in tags["mlflow.note.content"]
        assert any("git" in tag for tag in tags) and any("torch" in tag for tag in tags)


def test_its_best_trial_is_a_registered_model(
    finished: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 is the candidate, says where it comes from, and gives the images that the evaluation measured."""
    _, storage, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    best = pd.read_parquet(storage / "sweeps/tiny/results.parquet")["trial"][0]
    status = statuses(storage)[best]
    version = MlflowClient().get_model_version_by_alias("tiny", "candidate")
    assert int(version.version) == 1
    assert version.tags["orchestrator.trial"] == best
    assert version.tags["orchestrator.checkpoint"] == status["checkpoint"]
    assert version.tags["orchestrator.path"] == f"trials/{best}/checkpoints/step-00000020"
    assert version.tags["orchestrator.storage"].endswith(f":{storage}")
    torch.set_num_threads(1)
    given = mlflow.pyfunc.load_model("models:/tiny@candidate").predict(pd.DataFrame({"n": [100], "seed": [0]}))
    blocks = storage.glob(f"evaluations/{status['checkpoint']}/samples-*/block-00000.parquet")
    [measured] = [path for path in blocks if "classifier" not in path.parent.name]
    images = [np.frombuffer(image, np.uint8) for image in pd.read_parquet(measured)["image"]]
    assert np.array_equal(given, np.stack(images).reshape(given.shape))


def test_the_same_command_again_does_nothing(finished: tuple[Path, Path, str]) -> None:
    file, storage, output = finished
    assert run("orchestrator.report", "tiny", "--storage", storage).returncode == 0  # which is no damage
    before = {p: p.stat().st_mtime_ns for p in storage.rglob("*") if p.is_file() and p.name != "lock"}
    again = sweep(file, "--storage", storage)
    assert again.returncode == 0, again.stderr
    assert again.stdout == output[output.index("trial ") :]
    assert again.stderr.startswith("data        digits: built in, 1,497 to train on, 300 held out")
    after = {p: p.stat().st_mtime_ns for p in storage.rglob("*") if p.is_file() and p.name != "lock"}
    assert {p for p in after if "mlflow.db" not in p.name and after[p] != before.get(p)} == set()


@pytest.mark.faults
def test_what_was_deleted_in_mlflow_is_made_again(finished: tuple[Path, Path, str], own: tuple[Path, Path]) -> None:
    """The database first, which holds the moved storage's runs, then the experiment, emptied from MLflow's bin."""
    file, storage = own
    before = {run.info.run_name: run.data.metrics for run in runs(finished[1])[1]}
    (storage / "mlflow.db").unlink()
    assert sweep(file, "--storage", storage).returncode == 0
    uri = f"sqlite:///{storage}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    client.create_experiment("keeps its id from being taken again")
    client.delete_experiment(experiment.experiment_id)
    arguments = ["--backend-store-uri", uri, "--experiment-ids", experiment.experiment_id]
    assert CliRunner().invoke(gc, arguments, env={"MLFLOW_TRACKING_URI": uri}).exit_code == 0
    again = sweep(file, "--storage", storage)
    assert again.returncode == 0, again.stderr
    warnings = [line for line in again.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "had lost the experiment" in warnings[0] and "registered model" in warnings[0]
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None and f"/#/experiments/{experiment.experiment_id}/runs?" in again.stdout
    parent, children = runs(storage)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.info.run_name: run.data.metrics for run in children} == before
    assert client.get_model_version_by_alias("tiny", "candidate")


def test_after_an_edit_only_new_trials_are_trained(own: tuple[Path, Path]) -> None:
    """Another seed: 20 steps on 30 images do not tell the two apart, and the table of single rows says so."""
    file, storage = own
    before = {digest: status["updated_ms"] for digest, status in statuses(storage).items()}
    edited = sweep(
        file, "--storage", storage, "search.space.loss.weighting.grid=[simple]", "search.space.seed.grid=[0, 1]"
    )
    assert edited.returncode == 0, edited.stdout + edited.stderr
    after = {digest: status["updated_ms"] for digest, status in statuses(storage).items()}
    assert len(after) == 3 and all(after[digest] == time for digest, time in before.items())
    assert len(runs(storage)[1]) == 3

    frame = pd.read_parquet(storage / "sweeps/tiny/results.parquet").set_index("trial")
    best, other = frame.index
    a, b = (summary_of(storage, statuses(storage)[trial]["checkpoint"]) for trial in (best, other))
    assert ttest_rel(a["nll_per_image"], b["nll_per_image"]).pvalue > 0.05
    each = run("orchestrator.report", "tiny", "--markdown", "--rows", "--storage", storage).stdout
    assert each.count(" ≈ |") == 1 and f"not distinguishable from {best[:8]}" in each
    assert frame.loc[other, "nll_above_best_low"] < 0 < frame.loc[other, "nll_above_best_high"]


def summary_of(storage: Path, checkpoint: str) -> dict[str, Any]:
    [path] = storage.glob(f"evaluations/{checkpoint}/summary-*.json")
    return json.loads(path.read_text())


def test_more_samples_compute_only_the_missing_blocks(own: tuple[Path, Path]) -> None:
    file, storage = own
    before = {p: p.stat().st_mtime_ns for p in storage.glob("evaluations/*/*/*.parquet")}
    more = sweep(file, "--storage", storage, "evaluation.fid.samples=200", "name=more")
    assert more.returncode == 0, more.stdout + more.stderr
    after = {p: p.stat().st_mtime_ns for p in storage.glob("evaluations/*/*/*.parquet")}
    assert all(after[p] == time for p, time in before.items())
    assert (
        sorted(p.name for p in after.keys() - before.keys()) == ["block-00001.parquet"] * 4
    )  # samples and their features


@pytest.mark.faults
def test_images_at_a_relative_path_reach_the_workers(tiny: Path, tmp_path: Path) -> None:
    for i in range(60):
        file = tmp_path / f"images/{i % 2}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * i, 255 - 4 * i, i)).save(file)
    source = os.path.relpath(tmp_path / "images", ROOT)
    result = sweep(
        tiny, "--storage", tmp_path / "runs", f"data.source={source}", "search.space={}", "evaluation.nll.images=all"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fd_classifier" in result.stdout and " done" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["diffusion.T=0", "training.lr=fast", "loss.weightin=vlb"], ["diffusion.T", "training.lr", "loss.weighting"]),
        (["diffusion.schedule.beta_end=1.5"], ["diffusion.schedule.beta_end"]),
        (["diffusion.schedule.beta_start=0.5"], ["reversed"]),
        (["search.space.loss.weighting.grid=[]"], ["empty search"]),
        (["name=../outside"], ["name"]),
        (["data.source=nowhere/images"], ["nowhere/images"]),
        (["tracking.uri=./mlruns"], ["tracking.uri"]),
        (["search.metric=train/loss_simple"], ["not comparable"]),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    tiny: Path, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    result = sweep(tiny, "--storage", tmp_path / "runs", *overrides)
    assert result.returncode == 2
    assert all(text in result.stderr for text in expected), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs/trials").exists()


def test_a_dry_run_imports_neither_torch_nor_ray_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from orchestrator.sweep import main; "
        f"status = main([{str(tiny)!r}, '--dry-run', '--storage', {str(tmp_path / 'runs')!r}]); "
        "assert status == 0; print(sorted({'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "2 trials" in result.stdout and not (tmp_path / "runs").exists()


def test_measurements_of_one_trial_train_it_once(tiny: Path, tmp_path: Path) -> None:
    """Samplers, a variance and an average as search dimensions: a row and a run of MLflow each, one training."""
    space = {
        "loss.weighting": None,
        "evaluation.fid.sampler": {"grid": [{"kind": "ddim"}, {"kind": "heun"}, {"kind": "ancestral"}]},
        "evaluation.variance": {"grid": [None, "fixed_small"]},
        "evaluation.ema": {"grid": [0.99, 0]},
    }
    words = [f"search.space.{path}={json.dumps(axis)}" for path, axis in space.items()]
    words += ["training.averages=[0.0]", "evaluation.nll.images=10", "evaluation.ode_nll={images: 5, tolerance: 0.01}"]
    storage = tmp_path / "runs"
    first = sweep(tiny, *words, "--storage", storage)
    assert first.returncode == 0, first.stdout + first.stderr
    frame = pd.read_parquet(storage / "sweeps/tiny/results.parquet")
    assert list(frame["state"]) == ["done"] * 12 and len(list((storage / "trials").iterdir())) == 1
    assert frame["trial"].nunique() == 12 and frame["trial"].str.partition("-")[0].nunique() == 1
    # Where the sampler reads no variance its samples are shared; the bound differs by variance and weights alone.
    assert frame["eval/nll_bpd"].nunique() == 4 and frame["eval/ode_nll_bpd"].nunique() == 2
    kinds = frame["evaluation.fid.sampler"].str.extract('"kind": "([a-z]*)"')[0]
    assert list(frame.groupby(kinds)["eval/fd_classifier"].nunique()[["ddim", "heun", "ancestral"]]) == [2, 2, 4]
    counts = frame.groupby(kinds)["eval/network_evaluations"].first()
    assert (counts["ddim"], counts["heun"], counts["ancestral"]) == (5, 9, 5)
    _, children = runs(storage)
    assert len(children) == 12 and all(run.info.status == "FINISHED" for run in children)
    blocks = sorted(str(path.relative_to(storage)) for path in (storage / "evaluations").rglob("*.parquet"))
    assert len([path for path in blocks if "/nll-" in path]) == 2  # one of each average
    again = sweep(tiny, *words, "--storage", storage)
    assert again.returncode == 0 and "train" not in again.stdout.partition("trial")[0]

    trials, sources, _ = list_trials(load(tiny, words))
    standing = Standing(load(tiny, words), dict(sources), Storage(storage), print)
    standing.add(trials)
    standing.forget()  # what --fresh does first
    assert not list((storage / "trials").iterdir())
    left = [path for path in (storage / "evaluations").rglob("*.parquet") if "reference" not in str(path)]
    assert not left  # neither of the trial's own average nor of the other
