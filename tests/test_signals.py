"""Signals of one dimension and volumes: how arrays of them are read, folded, trained on and refused."""

import math
from pathlib import Path
from typing import Any

import gaussian_pixels
import numpy as np
import pytest
import torch
from experiment_files import content
from image_files import fails, write_images

from orchestrator.experiment.load import open_code, parse
from orchestrator.experiment.preflight import check_trial
from orchestrator.experiment.records import Experiment
from workers.config import DataConfig, Measurement
from workers.data.dataset import prepare
from workers.data.pixels import draw_grid
from workers.data.sources import describe, describe_source
from workers.evaluation.blocks import Images, list_nll_blocks, list_sample_blocks
from workers.evaluation.make import Bench, make, read_block
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.sides import fold
from workers.storage import Storage
from workers.training import train

one_thread = gaussian_pixels.one_thread
RANDOM = np.random.RandomState(5)
SIDES: dict[int, tuple[int, ...]] = {1: (12,), 3: (3, 4, 2)}
# A network of signals and of volumes, which is told by what it was built for.
NETWORK = """
import torch
from torch import nn
from workers.kinds import NetworkEntry

class Convolutions(nn.Module):
    def __init__(self, settings, of):
        super().__init__()
        self.sides, kind = of.sides, {1: nn.Conv1d, 3: nn.Conv3d}[len(of.sides)]
        self.first, self.last = kind(of.channels, 8, 3, padding=1), kind(8, of.outputs, 3, padding=1)

    def forward(self, x, t):
        assert x.shape[2:] == self.sides, x.shape
        return self.last(torch.relu(self.first(x) + t.reshape(-1, *[1] * (x.dim() - 1)).float() / 50))

class Short(Convolutions):
    def forward(self, x, t):
        return super().forward(x, t)[..., 1:]

CONVOLUTIONS = NetworkEntry(function=Convolutions, about="two convolutions")
SHORT = NetworkEntry(function=Short, about="one that loses a value")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def save(path: Path, values: np.ndarray, dimensions: int) -> DataConfig:
    np.save(path, values)
    return DataConfig.model_validate({"source": str(path), "dimensions": dimensions})


def draw(dimensions: int, channels: int = 2) -> np.ndarray:
    return RANDOM.randint(0, 256, (30, *SIDES[dimensions], channels)).astype(np.uint8)


def write_experiment(folder: Path, dimensions: int, kind: str = "signals:CONVOLUTIONS", **sections: Any) -> Experiment:
    (folder / "signals.py").write_text(NETWORK)
    assert open_code(["."], folder, "signals:CONVOLUTIONS") == []
    data = save(folder / "a.npy", draw(dimensions), dimensions).model_dump(mode="json")
    training = {"steps": 4, "batch_size": 8, "lr": 2e-3, "ema": 0.5, "validate_every": 4, "precision": "float32"}
    fid = {"samples": 100, "sampler": {"kind": "ddim", "steps": 3}, "features": "inception", "also": []}
    measured = {"nll": {"images": 2, "timesteps": 3}, "fid": fid}
    own = {"model": {"kind": kind}, "diffusion": {"T": 30, "schedule": {"scale": "per_1000"}}}
    return parse(content(**{"data": data, "training": training, "evaluation": measured, **own, **sections}))


@pytest.mark.parametrize("dimensions", SIDES)
@pytest.mark.parametrize("channels", [0, 2])
def test_what_is_kept_is_each_item_whole(tmp_path: Path, dimensions: int, channels: int) -> None:
    values = draw(dimensions, channels or 1)
    config = save(tmp_path / "a.npy", values if channels else values[..., 0], dimensions)
    data, sides = prepare(config), SIDES[dimensions]
    assert data.sides == sides and data.shape == (*fold(sides), channels or 1)
    kept = np.concatenate([data.held_out, data.train]).reshape(30, *sides, channels or 1)
    assert sorted(item.tobytes() for item in kept) == sorted(item.tobytes() for item in values)
    assert fold(sides)[0] * fold(sides)[1] == math.prod(sides)
    told = {1: "signals of length 12 ", 3: "volumes of 3x4x2 "}[dimensions]
    assert told in describe_source(describe(config))


def test_the_same_numbers_as_images_are_other_data(tmp_path: Path) -> None:
    digests = [describe(save(tmp_path / "a.npy", draw(1), dimensions)).digest for dimensions in (1, 2)]
    volumes = [np.zeros((30, *sides), np.uint8) for sides in ((4, 6, 2), (6, 4, 2))]  # folded alike
    for name, values in zip("bc", volumes, strict=True):
        digests.append(describe(save(tmp_path / f"{name}.npy", values, 3)).digest)
    assert len(set(digests)) == 4


def test_what_is_no_signal_is_refused(tmp_path: Path) -> None:
    config = save(tmp_path / "a.npy", draw(3), 1)
    fails(config.source, "is not N x length or N x length x channels, as data.dimensions: 1 says", dimensions=1)
    fails(save(tmp_path / "b.npy", draw(1), 3).source, "N x depth x height x width", dimensions=3)
    fails(config.source, "data.dimensions: 3 is of .npy and .npz, and data.resolution is", dimensions=3, resolution=2)
    images = write_images(tmp_path / "images", draw(3)[:, 0, :, :, :1])
    fails(images, "data.dimensions: 1 is of .npy and .npz, and images are of images; leave it out", dimensions=1)
    fails("digits", "data.dimensions: 1 is of .npy and .npz", dimensions=1)


@pytest.mark.parametrize("dimensions", SIDES)
def test_networks_of_images_alone_are_refused(tmp_path: Path, dimensions: int) -> None:
    def tell(**sections: Any) -> str:
        experiment = write_experiment(tmp_path, dimensions, **sections)
        source = describe(experiment.trial.data)
        return "\n".join(f.text for f in check_trial(experiment, experiment.trial, source) if f.refused)

    assert "model.kind: unet is of images, and a has" in tell(model={"kind": "unet"})
    assert "inception takes images" in tell()
    assert tell(evaluation={"fid": None}) == ""
    assert f"where (n, outputs, *{SIDES[dimensions]}) is expected" in tell(kind="signals:SHORT")


@pytest.mark.parametrize("dimensions", SIDES)
def test_a_network_of_ones_own_is_trained_on_them_and_measured(tmp_path: Path, dimensions: int) -> None:
    trial, storage = write_experiment(tmp_path, dimensions).trial, Storage(tmp_path / "runs")
    data = prepare(trial.data)
    last = list(train(trial, data, storage, "trials/a"))[-1]
    assert last.state == "finished" and math.isfinite(last.metrics["valid/nll_bpd"])
    checkpoint = manifest.find_newest(storage, "trials/a/checkpoints")
    assert checkpoint
    described = checkpoints.describe(checkpoint)
    assert (described.shape, described.sides) == (data.shape, SIDES[dimensions])
    bench = Bench(storage, Measurement.of(trial), data, checkpoint, torch.device("cpu"))
    of = bench.m, checkpoint.digest, Images.of(data)
    for block in (*list_nll_blocks(*of), *list_sample_blocks(*of)):
        assert make(bench, block) == {} and read_block(storage, block).num_rows > 0


def test_long_signals_make_no_giant_picture() -> None:
    picture = draw_grid(torch.zeros(25, 1, 8000, 1, dtype=torch.uint8), 256, columns=5)
    assert int.from_bytes(picture[16:20], "big") < 50_000  # the width in the header of a PNG
