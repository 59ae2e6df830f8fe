"""Data that are not discrete: the range of their values, of which the training images' becomes [-1, 1].

One range for all pixels and channels, or with `data.ranges: channel` one for each channel: either way what is measured
is turned into the data's own units by one number. Held-out values beyond it are kept as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
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
Ends = float | tuple[float, ...]  # of all channels, or of each
FEW = 256  # different values in a data set, which real numbers would not have
Span = tuple[Ends, Ends]  # the least value and the largest


class Spans(NamedTuple):
    train: Span
    held_out: Span
    distinct: int  # values in all, counted up to FEW and one more

    def list_warnings(self) -> Iterator[str]:
        beyond = zip(list_ranges(self.held_out), list_ranges(self.train), strict=True)
        for channel, ((least, most), (low, high)) in enumerate(beyond):
            if least < low or most > high:
                where = f" of channel {channel}" * isinstance(self.train[0], tuple)
                yield (
                    f"held-out values{where} go from {least:.6g} to {most:.6g}, beyond the {low:.6g} to {high:.6g} to "
                    "train on, which become [-1, 1]: no sample does, and the density of such values is low"
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

    `counts` are of held-out and training images. Reads all of them the first time, but for ranges that are stated.
    Raises DataError where a value is not finite, or all to train on are the same.
    """
    if not isinstance(config.ranges, str):
        lows, highs = zip(*config.ranges, strict=True)
        stated = (lows, highs) if len(lows) > 1 else (lows[0], highs[0])
        return Spans(stated, stated, FEW + 1)
    memo = cache / "ranges" / f"{compute_digest([VERSION, decoding.VERSION, content])}.json"
    if known := recall(memo):
        return Spans(read_span(known["train"]), read_span(known["held_out"]), known["distinct"])
    own = files.held_out if isinstance(files.held_out, Split) else None
    rows = number_rows(*counts, own is not None)
    apart = config.ranges == "channel"
    ends: dict[bool, list[NDArray[Any]]] = {True: [], False: []}  # the least and the largest, by whether it is held out
    values = np.empty(0)
    for row, item in zip(rows, chain(own.read() if own else (), files.train.read()), strict=True):
        pixels = decode(item, 0, config.resolution, config.background)
        check_finite(item.name, pixels)
        axes = (0, 1) if apart else None
        ends[bool(row < counts[0])].append(np.stack([pixels.min(axes), pixels.max(axes)]).astype(np.float64))
        values = values if len(values) > FEW else np.union1d(values, pixels)
    train, held_out = (_join_ends(some) for some in (ends[False], ends[True]))
    for channel, (low, high) in enumerate(list_ranges(train)):
        if not low < high or math.isinf(high - low):
            why = f"are all {low:g}" if low == high else f"go from {low:g} to {high:g}, too far apart"
            where = f" in channel {channel}" * apart
            raise DataError(f"the values to train on{where} {why}; give data that differ")
    found = Spans(train, held_out, min(len(values), FEW + 1))
    remember(memo, found._asdict())
    return found


def _join_ends(parts: list[NDArray[Any]]) -> Span:
    """The range of all of these: each is the least values and the largest, of an image or of each of its channels."""
    every = np.stack(parts)
    return read_span([every[:, 0].min(0).tolist(), every[:, 1].max(0).tolist()])


def read_span(ends: Sequence[Any]) -> Span:
    """As JSON has it."""
    low, high = (tuple(end) if isinstance(end, list | tuple) else float(end) for end in ends)
    return low, high


def list_ranges(span: Span) -> list[tuple[float, float]]:
    """The least value and the largest: one pair, or one for each channel."""
    return [(float(low), float(high)) for low, high in zip(*map(np.atleast_1d, span), strict=True)]


def show_span(span: Span, digits: int) -> str:
    return ", ".join(f"{low:.{digits}g} to {high:.{digits}g}" for low, high in list_ranges(span))


def check_stated(config: DataConfig, channels: int) -> None:
    """Raises DataError where `data.ranges` are no ranges of so many channels."""
    if isinstance(config.ranges, str):
        return
    if len(config.ranges) not in (1, channels):
        one = f" or one for each of {channels} channels" * (channels > 1)
        raise DataError(f"data.ranges: there are {len(config.ranges)}; give one for all values{one}")
    if wrong := [[low, high] for low, high in config.ranges if not low < high]:
        raise DataError(f"data.ranges: {wrong[0]} is no range; give [low, high], the lower number first")


def check_finite(name: str, pixels: Pixels) -> None:
    """Raises DataError with the place of the first value that is none."""
    if np.isfinite(pixels).all():
        return
    row, column, channel = np.argwhere(~np.isfinite(pixels))[0]
    raise DataError(
        f"{show_name(name)} has {pixels[row, column, channel]} at row {row}, column {column}, channel {channel}; "
        "every value must be finite: fill it in, or leave the image out"
    )


def scale_to_unit(values: NDArray[Any], span: Span) -> Float32[np.ndarray, "..."]:
    """`span` to [-1, 1]; the last axis is that of channels."""
    low, high = map(np.asarray, span)
    return ((values.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32)


def scale_from_unit(values: NDArray[Any], span: Span) -> Float32[np.ndarray, "..."]:
    """[-1, 1] to `span`; the last axis is that of channels."""
    low, high = map(np.asarray, span)
    return ((values.astype(np.float64) + 1) * ((high - low) / 2) + low).astype(np.float32)


def compute_unit_bits(span: Span) -> float:
    """What -log2 of a density on the scale of [-1, 1] gets more a dimension in the data's own units."""
    return float(np.mean([math.log2((high - low) / 2) for low, high in list_ranges(span)]))
