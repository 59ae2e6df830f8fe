"""Parquet files in the Hugging Face layout, read a batch of rows at a time. Importing this does not import pyarrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from workers.data import splits as layouts
from workers.data.arrays import TYPES, check_pixels
from workers.data.decoding import SUFFIXES, Item, Pixels, explain_damage
from workers.data.splits import DataError, show_name
from workers.data.tree import CHUNK, PIECE, Files, Split, Tree, warn_of_missing_labels

UNPACKED = 200  # times its size that a column of images may claim to be unpacked, above PIECE: images don't compress


def find_parquet(tree: Tree) -> Files | None:
    """The Hugging Face layout: a struct column `img` or `image` of (bytes, path), or one of plain bytes, and, perhaps,
    an integer `label`. Or a column of tensors, height x width or height x width x channels.

    In a folder, names say which files are which split: `workers.data.splits.arrange_parquet`.
    """
    names = tree.list_matching(".parquet")
    if tree.is_file and not names:
        with tree.get_path(tree.names[0]).open("rb") as file:
            names = tree.names if file.read(4) == b"PAR1" else []
    if tree.list_matching(*SUFFIXES):  # beside images, a table of something else is no data
        names = [name for name in names if _find_image_column(_read_schema(tree.get_path(name)))]
    if not names:
        return None
    layout = layouts.Layout(names, None, {}, (names[0], "")) if tree.is_file else layouts.arrange_parquet(names)
    train, held_out = ([tree.get_path(name) for name in some or []] for some in (layout.train, layout.held_out))
    splits = [_make_split(some) for some in (train, held_out) if some]
    missing = warn_of_missing_labels(splits, layout.where, "integer column label")
    warnings = [*layout.warnings, *missing, *_warn_of_columns_left_out(_read_schema(train[0]))]
    paths = [("train", p) for p in train] + [("held_out", p) for p in held_out]
    like = _find_like([path for _, path in paths])
    return Files(
        paths,
        splits[0],
        splits[1] if splits[1:] else None,
        levels=256 if like is None else TYPES[like.dtype.name],
        like=like,
        where=layout.where,
        warnings=tuple(warnings),
        known=frozenset(names),
        class_names=_read_class_names(_read_schema(train[0])),
    )


def _read_class_names(schema: Any) -> tuple[str, ...]:
    """The names of the labels, by label, that Hugging Face's datasets writes beside a column `label`; else none."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _read_schema(path: Path) -> Any:
    from pyarrow import parquet

    with explain_damage(path.name), parquet.ParquetFile(path) as file:
        return file.schema_arrow


def _warn_of_columns_left_out(schema: Any) -> Iterator[str]:
    """What its columns seem to hold, and what is not read of it."""
    from pyarrow import types

    taken, *others = _list_image_columns(schema)
    if others:
        yield f"left out: column {others[0][0]}, as {taken[0]} is taken for the images"
    for field in schema:
        if field.name == "label" and not types.is_integer(field.type):
            yield f"no labels are used, as column label is of {field.type}; integers are"


def _find_like(paths: list[Path]) -> Pixels | None:
    """A black image of the size and type of all, where they are tensors. Raises DataError where they differ."""
    kinds: dict[Any, str] = {}  # the type of tensors, or None, and the first file that has it
    for path in paths:
        schema = _read_schema(path)
        column = _find_image_column(schema)
        kind = schema.field(column[0]).type if column else None
        kinds.setdefault(kind if _is_tensor(kind) else None, show_name(path.name))
    if len(kinds) > 1:
        found = "; ".join(f"{name}: {kind or 'encoded'}" for kind, name in kinds.items())
        raise DataError(f"its files differ in their images ({found}); make them alike")
    [kind] = kinds
    if kind is None:
        return None
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    check_pixels(f"its column of {kind}", tuple(kind.shape), dtype)
    return np.zeros((*kind.shape, 1)[:3], dtype)


def _is_tensor(kind: Any) -> bool:
    import pyarrow

    return isinstance(kind, pyarrow.FixedShapeTensorType)


def _find_image_column(schema: Any) -> tuple[str, str] | None:
    """The column of images and the path in it to their bytes; None where there is none."""
    return next(_list_image_columns(schema), None)


def _list_image_columns(schema: Any) -> Iterator[tuple[str, str]]:
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    for field in schema:
        if field.name in ("img", "image"):
            if holds_bytes(field.type) or _is_tensor(field.type):
                yield field.name, field.name
            if types.is_struct(field.type) and any(f.name == "bytes" and holds_bytes(f.type) for f in field.type):
                yield field.name, f"{field.name}.bytes"


def _make_split(paths: list[Path]) -> Split:
    from pyarrow import parquet, types

    columns, labelled, count = [], True, 0
    for path in paths:
        with explain_damage(path.name), parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, count + file.metadata.num_rows
        if (column := _find_image_column(schema)) is None:
            found = ", ".join(f"{show_name(field.name)} ({field.type})" for field in schema)
            raise DataError(
                f"{show_name(path.name)} has no column img or image of struct<bytes: binary, path>, of binary or of "
                f"tensors; its columns: {found}"
            )
        columns.append(column)
        labelled = labelled and "label" in schema.names and types.is_integer(schema.field("label").type)

    def read() -> Iterator[Item]:
        for path, (column, inner) in zip(paths, columns, strict=True):
            rows = _read_rows(path, [inner, "label"] if labelled else [inner])
            for number, row in enumerate(rows):
                name, image, label = f"{path.name} row {number}", row[column], row.get("label")
                image = image["bytes"] if isinstance(image, dict) else image
                if image is None or len(image) == 0 or (labelled and label is None):
                    raise DataError(f"{show_name(name)} has no {'label' if image else inner}; every row needs one")
                yield Item(name, image, label)

    return Split(count, labelled, read)


def _read_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file, PIECE bytes of images in memory at a time or one image. Raises DataError.

    A value of a dictionary is stored once, however many rows have it: so a batch is held to what its column's header
    tells for one.
    """
    from pyarrow import parquet

    with explain_damage(path.name), parquet.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            header = file.metadata.row_group(group)
            chunks = [header.column(k) for k in range(header.num_columns)]
            [images] = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{columns[0]}.")]
            size, packed = images.total_uncompressed_size, images.total_compressed_size
            if size > max(PIECE, UNPACKED * packed):
                raise DataError(
                    f"{show_name(path.name)} claims to hold {size / 1e9:.1f} GB of images in {packed:,} bytes "
                    f"(row group {group}), and encoded images do not compress so far; export it again"
                )
            at_once = max(1, min(CHUNK, PIECE // max(size, 1)))
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns):
                yield from _list_rows(batch)


def _list_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """As `to_pylist`, a tensor as height x width x channels."""
    column = next((field.name for field in batch.schema if _is_tensor(field.type)), None)
    if column is None:
        yield from batch.to_pylist()
        return
    tensors, others = batch.column(column), batch.drop_columns(column)
    images = tensors.to_numpy_ndarray().reshape(len(tensors), *(*tensors.type.shape, 1)[:3])
    for number, image in enumerate(images):  # Arrow itself refuses a file where one is missing
        yield {name: others.column(name)[number].as_py() for name in others.schema.names} | {column: image}
