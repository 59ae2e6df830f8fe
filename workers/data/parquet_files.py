"""Parquet files in the Hugging Face layout, read a batch of rows at a time. Importing this does not import pyarrow."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from workers.data import splits as layouts
from workers.data.arrays import TYPES, check_pixels
from workers.data.decoding import SUFFIXES, Item, Pixels, explain_damage
from workers.data.shards import Header, join_shards, read_headers
from workers.data.splits import DataError, list_names, show_name
from workers.data.tree import CHUNK, PIECE, Files, Shard, Tree, warn_of_missing_labels
from workers.data.vectors import holds_vectors, split_vectors

UNPACKED = 200  # times its size that a column of images may claim to be unpacked, above PIECE: images don't compress


def find_parquet(tree: Tree) -> Files | None:
    """The Hugging Face layout: a struct column of (bytes, path), or one of plain bytes, called `img` or `image` or said
    to be images by the schema's metadata, and, perhaps, an integer `label`, or another one that they say is of classes.
    Or a column of tensors, height x width or height x width x channels. `data.condition` names a column of vectors.

    In a folder, names say which files are which split: `workers.data.splits.arrange_shards`.
    """
    names = tree.list_matching(".parquet")
    if tree.is_file and not names:
        with tree.open(tree.names[0]) as file:
            names = tree.names if file.read(4) == b"PAR1" else []
    if not names:
        return None
    headers = dict(zip(names, read_headers(tree, names, partial(_read_header, tree)), strict=True))
    if tree.list_matching(*SUFFIXES):  # beside images, a table of something else is no data
        names = [name for name in names if headers[name].about["image"]]
    if not names:
        return None
    whole = layouts.Layout(names, None, {}, (names[0], ""))
    layout = whole if tree.is_file else layouts.arrange_shards(names, tree.splits)
    parts = [[_make_shard(tree, n, headers[n]) for n in some] for some in (layout.train, layout.held_out) if some]
    splits = [join_shards(part) for part in parts]
    first = headers[layout.train[0]].about
    missing = warn_of_missing_labels(splits, layout.where, "integer column label")
    used = [*((name, "train") for name in layout.train), *((name, "held_out") for name in layout.held_out or ())]
    like = _find_like({name: headers[name] for name, _ in used})
    return Files(
        [(tag, tree.get_path(name)) for name, tag in used],
        splits[0],
        splits[1] if splits[1:] else None,
        levels=256 if like is None else TYPES[like.dtype.name],
        like=like,
        where=layout.where,
        warnings=(*layout.warnings, *missing, *first["warnings"]),
        known=frozenset(names),
        class_names=tuple(first["classes"]) or tree.classes.get(first["label"] or "", ()),
        shards=tuple(parts[0]),
        has_vectors=tree.condition is not None,
    )


def _read_header(tree: Tree, name: str) -> Header:
    from pyarrow import parquet

    with explain_damage(_shorten(name)), _open(tree, name) as source, parquet.ParquetFile(source) as file:
        schema, images, features = file.schema_arrow, file.metadata.num_rows, _read_features(file.schema_arrow)
        columns = list(_list_image_columns(schema, features))
        label, warnings = _find_label(schema, features)
        kind: Any = schema.field(columns[0][0]).type if columns else None
        shape = [*kind.shape] if _is_tensor(kind) else None
        about = {
            "image": columns[0] if columns else None,
            "kind": str(kind),
            "tensor": shape and [shape, np.dtype(kind.value_type.to_pandas_dtype()).name],
            "label": label,
            "classes": _read_class_names(features, label),
            "vectors": [field.name for field in schema if holds_vectors(field.type)],
            "columns": ", ".join(f"{show_name(field.name)} ({field.type})" for field in schema),
            "warnings": [*_warn_of_columns_left_out([column for column, _ in columns]), *warnings],
        }
        labels = None
        if label and tree.with_labels:
            labels = file.read(columns=[label]).column(label).to_pylist()
            if None in labels:
                missing = f"{_shorten(name)} row {labels.index(None)}"
                raise DataError(f"{show_name(missing)} has no {label}; every row needs one")
    return Header(images, labels, about)


@contextmanager
def _open(tree: Tree, name: str) -> Iterator[Any]:
    """What pyarrow reads: a path, or a file that is elsewhere."""
    if tree.store is None:
        yield tree.get_path(name)
        return
    with tree.open(name) as file:
        yield file


def _shorten(name: str) -> str:
    return name.rpartition("/")[2]


def _read_features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets writes of each column, by its name; nothing where it did not write the file."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}
    return {name: kind for name, kind in found.items() if isinstance(kind, dict)} if isinstance(found, dict) else {}


def _read_class_names(features: dict[str, Any], label: str | None) -> list[str]:
    """The names of the labels, by label; else none."""
    found = features.get(label or "", {}).get("names")
    return list(map(str, found)) if isinstance(found, list) else []


def _find_label(schema: Any, features: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The column of labels: `label`, or the one of classes; and warnings of others."""
    from pyarrow import types

    if "label" in schema.names:
        kind = schema.field("label").type
        if types.is_integer(kind):
            return "label", []
        return None, [f"no labels are used, as column label is of {kind}; integers are"]
    named = [field.name for field in schema if features.get(field.name, {}).get("_type") == "ClassLabel"]
    found = [name for name in named if types.is_integer(schema.field(name).type)]
    if len(found) > 1:
        return None, [f"no labels are used, as columns {list_names(found)} are all of classes; call one label"]
    return (found[0] if found else None), []


def _warn_of_columns_left_out(columns: list[str]) -> list[str]:
    """What is not read of columns that seem to hold images."""
    return [f"left out: column {columns[1]}, as {columns[0]} is taken for the images"] if columns[1:] else []


def _find_like(headers: dict[str, Header]) -> Pixels | None:
    """A black image of the size and type of all, where they are tensors. Raises DataError where they differ."""
    kinds: dict[str, str] = {}  # the type of tensors, or nothing, and the first file that has it
    for name, header in headers.items():
        kinds.setdefault(header.about["kind"] if header.about["tensor"] else "", show_name(_shorten(name)))
    if len(kinds) > 1:
        found = "; ".join(f"{name}: {kind or 'encoded'}" for kind, name in kinds.items())
        raise DataError(f"its files differ in their images ({found}); make them alike")
    [kind] = kinds
    if not kind:
        return None
    shape, name = next(iter(headers.values())).about["tensor"]
    dtype = np.dtype(name)
    check_pixels(f"its column of {kind}", tuple(shape), dtype)
    return np.zeros((*shape, 1)[:3], dtype)


def _is_tensor(kind: Any) -> bool:
    import pyarrow

    return isinstance(kind, pyarrow.FixedShapeTensorType)


def _list_image_columns(schema: Any, features: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The columns of images, and the path in each to their bytes."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    plain = [field for field in schema if field.name in ("img", "image")]
    told = [field for field in schema if features.get(field.name, {}).get("_type") == "Image" and field not in plain]
    for field in [*plain, *told]:
        if holds_bytes(field.type) or _is_tensor(field.type):
            yield field.name, field.name
        if types.is_struct(field.type) and any(f.name == "bytes" and holds_bytes(f.type) for f in field.type):
            yield field.name, f"{field.name}.bytes"


def _make_shard(tree: Tree, name: str, header: Header) -> Shard:
    """Raises DataError where it has no images."""
    short, label = _shorten(name), header.about["label"]
    if header.about["image"] is None:
        raise DataError(
            f"{show_name(short)} has no column img or image of struct<bytes: binary, path>, of binary or of "
            f"tensors; its columns: {header.about['columns']}"
        )
    column, inner = header.about["image"]
    if (vectors := tree.condition) and vectors not in header.about["vectors"]:
        found = list_names(header.about["vectors"]) or "none"
        raise DataError(
            f"data.condition: {show_name(short)} has no column {show_name(vectors)} of lists of floats, or of lists of "
            f"these, one an image; it has {found}; its columns: {header.about['columns']}"
        )

    def read() -> Iterator[Item]:
        columns = [inner, *([label] if label else []), *([vectors] if vectors else [])]
        for number, row in enumerate(_read_rows(tree, name, columns, vectors)):
            told, image, number_of_class = f"{short} row {number}", row[column], row.get(label) if label else None
            image = image["bytes"] if isinstance(image, dict) else image
            if image is None or len(image) == 0 or (label and number_of_class is None):
                raise DataError(f"{show_name(told)} has no {label if image else inner}; every row needs one")
            yield Item(told, image, number_of_class, row[vectors] if vectors else None)

    return Shard(
        name, header.images, label is not None, header.labels, read, None if tree.store else tree.get_path(name)
    )


def _read_rows(tree: Tree, name: str, columns: list[str], vectors: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a file, PIECE bytes of images in memory at a time or one image. Raises DataError.

    A value of a dictionary is stored once, however many rows have it: so a batch is held to what its column's header
    tells for one.
    """
    from pyarrow import parquet

    short = _shorten(name)
    with (
        explain_damage(short),
        _open(tree, name) as source,
        parquet.ParquetFile(source, pre_buffer=tree.store is not None) as file,
    ):
        for group in range(file.metadata.num_row_groups):
            header = file.metadata.row_group(group)
            chunks = [header.column(k) for k in range(header.num_columns)]
            [images] = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{columns[0]}.")]
            size, packed = images.total_uncompressed_size, images.total_compressed_size
            if size > max(PIECE, UNPACKED * packed):
                raise DataError(
                    f"{show_name(short)} claims to hold {size / 1e9:.1f} GB of images in {packed:,} bytes "
                    f"(row group {group}), and encoded images do not compress so far; export it again"
                )
            at_once = max(1, min(CHUNK, PIECE // max(size, 1)))
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns):
                yield from _list_rows(batch) if vectors is None else _list_rows_with_vectors(batch, vectors)


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


def _list_rows_with_vectors(batch: Any, column: str) -> Iterator[dict[str, Any]]:
    """The same, with the vectors of each row."""
    rows = _list_rows(batch.drop_columns(column))
    for row, vectors in zip(rows, split_vectors(batch.column(column), column), strict=True):
        yield {**row, column: vectors}
