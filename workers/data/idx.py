"""The IDX files of the MNIST family. What a header claims is held against its file before memory is asked for."""

import gzip
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from workers.data.decoding import Item, Pixels, explain_damage
from workers.data.splits import DataError, list_names
from workers.data.tree import Files, Split, Tree, check_in_one_folder

DEFLATE = 1032  # the most bytes that gzip makes of one
# The files of the MNIST family, in the order in which they count, and the middle of their names.
IDX = {(split, what): f"{what}.{kind}" for split in ("train", "t10k")
       for what, kind in (("images", "idx3"), ("labels", "idx1"))}  # fmt: skip


def find_idx(tree: Tree) -> Files | None:
    """The MNIST family: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each gzipped or not."""
    named = {(split, what): _list_names(tree, split, what) for split, what in IDX}
    if tree.is_file or not any(named.values()):
        return None
    if not named["train", "images"]:
        there = [name for names in named.values() for name in names]
        raise DataError(f"there is {list_names(there, 1)} but no train-images-idx3-ubyte.gz; download it, too")
    found = {
        key: tree.get_path(names[0]) for key, names in named.items() if names
    }  # of a packed copy beside it, neither
    parts = [split for split in ("train", "t10k") if (split, "images") in found]
    splits = [_make_split(found[split, "images"], found.get((split, "labels"))) for split in parts]
    warnings = [] if len(parts) == 2 else ["t10k-images-idx3-ubyte.gz is not there: a part of the others is held out"]
    if gone := [f"{split}-labels-idx1-ubyte.gz" for split in parts if (split, "labels") not in found]:
        warnings.append(f"no labels are used, as {list_names(gone)} {'is' if len(gone) == 1 else 'are'} not there")
    sizes = [_read_sizes(found[split, "images"], 3)[1:] for split in parts]
    if sizes[0] != sizes[-1]:
        raise DataError(f"the images of its two splits differ in size: {sizes[0]} and {sizes[-1]}; give others")
    return Files(
        [(f"{split} {what}", path) for (split, what), path in found.items() if split in parts],
        splits[0],
        splits[1] if len(parts) == 2 else None,
        like=np.zeros((*sizes[0], 1), np.uint8),
        where=(named["train", "images"][0], next(iter(named["t10k", "images"]), "")),
        warnings=tuple(warnings),
        known=frozenset(name for (split, _), names in named.items() if split in parts for name in names),
    )


def _list_names(tree: Tree, split: str, what: str) -> list[str]:
    wanted = re.compile(rf"{split}-{IDX[split, what]}-ubyte(\.gz)?")
    return check_in_one_folder([name for name in tree.names if wanted.fullmatch(name.rpartition("/")[2])])


def _make_split(images: Path, labels: Path | None = None) -> Split:
    count, *size = _read_sizes(images, 3)
    if labels and _read_sizes(labels, 1) != (count,):
        raise DataError(f"{images.name} has {count:,} images but {labels.name} {_read_sizes(labels, 1)[0]:,} labels")

    def read() -> Iterator[Item]:
        targets = (int(label[0]) for label in _read_records(labels, 1)) if labels else repeat(None, count)
        for row, (pixels, label) in enumerate(zip(_read_records(images, 3), targets, strict=True)):
            yield Item(f"{images.name} image {row}", pixels.reshape(*size, 1), label)

    return Split(count, labels is not None, read)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with explain_damage(path.name), path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with cast(BinaryIO, gzip.GzipFile(fileobj=file) if zipped else file) as stream:
            yield stream


def _read_sizes(path: Path, dimensions: int) -> tuple[int, ...]:
    """The header: 0, 0, 8 (for bytes), the number of dimensions, then each size as a big-endian 32-bit integer.

    Raises DataError where the file cannot hold what the header claims.
    """
    length = 4 + 4 * dimensions
    with _open(path) as stream:
        header, zipped = stream.read(length), isinstance(stream, gzip.GzipFile)
    if len(header) < length or header[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path.name} is not an IDX file of bytes in {dimensions} dimensions; download it again")
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    if not all(0 < size <= 4096 for size in sizes[1:]):
        raise DataError(f"the header of {path.name} tells impossible sizes, {sizes}; download it again")
    claimed, there = length + math.prod(sizes), path.stat().st_size
    if claimed > (DEFLATE * there if zipped else there):
        raise DataError(
            f"{path.name} is cut off or its header is damaged: it tells {' x '.join(f'{n:,}' for n in sizes)} bytes, "
            f"and the file has {there:,}{' (gzipped)' * zipped}; download it again"
        )
    if not zipped and claimed < there:
        raise DataError(f"{path.name} goes on after the {sizes[0]:,} records its header tells; download it again")
    return sizes


def _read_records(path: Path, dimensions: int) -> Iterator[Pixels]:
    count, *size = _read_sizes(path, dimensions)
    length = int(np.prod(size))
    with _open(path) as stream:
        stream.read(4 + 4 * dimensions)
        for row in range(count):
            content = stream.read(length)
            if len(content) < length:
                raise DataError(f"{path.name} is cut off: it ends in record {row:,} of {count:,}; download it again")
            yield np.frombuffer(content, np.uint8)
        if stream.read(1):
            raise DataError(f"{path.name} goes on after the {count:,} records its header tells; download it again")
