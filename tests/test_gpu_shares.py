"""How many trials share a GPU: what follows from what is measured, how it is noted, and who waits for it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trials_of

from orchestrator.planning.packing import Start, line_up
from orchestrator.state.events import measure_use
from workers import sharing, tasks
from workers.config import Trial
from workers.data.dataset import prepare
from workers.evaluation.blocks import Block
from workers.hosts import CROWDED, MEASURED, report_resized
from workers.sharing import (
    CONTEXT_BYTES,
    MARGIN,
    MOST,
    WARM_UP,
    Gauge,
    NeedsLess,
    compute_memory_part,
    compute_share,
    correct_share,
    count_trials_a_gpu,
    double_share,
    find_share,
    note_share,
    read_share,
)
from workers.speed import Meter
from workers.storage import Storage
from workers.training import train
from workers.world import World


@pytest.fixture
def tiny_trial(tiny: Path) -> Trial:
    return next(iter(trials_of(tiny).values()))


GB, H100, A100 = 2**30, "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"


def test_the_part_of_the_memory_has_a_margin_and_the_context_in_it() -> None:
    assert MARGIN >= 1.2 and CONTEXT_BYTES == GB / 2
    assert compute_memory_part(8 * GB, 80 * GB) == pytest.approx((8 * MARGIN + 0.5) / 80)


@pytest.mark.parametrize(
    ("memory", "use", "trials"),
    [
        (0.1, None, MOST),  # ten by its memory
        (0.24, None, 4),
        (0.24, 0.1, 4),
        (0.24, 0.4, 2),  # its use decides
        (0.24, 0.0, 4),
        (1 / 3, 1 / 3, 3),
        (0.51, 0.1, 1),
        (1.7, 0.1, 1),  # of which one does not fit with the margin
        (0.1, 1.0, 1),
        (None, 0.1, 1),  # nothing is shared of which the memory is not known
        (None, None, 1),
    ],
)
def test_so_many_trials_share_a_gpu_as_memory_and_use_allow(
    memory: float | None, use: float | None, trials: int
) -> None:
    assert count_trials_a_gpu(memory, use) == trials
    assert trials * compute_share(memory, use) <= 1 and compute_share(memory, use) == pytest.approx(
        1 / trials, abs=1e-4
    )
    assert trials == 1 or all(part <= compute_share(memory, use) + 1e-4 for part in (memory, use) if part)


def test_twice_a_part_ends_at_a_whole_gpu() -> None:
    shares = [compute_share(0.1, None)]
    while shares[-1] < 1:
        shares.append(double_share(shares[-1]))
    assert shares == [0.125, 0.25, 0.5, 1.0]
    assert double_share(0.3333) == 0.6666 and double_share(0.6666) == 1 and double_share(0.9) == 1


def test_what_is_noted_holds_for_the_gpus_that_the_cluster_has() -> None:
    noted = {H100: {"share": 0.125}, A100: {"share": 0.25}}
    assert find_share(noted, ["H100"]) == 0.125 and find_share(noted, ["A100"]) == 0.25
    assert find_share(noted, ["A100", "H100"]) == 0.25  # nobody knows on which it will lie
    assert find_share(noted, ["T4"]) is None and find_share(noted, ["H100", "T4"]) is None
    assert find_share(noted, []) == 0.25  # Ray does not know its GPUs
    assert find_share({}, ["H100"]) is None and find_share({}, []) is None


def test_a_note_is_kept_for_each_gpu_and_corrected_upwards_only(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert read_share(storage, "shares/a.json", ["H100"]) is None
    note_share(storage, "shares/a.json", H100, 0.125, use=0.1)
    note_share(storage, "shares/a.json", A100, 0.5, use=None)
    correct_share(storage, "shares/a.json", H100, 0.25)
    correct_share(storage, "shares/a.json", A100, 0.25)
    assert read_share(storage, "shares/a.json", ["H100"]) == 0.25
    assert read_share(storage, "shares/a.json", ["A100"]) == 0.5
    noted = storage.read_sealed("shares/a.json")
    assert noted and noted[H100]["use"] == 0.1
    (tmp_path / "shares/a.json").write_text((tmp_path / "shares/a.json").read_text().replace("0.25", "0.01"))
    assert read_share(storage, "shares/a.json", ["H100"]) is None, "a changed note is measured again"


def test_the_first_trial_of_each_kind_is_measured_alone_and_the_others_wait_no_longer() -> None:
    kinds, whole, waits = ["a", "b", "a", "b", "a"], Start(1.0, measures=True), Start(None)
    assert line_up(kinds, {}, [], []) == [whole, whole, waits, waits, waits]
    assert line_up(kinds[2:], {}, ["a", "b"], []) == [waits] * 3
    assert line_up(kinds[2:], {"a": 0.25}, ["b"], []) == [Start(0.25), waits, Start(0.25)]
    assert line_up(kinds[2:], {"a": 0.25, "b": 1.0}, [], []) == [Start(0.25), Start(1.0), Start(0.25)]
    assert line_up(["a", "a"], {}, ["a"], ["a"]) == [whole, whole], "one ended before it was measured"
    assert line_up([], {}, [], []) == []


def gauge_of(storage: Storage, makes_room: bool) -> Gauge:
    return Gauge(storage, "shares/a.json", torch.device("cpu"), "12345678", makes_room)


def test_without_a_gpu_nothing_is_measured_and_nothing_shared(tmp_path: Path) -> None:
    assert (
        sharing.read_peak_memory(torch.device("cpu")) is None and sharing.read_utilisation(torch.device("cpu")) is None
    )
    sharing.forget_peak(torch.device("cpu"))
    sharing.free_memory()
    gauge = gauge_of(Storage(tmp_path), makes_room=True)
    for _ in range(WARM_UP + sharing.MEASURED + 1):
        gauge()
    assert read_share(gauge.storage, gauge.path, []) == 1


@pytest.mark.parametrize("makes_room", [True, False])
def test_a_training_is_measured_after_its_first_steps_and_makes_room_if_others_wait(
    makes_room: bool, tiny_trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MEASURED", 5)
    monkeypatch.setattr(sharing, "read_peak_memory", lambda device: (8 * GB, 80 * GB))
    used = iter([0.1, 0.2, 0.3, 0.2, 0.2])
    monkeypatch.setattr(sharing, "read_utilisation", lambda device: next(used))
    gauge = gauge_of(Storage(tmp_path), makes_room)
    loop = train(tiny_trial, prepare(tiny_trial.data), Storage(tmp_path), "t", World(gauge=gauge))
    if makes_room:
        with pytest.raises(NeedsLess) as caught:
            list(loop)
        assert caught.value.share == 0.2 and gauge.steps == WARM_UP + 5
    else:
        assert list(loop)[-1].state == "finished" and gauge.steps == tiny_trial.training.steps
    noted = Storage(tmp_path).read_sealed("shares/a.json")
    assert noted
    [of_name] = [each for each in noted.values() if isinstance(each, dict)]
    assert of_name["share"] == 0.2 and of_name["use"] == pytest.approx(0.2) and of_name["said_by"] == "12345678"


def test_a_gpu_is_measured_for_two_seconds_from_when_it_has_done_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are only told to a GPU, and faster than it makes them: twenty may have been told before one is made."""
    now, waited = [100.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sharing, "forget_peak", lambda device: None)
    monkeypatch.setattr(sharing, "wait_for", lambda device: waited.append(now[0]))
    monkeypatch.setattr(sharing, "name_hardware", lambda device: H100)
    monkeypatch.setattr(sharing, "read_peak_memory", lambda device: (8 * GB, 80 * GB))
    monkeypatch.setattr(sharing, "read_utilisation", lambda device: 0.0 if now[0] < 101 else 0.6)
    gauge = Gauge(Storage(tmp_path), "shares/a.json", torch.device("cuda"), "12345678", makes_room=False)
    for _ in range(WARM_UP + 100):
        gauge()
        now[0] += 0.05  # twenty steps within a second
    assert waited == [pytest.approx(100 + 0.05 * (WARM_UP - 1))]
    noted = Storage(tmp_path).read_sealed("shares/a.json")
    assert noted and 40 <= len(gauge.used) <= 41 and 0.3 < noted[H100]["use"] < 0.6


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),  # a context, or the code of a kernel
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError("out of memory"), False),  # of the machine
    ],
)
def test_a_full_gpu_is_known_by_the_type_of_the_error_or_by_its_text(
    error: Exception, is_full: bool, tmp_path: Path
) -> None:
    assert sharing.is_out_of_memory(error) == is_full
    assert bool(report_resized(job(tmp_path, 0.25, ""), error)) == is_full


def test_a_block_whose_gpu_is_full_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    full, slept = [True, True, False], list[float]()

    def make(bench: Any, block: Any) -> dict[Any, str]:
        if full.pop(0):
            raise RuntimeError("CUDA error: out of memory")
        return {}

    monkeypatch.setattr(tasks, "make", make)
    monkeypatch.setattr(time, "sleep", slept.append)
    meter, block = Meter(torch.device("cpu")), Block("nll", "a", 0)
    assert tasks._make_with_room(None, block, meter) == ({}, 2)  # type: ignore[arg-type]
    assert slept == [*tasks.PAUSES_S[:2]] and meter.spent["nll"][0] == 1, "the attempts count once"
    full[:] = [True] * 9
    with pytest.raises(RuntimeError, match="out of memory"):
        tasks._make_with_room(None, block, meter)  # type: ignore[arg-type]
    assert len(full) == 9 - len(tasks.PAUSES_S) - 1


def job(storage: Path, gpus: float, share: str) -> dict[str, Any]:
    return {"storage": str(storage), "digest": "0" * 16, "gpus": gpus, "share": share}


def test_out_of_memory_beside_others_asks_for_twice_the_part_and_corrects_the_note(tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert report_resized(job(tmp_path, 1, "shares/a.json"), full) is None, "there is no more to be had"
    assert report_resized(job(tmp_path, 0.25, ""), RuntimeError("another")) is None
    result = report_resized(job(tmp_path, 0.25, ""), full)
    assert result and (result["state"], result["gpus"]) == (CROWDED, 0.5) and not (tmp_path / "shares").exists()
    result = report_resized(job(tmp_path, 0.5, "shares/a.json"), full)
    assert result and result["detail"] == "ran out of GPU memory beside others; goes on with a whole GPU"
    assert read_share(Storage(tmp_path), "shares/a.json", []) == 1
    result = report_resized(job(tmp_path, 1, "shares/a.json"), NeedsLess(0.25))
    assert result and (result["state"], result["gpus"]) == (MEASURED, 0.25)
    assert result["detail"] == "needs a quarter of a GPU, as its first steps show"


def test_a_trial_that_was_measured_and_starts_again_is_what_it_would_have_been(
    tiny_trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is measured nor the part of a GPU changes a weight."""
    monkeypatch.setattr(sharing, "MEASURED", 6)
    monkeypatch.setattr(sharing, "read_peak_memory", lambda device: (8 * GB, 80 * GB))
    digests = []
    for name, makes_room in (("whole", False), ("again", True)):
        storage = Storage(tmp_path / name)
        data = prepare(tiny_trial.data)
        try:
            list(train(tiny_trial, data, storage, "t", World(gauge=gauge_of(storage, makes_room))))
        except NeedsLess:
            list(train(tiny_trial, data, storage, "t", World(gpus=0.25)))
        status = storage.read_sealed("t/status.json")
        assert status and status["state"] == "finished"
        digests.append(status["checkpoint"])
    assert digests[0] == digests[1]


def test_the_time_of_a_trial_is_counted_by_the_part_that_it_held() -> None:
    happened: list[dict[str, Any]] = [
        {"time_ms": 0, "event": "cluster", "cpus": 4.0, "gpus": 1.0},
        {"time_ms": 0, "event": "began", "trial": "a", "cpus": 1, "gpus": 1},
        {"time_ms": 10_000, "event": "resized", "trial": "a"},
        {"time_ms": 20_000, "event": "began", "trial": "a", "cpus": 1, "gpus": 0.25},
        {"time_ms": 60_000, "event": "trained", "trial": "a"},
    ]
    assert measure_use(happened).busy == 10 + 40 * 0.25
