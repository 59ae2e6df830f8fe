"""Which of a source's images are held out, and in what order both splits are kept."""

import numpy as np
from numpy.typing import NDArray

from workers.data.splits import SPLIT_SEED


def number_rows(held_out: int, train: int, own_split: bool, by_shards: bool = False) -> NDArray[np.int64]:
    """The row of each item, items being the test split then the training split, or the one undivided split.

    With `by_shards` those to train on stay in the order of their shards, as a stream has them.
    Rows 0 .. held_out - 1 are the held-out images. RandomState's stream is frozen for good (NEP 19), so the split
    is the same under every version of NumPy.
    """
    random = np.random.RandomState(SPLIT_SEED)
    if by_shards:
        return np.concatenate([random.permutation(held_out), held_out + np.arange(train)])
    if own_split:
        return np.concatenate([random.permutation(held_out), held_out + random.permutation(train)])
    return random.permutation(held_out + train)
