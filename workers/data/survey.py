"""What the headers and labels of a source say, and the sha256 of its files: both remembered in the cache."""

from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workers.classes import LONGEST, WIDEST
from workers.config import DataConfig
from workers.data import decoding
from workers.data.cache import is_settled
from workers.data.decoding import BYTES, Item, look
from workers.data.locate import make_absolute
from workers.data.splits import DataError, show_name
from workers.data.tree import Files, Split
from workers.identity import compute_digest
from workers.memos import hash_file, read_state, recall, remember

LABELS = "labels are whole numbers from 0 on, or -1 in all of a split that has none"
SURVEYED = 3  # the version of what a survey holds


@dataclass(frozen=True)
class Survey:
    """What all images of a source have in common, from their headers, and what their labels are."""

    colour: bool
    images: int
    transparent: int  # images with transparent pixels, or with room for them
    animated: int
    first: tuple[str, int, int]  # name, width, height
    other: tuple[str, int, int] | None  # the first of another size
    lowest: tuple[str, int, int]  # the first of the least height
    narrowest: tuple[str, int, int]  # and of the least width
    classes: int
    depth: str  # of a channel, where headers tell; BYTES where they do not
    unlabelled: bool  # all labels of a split are negative, which says that there are none
    largest_label: int  # -1 without labels
    vectors: tuple[int, int] | None = None  # (length, width) of those that data.condition names


def hash_files(config: DataConfig, files: Files, cache: Path) -> list[tuple[str, str]]:
    """Names and sha256 of the files, remembered by path and state: asking again is a stat a file."""
    memo = cache / "hashes" / f"{compute_digest(make_absolute(config).source)}.json"
    known = recall(memo) or {}
    if files.versions:  # of what is not on this machine
        return [(name, files.versions[path]) for name, path in files.paths]
    entries: dict[str, list[Any]] = {}
    for _, path in files.paths:
        state, key = read_state(path), str(path.absolute())
        entries[key] = known.get(key, [])
        if entries[key][:-1] != state:
            entries[key] = [*state, hash_file(path)]
    settled = {key: entry for key, entry in entries.items() if is_settled(entry)}
    if settled != known:
        remember(memo, settled)
    return [(name, entries[str(path.absolute())][-1]) for name, path in files.paths]


def survey_files(
    kind: str, files: Files, hashes: str | list[tuple[str, str]], cache: Path, config: DataConfig
) -> Survey:
    """What headers and labels say, remembered by the content of the files. Raises DataError where one is damaged.

    Of a stream only the held-out images are looked at; its labels are known from its shards.
    """
    if files.sha256 and files.like is not None:
        height, width, _ = files.like.shape
        size = "an image", width, height
        classes = files.classes or 0
        return Survey(
            False,
            files.train.count,
            0,
            0,
            size,
            None,
            size,
            size,
            classes,
            depth=BYTES,
            unlabelled=False,
            largest_label=classes - 1,
        )
    streamed, column = config.stream is not None, [config.condition] if config.condition else []
    of = [SURVEYED, decoding.VERSION, kind, hashes, *(["streamed"] if streamed else []), *column]
    memo = cache / "surveys" / f"{compute_digest(of)}.json"
    if found := recall(memo):
        sizes = {name: found[name] and tuple(found[name]) for name in ("first", "other", "lowest", "narrowest")}
        vectors = tuple(found["vectors"]) if found.get("vectors") else None
        return Survey(**(found | sizes | {"vectors": vectors}))
    splits = [split for split in (files.train, files.held_out) if isinstance(split, Split)]
    survey = _read_stream(files) if streamed else _read_survey(files, splits)
    remember(memo, asdict(survey))
    return survey


def _read_stream(files: Files) -> Survey:
    """Of the held-out images, and of the labels that headers tell of the others. Raises DataError."""
    assert isinstance(files.held_out, Split)
    labels = {label for shard in files.shards for label in shard.labels or ()}
    unlabelled = bool(labels) and max(labels) < 0
    if not unlabelled and min(labels, default=0) < 0:
        raise DataError(f"a training image has the label {min(labels)}; {LABELS}")
    survey = _read_survey(files, [files.held_out], labels)
    return replace(survey, images=survey.images + files.train.count, unlabelled=survey.unlabelled or unlabelled)


def _read_survey(files: Files, splits: list[Split], known: Set[int] = frozenset()) -> Survey:
    """`known` are labels of other images."""
    colour, transparent, animated, labels, unlabelled = False, 0, 0, set(known), False
    first = other = lowest = narrowest = None
    of_depth: dict[str, str] = {}  # the first image of each depth
    vectors: tuple[int, int] | None = None
    if files.like is not None:
        height, width, _ = files.like.shape
        first = "an image", width, height
    for split in splits:
        count, negative, told = 0, 0, ""
        for item in split.read():
            count += 1
            if item.label is not None:
                if item.label < 0:
                    negative, told = negative + 1, told or f"{show_name(item.name)} has the label {item.label}"
                labels.add(item.label)
            if files.has_vectors:
                vectors = _check_vectors(item, vectors)
            if files.like is not None:
                continue
            seen = look(item)
            size = item.name, seen.width, seen.height
            first = first or size
            other = other or (size if size[1:] != first[1:] else None)
            lowest = size if lowest is None or seen.height < lowest[2] else lowest
            narrowest = size if narrowest is None or seen.width < narrowest[1] else narrowest
            colour, transparent = colour or seen.colour, transparent + seen.transparent
            animated += seen.animated
            of_depth.setdefault(seen.depth, show_name(item.name))
        if count != split.count:
            raise DataError(f"it holds {count:,} images where its headers tell {split.count:,}; copy it again")
        if 0 < negative < count:
            raise DataError(f"{told}; {LABELS}")
        if max(labels, default=0) >= 2**31:
            raise DataError(f"there is a label {max(labels)}; labels are whole numbers from 0 on, below 2^31")
        unlabelled = unlabelled or negative > 0
    if len(of_depth) > 1:
        found = " and ".join(f"{name} has {depth} a channel" for depth, name in of_depth.items())
        raise DataError(f"{found}; convert all to one of these")
    assert first
    images = sum(split.count for split in splits)
    return Survey(
        colour,
        images,
        transparent,
        animated,
        first,
        other,
        lowest or first,
        narrowest or first,
        len(labels),
        depth=next(iter(of_depth), BYTES),
        unlabelled=unlabelled,
        largest_label=max(labels, default=-1),
        vectors=vectors,
    )


def _check_vectors(item: Item, others: tuple[int, int] | None) -> tuple[int, int]:
    """(length, width) of those of an item, which are the `others'`. Raises DataError."""
    assert item.vectors is not None
    length, width = shape = item.vectors.shape
    name = show_name(item.name)
    if others and shape != others:
        raise DataError(
            f"data.condition: {name} has {length} vectors of {width} numbers, and the first image {others[0]} of "
            f"{others[1]}; pad or cut all to one size"
        )
    if not (1 <= length <= LONGEST and 1 <= width <= WIDEST):
        raise DataError(
            f"data.condition: {name} has {length} vectors of {width} numbers; a network is told 1 to {LONGEST} of 1 to "
            f"{WIDEST}"
        )
    if not np.isfinite(item.vectors).all():
        row, column = np.argwhere(~np.isfinite(item.vectors))[0]
        raise DataError(
            f"data.condition: {name} has {item.vectors[row, column]} in vector {row}, number {column}; every number "
            "must be finite: fill it in, or leave the image out"
        )
    return length, width
