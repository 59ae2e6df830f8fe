"""What is trained: the network with its averages and its optimizer, and a step of it, whatever its family learns.

Data order and noise are addressed by (seed, step, sub-batch): the same at any number of workers.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workers.autoencoding import Autoencoding
from workers.compiling import CannotCompile, compile_network, must_compile, try_out
from workers.config import TrainingConfig, Trial, count_sub_batches
from workers.data.dataset import Dataset
from workers.data.windows import ShardOrder
from workers.denoising import Denoising
from workers.diffusion.formulations import make_process
from workers.diffusion.predictions import Denoiser
from workers.first_weights import compare_shapes, is_part, measure_weights
from workers.kinds import AUTOENCODER, DENOISER, GENERATOR, OBJECTIVES, PREDICTIONS
from workers.latents import TrainingLatents
from workers.lessons import Lesson, Losses, StepBatch, make_trial_config
from workers.network.build import Masks, build_network, hand_noise, is_foreign
from workers.network.manifest import CheckpointError
from workers.network.unet_config import UNET
from workers.noise import compute_address, make_generator
from workers.peak import count_training_flops
from workers.playing import Playing
from workers.posthoc import compute_decay, compute_gamma
from workers.studying import Studying
from workers.world import World, take_share

# What a trial learns, by its family.
LESSONS: dict[str, type[Lesson]] = {DENOISER: Denoising, AUTOENCODER: Autoencoding, GENERATOR: Playing}


class Learner:
    """All that a training step reads and changes, on this worker."""

    def __init__(
        self,
        trial: Trial,
        dataset: Dataset,
        world: World,
        *,
        teacher: Denoiser | None = None,
        latents: TrainingLatents | None = None,
    ) -> None:
        """At step 0. Where there are `latents`, they are diffused in place of the images of the data set."""
        self.trial, self.dataset, self.world = trial, dataset, world
        self.parts = take_share(range(count_sub_batches(trial.training.batch_size)), world)
        studies = OBJECTIVES[trial.loss.objective].needs_teacher
        lesson: Any = Studying if studies else LESSONS[trial.model.family]
        of_latents = {"latents": latents} if latents else {}  # which denoisers alone learn from
        self.lesson: Lesson = lesson(trial, dataset, world, self.parts, **of_latents)
        assert teacher or not studies, "the teacher was not handed over"
        self.lesson.teacher = teacher and teacher.to(world.device)
        self.config, self.module = self.lesson.config, self.lesson.module
        self.raw = list(self.module.state_dict().values())  # views of the parameters, not copies
        self.ema, posthoc = _copy(self.module.state_dict()), trial.training.posthoc
        of, widths = trial.training.averages, posthoc.widths if posthoc else ()
        self.averages, self.widths = ({key: _copy(self.ema) for key in keys} for keys in (of, widths))
        self.gammas = {width: compute_gamma(width) for width in widths}
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=trial.training.lr, fused=True)
        self.autocast = choose_autocast(trial, world.device)
        self.step = 0
        self.noises = [make_generator(device=world.device) for _ in self.parts]  # seeded at each step
        self.network: nn.Module | None = None  # what a step calls, from `begin` on
        self.masks: Masks | None = None  # where they are drawn for all layers at once
        self.uncompiled = ""  # why it is not compiled, where it was to be
        # Of the steps since the last point of the journal: what is minimised, what the lesson tells, the norm of the
        # gradient, their number; and whether to stop, which workers tell each other with them.
        self.sums = torch.zeros(len(self.lesson.told) + 4, dtype=torch.float64, device=world.device)
        self.orders: dict[int, np.ndarray] = {}
        window = trial.data.shuffle
        self.shard_order = None if window is None else ShardOrder(trial.seed, dataset.shards, window)

    @cached_property
    def compiles(self) -> bool:
        """Whether the network is to be compiled."""
        if not self.lesson.goes_back_once:
            return False
        count = self.trial.training.batch_size
        return must_compile(
            self.trial, self.world.device, lambda: count * count_training_flops(json.dumps(self.config))
        )

    def begin(self) -> None:
        """What comes before the first step: compiles the network where it is to be, and joins it with the workers'.

        Raises CannotCompile, on all workers if on one, where the trial must not do without.
        """
        self.module.train()
        self.network, device = self.module, self.world.device
        if self.compiles or device.type != "cpu":
            with torch.no_grad():
                self.masks = Masks.of(self.module, self._compute_losses, len(self.parts))
        if self.compiles:
            self._compile()
        if self.world.size > 1:
            self.network = DistributedDataParallel(self.network)

    def _compile(self) -> None:
        """On all workers or on none."""
        size, device = self.trial.training.batch_size, self.world.device
        with self.autocast:
            of = size, self.world.size, str(device), torch.is_autocast_enabled(device.type), torch.get_num_threads()
        try:
            if self.masks is None:
                raise CannotCompile("the network calls one of its dropouts twice, and each has one mask a step")
            whole = not is_foreign(self.config)
            self.network = compile_network(self.module, device, (json.dumps(self.config), *of), whole=whole)
            try_out(self.module, lambda: self._compute_losses().minimised.mean().backward())
        except CannotCompile as error:
            self.uncompiled = str(error)
        if self.world.size > 1:
            failed = torch.tensor(float(bool(self.uncompiled)), device=device)
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
            self.uncompiled = self.uncompiled or ("another worker of the trial can't" if failed else "")
        if self.uncompiled:
            self.network = self.module
            if self.trial.training.compile == "always":
                raise CannotCompile(f"training.compile: always, but {self.uncompiled}; or set it to auto or never")

    def train_step(self) -> None:
        training = self.trial.training
        if self.network is None:
            self.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(training, self.step)
        losses = self._compute_losses()
        losses.minimised.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lesson.finish_step(compute_learning_rate(training, self.step))
        self._average()
        told = [losses.minimised.detach().mean(), *losses.told, norm, torch.ones_like(norm)]
        self.sums[:-1] += torch.stack([value.to(self.sums) for value in told])
        self.step += 1

    def _compute_losses(self) -> Losses:
        """Of this worker's part of the step's batch."""
        for part, noise in zip(self.parts, self.noises, strict=True):
            noise.manual_seed(compute_address(self.trial.seed, "train", self.step, part))
        assert self.network is not None
        batch = self._make_batch(self._draw_rows())
        if self.masks:
            self.masks.hand(self.noises, self.world.device)
        else:
            hand_noise(self.module, self.noises)
        with self.autocast:
            return self.lesson.compute_losses(self.network, batch)

    def _draw_rows(self) -> np.ndarray:
        """The training images of this worker's part of the global batch."""
        size = self.trial.training.batch_size
        if self.shard_order:
            self.dataset.expect(self.shard_order.list_shards(self.step, size))
            return np.asarray(take_share(self.shard_order.draw(self.step, size), self.world))
        rows = draw_batch_rows(self.trial.seed, self.step, size, len(self.dataset.train), self.orders)
        return np.asarray(take_share(rows, self.world))

    def _make_batch(self, rows: np.ndarray) -> StepBatch:
        """The images of these rows, some of them mirrored, and their noise."""
        device, noises = self.world.device, self.noises
        x_0 = self.lesson.take(self.step, rows)
        noise = self.lesson.draw_noise(noises, tuple(x_0.shape))
        if self.trial.data.flip:
            n = len(x_0) // len(noises)
            coins = torch.cat([torch.rand(n, generator=g, device=device) for g in noises]) < 0.5
            x_0 = torch.where(coins[:, None, None, None], x_0.flip(3), x_0)
        return StepBatch(self.step, rows, x_0, noise)

    def _average(self) -> None:
        """EMA of the weights, with min(ema, (1 + n) / (10 + n)) so that the start is forgotten early; and averages by
        powers of the step, which forget it at once."""
        for ema, weights in ((self.trial.training.ema, self.ema), *self.averages.items()):
            decay = min(ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(weights.values()), self.raw, 1 - decay)
        for width, weights in self.widths.items():
            decay = compute_decay(self.gammas[width], self.step + 1)
            torch._foreach_lerp_(list(weights.values()), self.raw, 1 - decay)

    def use_averaged(self) -> "_Averaged":
        return _Averaged(self.module, self.ema)

    def collect_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the averages, so that the training goes on as if it had not stopped."""
        state = {f"weights.{name}": p for name, p in self.module.state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        for (name, _), values in zip(self.module.named_parameters(), moments.values(), strict=True):
            state |= {f"{key}.{name}": value for key, value in values.items()}
        return state | self.lesson.collect_state()

    def begin_with(self, weights: Mapping[str, Tensor], fresh: Collection[str]) -> None:
        """Takes the weights in place of the random ones, except for the modules and weights that are `fresh`.

        Raises CheckpointError where others do not fit.
        """
        own = self.module.state_dict()
        if misfits := compare_shapes(measure_weights(own), measure_weights(weights), fresh):
            raise CheckpointError("; ".join(misfits))
        taken = {name: weights[name] for name in own if not is_part(name, fresh)}
        self.module.load_state_dict({**own, **taken})
        for average in (self.ema, *self.averages.values(), *self.widths.values()):
            average.update(_copy(self.module.state_dict()))

    def restore(
        self,
        step: int,
        ema: Mapping[str, Tensor],
        averages: Mapping[float, Mapping[str, Tensor]],
        state: Mapping[str, Tensor],
        *,
        widths: Mapping[float, Mapping[str, Tensor]],
    ) -> None:
        """Goes on from a checkpoint of that step."""
        self.ema = {name: ema[name].to(self.world.device) for name in self.ema}
        for own, kept in ((self.averages, averages), (self.widths, widths)):
            for key, weights in kept.items():
                own[key] = {name: weights[name].to(self.world.device) for name in self.ema}
        self.module.load_state_dict({name: state[f"weights.{name}"] for name in self.ema})
        names = [name for name, _ in self.module.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {key: state[f"{key}.{name}"] for key in keys} for i, name in enumerate(names)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.lesson.restore(state)
        self.step = step


class _Averaged:
    """Puts the EMA weights into the network for the length of a `with`."""

    def __init__(self, network: nn.Module, ema: dict[str, Tensor]) -> None:
        self.network, self.ema = network, ema

    def __enter__(self) -> nn.Module:
        self.raw = _copy(self.network.state_dict())
        self.network.load_state_dict(self.ema)
        return self.network.eval()

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.raw)


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def repeat_steps(trial: Trial, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Steps of a training that is neither validated nor kept, without end: what they take can be measured."""
    teacher = None
    if OBJECTIVES[trial.loss.objective].needs_teacher:  # one of the same network takes as long as any
        network = build_network(make_trial_config(trial, dataset), make_generator(trial.seed, "weights"))
        teacher = Denoiser(network, make_process(trial.diffusion), trial.diffusion.prediction).eval()
    learner = Learner(trial, dataset, World(device=device), teacher=teacher)
    while True:
        learner.train_step()
        yield


def compute_learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of 0-based `step`: linear warm-up, then constant, or half a cosine down to 0, or constant with
    a linear fall to 0 over the last steps (Hägele et al. 2024, eq. 1)."""
    warm = min(1.0, (step + 1) / training.warmup) if training.warmup else 1.0
    if training.decay == "cosine":
        return training.lr * warm * 0.5 * (1 + math.cos(math.pi * step / training.steps))
    if training.cooldown_steps:
        return training.lr * warm * min(1.0, (training.steps - step) / training.cooldown_steps)
    return training.lr * warm


def draw_batch_rows(seed: int, step: int, batch_size: int, n: int, orders: dict[int, np.ndarray]) -> np.ndarray:
    """The training rows of a global batch: one permutation of all n images after another, nothing dropped.

    `orders` keeps the permutations in use, by epoch.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // n
    first, last = int(epochs[0]), int(epochs[-1])
    for epoch in [epoch for epoch in orders if epoch < first]:
        del orders[epoch]
    for epoch in range(first, last + 1):
        if epoch not in orders:
            orders[epoch] = torch.randperm(n, generator=make_generator(seed, "order", epoch)).numpy()
    return np.array([orders[int(e)][p % n] for e, p in zip(epochs, places, strict=True)])


def choose_autocast(trial: Trial, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the trial asks for it, or `auto` finds it faster; parameters stay float32.

    `auto` takes it on GPUs that have it, and on CPUs with AMX or AVX512-BF16 for a U-Net from a width of 32 channels
    on: below, it measured no faster than float32. Never for the prediction mu, which differs from x_t in digits that
    bf16 has not, and not for other families than denoisers, of which nobody has measured it.
    """
    if device.type != "cpu":
        fast = torch.cuda.is_bf16_supported()
    else:
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = has_bf16 and trial.model.kind == UNET and trial.model.channels >= 32
    is_fine = trial.diffusion.continuous or PREDICTIONS[trial.diffusion.prediction].in_bf16
    fast = fast and is_fine and trial.model.family == DENOISER
    enabled = trial.training.precision == "bf16" or (trial.training.precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
