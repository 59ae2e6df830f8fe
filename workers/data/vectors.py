"""Vectors beside images: a column of Parquet files, with a sequence of them for each image.

Importing this does not import pyarrow.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32

from workers.data.splits import DataError, show_name

Row = Float32[np.ndarray, "length width"]


def holds_vectors(kind: Any) -> bool:
    """Whether a column of this type has lists of floats, or lists of lists of them, or tensors of one or two sides."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.FixedShapeTensorType):
        return len(kind.shape) <= 2 and types.is_floating(kind.value_type)
    if not _is_list(kind):
        return False
    inner = kind.value_type
    return bool(types.is_floating(inner) or (_is_list(inner) and types.is_floating(inner.value_type)))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def split_vectors(column: Any, name: str) -> Iterator[Row]:
    """The vectors of each row of an Arrow array: a list of floats is one. Raises DataError where some are missing."""
    import pyarrow
    from pyarrow import compute

    if isinstance(column.type, pyarrow.FixedShapeTensorType):
        _check_whole(column, name)
        for row in column.to_numpy_ndarray():
            yield np.atleast_2d(row).astype(np.float32)
        return
    lists = [column]
    while _is_list(lists[-1].type):
        _check_whole(lists[-1], name)
        lists.append(lists[-1].flatten())
    _check_whole(lists[-1], name)
    numbers = lists.pop().to_numpy(zero_copy_only=False).astype(np.float32)
    lengths = [compute.list_value_length(some).to_numpy(zero_copy_only=False).astype(np.int64) for some in lists]
    if len(lengths) == 1:
        for row in np.split(numbers, np.cumsum(lengths[0])[:-1]):
            yield row[None]
        return
    counts, widths = lengths
    ends = np.cumsum(widths)
    for row in np.split(np.arange(len(widths)), np.cumsum(counts)[:-1]):
        different = np.unique(widths[row])
        if len(different) > 1:
            raise DataError(
                f"data.condition: a row of {show_name(name)} has vectors of {different[0]} and of {different[1]} "
                "numbers; pad or cut all to one width"
            )
        first = ends[row[0]] - widths[row[0]] if len(row) else 0
        size = int(widths[row].sum())
        yield numbers[first : first + size].reshape(len(row), -1 if size else 0)


def _check_whole(array: Any, name: str) -> None:
    if array.null_count:
        raise DataError(
            f"data.condition: {array.null_count} values of {show_name(name)} are missing; every image needs its "
            "vectors, whole"
        )
