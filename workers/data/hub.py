"""A repository of data as the Hugging Face hub lays it out: its data sets ("configs"), their splits and class names.

The metadata stand at the head of its README.md, between two lines of ---. Pure functions of them and of the names of
the files, which `load_dataset` reads in the same way: `configs` with `data_files` or `data_dir`, `dataset_info` with
`features`. Where the metadata say nothing, the names of files and folders do (`workers.data.splits`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.data.splits import DataError, list_names, show_name, split_name

README = "README.md"
MOST_BYTES = 2**20  # of it that are read


@dataclass(frozen=True)
class Config:
    """One of a repository's data sets."""

    names: list[str]  # of its files
    splits: Mapping[str, str] = field(default_factory=dict)  # of each file, where the metadata say so
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of the classes, by column
    warnings: tuple[str, ...] = ()


def choose_config(names: Sequence[str], readme: str, wanted: str | None) -> Config:
    """The data set that is `wanted`, or the one that there is. Raises DataError, which lists them.

    Without such metadata it is all files, or those in the folder of that name.
    """
    metadata = _read_metadata(readme)
    configs = _list_configs(metadata)
    if not configs:
        found = list(names) if wanted is None else _find_in_folder(names, wanted)
        return Config(found, classes=_read_classes(metadata, wanted or "default"))
    name = _choose_name(configs, wanted)
    files, splits, left_out = _match_files(names, configs[name], name)
    others = [other for other in configs if other != name]
    warnings = [f"left out: the split{'s' * (len(left_out) > 1)} {list_names(left_out)}"] * bool(left_out)
    if others and wanted is None:
        warnings.append(f"its data set {show_name(name)} is taken; data.config names another of {list_names(others)}")
    return Config(files, splits, _read_classes(metadata, name), tuple(warnings))


def _read_metadata(readme: str) -> Mapping[str, Any]:
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    if not found or not re.search(r"^(configs|dataset_info):", found[1], re.MULTILINE):
        return {}
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise DataError(f"the metadata at the head of {README} are no YAML ({' '.join(str(error).split())})") from error
    return content if isinstance(content, Mapping) else {}


def _list_configs(metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = metadata.get("configs")
    some = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
    return {str(one.get("config_name", "default")): one for one in some}


def _choose_name(configs: Mapping[str, Mapping[str, Any]], wanted: str | None) -> str:
    if wanted is not None:
        if wanted in configs:
            return wanted
        raise DataError(_tell_missing(wanted, configs))
    default = [name for name, config in configs.items() if config.get("default") is True or name == "default"]
    if len(configs) > 1 and not default:
        raise DataError(f"it has several data sets, {list_names(configs, 20)}; set data.config to one of them")
    return default[0] if default else next(iter(configs))


def _tell_missing(wanted: str, there: Iterable[str]) -> str:
    there = list(there)
    close = difflib.get_close_matches(wanted, there, n=1)
    meant = f"; did you mean {show_name(close[0])}?" if close else ";"
    return f"data.config: it has no data set {wanted!r}{meant} there is {list_names(there, 20) or 'none'}"


def _find_in_folder(names: Sequence[str], wanted: str) -> list[str]:
    found = [name for name in names if wanted in name.split("/")[:-1]]
    if not found:
        folders = sorted({folder for name in names for folder in name.split("/")[:-1] if not split_name(folder)[0]})
        raise DataError(_tell_missing(wanted, folders))
    return found


def _match_files(
    names: Sequence[str], config: Mapping[str, Any], called: str
) -> tuple[list[str], dict[str, str], list[str]]:
    """The files of a config, the split of each that the metadata tell of, and the splits that are neither."""
    folder = str(config.get("data_dir", "") or "").strip("/")
    inside = [name for name in names if name.startswith(f"{folder}/")] if folder else list(names)
    patterns = _list_patterns(config.get("data_files"))
    if not patterns:
        if not inside:
            raise DataError(f"{README} says that {show_name(called)} is in {show_name(folder)}/, where no file is")
        return inside, {}, []
    of: dict[str, str] = {}
    for split, some in patterns.items():
        for pattern in some:
            full = re.compile(_translate(f"{folder}/{pattern}" if folder else pattern))
            matching = [name for name in names if full.fullmatch(name)]
            if not matching:
                raise DataError(
                    f"{README} says that the split {show_name(split)} of {show_name(called)} is {show_name(pattern)}, "
                    "and no file has such a name; download it, too"
                )
            of |= dict.fromkeys(matching, split)
    if len(patterns) == 1:  # whatever it is called, it is what there is to train on
        return list(of), dict.fromkeys(of, "train"), []
    known = {split: found for split in patterns if (found := split_name(split)[0])}
    splits = {name: known[split] for name, split in of.items() if split in known}
    return list(splits), splits, [split for split in patterns if split not in known]


def _list_patterns(files: Any) -> dict[str, list[str]]:
    """Patterns of names by split: `data_files` is one, a list of them, or such by split."""
    if isinstance(files, str):
        return {"train": [files]}
    if isinstance(files, list) and all(isinstance(one, str) for one in files):
        return {"train": files} if files else {}
    pairs = files.items() if isinstance(files, Mapping) else [
        (one.get("split", "train"), one.get("path")) for one in files or () if isinstance(one, Mapping)
    ]  # fmt: skip
    return {str(split): list(map(str, path)) if isinstance(path, list) else [str(path)] for split, path in pairs}


def _translate(pattern: str) -> str:
    """The regular expression of a pattern in which * stays within a folder and ** does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern.removeprefix("./"))
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)


def _read_classes(metadata: Mapping[str, Any], config: str) -> dict[str, tuple[str, ...]]:
    """Names of classes by column, of the features of `dataset_info`."""
    found = metadata.get("dataset_info")
    some = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, Mapping)]
    named = [one for one in some if one.get("config_name", "default") == config]
    features = next(iter(named or (some if len(some) == 1 else [])), {}).get("features")
    names = {}
    for feature in features if isinstance(features, list) else ():
        kind = feature.get("dtype") if isinstance(feature, Mapping) else None
        classes = kind.get("class_label", {}).get("names") if isinstance(kind, Mapping) else None
        if isinstance(classes, Mapping):
            classes = [classes[key] for key in sorted(classes, key=int)]
        if isinstance(classes, list):
            names[str(feature.get("name"))] = tuple(map(str, classes))
    return names
