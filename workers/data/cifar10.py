"""CIFAR-10's binary version."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from workers.data.decoding import Item
from workers.data.splits import DataError, list_names
from workers.data.tree import Files, Split, Tree, check_in_one_folder

# Of the classes, by label: its batches.meta.txt.
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def find_cifar10(tree: Tree) -> Files | None:
    """CIFAR-10's binary version: records of a label byte and 3x32x32 pixel bytes, channel first."""
    train = check_in_one_folder([n for n in tree.names if re.fullmatch(r"data_batch_.*\.bin", n.rpartition("/")[2])])
    if tree.is_file or not train:
        return None
    test = [name for name in (f"{train[0].rpartition('/')[0]}/test_batch.bin".lstrip("/"),) if name in tree.names]
    batches = [name.rpartition("/")[2] for name in train]
    missing = [n for n in (f"data_batch_{k}.bin" for k in range(1, 6)) if n not in batches]
    if missing and missing[0] < batches[-1]:
        raise DataError(f"missing: {list_names(missing)} of CIFAR-10's five batches; download all of it again")
    warnings = [f"of CIFAR-10's five batches {list_names(missing)} are not there"] if missing else []
    warnings += [] if test else ["test_batch.bin is not there: a part of the other batches is held out"]
    paths = [(name.rpartition("/")[2], tree.get_path(name)) for name in train + test]
    splits = [_make_split([tree.get_path(name) for name in some]) for some in (train, test) if some]
    like, where = np.zeros((32, 32, 3), np.uint8), (list_names(train, 2), list_names(test))
    return Files(
        paths,
        splits[0],
        splits[1] if splits[1:] else None,
        like=like,
        where=where,
        warnings=tuple(warnings),
        class_names=NAMES,
    )


def _make_split(paths: list[Path]) -> Split:
    sizes = {path: path.stat().st_size for path in paths}
    for path, size in sizes.items():
        if size == 0 or size % 3073:
            raise DataError(f"{path.name} has {size:,} bytes, not a multiple of 3,073: cut off; download it again")

    def read() -> Iterator[Item]:
        for path in paths:
            for row, record in enumerate(np.memmap(path, np.uint8, "r").reshape(-1, 3073)):
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)  # CHW -> HWC
                if record[0] > 9:
                    raise DataError(
                        f"{path.name} record {row} has the label {record[0]}, and CIFAR-10's are 0 to 9; download it "
                        "again"
                    )
                yield Item(f"{path.name} record {row}", image, int(record[0]))

    return Split(sum(sizes.values()) // 3073, True, read)
