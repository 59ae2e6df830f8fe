"""The training loop in plain Python: what it is a function of, and that stopping it changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from workers.config import (
    DataConfig,
    DiffusionConfig,
    LossConfig,
    ModelConfig,
    ScheduleConfig,
    TrainingConfig,
    Trial,
)
from workers.data.dataset import prepare
from workers.diffusion.timesteps import KEPT
from workers.identity import compute_trial_id
from workers.journal import read_points
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.pausing import LOOK_S, choose_interval
from workers.pulse import Pulse
from workers.seals import seal_lines
from workers.storage import Storage
from workers.training import train
from workers.world import World

TRIAL = Trial(
    data=DataConfig(source="digits"),
    model=ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1),
    diffusion=DiffusionConfig(T=16, schedule=ScheduleConfig(scale="per_1000", beta_end=0.01)),
    training=TrainingConfig(
        steps=12, batch_size=32, lr=2e-3, ema=0.9, precision="float32", validate_every=6, checkpoint_every=3
    ),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(storage: Storage, trial: Trial = TRIAL) -> str:
    """Trains to the end; gives the digest of the final weights."""
    for _ in train(trial, prepare(trial.data), storage, "trials/a"):
        pass
    newest = manifest.find_newest(storage, "trials/a/checkpoints")
    assert newest and newest.step == trial.training.steps
    return newest.digest


def points(storage: Storage) -> list[dict]:
    return [{k: v for k, v in point.items() if k != "time_ms"} for point in read_points(storage, "trials/a")]


def without_rates(found: list[dict]) -> list[dict]:
    for point in found:
        point.get("metrics", {}).pop("train/images_per_s", None)
    return found


def test_yields_at_step_0_at_each_validation_and_at_the_end(tmp_path: Path) -> None:
    progress = list(train(TRIAL, prepare(TRIAL.data), Storage(tmp_path), "trials/a"))
    assert [p.step for p in progress] == [0, 6, 12]
    assert [p.state for p in progress] == ["running", "running", "finished"]
    status = Storage(tmp_path).read_sealed("trials/a/status.json")
    assert status and status["state"] == "finished"
    newest = manifest.find_newest(Storage(tmp_path), "trials/a/checkpoints")
    assert newest and status["checkpoint"] == newest.digest
    images = [p["path"] for p in points(Storage(tmp_path)) if "image" in p]
    assert len(images) == 3 and all((tmp_path / path).read_bytes()[:4] == b"\x89PNG" for path in images)


def test_training_lowers_the_bound(tmp_path: Path) -> None:
    longer = TRIAL.training.model_copy(update={"steps": 60, "validate_every": 60, "checkpoint_every": 60})
    trial = TRIAL.model_copy(update={"training": longer})
    first, last = train(trial, prepare(trial.data), Storage(tmp_path), "trials/a")
    assert last.metrics["valid/nll_bpd"] < first.metrics["valid/nll_bpd"] - 0.2


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_loop_that_was_stopped_and_resumed_ends_in_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    whole, parts = Storage(tmp_path / "whole"), Storage(tmp_path / "parts")
    expected = trained(whole)
    loop: Any = train(TRIAL, prepare(TRIAL.data), parts, "trials/a")
    for _ in range(stop_after):
        next(loop)
    loop.close()
    assert trained(parts) == expected
    assert without_rates(points(parts)) == without_rates(points(whole))


def paused_after(storage: Storage, steps: int, trial: Trial) -> list[str]:
    """Trains until the driver asks for a pause in the midst of that step; gives the states that the host hears."""
    pulse = Pulse()

    def gauge() -> None:
        pulse.is_asked_to_pause = pulse.steps == steps

    world = World(pulse=pulse, gauge=gauge)
    return [progress.state for progress in train(trial, prepare(trial.data), storage, "trials/a", world)]


@pytest.mark.parametrize("steps", [1, 6, 11, 12, 23])
def test_a_trial_that_pauses_goes_on_in_the_same_bits_and_leaves_no_point_out(tmp_path: Path, steps: int) -> None:
    """Between checkpoints and between points of the journal (each second step), at a validation, and near the end."""
    longer = TRIAL.training.model_copy(update={"steps": 24, "validate_every": 24, "checkpoint_every": 100})
    trial = TRIAL.model_copy(update={"training": longer})
    whole, parts = Storage(tmp_path / "whole"), Storage(tmp_path / "parts")
    expected = trained(whole, trial)
    assert paused_after(parts, steps, trial) == ["running", "paused"]
    status = parts.read_sealed("trials/a/status.json")
    assert status and (status["state"], status["step"]) == ("paused", steps)
    assert parts.list("trials/a/checkpoints") == [f"step-{steps:08}"]
    assert trained(parts, trial) == expected
    assert without_rates(points(parts)) == without_rates(points(whole))
    assert parts.list("trials/a/checkpoints") == ["step-00000024"]


def _paused_worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    trial = varied(**VARIED[0], workers=size)
    for turn, until in enumerate((5, 1000)):
        store = FileStore(f"{folder}/store-{turn}", size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        pulse = Pulse()

        def gauge(pulse: Pulse = pulse, until: int = until) -> None:
            pulse.is_asked_to_pause = rank == 1 and pulse.steps >= until

        world = World(rank, size, pulse=pulse, gauge=gauge)
        *_, last = train(trial, prepare(trial.data), Storage(f"{folder}/parts"), "trials/a", world)
        if rank == 0:
            Path(f"{folder}/turn-{turn}").write_text(f"{last.state} {last.step}")
        torch.distributed.destroy_process_group()


def test_workers_pause_after_the_same_step_whichever_hears_of_it_first(tmp_path: Path) -> None:
    spawn(_worker, (2, str(tmp_path), VARIED[0]), nprocs=2)
    spawn(_paused_worker, (2, str(tmp_path)), nprocs=2)
    state, step = (tmp_path / "turn-0").read_text().split()
    assert state == "paused" and 5 <= int(step) < 12
    assert (tmp_path / "turn-1").read_text() == "finished 12"
    whole, parts = (manifest.find_newest(Storage(tmp_path / name), "trials/a/checkpoints") for name in ("two", "parts"))
    assert whole and parts and whole.digest == parts.digest


def test_workers_look_the_more_rarely_the_faster_their_steps_are() -> None:
    assert choose_interval(1, LOOK_S / 100) == 2 and choose_interval(64, LOOK_S / 2) == 128
    assert choose_interval(100, 4 * LOOK_S) == 25 and choose_interval(1, 1e9) == 1


def to(steps: int, trial: Trial = TRIAL) -> Trial:
    return trial.model_copy(update={"training": trial.training.model_copy(update={"steps": steps})})


def digest_at(storage: Storage, step: int) -> str | None:
    found = manifest.find_at_step(storage, "trials/a/checkpoints", step)
    return found.digest if found else None


def steps_of(storage: Storage, trial: Trial, also_keep: Sequence[int] = ()) -> list[tuple[int, str]]:
    loop = train(trial, prepare(trial.data), storage, "trials/a", also_keep=also_keep)
    return [(progress.step, progress.state) for progress in loop]


def test_a_finished_trial_goes_on_to_more_steps_and_ends_in_the_bits_of_one_that_was_asked_for_so(
    tmp_path: Path,
) -> None:
    whole, longer = Storage(tmp_path / "whole"), Storage(tmp_path / "longer")
    expected = trained(whole, to(12))
    assert steps_of(longer, to(5)) == [(0, "running"), (5, "finished")]
    assert steps_of(longer, to(12), also_keep=[5]) == [(5, "running"), (6, "running"), (12, "finished")]
    assert digest_at(longer, 12) == expected
    assert digest_at(longer, 5) == trained(Storage(tmp_path / "short"), to(5))
    status = longer.read_sealed("trials/a/status.json")
    assert status and (status["state"], status["step"]) == ("finished", 12)


def test_a_trial_is_trained_once_for_several_steps_and_keeps_their_checkpoints(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "all")
    reached = steps_of(storage, to(12), also_keep=[4, 7])
    assert reached == [(step, "running") for step in (0, 4, 6, 7)] + [(12, "finished")]
    assert storage.list("trials/a/checkpoints") == [manifest.name_step(step) for step in (4, 7, 12)]
    for step in (4, 7, 12):
        assert digest_at(storage, step) == trained(Storage(tmp_path / f"{step}"), to(step))


def test_a_checkpoint_of_an_earlier_step_is_made_again_and_leaves_what_is_there(tmp_path: Path) -> None:
    """From the nearest one before it; the trial's status, journal and later checkpoints stay."""
    storage = Storage(tmp_path)
    steps_of(storage, to(12), also_keep=[4])
    before, status, then = points(storage), storage.read_sealed("trials/a/status.json"), digest_at(storage, 12)
    assert steps_of(storage, to(7)) == [(6, "running"), (7, "finished")]
    assert digest_at(storage, 7) and digest_at(storage, 12) == then and digest_at(storage, 4)
    assert storage.read_sealed("trials/a/status.json") == status
    assert [p for p in without_rates(points(storage)) if p["step"] != 7] == [
        p for p in without_rates(before) if p["step"] != 7
    ]
    assert steps_of(storage, to(12), also_keep=[4, 7]) == [(12, "finished")]


def test_the_steps_of_a_rate_that_falls_to_the_last_one_are_in_the_id() -> None:
    decaying = TRIAL.model_copy(update={"training": TRIAL.training.model_copy(update={"decay": "cosine"})})
    assert compute_trial_id(to(12, decaying), "d") != compute_trial_id(to(5, decaying), "d")
    assert compute_trial_id(to(12), "d") == compute_trial_id(to(5), "d")


VARIED: list[dict[str, Any]] = [
    {"timesteps": "importance", "T": 5, "prediction": "v", "variance": "learned_range", "objective": "kl"},
    {"timesteps": "stratified", "T": 50, "prediction": "x_0", "variance": "learned", "objective": "hybrid"},
    {"timesteps": "antithetic", "T": 50, "prediction": "mu", "variance": "fixed_small", "objective": "mse"},
]


def varied(timesteps: str, T: int, prediction: Any, variance: Any, objective: Any, workers: int = 1) -> Trial:
    """T = 5 has KEPT losses of each t after some steps, so that importance sampling is under way."""
    schedule = ScheduleConfig(beta_end=0.5) if T == 5 else TRIAL.diffusion.schedule
    diffusion = DiffusionConfig(T=T, schedule=schedule, prediction=prediction, variance=variance)
    training = TRIAL.training.model_copy(update={"timesteps": timesteps, "workers": workers})
    loss = LossConfig(objective=objective)
    return TRIAL.model_copy(update={"diffusion": diffusion, "training": training, "loss": loss})


@pytest.mark.parametrize("settings", VARIED, ids=lambda s: s["timesteps"])
def test_every_choice_resumes_in_the_same_bits_and_is_measured(tmp_path: Path, settings: dict) -> None:
    """The losses that importance sampling remembers are part of the checkpoint."""
    trial, whole, parts = varied(**settings), Storage(tmp_path / "whole"), Storage(tmp_path / "parts")
    expected = trained(whole, trial)
    loop: Any = train(trial, prepare(trial.data), parts, "trials/a")
    assert [next(loop).step, next(loop).step] == [0, 6]
    loop.close()
    assert trained(parts, trial) == expected
    assert without_rates(points(parts)) == without_rates(points(whole))
    newest = manifest.find_newest(whole, "trials/a/checkpoints")
    assert newest
    _, state, _ = checkpoints.load_state(newest)
    assert ("history.seen" in state) == (settings["timesteps"] == "importance")
    if settings["timesteps"] == "importance":
        assert int(state["history.seen"].sum()) == 12 * 32 and int(state["history.seen"].min()) >= KEPT
    model, process = checkpoints.load(newest)
    found = checkpoints.describe(newest)
    assert (model.prediction, process.variance) == (settings["prediction"], settings["variance"])
    assert (found.prediction, found.variance) == (settings["prediction"], settings["variance"])


def _worker(rank: int, size: int, folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    trial = varied(**settings, workers=size)
    for _ in train(trial, prepare(trial.data), Storage(f"{folder}/two"), "trials/a", World(rank, size)):
        pass
    torch.distributed.destroy_process_group()


def test_two_workers_share_what_importance_sampling_remembers(tmp_path: Path) -> None:
    """Losses, and so p_t and the t that are drawn, are those of one worker up to rounding."""
    trained(Storage(tmp_path / "one"), varied(**VARIED[0]))
    spawn(_worker, (2, str(tmp_path), VARIED[0]), nprocs=2)
    one, two = (without_rates(points(Storage(tmp_path / name))) for name in ("one", "two"))
    assert len(one) == len(two) > 12
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        assert a.get("metrics", {}) == pytest.approx(b.get("metrics", {}), rel=1e-3, abs=1e-6)
    histories = []
    for name in ("one", "two"):
        newest = manifest.find_newest(Storage(tmp_path / name), "trials/a/checkpoints")
        assert newest
        histories.append(checkpoints.load_state(newest)[1])
    assert torch.equal(histories[0]["history.seen"], histories[1]["history.seen"])
    torch.testing.assert_close(histories[0]["history.losses"], histories[1]["history.losses"], rtol=1e-2, atol=1e-4)


def test_a_kill_between_checkpoint_and_validation_leaves_no_point_out_and_none_twice(tmp_path: Path) -> None:
    whole, cut = Storage(tmp_path / "whole"), Storage(tmp_path / "cut")
    expected = trained(whole)
    trained(cut)
    # As if killed at step 9: the journal of step 6 stands, the checkpoint of step 12 was never written.
    for name in cut.list("trials/a/checkpoints"):
        cut.delete(f"trials/a/checkpoints/{name}")
    kept = [point for point in read_points(cut, "trials/a") if point["step"] <= 6]
    cut.write("trials/a/journal.jsonl", seal_lines(kept, "trials/a/journal.jsonl"))
    assert trained(cut) == expected
    assert without_rates(points(cut)) == without_rates(points(whole))


def test_another_seed_or_weighting_is_another_result(tmp_path: Path) -> None:
    weighting = TRIAL.loss.model_copy(update={"weighting": "vlb"})
    others: list[dict[str, Any]] = [{}, {"seed": 1}, {"loss": weighting}]
    digests = [trained(Storage(tmp_path / str(i)), TRIAL.model_copy(update=update)) for i, update in enumerate(others)]
    assert len(set(digests)) == 3


def test_a_loss_that_is_not_finite_ends_the_trial_as_a_result(tmp_path: Path) -> None:
    wild = TRIAL.model_copy(update={"training": TRIAL.training.model_copy(update={"lr": 1e30})})
    *_, last = train(wild, prepare(wild.data), Storage(tmp_path), "trials/a")
    assert last.state == "diverged" and "diverged by step" in last.detail
    status = Storage(tmp_path).read_sealed("trials/a/status.json")
    assert status and status["state"] == "diverged"


@pytest.mark.parametrize("n", [2, 3, 5, 90])
def test_a_data_set_smaller_than_a_batch_trains_and_resumes_in_the_same_bits(tmp_path: Path, n: int) -> None:
    for row, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/{row:02}.png")
    training = TRIAL.training.model_copy(update={"batch_size": 128, "steps": 4, "validate_every": 2})
    trial = TRIAL.model_copy(update={"data": DataConfig(source=str(tmp_path / "images")), "training": training})
    whole, parts = Storage(tmp_path / "whole"), Storage(tmp_path / "parts")
    expected = trained(whole, trial)
    loop: Any = train(trial, prepare(trial.data), parts, "trials/a")
    next(loop), next(loop)
    loop.close()
    assert trained(parts, trial) == expected
    assert without_rates(points(parts)) == without_rates(points(whole))
    assert all(np.isfinite(value) for point in points(whole) for value in point.get("metrics", {}).values())


def test_averages_of_other_lengths_are_kept_beside_the_trial_s_own(tmp_path: Path) -> None:
    """0 is the weights as they are; the trial's own decay gives its own average. A resumed run keeps them."""
    averages = TRIAL.training.model_copy(update={"averages": (0.0, 0.9, 0.5)})
    trial, dataset = TRIAL.model_copy(update={"training": averages}), prepare(TRIAL.data)
    whole = trained(Storage(tmp_path / "whole"), trial)
    loop: Any = train(trial, dataset, Storage(tmp_path / "cut"), "trials/a")
    assert [next(loop).step, next(loop).step] == [0, 6]
    loop.close()
    assert trained(Storage(tmp_path / "cut"), trial) == whole == trained(Storage(tmp_path / "plain"))

    def newest(name: str) -> manifest.Checkpoint:
        found = manifest.find_newest(Storage(tmp_path / name), "trials/a/checkpoints")
        assert found
        return found

    ema, state, _ = checkpoints.load_state(newest("whole"))
    kept = checkpoints.load_averages(newest("whole"), (0.0, 0.9, 0.5))
    for name in ema:
        assert torch.equal(kept[0.0][name], state[f"weights.{name}"]) and torch.equal(kept[0.9][name], ema[name])
    assert any((kept[0.5][name] != ema[name]).any() for name in ema)
    assert newest("whole").sums != newest("plain").sums
    for decay, of_plain in ((None, True), (0.9, True), (0.5, False), (0.0, False)):
        one, other = (manifest.choose_average(newest(name), decay) for name in ("whole", "cut"))
        assert one.digest == other.digest and (one.digest == newest("plain").digest) == of_plain
        model, _ = checkpoints.load(one)
        weights = ema if decay is None else kept[decay]
        assert all(torch.equal(p, weights[name]) for name, p in model.network.state_dict().items())
    with pytest.raises(manifest.CheckpointError, match=r"no average of evaluation\.ema = 0\.5; it has none"):
        manifest.choose_average(newest("plain"), 0.5)
