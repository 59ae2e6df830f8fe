"""The files at a source, and what a format makes of them: `Files`, with their splits, nothing decoded."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from workers.data.decoding import SUFFIXES, Item, Pixels
from workers.data.splits import DataError, list_names, show_name

CHUNK = 128  # encoded images in memory at a time
PIECE = 2**27  # bytes of encoded images in memory at a time, as far as a Parquet file's header tells
MOST_VISITS = 8  # of one folder by several links
# Files that come with data sets and hold none of their images.
COMPANIONS = ("", ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".html", ".xml", ".pdf", ".py",
              ".log", ".db")  # fmt: skip
OTHER_IMAGES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga")


@dataclass(frozen=True)
class Split:
    """A part of a source, nothing decoded. `read` streams its `count` items in the source's own order."""

    count: int
    labelled: bool
    read: Callable[[], Iterator[Item]]


class Shard(NamedTuple):
    """A file that holds many images."""

    name: str
    images: int
    labelled: bool
    labels: list[int] | None  # of each image, where they are known before they are read
    read: Callable[[], Iterator[Item]]
    path: Path | None  # on this machine


@dataclass(frozen=True)
class Files:
    """What lies at a source. `held_out` is its test split, or how many images to hold out, or None: a fraction."""

    paths: list[tuple[str, Path]]  # what of each file's name counts for the address, and the file; none if built in
    train: Split
    held_out: Split | int | None = None
    levels: int | None = 256  # None: not discrete
    sides: tuple[int, ...] = ()  # of signals and volumes, which are read folded (`workers.sides`)
    like: Pixels | None = None  # an image of the size and channels of all, where they are known without decoding
    sha256: str | None = None  # of a built-in source's bytes: its address needs no reading
    classes: int | None = None  # where they are known without reading
    class_names: tuple[str, ...] = ()  # by label, where the source has names
    where: tuple[str, str] = ("", "")  # the files or folders of the two splits, for a person
    warnings: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()  # names of files that were used, or told of in the warnings
    versions: Mapping[Path, str] | None = None  # of the files, where they are not on this machine
    shards: tuple[Shard, ...] = ()  # of the training split, where its files hold many images each
    has_vectors: bool = False  # whether its items have those that data.condition asks for
    drawn: bool = False  # whether what is held out are shards, drawn by `data.held_out`

    @property
    def has_own_split(self) -> bool:
        """Whether the source says itself what is held out."""
        return self.held_out is not None and not self.drawn


class Store(Protocol):
    """Files that are not on this machine, and stay where they are."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Of each shard, which changes when its content does."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """The file, to be read anywhere in it. Raises DataError where it is gone, or not of its version any more."""
        ...


@dataclass(frozen=True)
class Tree:
    """The files at a path, without hidden ones: their names below `root`, sorted."""

    root: Path
    names: list[str]
    is_file: bool = False  # what was given is the path of its one file
    dimensions: int = 2  # of what an array holds, channels aside
    store: Store | None = None  # where the files are, if not at `root`
    splits: Mapping[str, str] = field(default_factory=dict)  # of files whose split metadata tell
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of classes by column, from metadata
    memo: Path | None = None  # of what the headers of its files tell
    with_labels: bool = False  # whether labels are wanted before images are read
    condition: str | None = None  # the column of vectors that are wanted

    def get_path(self, name: str) -> Path:
        return self.root / name

    def open(self, name: str) -> IO[bytes]:
        """The file, to be read anywhere in it."""
        return self.store.open(name) if self.store else self.get_path(name).open("rb")

    def list_matching(self, *ends: str) -> list[str]:
        return [name for name in self.names if name.lower().endswith(ends)]


def list_files(path: Path) -> Tree:
    """All files below a folder, links followed; of a file, that one. Raises DataError where a link leads nowhere."""
    if path.is_file():
        return Tree(path.parent, [path.name], is_file=True)
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder")
    names, visits = list[str](), Counter[tuple[int, int]]()
    start = path.stat()
    waiting = [(path, "", frozenset({(start.st_dev, start.st_ino)}))]
    while waiting:
        folder, prefix, above = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stat = entry.stat()
                    key = stat.st_dev, stat.st_ino
                    if key in above:  # a link to a folder that it lies in
                        continue
                    visits[key] += 1
                    if visits[key] > MOST_VISITS:
                        raise DataError(f"links lead to {show_name(name)}/ more than {MOST_VISITS} times; remove some")
                    waiting.append((Path(entry.path), f"{name}/", above | {key}))
                elif entry.is_file():
                    names.append(name)
                elif entry.is_symlink() and Path(entry.name).suffix.lower() in ("", ".parquet", ".tar", *SUFFIXES):
                    raise DataError(
                        f"{show_name(name)} is a link to nowhere ({Path(entry.path).readlink()}); mend or remove it"
                    )
    return Tree(path, sorted(names))


def describe_left_out(tree: Tree, files: Files) -> tuple[str, list[str]]:
    """What lies at a source and was not read, by suffix: all of it in words, and warnings of what may be data."""
    used = {path for _, path in files.paths}
    others = [name for name in tree.names if name not in files.known and tree.get_path(name) not in used]
    kinds: dict[str, list[str]] = {}
    for name in others:
        kinds.setdefault(Path(name).suffix.lower(), []).append(name)
    counts = ", ".join(f"{len(some):,} {show_name(kind) or 'without suffix'}" for kind, some in sorted(kinds.items()))
    return counts, [
        f"left out: {len(some):,} {show_name(kind)} ({list_names(some, 2)})"
        + f"; convert {'it' if len(some) == 1 else 'them'} to PNG" * (kind in OTHER_IMAGES)
        for kind, some in sorted(kinds.items())
        if kind not in COMPANIONS
    ]


def check_in_one_folder(names: list[str]) -> list[str]:
    """The names, if they lie in one folder. Raises DataError where they do not."""
    if len(folders := {name.rpartition("/")[0] for name in names}) > 1:
        where = list_names(f"{folder or '.'}/" for folder in sorted(folders))
        raise DataError(f"there are data sets in several folders, {where}; give the path of one")
    return names


def warn_of_missing_labels(splits: Sequence[Split], where: Sequence[str], what: str) -> list[str]:
    """A warning where one split has labels and the other has not."""
    without = [show_name(place) for split, place in zip(splits, where, strict=False) if not split.labelled]
    if len(without) != 1 or len(splits) < 2:
        return []
    return [f"no labels are used, as {without[0]} has no {what} and the other split has"]
