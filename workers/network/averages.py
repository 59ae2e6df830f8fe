"""Averages of weights that are made after the training: what a trial keeps for them, and how they are put together.

    trials/<trial>/posthoc/step-00000050-0f3a9c5d2b7e4816.safetensors    the averages of all widths after that step
    trials/<trial>/checkpoints/step-00000300/widths/0.05.safetensors     those of the checkpoint's own step

What is kept is named by its content, too, and the manifest of a checkpoint names with its sha256 what was kept before
it: so a checkpoint finds what it was made with, whatever is trained again later. A branch names what its trunk kept.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from workers.network.manifest import (
    SAFE,
    Checkpoint,
    CheckpointError,
    get_step_of_kept,
    hash_bytes,
    list_kept,
    list_widths,
    name_average,
    name_step,
    name_width,
    read_bytes,
)
from workers.network.weights import load_weights, open_tensors, write_tensors
from workers.posthoc import Profile, combine
from workers.storage import Storage

Weights = dict[str, Tensor]


def keep(storage: Storage, folder: str, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> dict[str, str]:
    """Writes the averages of a trial after a step into its folder. Returns the file's sha256 by its path."""
    named = {f"{width}/{name}": w for width, weights in averages.items() for name, w in weights.items()}
    content = write_tensors(named)
    path = f"{folder}/posthoc/{name_step(step)}-{hash_bytes(content)[:16]}{SAFE}"
    storage.write(path, content)
    return {path: hash_bytes(content)}


def list_profiles(checkpoint: Checkpoint) -> list[Profile]:
    """Of all averages that one of another width can be made of."""
    assert checkpoint.step is not None
    steps = [*(get_step_of_kept(path) for path, _ in list_kept(checkpoint)), checkpoint.step]
    return [Profile(step, width) for step in steps for width in list_widths(checkpoint)]


def load_averages(checkpoint: Checkpoint, decays: Iterable[float]) -> dict[float, Weights]:
    """The checkpoint's further averages, to resume from. Raises CheckpointError where bytes are damaged."""
    return {decay: load_weights(checkpoint, name_average(decay)) for decay in decays}


def load_widths(checkpoint: Checkpoint, widths: Iterable[float]) -> dict[float, Weights]:
    """The checkpoint's own averages of these widths, to resume from. Raises CheckpointError where bytes are damaged."""
    return {width: load_weights(checkpoint, name_width(width)) for width in widths}


def load_chosen(checkpoint: Checkpoint) -> Weights:
    """The weights that the checkpoint is opened with. Raises CheckpointError where bytes are damaged."""
    if checkpoint.width is not None:
        return make_average(checkpoint, checkpoint.width)
    return load_weights(checkpoint, checkpoint.weights)


def make_average(checkpoint: Checkpoint, width: float) -> Weights:
    """The average of a width at the checkpoint's step, float32. Raises CheckpointError where bytes are damaged, or not
    there."""
    assert checkpoint.step is not None
    kept = list_profiles(checkpoint)
    made = combine(kept, Profile(checkpoint.step, width))
    return _add_up(checkpoint, [dict(zip(kept, made.coefficients, strict=True))])[0]


def measure_error(checkpoint: Checkpoint, width: float) -> dict[str, Any]:
    """How far an average that is made is from the same one as it was stored, beside what is known of the average of
    `width` without the weights. Errors are norms of differences over the norm of what should be.

    The stored one is the checkpoint's own whose width is nearest, made of the other widths alone. Of two widths there
    is none between: it is made of all others that were kept, of its own width too, which is harder than what is asked.
    """
    assert checkpoint.step is not None
    own, every = list_widths(checkpoint), list_profiles(checkpoint)
    stored, other, *_ = sorted(own, key=lambda each: (each not in own[1:-1], abs(each - width)))
    true = Profile(checkpoint.step, stored)
    kept = [profile for profile in every if (profile.width != stored if len(own) > 2 else profile != true)]
    made = combine(kept, true)
    alone = [{Profile(checkpoint.step, each): 1.0} for each in (stored, other)]
    found, expected, apart = _add_up(checkpoint, [dict(zip(kept, made.coefficients, strict=True)), *alone])
    return {
        "width": width,
        "profile_error": combine(every, Profile(checkpoint.step, width)).error,
        "times_kept": len({profile.step for profile in every}),
        "stored_width": stored,
        "stored_profile_error": made.error,
        "stored_error": _measure_distance(found, expected),
        "other_width": other,
        "other_apart": _measure_distance(apart, expected),
    }


def _measure_distance(weights: Weights, true: Weights) -> float:
    """|weights - true| / |true| over all of them."""
    squares = [((weights[name] - w).double().square().sum(), w.double().square().sum()) for name, w in true.items()]
    apart, length = (float(sum(part)) for part in zip(*squares, strict=True))
    return float((apart / length) ** 0.5)


def _add_up(checkpoint: Checkpoint, wanted: Sequence[Mapping[Profile, float]]) -> list[Weights]:
    """Sums of averages with their coefficients, in float64; each file is read once."""
    totals: list[Weights] = [{} for _ in wanted]
    for profile, weights in _walk(checkpoint):
        for total, coefficients in zip(totals, wanted, strict=True):
            if profile in coefficients:
                for name, tensor in weights.items():
                    part = coefficients[profile] * tensor.double()
                    total[name] = total[name] + part if name in total else part
    return [{name: tensor.float() for name, tensor in total.items()} for total in totals]


def _walk(checkpoint: Checkpoint) -> Iterator[tuple[Profile, Weights]]:
    """All averages that were kept, and the checkpoint's own."""
    storage, widths = Storage(checkpoint.root), list_widths(checkpoint)
    for path, sha256 in list_kept(checkpoint):
        content = read_bytes(storage, path)
        if hash_bytes(content) != sha256:
            raise CheckpointError(
                f"{storage.find_url(path)} is damaged: its sha256 differs from that in the manifest of "
                f"{checkpoint.url}; restore the file, or delete the trial's folder and train again"
            )
        tensors = open_tensors(content, storage.find_url(path))
        for width in widths:
            named = {n.removeprefix(f"{width}/"): w for n, w in tensors.items() if n.startswith(f"{width}/")}
            yield Profile(get_step_of_kept(path), width), named
    assert checkpoint.step is not None
    for width, weights in load_widths(checkpoint, widths).items():
        yield Profile(checkpoint.step, width), weights
