"""NumPy's arrays in .npz and .npy: one of images, N x H x W or N x H x W x C, and perhaps one of N labels, a split.

Or one of signals, N x length (x C), or of volumes, N x depth x H x W (x C), where `data.dimensions` says so.

Read a piece at a time. What a header claims is held against its file before memory is asked for, and nothing that is
pickled is ever loaded.
"""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from workers.data.decoding import MOST_PIXELS, Item, explain_damage
from workers.data.splits import HELD_OUT, DataError, list_names, show_name, split_name
from workers.data.tree import Files, Split, Tree, warn_of_missing_labels
from workers.sides import fold

SUFFIXES = (".npz", ".npy")
ROLES = {"images": ("images", "image", "x", ""), "labels": ("labels", "label", "y")}  # and the names that they have
# And their levels; None: not discrete.
TYPES = {"uint8": 2**8, "uint16": 2**16, "float16": None, "float32": None, "float64": None}
MOST_CHANNELS = 64
# What to do about arrays of so many axes, which are none of images.
FORMS = {
    2: "of signals, N x length, set data.dimensions: 1",
    5: "of volumes, N x depth x height x width x channels, set data.dimensions: 3",
}
PIECE = 2**24  # bytes that are read at a time, where an image has fewer
DEFLATE = 1032  # the most bytes that zip makes of one
NAMES = "call it images, or train_images and test_images, and their labels labels, or train_labels and test_labels"


@dataclass(frozen=True)
class Stored:
    """An array as its header describes it."""

    path: Path
    member: str  # of an .npz; empty in an .npy
    file: str  # its name at the source
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        """For messages."""
        return show_name(f"{self.member} of {self.file}" if self.member else self.file)

    def __str__(self) -> str:
        return f"{self.name} ({' x '.join(map(str, self.shape))}, {self.dtype})"


def find_arrays(tree: Tree) -> Files | None:
    """An .npz, an .npy with images alone, or a folder of such.

    The names of arrays, of files and of folders say which split an array is of and whether it holds images or labels:
    train_images, x_train, train.npz with images and labels, test/images.npy.
    """
    names = tree.list_matching(*SUFFIXES)
    if not names:
        return None
    arrays = [array for name in names for array in _list_arrays(tree.get_path(name), name)]
    if tree.is_file and names[0].lower().endswith(".npy"):
        found = {("", "images"): arrays}
    else:
        found = {}
        for array in arrays:
            found.setdefault(_read_name(array, tree.is_file), []).append(array)
    images = {split: _take_one(some) for (split, role), some in found.items() if role == "images"}
    labels = {split: _take_one(some) for (split, role), some in found.items() if role == "labels"}
    held_out = _choose_held_out(images, arrays)
    used = [next(iter(images)) if held_out == "" else "train"] + [held_out] * bool(held_out)
    for split in used:
        _check_images(images[split], images[used[0]], tree.dimensions)
    first, dimensions = images[used[0]], tree.dimensions
    shape = *fold(first.shape[1 : 1 + dimensions]), (*first.shape, 1)[1 + dimensions]
    splits = [_make_split(images[split], labels.get(split), shape) for split in used]
    taken = [part[split] for split in used for part in (images, labels) if split in part]
    others = [array.name for array in arrays if array not in taken]
    where = [images[split].name for split in used]
    return Files(
        _list_paths(used, images, labels),
        splits[0],
        splits[1] if splits[1:] else None,
        levels=TYPES[first.dtype.name],
        sides=() if dimensions == 2 else first.shape[1 : 1 + dimensions],
        like=np.zeros(shape, first.dtype.newbyteorder("=")),
        where=(where[0], "".join(where[1:])),
        warnings=(
            *([f"left out: {list_names(others)}"] if others else []),
            *[text for split in used if split in labels for text in _warn_of_labels(labels[split])],
            *warn_of_missing_labels(splits, where, "whole numbers called labels"),
        ),
        known=frozenset(names),
    )


def _read_name(array: Stored, alone: bool) -> tuple[str, str]:
    """The split, empty where the name tells of none, and the role of an array; of one that is neither, empty."""
    *folders, file = array.file.split("/")
    stem = file[: -len(SUFFIXES[0])]
    *above, last = [*folders, stem, array.member] if array.member else [*folders, stem]
    split, rest = split_name(last)
    split = split or next((s for s, _ in map(split_name, reversed([] if alone else above)) if s), None)
    role = next((role for role, words in ROLES.items() if rest.lower() in words), "")
    return split or "", role


def _take_one(arrays: Sequence[Stored]) -> Stored:
    if len(arrays) > 1:
        raise DataError(
            f"{list_names(array.name for array in arrays)} are of the same split; join them, or give the path of one"
        )
    return arrays[0]


def _choose_held_out(images: dict[str, Stored], arrays: Sequence[Stored]) -> str:
    """The split that is held out; empty where there is none. Raises DataError where there is nothing to train on."""
    if not images:
        raise DataError(f"it has no array of images, but {list_names(map(str, arrays)) or 'no array'}; {NAMES}")
    named = [array.name for split, array in images.items() if split]
    if "" in images and named:
        raise DataError(f"there is {images[''].name} beside {list_names(named)}, of no split; rename or remove it")
    if named and "train" not in images:
        raise DataError(f"there is {list_names(named, 1)} but no train_images; add it, or call it images")
    return next((split for split in HELD_OUT if split in images), "")


def _list_paths(used: Sequence[str], *roles: dict[str, Stored]) -> list[tuple[str, Path]]:
    """Each file once, named by what it holds, so that its own name counts for nothing."""
    holds: dict[Path, list[str]] = {}
    for split in used:
        for role, arrays in zip(ROLES, roles, strict=True):
            if split in arrays:
                holds.setdefault(arrays[split].path, []).append(f"{split} {role}")
    return [(" ".join(names), path) for path, names in holds.items()]


def _check_images(array: Stored, first: Stored, dimensions: int) -> None:
    """Raises DataError where an array cannot be images, or images beside those of `first`."""
    if array.dtype.hasobject:
        raise DataError(f"{array} holds pickled objects, which are never loaded; save numbers")
    if dimensions == 2 and len(array.shape) in FORMS:
        raise DataError(f"{array} is no N x height x width (x channels); {FORMS[len(array.shape)]}, or reshape it")
    if dimensions == 2:
        check_pixels(str(array), array.shape[1:], array.dtype)
    else:
        _check_folded(array, dimensions)
    if (array.shape[1:], array.dtype) != (first.shape[1:], first.dtype):
        raise DataError(f"the images of the two splits differ: {first} and {array}; make them alike")


def _check_folded(array: Stored, dimensions: int) -> None:
    """Raises DataError where an array is none of signals or volumes."""
    sides, channels = array.shape[1 : 1 + dimensions], array.shape[1 + dimensions :]
    form = {1: "N x length or N x length x channels", 3: "N x depth x height x width, or that x channels"}[dimensions]
    if array.dtype.name not in TYPES:
        raise DataError(f"{array} is not of {list_names(TYPES, len(TYPES))}; convert it by astype")
    if len(sides) < dimensions or len(channels) > 1 or not 0 < math.prod(sides) <= MOST_PIXELS:
        raise DataError(f"{array} is not {form}, as data.dimensions: {dimensions} says; reshape it")
    if channels and not 0 < channels[0] <= MOST_CHANNELS:
        raise DataError(
            f"{array} would have {channels[0]} channels; they come last, {form}, and are at most {MOST_CHANNELS}"
        )


def check_pixels(told: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises DataError, which begins with `told`, where values of that shape and type are no image."""
    height, width, channels = (*shape, 1, 1, 1)[:3]
    if dtype.name not in TYPES:
        raise DataError(f"{told} is not of {list_names(TYPES, len(TYPES))}; convert it by astype")
    if len(shape) not in (2, 3) or not 0 < height * width <= MOST_PIXELS or channels < 1:
        raise DataError(f"{told} is not N x height x width or N x height x width x channels; reshape it")
    if channels > MOST_CHANNELS or (height in (1, 3) and width == channels > 4):
        raise DataError(
            f"{told} would have {channels} channels; they come last, N x height x width x channels, and are at most "
            f"{MOST_CHANNELS}: transpose it"
        )


def _warn_of_labels(array: Stored) -> list[str]:
    if _holds_labels(array):
        return []
    return [f"no labels are used, as {array} is not of whole numbers, one an image"]


def _holds_labels(array: Stored) -> bool:
    return np.issubdtype(array.dtype, np.integer) and math.prod(array.shape[1:]) == 1


def _make_split(images: Stored, labels: Stored | None, shape: tuple[int, int, int]) -> Split:
    if labels and labels.shape[:1] != images.shape[:1]:
        raise DataError(f"{images} and {labels} differ in length; there must be a label for each image")
    labels = labels if labels and _holds_labels(labels) else None

    def read() -> Iterator[Item]:
        numbers = (int(np.ravel(row)[0]) for row in _read_rows(labels)) if labels else repeat(None, images.shape[0])
        for row, (pixels, label) in enumerate(zip(_read_rows(images), numbers, strict=True)):
            yield Item(f"{images.name}, row {row}", pixels.reshape(shape), label)

    return Split(images.shape[0], labels is not None, read)


# ---- Files -----------------------------------------------------------------------------------------------------


def _list_arrays(path: Path, file: str) -> Iterator[Stored]:
    """What is in a file, by its headers. Raises DataError where one claims more than the file can hold."""
    members = [""]
    if file.lower().endswith(".npz"):
        with explain_damage(file), zipfile.ZipFile(path) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    for member in members:
        with _open(path, file, member) as (stream, size):
            shape, in_order, dtype = _read_header(stream)
            array, there = Stored(path, member, file, shape, dtype), size - stream.tell()
        claimed = math.prod(shape) * dtype.itemsize
        if any(n < 0 for n in shape) or (claimed != there and not dtype.hasobject):
            raise DataError(
                f"{array} takes {claimed:,} bytes, and there are {there:,}: cut off or damaged; copy it again"
            )
        if not in_order and len(shape) > 1:
            raise DataError(f"{array} is in the order of Fortran; save numpy.ascontiguousarray of it")
        yield array


@contextmanager
def _open(path: Path, file: str, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """An array's stream and its size in bytes. Raises DataError."""
    with explain_damage(file), path.open("rb") as content:
        if not member:
            yield content, path.stat().st_size
            return
        with zipfile.ZipFile(content) as archive:
            info = archive.getinfo(f"{member}.npy")
            if info.flag_bits & 1:
                raise DataError(f"{show_name(file)} is encrypted; save it without a password")
            if info.file_size > DEFLATE * max(info.compress_size, 1):
                claimed = f"{info.file_size:,} bytes in {info.compress_size:,}"
                raise DataError(f"{show_name(file)} claims to hold {claimed}; save it again")
            with archive.open(info) as stream:
                yield stream, info.file_size


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape of an array, whether it is stored row by row, and the type of its values."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, not fortran, dtype


def _read_rows(array: Stored) -> Iterator[NDArray[Any]]:
    """Its rows in the byte order of this machine."""
    count, *shape = array.shape
    length = math.prod(shape) * array.dtype.itemsize
    at_once = max(1, PIECE // length)
    with _open(array.path, array.file, array.member) as (stream, _):
        _read_header(stream)
        for first in range(0, count, at_once):
            wanted = length * min(at_once, count - first)
            content = stream.read(wanted)
            if len(content) < wanted:
                raise DataError(f"{array.name} is cut off; copy it again")
            yield from (
                np.frombuffer(content, array.dtype)
                .reshape(-1, *shape)
                .astype(array.dtype.newbyteorder("="), copy=False)
            )
