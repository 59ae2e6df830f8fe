"""The code of a registered model: MLflow runs this file where it loads one, so that no pickle is needed.

It lies in the model beside the package `workers` of the day it was registered (the folder code/) and the checkpoint as
diffusers keeps it (the artifact `diffusers`). A table asks for images, a row a request:

    n         how many images; they are drawn in whole blocks of workers.evaluation.blocks.SAMPLES, as in an evaluation
    seed      whose noise; the same seed gives the same images, and those that an evaluation with it measures
    sampler   a name of workers.kinds.SAMPLERS; without the column, that of the sweep's evaluation, whose code is here
    steps     network evaluations per image; without the column, the evaluation's
    label     of a model that is told classes: that of all images of the row, by number or name; without the column they
              are of classes in the proportions of the training images
    vectors   of a model that is told vectors: those of all images of the row, a list of lists of numbers
    guidance  the scale of `workers.diffusion.guidance`; without the column, the evaluation's

`predict` returns the images of all rows one after the other, (N, H, W, C): uint8 or uint16 in 0..levels-1, the data's
own levels; float32 in the data's own units where these are not discrete.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from workers.classes import Vectors
from workers.code import drop_pin
from workers.config import FIDConfig, Mistake, SamplerConfig
from workers.data.decoding import choose_type
from workers.data.ranges import read_span, scale_from_unit
from workers.evaluation.blocks import SAMPLES
from workers.evaluation.loaded import load_model, move_to_device
from workers.evaluation.make import draw_block, draw_from_prior, list_samples
from workers.kinds import DENOISER, SAMPLERS
from workers.network import checkpoint as checkpoints
from workers.students import find_drawing_mistakes

MOST = 100_000  # images a row of a request: whoever asks may be anybody
MOST_CONTINUOUS_STEPS = 1_000  # of a sampler in continuous time


class ImageModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        """Raises Mistake where the checkpoint's bytes are not those that were registered."""
        settings = context.model_config
        checkpoint = checkpoints.open_folder(context.artifacts["diffusers"])
        if checkpoint.digest != settings["checkpoint"]:
            raise Mistake(
                f"{checkpoint.url} is damaged: it is {checkpoint.digest}, registered was {settings['checkpoint']}; "
                "fetch the model again"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stage, self.precision = None, settings["precision"]
        if checkpoint.family == DENOISER:
            self.model = load_model(checkpoint, device, self.precision)
            if settings["variance"]:
                self.model = replace(self.model, process=replace(self.model.process, variance=settings["variance"]))
        else:
            self.stage = move_to_device(checkpoints.load_decoder(checkpoint), device)
        self.shape = checkpoints.describe(checkpoint).shape
        self.levels, self.fid = settings["levels"], FIDConfig.model_validate(settings["fid"])
        self.span = read_span(settings["span"]) if settings["span"] else None

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame) -> np.ndarray:
        """`model_input` is a table with the columns above. Raises ValueError for a request that means nothing.

        (MLflow checks the columns and their types against the signature before.)
        """
        parts: list[np.ndarray] = []
        for row in model_input.to_dict("records"):
            n, seed = int(row["n"]), int(row["seed"])
            if not 0 <= n <= MOST:
                raise ValueError(f"n = {n} images were asked for; give 0 to {MOST:,}")
            draw = self._read_way(row)
            for block in range(math.ceil(n / SAMPLES)):
                images = draw(seed, block)[: n - block * SAMPLES]
                parts.append(scale_from_unit(images, self.span) if self.span else images)
        return np.concatenate([np.zeros((0, *self.shape), choose_type(self.levels)), *parts])

    def _read_way(self, row: dict[Any, Any]) -> Callable[[int, int], np.ndarray]:
        """What draws the images of (seed, block) as the row asks."""
        if stage := self.stage:
            if asked := [name for name in ("sampler", "steps") if not pd.isna(row.get(name))]:
                raise ValueError(f"{' and '.join(asked)} were asked for, and this model decodes noise by one pass")
            of = {"levels": self.levels, "precision": self.precision}
            return lambda seed, block: draw_from_prior(stage, self.fid, seed, block, **of)
        fid, told, shown = self._read_request(row), self._read_told(row), {"shape": self.shape, "levels": self.levels}

        def draw(seed: int, block: int) -> np.ndarray:
            each = self.model.assign_told(list_samples(block)) if told is None else np.stack([told] * SAMPLES)
            return draw_block(self.model, fid, seed, block, **shown, told=each)[0]

        return draw

    def _read_told(self, row: dict[Any, Any]) -> Any:
        """The label or the vectors, float32 (length, width), that a row asks for; None where it asks for no label."""
        told, vectors = self.model.network.told, row.get("vectors")
        if not isinstance(told, Vectors):
            if vectors is not None and np.ndim(vectors):
                raise ValueError("vectors were given, and this model is told none")
            return self._read_label(row)
        expected = f"({told.length or 'length'}, {told.width})"
        if vectors is None or not np.ndim(vectors):
            raise ValueError(f"this model is told vectors {expected} of each image; give them in the column vectors")
        found = np.array([list(vector) for vector in vectors], np.float32)
        if found.ndim != 2 or not told.fits(*found.shape):
            raise ValueError(f"vectors of {found.shape} were given; this model is told {expected}")
        if not np.isfinite(found).all():
            raise ValueError("vectors with numbers that are not finite were given")
        return found

    def _read_label(self, row: dict[Any, Any]) -> int | None:
        """The label that a row asks for."""
        asked = row.get("label")
        if asked is None or pd.isna(asked):
            return None
        classes = self.model.network.classes
        if classes is None:
            raise ValueError(f"label = {asked} was asked for, and this model is told no classes")
        return classes.find(str(asked))

    def _read_request(self, row: dict[Any, Any]) -> FIDConfig:
        """The evaluation's way of drawing with the row's sampler and steps."""
        own = self.fid.sampler
        kind = row.get("sampler") or own.kind
        kind = own.kind if kind == drop_pin(own.kind) else kind
        T = self.model.process.T
        possible = [name for name, entry in SAMPLERS.items() if entry.suits(continuous=T is None)]
        if kind != own.kind and kind not in possible:  # a request names nothing that would be imported for it
            raise ValueError(f"sampler = {kind} was asked for; give one of {', '.join(possible)}")
        base = own if kind == own.kind else SamplerConfig(kind=kind)
        asked = row.get("steps")
        steps = base.steps if asked is None or pd.isna(asked) else int(asked)
        if steps is not None and steps != base.steps and not 1 <= steps <= (T or MOST_CONTINUOUS_STEPS):
            most = f"T = {T}" if T else f"{MOST_CONTINUOUS_STEPS:,}"
            raise ValueError(f"steps = {steps} were asked for; give 1 to {most}")
        if steps is None and T is None and "steps" in SAMPLERS[kind].reads:
            raise ValueError(f"sampler = {kind} takes steps here, as the process is continuous; give a number")
        guidance = row.get("guidance")
        scale = own.guidance if guidance is None or pd.isna(guidance) else float(guidance)
        if scale is not None and (scale < 0 or (scale != 1 and not self.model.network.takes_no_label)):
            raise ValueError(f"guidance = {scale:g} was asked for; give at least 0, and to a model that knows none, 1")
        sampler = SamplerConfig.model_validate({**base.model_dump(), "steps": steps, "guidance": scale})
        if problems := list(find_drawing_mistakes(self.model.process.student, sampler)):
            raise ValueError("; ".join(problems))
        return self.fid.model_copy(update={"sampler": sampler})


set_model(ImageModel())
