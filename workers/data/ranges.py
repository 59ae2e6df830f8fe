"""Data that are not discrete: the range of their values, of which the training images' becomes [-1, 1].

One range for all pixels and channels, so that what is measured is turned into the data's own units by one number.
Held-out values beyond it are kept as they are.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from workers.config import DataConfig
from workers.data import decoding
from workers.data.decoding import Pixels, decode
from workers.data.order import number_rows
from workers.data.splits import DataError, show_name
from workers.data.tree import Files, Split
from workers.identity import compute_digest
from workers.memos import recall, remember

VERSION = 1  # of what a note of ranges holds
FEW = 256  # different values in a data set, which real numbers would not have
Span = tuple[float, float]  # the least value and the largest


class Spans(NamedTuple):
    train: Span
    held_out: Span
    distinct: int  # values in all, counted up to FEW and one more

    def list_warnings(self) -> Iterator[str]:
        (low, high), (least, most) = self.train, self.held_out
        if least < low or most > high:
            yield (
                f"held-out values go from {least:.6g} to {most:.6g}, beyond the {low:.6g} to {high:.6g} to train on, "
                "which become [-1, 1]: no sample does, and the density of such values is low"
            )
        if self.distinct <= FEW:
            yield (
                f"its values are {self.distinct} different ones, so that they are discrete, and a density of them has "
                "no bound; save them as whole numbers of uint8 or uint16"
            )


def find_spans(
    config: DataConfig, files: Files, content: Mapping[str, Any], *, counts: tuple[int, int], cache: Path
) -> Spans:
    """The ranges of what the images of both splits become, remembered by `content`, which their address is made of.

    `counts` are of held-out and training images. Reads all of them the first time. Raises DataError where a value is
    not finite, or all to train on are the same.
    """
    memo = cache / "ranges" / f"{compute_digest([VERSION, decoding.VERSION, content])}.json"
    if known := recall(memo):
        return Spans(tuple(known["train"]), tuple(known["held_out"]), known["distinct"])
    own = files.held_out if isinstance(files.held_out, Split) else None
    rows = number_rows(*counts, own is not None)
    spans = {True: (math.inf, -math.inf), False: (math.inf, -math.inf)}  # by whether it is held out
    values = np.empty(0)
    for row, item in zip(rows, chain(own.read() if own else (), files.train.read()), strict=True):
        pixels = decode(item, 0, config.resolution, config.background)
        _check_finite(item.name, pixels)
        is_held_out = bool(row < counts[0])
        low, high = spans[is_held_out]
        spans[is_held_out] = min(low, float(pixels.min())), max(high, float(pixels.max()))
        values = values if len(values) > FEW else np.union1d(values, pixels)
    low, high = spans[False]
    if not low < high or math.isinf(high - low):
        why = f"are all {low:g}" if low == high else f"go from {low:g} to {high:g}, too far apart"
        raise DataError(f"the values to train on {why}; give data that differ")
    found = Spans(spans[False], spans[True], min(len(values), FEW + 1))
    remember(memo, found._asdict())
    return found


def _check_finite(name: str, pixels: Pixels) -> None:
    """Raises DataError with the place of the first value that is none."""
    if np.isfinite(pixels).all():
        return
    row, column, channel = np.argwhere(~np.isfinite(pixels))[0]
    raise DataError(
        f"{show_name(name)} has {pixels[row, column, channel]} at row {row}, column {column}, channel {channel}; "
        "every value must be finite: fill it in, or leave the image out"
    )


def scale_to_unit(values: NDArray[Any], span: Span) -> Float32[np.ndarray, "..."]:
    """`span` to [-1, 1]."""
    low, high = span
    return ((values.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32)


def scale_from_unit(values: NDArray[Any], span: Span) -> Float32[np.ndarray, "..."]:
    """[-1, 1] to `span`."""
    low, high = span
    return ((values.astype(np.float64) + 1) * ((high - low) / 2) + low).astype(np.float32)


def compute_unit_bits(span: Span) -> float:
    """What -log2 of a density on the scale of [-1, 1] gets more a dimension in the data's own units."""
    low, high = span
    return math.log2((high - low) / 2)
