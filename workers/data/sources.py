"""A data set before it is decoded: its address, its counts, and what a person should know of it.

`describe` and `compute_fingerprint` answer the dry run: they read names, headers and bytes, and import neither torch
nor ray nor scikit-learn. `describe_source` is the line that every command prints of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.classes import Classes, Told, Vectors
from workers.code import drop_pin
from workers.config import DataConfig, What
from workers.data import decoding
from workers.data.cache import find_default_cache
from workers.data.decoding import DEEP, FLOATS, check_resolution, check_size
from workers.data.locate import find_name, locate, name_source
from workers.data.ranges import Span, check_stated, find_spans, show_span
from workers.data.splits import DataError, list_names, show_name
from workers.data.survey import Survey, hash_files, survey_files
from workers.data.tree import Files, Split
from workers.identity import compute_digest
from workers.sides import get_sides
from workers.warm_start import find_latent_shape

LEVELS = {DEEP: 2**16, FLOATS: None}  # of encoded images that are not of 8 bits
VERSION = 1  # of the storing below: raise it when the same files would give other bytes, and caches are rebuilt


@dataclass(frozen=True)
class Source:
    """A data set before it is decoded: what the dry run, the preflight and the cost plan need."""

    digest: str
    name: str
    format: str
    train: int
    held_out: int
    labelled: bool
    levels: int | None  # None: not discrete
    shape: tuple[int, int, int]  # H, W, C of an image, after data.resolution
    classes: int = 0  # 0 without labels
    largest_label: int = -1
    class_names: tuple[str, ...] = ()  # by label, where the source has names
    streamed: bool = False  # whether training images are read as they are needed
    where: tuple[str, str] = ("", "")  # the files or folders of the two splits; the latter empty: it has none itself
    own_split: bool = False  # whether it says itself what is held out, so that data.held_out is not read
    left_out: str = ""  # files that are not read, by suffix
    composited: str = ""  # images with an alpha channel, and what is under them
    warnings: tuple[str, ...] = ()
    span: Span | None = None  # of data that are not discrete: the values that become -1 and 1
    sides: tuple[int, ...] = ()  # of signals and volumes, which are folded into `shape` (`workers.sides`)
    vectors: tuple[int, int] | None = None  # (length, width) of those that data.condition names
    latents: tuple[int, int, int] | None = None  # H, W, C of what images are encoded to, where they are

    @property
    def diffused(self) -> tuple[int, int, int]:
        """H, W, C of what is diffused: of latents, where images are encoded."""
        return self.latents or self.shape

    def find_told(self, what: What | None) -> Told | None:
        """The classes, each with one image, or what the vectors are like; None of what there is not."""
        if what == "vectors":
            return Vectors(*self.vectors) if self.vectors else None
        count = self.largest_label + 1
        return Classes(tuple(map(str, range(count))), (1,) * count) if what and self.labelled else None


def compute_fingerprint(config: DataConfig, cache: Path | None = None) -> str:
    """The id of the decoded data set, 16 hex digits: it follows from the bytes at the source, not their path."""
    return describe(config, cache).digest


def describe(config: DataConfig, cache: Path | None = None) -> Source:
    """Counts, shape and id, from names and headers. Raises DataError."""
    cache = cache or find_default_cache()
    with name_source(config):
        return describe_with_files(config, cache)[0]


def describe_with_files(config: DataConfig, cache: Path) -> tuple[Source, Files]:
    kind, files, others, warnings = locate(config, cache)
    hashes = files.sha256 or hash_files(config, files, cache)
    _check_condition(config, kind, files)
    survey = survey_files(kind, files, hashes, cache, config)
    own, counts = isinstance(files.held_out, Split), _count_images(config, files)
    shape, levels = _find_shape(config, files, survey), LEVELS.get(survey.depth, files.levels)
    content: dict[str, Any] = {
        "version": VERSION,
        "format": kind,
        "files": hashes,
        "held_out": "test" if own else counts[0],
        "resolution": config.resolution,
    }
    if config.shuffle is not None:
        content["order"] = "shards"
    content |= {"condition": config.condition} if config.condition is not None else {}
    content |= {"ranges": config.ranges} if levels is None and config.ranges != "all" else {}
    if files.like is None:
        content["decoding"] = decoding.VERSION
    if survey.transparent:
        content["background"] = list(config.background)
    if files.sides:
        content["sides"] = list(files.sides)
    labelled = files.train.labelled and (not isinstance(files.held_out, Split) or files.held_out.labelled)
    labelled = labelled and not survey.unlabelled
    if levels is None and config.stream is not None and isinstance(config.ranges, str):
        raise DataError(
            "data.stream: of values that are not discrete the range must be known, and so all images read; state it in "
            "data.ranges, as [[low, high]] or one for each channel, or leave data.stream out"
        )
    check_stated(config, shape[2])
    spans = find_spans(config, files, content, counts=counts, cache=cache) if levels is None else None
    found = [*_list_findings(config, kind, files, hashes, survey), *(spans.list_warnings() if spans else ())]
    source = Source(
        digest=compute_digest(content),
        name=find_name(config),
        format=kind,
        train=counts[1],
        held_out=counts[0],
        labelled=labelled,
        levels=levels,
        shape=shape,
        classes=survey.classes if labelled else 0,
        largest_label=survey.largest_label if labelled else -1,
        class_names=files.class_names if labelled else (),
        streamed=config.stream is not None,
        where=files.where,
        own_split=files.has_own_split,
        left_out=others,
        composited=_describe_composited(config, survey),
        warnings=(*files.warnings, *warnings, *found),
        span=spans.train if spans else None,
        sides=files.sides,
        vectors=survey.vectors,
        latents=find_latent_shape(config.encoder, shape),
    )
    if config.stream is not None:
        _check_room(config, files, source)
    return source, files


def _check_condition(config: DataConfig, kind: str, files: Files) -> None:
    """Raises DataError where the source can't have such a column, or a stream would leave it behind."""
    if config.condition is None:
        return
    if not files.has_vectors:
        raise DataError(
            f"data.condition: {show_name(config.condition)} is a column of Parquet files, and these are "
            f"{'built in' if files.sha256 else drop_pin(kind)}; write images and vectors to Parquet, or leave it out"
        )
    if config.stream is not None:
        raise DataError(
            "data.condition: the vectors of all images are prepared with them, and data.stream reads these as they are "
            "needed; leave one of the two out"
        )


def _check_room(config: DataConfig, files: Files, source: Source) -> None:
    """Raises DataError where two windows of decoded shards do not fit the room for them: one in use, and the next."""
    assert config.stream is not None and config.shuffle is not None
    of_image = math.prod(source.shape) * np.dtype(decoding.choose_type(source.levels)).itemsize
    largest = sorted((shard.images for shard in files.shards), reverse=True)[: 2 * config.shuffle]
    if (needed := sum(largest) * of_image / 1e9) > config.stream:
        raise DataError(
            f"data.stream: {config.stream:g} GB do not hold {len(largest)} decoded files, those that are shuffled "
            f"together and the next (data.shuffle = {config.shuffle}), which are up to {needed:.3g} GB; give as much, "
            "or a smaller data.shuffle"
        )


def _count_images(config: DataConfig, files: Files) -> tuple[int, int]:
    """How many images are held out, and how many are left to train on."""
    count = files.train.count
    if isinstance(files.held_out, Split):
        return files.held_out.count, count
    if count < 2:
        raise DataError("there is 1 image; at least 2 are needed, as some are held out")
    held_out = files.held_out or min(max(round(config.held_out * count), 1), count - 1)
    return held_out, count - held_out


def _describe_composited(config: DataConfig, survey: Survey) -> str:
    if not survey.transparent:
        return ""
    number = "all" if survey.transparent == survey.images else f"{survey.transparent:,}"
    return f"{number} with an alpha channel, on {list(config.background)}"


def _find_shape(config: DataConfig, files: Files, survey: Survey) -> tuple[int, int, int]:
    """H, W, C of a decoded image. Raises DataError where the images do not go into one array."""
    (_, width, height), other = survey.first, survey.other
    grey = not survey.colour and not (survey.transparent and len(set(config.background)) > 1)
    channels = files.like.shape[2] if files.like is not None else 1 if grey else 3
    if config.resolution is not None:
        for smallest in sorted((survey.lowest, survey.narrowest), key=lambda image: min(image[1:])):
            check_resolution(*smallest, config.resolution)
        return *get_sides(config.resolution), channels
    if other:
        check_size(other[0], (other[2], other[1], channels), (height, width, channels))
    return height, width, channels


def _list_findings(config: DataConfig, kind: str, files: Files, hashes: Sequence[Any], survey: Survey) -> Iterator[str]:
    """What a person should know of the data and of the settings for them."""
    default = {name: field.default for name, field in DataConfig.model_fields.items()}
    if files.has_own_split and config.held_out != default["held_out"]:
        yield describe_held_out(config)
    if config.background != default["background"] and not survey.transparent:
        yield f"data.background = {list(config.background)} is without effect: no image has transparent pixels"
    if config.ranges != default["ranges"] and LEVELS.get(survey.depth, files.levels) is not None:
        yield "data.ranges is without effect: the values are discrete, and have levels"
    if survey.animated:
        yield f"{survey.animated:,} images are animated: the first picture of each is taken"
    if survey.unlabelled:
        yield "no labels are used, as all of one split are negative, which says that it has none"
    if kind == "images" and isinstance(files.held_out, Split):
        train = {sha256 for _, sha256 in hashes[: files.train.count]}
        if count := sum(sha256 in train for _, sha256 in hashes[files.train.count :]):
            yield f"{count:,} of the held-out files are among those to train on as well, byte for byte"


def describe_held_out(config: DataConfig) -> str:
    """That a source does not read the setting."""
    return f"data.held_out = {config.held_out:g} is without effect: the data have a split of their own"


def describe_source(source: Source) -> str:
    """What was found at a source, in a line: for every command that reads it."""
    channels = source.shape[2]
    colour = {1: "grey", 3: "in colour"}.get(channels, f"in {channels} channels")
    train, held_out = (show_name(place) for place in source.where)
    built_in, names = source.name == source.format, source.class_names
    named = f" ({list_names(names)})" if names and len(names) == source.classes else ""
    parts = [
        f"{show_name(source.name)}: {'built in' if built_in else drop_pin(source.format)}"
        + " in a stream" * source.streamed,
        f"{source.train:,} to train on" + f" ({train})" * bool(train),
        f"{source.held_out:,} held out ({held_out or 'of the same images, by a fixed shuffle'})",
        f"{source.classes:,} class{'es' * (source.classes != 1)}{named}" if source.labelled else "no labels",
        f"{describe_sides(source)} {colour}{_describe_values(source)}",
    ]
    if source.vectors:
        length, width = source.vectors
        parts.append(f"{length} vector{'s' * (length > 1)} of {width} numbers each")
    if source.latents:
        high, wide, deep = source.latents
        parts.append(f"diffused as latents of {wide}x{high} in {deep} channel{'s' * (deep > 1)}")
    parts += [source.composited] if source.composited else []
    return ", ".join(parts) + f"; left out: {source.left_out}" * bool(source.left_out)


def describe_sides(source: Source) -> str:
    """How large an image is, or a signal or a volume."""
    height, width, _ = source.shape
    kind = {1: "signals of length ", 3: "volumes of "}.get(len(source.sides), "")
    return kind + ("x".join(map(str, source.sides)) if source.sides else f"{width}x{height}")


def _describe_values(source: Source) -> str:
    if source.span:
        return f" in real numbers, {show_span(source.span, 6)} to train on"
    return f" in {source.levels} levels" * (source.levels != 256)
