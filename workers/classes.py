"""What a network can be told of an image: its class, or a sequence of vectors.

A label is the number of a class, from 0 on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from workers.config import Mistake, What

Labels = Int64[np.ndarray, "n"]

NO_LABEL = -1  # in the place of a label, where the class is not told
MOST_CLASSES = 2**16  # that a network is told
LONGEST, WIDEST = 4096, 2**16  # of the vectors that it is told
# 2^64 / the golden ratio: its multiples, modulo 2^64, fill every interval as evenly as any sequence does.
GOLDEN = 11400714819323198485


@dataclass(frozen=True)
class Classes:
    """By label: the name of the class, which is its number where the data have no name, and its images to train on."""

    KIND: ClassVar[What] = "labels"  # as `model.told` has it

    names: tuple[str, ...]
    images: tuple[int, ...]

    @staticmethod
    def of(labels: Labels, names: Sequence[str], count: int) -> "Classes":
        """The `count` classes of training images with these labels."""
        named = tuple(names[label] if label < len(names) else str(label) for label in range(count))
        return Classes(named, tuple(np.bincount(labels, minlength=count).tolist()))

    def assign(self, samples: Labels) -> Labels:
        """The labels of samples by their numbers: in the proportions of the training images, a function of the number.

        Sample k has the label of the sorted training images at the quantile k / golden ratio mod 1, in whole numbers
        and so equal everywhere. Of the first n samples a class has its share but for about log n of them.
        """
        quantile = (samples.astype(np.uint64) * np.uint64(GOLDEN)) >> np.uint64(32)  # in units of 2^-32
        image = (quantile * np.uint64(sum(self.images))) >> np.uint64(32)
        return np.searchsorted(np.cumsum(self.images), image.astype(np.int64), side="right")

    def find(self, text: str) -> int:
        """The label of a class by its name or number. Raises Mistake where there is none."""
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        named = ", ".join(self.names[:20]) + ", ..." * (len(self.names) > 20)
        raise Mistake(f"there is no class {text[:40]!r}; give a number of 0 to {len(self.names) - 1}, or of {named}")

    def list_trained(self) -> list[int]:
        """The labels that there are images of to train on."""
        return [label for label, count in enumerate(self.images) if count]


@dataclass(frozen=True)
class Vectors:
    """A sequence of `length` vectors of `width` numbers, of each image; of any length where that is 0.

    All zeros tell nothing of it.
    """

    KIND: ClassVar[What] = "vectors"

    length: int
    width: int
    withheld: bool = False  # whether a network was trained without them, too

    def fits(self, length: int, width: int) -> bool:
        """Whether a network that is told these takes a sequence of so many vectors of so many numbers."""
        return width == self.width and self.length in (0, length)


Told = Classes | Vectors
