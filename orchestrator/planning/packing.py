"""What part of a GPU each waiting trial starts with, where `training.gpus` is auto: a pure function.

The first trial of a kind (see `workers.sharing`) starts with a whole GPU and is measured; the others wait until it was,
which takes some steps, and then start with their part.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple


class Start(NamedTuple):
    """How a trial starts: with what part of a GPU, None where it waits for another one to be measured."""

    gpus: float | None
    measures: bool = False


def line_up(
    kinds: Sequence[str], known: Mapping[str, float], measuring: Collection[str], given_up: Collection[str]
) -> list[Start]:
    """How each of the trials of these kinds starts, in their order.

    `known` has the parts that are known, `measuring` the kinds of which a trial is running that is measured. One that
    ended before it was measured leaves its kind `given_up`: nothing waits for another one then.
    """
    measuring, starts = set(measuring), list[Start]()
    for kind in kinds:
        if kind in known:
            starts.append(Start(known[kind]))
        elif kind in measuring and kind not in given_up:
            starts.append(Start(None))
        else:
            measuring.add(kind)
            starts.append(Start(1.0, measures=True))
    return starts
