"""Hours and money of a sweep: pure functions of speeds, sizes and prices, and what the command says of them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, sweep, trials_of
from test_cluster_file import CLUSTER

from orchestrator.clusters.cluster import NodeType, read_cluster
from orchestrator.clusters.cost import (
    Plan,
    Prices,
    Unknown,
    describe_price,
    estimate,
    format_duration,
    learn,
    list_machines,
    read_prices,
    split_spent,
)
from orchestrator.experiment.effort import count_cost
from orchestrator.experiment.expand import expand, group_by_row
from orchestrator.experiment.load import load
from orchestrator.experiment.records import SearchConfig
from orchestrator.planning import makespan as makespan_module
from orchestrator.planning.makespan import Work, compute_makespan
from orchestrator.planning.place import Node, Size, admit
from workers import calibration
from workers.config import DataConfig, Mistake, Trial
from workers.data.sources import Source, describe
from workers.speed import CORE, add_spent, make_model_key, name_hardware, name_training_kind
from workers.storage import Storage

DIGITS = DataConfig(source="digits")
SOURCE = {DIGITS: describe(DIGITS)}
LAPTOP = [Node(3, 0)]  # of two cores, and one more for evaluation
ONE, TWO = Size(1, 1), Size(2, 1)


@pytest.fixture
def trial(tiny: Path) -> Trial:
    return next(iter(trials_of(tiny).values()))


# ---- The time that work takes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        ([Work(ONE, 10, 0)], 10),
        ([Work(ONE, 10, 0)] * 2, 10),
        ([Work(ONE, 10, 0)] * 3, 20),
        ([Work(TWO, 10, 0)] * 3, 30),
        ([Work(ONE, 10, 6)], 13),  # evaluation is spread over both cores
        ([Work(ONE, 10, 10)] * 2, 20),
        ([Work(ONE, 10, 10)] * 8, 80),  # 160 core-seconds on two cores, whatever the order
        ([Work(TWO, 10, 0), Work(ONE, 10, 0), Work(ONE, 10, 0)], 20),
        ([], 0),
    ],
)
def test_trials_share_two_cores(works: list[Work], expected: float) -> None:
    assert compute_makespan(works, LAPTOP, 2) == pytest.approx(expected)


def test_trials_that_share_a_gpu_train_side_by_side() -> None:
    third = Size(1, 1, 0.3333)
    assert compute_makespan([Work(third, 10, 0)] * 6, [Node(64, 1)], 64) == pytest.approx(20)
    assert compute_makespan([Work(third, 10, 0)] * 6, [Node(64, 2)], 64) == pytest.approx(10)
    whole = [Work(Size(1, 1, 1), 10, 4)] * 2  # each is measured before the next one trains
    assert compute_makespan(whole, [Node(64, 1)], 64) == pytest.approx(28)


def test_on_gpus_evaluation_fills_what_training_leaves() -> None:
    eight, one = Size(8, 1, 1), Size(1, 1, 1)
    assert compute_makespan([Work(eight, 10, 8)] * 2, [Node(64, 8)] * 2, 128) == pytest.approx(
        11
    )  # 16 GPU-seconds on 16
    assert compute_makespan([Work(eight, 10, 0)] * 3, [Node(64, 8)] * 2, 128) == pytest.approx(20)
    assert compute_makespan([Work(one, 10, 0)] * 4, [Node(64, 8)], 64, most=2) == pytest.approx(20)


# ---- Speeds ----------------------------------------------------------------------------------------------------


def speeds(trial: Trial, said_by: str = "a calibration", **work: list[float]) -> dict[str, dict[str, object]]:
    known = {name_training_kind(trial.training): [1000, 1.0], "nll": [2000, 1.0], "samples": [500, 1.0],
             "features-classifier": [1000, 1.0], "validations": [10, 5.0], "start": [1, 8.0]}  # fmt: skip
    key = make_model_key(trial.model, trial.training, SOURCE[DIGITS].shape)
    each = {"host": "here", "said_by": said_by, "date": "2026-01-01", "work": {**known, **work}}
    return {f"speeds/{key}.json": {"A core": each}}


def test_the_time_of_thousands_of_trials_is_planned_by_few_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state of the machine is decided once, and a decision looks at sizes, not at all that waits."""
    asked: list[int] = []

    def counted(waiting: Sequence[Size], *rest: Any, **more: Any) -> int | None:
        asked.append(len(waiting))
        return admit(waiting, *rest, **more)

    monkeypatch.setattr(makespan_module, "admit", counted)
    one, two = Size(1, 1), Size(2, 1)
    works = [Work(one, 1, 0.5), Work(two, 1, 0.5)] * 5000
    assert compute_makespan(works, [Node(9, 0)], 8) > 0
    assert len(asked) < 100 and max(asked) == 2


def test_a_plan_is_work_over_speed(trial: Trial) -> None:
    price, source = count_cost(trial, SOURCE[DIGITS]), SOURCE[DIGITS]
    plan = estimate([trial], SOURCE, speeds(trial), "A core", LAPTOP, cores=2, most=None)
    assert isinstance(plan, Plan)
    assert plan.training_s == pytest.approx(price.training_evaluations / 1000 + 3 * 0.5)  # validated three times
    images = 100 + source.train  # of samples and of the reference
    evaluation = price.nll_evaluations / 2000 + price.sampling_evaluations / 500 + images / 1000
    assert plan.evaluation_s == pytest.approx(evaluation)
    assert plan.wall_s == pytest.approx(8 + plan.training_s + plan.evaluation_s / 2)
    assert "a calibration" in plan.said_by and not plan.scaled


def test_references_count_once(trial: Trial) -> None:
    other = trial.model_copy(update={"seed": 1})
    one, two = (
        estimate(t, SOURCE, speeds(trial), "A core", LAPTOP, cores=2, most=None) for t in ([trial], [trial, other])
    )
    assert isinstance(one, Plan) and isinstance(two, Plan)
    assert 2 * one.evaluation_s - two.evaluation_s == pytest.approx(SOURCE[DIGITS].train / 1000)


def test_a_number_of_workers_that_nobody_measured_is_said(trial: Trial) -> None:
    training = trial.training.model_copy(update={"workers": 2})
    known = speeds(trial)
    plan = estimate(
        [trial.model_copy(update={"training": training})], SOURCE, known, "A core", LAPTOP, cores=2, most=None
    )
    alone = estimate([trial], SOURCE, known, "A core", LAPTOP, cores=2, most=None)
    assert isinstance(plan, Plan) and isinstance(alone, Plan) and plan.scaled
    assert plan.training_s > alone.training_s  # each of the two waits while the other one validates


def test_no_speed_no_number(trial: Trial) -> None:
    assert isinstance(estimate([trial], SOURCE, {}, "A core", LAPTOP, cores=2, most=None), Unknown)
    [(path, file)] = speeds(trial).items()
    del file["A core"]["work"]["samples"]  # type: ignore[index]
    unknown = estimate([trial], SOURCE, {path: file}, "A core", LAPTOP, cores=2, most=None)
    assert isinstance(unknown, Unknown) and "samples" in unknown.why


def test_what_a_sweep_learns_is_what_a_plan_reads(trial: Trial, tmp_path: Path) -> None:
    storage, source = Storage(tmp_path), SOURCE[DIGITS]
    learn(storage, trial, source, "A core", {name_training_kind(trial.training): (640, 2.0)}, said_by="trial abc")
    blocks = {"nll": (1.0, 3.0), "samples": (1.0, 4.0), "features": (1.0, 0.1), "reference": (3.0, 0.9)}
    spent = split_spent(blocks, trial, source)
    assert spent["nll"] == (pytest.approx(750), 3.0)  # one of the two blocks of 30 images and 50 timesteps
    assert spent["samples"] == (pytest.approx(500), 4.0)
    learn(storage, trial, source, "A core", spent, said_by="trial abc")
    [path] = [f"speeds/{name}" for name in storage.list("speeds")]
    plan = estimate([trial], SOURCE, {path: storage.read_sealed(path) or {}}, "A core", LAPTOP, cores=2, most=None)
    assert isinstance(plan, Plan) and "trial abc" in plan.said_by
    assert plan.training_s > 640 / 640 * 2.0


def test_a_calibration_measures_all_that_a_plan_asks_for(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ENOUGH_S", 0.01)
    name, spent = calibration.measure_speed(trial, str(tmp_path))
    assert name == name_hardware() and all(count > 0 and seconds > 0 for count, seconds in spent.values())
    storage = Storage(tmp_path)
    learn(storage, trial, SOURCE[DIGITS], name, spent, said_by="a calibration")
    [file] = storage.list("speeds")
    known = {f"speeds/{file}": storage.read_sealed(f"speeds/{file}") or {}}
    assert isinstance(estimate([trial], SOURCE, known, name, LAPTOP, cores=2, most=None), Plan)


def test_spent_adds_up() -> None:
    assert add_spent({"nll": (1, 2)}, {"nll": (3, 4), "samples": (5, 6)}) == {"nll": (4, 6), "samples": (5, 6)}
    assert name_hardware().endswith(CORE)


# ---- Prices ----------------------------------------------------------------------------------------------------

PRICES = Prices(
    currency="USD",
    date="2026-01-01",
    source="a list",
    hourly={"m7i.xlarge": 0.2, "g5.2xlarge": 1.2, "p4d.24xlarge": 22},
)


def machines(tmp_path: Path, tiny: Path, workers: int) -> list[NodeType]:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    variants = expand(load(tiny, [f"training.workers={workers}"]))
    trials, _ = group_by_row(variants, {DIGITS: SOURCE[DIGITS].digest})
    return list(list_machines(trials, SearchConfig(), read_cluster(file)))


def test_the_price_is_that_of_the_machines_that_the_trials_need(tmp_path: Path, tiny: Path) -> None:
    two_small = machines(tmp_path, tiny, 1)  # two trials, a GPU each
    assert [m.name for m in two_small] == ["head", "small", "small"]
    assert "USD 2.60" in describe_price(two_small, 3600, PRICES)
    assert "as no spot price is given" in describe_price(two_small, 3600, PRICES)
    spot = PRICES.model_copy(update={"spot": {"g5.2xlarge": 0.5}})
    assert "USD 1.20" in describe_price(two_small, 3600, spot) and "(spot)" in describe_price(two_small, 3600, spot)
    assert [m.name for m in machines(tmp_path, tiny, 8)] == ["head", "big"]
    assert "USD 44.40" in describe_price(machines(tmp_path, tiny, 8), 7200, PRICES)


def test_no_price_is_made_up(tmp_path: Path, tiny: Path) -> None:
    assert "not given" in describe_price(machines(tmp_path, tiny, 1), 3600, None)
    unknown = PRICES.model_copy(update={"hourly": {"m7i.xlarge": 0.2}})
    assert "does not give g5.2xlarge" in describe_price(machines(tmp_path, tiny, 1), 3600, unknown)


def test_the_price_file_of_the_repository_is_one() -> None:
    assert read_prices(ROOT / "prices.yaml").currency == "USD"


def test_a_price_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("currency: USD\nhourly: {g5.xlarge: cheap}\n")
    with pytest.raises(Mistake) as mistake:
        read_prices(file)
    assert all(text in str(mistake.value) for text in ("hourly.g5.xlarge", "date", "source"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (280, "4 min 40 s"), (3600 * 3.2, "3.2 h"), (86400 * 2.5, "2.5 days")]
)
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# ---- The command -----------------------------------------------------------------------------------------------


def dry_run(file: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.sweep", file, "--dry-run", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def test_the_dry_run_says_hours_and_price_or_how_to_know_them(tiny: Path, tmp_path: Path, trial: Trial) -> None:
    cluster, runs = tmp_path / "cluster.yaml", tmp_path / "runs"
    cluster.write_text(CLUSTER)
    (tmp_path / "prices.yaml").write_text(PRICES.model_dump_json())
    unknown = dry_run(tiny, "--storage", runs)
    assert unknown.returncode == 0 and "--calibrate" in unknown.stdout and not runs.exists()
    [(path, file)] = speeds(trial).items()
    Storage(runs).write_sealed(path, {"NVIDIA A10G": file["A core"], name_hardware(): file["A core"]})
    here, there = dry_run(tiny, "--storage", runs), dry_run(tiny, "--storage", runs, "--cluster", cluster)
    assert "on this machine" in here.stdout and "core-minutes" in here.stdout and "Price" not in here.stdout
    assert "on 2 GPUs of 3 machines" in there.stdout and "USD" in there.stdout and "2026-01-01" in there.stdout


@pytest.mark.parametrize(
    ("overrides", "cluster", "expected"),
    [
        ([], "nothing: here", "not a cluster file"),
        (["training.workers=8", "training.batch_size=64"], CLUSTER.replace("GPU: 8", "GPU: 1"), "never fit a cluster"),
        (["training.gpus=1"], CLUSTER.replace(", GPU: 8", "").replace(", GPU: 1", ""), "never fit a cluster"),
    ],
)
def test_bad_input_is_refused(tiny: Path, tmp_path: Path, overrides: list[str], cluster: str, expected: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(cluster)
    result = dry_run(tiny, *overrides, "--cluster", file)
    assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_a_cluster_file_without_a_cluster_is_a_mistake(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    result = sweep(tiny, "--storage", tmp_path / "runs", "--cluster", file)
    assert result.returncode == 2 and "goes with --address or --dry-run" in result.stderr


def test_the_speeds_are_of_the_file(tiny: Path) -> None:
    """A smaller network, other precision or other images are other speeds."""
    trial, source = next(iter(trials_of(tiny).values())), SOURCE[DIGITS]
    assert isinstance(source, Source) and "channels: 8" in TINY
    key = make_model_key(trial.model, trial.training, source.shape)
    wider = trial.model.model_copy(update={"channels": 16})
    bf16 = trial.training.model_copy(update={"precision": "bf16", "steps": 7})
    others = [
        make_model_key(wider, trial.training, source.shape),
        make_model_key(trial.model, bf16, source.shape),
        make_model_key(trial.model, trial.training, (32, 32, 3)),
    ]
    assert len({key, *others}) == 4
    longer = trial.training.model_copy(update={"steps": 7})
    assert make_model_key(trial.model, longer, source.shape) == key
