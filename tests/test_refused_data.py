"""Bad data: each message shows the value, what was found, and what to do."""

import gzip
import importlib
import io
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import image_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import (
    COLOUR,
    GREY,
    LABELS,
    RANDOM,
    WRITERS,
    encoded,
    fails,
    warnings_of,
    write_cifar,
    write_idx,
    write_images,
    write_parquet,
)
from PIL import Image

from workers.config import DataConfig
from workers.data import locate
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.data.splits import DataError

cache = image_files.cache


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
    fails(tmp_path / "cifar-10-binary.tar.gz", "102 bytes", "Unpack other archives first")


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
    told = "000.png is 6x4, smaller than data.resolution = [4, 8]"
    fails(wide, told, "set data.resolution to [4, 6] or less", resolution=(4, 8))
    fails(mixed, "000.png is 4x4, smaller than data.resolution = 8", "set data.resolution to 4 or less", resolution=8)
    fails("digits", "8x8, smaller than data.resolution = 16", resolution=16)


def test_more_than_8_bits(tmp_path):
    deep = write_images(tmp_path / "deep", [*GREY[:2], np.full((4, 4), 40_000, np.uint16)])
    fails(deep, "000.png has 8 bits a channel and 002.png has 16 bits a channel; convert all")
    clear = write_images(tmp_path / "clear", [])
    (tmp_path / "clear").mkdir()
    (clear / "a.png").write_bytes(encoded(np.full((4, 4), 40_000, np.uint16), transparency=40_000))
    fails(clear, "a.png has more than 8 bits", "convert it to 8 bits, or to opaque grey of 16")
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
