"""Laws of workers/data.py, on small files of every format that the tests write themselves."""

import gzip
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers.config import DataConfig
from workers.data import Dataset, describe, fingerprint, prepare
from workers.formats import GAUSSIAN_SD, DataError

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
    assert fingerprint(DataConfig(source="digits")) == "924f3600e25a8720"
    assert fingerprint(DataConfig(source="gaussian")) == "1d32f19783661f04"


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


def test_channels_follow_the_first_images_and_later_ones_are_converted(tmp_path):
    colour = write_images(tmp_path / "colour", COLOUR[:5])
    (colour / "grey.png").write_bytes(encoded(GREY[0]))
    (colour / "alpha.png").write_bytes(encoded(np.concatenate([COLOUR[0], GREY[0]], 2)))
    Image.fromarray(GREY[1].squeeze()).convert("P").save(colour / "palette.png")
    Image.fromarray(COLOUR[1]).convert("CMYK").save(colour / "cmyk.jpg")
    assert prepare(DataConfig(source=str(colour))).shape == (4, 4, 3)
    assert prepare(DataConfig(source=str(write_images(tmp_path / "grey", GREY)))).shape == (4, 4, 1)
    few_grey = write_parquet(tmp_path / "d.parquet", [GREY[0], *COLOUR[1:]])  # one grey image first makes no grey set
    assert describe(DataConfig(source=str(few_grey))).shape == (4, 4, 3)


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


def test_hidden_and_other_files_are_no_images(tmp_path):
    folder = write_images(tmp_path / "d", COLOUR)
    for name in (".hidden.png", ".checkpoints/001.png", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"none")
    assert describe(DataConfig(source=str(folder))).train == 27


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
    address = fingerprint(DataConfig(source=str(here)))
    assert len(address) == 16 and int(address, 16) >= 0
    assert describe(DataConfig(source=str(here))).digest == prepare(DataConfig(source=str(here))).digest == address
    assert describe(DataConfig(source=str(here))).format == kind
    there.parent.mkdir()
    here.rename(there)
    assert fingerprint(DataConfig(source=str(there))) == address
    monkeypatch.chdir(there.parent)
    assert fingerprint(DataConfig(source="there")) == address, "relative to the current directory"
    monkeypatch.setenv("HOME", str(there.parent))
    assert fingerprint(DataConfig(source="~/there")) == address


@pytest.mark.parametrize("kind", WRITERS)
def test_one_changed_byte_changes_the_address(tmp_path, kind):
    folder = WRITERS[kind](tmp_path / "d")
    addresses = {fingerprint(DataConfig(source=str(folder)))}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # size and, within a clock tick, time stay as they were
        path.write_bytes(content)
        addresses.add(fingerprint(DataConfig(source=str(folder))))
    assert len(addresses) == 1 + sum(p.is_file() for p in folder.rglob("*"))


def test_the_address_follows_what_changes_the_decoded_result(tmp_path):
    whole, split = write_images(tmp_path / "whole", COLOUR), write_cifar(tmp_path / "split")

    def address(source, **settings):
        return fingerprint(DataConfig(source=str(source), **settings))

    assert len({address(whole), address(whole, resolution=2), address(whole, held_out=0.5)}) == 3
    assert address(whole) == address(whole, held_out=0.101), "3 of 30 either way"
    assert address(whole) == address(whole, flip=True), "mirroring is done while training"
    assert address(split) == address(split, held_out=0.5), "it has its own test split"
    (whole / "000.png").rename(whole / "renamed.png")
    assert address(whole) != address(write_images(tmp_path / "again", COLOUR)), "names carry the order and the classes"


def test_hashes_are_remembered_until_a_file_changes(tmp_path, cache):
    path = write_parquet(tmp_path / "d.parquet", COLOUR)
    config = DataConfig(source=str(path))
    address = fingerprint(config)
    assert not list(cache.glob("hashes/*")), "a file this young may change again unseen"
    os.utime(path, ns=(10**18, 10**18))
    assert fingerprint(config) == address
    (memo,) = cache.glob("hashes/*.json")
    entries = json.loads(memo.read_text())
    entries[str(path)][2] = "remembered"
    memo.write_text(json.dumps(entries))
    assert fingerprint(config) != address, "the memo is used: the file was not read again"
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert fingerprint(config) == address, "another time of change: read again"


def test_the_dry_run_imports_neither_torch_nor_ray_nor_sklearn():
    code = """
import sys
from workers.data import DataConfig, describe
describe(DataConfig(source="digits"))
print(sorted({"torch", "ray", "sklearn", "pyarrow"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- The cache ---------------------------------------------------------------------------------------------------


def test_a_prepared_set_is_opened_not_decoded_again(tmp_path, cache):
    config = DataConfig(source=str(write_images(tmp_path / "d", COLOUR, LABELS)))
    first = prepare(config)
    files = {p: p.stat().st_mtime_ns for p in (cache / "data" / first.digest).iterdir()}
    stored = np.load(cache / "data" / first.digest / "images.npy", mmap_mode="r+")
    stored[:] = 7  # a mark that a second decoding would wipe out
    stored.flush()
    second = prepare(config)
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable and (second.train == 7).all()
    assert set(files) == set((cache / "data" / first.digest).iterdir())


def test_a_folder_without_its_commit_mark_is_built_again(tmp_path, cache):
    config = DataConfig(source=str(write_cifar(tmp_path / "d")))
    folder = cache / "data" / prepare(config).digest
    (folder / "meta.json").unlink()
    (folder / "images.npy").write_bytes(b"cut off")
    check(prepare(config), CIFAR)


def _prepare_in_a_process(source: str, barrier, results) -> None:
    barrier.wait()
    data = prepare(DataConfig(source=source))
    built = Path(data.train.filename).stat()
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
from workers import data
calls, decode = itertools.count(), data._decode
data._decode = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 400 else decode(*a)
data.prepare(data.DataConfig(source={config.source!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert list(cache.glob("data/*.partial")) and not list(cache.glob("data/*/meta.json"))
    data = prepare(config)
    stored = Counter(i.tobytes() for i in (*data.train, *data.held_out))
    assert stored == Counter(i.tobytes() for i in images) and not list(cache.glob("data/*.partial"))


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
    (tmp_path / "zero").touch()
    fails(tmp_path / "zero", "0 bytes", "no format known")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    fails(tmp_path / "cifar-10-binary.tar.gz", "102 bytes", "Unpack archives first")


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    fails(tmp_path / "text.parquet", "no column img or image", "text (string), label (int64)")
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "names.parquet")
    fails(tmp_path / "names.parquet", "no column img or image", "image (string)")
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
    fails(folder, f"{row:03}.png is damaged or cut off")
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
