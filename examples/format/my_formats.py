"""A format of data of one's own: grey images as binary PGM files, and a table that says the label and split of each."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from workers.data.decoding import Item, Pixels
from workers.data.splits import DataError
from workers.data.tree import Files, Split, Tree
from workers.kinds import FormatEntry

TABLE = "labels.csv"  # file, label, and split: train or test
HEADER = re.compile(rb"P5\s+(\d+)\s+(\d+)\s+(\d+)\s")  # width, height and the largest value


def find_pgm(tree: Tree) -> Files | None:
    """What lies at the source; None where it is nothing of this format."""
    if TABLE not in tree.names:
        return None
    with tree.get_path(TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    if not train:
        raise DataError(f"{TABLE} has no row whose split is train")
    first, largest = read_pgm(tree.get_path(train[0]["file"]))
    names = [TABLE, *(row["file"] for row in [*train, *test])]
    return Files(
        [(name, tree.get_path(name)) for name in names],  # by whose content the data are known
        make_split(tree, train),
        make_split(tree, test) if test else None,
        levels=largest + 1,
        like=np.zeros_like(first),
        known=frozenset(names),
    )


def make_split(tree: Tree, rows: Sequence[dict[str, str]]) -> Split:
    def read() -> Iterator[Item]:
        for row in rows:
            pixels, _ = read_pgm(tree.get_path(row["file"]))
            yield Item(row["file"], pixels, int(row["label"]))

    return Split(len(rows), labelled=True, read=read)


def read_pgm(path: Path) -> tuple[Pixels, int]:
    """The pixels, height x width x 1, and the largest value that they may have."""
    content = path.read_bytes()
    header = HEADER.match(content)
    if header is None or not 0 < (largest := int(header[3])) < 256:
        raise DataError(f"{path.name} is no binary PGM of 8 bits")
    width, height = int(header[1]), int(header[2])
    values = np.frombuffer(content, np.uint8, offset=header.end())
    if len(values) != width * height:
        raise DataError(f"{path.name} has {len(values):,} pixels in place of {width}x{height}; copy it again")
    return values.reshape(height, width, 1), largest


PGM = FormatEntry(function=find_pgm, about="binary PGM files, and a table of their labels")
