"""What lies at a source: one function a format, from the names of the files there to `Files`, nothing decoded.

    path -> list_files: the tree, once, links followed -> a format's function: `tree.Files`

To add a format, write a function from a `Tree` to `Files` (None where the tree holds something else) and list it in
`FORMATS`; the first that finds its own is taken. `workers.data.splits` says what names mean: splits, classes, shards.
`Files.warnings` tells what had to be guessed or was left out; what cannot be guessed is refused.

What a header claims is held against the size of its file before memory is asked for.
"""

from collections.abc import Callable, Iterator, Mapping

from workers.data import arrays
from workers.data import splits as layouts
from workers.data.built_in import BUILT_IN
from workers.data.cifar10 import find_cifar10
from workers.data.decoding import SUFFIXES, TIFF, Item
from workers.data.idx import find_idx
from workers.data.parquet_files import find_parquet
from workers.data.tree import Files, Split, Tree


def find_images(tree: Tree) -> Files | None:
    """Images at any depth: `workers.data.splits.arrange_images` says which are held out, and of which class each is."""
    names = tree.list_matching(*SUFFIXES) or tree.list_matching(*TIFF)
    if not names:
        return None
    layout = layouts.arrange_images(names)
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


FORMATS: dict[str, Callable[[Tree], Files | None]] = {
    "parquet": find_parquet,
    "cifar10-binary": find_cifar10,
    "idx": find_idx,
    "images": find_images,
    "arrays": arrays.find_arrays,
}
CHOICES = (
    f"Give {', '.join(map(repr, BUILT_IN))} or a path: a Parquet file or a folder of them, with a column img or image; "
    f"a folder of images ({', '.join(SUFFIXES + TIFF)}); a folder with CIFAR-10's data_batch_*.bin and test_batch.bin; "
    "one with train-images-idx3-ubyte.gz and its companions; or an .npz or .npy of images, or a folder of them. Unpack "
    "archives first."
)
