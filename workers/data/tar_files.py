"""Tar files of samples, as WebDataset has them: members of one name are a sample, KEY.png and KEY.cls or KEY.json.

A tar file has no list of its members: its headers are read one after the other, past the images where these are large,
and what they tell is remembered (`workers.data.shards`). Nothing is ever unpacked.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

from workers.data.decoding import SUFFIXES, Item, explain_damage
from workers.data.shards import Header, join_shards, read_headers
from workers.data.splits import DataError, arrange_shards, show_name
from workers.data.tree import Files, Shard, Tree, warn_of_missing_labels

END = ".tar"
AT_ONCE = 2**20  # bytes that are read at a time; what is skipped and larger is not read
MOST_LABEL = 2**20  # bytes of a member that tells a label
KEYS = ("label", "cls")  # of a .json


class Sample(NamedTuple):
    name: str
    image: bytes  # encoded; empty where only labels are read
    label: int | None


def find_tar(tree: Tree) -> Files | None:
    """In a folder, names say which files are which split, as of Parquet files."""
    names = tree.list_matching(END)
    if not names:
        return None
    headers = dict(zip(names, read_headers(tree, names, partial(_read_header, tree)), strict=True))
    names = [name for name in names if headers[name].images]
    if not names:
        return None
    layout = arrange_shards(names, tree.splits)
    parts = [[_make_shard(tree, n, headers[n]) for n in some] for some in (layout.train, layout.held_out) if some]
    splits = [join_shards(part) for part in parts]
    used = [*((name, "train") for name in layout.train), *((name, "held_out") for name in layout.held_out or ())]
    return Files(
        [(tag, tree.get_path(name)) for name, tag in used],
        splits[0],
        splits[1] if splits[1:] else None,
        where=layout.where,
        warnings=(*layout.warnings, *warn_of_missing_labels(splits, layout.where, ".cls or .json with a label")),
        known=frozenset(names),
        class_names=next(iter(tree.classes.values()), ()),
        shards=tuple(parts[0]),
    )


def _read_header(tree: Tree, name: str) -> Header:
    labels = [sample.label for sample in _read_samples(tree, name, with_images=False)]
    without = sum(label is None for label in labels)
    if 0 < without < len(labels):
        raise DataError(
            f"{show_name(name)} has a label (.cls, or .json with {' or '.join(KEYS)}) for {len(labels) - without:,} of "
            f"{len(labels):,} images; give one to each, or to none"
        )
    return Header(len(labels), None if without or not labels else [label or 0 for label in labels], {})


def _make_shard(tree: Tree, name: str, header: Header) -> Shard:
    def read() -> Iterator[Item]:
        for sample in _read_samples(tree, name, with_images=True):
            yield Item(f"{name} {sample.name}", sample.image, sample.label)

    return Shard(
        name, header.images, header.labels is not None, header.labels, read, None if tree.store else tree.get_path(name)
    )


@contextmanager
def _open(tree: Tree, name: str) -> Iterator[tarfile.TarFile]:
    with explain_damage(name), tree.open(name) as raw:
        file: Any = io.BufferedReader(cast(Any, raw), AT_ONCE) if tree.store else raw
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
                file.seek(archive.offset)  # where tarfile found no further header
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise OSError(f"there is no header of a member at byte {archive.offset:,}")
        except tarfile.TarError as error:
            raise OSError(str(error)) from error


def _read_samples(tree: Tree, name: str, with_images: bool) -> Iterator[Sample]:
    """Its images in their order, each with the label of its name. Raises DataError."""
    key, last = "", None
    with _open(tree, name) as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            stem, _, end = file.partition(".")
            if not member.isreg() or member.issparse() or stem == "":
                continue
            if f"{folder}/{stem}" != key:
                if last and last.name:
                    yield last
                key, last = f"{folder}/{stem}", Sample("", b"", None)
            assert last
            if f".{end.lower()}" in SUFFIXES:
                if last.name:
                    raise DataError(f"{show_name(name)} has two images called {show_name(stem)}; rename one of them")
                last = last._replace(name=member.name, image=_extract(archive, member) if with_images else b"")
            elif end.lower() in ("cls", "json"):
                found = _read_label(archive, member, end.lower(), name)
                last = last if found is None else last._replace(label=found)
        if last and last.name:
            yield last


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    file = archive.extractfile(member)
    assert file
    return file.read(most)


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, end: str, name: str) -> int | None:
    """The label that a member tells; None of a .json that has none."""
    text = _extract(archive, member, MOST_LABEL).decode(errors="replace")
    try:
        found = int(text) if end == "cls" else json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{show_name(member.name)} of {show_name(name)} is {show_name(text[:40])!r}; a label is a whole number"
        ) from error
    if end == "json":
        found = next((found[key] for key in KEYS if key in found), None) if isinstance(found, dict) else None
        found = found if type(found) is int else None
    return None if found is None else int(found)
