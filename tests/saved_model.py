"""A model of a small evaluation, saved as MLflow keeps it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import small_evaluation as small

from orchestrator.tracking import models
from orchestrator.tracking.models import Candidate
from workers.config import FIDConfig, SamplerConfig
from workers.storage import Storage

SAMPLER = SamplerConfig(kind="ddim", steps=3)
FID = FIDConfig(sampler=SAMPLER)


def candidate(storage: Storage, weights: str = "a") -> Candidate:
    checkpoint = small.checkpoint_in(storage, weights)
    return Candidate(trial=weights, checkpoint=checkpoint, levels=small.LEVELS, fid=FID)


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow makes a database in the working directory where it is asked without an address: nothing here does so."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models.save(candidate(Storage(folder / "runs")), folder / "model")
    assert not list(folder.rglob("__pycache__"))
    return folder / "model"


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Any:
    return mlflow.pyfunc.load_model(str(saved))


def asked(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({name: [value] for name, value in columns.items()})
