"""Data in .npz and .npy: what the names of arrays mean, what is stored, and what is refused."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import COLOUR, GREY, LABELS, RANDOM, check, fails, pairs, warnings_of, write_images

from workers.config import DataConfig
from workers.data.dataset import prepare
from workers.data.sources import describe, describe_source

cache = image_files.cache
SPLITS = (("train", slice(0, 20)), ("test", slice(20, 30)))


def write(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


# ---- Round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [COLOUR, GREY, GREY[..., 0], RANDOM.integers(0, 256, (30, 4, 4, 5), np.uint8)])
@pytest.mark.parametrize("order", ["images", "x"])
def test_an_npz_with_both_splits(tmp_path, images, order):
    arrays = {f"{split}_images": images[part] for split, part in SPLITS}
    arrays |= {f"{split}_labels": LABELS[part][:, None] for split, part in SPLITS}
    if order == "x":  # as Keras names them
        arrays = {f"{name[-6]}_{name[:-7]}": a for name, a in arrays.items()}
        arrays = {name.replace("i_", "x_").replace("l_", "y_"): a for name, a in arrays.items()}
    source = write(tmp_path / "d.npz", **arrays)
    check(prepare(DataConfig(source=str(source))), images.reshape(30, 4, 4, -1))
    assert describe(DataConfig(source=str(source))).warnings == ()


def test_folders_of_arrays(tmp_path):
    (tmp_path / "a").mkdir()
    for split, part in SPLITS:
        np.save(tmp_path / "a" / f"{split}_images.npy", COLOUR[part])
        np.save(tmp_path / "a" / f"{split}_labels.npy", LABELS[part])
        (tmp_path / "b" / split).mkdir(parents=True)
        np.save(tmp_path / "b" / split / "images.npy", COLOUR[part])
        np.save(tmp_path / "b" / split / "labels.npy", LABELS[part].astype(np.uint8))
        (tmp_path / "c").mkdir(exist_ok=True)
        write(tmp_path / "c" / f"{split}.npz", images=COLOUR[part], labels=LABELS[part])
    for folder in "abc":
        check(prepare(DataConfig(source=str(tmp_path / folder))), COLOUR)


def test_arrays_of_one_split(tmp_path):
    np.save(tmp_path / "any name.npy", COLOUR)
    data = prepare(DataConfig(source=str(tmp_path / "any name.npy")))
    assert (len(data.train), len(data.held_out), data.train_labels, data.name) == (27, 3, None, "any name")
    data = prepare(DataConfig(source=str(write(tmp_path / "d.npz", images=COLOUR, labels=LABELS)), held_out=0.2))
    assert pairs(data.train, data.train_labels) + pairs(data.held_out, data.held_out_labels) == pairs(COLOUR, LABELS)


def test_what_is_left_out_of_arrays_is_told(tmp_path):
    arrays = {f"{split}_images": COLOUR[:10] for split in ("train", "val", "test")}
    source = write(tmp_path / "d.npz", **arrays, train_labels=LABELS[:10], weights=LABELS)
    assert describe(DataConfig(source=str(source))).warnings == (
        "left out: val_images of d.npz, weights of d.npz",
        "no labels are used, as test_images of d.npz has no whole numbers called labels and the other split has",
    )
    assert "no labels are used, as labels of e.npz (30, float64) is" in warnings_of(
        write(tmp_path / "e.npz", images=COLOUR, labels=LABELS / 2)
    )
    assert "left out: 1 .npy (a.npy)" in warnings_of(_add_array(write_images(tmp_path / "f", COLOUR))), "as ever"


def _add_array(folder: Path) -> Path:
    np.save(folder / "a.npy", COLOUR)
    return folder


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_are_cropped_and_resized_channel_by_channel(tmp_path, channels):
    wide = np.zeros((2, 6, 10, channels), np.uint8)
    wide[:, :, 2:8] = 10 * np.arange(1, channels + 1)  # the central square of each channel is even
    np.save(tmp_path / "d.npy", wide)
    config = DataConfig(source=str(tmp_path / "d.npy"), resolution=3)
    data = prepare(config)
    assert data.shape == describe(config).shape == (3, 3, channels)
    assert (data.train == 10 * np.arange(1, channels + 1)).all()


def test_arrays_of_16_bits(tmp_path):
    images = RANDOM.integers(0, 2**16, (30, 4, 4, 2), np.uint16)
    np.savez(tmp_path / "d.npz", images=images.astype(">u2"))
    data = prepare(DataConfig(source=str(tmp_path / "d.npz")))
    assert (data.levels, data.train.dtype) == (2**16, np.uint16)
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == Counter(i.tobytes() for i in images)


def test_the_line_says_how_many_channels(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((9, 4, 4, 2), np.uint8))
    assert describe_source(describe(DataConfig(source=str(tmp_path / "d.npy")))) == (
        "d: arrays, 8 to train on (d.npy), 1 held out (of the same images, by a fixed shuffle), no labels, "
        "4x4 in 2 channels"
    )


# ---- Tensors in Parquet files ------------------------------------------------------------------------------------


def write_tensors(path: Path, images: np.ndarray, labels: Any = LABELS) -> Path:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    table = {"image": tensors} | ({} if labels is None else {"label": labels[: len(images)]})
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2)])
def test_parquet_files_of_tensors(tmp_path, dtype, shape):
    images = RANDOM.integers(0, np.iinfo(dtype).max, (30, *shape), dtype)
    write_tensors(tmp_path / "train-0.parquet", images[:20])
    write_tensors(tmp_path / "test-0.parquet", images[20:], LABELS[20:])
    data = prepare(DataConfig(source=str(tmp_path)))
    images = images.reshape(30, 4, 6, -1)
    assert (data.levels, data.shape, data.train.dtype) == (np.iinfo(dtype).max + 1, images.shape[1:], dtype)
    assert pairs(data.train, data.train_labels) == pairs(images[:20], LABELS[:20])
    assert pairs(data.held_out, data.held_out_labels) == pairs(images[20:], LABELS[20:])


def test_tensors_that_are_no_images(tmp_path):
    flat = write_tensors(tmp_path / "flat.parquet", COLOUR.reshape(30, -1))
    fails(flat, "its column of extension<arrow.fixed_shape_tensor", "is not N x height x width")
    fails(
        write_tensors(tmp_path / "int.parquet", COLOUR.astype(np.int64)),
        "is not of uint8, uint16, float16, float32, float64",
    )
    write_tensors(tmp_path / "d-0.parquet", COLOUR)
    write_tensors(tmp_path / "d-1.parquet", COLOUR[:, :2])
    for name in ("flat", "int"):
        (tmp_path / f"{name}.parquet").unlink()
    fails(tmp_path, "its files differ in their images (d-0.parquet: ", "d-1.parquet: ")
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(COLOUR[:2])
    holed = pa.ExtensionArray.from_storage(tensors.type, pa.array([tensors.storage[0], None], tensors.storage.type))
    pq.write_table(pa.table({"image": holed}), tmp_path / "null.parquet")
    fails(tmp_path / "null.parquet", "null.parquet is damaged or cut off (Expected all lists to be of size")


# ---- Mistakes ----------------------------------------------------------------------------------------------------


def test_arrays_that_are_no_images(tmp_path):
    fails(
        write(tmp_path / "none.npz", first=COLOUR), "no array of images, but first of none.npz (30 x 4 x 4 x 3, uint8)"
    )
    fails(
        write(tmp_path / "two.npz", images=COLOUR, train_images=COLOUR), "images of two.npz beside train_images of two"
    )
    fails(
        write(tmp_path / "both.npz", x=COLOUR, images=COLOUR), "x of both.npz, images of both.npz are of the same split"
    )
    fails(write(tmp_path / "test.npz", test_images=COLOUR), "test_images of test.npz but no train_images")
    fails(write(tmp_path / "more.npz", train_images=COLOUR, test_images=GREY), "the images of the two splits differ")
    fails(write(tmp_path / "less.npz", images=COLOUR, labels=LABELS[:-1]), "differ in length; there must be a label")
    for name, images, word in (
        ("flat", COLOUR.reshape(30, -1), "of signals, N x length, set data.dimensions: 1, or reshape it"),
        ("empty", COLOUR[:, :0], "is not N x height x width"),
        ("first", np.zeros((30, 3, 8, 8), np.uint8), "would have 8 channels; they come last"),
        ("many", np.zeros((30, 4, 4, 99), np.uint8), "would have 99 channels"),
        ("int", COLOUR.astype(np.int64), "int64) is not of uint8"),
        ("none", COLOUR[:0], "has no images"),
        ("fortran", np.asfortranarray(COLOUR), "save numpy.ascontiguousarray"),
    ):
        np.save(tmp_path / f"{name}.npy", images)
        fails(tmp_path / f"{name}.npy", word)


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.save(tmp_path / "d.npy", np.array([Bomb()] * 30, dtype=object), allow_pickle=True)
    fails(tmp_path / "d.npy", "holds pickled objects, which are never loaded")
    np.savez(tmp_path / "d.npz", images=COLOUR, labels=np.array([Bomb()] * 30, dtype=object))
    assert "no labels are used, as labels of d.npz (30, object) is" in warnings_of(tmp_path / "d.npz")


def test_arrays_that_claim_more_than_their_file_holds(tmp_path):
    np.save(tmp_path / "d.npy", COLOUR)
    content = (tmp_path / "d.npy").read_bytes()
    (tmp_path / "d.npy").write_bytes(content.replace(b"(30, 4, 4, 3)", b"(30000000000, 4, 4, 3)"))
    fails(tmp_path / "d.npy", "takes 1,440,000,000,000 bytes, and there are")
    (tmp_path / "d.npy").write_bytes(content[:-1])
    fails(tmp_path / "d.npy", "takes 1,440 bytes, and there are 1,439")
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x09\x00" + content[8:])
    fails(tmp_path / "d.npy", "d.npy is damaged or cut off")
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", content[:128] + bytes(10**7))
    fails(tmp_path / "d.npz", "claims to hold 10,000,128 bytes in")


def test_arrays_in_another_byte_order(tmp_path):
    np.savez(tmp_path / "d.npz", images=COLOUR, labels=LABELS.astype(">i4"))
    data = prepare(DataConfig(source=str(tmp_path / "d.npz")))
    assert Counter(data.train_labels.tolist()) + Counter(data.held_out_labels.tolist()) == Counter(LABELS.tolist())
