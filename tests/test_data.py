"""Laws of workers/data.py, on small files of every format that the tests write themselves."""

import gzip
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers import memos
from workers.config import DataConfig
from workers.data import dataset as data_module
from workers.data import locate, proofs, survey
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import Dataset, prepare
from workers.data.decoding import decode
from workers.data.sources import compute_fingerprint, describe, describe_source
from workers.data.splits import DataError

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)  # random: no two images are equal
GREY = RANDOM.integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
CIFAR = RANDOM.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(30) % 7


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(pixels: np.ndarray, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, kind, **options)
    return stream.getvalue()


def write_parquet(path: Path, images, labels=LABELS, column="img", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(i) if isinstance(i, np.ndarray) else i, "path": None} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {column: pa.array(cells, kind)}
    if labels is not None:
        table["label"] = pa.array([None if v is None else int(v) for v in labels][: len(cells)], pa.int64())
    pq.write_table(pa.table(table), path, **options)
    return path


def write_images(folder: Path, images, classes=None, kind="png") -> Path:
    for row, pixels in enumerate(images):
        path = folder / (f"class{classes[row]}" if classes is not None else "") / f"{row:03}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels, kind, **({"lossless": True} if kind == "webp" else {})))
    return folder


def write_cifar(folder: Path, images=CIFAR, labels=LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(-1, 3072)], 1)
    for name, part in {
        "data_batch_1": records[:10],
        "data_batch_2": records[10:20],
        "test_batch": records[20:],
    }.items():
        (folder / f"{name}.bin").write_bytes(part.tobytes())
    return folder


def write_idx(folder: Path, images=GREY, labels=LABELS, zipped=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if zipped else bytes
    for split, part in {"train": slice(0, 20), "t10k": slice(20, 30)}.items():
        x, y = images[part, :, :, 0], labels[part].astype(np.uint8)
        for name, magic, content in (("images-idx3", 3, x), ("labels-idx1", 1, y)):
            header = bytes([0, 0, 8, magic]) + struct.pack(f">{magic}I", *content.shape)
            path = folder / f"{split}-{name}-ubyte{'.gz' * zipped}"
            path.write_bytes(pack(header + content.tobytes()))
    return folder


def pairs(images, labels) -> Counter:
    return Counter((np.asarray(i).tobytes(), int(label)) for i, label in zip(images, labels, strict=True))


def check(data: Dataset, images: np.ndarray, labels=LABELS, train: int = 20) -> None:
    """Every image is there once, bit for bit, with its own label; where the source has splits, in its own split."""
    assert data.shape == images.shape[1:] and data.levels == 256
    assert data.train.dtype == data.held_out.dtype == np.uint8
    assert data.train_labels.dtype == data.held_out_labels.dtype == np.int64
    assert pairs(data.train, data.train_labels) == pairs(images[:train], labels[:train])
    assert pairs(data.held_out, data.held_out_labels) == pairs(images[train:], labels[train:])
    assert not np.array_equal(data.train, images[:train]), "stored in a shuffled order"


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


def test_jpeg_is_what_pillow_decodes(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8)[:, :, None].repeat(3, 2)
    files = [encoded(smooth + np.uint8(20 * i), "jpeg", quality=95) for i in range(4)]
    data = prepare(DataConfig(source=str(write_parquet(tmp_path / "d.parquet", files))))
    expected = Counter(np.asarray(Image.open(io.BytesIO(f))).tobytes() for f in files)
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == expected


# ---- Splits, labels, channels, resolution ------------------------------------------------------------------------


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


def test_channels_follow_all_images_and_those_that_differ_are_converted(tmp_path):
    colour = write_images(tmp_path / "colour", COLOUR[:5])
    (colour / "grey.png").write_bytes(encoded(GREY[0]))
    (colour / "alpha.png").write_bytes(encoded(np.concatenate([COLOUR[0], GREY[0]], 2)))
    Image.fromarray(GREY[1].squeeze()).convert("P").save(colour / "palette.png")
    Image.fromarray(COLOUR[1]).convert("CMYK").save(colour / "cmyk.jpg")
    assert prepare(DataConfig(source=str(colour))).shape == (4, 4, 3)
    assert prepare(DataConfig(source=str(write_images(tmp_path / "grey", GREY)))).shape == (4, 4, 1)
    few_grey = write_parquet(tmp_path / "d.parquet", [GREY[0], *COLOUR[1:]])  # one grey image first makes no grey set
    assert describe(DataConfig(source=str(few_grey))).shape == (4, 4, 3)
    late = write_parquet(tmp_path / "late.parquet", [*GREY, *GREY, *GREY, COLOUR[0]], None)
    data = prepare(DataConfig(source=str(late)))
    assert data.shape == (4, 4, 3) and COLOUR[0].tobytes() in {i.tobytes() for i in (*data.train, *data.held_out)}


def test_a_palette_counts_by_what_can_be_seen(tmp_path):
    def write(name: str, palette: list[int], **options) -> Path:
        (tmp_path / name).mkdir()
        for k in range(2):
            image = Image.fromarray(np.array([[0, 1], [1, k]], np.uint8), "P")
            image.putpalette(palette)
            image.save(tmp_path / name / f"{k}.png", **options)
        return tmp_path / name

    grey, red = [0, 0, 0, 90, 90, 90], [255, 0, 0]
    for name, palette, channels, options in (
        ("grey", grey, 1, {}),
        ("unused", grey + red, 1, {}),
        ("colour", red + grey, 3, {}),
        ("hidden", red + grey, 1, {"transparency": 0}),
    ):
        data = prepare(DataConfig(source=str(write(name, palette, **options))))
        assert data.shape == (2, 2, channels), name
    assert sorted(np.unique(data.train)) == [0, 255], "white where it was transparent, not red"


def test_transparent_pixels_are_composited_on_a_stated_colour(tmp_path):
    """Of every way that a PNG can be transparent: nothing of what is hidden is seen, and it counts in the address."""
    alpha = np.full((30, 4, 4, 1), 255, np.uint8)
    alpha[:, :2], alpha[:, 2] = 0, 51  # of three rows, two are hidden and one is seen at a fifth
    sets = {
        "RGBA": [np.concatenate([c, a], 2) for c, a in zip(COLOUR, alpha, strict=True)],
        "LA": [np.concatenate([g, a], 2) for g, a in zip(GREY, alpha, strict=True)],
    }
    for name, images in sets.items():
        source = str(write_images(tmp_path / name, images))
        white, black = (prepare(DataConfig(source=source, background=(v,) * 3)) for v in (255, 0))
        assert white.digest == compute_fingerprint(DataConfig(source=source)) != black.digest
        assert (white.train[:, :2] == 255).all() and (black.train[:, :2] == 0).all()
        opaque = {i[3].tobytes() for i in (COLOUR if name == "RGBA" else GREY)}
        assert {i[3].tobytes() for i in (*white.train, *white.held_out)} == opaque
        seen = (COLOUR if name == "RGBA" else GREY)[:, 2].astype(float) / 5 + 255 * 4 / 5
        found = np.sort(np.concatenate([white.train[:, 2], white.held_out[:, 2]]).ravel())
        assert np.abs(found - np.sort(seen.ravel())).max() <= 1
    assert describe(DataConfig(source=source)).shape == (4, 4, 1)
    assert describe(DataConfig(source=source, background=(255, 0, 0))).shape == (4, 4, 3), "grey on red is in colour"
    assert "all with an alpha channel, on [255, 255, 255]" in describe_source(describe(DataConfig(source=source)))

    without = str(write_images(tmp_path / "opaque", COLOUR))
    other = describe(DataConfig(source=without, background=(0, 0, 0)))
    assert other.digest == compute_fingerprint(DataConfig(source=without)), "what nothing reads is in no address"
    assert "data.background = [0, 0, 0] is without effect" in other.warnings[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_transparent_colour_is_composited(tmp_path, mode):
    (tmp_path / "d").mkdir()
    for k in range(4):
        image = Image.fromarray(np.array([[0, 200], [200, 200]], np.uint8)).convert(mode)
        image.save(tmp_path / f"d/{k}.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    data = prepare(DataConfig(source=str(tmp_path / "d")))
    assert (data.train[:, 0, 0] == 255).all() and data.shape[2] == (3 if mode == "RGB" else 1)


def test_resolution_crops_the_centre_and_resizes(tmp_path):
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[:, 2:8] = 200  # the central square is even, so any resize keeps its value
    config = DataConfig(source=str(write_images(tmp_path / "d", [wide, wide.transpose(1, 0, 2)])), resolution=3)
    data = prepare(config)
    assert describe(config).shape == data.shape == (3, 3, 3)
    assert (data.train == 200).all() and (data.held_out == 200).all()


def test_exif_orientation_is_applied(tmp_path):
    picture, exif = np.zeros((8, 8), np.uint8), Image.Exif()
    picture[:4] = 255  # white above black; turned by 180 degrees: black above white
    exif[0x0112] = 3
    files = [encoded(picture, exif=exif)] * 2
    data = prepare(DataConfig(source=str(write_parquet(tmp_path / "d.parquet", files))))
    assert np.array_equal(data.train[0, :, :, 0], picture[::-1])


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
        "d: images, 20 to train on (Train/), 10 held out (valid/), 7 classes, 4x4 in colour"
    )
    assert line(write_images(tmp_path / "a\nb", GREY), resolution=2) == (
        r"'a\nb': images, 27 to train on, 3 held out (of the same images, by a fixed shuffle), no labels, 2x2 grey"
    )
    assert "train-images-idx3-ubyte.gz" in line(write_idx(tmp_path / "i"))
    assert "1 class," in line(write_cifar(tmp_path / "c", labels=LABELS * 0))


def warnings_of(source: Path | str, **settings) -> str:
    return "\n".join(describe(DataConfig(source=str(source), **settings)).warnings)


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


def test_images_of_one_pixel(tmp_path):
    folder = write_idx(tmp_path / "d", GREY[:, :1, :1])
    check(prepare(DataConfig(source=str(folder))), GREY[:, :1, :1])
    assert prepare(DataConfig(source=str(folder), resolution=1)).shape == (1, 1, 1)


# ---- The address -------------------------------------------------------------------------------------------------

WRITERS = {
    "parquet": lambda path: write_parquet(path / "train-0.parquet", COLOUR).parent,
    "images": lambda path: write_images(path, COLOUR),
    "cifar10-binary": write_cifar,
    "idx": lambda path: write_idx(path, zipped=False),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_address_follows_the_content_not_the_path(tmp_path, monkeypatch, kind):
    here, there = WRITERS[kind](tmp_path / "here"), tmp_path / "other" / "there"
    address = compute_fingerprint(DataConfig(source=str(here)))
    assert len(address) == 16 and int(address, 16) >= 0
    assert describe(DataConfig(source=str(here))).digest == prepare(DataConfig(source=str(here))).digest == address
    assert describe(DataConfig(source=str(here))).format == kind
    there.parent.mkdir()
    here.rename(there)
    assert compute_fingerprint(DataConfig(source=str(there))) == address
    monkeypatch.chdir(there.parent)
    assert compute_fingerprint(DataConfig(source="there")) == address, "relative to the current directory"
    monkeypatch.setenv("HOME", str(there.parent))
    assert compute_fingerprint(DataConfig(source="~/there")) == address


@pytest.mark.parametrize("kind", WRITERS)
def test_one_changed_byte_changes_the_address(tmp_path, kind):
    folder = WRITERS[kind](tmp_path / "d")
    addresses = {compute_fingerprint(DataConfig(source=str(folder)))}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # size and, within a clock tick, time stay as they were
        path.write_bytes(content)
        addresses.add(compute_fingerprint(DataConfig(source=str(folder))))
    assert len(addresses) == 1 + sum(p.is_file() for p in folder.rglob("*"))


def test_the_address_follows_what_changes_the_decoded_result(tmp_path):
    whole, split = write_images(tmp_path / "whole", COLOUR), write_cifar(tmp_path / "split")

    def address(source, **settings):
        return compute_fingerprint(DataConfig(source=str(source), **settings))

    assert len({address(whole), address(whole, resolution=2), address(whole, held_out=0.5)}) == 3
    assert address(whole) == address(whole, held_out=0.101), "3 of 30 either way"
    assert address(whole) == address(whole, flip=True), "mirroring is done while training"
    assert address(split) == address(split, held_out=0.5), "it has its own test split"
    (whole / "000.png").rename(whole / "renamed.png")
    assert address(whole) != address(write_images(tmp_path / "again", COLOUR)), "names carry the order and the classes"


def test_hashes_are_remembered_until_a_file_changes(tmp_path, cache, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", COLOUR)
    config = DataConfig(source=str(path))
    address = compute_fingerprint(config)
    assert not list(cache.glob("hashes/*")), "a file this young may change again unseen"
    monkeypatch.setattr(survey, "SETTLED_NS", 0)
    assert compute_fingerprint(config) == address
    (memo,) = cache.glob("hashes/*.json")
    entries = json.loads(memo.read_text())["content"]
    entries[str(path)][-1] = "remembered"
    memos.remember(memo, entries)
    assert compute_fingerprint(config) != address, "the memo is used: the file was not read again"
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert compute_fingerprint(config) == address, "another time of change: read again"


@pytest.mark.parametrize("how", ["replaced", "written over", "linked elsewhere", "in a folder linked elsewhere"])
@pytest.mark.parametrize("kind", ["idx", "images", "parquet", "cifar10-binary"])
def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path, monkeypatch, kind, how):
    monkeypatch.setattr(survey, "SETTLED_NS", 0)
    WRITERS[kind](tmp_path / "real")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "real", other)
    file = max((p for p in other.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1 if kind in ("idx", "cifar10-binary") else len(content) // 2] ^= 1
    file.write_bytes(content)
    for folder in (tmp_path / "real", other):
        for path in folder.rglob("*"):
            os.utime(path, ns=(10**18, 10**18))
    there = tmp_path / "real" / file.relative_to(other)
    here = tmp_path / "here"
    if "linked" in how:
        here.symlink_to(tmp_path / "real")
        if how == "linked elsewhere":
            here.unlink()
            shutil.copytree(tmp_path / "real", here)
            (here / file.relative_to(other)).unlink()
            (here / file.relative_to(other)).symlink_to(there)
    else:
        here = tmp_path / "real"
    config = DataConfig(source=str(here))
    first = compute_fingerprint(config)
    assert compute_fingerprint(config) == first
    if how == "replaced":
        file.replace(there)
    elif how == "written over":
        there.write_bytes(content)
        os.utime(there, ns=(10**18, 10**18))
    elif how == "linked elsewhere":
        (here / file.relative_to(other)).unlink()
        (here / file.relative_to(other)).symlink_to(file)
    else:
        here.unlink()
        here.symlink_to(other)
    assert (here / file.relative_to(other)).stat().st_mtime_ns == 10**18
    assert compute_fingerprint(config) != first


def test_the_addresses_of_cifar10_and_idx_are_what_they_always_were(tmp_path):
    """Recorded: a change of these would orphan every stored trial and evaluation."""
    images = np.arange(30 * 3072, dtype=np.uint32).astype(np.uint8).reshape(30, 32, 32, 3)
    assert compute_fingerprint(DataConfig(source=str(write_cifar(tmp_path / "c", images)))) == "3dbb916c205ce09a"
    idx = write_idx(tmp_path / "i", images[:, :4, :4, :1], zipped=False)
    assert compute_fingerprint(DataConfig(source=str(idx))) == "0193c01da3efc38c"
    assert compute_fingerprint(DataConfig(source=str(idx), resolution=2)) == "9afe0c5fd06a00f1"


def test_the_dry_run_imports_neither_torch_nor_ray_nor_sklearn():
    code = """
import sys
from workers.config import DataConfig
from workers.data.sources import describe
describe(DataConfig(source="digits"))
print(sorted({"torch", "ray", "sklearn", "pyarrow"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- The cache ---------------------------------------------------------------------------------------------------


def test_a_prepared_set_is_opened_not_decoded_again(tmp_path, cache, monkeypatch):
    config = DataConfig(source=str(write_images(tmp_path / "d", COLOUR, LABELS)))
    first = prepare(config)
    monkeypatch.setattr(data_module, "decode", None)  # would fail if it were called
    second = prepare(config)
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable
    assert np.array_equal(second.train, first.train)
    assert {p.name for p in (cache / "data" / first.digest).iterdir()} == {"images.npy", "labels.npy", "meta.json"}


def damages(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0x20
    return {
        "a flipped bit": bytes(flipped),
        "cut": content[:-7],
        "empty": b"",
        "foreign": b"[1, 2]",
        "binary": b"\xff\0",
    }


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "foreign", "binary", "gone"])
def test_a_prepared_set_is_proven_whole_or_made_again(tmp_path, cache, caplog, name, damage):
    """Also where size and time stay, and also in the process that had it open before."""
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    path = cache / "data" / prepare(config).digest / name
    stat, content = path.stat(), path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(damages(content)[damage])
    if damage != "gone":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check(prepare(config), CIFAR)
    if name != "meta.json" or damage != "gone":
        assert [str(path) in record.getMessage() for record in caplog.records] == [True], "told once, by its name"
    caplog.clear()
    check(prepare(config), CIFAR)
    assert not caplog.records


@pytest.mark.parametrize("what", ["hashes", "surveys"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "foreign", "binary"])
def test_a_damaged_memo_is_made_again(tmp_path, cache, caplog, monkeypatch, what, damage):
    monkeypatch.setattr(survey, "SETTLED_NS", 0)
    config = DataConfig(source=str(write_images(tmp_path / "d", GREY, LABELS)))
    found = describe(config)
    [memo] = (cache / what).glob("*.json")
    content = memo.read_bytes()
    memo.write_bytes(damages(content)[damage])
    assert describe(config) == found
    assert str(memo) in caplog.text and memo.read_bytes() == content
    caplog.clear()
    assert describe(config) == found and not caplog.records


def test_a_prepared_set_under_the_name_of_another_is_not_believed(tmp_path, cache, caplog):
    ours, other = DataConfig(source=str(write_cifar(tmp_path / "d"))), DataConfig(source="gaussian")
    folder = cache / "data" / prepare(ours).digest
    shutil.copytree(folder, cache / "data" / compute_fingerprint(other))
    assert prepare(other).shape == (8, 8, 1) and "is that of another data set" in caplog.text


def test_a_big_set_is_read_through_once_on_a_machine(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(proofs, "BIG", 1)
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    folder = cache / "data" / prepare(config).digest
    proofs._proven.clear()  # as in another process
    read: list[Path] = []
    monkeypatch.setattr(proofs, "hash_file", lambda path: read.append(path) or memos.hash_file(path))
    prepare(config)
    assert not [path for path in read if path.suffix == ".npy"]
    stored = np.load(folder / "images.npy", mmap_mode="r+")
    stored[0, 0, 0, 0] ^= 1
    stored.flush()
    check(prepare(config), CIFAR)
    monkeypatch.setattr(proofs, "_read_boot_id", lambda: "another")
    proofs._proven.clear()
    read.clear()
    prepare(config)
    assert [p.name for p in read if p.suffix == ".npy"] == ["images.npy", "labels.npy"], "read through after a boot"


def test_a_folder_without_its_commit_mark_is_built_again(tmp_path, cache):
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    folder = cache / "data" / prepare(config).digest
    (folder / "meta.json").unlink()
    (folder / "images.npy").write_bytes(b"cut off")
    check(prepare(config), CIFAR)


def _prepare_in_a_process(source: str, barrier, results) -> None:
    barrier.wait()
    data = prepare(DataConfig(source=source))
    assert isinstance(data.train, np.memmap)
    built = Path(str(data.train.filename)).stat()
    sums = int(data.train.sum()), int(data.held_out.sum())
    results.put((data.digest, *sums, data.train_labels.tolist(), built.st_ino, built.st_mtime_ns))


def test_several_processes_preparing_at_once(tmp_path, cache):
    source, spawn = str(write_images(tmp_path / "d", COLOUR, LABELS)), multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_prepare_in_a_process, args=(source, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(f == found[0] for f in found), "one file, built once, the same for all"
    assert sorted(p.name for p in (cache / "data").iterdir()) == [found[0][0], f"{found[0][0]}.lock"]
    data = prepare(DataConfig(source=source))
    assert (int(data.train.sum()), int(data.held_out.sum())) == found[0][1:3]


def test_a_process_killed_while_it_decodes_leaves_nothing_that_counts(tmp_path, cache):
    images = RANDOM.integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    config = DataConfig(source=str(write_parquet(tmp_path / "d.parquet", images, None)))
    code = f"""
import itertools, os, signal
from workers.data import dataset as data
calls, decode = itertools.count(), data.decode
data.decode = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 400 else decode(*a)
data.prepare(data.DataConfig(source={config.source!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert list(cache.glob("data/*.partial")) and not list(cache.glob("data/*/meta.json"))
    data = prepare(config)
    stored = Counter(i.tobytes() for i in (*data.train, *data.held_out))
    assert stored == Counter(i.tobytes() for i in images) and not list(cache.glob("data/*.partial"))


def test_files_that_change_while_they_are_decoded_are_not_believed(tmp_path, cache, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", COLOUR)

    def decode_and_change(item, *settings):
        if item.name.endswith("row 20"):
            write_parquet(path, COLOUR[::-1])
        return decode(item, *settings)

    monkeypatch.setattr(data_module, "decode", decode_and_change)
    fails(path, "its files changed while they were decoded")
    assert [p.suffix for p in (cache / "data").iterdir()] == [".lock"]


NO_ROOM = """
import resource, sys
from workers.config import DataConfig
from workers.data.splits import DataError
from workers.data.dataset import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    prepare(DataConfig(source=sys.argv[1]))
except DataError as error:
    print(error)
"""


def test_no_room_for_the_decoded_images(tmp_path, cache):
    source = write_cifar(tmp_path / "d")
    done = subprocess.run([sys.executable, "-c", NO_ROOM, source], capture_output=True, text=True, check=True)
    assert "for which there is no room in" in done.stdout and "ORCHESTRATOR_CACHE" in done.stdout
    assert [p.suffix for p in (cache / "data").iterdir()] == [".lock"] and done.stderr == ""


# ---- Bad input: each message shows the value, what was found, and what to do --------------------------------------


def fails(source: Path | str, *words: str, **settings) -> None:
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(source=str(source), **settings))
    for word in (f"data.source = {str(source)!r}", *words):
        assert word in str(caught.value)


def test_unknown_word():
    fails("digit", "did you mean 'digits'?", "Parquet", "data_batch_*.bin", "train-images-idx3-ubyte.gz")
    fails("", "empty", "Give 'digits'")


def test_missing_path(tmp_path):
    write_images(tmp_path / "pictures", COLOUR)
    fails(tmp_path / "picturs", f"did you mean '{tmp_path / 'pictures'}'?")
    fails(tmp_path / "a" / "b", "does not exist", "Give 'digits'")


def test_unknown_kinds(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "it holds nothing", "Give 'digits'")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    fails(tmp_path / "texts", "it holds a.txt", "folder of images")
    fails("/dev/zero", "neither a file nor a folder")
    os.mkfifo(tmp_path / "texts" / "a.png")  # would be waited for
    fails(tmp_path / "texts", "it holds a.png, a.txt")
    (tmp_path / "zero").touch()
    fails(tmp_path / "zero", "0 bytes", "no format known")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    fails(tmp_path / "cifar-10-binary.tar.gz", "102 bytes", "Unpack archives first")


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    fails(tmp_path / "text.parquet", "no column img or image", "text (string), label (int64)")
    for number, column in enumerate(
        (["/etc/hostname"], [{"bytes": "/etc/hostname"}], [{"bytes": [1, 2]}], [{"bytes": 1}], [7], [[1, 2]],
         [{"data": {"bytes": b"a"}}])
    ):  # fmt: skip
        pq.write_table(pa.table({"image": column * 3}), tmp_path / f"{number}.parquet")
        found = pq.read_schema(tmp_path / f"{number}.parquet").field(0).type
        fails(tmp_path / f"{number}.parquet", "no column img or image", f"image ({found})")
    files = [encoded(i) for i in COLOUR[:3]]
    fails(write_parquet(tmp_path / "some.parquet", files, [0, -1, 2]), "row 1 has the label -1", "or -1 in all")
    assert "no labels are used" in warnings_of(write_parquet(tmp_path / "all.parquet", files, [-1, -1, -1]))
    fails(write_parquet(tmp_path / "huge.parquet", files, [0, 2**62, 2]), f"label {2**62}")
    (tmp_path / "folder.parquet").mkdir()
    fails(tmp_path / "folder.parquet", "it holds nothing")
    (tmp_path / "zero.parquet").touch()
    fails(tmp_path / "zero.parquet", "zero.parquet is damaged or cut off")
    whole = write_parquet(tmp_path / "d.parquet", COLOUR).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    fails(tmp_path / "cut.parquet", "cut.parquet is damaged or cut off")
    fails(write_parquet(tmp_path / "none.parquet", []), "has no images")
    fails(write_parquet(tmp_path / "one.parquet", COLOUR[:1]), "1 image; at least 2")
    fails(write_parquet(tmp_path / "null.parquet", [COLOUR[0], None]), "row 1 has no img.bytes")
    fails(write_parquet(tmp_path / "nolabel.parquet", COLOUR[:2], [0, None]), "row 1 has no label")
    fails(write_parquet(tmp_path / "only" / "test-0.parquet", COLOUR).parent, "test-0.parquet but no train-*.parquet")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("row", [5, 100])
def test_damaged_images_are_named(tmp_path, cache, kind, row):
    """Among the first images, which `describe` looks at, and later."""
    files = [encoded(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8), kind) for _ in range(120)]
    for name, content in {"cut": files[row][: len(files[row]) // 2], "text": b"no image", "zero": b""}.items():
        broken = [*files[:row], content, *files[row + 1 :]]
        source = write_parquet(tmp_path / f"{name}.parquet", broken, None)
        fails(
            source, f"{name}.parquet row {row} " + ("has no img.bytes" if name == "zero" else "is damaged or cut off")
        )
    folder = write_images(tmp_path / "d", RANDOM.integers(0, 256, (120, 4, 4, 3), dtype=np.uint8))
    (folder / f"{row:03}.png").write_bytes(b"")
    fails(folder, f"{row:03}.png is damaged or cut off (it is empty)")
    assert not [p for p in cache.glob("data/*") if (p / "meta.json").exists()]


def test_sizes(tmp_path):
    mixed = write_images(tmp_path / "mixed", [*COLOUR, np.zeros((5, 5, 3), np.uint8)])
    fails(mixed, "030.png is 5x5, the first image 4x4", "set data.resolution")
    wide = write_images(tmp_path / "wide", np.zeros((3, 4, 6, 3), np.uint8))
    fails(wide, "000.png is 6x4, not square", "set data.resolution")
    fails(mixed, "000.png is 4x4, smaller than data.resolution = 8", "set data.resolution to 4 or less", resolution=8)
    fails("digits", "8x8, smaller than data.resolution = 16", resolution=16)


def test_more_than_8_bits(tmp_path):
    deep = write_images(tmp_path / "deep", [np.full((4, 4), 40_000, np.uint16)] * 2)
    fails(deep, "000.png has more than 8 bits", "convert it to 8 bits")
    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # a PNG of one pixel in colour, 16 bits a channel
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(7))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    (tmp_path / "colour").mkdir()
    (tmp_path / "colour" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    fails(tmp_path / "colour", "a.png has more than 8 bits")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(touched) (w) file closefile showpage\n"


@pytest.mark.parametrize("kind", ["gif", "tiff", "ppm", "ico", "pcx", "tga", "eps"])
def test_other_formats_are_never_opened_whatever_their_name(tmp_path, kind, monkeypatch):
    """By no plugin of Pillow: each would be called on its own format, and the one of PostScript starts a program."""
    content = POSTSCRIPT if kind == "eps" else encoded(COLOUR[0], kind)
    for plugin in ("Gif", "Tiff", "Ppm", "Ico", "Pcx", "Tga", "Eps"):
        module = importlib.import_module(f"PIL.{plugin}ImagePlugin")
        for name in [n for n in vars(module) if n.endswith("ImageFile") and n not in ("ImageFile", "StubImageFile")]:
            monkeypatch.setattr(getattr(module, name), "_open", lambda self: pytest.fail("opened"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    folder = write_images(tmp_path / "d", COLOUR)
    (folder / "015.png").write_bytes(content)
    fails(folder, "015.png is damaged or cut off, or no PNG, JPEG, BMP or WebP", repr(content[:8]))
    rows = [*(encoded(i) for i in COLOUR[:5]), content]
    fails(write_parquet(tmp_path / "d.parquet", rows), "d.parquet row 5 is damaged or cut off, or no PNG")


def test_a_name_of_another_supported_format_is_no_harm(tmp_path):
    folder = write_images(tmp_path / "d", COLOUR)
    (folder / "000.png").rename(folder / "000.jfif")
    data = prepare(DataConfig(source=str(folder)))
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == Counter(i.tobytes() for i in COLOUR)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # elsewhere workers.data.decoding does it
@pytest.mark.parametrize("side", [13_000, 30_000])
def test_images_of_too_many_pixels_are_refused_by_their_header(tmp_path, side):
    (tmp_path / "d").mkdir()
    stream = io.BytesIO()
    Image.new("1", (side, 64)).save(stream, "png")
    content = bytearray(stream.getvalue())
    content[20:24] = struct.pack(">I", side)  # a lie: it is refused before a pixel is decoded
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    for k in range(12):
        (tmp_path / f"d/{k}.png").write_bytes(content)
    fails(tmp_path / "d", "0.png is", "pixels", "resize or remove it", resolution=8)


MEMORY = """
import resource, sys
from workers.config import DataConfig
from workers.data.splits import DataError
from workers.data.dataset import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(prepare(DataConfig(source=sys.argv[1], held_out=0.5)).shape)
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


def memory_of(source: Path) -> tuple[str, int]:
    """What `prepare` said, and the MB of memory that it took beyond what its libraries take."""
    done = subprocess.run([sys.executable, "-c", MEMORY, source], capture_output=True, text=True, check=True)
    text, taken = done.stdout.splitlines()
    return text, int(taken)


@pytest.mark.parametrize("shared", [True, False])
def test_a_small_parquet_file_that_unpacks_to_gigabytes(tmp_path, shared):
    """Of 60 rows of 20 MB: all of them in one dictionary entry, which is no lie; or of 20, each stored by itself."""
    row, path = encoded(COLOUR[0]) + bytes(20_000_000), tmp_path / "d.parquet"
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 60), pa.array([row], pa.binary()))
    options = {"use_dictionary": True, "dictionary_pagesize_limit": 2**30, "store_schema": False}
    if not shared:
        image, options = pa.array([row[:8_000_000]] * 20, pa.binary()), {"use_dictionary": False}
    pq.write_table(pa.table({"image": image}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    text, taken = memory_of(path)
    assert text == "(4, 4, 3)" if shared else "claims to hold 0.2 GB of images" in text
    assert taken < 800  # 2,400 where a batch holds all rows


@pytest.mark.parametrize("zipped", [True, False])
def test_an_idx_file_that_claims_four_billion_images(tmp_path, zipped):
    folder = write_idx(tmp_path / "d", zipped=zipped)
    for name in ("images-idx3", "labels-idx1"):
        path = folder / f"train-{name}-ubyte{'.gz' * zipped}"
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        content = content[:4] + struct.pack(">I", 4_000_000_000) + content[8:]
        path.write_bytes(gzip.compress(content) if zipped else content)
    fails(folder, "train-images-idx3-ubyte", "4,000,000,000 x 4 x 4", "download it again")
    assert memory_of(folder)[1] < 100


def test_more_images_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "MOST_IMAGES", 29)
    fails(write_parquet(tmp_path / "d.parquet", COLOUR), "claims 30 images, of which at most 29 are read")


def test_damage_anywhere_in_a_file_is_a_line_or_right_data(tmp_path):
    """A flipped bit in each fiftieth byte, and each fiftieth cut: nothing but DataError comes out."""
    for kind, write in WRITERS.items():
        folder = write(tmp_path / kind)
        path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 25)):
            flipped = bytearray(content)
            flipped[place] ^= 0x20
            for broken in (bytes(flipped), content[:place]):
                path.write_bytes(broken)
                try:
                    data = prepare(DataConfig(source=str(folder)))
                except DataError as error:
                    assert "\n" not in str(error)
                else:
                    assert len(data.train) > 0


def test_truncated_cifar10(tmp_path):
    path = write_cifar(tmp_path / "d") / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    fails(tmp_path / "d", "data_batch_2.bin has 30,729 bytes, not a multiple of 3,073")


@pytest.mark.parametrize("zipped", [True, False])
def test_bad_idx(tmp_path, zipped):
    end = ".gz" * zipped
    path = write_idx(tmp_path / "cut", zipped=zipped) / f"train-images-idx3-ubyte{end}"
    path.write_bytes(path.read_bytes()[:-20])
    fails(tmp_path / "cut", path.name, "cut off")
    write_idx(tmp_path / "more", zipped=zipped)
    fewer = write_idx(tmp_path / "fewer", GREY[:25], LABELS[:25], zipped=zipped)
    (tmp_path / "more" / f"t10k-labels-idx1-ubyte{end}").write_bytes(
        (fewer / f"t10k-labels-idx1-ubyte{end}").read_bytes()
    )
    fails(tmp_path / "more", "has 10 images but", "5 labels")
    path = write_idx(tmp_path / "text", zipped=zipped) / f"t10k-images-idx3-ubyte{end}"
    path.write_bytes(b"<html>not found</html>")
    fails(tmp_path / "text", path.name, "not an IDX file")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    assert describe(DataConfig(source="digits")).train == 1497, "the dry run needs no cache"
    fails("digits", "cannot be written", "ORCHESTRATOR_CACHE")
