"""The weights in a checkpoint's files: safetensors, in one file or in several with an index."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from workers.network.manifest import SAFE, WEIGHTS, Checkpoint, CheckpointError, find_url, read_file, read_object

NAMED = re.compile(r"(diffusion_pytorch_)?model(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?")


def find_weights(root: str, inside: list[str]) -> str:
    """Which of the files in a network's folder holds its weights, or is the index of those that do; the usual name
    where there is none. The weights themselves go before variants of them."""
    usual = PurePosixPath(WEIGHTS).name
    whole = [name for name in (usual, f"{usual}.index.json") if name in inside]
    variants = [name for name in inside if NAMED.fullmatch(name)]
    if not whole and len(variants) > 1:
        raise CheckpointError(f"{root} holds several variants of its weights, {', '.join(variants)}: leave one there")
    return [*whole, *variants, usual][0]


def load_weights(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    content, where = read_file(checkpoint, name), find_url(checkpoint, name)
    if name.endswith(".json"):
        return _join_weights(checkpoint, read_shards(content, where), where)
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{where} is a pointer of Git LFS in the place of the weights: run git lfs pull there")
    return open_tensors(content, where)


def open_tensors(content: bytes, where: str) -> dict[str, Tensor]:
    """Raises CheckpointError, which names the file, where they are none."""
    try:
        return dict(safetensors.torch.load(content))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where} is damaged: it is not safetensors ({error}); restore or save it again"
        ) from error


def _join_weights(checkpoint: Checkpoint, files: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """Weights from several files, each of which holds what the index at `where` says."""
    weights: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        found = load_weights(checkpoint, file)
        if wrong := sorted(found.keys() ^ {name for name, of in files.items() if of == file}):
            raise CheckpointError(
                f"{find_url(checkpoint, file)} does not hold what {where} says: they differ in {', '.join(wrong[:3])}"
                f"{', ...' * (len(wrong) > 3)}. Download or save the folder again"
            )
        weights |= found
    return weights


def read_shards(index: bytes, where: str) -> dict[str, str]:
    """The file of each tensor, by an index of several files with weights. Raises CheckpointError."""
    found = read_object(index, where).get("weight_map")
    files = list(found.values()) if isinstance(found, dict) else []
    if not files or not all(isinstance(f, str) and f.endswith(SAFE) and PurePosixPath(f).name == f for f in files):
        raise CheckpointError(f"{where} is damaged: weight_map does not name a file beside it for each of the weights")
    return dict(found or {})


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
