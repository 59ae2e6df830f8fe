"""What a network is told of each image, and guidance by it: whether settings and data go together."""

from collections.abc import Iterator

from workers.classes import MOST_CLASSES
from workers.config import EvaluationConfig, Trial, What
from workers.data.sources import Source
from workers.network.unet_config import UNET

WAYS = "model.labels: true, or model.conditions"  # in which it is told something


def find_told_mistakes(trial: Trial) -> Iterator[str]:
    """Settings of a trial that do not go together."""
    model, dropped = trial.model, trial.training.label_dropout
    if model.labels and model.conditions:
        yield (
            f"model.conditions: {model.conditions}, and model.labels: true adds the class to the time embedding; a "
            "network is told one thing, one way, so leave one of them out"
        )
    if model.conditions == "labels" and model.kind != UNET:
        yield (
            "model.conditions: labels is the U-Net's way to let them in, and a network of one's own has its own; take "
            "model.labels: true"
        )
    if model.conditions == "vectors" and trial.data.condition is None:
        yield (
            "model.conditions: vectors are those of a column of the data, and data.condition names none; set "
            "data.condition to the column of the Parquet files that has them"
        )
    if dropped and not model.told:
        yield (
            f"training.label_dropout: {dropped:g} keeps labels from a network that is told none; set {WAYS}, or leave "
            "it out"
        )
    yield from find_guidance_mistakes(trial.evaluation, model.told, dropped > 0)


def find_guidance_mistakes(evaluation: EvaluationConfig, told: What | None, dropped: bool) -> list[str]:
    """Guidance needs a network that is told something, and that was trained without it, too."""
    scale = evaluation.fid.sampler.guidance if evaluation.fid else None
    if scale in (None, 1) or (told and dropped):
        return []
    missing = "training.label_dropout above 0" if told else f"{WAYS}, and training.label_dropout above 0"
    was = f"that was always told the {'label' if told == 'labels' else 'vectors'}" if told else "that is told none"
    return [
        f"evaluation.fid.sampler.guidance: {scale:g} needs predictions with the label or the vectors and without, and "
        f"this is a network {was}; train one with {missing}, or take 1"
    ]


def find_missing(told: What | None, source: Source) -> Iterator[str]:
    """What a network is told that the data have not."""
    if told == "labels" and not source.labelled:
        yield (
            f"model.labels: the network is told the class of each image, and {source.name} has no labels; use labelled "
            "data, or a network without model.labels or model.conditions"
        )
    if told == "labels" and source.largest_label >= MOST_CLASSES:
        yield (
            f"model.labels: the labels of {source.name} go up to {source.largest_label:,}, and a network is told "
            f"{MOST_CLASSES:,} classes at most; number them from 0 on"
        )
    if told == "vectors" and source.vectors is None:
        yield (
            f"data.condition: the network is told vectors of each image, and no column of {source.name} is named; set "
            "data.condition to the column of the Parquet files that has them"
        )
