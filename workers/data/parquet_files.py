"""Parquet files in the Hugging Face layout, read a batch of rows at a time. Importing this does not import pyarrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.data import splits as layouts
from workers.data.decoding import SUFFIXES, Item, explain_damage
from workers.data.splits import DataError, show_name
from workers.data.tree import CHUNK, PIECE, Files, Split, Tree, warn_of_missing_labels

UNPACKED = 200  # times its size that a column of images may claim to be unpacked, above PIECE: images don't compress


def find_parquet(tree: Tree) -> Files | None:
    """The Hugging Face layout: a struct column `img` or `image` of (bytes, path), or one of plain bytes, and, perhaps,
    an integer `label`.

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
    return Files(
        paths,
        splits[0],
        splits[1] if splits[1:] else None,
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
            if holds_bytes(field.type):
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
                f"{show_name(path.name)} has no column img or image of struct<bytes: binary, path> or of binary; its "
                f"columns: {found}"
            )
        columns.append(column)
        labelled = labelled and "label" in schema.names and types.is_integer(schema.field("label").type)

    def read() -> Iterator[Item]:
        for path, (column, inner) in zip(paths, columns, strict=True):
            rows = _read_rows(path, [inner, "label"] if labelled else [inner])
            for number, row in enumerate(rows):
                name, image, label = f"{path.name} row {number}", row[column], row.get("label")
                image = image["bytes"] if isinstance(image, dict) else image
                if not image or (labelled and label is None):
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
            [images] = [chunk for chunk in chunks if chunk.path_in_schema == columns[0]]
            size, packed = images.total_uncompressed_size, images.total_compressed_size
            if size > max(PIECE, UNPACKED * packed):
                raise DataError(
                    f"{show_name(path.name)} claims to hold {size / 1e9:.1f} GB of images in {packed:,} bytes "
                    f"(row group {group}), and encoded images do not compress so far; export it again"
                )
            at_once = max(1, min(CHUNK, PIECE // max(size, 1)))
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns):
                yield from batch.to_pylist()
