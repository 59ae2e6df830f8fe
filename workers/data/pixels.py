"""Between pixels and the model's scale, and pictures for people."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from workers.data.decoding import choose_type

WIDE = 10_000  # pixels, as of signals
Levels = int | None  # of a data set; None: it is not discrete, and its images are float32 in [-1, 1]


def to_model(images: Tensor, levels: Levels) -> Tensor:
    """NHWC in 0..levels-1 -> float32 NCHW in [-1, 1]; what is not discrete is there already."""
    x = images if levels is None else images.float() * (2 / (levels - 1)) - 1
    return x.permute(0, 3, 1, 2).contiguous()


def to_data(x: Tensor, levels: Levels) -> Tensor:
    """float NCHW -> NHWC as the data are kept: clipped to [-1, 1], and in `levels` rounded to the nearest of them."""
    return _keep_real(x) if levels is None else _make_whole(_scale(x, levels).round(), levels)


def to_data_truncated(x: Tensor, levels: Levels) -> Tensor:
    """As `to_data`, but rounded towards 0, as the code of several papers casts to bytes: half a level darker."""
    return _keep_real(x) if levels is None else _make_whole(_scale(x, levels), levels)


def _keep_real(x: Tensor) -> Tensor:
    return x.float().clamp(-1, 1).permute(0, 2, 3, 1).contiguous()


def _scale(x: Tensor, levels: int) -> Tensor:
    return (x.clamp(-1, 1) + 1) * ((levels - 1) / 2)


def _make_whole(x: Tensor, levels: int) -> Tensor:
    whole = torch.from_numpy(np.empty(0, choose_type(levels))).dtype
    return x.to(whole).permute(0, 2, 3, 1).contiguous()


QUANTISERS: dict[str, Callable[[Tensor, Levels], Tensor]] = {"round": to_data, "truncate": to_data_truncated}


def to_picture(images: Tensor, levels: Levels) -> Tensor:
    """NHWC in `levels` -> float in 0..255, grey or in colour: of other numbers of channels side by side, each grey."""
    shown = images.cpu().float()
    shown = (shown.clamp(-1, 1) + 1) * 127.5 if levels is None else shown * (255 / (levels - 1))
    if shown.shape[3] not in (1, 3):
        shown = shown.permute(0, 1, 3, 2).flatten(2)[..., None]
    return shown


def draw_grid(
    images: Tensor, levels: Levels, side: int = 400, columns: int | None = None, names: Sequence[str] = ()
) -> bytes:
    """A grid of NHWC images, square unless `columns` are given, a grey line between them, as PNG.

    A last row that the images do not fill ends in grey. Enlarged by a whole factor of at least 3, to about `side`
    pixels of height, unless it is WIDE. `names` stand at the left of the rows.
    """
    columns = columns or math.isqrt(len(images) - 1) + 1
    shown = to_picture(images, levels).permute(0, 3, 1, 2)
    tiles = F.pad(shown, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=128)
    n, channels, height, width = tiles.shape
    rows = tiles.reshape(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    flat = rows.reshape(n // columns * height, columns * width, channels)[:-1, :-1]
    bytes_ = flat.round().to(torch.uint8).squeeze(-1).numpy()
    factor = max(3, round(side / bytes_.shape[0])) if bytes_.shape[1] < WIDE else 1
    image = Image.fromarray(bytes_).resize(
        (bytes_.shape[1] * factor, bytes_.shape[0] * factor), Image.Resampling.NEAREST
    )
    if names:
        image = _write_names(image, names, height * factor)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _write_names(image: Image.Image, names: Sequence[str], height: int) -> Image.Image:
    """The image with a name beside each of its rows, which are so many pixels high; what the font lacks is a ?."""
    font = ImageFont.load_default()
    shown = [name[:20].encode("ascii", "replace").decode() for name in names]
    margin = 8 + max(math.ceil(font.getlength(name)) for name in shown)
    page = Image.new(image.mode, (margin + image.width, image.height), "white")
    page.paste(image, (margin, 0))
    for row, name in enumerate(shown):
        ImageDraw.Draw(page).text((4, (row + 0.5) * height - 6), name, fill="black", font=font)
    return page
