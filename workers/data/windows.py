"""The order in which images are trained on where `data.shuffle` names a window of shards: pure functions.

An epoch is a permutation of the shards, cut into windows of so many; the images of a window are permuted, and all of
one window are trained on before the next. So a reader needs the shards of a window at a time, and each image comes
once an epoch. Both permutations are drawn from the seed and the numbers of epoch and window alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64

from workers.noise import make_generator

Numbers = Int64[np.ndarray, "n"]


class ShardOrder:
    """The images of a batch by its step. Images are numbered through the shards, from 0 on."""

    def __init__(self, seed: int, counts: Sequence[int], window: int) -> None:
        """`counts` are the images of each shard, of which `window` are shuffled together."""
        self.seed, self.counts, self.window = seed, np.asarray(counts, np.int64), window
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # image of each shard, and their number
        self.images = int(self.first[-1])
        self.windows = -(-len(counts) // window)  # in an epoch
        self._kept: dict[int, Numbers] = {}  # what is in use, by the number of the window
        self._shards: dict[int, Numbers] = {}  # and the order of the shards, by epoch

    def draw(self, step: int, batch_size: int) -> Numbers:
        """int64 (batch_size,): the images of the global batch of this step, nothing dropped between epochs."""
        place, end = step * batch_size, (step + 1) * batch_size
        found, used = [], list[int]()
        while place < end:
            number, offset = self._find_window(place)
            images = self._list_images(number)
            found.append(images[offset : offset + end - place])
            place += len(found[-1])
            used.append(number)
        self._kept = {number: self._kept[number] for number in used}
        epochs = {number // self.windows for number in used}
        self._shards = {epoch: shards for epoch, shards in self._shards.items() if epoch >= min(epochs)}
        return np.concatenate(found)

    def list_shards(self, step: int, batch_size: int) -> list[int]:
        """The shards of this batch's windows, or of its window and the next, in their order."""
        first, _ = self._find_window(step * batch_size)
        last, _ = self._find_window((step + 1) * batch_size - 1)
        return list(
            dict.fromkeys(
                shard for n in range(first, max(last, first + 1) + 1) for shard in self._take_window(n).tolist()
            )
        )

    def _find_window(self, place: int) -> tuple[int, int]:
        """The number of the window, counted through all epochs, and the offset in it of an image by its place."""
        epoch, rest = divmod(place, self.images)
        ends = np.cumsum(self.counts[self._order_shards(epoch)])
        last = [min(end, len(ends)) - 1 for end in range(self.window, len(ends) + self.window, self.window)]
        number = int(np.searchsorted(ends[last], rest, side="right"))
        return epoch * self.windows + number, rest - (int(ends[last[number - 1]]) if number else 0)

    def _take_window(self, number: int) -> Numbers:
        epoch, n = divmod(number, self.windows)
        return self._order_shards(epoch)[n * self.window : (n + 1) * self.window]

    def _order_shards(self, epoch: int) -> Numbers:
        if epoch not in self._shards:
            noise = make_generator(self.seed, "shards", epoch)
            self._shards[epoch] = torch.randperm(len(self.counts), generator=noise).numpy()
        return self._shards[epoch]

    def _list_images(self, number: int) -> Numbers:
        if number not in self._kept:
            shards = self._take_window(number)
            images = np.concatenate([np.arange(self.first[k], self.first[k + 1]) for k in shards])
            noise = make_generator(self.seed, "window", number)
            self._kept[number] = images[torch.randperm(len(images), generator=noise).numpy()]
        return self._kept[number]
