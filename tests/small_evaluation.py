"""A small evaluation for tests: noise of 4 x 4 pixels, a tiny network with random weights, blocks of a few rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    ModelConfig,
    NLLConfig,
    SamplerConfig,
    ScheduleConfig,
)
from workers.data.dataset import Dataset
from workers.diffusion.process import Process
from workers.evaluation import blocks
from workers.evaluation.blocks import Block, Images
from workers.evaluation.features import Classifier
from workers.evaluation.make import Bench, make
from workers.evaluation.summary import summarise
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.seals import seal_bytes
from workers.storage import Storage

T, TRAIN, HELD_OUT, LEVELS, SIDE, D = 23, 40, 10, 17, 4, 6
IMAGES = Images("d1", TRAIN, HELD_OUT, LEVELS)
CPU = torch.device("cpu")
CONFIG = make_unet_config(
    ModelConfig(channels=4, multipliers=(1,), blocks=1, attention=(), dropout=0.0), image_channels=1, resolution=SIDE
)
PROCESS = Process.of(DiffusionConfig(T=T, schedule=ScheduleConfig(beta_start=0.02, beta_end=0.4)))
PIXELS = np.random.RandomState(0).randint(0, LEVELS, (TRAIN + HELD_OUT, SIDE, SIDE, 1)).astype(np.uint8)
DATASET = Dataset("d1", "noise", LEVELS, (SIDE, SIDE, 1), PIXELS[HELD_OUT:], PIXELS[:HELD_OUT], None, None)
SPACE = Classifier(
    np.random.RandomState(1).randn(SIDE * SIDE, D), np.random.RandomState(2).randn(D), LEVELS, accuracy=0.0
)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 images x 10 timesteps, 10 samples and 16 real images; none of the splits fills its last one."""
    torch.set_num_threads(1)
    for name, value in {"IMAGES": 4, "TIMES": 10, "SAMPLES": 10, "REAL": 16}.items():
        monkeypatch.setattr(blocks, name, value)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One storage for all tests that only add to it: a block is made by the first that asks for it."""
    return tmp_path_factory.mktemp("runs")


def measurement(images: Any = "all", timesteps: Any = "all", seed: int = 0, **fid: Any) -> Measurement:
    nll = NLLConfig(images=images, timesteps=timesteps, proposal=fid.pop("proposal", "log_uniform"))
    later = {name: fid.pop(name) for name in ("ode_nll", "variance", "precision") if name in fid}
    fid = {"samples": 15, "sampler": SamplerConfig(kind="ddim", steps=3), **fid}
    evaluation = EvaluationConfig(nll=nll, fid=FIDConfig(**fid), **later)
    return Measurement(seed=seed, data=DataConfig(source="digits"), T=T, ema=0.99, evaluation=evaluation)


def checkpoint_in(storage: Storage, weights: str = "a") -> manifest.Checkpoint:
    unet = UNet(CONFIG, make_generator("unet"))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=make_generator("conv_out", weights))
    folder = f"trials/{weights}/checkpoints"
    found = manifest.find_newest(storage, folder)
    return found or checkpoints.save(
        storage, folder, checkpoints.Snapshot(step=1, unet_config=CONFIG, process=PROCESS, ema=unet.state_dict())
    )


def bench(root: Path, m: Measurement, weights: str = "a") -> Bench:
    """Of a storage where the feature space is there already, as the data set has no labels to train it."""
    storage = Storage(root)
    if not storage.exists("references/d1-classifier.npz"):
        path = "references/d1-classifier.npz"
        storage.write(path, seal_bytes(SPACE.to_bytes(), path))
    return Bench(storage, m, DATASET, checkpoint_in(storage, weights), CPU)


def blocks_of(b: Bench) -> list[Block]:
    return blocks.list_blocks(b.m, b.checkpoint.digest, IMAGES)


def make_all(b: Bench, wanted: Iterable[Block]) -> None:
    for block in wanted:
        make_all(b, block.needs)
        make(b, block)


def summary_of(b: Bench) -> dict[str, Any]:
    """The summary of blocks that are there."""
    space = b.space if b.m.evaluation.fid else None
    return summarise(b.storage, b.m, DATASET, PROCESS, b.checkpoint.digest, space=space)


def evaluated(root: Path, m: Measurement, weights: str = "a") -> dict[str, Any]:
    """The summary, after the blocks that are not there are made."""
    b = bench(root, m, weights)
    make_all(b, blocks_of(b))
    return summary_of(b)
