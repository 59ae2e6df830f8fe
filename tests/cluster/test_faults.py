"""Kills, interrupts, divergence and pruning: nothing is lost, nothing is left over, and every end has its reason."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import Started, maps, run, runs, state_of, statuses, sweep, title, trials_of, undisturbed
from mlflow import MlflowClient

from orchestrator.state.events import read_events
from workers.storage import Storage

pytestmark = pytest.mark.faults


def test_resumes_after_a_kill_of_the_driver_and_ends_in_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    arguments = (
        tiny, "--storage", storage, "training.steps=400", "training.validate_every=100", "training.checkpoint_every=50",
    )  # fmt: skip
    started = Started(*arguments)
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        started.kill()
    finally:
        started.end()
    before = state_of(storage)
    assert before and all(state == "running" for state, _ in before.values())
    resumed = sweep(*arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumes" in resumed.stdout
    for digest, trial in trials_of(tiny, *arguments[3:]).items():
        status = statuses(storage)[digest]
        assert status["state"] == "finished"
        assert status["checkpoint"] == undisturbed(trial, tmp_path / "plain"), "the weights differ from a plain run's"
    parent, children = runs(storage)
    assert parent.info.status == "FINISHED" and [run.info.status for run in children] == ["FINISHED"] * 2
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    for child in children:
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "valid/nll_bpd")]
        assert steps == [0, 100, 200, 300, 400]


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    started = Started(
        tiny, "--storage", storage, "training.steps=400", "training.validate_every=100", "training.checkpoint_every=50"
    )
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        [victim, *_] = [pid for pid in started.family() if "OneWorker" in title(pid)]
        os.kill(victim, signal.SIGKILL)
        assert started.process.wait(timeout=600) == 0, started.read_output()
        assert (
            "starts again from its last checkpoint" in started.read_output()
            and "Traceback" not in started.read_output()
        )
        assert set(state_of(storage).values()) == {("finished", 400)}
        happened = read_events(Storage(storage), "tiny")
        [restart] = [event for event in happened if event["event"] == "restarted"]
        assert restart["why"] and restart["trial"] in state_of(storage)
        begins = [event["trial"] for event in happened if event["event"] == "began"]
        assert sorted(begins) == sorted([*state_of(storage), restart["trial"]]), "each begins, and one again"
        assert restart["trial"][:8] in (page := (storage / "sweeps/tiny/report.html").read_text())
        assert '<span class="tag restarted">' in page
    finally:
        started.end()


def test_blocks_that_are_made_again_are_told(own: tuple[Path, Path]) -> None:
    """One whose process is killed, which Ray runs again by itself, and samples that a disk has damaged."""
    file, storage = own
    killed, damaged = sorted(statuses(storage))
    checkpoints = {
        trial: storage / "evaluations" / statuses(storage)[trial]["checkpoint"] for trial in (killed, damaged)
    }
    shutil.rmtree(checkpoints[killed])
    [samples] = checkpoints[damaged].glob("samples-????????????????/block-00000.parquet")
    samples.write_bytes(samples.read_bytes()[:-1] + b"\0")
    shutil.rmtree(next(checkpoints[damaged].glob("samples-*-classifier*")))
    for summary in checkpoints[damaged].glob("summary-*.json"):
        summary.unlink()
    started, making = Started(file, "--storage", storage), list[int]()
    try:
        started.wait_until(
            lambda: bool(making.extend(p for p in started.family() if "make_block" in title(p)) or making)
        )
        os.kill(making[0], signal.SIGKILL)
        assert started.process.wait(timeout=600) == 0, started.read_output()
    finally:
        started.end()
    told = [event for event in read_events(Storage(storage), "tiny") if event["event"] == "retried"]
    again, remade = ([e for e in told if text in e["why"]] for text in ("Ray ran it again", "it is made again"))
    assert again and len(told) == len(again) + len(remade)
    assert [(e["trial"], e["piece"]) for e in remade] == [(damaged, str(samples.relative_to(storage)))]
    assert "Ray ran it again" in started.read_output() and "is made again" in started.read_output()
    assert (storage / "sweeps/tiny/report.html").read_text().count('<span class="tag retried">') == len(told)
    found = json.loads(run("orchestrator.status", "tiny", "--json", "--storage", storage).stdout)
    assert sum(trial["retried_blocks"] for trial in found["sweeps"][0]["trials"]) == len(told)


def test_a_damaged_checkpoint_fails_its_own_trial_and_no_other(
    own: tuple[Path, Path],
) -> None:
    """The blocks of real images that both wait for may be the failing trial's to make."""
    file, storage = own
    for folder in ("evaluations", "references"):
        shutil.rmtree(storage / folder)
    victim, other = sorted(statuses(storage))
    [weights] = storage.glob(f"trials/{victim}/checkpoints/*/unet/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    result = sweep(file, "--storage", storage)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{weights} is damaged: its sha256 differs" in result.stdout and "Traceback" not in result.stdout
    frame = pd.read_parquet(storage / "sweeps/tiny/results.parquet").set_index("trial")
    assert frame["state"].to_dict() == {victim: "failed", other: "done"}
    assert frame["eval/nll_bpd"][other] > 0


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


def test_asha_prunes_on_the_bound_and_says_so(tiny: Path, tmp_path: Path) -> None:
    arguments = (
        tiny, "--storage", tmp_path / "runs", "search.space.loss.weighting=null",
        "search.space.training.lr.grid=[4.0e-3, 1.0e-3, 1.0e-6, 1.0e-7]", "search.metric=valid/nll_bpd",
        "search.scheduler={kind: asha, grace: 20, reduction: 2}", "training.steps=80", "training.validate_every=20",
        "search.max_concurrent=1", "evaluation={nll: {images: 30}, fid: null}",
    )  # fmt: skip
    result = sweep(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    states = [state for state, _ in state_of(tmp_path / "runs").values()]
    assert "pruned" in states and "finished" in states
    assert "is not among the best of its rung" in result.stdout
    again = sweep(*arguments)
    assert "train " not in again.stdout


LONG = ("training.steps=100000", "training.checkpoint_every=50")


def _ignore_sigint() -> None:
    """As a shell does to what a script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hear_sighup() -> None:
    """Also where these tests were started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("signals", "in_child"),
    [
        pytest.param([signal.SIGINT] * 8, _ignore_sigint, id="ctrl-C eight times, SIGINT inherited as ignored"),
        pytest.param([signal.SIGHUP, signal.SIGTERM], _hear_sighup, id="a terminal that is closed"),
    ],
)
def test_an_interrupt_leaves_no_process_and_says_how_to_resume(
    tiny: Path, tmp_path: Path, signals: list[signal.Signals], in_child: Callable[[], object] | None
) -> None:
    storage = tmp_path / "runs"
    started = Started(tiny, "--storage", storage, *LONG, in_child=in_child)
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        for number in signals:
            started.process.send_signal(number)
            time.sleep(0.35)
        assert started.process.wait(timeout=300) == 130, started.read_output()
        assert "The same command resumes." in started.read_output()
        assert (
            "Traceback" not in started.read_output()
            and "warning" not in started.read_output()
            and "rror" not in started.read_output()
        )
        assert started.read_output().count("It is ending") == len(signals) - 1
        assert started.family() == []
        assert {run.info.status for run in runs(storage)[1]} == {"KILLED"}
    finally:
        started.end()


def test_ctrl_c_before_there_is_anything_to_end(tiny: Path, tmp_path: Path) -> None:
    """During the imports, and as soon as Ray starts its processes: one line, and nothing left."""
    for moment in ("imports", "Ray"):
        started = Started(tiny, "--storage", tmp_path / "runs", *LONG)
        seen = {
            "imports": lambda s=started: "torch" in maps(s.process.pid),
            "Ray": lambda s=started: len(s.family()) > 1,
        }
        try:
            started.wait_until(seen[moment])
            for _ in range(3):
                started.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert started.process.wait(timeout=300) == 130, started.read_output()
            output = started.read_output()
            assert (
                "Interrupted." in output
                and "Traceback" not in output
                and "warning" not in output
                and "rror" not in output
            )
            assert started.family() == []
        finally:
            started.end()


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_part_of_ray_that_is_killed_is_replaced_and_the_sweep_goes_on(tiny: Path, tmp_path: Path, part: str) -> None:
    """Ray's GCS may die while the command is in a call to it, which nothing ends: then the same command resumes."""
    storage = tmp_path / "runs"
    arguments = (tiny, "--storage", storage, "training.steps=400", "training.validate_every=100",
                 "training.checkpoint_every=50", "evaluation={nll: {images: 25}, fid: null}")  # fmt: skip
    started = Started(*arguments)
    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        [victim] = [pid for pid in started.family() if title(pid).partition("\0")[0].endswith(f"/{part}")]
        os.kill(victim, signal.SIGKILL)
        status = started.process.wait(timeout=600)
        output = started.read_output()
        assert f"(process {victim}) was killed by signal 9" in output and "Traceback" not in output, output
        assert started.family() == [], [title(pid) for pid in started.family()]
        if status == 4 and part == "gcs_server":
            assert "The same command resumes." in output
            status = sweep(*arguments).returncode
        assert status == 0, output
        assert set(state_of(storage).values()) == {("finished", 400)}
        assert {run.info.status for run in runs(storage)[1]} == {"FINISHED"}
    finally:
        started.end()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        pytest.param([], "OneWorker", id="one worker"),
        pytest.param(["training.workers=2", "search.space={}"], "RayTrainWorker", id="data-parallel"),
    ],
)
def test_a_worker_that_hangs_is_told_ended_and_replaced(
    tiny: Path, tmp_path: Path, settings: list[str], name: str
) -> None:
    """The worker of a trial, and the process of a block; one of two workers of a group: each is stopped for ever."""
    storage = tmp_path / "runs"
    started = Started(
        tiny, "--storage", storage, "training.steps=400", "training.validate_every=100", "training.checkpoint_every=50",
        "search.hang_s=20", "evaluation={nll: {images: 75}, fid: null}", *settings,
    )  # fmt: skip

    def stop(name: str) -> int:
        found: list[int] = []
        started.wait_until(lambda: bool(found.extend(p for p in started.family() if name in title(p)) or found))
        os.kill(found[-1], signal.SIGSTOP)
        return found[-1]

    try:
        started.wait_until(lambda: any(storage.glob("trials/*/checkpoints/step-*/manifest.json")))
        victims = [stop(name)]
        if name == "OneWorker":
            started.wait_until(lambda: "evaluating" in started.read_output())
            victims.append(stop("make_block"))
        assert started.process.wait(timeout=600) == 0, started.read_output()
        output = started.read_output()
        for victim in victims:
            assert re.search(
                rf"\(process {victim}\) has (not been heard|been stopped) for \d+ s: it is ended", output
            ), output
        assert "again from its last checkpoint" in output and "Traceback" not in output, output
        assert set(state_of(storage).values()) == {("finished", 400)}
        hangs = [e["why"] for e in read_events(Storage(storage), "tiny") if e["event"] == "hangs"]
        assert sum("it is ended" in why for why in hangs) >= len(victims)
        assert started.family() == []
    finally:
        started.end()
