"""What trials cost, in evaluations of the network: pure functions of a trial and of the description of its data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import add
from typing import Any

from orchestrator.experiment.records import Variant
from workers.config import (
    SAMPLE_GRID,
    SAMPLE_GRID_COLUMNS,
    SAMPLE_GRID_ROWS,
    VALIDATION_IMAGES,
    VALIDATION_TIMESTEPS,
    DataConfig,
    Measurement,
    Trial,
)
from workers.data.sources import Source
from workers.evaluation.blocks import Images, count_nll_images, count_reconstructions
from workers.kinds import guess_adaptive_evaluations
from workers.layout import RowId, TrialId, get_trial_of_row
from workers.passes import TEACHER_STEPS, choose_grid_sampler, plan_evaluations
from workers.students import describe_student


@dataclass(frozen=True)
class Cost:
    """Evaluations of the network, an image at a time; costs add up. One of training is a forward and a backward."""

    training_evaluations: int = 0
    validation_evaluations: int = 0
    nll_evaluations: int = 0
    sampling_evaluations: int = 0
    ode_nll_evaluations: int = 0  # each with a backward pass for every probe

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(vars(self).values())

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(add, self.parts, other.parts))


def count_cost(trial: Trial, source: Source) -> Cost:
    """What `trial` costs from its first step to its last evaluation, where nothing of it is there yet, except for what
    it starts from.

    Solvers with error control are counted as they were measured: `workers.kinds.ADAPTIVE`.
    """
    T, training, nll, fid = trial.chain_steps, trial.training, trial.evaluation.nll, trial.evaluation.fid
    if not trial.diffuses:
        return _count_of_stage(trial, source)
    images = source.held_out if nll is None or nll.images == "all" else nll.images
    timesteps = T or 0 if nll is None or nll.timesteps == "all" else nll.timesteps
    ode = trial.evaluation.ode_nll
    flows = (source.held_out if ode.images == "all" else ode.images) if ode else 0
    return Cost(
        training_evaluations=(training.steps - training.trunk_steps) * training.batch_size,
        validation_evaluations=count_validations(trial) * _count_validation(trial, source),
        nll_evaluations=images * timesteps if nll else 0,
        sampling_evaluations=fid.samples * plan_evaluations(fid.sampler, T) if fid else 0,
        ode_nll_evaluations=flows * guess_adaptive_evaluations("ode_nll", ode.tolerance) if ode else 0,
    )


def _count_of_stage(trial: Trial, source: Source) -> Cost:
    """The same of a network that is no denoiser: one evaluation for each image that it is shown or makes."""
    training, m, images = trial.training, Measurement.of(trial), Images.of(source)
    shown = min(VALIDATION_IMAGES, source.held_out) + SAMPLE_GRID
    return Cost(
        training_evaluations=(training.steps - training.trunk_steps) * training.batch_size,
        validation_evaluations=count_validations(trial) * shown,
        nll_evaluations=count_nll_images(m, images),
        sampling_evaluations=(m.evaluation.fid.samples if m.evaluation.fid else 0) + count_reconstructions(m, images),
    )


def count_costs(trials: Mapping[RowId, Variant], sources: Mapping[DataConfig, Source]) -> list[Cost]:
    """Of the rows of a sweep, in their order: what several have in common counts once.

    A trial is trained as far as the longest of its rows asks, and each row counts the steps from the one before it. The
    bound of an average of a checkpoint, and its samples, count at the first of the rows that measure them.
    """
    found, trained, done = dict[RowId, Cost](), dict[TrialId, Cost](), set[Any]()
    for row, variant in sorted(trials.items(), key=lambda one: one[1].trial.training.steps):
        trial, price, of = variant.trial, count_cost(variant.trial, sources[variant.trial.data]), get_trial_of_row(row)
        before, trained[of] = trained.get(of, Cost()), price
        price = replace(
            price,
            training_evaluations=price.training_evaluations - before.training_evaluations,
            validation_evaluations=price.validation_evaluations - before.validation_evaluations,
        )
        checkpoint = of, trial.training.steps, trial.evaluation.ema, trial.evaluation.ema_width
        for key, name in (
            ((checkpoint, trial.evaluation.nll), "nll_evaluations"),
            ((checkpoint, trial.evaluation.ode_nll), "ode_nll_evaluations"),
            ((checkpoint, _describe_samples(trial)), "sampling_evaluations"),
        ):
            price = replace(price, **{name: 0}) if key in done else price
            done.add(key)
        found[row] = price
    return [found[row] for row in trials]


def _describe_samples(trial: Trial) -> tuple[Any, ...]:
    """What rows have in common that measure the same samples, in other feature spaces or by other metrics."""
    evaluation, fid = trial.evaluation, trial.evaluation.fid
    return fid and (fid.sampler, fid.samples, fid.quantise), evaluation.variance, evaluation.precision


def count_validations(trial: Trial) -> int:
    """How often the trial is validated: at step 0, every `validate_every` steps and at the end."""
    training, every = trial.training, trial.training.validate_every
    return math.ceil(training.steps / every) - math.ceil(training.trunk_steps / every) + 1


def _count_validation(trial: Trial, source: Source) -> int:
    """The evaluations of one: t = 1 and the strata of 2..T for each image, and the grid of samples; see
    `workers.studying`."""
    T, student, classes = trial.chain_steps, describe_student(trial.loss), min(SAMPLE_GRID_ROWS, source.classes)
    grid = classes * SAMPLE_GRID_COLUMNS if trial.model.told == "labels" else SAMPLE_GRID
    drawn = grid * plan_evaluations(choose_grid_sampler(T, student), T)
    if student:  # its own samples, and its teacher's of the same noise
        steps = 3 * student.steps if student.steps else 2 * TEACHER_STEPS
        return min(VALIDATION_IMAGES, source.held_out) * steps + drawn
    timesteps = 1 + (VALIDATION_TIMESTEPS if T is None else min(VALIDATION_TIMESTEPS, T - 1))
    return min(VALIDATION_IMAGES, source.held_out) * timesteps + drawn
