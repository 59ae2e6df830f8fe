"""One image: what its header tells, and its pixels. Foreign bytes are opened here and nowhere else.

Only FORMATS are ever opened, told by the content, whatever the name says: Pillow knows others, some of which start
programs (PostScript: Ghostscript). A header's size is held against MOST_PIXELS before memory is asked for.

`look` reads headers, and pixels only where a palette leaves it open whether they are grey. `decode` returns the image
upright by its EXIF orientation (as Hugging Face's datasets does), transparent pixels composited on a colour, in 8 bits
a channel, grey in 16 or grey in floats, and cropped and resized where that is asked for.
"""

import io
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from workers.data.splits import DataError, show_name
from workers.sides import Resolution, get_sides, show_resolution

VERSION = 2  # of what encoded images become; 1: transparent pixels showed what is hidden under them
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # as Pillow calls them
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp")
TIFF = (".tif", ".tiff")  # which are opened as TIFF and nothing else, and read where there are no others
MOST_PIXELS = 2**26  # of one image, before it is resized: 8192 x 8192, which takes 256 MB or more while it is decoded
BIG = 2**23  # pixels of an image from which on they are decoded one at a time
ORIENTATION = 0x0112  # the tag of EXIF; from 5 on width and height are swapped
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
          NotImplementedError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
          Image.DecompressionBombError)  # fmt: skip

# Pillow warns of images that are refused here in our own words.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Pixels = NDArray[Any]  # HWC, of the type that `choose_type` names
Colour = tuple[int, int, int]  # red, green, blue in 0..255
_alone = threading.Lock()
BYTES, DEEP, FLOATS = "8 bits", "16 bits", "floats"  # depths of a channel


class Item(NamedTuple):
    """One image as its source holds it."""

    name: str  # for messages: the file, or the file and row
    image: bytes | Path | Pixels  # encoded, or pixels
    label: int | None = None
    vectors: NDArray[np.float32] | None = None  # (length, width), where data.condition names a column of them


class Look(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int  # upright
    height: int
    colour: bool  # False where all that can be seen of it is grey
    transparent: bool  # has transparent pixels, or might
    animated: bool  # has more pictures than the first
    depth: str  # BYTES, DEEP or FLOATS: of a channel


def choose_type(levels: int | None) -> type[np.uint8 | np.uint16 | np.float32]:
    """What pixels of so many levels are stored as; of None, those that are not discrete."""
    return np.float32 if levels is None else np.uint8 if levels <= 256 else np.uint16


@contextmanager
def explain_damage(name: str) -> Iterator[None]:
    """What PIL, pyarrow and gzip raise on damaged content becomes a message that names the file or row."""
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split(" <_io.")[0].split())  # PIL shows the address of the stream
        raise DataError(
            f"{show_name(name)} is damaged or cut off ({reason or type(error).__name__}); copy it again or remove it"
        ) from error


def look(item: Item) -> Look:
    """Raises DataError where the image cannot be decoded as far as its header tells."""
    with _open_image(item) as image, explain_damage(item.name):
        turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
        animated = image.format in ("PNG", "WEBP", "TIFF") and getattr(image, "n_frames", 1) > 1
        return Look(width, height, _is_coloured(image), image.has_transparency_data, animated, _find_depth(image))


def decode(item: Item, channels: int, resolution: Resolution | None, background: Colour) -> Pixels:
    """HWC. With `resolution`: its centre cropped to that shape, then resized by LANCZOS (as EDM's dataset_tool.py)."""
    image = item.image if isinstance(item.image, np.ndarray) else _load(item, background)
    if isinstance(image, Image.Image) and (depth := _find_depth(image)) != BYTES:
        image = np.asarray(image)[..., None].astype(np.uint16 if depth == DEEP else np.float32)
    if isinstance(image, np.ndarray):
        if resolution is None:
            return image
        if image.dtype != np.uint8 or channels not in (1, 3):
            return _resize_channels(item.name, image, resolution)
        image = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if resolution is not None:
        image = _resize(item.name, image, resolution)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _resize(name: str, image: Image.Image, resolution: Resolution) -> Image.Image:
    check_resolution(name, image.width, image.height, resolution)
    height, width = get_sides(resolution)
    scale = min(image.height / height, image.width / width)
    crop_height, crop_width = round(height * scale), round(width * scale)
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _resize_channels(name: str, pixels: Pixels, resolution: Resolution) -> Pixels:
    """`_resize` of each channel by itself, within the type's range; of floats, within that of the image."""
    channels = [
        _resize(name, Image.fromarray(channel), resolution) for channel in np.moveaxis(pixels, 2, 0).astype("f4")
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], axis=2)
    if pixels.dtype.kind == "f":
        return resized.clip(pixels.min(), pixels.max())
    return np.rint(resized).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def check_resolution(name: str, width: int, height: int, resolution: Resolution) -> None:
    """Raises DataError where an image would have to be enlarged."""
    most_height, most_width = get_sides(resolution)
    if height < most_height or width < most_width:
        fitting = min(width, height) if isinstance(resolution, int) else [height, width]
        raise DataError(
            f"{show_name(name)} is {width}x{height}, smaller than data.resolution = {show_resolution(resolution)}; "
            f"enlarging adds no detail: set data.resolution to {fitting} or less, or leave such images out"
        )


def check_size(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise DataError(
            f"{name} is {found[1]}x{found[0]}, the first image {expected[1]}x{expected[0]}; "
            "set data.resolution to crop and resize all to one size"
        )


@contextmanager
def _open_image(item: Item) -> Iterator[Image.Image]:
    """The image by its header, of a format that is supported and a size that can be decoded. Raises DataError."""
    assert not isinstance(item.image, np.ndarray)
    name = show_name(item.name)
    with explain_damage(item.name):
        stream = io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image.open("rb")
    with stream:
        try:
            with explain_damage(item.name):
                head = stream.read(8)
                if not head:
                    raise EOFError("it is empty")
                stream.seek(0)
                image: Image.Image = Image.open(stream, formats=_choose_formats(item))
        except DataError as error:
            match error.__cause__:
                case UnidentifiedImageError():
                    raise DataError(
                        f"{name} is damaged or cut off, or no {_list_formats(item)}: it begins with {head!r}; convert "
                        "it, copy it again or remove it"
                    ) from error
                case Image.DecompressionBombError():
                    raise DataError(f"{name} is of more than {MOST_PIXELS:,} pixels; resize or remove it") from error
            raise
        if image.width * image.height > MOST_PIXELS:
            raise DataError(
                f"{name} is {image.width:,}x{image.height:,}, {image.width * image.height / 1e6:,.0f} million pixels, "
                f"of which at most {MOST_PIXELS / 1e6:.0f} million are decoded; resize or remove it"
            )
        deep = image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", ""))
        own = _find_depth(image) != BYTES
        if (deep and not own) or (own and image.has_transparency_data):
            raise DataError(
                f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits, or to opaque grey "
                "of 16, or as TIFF of floats (mode F)"
            )
        yield image


def _choose_formats(item: Item) -> tuple[str, ...]:
    return ("TIFF",) if isinstance(item.image, Path) and item.image.suffix.lower() in TIFF else FORMATS


def _list_formats(item: Item) -> str:
    return "TIFF" if _choose_formats(item) == ("TIFF",) else "PNG, JPEG, BMP or WebP"


def _find_depth(image: Image.Image) -> str:
    """DEEP or FLOATS where it is grey of so much, else BYTES."""
    return FLOATS if image.mode == "F" else DEEP if image.mode.startswith("I;16") else BYTES


def _load(item: Item, background: Colour) -> Image.Image:
    """The image of 8 bits a channel, or grey of 16 or in floats, upright, all of it opaque."""
    with (
        _open_image(item) as image,
        _alone if image.width * image.height > BIG else nullcontext(),
        explain_damage(item.name),
    ):
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        if not image.has_transparency_data:
            return image
        mode = "RGB" if image.mode not in ("1", "L", "LA", "La") or len(set(background)) > 1 else "L"
        base = Image.new("RGBA", image.size, (*background, 255))
        base.alpha_composite(image.convert("RGBA"))
        return base.convert(mode)


def _is_coloured(image: Image.Image) -> bool:
    """Whether an image has colours by its mode; one with a palette, by what can be seen of it."""
    if image.mode not in ("P", "PA"):
        return image.mode not in ("1", "L", "LA", "La") and _find_depth(image) == BYTES
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    if (palette == palette[:, :1]).all():
        return False
    pixels = np.asarray(image.convert("RGBA"))
    seen = pixels[pixels[..., 3] > 0]
    return bool((seen[:, :3] != seen[:, :1]).any())
