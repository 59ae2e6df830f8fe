"""Digits in a Parquet file, with two vectors of five numbers beside each image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from image_files import encoded
from sklearn.datasets import load_digits

from workers.config import DataConfig

LENGTH, WIDTH = 2, 5
IMAGES = load_digits().images[:60].astype(np.uint8)
LABELS = load_digits().target[:60]
# Which digit it is, and of which row.
VECTORS = (np.eye(10)[LABELS].reshape(60, LENGTH, WIDTH) + np.arange(60)[:, None, None] / 64).astype(np.float32)
FIXED = pa.list_(pa.list_(pa.float32(), WIDTH), LENGTH)
FORMS: dict[str, Callable[[np.ndarray], pa.Array]] = {
    "fixed": lambda v: pa.array(v.tolist(), FIXED),
    "lists of doubles": lambda v: pa.array(v.tolist(), pa.list_(pa.list_(pa.float64()))),
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray,
}


def write(path: Path, vectors: Any, name: str = "text") -> DataConfig:
    cells = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(cells, kind), name: vectors, "label": pa.array(LABELS)}), path)
    return DataConfig(source=str(path), condition="text")
