"""From a `DataConfig` to the files that it means: where they lie, and in which format."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from workers.code import drop_pin
from workers.config import DataConfig
from workers.data.built_in import BUILT_IN
from workers.data.cache import lock_cache
from workers.data.formats import CHOICES, find_files
from workers.data.hub import MOST_BYTES, README, choose_config
from workers.data.shards import HEADERS, SHARDS, arrange_by_shards
from workers.data.splits import DataError
from workers.data.tree import Files, Split, Tree, describe_left_out, list_files
from workers.identity import compute_digest

MOST_IMAGES = 2**28  # that a source may have: the order of so many takes 4 GB


def make_absolute(config: DataConfig) -> DataConfig:
    """`config` with an absolute path, for processes that have another current directory."""
    if config.source in BUILT_IN or is_remote(config):
        return config
    return config.model_copy(update={"source": str(Path(find_path(config)).expanduser().absolute())})


@contextmanager
def name_source(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except (DataError, OSError) as error:
        raise DataError(f"data.source = {config.source!r}: {error}") from (error.__cause__ or error)


def is_remote(config: DataConfig) -> bool:
    return "://" in find_path(config)


def find_path(config: DataConfig) -> str:
    return config.source.removeprefix("file://")


def find_name(config: DataConfig) -> str:
    path = make_absolute(config).source
    name = Path(path.partition("?")[0] if is_remote(config) else path).name
    return name.removesuffix(".parquet").removesuffix(".npz").removesuffix(".npy").removesuffix(".tar")


def locate(config: DataConfig, cache: Path) -> tuple[str, Files, str, list[str]]:
    """The name of the format at `config.source`, its files, and what is left out: all in words, and warnings."""
    if config.source in BUILT_IN:
        if config.dimensions != 2:
            raise DataError(f"data.dimensions: {config.dimensions} is of .npy and .npz; leave it out")
        _check_unread(config)
        return config.source, BUILT_IN[config.source](), "", []
    tree, warnings = _choose_files(_open_tree(config, cache), config)
    found = find_files(tree, config.format)
    if found is None:
        raise DataError(_tell_unknown(tree))
    kind, files = found
    splits = [s for s in (files.train, files.held_out) if isinstance(s, Split)]
    if any(split.count == 0 for split in splits):
        raise DataError(
            f"this {drop_pin(kind)} source has no images in its training or test split; add some. {CHOICES}"
        )
    if (count := sum(split.count for split in splits)) > MOST_IMAGES:
        raise DataError(f"it claims {count:,} images, of which at most {MOST_IMAGES:,} are read; take fewer")
    if config.dimensions != 2 and (kind != "arrays" or config.resolution is not None):
        named = "data.resolution is" if kind == "arrays" else f"{drop_pin(kind)} are"
        raise DataError(
            f"data.dimensions: {config.dimensions} is of .npy and .npz, and {named} of images; leave it out"
        )
    if config.shuffle is not None:
        if not files.shards:
            raise DataError(
                f"data.shuffle: {config.shuffle} is of files that hold many images each, Parquet or tar, and this is "
                f"{drop_pin(kind)}; leave it out"
            )
        files = arrange_by_shards(files, config.held_out)
    if tree.store:
        versions = {tree.get_path(name): version for name, version in tree.store.versions.items()}
        files = replace(files, versions=versions)
    others, more = describe_left_out(tree, files)
    return kind, files, others, [*warnings, *more]


def _check_unread(config: DataConfig) -> None:
    for name in ("format", "config", "shuffle"):
        if (value := getattr(config, name)) is not None:
            raise DataError(f"data.{name}: {value} is of files, and {config.source} has none; leave it out")


def _open_tree(config: DataConfig, cache: Path) -> Tree:
    """What lies at the source. Raises DataError where nothing does."""
    key = compute_digest(config.source)
    of = [HEADERS, config.source, config.stream is not None, *([config.condition] if config.condition else [])]
    memo = cache / "headers" / f"{compute_digest(of)}.json"
    if is_remote(config) and config.stream is not None:
        from workers.data.mirror import Remote

        place = cache / "versions" / f"{key}.json"
        there = Remote(config.source, place, SHARDS)
        if not there.versions:
            raise DataError("data.stream: it is of Parquet or tar files, and there are none; leave it out")
        folder = Path(find_path(config).partition("?")[0])  # of no file here, but a name for each
        folder = folder.parent if there.is_file else folder
        names = [name for name in there.names if name in there.versions or name == README]
        return Tree(folder, names, there.is_file, store=there, memo=memo, with_labels=True)
    if is_remote(config):
        from workers.data.mirror import mirror_uri  # with pyarrow, which a dry run on other data does without

        with lock_cache(cache / "sources" / f"{key}.lock"):
            path = mirror_uri(config.source, cache / "sources" / key)
    else:
        path = Path(find_path(config)).expanduser()
    if not config.source:
        raise DataError(f"it is empty. {CHOICES}")
    if not path.exists():
        siblings = {p.name: str(p) for p in path.parent.iterdir()} if path.parent.is_dir() else {}
        close = difflib.get_close_matches(path.name, [*BUILT_IN, *siblings], n=1)
        meant = f"; did you mean {siblings.get(close[0], close[0])!r}?" if close else "."
        raise DataError(f"{path.absolute()} does not exist{meant} {CHOICES}")
    tree = replace(list_files(path), dimensions=config.dimensions, memo=memo, with_labels=config.stream is not None)
    return replace(tree, condition=config.condition)


def _choose_files(tree: Tree, config: DataConfig) -> tuple[Tree, tuple[str, ...]]:
    """The files of one data set, and warnings, where metadata or folders are of several."""
    if tree.is_file and config.config is not None:
        raise DataError(f"data.config: {config.config} is of a folder, and this is a file; leave it out")
    if tree.is_file or (README not in tree.names and config.config is None):
        return tree, ()
    readme = b""
    if README in tree.names:
        with tree.open(README) as file:
            readme = file.read(MOST_BYTES)
    found = choose_config(tree.names, readme.decode(errors="replace"), config.config)
    return replace(tree, names=sorted(found.names), splits=found.splits, classes=found.classes), found.warnings


def _tell_unknown(tree: Tree) -> str:
    """Of files of which no format finds its own."""
    if tree.is_file:
        with tree.open(tree.names[0]) as file:
            size = file.seek(0, 2)
        return f"it is a file of {size:,} bytes in no format known here. {CHOICES}"
    if tree.store:
        names = sorted({name.partition("/")[0] for name in tree.names})
    else:
        names = sorted(p.name for p in tree.root.iterdir())
    return f"no images found in it; it holds {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}. {CHOICES}"
