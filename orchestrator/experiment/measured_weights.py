"""Which weights of a trial are measured: what of that goes together with what training keeps."""

from collections.abc import Iterator, Mapping
from typing import Any

from workers.config import EvaluationConfig, TrainingConfig
from workers.posthoc import MOST_KEPT, Profile, describe_doubt


def find_average_mistakes(training: TrainingConfig, evaluation: EvaluationConfig) -> Iterator[str]:
    """An average that is not there to be measured, and more of them than a storage should hold."""
    kept, ema, width, posthoc = (
        (training.ema, *training.averages),
        evaluation.ema,
        evaluation.ema_width,
        training.posthoc,
    )
    if ema is not None and ema not in kept:
        yield (
            f"evaluation.ema: {ema:g} is no average that is kept in training, which are {', '.join(map(str, kept))}; "
            "take one of them, or add it to training.averages"
        )
    if width is not None and posthoc is None:
        yield (
            f"evaluation.ema_width: {width:g} is made of averages that training.posthoc keeps, and that is null; set "
            f"training.posthoc: {{every: {max(1, training.steps // 20)}}}, or leave it out"
        )
    if posthoc and (times := training.steps // posthoc.every) > MOST_KEPT:
        yield (
            f"training.posthoc.every: {posthoc.every:,} keeps averages {times:,} times, of which each takes as much as "
            f"{len(posthoc.widths)} networks; {MOST_KEPT:,} times are the most, so take "
            f"{-(-training.steps // MOST_KEPT):,} or more"
        )


def doubt_width(training: TrainingConfig, evaluation: EvaluationConfig) -> str:
    """That what training keeps is too little for the width that is measured; empty where it is enough."""
    width, posthoc, steps = evaluation.ema_width, training.posthoc, training.steps
    if width is None or posthoc is None or steps // posthoc.every > MOST_KEPT:
        return ""
    return describe_doubt(posthoc.list_profiles(steps), Profile(steps, width))


def describe_average(average: Mapping[str, Any]) -> str:
    """How near an average that was made comes to a stored one, of what `workers.network.averages` measured."""
    of = "{width:g}, made of averages that were kept {times_kept} times: its profile is off by {profile_error:.2g} of "
    by = "its norm. The stored one of width {stored_width:g}, made in the same way without it (profile off by "
    told = of + by + "{stored_profile_error:.2g}), is off by {stored_error:.2g} of its norm; from that of width "
    return (told + "{other_width:g} it is {other_apart:.2g} away").format(**average)
