"""Between pixels and the model's scale, and pictures for people."""

import io
import math

import torch
from PIL import Image
from torch import Tensor


def to_model(images: Tensor, levels: int) -> Tensor:
    """uint8 NHWC in 0..levels-1 -> float32 NCHW in [-1, 1]."""
    return (images.float() * (2 / (levels - 1)) - 1).permute(0, 3, 1, 2).contiguous()


def to_levels(x: Tensor, levels: int) -> Tensor:
    """float NCHW -> uint8 NHWC: clipped to [-1, 1] and rounded to the nearest of the `levels`."""
    scaled = (x.clamp(-1, 1) + 1) * ((levels - 1) / 2)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid_png(images: Tensor, levels: int, side: int = 400) -> bytes:
    """A square grid of uint8 NHWC images, enlarged by a whole factor of at least 3 to about `side` pixels, as PNG."""
    n, height, width, channels = images.shape
    columns = math.isqrt(n)
    rows = n // columns
    picture = images[: rows * columns].reshape(rows, columns, height, width, channels).permute(0, 2, 1, 3, 4)
    flat = picture.reshape(rows * height, columns * width, channels).cpu()
    bytes_ = (flat.float() * (255 / (levels - 1))).round().to(torch.uint8).squeeze(-1).numpy()
    factor = max(3, round(side / bytes_.shape[0]))
    image = Image.fromarray(bytes_).resize(
        (bytes_.shape[1] * factor, bytes_.shape[0] * factor), Image.Resampling.NEAREST
    )
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
