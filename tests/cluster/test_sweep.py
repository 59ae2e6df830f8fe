"""The command as a user runs it, on a real local Ray and a real MLflow store."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import TINY, Started, sweep
from mlflow import MlflowClient
from mlflow.entities import Run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(experiment file, storage, output) of a sweep that ran undisturbed. Tests only add to it."""
    folder = tmp_path_factory.mktemp("finished")
    file, storage = folder / "tiny.yaml", folder / "runs"
    file.write_text(TINY)
    result = sweep(file, "--storage", storage)
    assert result.returncode == 0, result.stdout + result.stderr
    return file, storage, result.stdout


def statuses(storage: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in storage.glob("trials/*/status.json")}


def state_of(storage: Path) -> dict[str, tuple[str, int]]:
    return {digest: (status["state"], status["step"]) for digest, status in statuses(storage).items()}


def runs(storage: Path, name: str = "tiny") -> tuple[Run, list[Run]]:
    """The sweep's run and its trials', from MLflow."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name(name)
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parent, [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def test_ends_with_a_table_a_path_and_a_link(finished: tuple[Path, Path, str]) -> None:
    _, storage, output = finished
    assert "NLL bits/dim" in output and "fd_classifier" in output and "images/s" in output
    assert f"{storage}/sweeps/tiny/results.parquet" in output
    assert "http://127.0.0.1:5000/#/experiments/" in output and "workflowType=machine_learning" in output
    assert output.count(" ± ") == 2


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
    assert {"experiment.yaml", "results.parquet", "nll_and_distance.png", "nll_by_t.png"} <= artifacts
    assert "| trial |" in parent.data.tags["mlflow.note.content"]
    for run in children:
        run_id, params, tags = run.info.run_id, run.data.params, run.data.tags
        assert run.info.status == "FINISHED"
        assert float(params["diffusion.T"]) == 50 and float(params["training.lr"]) == 0.002
        assert params["loss.weighting"] in ("simple", "vlb")
        loss = client.get_metric_history(run_id, f"train/loss_{params['loss.weighting']}")
        assert [m.step for m in loss] == list(range(1, 21))
        assert [m.step for m in client.get_metric_history(run_id, "valid/nll_bpd")] == [0, 10, 20]
        assert [m.step for m in client.get_metric_history(run_id, "eval/nll_bpd")] == [20]
        assert {"eval/nll_bpd_se", "eval/fd_classifier"} <= set(run.data.metrics)
        images = [a.path for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]
        assert sorted(int(re.findall(r"step\D(\d+)", path)[0]) for path in images) == [0, 10, 20]
        assert {"trial.yaml", "evaluation.json"} <= {a.path for a in client.list_artifacts(run_id)}
        assert {used.dataset.name for used in run.inputs.dataset_inputs} == {"digits"}
        assert len(tags["trial.digest"]) == 16 and len(tags["data.digest"]) == 16
        assert "eval/nll_bpd" in tags["mlflow.note.content"]
        assert any("git" in tag for tag in tags) and any("torch" in tag for tag in tags)


def test_the_same_command_again_does_nothing(finished: tuple[Path, Path, str]) -> None:
    file, storage, output = finished
    before = {p: p.stat().st_mtime_ns for p in storage.rglob("*") if p.is_file() and p.name != "lock"}
    again = sweep(file, "--storage", storage)
    assert again.returncode == 0, again.stderr
    assert again.stdout == output[output.index("trial ") :]
    after = {p: p.stat().st_mtime_ns for p in storage.rglob("*") if p.is_file() and p.name != "lock"}
    assert {p for p in after if "mlflow.db" not in p.name and after[p] != before.get(p)} == set()


def test_after_an_edit_only_new_trials_are_trained(finished: tuple[Path, Path, str]) -> None:
    file, storage, _ = finished
    before = {digest: status["updated_ms"] for digest, status in statuses(storage).items()}
    edited = sweep(file, "--storage", storage, "search.space.loss.weighting.grid=[simple, vlb, min_snr]")
    assert edited.returncode == 0, edited.stdout + edited.stderr
    after = {digest: status["updated_ms"] for digest, status in statuses(storage).items()}
    assert len(after) == 3 and all(after[digest] == time for digest, time in before.items())
    assert len(runs(storage)[1]) == 3


def test_more_samples_compute_only_the_missing_blocks(finished: tuple[Path, Path, str]) -> None:
    file, storage, _ = finished
    before = {p: p.stat().st_mtime_ns for p in storage.glob("evaluations/*/*/*.parquet")}
    more = sweep(file, "--storage", storage, "evaluation.fid.samples=200", "name=more")
    assert more.returncode == 0, more.stdout + more.stderr
    after = {p: p.stat().st_mtime_ns for p in storage.glob("evaluations/*/*/*.parquet")}
    assert all(after[p] == time for p, time in before.items())
    assert sorted(p.name for p in after.keys() - before.keys()) == ["block-00001.parquet"] * 2


def test_resumes_after_a_kill_of_the_driver_and_ends_in_the_same_bits(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    file, undisturbed, _ = finished
    arguments = (file, "--storage", tmp_path, "training.steps=400", "training.validate_every=100")
    started = Started(*arguments)
    try:
        started.wait_until(lambda: any(tmp_path.glob("trials/*/checkpoints/step-*/manifest.json")))
        started.kill()
    finally:
        started.end()
    before = state_of(tmp_path)
    assert before and all(state == "running" for state, _ in before.values())
    checkpoint = {p.parents[2].name: int(p.parent.name[5:]) for p in tmp_path.glob("trials/*/*/step-*/manifest.json")}
    assert max(checkpoint.values()) > 0
    resumed = sweep(*arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumes" in resumed.stdout
    whole = sweep(file, "--storage", undisturbed, "name=whole", *arguments[3:])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = statuses(undisturbed)
    for digest, status in statuses(tmp_path).items():
        assert status["state"] == "finished"
        assert status["checkpoint"] == expected[digest]["checkpoint"], "the weights differ from an undisturbed run's"
    parent, children = runs(tmp_path)
    assert parent.info.status == "FINISHED" and [run.info.status for run in children] == ["FINISHED"] * 2
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run in children:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "valid/nll_bpd")]
        assert steps == [0, 100, 200, 300, 400]


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    started = Started(tiny, "--storage", storage, "training.steps=400", "training.validate_every=100")
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        [victim, *_] = [pid for pid in started.family() if "OneWorker" in _title(pid)]
        os.kill(victim, signal.SIGKILL)
        assert started.process.wait(timeout=300) == 0, started.process.stdout and started.process.stdout.read()
        assert set(state_of(storage).values()) == {("finished", 400)}
    finally:
        started.end()


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def test_a_trial_that_diverges_is_a_result_and_the_others_finish(tiny: Path, tmp_path: Path) -> None:
    result = sweep(
        tiny, "--storage", tmp_path / "runs", "search.space.loss.weighting=null",
        "search.space.training.lr.grid=[1.0e-3, 1.0e+30]", "evaluation.fid=null",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(state for state, _ in state_of(tmp_path / "runs").values()) == ["diverged", "finished"]
    assert "diverged by step" in result.stdout
    again = sweep(
        tiny, "--storage", tmp_path / "runs", "search.space.loss.weighting=null",
        "search.space.training.lr.grid=[1.0e-3, 1.0e+30]", "evaluation.fid=null",
    )  # fmt: skip
    assert again.returncode == 0 and "train " not in again.stdout


def test_two_workers_under_ray_train_end_where_one_does(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    """The same digest, hosted by Ray Train with two workers over gloo: losses and bounds equal up to rounding."""
    file, undisturbed, _ = finished
    result = sweep(file, "--storage", tmp_path, "training.workers=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert state_of(tmp_path).keys() <= state_of(undisturbed).keys()
    for digest in statuses(tmp_path):
        ours, theirs = (_metrics(root / f"trials/{digest}/journal.jsonl") for root in (tmp_path, undisturbed))
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key


def _metrics(journal: Path) -> dict[tuple[int, str], float]:
    points = map(json.loads, journal.read_text().splitlines())
    pairs = ((p["step"], n, v) for p in points for n, v in p.get("metrics", {}).items())
    return {(step, name): value for step, name, value in pairs if name != "train/images_per_s"}


def test_asha_prunes_on_the_bound_and_says_so(tiny: Path, tmp_path: Path) -> None:
    arguments = (
        tiny, "--storage", tmp_path / "runs", "search.space.loss.weighting=null", "evaluation=null",
        "search.space.training.lr.grid=[4.0e-3, 1.0e-3, 1.0e-6, 1.0e-7]", "search.metric=valid/nll_bpd",
        "search.scheduler={kind: asha, grace: 20, reduction: 2}", "training.steps=80", "training.validate_every=20",
        "search.max_concurrent=1", "evaluation={nll: {images: 30}, fid: null}",
    )  # fmt: skip
    arguments = tuple(a for a in arguments if a != "evaluation=null")
    result = sweep(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    states = [state for state, _ in state_of(tmp_path / "runs").values()]
    assert "pruned" in states and "finished" in states
    assert "was not among the best" in result.stdout
    again = sweep(*arguments)
    assert "train " not in again.stdout


def test_ctrl_c_leaves_no_process_and_says_how_to_resume(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    started = Started(tiny, "--storage", storage, "training.steps=100000")
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        started.process.send_signal(signal.SIGINT)
        output, _ = started.process.communicate(timeout=120)
        assert started.process.returncode == 130 and "resumes" in output
        assert "Traceback" not in output
        assert started.family() == []
        assert {run.info.status for run in runs(storage)[1]} == {"KILLED"}
    finally:
        started.end()


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
    import sys

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "2 trials" in result.stdout and not (tmp_path / "runs").exists()
