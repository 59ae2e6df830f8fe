"""A small network in the folder in which diffusers saves it, and changes of that folder."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

T = 50
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def original(unet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=T, beta_end=0.1)).save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def put(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; those set to ... are removed."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def scheduler(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder / "scheduler/scheduler_config.json", **changes)


def network(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder / "unet/config.json", **changes)


def saved(unet: Any, folder: Path, **how: Any) -> Path:
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=T, beta_end=0.1)).save_pretrained(
        folder, **how
    )
    return folder


def halved(unet: Any) -> Any:
    """The network in float16; the one of the tests stays as it is."""
    return copy.deepcopy(unet).half()
