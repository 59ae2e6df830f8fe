"""How fast trials are: the clock, the peak, the share of it, who is slow, and how it is shown; from plain data."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from stored_sweep import FOUR, Page, stored

from orchestrator import status
from orchestrator.experiment.records import Variant
from orchestrator.measuring.seeds import group_rows
from orchestrator.measuring.slowness import find_slow_trials
from orchestrator.output import findings, page
from orchestrator.output.markdown import write_markdown
from orchestrator.output.speed_table import format_seconds, format_share, list_closing_lines, list_speed_lines
from orchestrator.output.table import make_frame, make_table
from orchestrator.state.events import EventLog, sum_evaluation_seconds
from orchestrator.state.rows import Found, Row
from orchestrator.telling import sum_seconds_used
from workers import peak
from workers.config import DataConfig, ModelConfig, TrainingConfig, Trial
from workers.data.dataset import prepare
from workers.layout import RowId
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.manifest import Checkpoint
from workers.network.unet_config import make_unet_config
from workers.speed import Spent, Stopwatch
from workers.storage import Storage
from workers.training import name_checkpoints_folder, train

PEAK = {"hardware": "A Processor core", "precision": "float32", "threads": 1, "flops_per_s": 1e11, "workers": 2,
        "flops_per_image": 3e8}  # fmt: skip
SECONDS = {"training": 90.0, "validation": 3.0, "checkpoints": 2.0, "waiting": 1.5}
CPU = torch.device("cpu")


def row(
    digest: str, images_per_s: float | None, known: bool = True, model: ModelConfig | None = None, **training: Any
) -> Row:
    """A trial with that speed; one that is not `known` is of a storage of before."""
    config = TrainingConfig(**{"steps": 1000, **training})
    trial = Trial(data=DataConfig(source="digits"), model=model or ModelConfig(), training=config)
    of = {"state": "finished", "step": config.steps, "images_per_s": images_per_s, "host": f"host-{digest}"}
    more = {"peak": PEAK, "seconds": SECONDS} if known else {}
    return Row(RowId(digest), Variant(params={"training.lr": 0.1}, trial=trial), Found({**of, **more}))


def slow(rows: list[Row]) -> list[str]:
    return [str(trial.row) for trial in find_slow_trials(rows)]


# ---- Who is slow -----------------------------------------------------------------------------------------------


def test_a_trial_below_half_of_the_median_is_slow_and_is_told_with_its_host() -> None:
    [found] = find_slow_trials([row("aaaaaaaaaa", 110), row("bbbbbbbbbb", 40), row("cccccccccc", 100)])
    assert (found.row, found.median, found.trials) == ("bbbbbbbbbb", 100, 3)
    assert str(found) == (
        "bbbbbbbb  lr=0.1 on host-bbbbbbbbbb: 40 images/s, 40% of the median 100 of 3 trials of its size"
    )


def test_half_of_the_median_is_not_slow() -> None:
    assert slow([row("a", 100), row("b", 50), row("c", 100)]) == []
    assert slow([row("a", 100), row("b", 49.9), row("c", 100)]) == ["b"]


def test_of_two_trials_nobody_can_say_which_is_slow() -> None:
    assert slow([row("a", 100), row("b", 10)]) == []


@pytest.mark.parametrize(
    "other",
    [{"model": ModelConfig(channels=32)}, {"batch_size": 64}, {"precision": "bf16"}, {"workers": 2}, {"cpus": 2}],
)
def test_trials_of_another_size_are_not_compared(other: dict[str, Any]) -> None:
    assert slow([row("a", 100), row("b", 10, **other), row("c", 100), row("d", 100)]) == []


def test_settings_that_cost_no_time_do_not_make_another_size() -> None:
    assert slow([row("a", 100, lr=0.1), row("b", 10, lr=0.2), row("c", 100, lr=0.3, validate_every=7)]) == ["b"]


def test_rows_that_share_a_trial_count_once() -> None:
    assert slow([row("a", 100), row("b", 10), row("b-20", 10)]) == []
    assert slow([row("a", 100), row("b", 10), row("b-20", 10), row("c", 100)]) == ["b"]


def test_trials_without_a_speed_do_not_count() -> None:
    assert slow([row("a", 100), row("b", 10), row("c", None), row("d", 0.0)]) == []
    assert slow([Row(RowId("e"), row("a", 1).variant, Found())]) == []


def test_a_trial_of_a_few_steps_is_not_called_slow() -> None:
    assert slow([row("a", 1000, steps=4), row("b", 100, steps=4), row("c", 1000, steps=4)]) == []


# ---- The share of the peak -------------------------------------------------------------------------------------


def test_the_share_of_the_peak_is_the_operations_of_the_images_over_those_of_all_devices() -> None:
    assert row("a", 100).of_peak == pytest.approx(3e8 * 100 / (2 * 1e11))
    assert row("a", None).of_peak is None and row("a", 100, known=False).of_peak is None


def test_the_numbers_have_one_name_in_mlflow_and_in_the_results() -> None:
    speeds = row("a", 100).speeds
    assert speeds["perf/of_peak"] == pytest.approx(0.15) and speeds["perf/peak_tflops"] == pytest.approx(0.1)
    assert speeds["perf/seconds_training"] == 90 and speeds["perf/images_per_s"] == 100
    frame = make_frame([row("a", 100), row("b", 50, known=False)])
    assert frame["images_per_s"].tolist() == [100, 50]
    assert frame["perf/of_peak"].isna().tolist() == [False, True]
    assert set(frame) >= set(speeds) - {"perf/images_per_s"}
    assert not any(name.startswith("perf/") for name in row("a", 100).metrics)


def test_a_training_step_of_the_papers_network_is_three_forward_passes() -> None:
    """12.44 GFLOP an image forward, as counted on the paper's CIFAR-10 network; no random number is drawn for it."""
    before = torch.get_rng_state()
    config = make_unet_config(ModelConfig(), image_channels=3, resolution=32)
    assert peak.count_training_flops(json.dumps(config)) == pytest.approx(3 * 12.44e9, rel=1e-3)
    assert torch.equal(torch.get_rng_state(), before)


CONFIG = make_unet_config(
    ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,)), image_channels=1, resolution=8
)


def test_a_peak_is_measured_once_for_each_precision_and_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[torch.dtype, int]] = []

    def measure(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
        measured.append((dtype, torch.get_num_threads()))
        return 2e9 if dtype == torch.bfloat16 else 1e9 * torch.get_num_threads()

    monkeypatch.setattr(peak, "measure_matrix_product", measure)
    storage, found = Storage(tmp_path), []
    for threads, enabled in ((1, False), (1, False), (1, True), (2, False), (1, True)):
        torch.set_num_threads(threads)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
        found.append(peak.describe_peak(storage, CONFIG, autocast, CPU, workers=1))
    torch.set_num_threads(1)
    assert measured == [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 2)]
    assert [each["flops_per_s"] for each in found] == [1e9, 1e9, 2e9, 2e9, 2e9]
    assert [each["precision"] for each in found[:3]] == ["float32", "float32", "bfloat16"]


def test_a_processor_without_bf16_is_held_against_its_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes in float32 then, and its product in bfloat16 is slower than that: training would reach 135 %."""
    monkeypatch.setattr(peak, "measure_matrix_product", lambda _, dtype, tf32: 1e9 if dtype == torch.bfloat16 else 9e9)
    torch.set_num_threads(1)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    found = peak.describe_peak(Storage(tmp_path), CONFIG, autocast, CPU, workers=1)
    assert (found["flops_per_s"], found["precision"]) == (9e9, "float32")


def test_a_damaged_peak_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e9, 2e9])
    monkeypatch.setattr(peak, "measure_matrix_product", lambda *_: next(rates))
    torch.set_num_threads(1)
    of = Storage(tmp_path), CONFIG, torch.autocast("cpu", enabled=False), CPU, 1
    assert peak.describe_peak(*of)["flops_per_s"] == 1e9
    [memo] = (tmp_path / "speeds").iterdir()
    memo.write_text(memo.read_text().replace("1000000000.0", "9000000000.0"))
    assert [peak.describe_peak(*of)["flops_per_s"] for _ in range(2)] == [2e9, 2e9]


def test_a_matrix_product_has_a_speed() -> None:
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    assert peak.measure_matrix_product(CPU, torch.float32, tf32=False) > 0
    assert torch.equal(torch.get_rng_state(), before)


# ---- The clock -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, in the last place of a list."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[-1])
    yield now


def test_every_moment_counts_for_the_kind_that_was_named_last(clock: list[float]) -> None:
    watch = Stopwatch()
    for at, kind in ((103, "training"), (110, "validation"), (111, "training"), (115, "training")):
        clock.append(at)
        watch.turn_to(kind)
    clock.append(120)
    assert watch.seconds == {"waiting": 3, "training": 16, "validation": 1}


def test_a_resumed_clock_goes_on_from_the_checkpoint_and_forgets_what_was_beyond_it(clock: list[float]) -> None:
    watch = Stopwatch()
    clock.append(102)
    watch.turn_to("training")
    clock.append(105)
    watch.resume({"training": 50.0, "waiting": 10.0})
    clock.append(106)
    watch.turn_to("waiting")
    clock.append(108)
    assert watch.seconds == {"training": 51, "waiting": 14}


def halfway(storage: Storage) -> Trial:
    """A trial of 4 steps that stands at the checkpoint of its second."""
    torch.set_num_threads(1)
    model = ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,))
    config = TrainingConfig(steps=4, batch_size=8, validate_every=2, checkpoint_every=2, precision="float32")
    trial = Trial(data=DataConfig(source="digits"), model=model, training=config)
    loop: Any = train(trial, prepare(trial.data), storage, "trials/a")
    for _ in range(2):
        next(loop)
    loop.close()
    return trial


def test_a_trial_keeps_its_seconds_with_its_checkpoints_and_what_it_is_held_against(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    trial, first = halfway(storage), storage.read_sealed("trials/a/status.json") or {}
    assert set(first["seconds"]) == {"training", "validation", "checkpoints", "waiting"}
    assert first["peak"]["flops_per_image"] == peak.count_training_flops(json.dumps(CONFIG))
    # The status knows what the writing of that checkpoint took, too, which the trial forgets that goes on from it.
    halfway_there = manifest.find_newest(storage, name_checkpoints_folder("trials/a"))
    assert halfway_there
    before = checkpoints.load_state(halfway_there)[2]["seconds"]
    for _ in train(trial, prepare(trial.data), storage, "trials/a"):
        pass
    last = storage.read_sealed("trials/a/status.json") or {}
    assert all(last["seconds"][kind] > before[kind] for kind in ("training", "checkpoints", "waiting"))
    assert last["images_per_s"] == pytest.approx(4 * 8 / last["seconds"]["training"])
    assert last["peak"] == first["peak"] and len(storage.list("speeds")) == 1


def test_a_checkpoint_of_before_knows_the_seconds_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, load_state = Storage(tmp_path), checkpoints.load_state

    def load_state_of_before(checkpoint: Checkpoint) -> Any:
        *weights, progress = load_state(checkpoint)
        return *weights, {"step": progress["step"], "train_seconds": 1000.0}

    trial = halfway(storage)
    monkeypatch.setattr(checkpoints, "load_state", load_state_of_before)
    for _ in train(trial, prepare(trial.data), storage, "trials/a"):
        pass
    assert (storage.read_sealed("trials/a/status.json") or {})["seconds"]["training"] > 1000


# ---- What is shown ---------------------------------------------------------------------------------------------


def test_what_blocks_used_is_told_by_kind_and_added_over_commands(tmp_path: Path) -> None:
    spents: dict[str, Spent] = {
        "A core": {"nll": (1, 2.0), "reference": (2, 0.5)},
        "H100": {"nll": (1, 1.0), "features": (1, 0.25)},
    }
    used = sum_seconds_used(spents)
    assert used == {"core_s": 2.5, "gpu_s": 1.25, "seconds": {"nll": 3.0, "features": 0.75}}
    events = EventLog(Storage(tmp_path), "some")
    for _ in range(2):
        events.add("measured", "a", **used)
    events.add("measured", "b", core_s=1.0, gpu_s=0.0)  # of a version that told no kinds
    assert sum_evaluation_seconds(events.events) == {"a": {"nll": 6.0, "features": 1.5}}
    assert findings.tell_event(events.events[0]).text == "core_s 2.5, gpu_s 1.25, nll 3 s, features 0.75 s"


def test_the_training_of_a_trial_that_rows_share_counts_once() -> None:
    lines = list_closing_lines([row("a", 100), row("a-20", 100), row("b", 100)])
    assert lines[0] == "work        training 3:00, validation 6.0 s, checkpoints 4.0 s, waiting 3.0 s"
    assert lines[1] == "peak        100 GFLOP/s, a matrix product in float32 on 1 thread of A Processor core"
    assert len(lines) == 2


def test_what_a_storage_of_before_does_not_know_is_a_dash() -> None:
    old = [row("a", 100, known=False), row("b", 50, known=False)]
    assert list_closing_lines(old) == []
    assert "of peak" not in [column.header for column in make_table(old).columns]
    [first, _] = list_speed_lines(group_rows([row("a", 100, known=False), row("b", 100)]))
    assert (first.images_per_s, first.of_peak, set(first.seconds)) == ("100", "-", {"-"})
    table = make_table([row("a", 100, known=False), row("b", 100)])
    [shares] = [list(column.cells) for column in table.columns if column.header == "of peak"]
    assert shares == ["-", "15 %"]


def test_a_narrow_window_does_without_the_share_before_anything_else() -> None:
    heads = [column.header for column in make_table([row("a", 100)], width=40).columns]
    assert "of peak" not in heads and "images/s" in heads


def test_shares_and_seconds_are_short() -> None:
    assert [format_share(share) for share in (None, 0.5, 0.1234, 0.0123)] == ["-", "50 %", "12 %", "1.2 %"]
    assert [format_seconds(seconds) for seconds in (None, 3.21, 59.0, 3700.0)] == ["-", "3.2 s", "59.0 s", "1:01:40"]


def with_speeds(root: Path) -> Storage:
    """A sweep of four trials that know their speeds, of which the last is slow."""
    storage, trials = stored(root, FOUR)
    events = EventLog(storage, "small")
    for i, trial in enumerate(trials):
        path = f"trials/{trial}/status.json"
        found = storage.read_sealed(path) or {}
        rate = 4.0 if i < 3 else 1.0
        storage.write_sealed(path, {**found, "images_per_s": rate, "seconds": SECONDS, "peak": PEAK})
        events.add("measured", trial, core_s=3.0, gpu_s=0.0, seconds={"nll": 2.0, "samples": 1.0})
    events.flush()
    return storage


def test_the_report_has_a_table_of_speeds_and_tells_who_is_slow(tmp_path: Path) -> None:
    made = findings.gather(with_speeds(tmp_path), "small")
    text = " ".join(" ".join(Page(page.render_report(made)).text).split())
    for message in ("Speed", "of peak", "checkpoints", "1:30", "100 GFLOP/s, a matrix product in float32",
                 "on <b>here</b>: 1 images/s, 25% of the median 4 of 4 trials of its size"):  # fmt: skip
        assert message in text, message
    lines = write_markdown(made).splitlines()
    head = "| trial | images/s | of peak | training | validation | checkpoints | waiting | nll | samples |"
    assert lines.count(head) == 1 and sum(line.startswith("- slow: ") for line in lines) == 1
    assert sum("| 1:30 | 3.0 s | 2.0 s | 1.5 s | 2.0 s | 1.0 s |" in line for line in lines) == 4


def test_status_tells_the_share_and_who_is_slow_within_80_columns(tmp_path: Path) -> None:
    found = json.loads(json.dumps(status.look(with_speeds(tmp_path), "small")))
    [sweep] = found["sweeps"]
    assert sweep["trials"][0]["of_peak"] == pytest.approx(3e8 * 4 / 2e11)
    assert sweep["trials"][0]["seconds"] == {**SECONDS, "nll": 2.0, "samples": 1.0}
    [slow] = sweep["slow"]
    assert (slow["host"], slow["median"], slow["trials"]) == ("<b>here</b>", 4.0, 4)
    console = Console(width=120, record=True)
    console.print(status.make_view(found, True, 120), soft_wrap=True)
    text = console.export_text()
    assert "of peak" in text and "peak: 100 GFLOP/s" in text and "slow: 3" in text
    narrow = Console(width=80, record=True)
    narrow.print(status.make_view(found, True, 80), soft_wrap=True)
    table = [line for line in narrow.export_text().splitlines() if line[:8] in ("trial   ", "3abcdef0")]
    assert len(table) == 2 and all(len(line) <= 80 for line in table)
