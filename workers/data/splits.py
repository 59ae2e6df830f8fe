"""Which files of a folder are trained on, held out or left out, and which class each is in: by their names alone.

People call a split `train`, `Training`, `train_images` or `train2017`, and what is held out `test`, `val`, `valid`,
`validation` or `dev`, at the top or further down. What the names say plainly is done; what they leave open is done
with a warning where nothing held out is trained on by it, and refused otherwise. Pure functions of names: relative
paths with forward slashes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from workers.config import Mistake

WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "test": ("test", "testing", "testset"),
    "validation": ("validation", "valid", "val", "valset", "dev", "eval", "evaluation", "heldout", "holdout"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
SPLIT_SEED = 20_200_619  # of every shuffle and split: each trial holds out the same images
HELD_OUT = ("test", "validation")  # the first that is there is held out
SHARD = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{8,})?")
NUMBERED = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d+)")


class DataError(Mistake):
    """The data are not what the configuration says; the message tells what was found and what to do."""


@dataclass(frozen=True)
class Layout:
    """What the names of a source's files say. `held_out` is None where the source has no split of its own."""

    train: list[str]
    held_out: list[str] | None
    labels: dict[str, int]  # by name; empty where the files have no classes
    where: tuple[str, str]  # that the splits were found at
    warnings: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()  # their names by label


@lru_cache(maxsize=2**16)
def split_name(name: str) -> tuple[str | None, str]:
    """The split that a file's or folder's name speaks of, if it is one, and the rest of the name.

    Names of one rest belong together: train_images and Test-Images, but not train_station and test_tube.
    """
    spaced = re.sub(r"(?i)(held|hold)[-_ ]out", r"\1out", name)
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+|[^\W\d_a-zA-Z]+", spaced)]
    found = [word for word in words if word in SPLIT_OF]
    if len(found) != 1:
        return None, name
    words.remove(found[0])
    return SPLIT_OF[found[0]], "-".join(words)


def show_name(name: str) -> str:
    """A name as a message shows it: on one line, whatever it holds."""
    return name if name.isprintable() else repr(name)


def list_names(names: Iterable[str], most: int = 4) -> str:
    names = [show_name(name) for name in names]
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


# ---- Images in folders -----------------------------------------------------------------------------------------


def arrange_images(names: Sequence[str]) -> Layout:
    """Images at any depth. Folders `train` and `test` (else `val`, ...) are the splits, wherever they are.

    Within a split, or where there is none, the first folder of each path is the class, where there are at least two
    and every image has one; the splits may also lie in each class. Raises DataError where the names leave open what
    is held out.
    """
    parts = {name: name.split("/") for name in names}
    depth = _count_shared_folders(list(parts.values()))
    tops = _list_folders(parts.values(), depth)
    first = next(iter(parts.values()))
    pair, split_at, class_at = _find_pair(tops, "/".join(first[:depth])), depth, depth + 1
    if pair is None and (pair := _find_pair_in_each(parts, depth, tops)):
        split_at, class_at = depth + 1, depth
    if pair is None:
        return _arrange_undivided(parts, depth, tops)
    train, held_out = ([n for n, p in parts.items() if len(p) > split_at + 1 and p[split_at] == f] for f in pair)
    while class_at > split_at and _is_only(parts, train, class_at) and _is_only(parts, held_out, class_at):
        class_at += 1  # train/images/cat, or seg_train/seg_train/cat
    labels, warnings = _label_classes(parts, train + held_out, class_at)
    if labels:
        trained = {labels[name] for name in train}
        other = sorted({parts[n][class_at] for n in held_out if labels[n] not in trained})
        warnings += [f"some held-out images are of classes that are not trained on: {list_names(other)}"] * bool(other)
    if held := _find_held_out(parts, train, split_at + 1):
        warnings.append(f"{show_name(held)} is trained on, as it lies in {show_name(pair[0])}/")
    warnings = _warn_of_left_out(parts, split_at, pair, [*train, *held_out]) + warnings
    place = "".join(f"{folder}/" for folder in first[:depth]) + "*/" * (split_at > depth)
    where = f"{place}{pair[0]}/", f"{place}{pair[1]}/"
    return Layout(train, held_out, labels, where, tuple(warnings), _name_classes(parts, labels, class_at))


def _count_shared_folders(parts: Sequence[list[str]]) -> int:
    """How many folders all paths go through. Raises DataError where one of them says that all of it is held out."""
    depth = 0
    while len(tops := {p[depth] if len(p) > depth + 1 else "" for p in parts}) == 1 and tops != {""}:
        [top] = tops
        split, rest = split_name(top)
        if split in HELD_OUT and not rest:
            raise DataError(
                f"all images lie in {show_name(top)}/, and there is no train/ beside it; add it, or give the path of "
                f"{show_name('/'.join(parts[0][: depth + 1]))}/ to train on these"
            )
        depth += 1
    return depth


def _list_folders(parts: Iterable[list[str]], depth: int) -> list[str]:
    return sorted({p[depth] for p in parts if len(p) > depth + 1})


def _find_pair(folders: Sequence[str], place: str = "") -> tuple[str, str] | None:
    """The folders of the training split and the held-out one, where there are such. Raises DataError."""
    groups: dict[str, dict[str, list[str]]] = {}
    for folder in folders:
        split, rest = split_name(folder)
        if split:
            groups.setdefault(rest, {}).setdefault(split, []).append(folder)
    whole = [group for group in groups.values() if "train" in group and len(group) > 1]
    if not whole:
        return None
    if len(whole) > 1 or any(len(found) > 1 for found in whole[0].values()):
        found = [f"{folder}/" for group in whole for some in group.values() for folder in some]
        raise DataError(
            f"{list_names(sorted(found), 9)}{f' in {show_name(place)}/' if place else ''} are more than one "
            "folder to train on and one to hold out; give the path of a folder that holds one of each"
        )
    [group] = whole
    return group["train"][0], next(group[split][0] for split in HELD_OUT if split in group)


def _find_pair_in_each(parts: dict[str, list[str]], depth: int, tops: Sequence[str]) -> tuple[str, str] | None:
    """The folders of the splits where each class has its own: cat/train, cat/test, dog/train, ..."""
    inside: dict[str, set[str]] = {top: set() for top in tops}
    for p in parts.values():
        if len(p) > depth + 2:
            inside[p[depth]].add(p[depth + 1])
    pairs = {top: _find_pair(sorted(folders), top) for top, folders in inside.items()}
    found = {pair for pair in pairs.values() if pair}
    if not found:
        return None
    if len(found) > 1 or None in pairs.values() or any(len(p) == depth + 1 for p in parts.values()):
        having = [f"{top}/" for top, pair in pairs.items() if pair]
        raise DataError(
            f"some folders have a split of their own inside ({list_names(having)}) and others have another or none; "
            "give the path of one, or arrange them as train/CLASS/ and test/CLASS/"
        )
    return found.pop()


def _arrange_undivided(parts: dict[str, list[str]], depth: int, tops: Sequence[str]) -> Layout:
    """Images without a split of their own. Raises DataError where some are plainly meant to be held out."""
    if held := _find_held_out(parts, parts, depth):
        others = [f"{top}/" for top in tops if not held.startswith(f"{top}/")] or ["images"]
        raise DataError(
            f"there is {show_name(held)} but no train/ beside it, only {list_names(others)}; call what is to be "
            "trained on train/ and put it beside, or give its path"
        )
    labels, warnings = _label_classes(parts, list(parts), depth)
    if alike := [f"{top}/" for top in tops if split_name(top)[0]]:
        what = "is taken for a class" if len(alike) == 1 else "are taken for classes"
        warnings.insert(0, f"{list_names(alike)} {what}, as there is no train/ with a test/ or val/ beside it")
    place = "/".join(next(iter(parts.values()))[:depth])
    where = f"{place}/" if place else "", ""
    return Layout(list(parts), None, labels, where, tuple(warnings), _name_classes(parts, labels, depth))


def _find_held_out(parts: dict[str, list[str]], names: Iterable[str], depth: int) -> str:
    """The first folder, from `depth` on, that is plainly called what is held out; empty where there is none."""
    for name in names:
        for place, folder in enumerate(parts[name][depth:-1], depth):
            split, rest = split_name(folder)
            if split in HELD_OUT and not rest:
                return "/".join(parts[name][: place + 1]) + "/"
    return ""


def _is_only(parts: dict[str, list[str]], names: Sequence[str], depth: int) -> bool:
    """Whether one folder at `depth` holds all of them."""
    tops = {parts[name][depth] if len(parts[name]) > depth + 1 else "" for name in names}
    return len(tops) == 1 and tops != {""}


def _label_classes(parts: dict[str, list[str]], names: Sequence[str], depth: int) -> tuple[dict[str, int], list[str]]:
    """The label of each name by its folder at `depth`, in the order of the folders' names; and warnings."""
    of = {name: parts[name][depth] if len(parts[name]) > depth + 1 else "" for name in names}
    folders = sorted(set(of.values()))
    if len(folders) < 2:
        return {}, []
    if "" in folders:
        loose = [name for name, folder in of.items() if not folder]
        return {}, [
            f"no labels are used, as {len(loose):,} of {len(of):,} images are in no class's folder (such as "
            f"{show_name(loose[0])})"
        ]
    number = {folder: label for label, folder in enumerate(folders)}
    return {name: number[folder] for name, folder in of.items()}, []


def _name_classes(parts: dict[str, list[str]], labels: dict[str, int], depth: int) -> tuple[str, ...]:
    """The folders of the classes, by label."""
    return tuple(dict.fromkeys(parts[name][depth] for name in sorted(labels, key=lambda name: labels[name])))


def _warn_of_left_out(parts: dict[str, list[str]], depth: int, pair: tuple[str, str], used: Sequence[str]) -> list[str]:
    """What lies beside the two folders of the splits and is left out, a warning each."""
    left = set(parts) - set(used)
    counts = Counter(f"{parts[n][depth]}/" if len(parts[n]) > depth + 1 else "" for n in left)
    warnings = []
    for folder, n in sorted(counts.items()):
        images = f"{n:,} image{'s' * (n != 1)}"
        train, held_out = (f"{show_name(name)}/" for name in pair)
        if not folder:
            warnings.append(f"left out: {images} beside {train} and {held_out}")
        elif split_name(folder)[0] in HELD_OUT:
            warnings.append(f"left out: {images} in {show_name(folder)}, as {held_out} is what is held out")
        else:
            warnings.append(f"left out: {images} in {show_name(folder)}, as it is neither {train} nor {held_out}")
    return warnings


# ---- Files that hold many images each --------------------------------------------------------------------------


def arrange_shards(names: Sequence[str], splits: Mapping[str, str] = MappingProxyType({})) -> Layout:
    """Files train-* and test-* (else validation-*, ...), or in folders of such names, are the splits: Parquet or tar.

    `splits` are those that metadata tell. Where nothing says so, all files are one split. Raises DataError where shards
    are missing, by the count in their names, and where the files are of several data sets.
    """
    of = {name: _find_split_of_shard(name) for name in names}
    named = splits or {name: split for name, (split, _) in of.items() if split}
    named = {name: named[name] for name in names if name in named}
    train, held_out, warnings = list(names), list[str](), list[str]()
    end = Path(names[0]).suffix
    if named:
        if not splits and len({of[name][1] for name in named}) > 1:
            folders = sorted({f"{name.rpartition('/')[0]}/" for name in named})
            kind = "Parquet" if end == ".parquet" else end[1:]
            raise DataError(
                f"these are {kind} files of several data sets: {list_names(folders, 9)}; give the path of one, or set "
                "data.config to the name of its folder"
            )
        train = [name for name, split in named.items() if split == "train"]
        kept = next((split for split in HELD_OUT if split in named.values()), None)
        held_out = [name for name, split in named.items() if split == kept]
        if not train:
            raise DataError(
                f"there is {list_names(named, 1)} but no train-*{end}; add it, or give the path of that one file"
            )
        if others := [name for name, split in named.items() if split not in ("train", kept)]:
            warnings.append(f"left out: {list_names(others)}, as {list_names(held_out, 1)} is what is held out")
        if others := [name for name in names if name not in named]:
            warnings.append(f"left out: {list_names(others)}, as the name is of no split, where others' are")
    for some in (train, held_out):
        warnings += _check_shards(some)
    return Layout(train, held_out or None, {}, (list_names(train, 2), list_names(held_out, 2)), tuple(warnings))


def _find_split_of_shard(name: str) -> tuple[str | None, str]:
    """The split of a file by its own name, else by its folders', and the place that its data set has."""
    *folders, file = name.split("/")
    stem = _split_stem(file)[0]
    split = split_name(stem)[0]
    of = [split_name(folder) for folder in folders]
    split = split or next((s for s, _ in reversed(of) if s), None)
    return split, "/".join(rest if s else folder for folder, (s, rest) in zip(folders, of, strict=True))


def _split_stem(file: str) -> tuple[str, int | None, int | None]:
    """A file's name without suffix and number of its shard, that number, and how many shards there are."""
    bare = file.removesuffix(".parquet").removesuffix(".tar")
    if found := SHARD.fullmatch(bare):
        return found["stem"], int(found["number"]), int(found["count"])
    if found := NUMBERED.fullmatch(bare):
        return found["stem"], int(found["number"]), None
    return bare, None, None


def _check_shards(names: Sequence[str]) -> list[str]:
    """Warnings about gaps in the numbers of shards. Raises DataError where names tell how many there should be."""
    groups: dict[tuple[str, str], dict[int, int | None]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        stem, number, count = _split_stem(file)
        if number is not None:
            group = groups.setdefault((folder, stem), {})
            if number in group and count is not None:
                raise DataError(f"{show_name(name)} is there twice, from different exports; keep one of them")
            group[number] = count
    warnings = []
    for (_, stem), found in groups.items():
        counts = {count for count in found.values() if count is not None}
        if len(counts) > 1:
            raise DataError(
                f"shards of {stem or 'one split'} are of {' and of '.join(map(str, sorted(counts)))}: of different "
                "exports, so that images may be there twice; keep one of them"
            )
        count = next(iter(counts), None)
        first = 1 if count in found and 0 not in found else 0  # 1-of-5 ... 5-of-5
        expected = range(first, first + count) if count is not None else range(min(found), max(found) + 1)
        if missing := [str(n) for n in islice((n for n in expected if n not in found), 10)]:
            text = (
                f"of the shards of {show_name(stem or names[0])}, these numbers are missing: {list_names(missing, 9)}"
            )
            if count is not None:
                raise DataError(f"{text}, of {count} in all; download them, or give the path of one file")
            warnings.append(text)
    return warnings
