"""Experiments as texts and as settings, and the mistakes that are told of them."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.expand import group_by_row
from orchestrator.experiment.load import load, parse
from orchestrator.experiment.records import Experiment, ExperimentError, Variant
from orchestrator.experiment.settings import merge
from workers.layout import RowId

SAMPLE = """
name: beta_schedule
seed: 0
data: {source: digits}                      # digits | a Parquet file or folder of images | an image folder | gaussian
model: {channels: 32, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 200, schedule: {kind: linear, beta_start: 1.0e-4, beta_end: 0.02, scale: per_1000}, prediction: eps, variance: fixed_small}
loss: {weighting: simple}
training: {steps: 2000, batch_size: 128, lr: 2.0e-4, ema: 0.999, precision: auto, workers: 1, validate_every: 500, checkpoint_every: 500}
evaluation: {nll: {images: all, timesteps: all}, fid: {samples: 1000, sampler: {kind: ancestral}, features: classifier}}
search: {space: {diffusion.T: {grid: [50, 200, 1000]}, loss.weighting: {grid: [simple, vlb]}}, algorithm: grid, metric: eval/nll_bpd, scheduler: {kind: none}, max_concurrent: auto}
tracking: {uri: null}
"""  # noqa: E501


def experiment(**sections: Any) -> Experiment:
    """The smallest experiment, with the given sections in it."""
    return parse(content(**sections))


def content(**sections: Any) -> dict[str, Any]:
    return merge({"name": "e", "data": {"source": "digits"}, "training": {"steps": 10}}, sections)


def search(space: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"space": space, **rest}


def load_text(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    return load(file, overrides)


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        experiment(**sections)
    for leak in ("Input should", "pydantic", "validation error", "Extra inputs", "Field required", "Traceback"):
        assert leak not in str(caught.value)
    return caught.value.problems


def file_problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        load_text(tmp_path, text, *overrides)
    assert str(tmp_path / "file.yaml") in str(caught.value)
    return caught.value.problems


def digests(variants: tuple[Variant, ...], data: str = "d") -> tuple[dict[RowId, Variant], list[str]]:
    return group_by_row(variants, {v.trial.data: data for v in variants})
