"""Models that are told something of each image of a batch, and guidance between what they say with it and without."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from workers.classes import NO_LABEL
from workers.diffusion.process import Model, Prediction
from workers.passes import is_guided
from workers.shapes import NCHW, Conditions, RealTimes

# As a Model, with a label for each image, or a sequence of vectors; NO_LABEL and zeros tell nothing.
ToldModel = Callable[[NCHW, RealTimes, Conditions], Prediction]


@dataclass(frozen=True)
class Conditional:
    """The `Model` of a batch of whose image k told[k] is told, guided by the scale `guidance`.

        eps = eps(x_t) + guidance (eps(x_t, told) - eps(x_t))

    So 0 is the prediction without the condition, 1 and None that with it, and beyond 1 lies what is called guidance: Ho
    & Salimans 2022, eq. (6), where w = guidance - 1. x_0, which is affine in eps, follows in the same way. A learned
    variance is that with the condition.
    """

    model: ToldModel
    told: Conditions
    guidance: float | None
    rows: Int64[Tensor, "rows"] | None = None  # whose told[rows] the batch is, so that nothing is kept for it twice

    def __call__(self, x_t: NCHW, t: RealTimes) -> Prediction:
        of = self.told if self.rows is None else self.told[self.rows]
        if self.guidance == 0:
            return self.model(x_t, t, withhold(of))
        told = self.model(x_t, t, of)
        if self.guidance is None or not is_guided(self.guidance):
            return told
        untold = self.model(x_t, t, withhold(of))
        x_0 = untold.x_0 + self.guidance * (told.x_0 - untold.x_0)
        return replace(told, x_0=x_0, eps=untold.eps + self.guidance * (told.eps - untold.eps))


def withhold(told: Conditions) -> Conditions:
    """What tells nothing in its place."""
    return torch.zeros_like(told) if told.is_floating_point() else torch.full_like(told, NO_LABEL)


def tell(model: ToldModel | Model, told: Conditions | None, guidance: float | None = None) -> Model:
    """The model of a batch that is told of so; the model itself where there is nothing to tell."""
    return model if told is None else Conditional(model, told, guidance)  # type: ignore[arg-type, return-value]


def take_rows(model: Model, rows: Tensor | slice) -> Model:
    """The model of some images of its batch. Whoever asks a model for a part of a batch asks for it by this."""
    if not isinstance(model, Conditional):
        return model
    every = torch.arange(len(model.told), device=model.told.device) if model.rows is None else model.rows
    return replace(model, rows=every[rows])
