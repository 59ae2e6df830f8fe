"""Measuring checkpoints as a user does: the same numbers at any number of tasks, and only what is missing is made."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Started, run, runs, statuses, title
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from orchestrator.execution import session
from orchestrator.execution.evaluations import BLOCK_CPUS, TASKS_A_SLOT, Evaluations
from orchestrator.measuring.subjects import find_checkpoint
from orchestrator.planning.decide import find_missing_blocks
from orchestrator.state.saved import open_trial
from workers.config import Measurement
from workers.data.sources import describe
from workers.evaluation.blocks import Images, list_blocks
from workers.storage import Storage
from workers.tasks import make_order

DATA = "data        digits: built in, 1,497 to train on, 300 held out"
MORE = ("evaluation.nll.images=120", "evaluation.fid.samples=300", "seed=7")  # nothing of it is measured yet


def evaluate(*arguments: object) -> list[dict[str, Any]]:
    result = run("orchestrator.evaluate", *arguments, "--json", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def trained(own: tuple[Path, Path]) -> tuple[Path, str]:
    """(a storage with the trials of a sweep, the address of one)."""
    return own[1], min(statuses(own[1]))


@pytest.mark.faults
def test_one_two_and_four_tasks_a_kill_and_half_a_cache_give_the_same_bits(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    storage, trial = trained
    two, four = tmp_path / "two", tmp_path / "four"
    shutil.copytree(storage, two)
    shutil.copytree(storage, four)
    [one] = evaluate(trial, "--storage", storage, *MORE, "--tasks", 1)
    assert one["blocks_run"] == {"nll": 5, "samples": 3, "features": 3}

    started = Started(trial, "--storage", two, *MORE, "--tasks", 2, "--json", module="orchestrator.evaluate")
    try:
        started.wait_until(lambda: any(pid for pid in started.family() if "make_block" in title(pid)))
        [victim, *_] = [pid for pid in started.family() if "make_block" in title(pid)]
        os.kill(victim, signal.SIGKILL)
        assert started.process.wait(timeout=600) == 0, started.read_output()
        assert one["hash"] in started.read_output() and "Ray ran it again" in started.read_output()
    finally:
        started.end()

    made = sorted(set(storage.glob("evaluations/*/*/*.parquet")) - {storage / p.relative_to(four) for p in
                  four.glob("evaluations/*/*/*.parquet")})  # fmt: skip
    for block in random.Random(0).sample(made, len(made) // 2):
        target = four / block.relative_to(storage)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(block, target)
    [half] = evaluate(trial, "--storage", four, *MORE, "--tasks", 4)
    assert sum(half["blocks_run"].values()) == len(made) - len(made) // 2
    assert half["hash"] == one["hash"] and half["metrics"] == one["metrics"]


@pytest.mark.faults
def test_more_of_it_runs_only_what_is_missing_and_a_damaged_block_is_made_again(trained: tuple[Path, str]) -> None:
    storage, trial = trained
    [before] = evaluate(trial, "--storage", storage)
    assert not before["blocks_run"]
    [more] = evaluate(trial, "--storage", storage, "evaluation.nll.images=60", "evaluation.fid.samples=200")
    assert more["blocks_run"] == {"nll": 1, "samples": 1, "features": 1}
    assert more["nll_per_image"][:30] == pytest.approx(before["nll_per_image"])

    digest = before["passports"]["nll"]["subject"]["checkpoint"]
    for summary in storage.glob(f"evaluations/{digest}/summary-*.json"):
        content = json.loads(summary.read_text())
        content["metrics"]["eval/nll_bpd"] += 0.001  # a digit that somebody, or a disk, has changed
        summary.write_text(json.dumps(content))
    for damaged in storage.glob(f"evaluations/{digest}/nll-*/block-00000.parquet"):
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    [again] = evaluate(trial, "--storage", storage)
    assert again["hash"] == before["hash"] and again["metrics"] == before["metrics"]
    assert not again["blocks_run"]  # the damage is found when the block is read


def test_blocks_that_would_not_be_done_before_the_job_pauses_are_not_begun(trained: tuple[Path, str]) -> None:
    storage, address = Storage(trained[0]), trained[1]
    trial = open_trial(storage, address)
    m, images = Measurement.of(trial), Images.of(describe(trial.data))
    checkpoint = find_checkpoint(storage, address, trial)
    assert checkpoint
    planned = list_blocks(m, checkpoint.digest, images)
    lost = [block for block in planned if block.kind == "nll"]
    for block in lost:
        storage.delete(block.path)
    with session.open_session(None, cpus=1):
        for until, made in ((time.time() - 1, False), (None, True)):
            evaluations = Evaluations()
            order = make_order(storage, m, checkpoint, 0, until=until)
            evaluations.submit(address, order, planned, find_missing_blocks(planned, storage.list))
            ended = []
            while evaluations:
                ended += evaluations.poll(0.2)
            assert ended == ([(address, "")] if made else [])
            assert evaluations.late == (set() if made else {address})
            assert [storage.exists(block.path) for block in lost] == [made] * len(lost)


def test_of_many_evaluations_only_so_much_is_begun_as_keeps_the_cluster_busy(trained: tuple[Path, str]) -> None:
    storage, address = Storage(trained[0]), trained[1]
    m = Measurement.of(trial := open_trial(storage, address))
    checkpoint, images = find_checkpoint(storage, address, trial), Images.of(describe(trial.data))
    assert checkpoint and m.evaluation.nll
    with session.open_session(None, cpus=1):
        evaluations, ended, most = Evaluations(), list[str](), 0
        for timesteps in range(4, 10):
            nll = m.evaluation.nll.model_copy(update={"images": 50, "timesteps": timesteps})
            of = m.model_copy(update={"evaluation": m.evaluation.model_copy(update={"nll": nll, "fid": None})})
            planned = list_blocks(of, checkpoint.digest, images)
            missing = find_missing_blocks(planned, storage.list)
            assert len(planned) == len(missing) > 1
            evaluations.submit(str(timesteps), make_order(storage, of, checkpoint, 0), planned, missing)
            assert evaluations.count_left(str(timesteps)) == len(missing)
        assert len(evaluations) == 6
        while evaluations:
            most = max(most, len(evaluations._owner))
            for name, why in evaluations.poll(0.2):
                assert not why
                ended.append(name)
        assert ended == [str(timesteps) for timesteps in range(4, 10)]
        assert most <= TASKS_A_SLOT / BLOCK_CPUS + len(planned) + 1


def test_a_folder_of_diffusers_is_measured_and_recorded_in_an_experiment_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(20, beta_start=0.005, beta_end=0.4, prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(  # type: ignore[attr-defined]
        tmp_path / "theirs", safe_serialization=True
    )
    small = ("data.source=digits", "evaluation.nll.images=25", "evaluation.fid.samples=100")
    [found] = evaluate(tmp_path / "theirs", *small, "--storage", tmp_path / "runs")
    assert found["metrics"]["eval/nll_bpd"] > 0 and found["passports"]["nll"]["subject"]["T"] == 20
    parent, [child] = runs(tmp_path / "runs", "evaluations")
    assert parent.info.status == child.info.status == "FINISHED"
    assert child.data.metrics["eval/nll_bpd"] == pytest.approx(found["metrics"]["eval/nll_bpd"])


@pytest.mark.faults
def test_another_protocol_gets_names_of_its_own_in_mlflow(trained: tuple[Path, str]) -> None:
    storage, trial = trained
    (Path(storage) / "sweeps/tiny/mlflow.json").write_text("damaged: the runs are found by their tags")
    evaluate(trial, "--storage", storage, "evaluation.nll={images: 25, timesteps: 10}", "evaluation.fid=null")
    [child] = [run for run in runs(storage)[1] if run.data.tags["trial.digest"] == trial]
    [other] = {name.split("/")[0] for name in child.data.metrics if name.startswith("eval.")}
    key = other.removeprefix("eval.")
    assert json.loads(child.data.tags[f"protocol.{key}"])["nll"]["protocol"]["timesteps"] == "10, log_uniform"
    assert child.data.metrics[f"{other}/nll_bpd"] != child.data.metrics["eval/nll_bpd"]
    assert child.info.status == "FINISHED"

    # As if its sweep had asked for this protocol.
    place, path = Storage(storage), "sweeps/tiny/sweep.json"
    content = place.read_sealed(path)
    assert content
    evaluation = content["trials"][trial]["trial"]["evaluation"]
    evaluation |= {"nll": {**evaluation["nll"], "images": 25, "timesteps": 10}, "fid": None}
    place.write_sealed(path, content, sort=False)
    [other_trial] = set(statuses(storage)) - {trial}
    refused = run("orchestrator.compare", trial, other_trial, "--storage", storage)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "not compared: nll images: 25 against 30" in refused.stdout
    assert "not compared: nll timesteps: 10, log_uniform against all" in refused.stdout
    assert "not compared: samples: not measured of the first" in refused.stdout
    assert "A - B" not in refused.stdout


def test_compares_what_may_be_compared_and_refuses_the_rest(trained: tuple[Path, str]) -> None:
    storage, _ = trained
    a, b = sorted(statuses(storage))
    same = run("orchestrator.compare", a, b, "--storage", storage)
    assert same.returncode == 0 and "95 % of 30 pairs of images" in same.stdout and "fd_classifier" in same.stdout
    itself = run("orchestrator.compare", a, a, "--storage", storage)
    assert "not distinguishable" in itself.stdout and itself.stderr.startswith(DATA)
    unmeasured = run("orchestrator.compare", a, b, "seed=5", "--storage", storage)
    assert unmeasured.returncode == 2 and "orchestrator.evaluate" in unmeasured.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing-like-that"], ["neither a sweep nor a trial", "Sweeps here: tiny"]),
        (["tinny"], ["did you mean 'tiny'"]),
        (["tiny", "--profile", "ddpm"], ["no such profile", "did you mean 'ddpm-2020'"]),
        (["tiny", "evaluation.fid.sample=9", "diffusion.T=9"], ["evaluation.fid.samples", "diffusion.T"]),
        (["tiny", "evaluation.nll.images=301"], ["301 is more than the 300"]),
        (["tiny", "data.source=gaussian"], ["no labels"]),
        (["tiny", "evaluation.fid.also=[inception_score]"], ["needs features: inception"]),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    finished: tuple[Path, Path, str], arguments: list[str], expected: list[str]
) -> None:
    result = run("orchestrator.evaluate", *arguments, "--storage", finished[1])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(text in result.stderr for text in expected), result.stderr


def test_the_canaries_pass(tmp_path: Path) -> None:
    result = run("orchestrator.canary", "--storage", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("passed") == len(result.stdout.splitlines()) == 9
    assert "data        gaussian: built in" in result.stderr and DATA in result.stderr
