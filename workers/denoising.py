"""What a denoiser learns: to say of x_t what was added to x_0, at t that it draws (Ho et al. 2020, Algorithm 1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from workers.config import (
    SAMPLE_GRID,
    SAMPLE_GRID_COLUMNS,
    SAMPLE_GRID_ROWS,
    VALIDATION_IMAGES,
    VALIDATION_TIMESTEPS,
    Trial,
    count_sub_batches,
)
from workers.data.dataset import Dataset
from workers.data.pixels import draw_grid, to_data, to_model
from workers.diffusion.formulations import Continuous
from workers.diffusion.guidance import ToldModel, tell, withhold
from workers.diffusion.hierarchy import bound_images
from workers.diffusion.integral import estimate_integral
from workers.diffusion.likelihood import estimate
from workers.diffusion.objectives import Objective, Teaching
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model
from workers.diffusion.samplers import sample
from workers.diffusion.timesteps import History, Part
from workers.kinds import TIMESTEPS
from workers.latents import TrainingLatents
from workers.lessons import Lesson, Losses, StepBatch, Validation, send
from workers.noise import make_generator
from workers.passes import choose_grid_sampler
from workers.world import World, take_share

FINE = 2**40  # whole numbers that real t are made of


class Denoising(Lesson):
    told = ("train/eps_mse",)

    def __init__(
        self,
        trial: Trial,
        dataset: Dataset,
        world: World,
        parts: Sequence[int],
        *,
        latents: TrainingLatents | None = None,
    ) -> None:
        objective = Objective.of(trial.diffusion, trial.loss, None if latents else dataset.levels)
        self.process, self.prediction, self.student = objective.whole, trial.diffusion.prediction, objective.student
        self.objective = objective.to(world.device)
        self.drawn = objective.process  # what is drawn along, with its coefficients where they are computed with
        self.history = History.empty(objective.process.T or trial.diffusion.T)
        self.last: tuple[Tensor, Tensor] | None = None  # t and losses of the step, to be remembered
        super().__init__(trial, dataset, world, parts, latents=latents)

    def draw_noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """t int64 (n,) in 1..T, or real, and eps float32 (n, C, H, W).

        Real t are made of whole numbers of FINE: so each way of drawing is the same in continuous time.
        """
        n, count = shape[0] // len(generators), count_sub_batches(self.trial.training.batch_size)
        parts = take_share([Part(n, index, count) for index in range(count)], self.world)
        draw, T = TIMESTEPS[self.trial.training.timesteps].load(), self.objective.process.T or FINE
        probability = self.history.probability()
        t = torch.cat([draw(T, part, g, probability) for part, g in zip(parts, generators, strict=True)])
        if isinstance(self.objective.process, Continuous):
            t = self.objective.process.draw_times((t.double() - 0.5) / FINE)
        return t, torch.cat([torch.randn((n, *shape[1:]), generator=g, device=self.world.device) for g in generators])

    def compute_losses(self, network: nn.Module, batch: StepBatch) -> Losses:
        process = self.objective.process
        t, eps = batch.noise
        told = [self._draw_told(batch)] if self.trial.model.told else []
        teaching = self.make_teaching(batch.step, *told)
        loss = self.objective(lambda x, s: network(*process.feed(x, s), *told), batch.x_0, t, eps, teaching)
        weighted = loss.weighted
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            self.last = t, loss.weighted.detach()
            probability = self.history.probability()
            weighted = weighted / (len(probability) * probability.to(t.device)[t - 1]).to(weighted.dtype)
        return Losses(weighted, [loss.eps_mse.mean()])

    def make_teaching(self, step: int, told: Tensor | None = None) -> Teaching | None:
        """What a student goes by in a step."""
        return None

    def _draw_told(self, batch: StepBatch) -> Tensor:
        """What the network is told of these images, some of it kept from it: labels, int64 (n,), or vectors, float32
        (n, length, width).

        Their coins have an address of their own, so that with other dropout all other noise is the same.
        """
        training, seed = self.trial.training, self.trial.seed
        values = self.dataset.get_told(self.trial.model.told, "train")
        assert values is not None
        told = torch.from_numpy(values[batch.rows])
        if training.label_dropout:
            n = len(batch.rows) // len(self.parts)
            coins = [torch.rand(n, generator=make_generator(seed, "labels", batch.step, j)) for j in self.parts]
            dropped = torch.cat(coins) < training.label_dropout
            told[dropped] = withhold(told[dropped])
        return send(told, self.world.device)

    def finish_step(self, rate: float) -> None:
        """Adds the losses of the whole batch, in its order, to the history of every worker."""
        if self.last is None:
            return
        t, loss = self.last
        rows = torch.stack([t.double(), loss.double()], dim=1)
        if self.world.size > 1:
            every = [torch.empty_like(rows) for _ in range(self.world.size)]
            torch.distributed.all_gather(every, rows)
            rows = torch.cat(every)
        t, loss = rows.cpu().unbind(1)
        self.history.add(t.long(), loss)

    def collect_state(self) -> dict[str, Tensor]:
        if not TIMESTEPS[self.trial.training.timesteps].remembers:
            return {}
        return {"history.losses": self.history.losses, "history.seen": self.history.seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            self.history = History(state["history.losses"], state["history.seen"])

    def validate(self, network: nn.Module) -> Validation:
        """bits/dim of held-out images, and a grid of samples."""
        seed, levels, device, process = self.trial.seed, self.dataset.levels, self.world.device, self.drawn
        model = Denoiser(network, process, self.prediction)
        held_out = torch.from_numpy(np.array(self.dataset.held_out[:VALIDATION_IMAGES])).to(device)
        x, space = to_model(held_out, levels), self.space
        x_0, terms = space.measure(x, levels, seed, np.arange(len(x)))
        told = self.take_told(len(x_0))
        of = tell(model, told), x_0, VALIDATION_TIMESTEPS, space.find_levels(levels), seed, "valid"
        if isinstance(process, Continuous):
            bound = estimate_integral(process, *of, clip=space.bounded)
        else:
            bound = estimate(process, *of, clip=space.bounded)
        bound = bound_images(bound, terms, x[0].numel()) if terms else bound
        error = bound.standard_error  # of a single image there is none
        values = {self.measure: bound.mean} | ({} if error is None else {f"{self.measure}_se": error})
        return Validation(values, {"samples": self.draw_samples(model)})

    def take_told(self, n: int) -> Tensor | None:
        """What the network is told of the first n held-out images, from the first on again where there are fewer."""
        values = self.dataset.get_told(self.trial.model.told, "held_out")
        rows = np.arange(n) % len(self.dataset.held_out)
        return None if values is None else torch.from_numpy(values[rows]).to(self.world.device)

    def draw_samples(self, model: ToldModel | Model) -> bytes:
        """A grid of samples as PNG: a row of each of the first classes, or by the first held-out images' vectors."""
        process, device, levels = self.drawn, self.world.device, self.dataset.levels
        classes = self.dataset.classes if self.trial.model.told == "labels" else None
        rows = classes.list_trained()[:SAMPLE_GRID_ROWS] if classes else []
        each = torch.tensor(rows, device=device).repeat_interleave(SAMPLE_GRID_COLUMNS)
        told = each if rows else self.take_told(SAMPLE_GRID)
        height, width, channels = self.space.find_shape(self.dataset.shape)
        shape = (SAMPLE_GRID if told is None else len(told), channels, height, width)
        sampler = choose_grid_sampler(process.T, self.student)
        noise = make_generator(self.trial.seed, "grid", device=device)
        x_0 = sample(process, tell(model, told), sampler, shape, noise, clip=self.space.bounded)
        images = to_data(self.space.decode(x_0), levels)
        names = [classes.names[label] for label in rows] if classes else []
        return draw_grid(images, levels, columns=SAMPLE_GRID_COLUMNS, names=names)
