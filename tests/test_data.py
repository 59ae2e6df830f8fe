"""Laws of workers/data.py, on small files of every format that the tests write themselves."""

from pathlib import Path

import image_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import (
    CIFAR,
    COLOUR,
    GREY,
    LABELS,
    check,
    encoded,
    fails,
    pairs,
    warnings_of,
    write_cifar,
    write_idx,
    write_images,
    write_parquet,
)
from PIL import Image

from workers.config import DataConfig
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import prepare
from workers.data.sources import compute_fingerprint, describe, describe_source
from workers.data.splits import DataError

cache = image_files.cache


# ---- Round trips -------------------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    data, digits = prepare(DataConfig(source="digits")), load_digits()
    assert (data.levels, data.shape, len(data.train), len(data.held_out)) == (17, (8, 8, 1), 1497, 300)
    stored = pairs(data.train, data.train_labels) + pairs(data.held_out, data.held_out_labels)
    assert stored == pairs(digits.images.astype(np.uint8), digits.target)
    assert set(data.held_out_labels[:60]) == set(range(10)), "a prefix is a fair sample"


def test_gaussian_pixels_are_normal_independent_and_of_the_stated_deviation():
    """Moments of 160,000 pixels and the products of neighbours, each within 4 standard errors of its own."""
    data = prepare(DataConfig(source="gaussian"))
    assert (data.levels, data.shape, len(data.train), len(data.held_out)) == (256, (8, 8, 1), 2000, 500)
    assert data.train_labels is None and data.held_out_labels is None
    z = (np.concatenate([data.train, data.held_out]) / 127.5 - 1) / GAUSSIAN_SD
    assert np.abs(z).max() < 1 / GAUSSIAN_SD, "no pixel is clipped"
    n = z.size
    assert abs(z.mean()) < 4 * n**-0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5  # the variance of z^3 is E z^6, that of z^4 is E z^8 - 9
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for shifted in (np.roll(z, 1, 1), np.roll(z, 1, 2), np.roll(z, 1, 0)):
        assert abs((z * shifted).mean()) < 4 * n**-0.5


def test_built_in_sources_have_the_addresses_they_always_had():
    """A change of these would orphan every stored evaluation."""
    assert compute_fingerprint(DataConfig(source="digits")) == "924f3600e25a8720"
    assert compute_fingerprint(DataConfig(source="gaussian")) == "1d32f19783661f04"


def test_other_bytes_than_the_address_says_are_refused(monkeypatch, tmp_path):
    drawn = np.random.RandomState.standard_normal

    class Other(np.random.RandomState):
        def standard_normal(self, size=None):
            return drawn(self, size) + 0.01

    monkeypatch.setattr(np.random, "RandomState", Other)
    with pytest.raises(DataError, match="other normal numbers"):
        prepare(DataConfig(source="gaussian"), tmp_path)


def test_digits_stay_in_their_levels_when_resized():
    data = prepare(DataConfig(source="digits", resolution=4))
    assert data.shape == (4, 4, 1) and data.train.max() <= 16


@pytest.mark.parametrize(("column", "images"), [("img", COLOUR), ("image", GREY)])
def test_parquet_folder(tmp_path, column, images):
    write_parquet(tmp_path / "d/train-00000-of-00002.parquet", images[:12], LABELS[:12], column, row_group_size=5)
    write_parquet(tmp_path / "d/train-00001-of-00002.parquet", images[12:20], LABELS[12:20], column)
    write_parquet(tmp_path / "d/test-00000-of-00001.parquet", images[20:], LABELS[20:], column)
    check(prepare(DataConfig(source=str(tmp_path / "d"))), images)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet_of_every_kind_of_bytes(tmp_path, kind, struct):
    """And with groups of no rows, and every image at several rows of one dictionary."""
    writer = None
    for part in (COLOUR[:12], COLOUR[:0], COLOUR[12:], COLOUR[:0]):
        bare = pa.types.is_dictionary(kind)
        cells = pa.array([encoded(i) for i in part], pa.binary() if bare else kind)
        cells = cells.cast(kind) if bare else cells
        column = pa.StructArray.from_arrays([cells], ["bytes"]) if struct else cells
        labels = pa.array(LABELS[: len(part)] if len(part) == 12 else LABELS[12:][: len(part)], pa.int8())
        table = pa.table({"image": column, "label": labels})
        writer = writer or pq.ParquetWriter(tmp_path / "d.parquet", table.schema)
        writer.write_table(table)
    writer.close()
    data = prepare(DataConfig(source=str(tmp_path / "d.parquet")))
    stored = pairs(data.train, data.train_labels) + pairs(data.held_out, data.held_out_labels)
    assert stored == pairs(COLOUR, LABELS)


def test_parquet_validation_file_is_held_out_where_there_is_no_test(tmp_path):
    write_parquet(tmp_path / "d/train-0.parquet", COLOUR[:20])
    write_parquet(tmp_path / "d/validation-0.parquet", COLOUR[20:], LABELS[20:])
    check(prepare(DataConfig(source=str(tmp_path / "d"))), COLOUR)


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_image_folder_with_splits_and_classes(tmp_path, kind):
    write_images(tmp_path / "d/train", COLOUR[:20], LABELS[:20], kind)
    write_images(tmp_path / "d/test", COLOUR[20:], LABELS[20:], kind)
    check(prepare(DataConfig(source=str(tmp_path / "d"))), COLOUR)


def test_cifar10_binary(tmp_path):
    check(prepare(DataConfig(source=str(write_cifar(tmp_path / "d")))), CIFAR)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, zipped):
    check(prepare(DataConfig(source=str(write_idx(tmp_path / "d", zipped=zipped)))), GREY)


# ---- Splits, labels, and what is found --------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 3), (0.5, 15), (0.001, 1), (0.999, 29)])
def test_a_source_without_test_split_holds_out_a_fraction(tmp_path, fraction, count):
    config = DataConfig(source=str(write_parquet(tmp_path / "d.parquet", COLOUR)), held_out=fraction)
    source, data = describe(config), prepare(config)
    assert (source.train, source.held_out) == (len(data.train), len(data.held_out)) == (30 - count, count)
    train, held_out = (pairs(*p) for p in ((data.train, data.train_labels), (data.held_out, data.held_out_labels)))
    assert not train & held_out and train + held_out == pairs(COLOUR, LABELS)


def test_the_split_is_fixed(tmp_path):
    """These rows are what every earlier run held out: if this fails, raise VERSION and say so in the log."""
    images = np.arange(30, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    data = prepare(DataConfig(source=str(write_parquet(tmp_path / "d.parquet", images, None)), held_out=0.2))
    assert data.held_out[:, 0, 0, 0].tolist() == [25, 21, 11, 0, 10, 22]


def test_no_labels(tmp_path):
    for source in (
        write_parquet(tmp_path / "d.parquet", COLOUR, None),
        write_images(tmp_path / "flat", COLOUR),
        write_images(tmp_path / "one", COLOUR, np.zeros(30, int)),
    ):
        config = DataConfig(source=str(source))
        data = prepare(config)
        assert data.train_labels is None and data.held_out_labels is None and not describe(config).labelled


def test_hidden_and_other_files_are_no_images_and_are_told(tmp_path):
    folder = write_images(tmp_path / "d", COLOUR)
    for name in (".hidden.png", ".checkpoints/001.png", "README.md", "a.gif", "b.gif", "c.tif", "d.xyz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"none")
    source = describe(DataConfig(source=str(folder)))
    assert source.train == 27
    assert describe_source(source).endswith("; left out: 2 .gif, 1 .md, 1 .tif, 1 .xyz")
    assert source.warnings == (
        "left out: 2 .gif (a.gif, b.gif); convert them to PNG",
        "left out: 1 .tif (c.tif); convert it to PNG",
        "left out: 1 .xyz (d.xyz)",
    )


def test_the_line_says_what_was_found(tmp_path):
    def line(source: Path | str, **settings) -> str:
        return describe_source(describe(DataConfig(source=str(source), **settings)))

    assert line("digits") == (
        "digits: built in, 1,497 to train on, 300 held out (of the same images, by a fixed shuffle), 10 classes, "
        "8x8 grey in 17 levels"
    )
    write_images(tmp_path / "d/Train", COLOUR[:20], LABELS[:20])
    write_images(tmp_path / "d/valid", COLOUR[20:], LABELS[20:])
    assert line(tmp_path / "d") == (
        "d: images, 20 to train on (Train/), 10 held out (valid/), "
        "7 classes (class0, class1, class2, class3 and 3 more), 4x4 in colour"
    )
    assert line(write_images(tmp_path / "a\nb", GREY), resolution=2) == (
        r"'a\nb': images, 27 to train on, 3 held out (of the same images, by a fixed shuffle), no labels, 2x2 grey"
    )
    assert "train-images-idx3-ubyte.gz" in line(write_idx(tmp_path / "i"))
    assert "1 class," in line(write_cifar(tmp_path / "c", labels=LABELS * 0))


def test_what_had_to_be_guessed_is_told(tmp_path):
    folder = write_cifar(tmp_path / "c")
    assert "data_batch_3.bin, data_batch_4.bin, data_batch_5.bin are not there" in warnings_of(folder)
    (folder / "test_batch.bin").unlink()
    assert "test_batch.bin is not there" in warnings_of(folder)
    (folder / "data_batch_2.bin").rename(folder / "data_batch_4.bin")
    fails(folder, "missing: data_batch_2.bin, data_batch_3.bin, data_batch_5.bin of CIFAR-10's five")
    folder = write_idx(tmp_path / "i")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert "no labels are used, as train-labels-idx1-ubyte.gz is not there" in warnings_of(folder)
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    assert "t10k-images-idx3-ubyte.gz is not there" in warnings_of(folder)
    (folder / "train-images-idx3-ubyte.gz").unlink()
    fails(folder, "t10k-labels-idx1-ubyte.gz but no train-images-idx3-ubyte.gz")
    frames = [Image.fromarray(i) for i in COLOUR[:3]]
    for name in ("d/a.png", "d/b.webp"):
        (tmp_path / "d").mkdir(exist_ok=True)
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert "2 images are animated" in warnings_of(tmp_path / "d")
    assert (prepare(DataConfig(source=str(tmp_path / "d"))).train == COLOUR[0]).all()
    for split, images in (("train", COLOUR[:20]), ("val", COLOUR[15:])):
        write_images(tmp_path / "e" / split, images)
    assert "5 of the held-out files are among those to train on" in warnings_of(tmp_path / "e")
    assert "data.held_out = 0.2 is without effect" in warnings_of(tmp_path / "e", held_out=0.2)
    assert "data.held_out = 0.2 is without effect" in warnings_of("digits", held_out=0.2)


def test_links_are_followed(tmp_path):
    write_images(tmp_path / "d" / "real", COLOUR[:10])
    (tmp_path / "d" / "linked").symlink_to(write_images(tmp_path / "elsewhere", COLOUR[10:]))
    assert describe(DataConfig(source=str(tmp_path / "d"))).classes == 2
    for split in ("train", "test"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / split).symlink_to(tmp_path / "d" / ("real" if split == "train" else "linked"))
    source = describe(DataConfig(source=str(tmp_path / "s")))
    assert (source.train, source.held_out, source.where) == (10, 20, ("train/", "test/"))
    (tmp_path / "d" / "real" / "up").symlink_to(tmp_path / "d")
    assert describe(DataConfig(source=str(tmp_path / "d"))).train == 27, "a folder that holds itself is read once"
    for k in range(9):  # each from another folder of a knot, of which there are too many ways
        write_images(tmp_path / "knot" / f"{k}", COLOUR[:1])
        for other in range(9):
            (tmp_path / "knot" / f"{k}" / f"to{other}").symlink_to(tmp_path / "knot" / f"{other}")
    fails(tmp_path / "knot", "more than 8 times")
    (tmp_path / "d" / "birds").symlink_to(tmp_path / "nowhere")
    fails(tmp_path / "d", "birds is a link to nowhere")


def test_a_folder_in_folders_of_cifar10_or_idx_and_a_file_uri(tmp_path):
    write_cifar(tmp_path / "c" / "cifar-10-batches-bin")
    check(prepare(DataConfig(source=str(tmp_path / "c"))), CIFAR)
    write_idx(tmp_path / "i" / "MNIST" / "raw")
    write_idx(tmp_path / "i" / "MNIST" / "raw", zipped=False)
    check(prepare(DataConfig(source=f"file://{tmp_path / 'i'}")), GREY)
    assert warnings_of(tmp_path / "i") == ""
    write_idx(tmp_path / "i" / "Fashion" / "raw")
    fails(tmp_path / "i", "Fashion/raw/, MNIST/raw/", "give the path of one")
