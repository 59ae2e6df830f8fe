"""What pixels are read as: channels, palettes, transparency, orientation, sizes."""

import io
from collections import Counter
from pathlib import Path

import image_files
import numpy as np
import pytest
from image_files import COLOUR, GREY, check, encoded, write_idx, write_images, write_parquet
from PIL import Image

from workers.config import DataConfig
from workers.data.dataset import prepare
from workers.data.sources import compute_fingerprint, describe, describe_source

cache = image_files.cache


# ---- Round trips -------------------------------------------------------------------------------------------------


def test_jpeg_is_what_pillow_decodes(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8)[:, :, None].repeat(3, 2)
    files = [encoded(smooth + np.uint8(20 * i), "jpeg", quality=95) for i in range(4)]
    data = prepare(DataConfig(source=str(write_parquet(tmp_path / "d.parquet", files))))
    expected = Counter(np.asarray(Image.open(io.BytesIO(f))).tobytes() for f in files)
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == expected


# ---- Splits, labels, channels, resolution ------------------------------------------------------------------------


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


def test_images_that_are_not_square(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8)
    source = str(write_images(tmp_path / "d", images))
    data = prepare(DataConfig(source=source))
    assert data.shape == (4, 6, 3)
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == Counter(i.tobytes() for i in images)
    assert "6x4 in colour" in describe_source(describe(DataConfig(source=source)))


@pytest.mark.parametrize("turned", [False, True])
def test_a_resolution_of_two_sides_crops_the_centre_to_their_shape(tmp_path, turned):
    images = np.zeros((2, 9, 20, 3), np.uint8)
    images[:, :, 4:16] = 200  # of the shape 3 x 4, so that any resize keeps its value
    images = images.transpose(0, 2, 1, 3) if turned else images
    sides = (4, 3) if turned else (3, 4)
    config = DataConfig(source=str(write_images(tmp_path / "d", images)), resolution=sides)
    data = prepare(config)
    assert describe(config).shape == data.shape == (*sides, 3)
    assert (data.train == 200).all() and (data.held_out == 200).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits(tmp_path, kind):
    """Pillow's own resize of each value is the expected one."""
    images = np.random.default_rng(0).integers(0, 2**16, (30, 4, 6, 1), np.uint16)[:, :, 1:5]
    source = write_images(tmp_path / "d", images, kind=kind)
    data = prepare(DataConfig(source=str(source)))
    assert (data.levels, data.shape, data.train.dtype) == (2**16, (4, 4, 1), np.uint16)
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == Counter(i.tobytes() for i in images)
    assert "4x4 grey in 65536 levels" in describe_source(describe(DataConfig(source=str(source))))
    small = prepare(DataConfig(source=str(source), resolution=2))
    resized = [Image.fromarray(i[..., 0].astype(np.float32)).resize((2, 2), Image.Resampling.LANCZOS) for i in images]
    expected = sorted(np.rint(np.asarray(i)).clip(0, 2**16 - 1).tolist() for i in resized)
    assert sorted(i[..., 0].tolist() for i in (*small.train, *small.held_out)) == expected


def test_tiff_is_read_where_there_are_no_other_images(tmp_path):
    folder = write_images(tmp_path / "d", COLOUR, kind="tiff")
    check_all = Counter(i.tobytes() for i in COLOUR)
    data = prepare(DataConfig(source=str(folder)))
    assert Counter(i.tobytes() for i in (*data.train, *data.held_out)) == check_all
    write_images(folder, COLOUR[:9])
    source = describe(DataConfig(source=str(folder)))
    assert source.train + source.held_out == 9 and source.warnings == (
        "left out: 30 .tiff (000.tiff, 001.tiff and 28 more); convert them to PNG",
    )


def test_exif_orientation_is_applied(tmp_path):
    picture, exif = np.zeros((8, 8), np.uint8), Image.Exif()
    picture[:4] = 255  # white above black; turned by 180 degrees: black above white
    exif[0x0112] = 3
    files = [encoded(picture, exif=exif)] * 2
    data = prepare(DataConfig(source=str(write_parquet(tmp_path / "d.parquet", files))))
    assert np.array_equal(data.train[0, :, :, 0], picture[::-1])


def test_images_of_one_pixel(tmp_path):
    folder = write_idx(tmp_path / "d", GREY[:, :1, :1])
    check(prepare(DataConfig(source=str(folder))), GREY[:, :1, :1])
    assert prepare(DataConfig(source=str(folder), resolution=1)).shape == (1, 1, 1)
