"""Vectors beside images: the columns of Parquet files that have them, and what is refused of those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pyarrow as pa
import pytest
from image_files import fails, write_images
from vectored_digits import FORMS, IMAGES, LABELS, LENGTH, VECTORS, WIDTH, write

from workers.data.dataset import Dataset, prepare
from workers.data.sources import describe, describe_source

cache = image_files.cache


def check(data: Dataset, vectors: np.ndarray = VECTORS) -> None:
    """Each image has its own."""
    assert data.train_vectors is not None and data.held_out_vectors is not None
    found = zip([*data.held_out, *data.train], [*data.held_out_vectors, *data.train_vectors], strict=True)
    pairs = sorted((image.tobytes(), row.tobytes()) for image, row in found)
    assert pairs == sorted((image.tobytes(), row.tobytes()) for image, row in zip(IMAGES, vectors, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_each_image_keeps_its_vectors(form: str, tmp_path: Path) -> None:
    config = write(tmp_path / "a.parquet", FORMS[form](VECTORS))
    check(prepare(config))
    source = describe(config)
    assert source.vectors == (LENGTH, WIDTH) and "2 vectors of 5 numbers each" in describe_source(source)
    plain = config.model_copy(update={"condition": None})
    assert describe(plain).digest != source.digest and prepare(plain).train_vectors is None
    check(prepare(config))  # from the cache


def test_a_list_of_numbers_is_one_vector(tmp_path: Path) -> None:
    flat = VECTORS.reshape(60, 1, -1)
    check(prepare(write(tmp_path / "a.parquet", pa.array(flat[:, 0].tolist(), pa.list_(pa.float32())))), flat)


def test_vectors_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path, lists = tmp_path / "a.parquet", pa.list_(pa.list_(pa.float32()))

    def refuse(change: Callable[[list[Any]], object], *words: str) -> None:
        values: Any = VECTORS.tolist()
        change(values)
        write(path, pa.array(values, lists))
        fails(path, *words, condition="text")

    refuse(lambda v: v[7].append(v[7][0]), "row 7 has 3 vectors of 5 numbers, and the first image 2 of 5; pad or cut")
    refuse(lambda v: v[7][0].append(1.0), "a row of text has vectors of 5 and of 6 numbers")
    refuse(lambda v: v[7][0].__setitem__(3, float("nan")), "row 7 has nan in vector 0, number 3; every number must be")
    refuse(lambda v: v.__setitem__(7, None), "1 values of text are missing; every image needs its vectors")
    refuse(lambda v: v[7][0].__setitem__(3, None), "1 values of text are missing")
    refuse(lambda v: [row.clear() for row in v], "has 0 vectors of 0 numbers; a network is told 1 to 4096")
    write(path, pa.array(LABELS.tolist()))
    fails(path, "a.parquet has no column text of lists of floats", "it has none; its columns: img", condition="text")
    write(path, FORMS["fixed"](VECTORS), "words")
    fails(path, "has no column text of lists of floats", "it has words", condition="text")
    fails("digits", "data.condition: text is a column of Parquet files, and these are built in", condition="text")
    images = write_images(tmp_path / "images", IMAGES[:, :, :, None])
    fails(images, "a column of Parquet files, and these are images", condition="text")


def test_a_stream_has_no_vectors(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / "data" / f"{name}.parquet", FORMS["fixed"](VECTORS))
    fails(tmp_path / "data", "data.stream reads these as they are needed", condition="text", stream=1.0, shuffle=1)
