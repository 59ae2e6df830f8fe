"""What training computes from given settings is part of a trial's id, by `workers.identity.TRAINING_VERSION`.

A handful of tiny trainings are held against recorded numbers. Where this fails, either the change was a mistake, or it
was meant: then TRAINING_VERSION rises, and the new numbers are recorded here (they print when the file is run).
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from workers.config import Trial
from workers.data.dataset import prepare
from workers.identity import TRAINING_VERSION
from workers.journal import read_points
from workers.storage import Storage
from workers.training import train

BASE: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}},
    "training": {
        "steps": 3, "batch_size": 16, "lr": 2e-3, "ema": 0.9, "precision": "float32",
        "validate_every": 3, "checkpoint_every": 3,
    },
}  # fmt: skip
# By what is set: the objective after three steps, and the validation's bits/dim.
RECORDED: dict[str, tuple[dict[str, Any], float, float]] = {
    "the paper's": ({}, 0.9819574, 4.331274),
    "v, learned variance, hybrid": (
        {
            "diffusion": {"T": 50, "schedule": {"kind": "cosine"}, "prediction": "v", "variance": "learned_range"},
            "loss": {"objective": "hybrid"},
        },
        0.8047289,
        3.983053,
    ),
    "the bound, importance": (
        {
            "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}, "variance": "learned"},
            "loss": {"objective": "kl"},
            "training": {"timesteps": "importance"},
        },
        11.48787,
        4.543027,
    ),
    "min-SNR, stratified t, flips": (
        {"data": {"flip": True}, "loss": {"weighting": "min_snr"}, "training": {"timesteps": "stratified"}},
        0.954235,
        4.334833,
    ),
    "x_0, warm-up and decay": (
        {
            "diffusion": {"T": 50, "schedule": {"kind": "sigmoid", "scale": "per_1000"}, "prediction": "x_0"},
            "training": {"warmup": 2, "decay": "cosine"},
            "seed": 3,
        },
        0.7008231,
        358.7367,
    ),
    "EDM, antithetic sigma": (
        {"diffusion": {"formulation": "edm", "sigma_data": 0.75}, "training": {"timesteps": "antithetic"}},
        1.0587684,
        3.950709,
    ),
    "the flow, logit-normal t, sigmoid": (
        {"diffusion": {"formulation": "flow", "t_law": "logit_normal"}, "loss": {"weighting": "sigmoid"}},
        1.4982764,
        5.869664,
    ),
}


def measured(changes: dict[str, Any], folder: Path) -> tuple[float, float]:
    torch.set_num_threads(1)
    content = {name: dict(section) for name, section in BASE.items()}
    if "formulation" in changes.get("diffusion", {}):
        content["diffusion"] = {}
    for name, section in changes.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    trial = Trial.model_validate(content)
    for _ in train(trial, prepare(trial.data), Storage(folder), "trial"):
        pass
    last = [point for point in read_points(Storage(folder), "trial") if point["step"] == 3]
    values = {name: value for point in last for name, value in point.get("metrics", {}).items()}
    [loss] = [value for name, value in values.items() if name.startswith("train/loss_")]
    return loss, values["valid/nll_bpd"]


@pytest.mark.parametrize("name", RECORDED)
def test_training_computes_what_it_did(name: str, tmp_path: Path) -> None:
    """Up to rounding, which differs between processors."""
    changes, *numbers = RECORDED[name]
    assert TRAINING_VERSION == 1, "record the numbers of the new version"
    assert measured(changes, tmp_path) == pytest.approx(numbers, rel=2e-4)


if __name__ == "__main__":
    for name, (changes, *_) in RECORDED.items():
        with TemporaryDirectory() as folder:
            print(name, *measured(changes, Path(folder)))
