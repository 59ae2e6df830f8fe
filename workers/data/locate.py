"""From a `DataConfig` to the files that it means: where they lie, and in which format."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from workers.config import DataConfig
from workers.data.built_in import BUILT_IN
from workers.data.cache import lock_cache
from workers.data.formats import CHOICES, FORMATS
from workers.data.splits import DataError
from workers.data.tree import Files, Split, describe_left_out, list_files
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
    return name.removesuffix(".parquet").removesuffix(".npz").removesuffix(".npy")


def locate(config: DataConfig, cache: Path) -> tuple[str, Files, str, list[str]]:
    """The name of the format at `config.source`, its files, and what is left out: all in words, and warnings."""
    if config.source in BUILT_IN:
        if config.dimensions != 2:
            raise DataError(f"data.dimensions: {config.dimensions} is of .npy and .npz; leave it out")
        return config.source, BUILT_IN[config.source](), "", []
    if is_remote(config):
        from workers.data.mirror import mirror_uri  # with pyarrow, which a dry run on other data does without

        key = compute_digest(config.source)
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
    tree = replace(list_files(path), dimensions=config.dimensions)
    for kind, find in FORMATS.items():
        files = find(tree)
        splits = [s for s in (files.train, files.held_out) if isinstance(s, Split)] if files else []
        if any(split.count == 0 for split in splits):
            raise DataError(f"this {kind} source has no images in its training or test split; add some. {CHOICES}")
        if (count := sum(split.count for split in splits)) > MOST_IMAGES:
            raise DataError(f"it claims {count:,} images, of which at most {MOST_IMAGES:,} are read; take fewer")
        if files and config.dimensions != 2 and (kind != "arrays" or config.resolution is not None):
            named = "data.resolution is" if kind == "arrays" else f"{kind} are"
            raise DataError(
                f"data.dimensions: {config.dimensions} is of .npy and .npz, and {named} of images; leave it out"
            )
        if files:
            return kind, files, *describe_left_out(tree, files)
    if path.is_file():
        raise DataError(f"it is a file of {path.stat().st_size:,} bytes in no format known here. {CHOICES}")
    names = sorted(p.name for p in path.iterdir())
    raise DataError(
        f"no images found in it; it holds {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}. {CHOICES}"
    )
