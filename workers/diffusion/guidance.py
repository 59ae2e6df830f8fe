"""Models that are told the class of each image of a batch, and guidance between what they say with it and without."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.classes import NO_LABEL
from workers.diffusion.process import Model, Prediction
from workers.passes import is_guided
from workers.shapes import NCHW, Counts, RealTimes

# As a Model, with a label for each image; NO_LABEL tells none.
LabelledModel = Callable[[NCHW, RealTimes, Counts], Prediction]


@dataclass(frozen=True)
class Conditional:
    """The `Model` of a batch whose image k is of class labels[k], guided by the scale `guidance`.

        eps = eps(x_t) + guidance (eps(x_t, label) - eps(x_t))

    So 0 is the prediction without the label, 1 and None that with it, and beyond 1 lies what is called guidance: Ho &
    Salimans 2022, eq. (6), where w = guidance - 1. x_0, which is affine in eps, follows in the same way. A learned
    variance is that with the label.
    """

    model: LabelledModel
    labels: Counts
    guidance: float | None

    def __call__(self, x_t: NCHW, t: RealTimes) -> Prediction:
        without = torch.full_like(self.labels, NO_LABEL)
        if self.guidance == 0:
            return self.model(x_t, t, without)
        told = self.model(x_t, t, self.labels)
        if self.guidance is None or not is_guided(self.guidance):
            return told
        untold = self.model(x_t, t, without)
        x_0 = untold.x_0 + self.guidance * (told.x_0 - untold.x_0)
        return replace(told, x_0=x_0, eps=untold.eps + self.guidance * (told.eps - untold.eps))


def tell_labels(model: LabelledModel | Model, labels: Counts | None, guidance: float | None = None) -> Model:
    """The model of a batch of these classes; the model itself where there are none to tell."""
    return model if labels is None else Conditional(model, labels, guidance)  # type: ignore[arg-type, return-value]


def take_rows(model: Model, rows: Tensor | slice) -> Model:
    """The model of some images of its batch. Whoever asks a model for a part of a batch asks for it by this."""
    return replace(model, labels=model.labels[rows]) if isinstance(model, Conditional) else model
