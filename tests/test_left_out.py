"""Where a table holds images twice, or labels in a form that is not read, a warning says what is left out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from workers.config import DataConfig
from workers.data.sources import describe

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def warnings_of(source: Path) -> list[str]:
    return list(describe(DataConfig(source=str(source))).warnings)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": IMAGES, "image": IMAGES}, "left out: column image, as img is taken for the images"),
        ({"image": IMAGES, "label": [0.5] * 20}, "no labels are used, as column label is of double; integers are"),
        ({"image": IMAGES, "label": ["cat"] * 20}, "no labels are used, as column label is of string; integers are"),
        ({"image": IMAGES, "label": [3] * 20}, ""),
    ],
)
def test_columns_that_are_not_read(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = {name: [png(x) for x in IMAGES] if values is IMAGES else values for name, values in columns.items()}
    parquet.write_table(pa.table(made), tmp_path / "data.parquet")
    told = warnings_of(tmp_path / "data.parquet")
    assert (message in told[0] and len(told) == 1) if message else told == []
