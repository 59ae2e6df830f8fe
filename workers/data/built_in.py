"""The sources that need no files: handwritten digits, and images whose best denoiser is known exactly."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from workers.data.decoding import Item
from workers.data.splits import DataError
from workers.data.tree import Files, Split

DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
GAUSSIAN_SHA256 = "f1df631486df9f08144835587ecb45fbe11f06b659dfeba209c4645379ddc467"
GAUSSIAN_SD = 0.2  # of the source `open_gaussian`, on the [-1, 1] scale


def open_digits() -> Files:
    """scikit-learn's embedded 1,797 handwritten digits, 8x8 in 17 levels; 300 are held out."""

    def read() -> Iterator[Item]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != DIGITS_SHA256:
            raise DataError("this version of scikit-learn ships other digits; install scikit-learn 1.9")
        for row, image in enumerate(images):
            yield Item(f"digit {row}", image[:, :, None], int(labels[row]))

    like = np.zeros((8, 8, 1), np.uint8)
    return Files([], Split(1797, True, read), held_out=300, levels=17, like=like, sha256=DIGITS_SHA256, classes=10)


def open_gaussian() -> Files:
    """2,500 images of 8x8 independent pixels from N(0, GAUSSIAN_SD^2) on [-1, 1], in 256 levels; 500 held out.

    Their best denoiser and its bound are known exactly (`workers.diffusion.gaussian`). The ends of the scale lie five
    standard deviations away: a pixel would pass them with probability 5.7e-7, and none of these does.
    """

    def read() -> Iterator[Item]:
        x = GAUSSIAN_SD * np.random.RandomState(0).standard_normal((2500, 8, 8, 1))  # frozen, as in `order.number_rows`
        images = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        if hashlib.sha256(images.tobytes()).hexdigest() != GAUSSIAN_SHA256:
            raise DataError("this version of NumPy draws other normal numbers from RandomState; install NumPy 2")
        for row, image in enumerate(images):
            yield Item(f"gaussian {row}", image)

    like = np.zeros((8, 8, 1), np.uint8)
    return Files([], Split(2500, False, read), held_out=500, like=like, sha256=GAUSSIAN_SHA256, classes=0)


BUILT_IN: dict[str, Callable[[], Files]] = {"digits": open_digits, "gaussian": open_gaussian}
