"""What lies at a source: one function a format, from the names of the files there to `Files`, nothing decoded.

    path -> list_files: the tree, once, links followed -> a format's function: `tree.Files`

To add a format, write a function from a `Tree` to `Files` (None where the tree holds something else) and list it in
`workers.kinds`, or name it in `data.format`. `workers.data.splits` says what names mean: splits, classes, shards.
`Files.warnings` tells what had to be guessed or was left out; what cannot be guessed is refused.

What a header claims is held against the size of its file before memory is asked for.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from workers.code import CodeError, describe_error, drop_pin
from workers.data import splits as layouts
from workers.data.built_in import BUILT_IN
from workers.data.decoding import SUFFIXES, TIFF, Item
from workers.data.splits import DataError, show_name
from workers.data.tree import Files, Split, Tree
from workers.kinds import FORMATS


def find_images(tree: Tree) -> Files | None:
    """Images at any depth: `workers.data.splits.arrange_images` says which are held out, and of which class each is."""
    names = tree.list_matching(*SUFFIXES) or tree.list_matching(*TIFF)
    if not names:
        return None
    layout = layouts.arrange_images(names)
    told = {name: tree.splits[name] for name in names if name in tree.splits}
    trained = set(layout.train)
    if other := next((name for name, split in told.items() if (split == "train") != (name in trained)), None):
        raise DataError(
            f"README.md says that {show_name(other)} is of the split {told[other]}, and the names of folders do not; "
            "call its folder train/ or test/, or remove configs from README.md"
        )
    used = [(name, tree.get_path(name)) for name in layout.train + (layout.held_out or [])]
    splits = [
        _make_image_split(tree, some, layout.labels) for some in (layout.train, layout.held_out) if some is not None
    ]
    classes = len(set(layout.labels.values()))
    known = frozenset(names)
    return Files(
        used,
        splits[0],
        splits[1] if splits[1:] else None,
        where=layout.where,
        warnings=layout.warnings,
        known=known,
        classes=classes,
        class_names=layout.classes,
    )


def _make_image_split(tree: Tree, names: list[str], labels: Mapping[str, int]) -> Split:
    def read() -> Iterator[Item]:
        for name in names:
            yield Item(name, tree.get_path(name), labels.get(name))

    return Split(len(names), bool(labels), read)


CHOICES = (
    f"Give {', '.join(map(repr, BUILT_IN))} or a path: a Parquet file or a folder of them, with a column img or image; "
    f"a folder of images ({', '.join(SUFFIXES + TIFF)}); a folder with CIFAR-10's data_batch_*.bin and test_batch.bin; "
    "one with train-images-idx3-ubyte.gz and its companions; an .npz or .npy of images, or a folder of them; or tar "
    "files of images, as of WebDataset. Unpack other archives first."
)


# ---- Of whoever wrote it ---------------------------------------------------------------------------------------


def find_files(tree: Tree, kind: str | None) -> tuple[str, Files] | None:
    """The files in the format `kind`, or in the first that finds its own, with its name. Raises DataError."""
    if kind is None:
        found = ((name, _find_with(tree, name)) for name in map(FORMATS.pin, FORMATS))
        return next(((name, files) for name, files in found if files), None)
    files = _find_with(tree, kind)
    if files is None:
        others = [name for name in FORMATS if name != kind and _find_with(tree, name)]
        hint = f"; it is in the format {others[0]}" if others else ""
        raise DataError(f"data.format: {drop_pin(kind)} finds nothing of its own there{hint}")
    return kind, files


def _find_with(tree: Tree, kind: str) -> Files | None:
    """What a format makes of the files; of one that is not ours with its mistakes told in words."""
    if "@" not in kind:
        return FORMATS[kind].load()(tree)  # type: ignore[no-any-return]
    with _explain(kind):
        files: Any = FORMATS[kind].load()(tree)
    if files is None:
        return None
    if not isinstance(files, Files):
        raise DataError(f"data.format: {drop_pin(kind)} returns {type(files).__name__}, where Files or None belong")
    if not files.paths and not files.sha256:
        raise DataError(f"data.format: {drop_pin(kind)} lists no files in `paths`, by whose content data are known")
    held_out = _guard(files.held_out, kind) if isinstance(files.held_out, Split) else files.held_out
    return replace(files, train=_guard(files.train, kind), held_out=held_out)


def _guard(split: Split, kind: str) -> Split:
    def read() -> Iterator[Item]:
        with _explain(kind):
            for item in split.read():
                if not isinstance(item, Item):
                    raise DataError(f"data.format: {drop_pin(kind)} reads {type(item).__name__}, where an Item belongs")
                yield item

    return replace(split, read=read)


@contextmanager
def _explain(kind: str) -> Iterator[None]:
    """What somebody's own code raises becomes a message with its file and line."""
    try:
        yield
    except (DataError, CodeError):
        raise
    except Exception as error:
        raise DataError(f"data.format: {describe_error(error, drop_pin(kind))}") from error
