"""Blocks of an evaluation: which there are, that they stay, and that their order and makers do not matter."""

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from workers import checkpoint as checkpoints
from workers import evaluation
from workers.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FIDConfig,
    ModelConfig,
    NLLConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
    Trial,
)
from workers.data import Dataset
from workers.diffusion.process import Process
from workers.evaluation import Block, Model, nll_blocks, run_block, sample_blocks, summarise, summary_path
from workers.frechet import Moments, Reference, frechet_distance
from workers.likelihood import Ledger, bound, squared_norms
from workers.noise import generator
from workers.pixels import to_model
from workers.storage import Storage
from workers.unet import UNet
from workers.unet_config import unet_config

T, HELD_OUT, LEVELS, SIDE = 23, 10, 17, 4
CONFIG = unet_config(
    ModelConfig(channels=4, multipliers=(1,), blocks=1, attention=(), dropout=0.0), image_channels=1, resolution=SIDE
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 images x 10 timesteps and of 10 samples, which 10 images, 23 timesteps and 15 samples do not fill."""
    torch.set_num_threads(1)
    for name, value in {"IMAGES": 4, "TIMES": 10, "SAMPLES": 10}.items():
        monkeypatch.setattr(evaluation, name, value)


def trial(
    images: Any = "all", timesteps: Any = "all", samples: int = 15, seed: int = 0, sampler: SamplerConfig | None = None
) -> Trial:
    return Trial(
        seed=seed,
        data=DataConfig(source="digits"),
        diffusion=DiffusionConfig(T=T, schedule=ScheduleConfig(beta_start=0.02, beta_end=0.4)),
        training=TrainingConfig(steps=1),
        evaluation=EvaluationConfig(
            nll=NLLConfig(images=images, timesteps=timesteps),
            fid=FIDConfig(samples=samples, sampler=sampler or SamplerConfig(kind="ddim", steps=3)),
        ),
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    pixels = np.random.RandomState(0).randint(0, LEVELS, (40 + HELD_OUT, SIDE, SIDE, 1)).astype(np.uint8)
    return Dataset("d1", "noise", LEVELS, (SIDE, SIDE, 1), pixels[HELD_OUT:], pixels[:HELD_OUT], None, None)


@pytest.fixture(scope="module")
def reference(dataset) -> Reference:
    random = np.random.RandomState(1)
    space = Reference(
        random.randn(SIDE * SIDE, 6), random.randn(6), LEVELS, 0.0, Moments(0, np.zeros(6), np.zeros((6, 6)))
    )
    return Reference(space.weights, space.bias, LEVELS, 0.0, Moments.of(space.features(dataset.train)))


def checkpoint_in(storage: Storage) -> checkpoints.Checkpoint:
    unet = UNet(CONFIG, generator("unet"))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=generator("conv_out"))
    process = Process.of(trial().diffusion)
    return checkpoints.save(storage, "trials/a/checkpoints", 1, CONFIG, process, unet.state_dict(), {}, {})


def loaded(storage: Storage, checkpoint: checkpoints.Checkpoint) -> Model:
    return Model(*checkpoints.load(checkpoint), torch.device("cpu"))


def blocks_of(t: Trial) -> list[Block]:
    return nll_blocks(t, "d1", HELD_OUT) + sample_blocks(t, "d1")


def evaluated(root: Any, dataset: Dataset, reference: Reference, t: Trial) -> tuple[dict[str, Any], Storage, str]:
    """(summary, storage, checkpoint's digest) after all blocks of `t`, made in order."""
    storage = Storage(root)
    checkpoint = checkpoint_in(storage)
    model = loaded(storage, checkpoint)
    for block in blocks_of(t):
        run_block(storage, t, dataset, model, reference, checkpoint.digest, block)
    return summarise(storage, t, dataset, model.process, reference, checkpoint.digest), storage, checkpoint.digest


def table(storage: Storage, block: Block, digest: str) -> dict[str, np.ndarray]:
    columns = pq.read_table(io.BytesIO(storage.read(block.path(digest))))
    return {name: columns[name].to_numpy() for name in columns.column_names}


def ledger_of(storage: Storage, t: Trial, digest: str) -> Ledger:
    return Ledger.join([Ledger(**table(storage, block, digest)) for block in nll_blocks(t, "d1", HELD_OUT)])


# ---- Which blocks there are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 4, 7, 8, 10, 99, "all"])
def test_more_images_only_add_blocks(images):
    some, all_ = nll_blocks(trial(images), "d1", HELD_OUT), nll_blocks(trial(), "d1", HELD_OUT)
    n = HELD_OUT if images == "all" else min(images, HELD_OUT)
    assert some == all_[: -(-n // 4) * 3]  # 3 blocks of timesteps for each 4 images
    assert len({block.path("c") for block in all_}) == len(all_) == 9


def test_more_samples_only_add_blocks():
    few, many = sample_blocks(trial(samples=15), "d1"), sample_blocks(trial(samples=31), "d1")
    assert (len(few), len(many)) == (2, 4) and few == many[:2]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"timesteps": 5}, {"sampler": SamplerConfig(kind="ddim", steps=4)}, {"sampler": SamplerConfig()}],
)
def test_what_is_measured_otherwise_lies_elsewhere(other):
    """And what a setting does not touch stays where it is: the sampler leaves the NLL's blocks alone."""
    here, there = trial(), trial(**other)
    same_nll = nll_blocks(here, "d1", HELD_OUT)[0] == nll_blocks(there, "d1", HELD_OUT)[0]
    same_samples = sample_blocks(here, "d1")[0] == sample_blocks(there, "d1")[0]
    assert (same_nll, same_samples) == ("sampler" in other, "timesteps" in other)
    assert summary_path(here, "d1", "c") != summary_path(there, "d1", "c")


def test_data_and_checkpoint_are_in_the_address():
    assert not {b.path("c") for b in nll_blocks(trial(), "d1", HELD_OUT) + sample_blocks(trial(), "d1")} & {
        b.path("c") for b in nll_blocks(trial(), "d2", HELD_OUT) + sample_blocks(trial(), "d2")
    }
    block = sample_blocks(trial(), "d1")[1]
    assert block.path("c") == f"evaluations/c/{block.suite}/block-00001.parquet" != block.path("d")


@pytest.mark.parametrize("timesteps", [T, T + 1, 10**6])
def test_as_many_timesteps_as_there_are_is_all_of_them(timesteps):
    assert nll_blocks(trial(timesteps=timesteps), "d1", HELD_OUT) == nll_blocks(trial(), "d1", HELD_OUT)


def test_nothing_asked_is_no_blocks():
    nothing = trial().model_copy(update={"evaluation": EvaluationConfig(nll=None, fid=None)})
    assert blocks_of(nothing) == []


# ---- What they hold --------------------------------------------------------------------------------------------


def test_the_blocks_hold_each_pair_of_image_and_timestep_once(tmp_path, dataset, reference):
    _, storage, digest = evaluated(tmp_path, dataset, reference, trial())
    ledger = ledger_of(storage, trial(), digest)
    assert list(zip(ledger.image, ledger.t, strict=True)) == [(i, t) for i in range(HELD_OUT) for t in range(1, T + 1)]
    assert (ledger.weight == 1).all() and ((ledger.decoder_nats > 0) == (ledger.t == 1)).all()
    sizes = [len(table(storage, block, digest)["t"]) for block in nll_blocks(trial(), "d1", HELD_OUT)]
    assert sizes == [40, 40, 12, 40, 40, 12, 20, 20, 6]


def test_sampled_timesteps_are_the_first_and_one_a_stratum(tmp_path, dataset, reference):
    summary, storage, digest = evaluated(tmp_path, dataset, reference, trial(timesteps=5))
    ledger = ledger_of(storage, trial(timesteps=5), digest)
    assert (np.bincount(ledger.image) == 5).all() and np.count_nonzero(ledger.t == 1) == HELD_OUT
    assert summary["nll_by_t"] is None and summary["passport"]["nll"]["timesteps"] == 5
    exact, *_ = evaluated(tmp_path, dataset, reference, trial())
    found, expected = summary["metrics"], exact["metrics"]
    assert found["eval/nll_prior_bpd"] == expected["eval/nll_prior_bpd"]
    assert found["eval/nll_decoder_bpd"] == pytest.approx(expected["eval/nll_decoder_bpd"], rel=0.2)


def test_samples_are_quantised_before_their_features_are_taken(tmp_path, dataset, reference):
    _, storage, digest = evaluated(tmp_path, dataset, reference, trial())
    samples, images = [], []
    for block in sample_blocks(trial(), "d1"):
        rows = table(storage, block, digest)
        pixels = np.stack([np.frombuffer(row, np.uint8) for row in rows["image"]]).reshape(-1, SIDE, SIDE, 1)
        assert pixels.max() < LEVELS and len(pixels) == 10
        np.testing.assert_array_equal(np.stack(rows["features"]), reference.features(pixels))
        samples.extend(rows["sample"])
        images.extend(rows["image"])
    assert samples == list(range(20)) and len(set(images)) == 20


# ---- Running them ----------------------------------------------------------------------------------------------


def test_a_block_that_is_there_is_not_made_again(tmp_path, dataset, reference):
    """With no model at hand the second call could not; and no byte of the first is touched."""
    _, storage, digest = evaluated(tmp_path, dataset, reference, trial())
    before = {block: storage.read(block.path(digest)) for block in blocks_of(trial())}
    for block in blocks_of(trial()):
        run_block(storage, trial(), dataset, None, None, digest, block)
    assert {block: storage.read(block.path(digest)) for block in blocks_of(trial())} == before


@pytest.mark.parametrize("timesteps", ["all", 5])
def test_order_and_maker_of_the_blocks_change_nothing(tmp_path, dataset, reference, timesteps):
    """In reverse, and each by a process of its own as far as objects go: a network loaded anew. Bit for bit."""
    t = trial(timesteps=timesteps)
    summary, first, digest = evaluated(tmp_path / "a", dataset, reference, t)
    second = Storage(tmp_path / "b")
    checkpoint = checkpoint_in(second)
    assert checkpoint.digest == digest
    for block in reversed(blocks_of(t)):
        again = Reference.from_bytes(reference.to_bytes())
        run_block(second, t, dataset, loaded(second, checkpoint), again, digest, block)
        assert second.read(block.path(digest)) == first.read(block.path(digest))
    _, process = checkpoints.load(checkpoint)
    assert summarise(second, t, dataset, process, reference, digest) == summary


def test_asking_for_more_later_is_asking_for_it_at_once(tmp_path, dataset, reference):
    small = trial(images=3, samples=5)
    evaluated(tmp_path / "a", dataset, reference, small)
    grown, *_ = evaluated(tmp_path / "a", dataset, reference, trial())
    assert grown == evaluated(tmp_path / "b", dataset, reference, trial())[0]


def test_of_a_block_partly_asked_for_the_rest_is_cut(tmp_path, dataset, reference):
    t = trial(images=7, samples=13)
    summary, storage, digest = evaluated(tmp_path, dataset, reference, t)
    ledger = ledger_of(storage, t, digest)
    assert ledger.image.max() == 7  # the second block holds images 4..7
    x_0 = to_model(torch.from_numpy(dataset.held_out[:7]), LEVELS)
    kept = Ledger(*(column[ledger.image < 7] for column in vars(ledger).values()))
    result = bound(Process.of(t.diffusion), kept, squared_norms(x_0), SIDE * SIDE)
    metrics = summary["metrics"]
    assert metrics["eval/nll_bpd"] == result.mean and metrics["eval/nll_bpd_se"] == result.standard_error
    features = np.concatenate([np.stack(table(storage, b, digest)["features"]) for b in sample_blocks(t, "d1")])
    distance = frechet_distance(Moments.of(features[:13]), reference.moments)
    assert metrics["eval/fd_classifier"] == pytest.approx(distance, rel=1e-9)
    assert distance != pytest.approx(frechet_distance(Moments.of(features), reference.moments), rel=1e-3)
    assert (summary["passport"]["nll"]["images"], summary["passport"]["fd"]["samples"]) == (7, 13)


def test_the_parts_and_the_terms_by_t_sum_to_the_bound(tmp_path, dataset, reference):
    summary, *_ = evaluated(tmp_path, dataset, reference, trial())
    metrics = summary["metrics"]
    parts = [metrics[f"eval/nll_{part}_bpd"] for part in ("prior", "diffusion", "decoder")]
    assert sum(parts) == pytest.approx(metrics["eval/nll_bpd"], rel=1e-12)
    assert len(summary["nll_by_t"]) == T + 1  # L_0, ..., L_T
    assert sum(summary["nll_by_t"]) == pytest.approx(metrics["eval/nll_bpd"], rel=1e-12)
    assert summary["nll_by_t"][0] == pytest.approx(metrics["eval/nll_decoder_bpd"], rel=1e-12)
    assert summary["nll_by_t"][-1] == metrics["eval/nll_prior_bpd"]


def test_a_missing_block_is_an_error(tmp_path, dataset, reference):
    _, storage, digest = evaluated(tmp_path, dataset, reference, trial())
    storage.delete(blocks_of(trial())[4].path(digest))
    with pytest.raises(FileNotFoundError):
        summarise(storage, trial(), dataset, Process.of(trial().diffusion), reference, digest)
