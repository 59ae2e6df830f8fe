"""What is trained: the network with its averages, its optimizer and the history of its losses, and a step of it.

Data order and noise are addressed by (seed, step, sub-batch): the same at any number of workers.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workers.classes import NO_LABEL
from workers.compiling import CannotCompile, compile_network, must_compile, try_out
from workers.config import (
    TrainingConfig,
    Trial,
    count_sub_batches,
)
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.data.windows import ShardOrder
from workers.diffusion.formulations import Continuous
from workers.diffusion.objectives import Loss, Objective
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model
from workers.diffusion.timesteps import History, Part
from workers.first_weights import compare_shapes, is_part, measure_weights
from workers.kinds import PREDICTIONS, TIMESTEPS
from workers.network.build import Masks, build_network, hand_noise, is_foreign, make_network_config
from workers.network.manifest import CheckpointError
from workers.network.unet_config import UNET
from workers.noise import compute_address, make_generator
from workers.peak import count_training_flops
from workers.world import World, take_share

FINE = 2**40  # whole numbers that real t are made of


class Learner:
    """All that a training step reads and changes, on this worker."""

    def __init__(self, trial: Trial, dataset: Dataset, world: World) -> None:
        """At step 0."""
        self.trial, self.dataset, self.world = trial, dataset, world
        objective = Objective.of(trial.diffusion, trial.loss, dataset.levels)
        self.process, self.history = objective.process, History.empty(trial.diffusion.T)
        self.objective = objective.to(world.device)
        self.config = make_trial_config(trial, dataset)
        self.unet = build_network(self.config, make_generator(trial.seed, "weights")).to(world.device)
        self.raw = list(self.unet.state_dict().values())  # views of the parameters, not copies
        self.ema = {name: p.clone() for name, p in self.unet.state_dict().items()}
        self.averages = {decay: {n: p.clone() for n, p in self.ema.items()} for decay in trial.training.averages}
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=trial.training.lr, fused=True)
        self.autocast = choose_autocast(trial, world.device)
        self.step = 0
        self.parts = take_share(range(count_sub_batches(trial.training.batch_size)), world)
        self.noises = [make_generator(device=world.device) for _ in self.parts]  # seeded at each step
        self.network: nn.Module | None = None  # what a step calls, from `begin` on
        self.masks: Masks | None = None  # where they are drawn for all layers at once
        self.uncompiled = ""  # why it is not compiled, where it was to be
        self.sums = torch.zeros(5, dtype=torch.float64, device=world.device)
        self.orders: dict[int, np.ndarray] = {}
        window = trial.data.shuffle
        self.shard_order = None if window is None else ShardOrder(trial.seed, dataset.shards, window)

    @cached_property
    def compiles(self) -> bool:
        """Whether the network is to be compiled."""
        size = self.trial.training.batch_size
        return must_compile(self.trial, self.world.device, lambda: size * count_training_flops(json.dumps(self.config)))

    def begin(self) -> None:
        """What comes before the first step: compiles the network where it is to be, and joins it with the workers'.

        Raises CannotCompile, on all workers if on one, where the trial must not do without.
        """
        self.unet.train()
        self.network, device = self.unet, self.world.device
        if self.compiles or device.type == "cuda":
            with torch.no_grad():
                self.masks = Masks.of(self.unet, self._compute_losses, len(self.parts))
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
            self.network = compile_network(self.unet, device, (json.dumps(self.config), *of), whole=whole)
            try_out(self.unet, lambda: self._compute_losses()[2].mean().backward())
        except CannotCompile as error:
            self.uncompiled = str(error)
        if self.world.size > 1:
            failed = torch.tensor(float(bool(self.uncompiled)), device=device)
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
            self.uncompiled = self.uncompiled or ("another worker of the trial can't" if failed else "")
        if self.uncompiled:
            self.network = self.unet
            if self.trial.training.compile == "always":
                raise CannotCompile(f"training.compile: always, but {self.uncompiled}; or set it to auto or never")

    def train_step(self) -> None:
        training = self.trial.training
        if self.network is None:
            self.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(training, self.step)
        t, loss, weighted = self._compute_losses()
        if TIMESTEPS[training.timesteps].remembers:
            self._remember(t, loss.weighted.detach())
        weighted.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.sums[:4] += torch.stack([weighted.detach().mean(), loss.eps_mse.mean(), norm, torch.ones_like(norm)])
        self.step += 1

    def _compute_losses(self) -> tuple[Tensor, Loss, Tensor]:
        """The t of this step's batch, the losses of its images, and what is minimised, each (n,)."""
        for part, noise in zip(self.parts, self.noises, strict=True):
            noise.manual_seed(compute_address(self.trial.seed, "train", self.step, part))
        probability, network = self.history.probability(), self.network
        assert network is not None
        rows = self._draw_rows()
        x_0, t, eps = self._make_batch(rows, self.noises, probability)
        told = [self._draw_labels(rows)] if self.trial.model.labels else []
        if self.masks:
            self.masks.hand(self.noises, self.world.device)
        else:
            hand_noise(self.unet, self.noises)
        with self.autocast:
            loss = self.objective(lambda x, s: network(*self.process.feed(x, s), *told), x_0, t, eps)
        weighted = loss.weighted
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            weighted = weighted / (len(probability) * probability.to(t.device)[t - 1]).to(weighted.dtype)
        return t, loss, weighted

    def _draw_rows(self) -> np.ndarray:
        """The training images of this worker's part of the global batch."""
        size = self.trial.training.batch_size
        if self.shard_order:
            self.dataset.expect(self.shard_order.list_shards(self.step, size))
            return np.asarray(take_share(self.shard_order.draw(self.step, size), self.world))
        rows = draw_batch_rows(self.trial.seed, self.step, size, len(self.dataset.train), self.orders)
        return np.asarray(take_share(rows, self.world))

    def _draw_labels(self, rows: np.ndarray) -> Tensor:
        """int64 (n,): the labels of these images, some of them kept from the network.

        Their coins have an address of their own, so that with other dropout all other noise is the same.
        """
        assert self.dataset.train_labels is not None
        training = self.trial.training
        labels = torch.from_numpy(self.dataset.train_labels[rows])
        if training.label_dropout:
            n = len(rows) // len(self.parts)
            coins = [
                torch.rand(n, generator=make_generator(self.trial.seed, "labels", self.step, j)) for j in self.parts
            ]
            labels[torch.cat(coins) < training.label_dropout] = NO_LABEL
        return send(labels, self.world.device)

    def _make_batch(
        self, rows: np.ndarray, noises: Sequence[torch.Generator], probability: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The images of these rows and their noise: x_0 and eps float32 (n, C, H, W), t int64 (n,) in 1..T, or real.

        Real t are made of whole numbers of FINE: so each way of drawing is the same in continuous time.
        """
        size, flip = self.trial.training.batch_size, self.trial.data.flip
        device = self.world.device
        images = send(torch.from_numpy(self.dataset.train[rows]), device)
        x_0 = to_model(images, self.dataset.levels)
        n = len(x_0) // len(noises)
        count = count_sub_batches(size)
        parts = take_share([Part(n, index, count) for index in range(count)], self.world)
        draw, T = TIMESTEPS[self.trial.training.timesteps].load(), self.process.T or FINE
        t = torch.cat([draw(T, part, g, probability) for part, g in zip(parts, noises, strict=True)])
        if isinstance(self.process, Continuous):
            t = self.process.draw_times((t.double() - 0.5) / FINE)
        eps = torch.cat([torch.randn((n, *x_0.shape[1:]), generator=g, device=device) for g in noises])
        if flip:
            coins = torch.cat([torch.rand(n, generator=g, device=device) for g in noises]) < 0.5
            x_0 = torch.where(coins[:, None, None, None], x_0.flip(3), x_0)
        return x_0, t, eps

    def _remember(self, t: Tensor, loss: Tensor) -> None:
        """Adds the losses of the whole batch, in its order, to the history of every worker."""
        rows = torch.stack([t.double(), loss.double()], dim=1)
        if self.world.size > 1:
            every = [torch.empty_like(rows) for _ in range(self.world.size)]
            torch.distributed.all_gather(every, rows)
            rows = torch.cat(every)
        t, loss = rows.cpu().unbind(1)
        self.history.add(t.long(), loss)

    def _average(self) -> None:
        """EMA of the weights, with min(ema, (1 + n) / (10 + n)) so that the start is forgotten early."""
        for ema, weights in ((self.trial.training.ema, self.ema), *self.averages.items()):
            decay = min(ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(weights.values()), self.raw, 1 - decay)

    def use_averaged(self) -> "_Averaged":
        return _Averaged(self.unet, self.ema, Denoiser(self.unet, self.process, self.trial.diffusion.prediction))

    def collect_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the averages, so that the training goes on as if it had not stopped."""
        state = {f"weights.{name}": p for name, p in self.unet.state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        for (name, _), values in zip(self.unet.named_parameters(), moments.values(), strict=True):
            state |= {f"{key}.{name}": value for key, value in values.items()}
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            state |= {"history.losses": self.history.losses, "history.seen": self.history.seen}
        return state

    def begin_with(self, weights: Mapping[str, Tensor], fresh: Collection[str]) -> None:
        """Takes the weights in place of the random ones, except for the modules and weights that are `fresh`.

        Raises CheckpointError where others do not fit.
        """
        own = self.unet.state_dict()
        if misfits := compare_shapes(measure_weights(own), measure_weights(weights), fresh):
            raise CheckpointError("; ".join(misfits))
        taken = {name: weights[name] for name in own if not is_part(name, fresh)}
        self.unet.load_state_dict({**own, **taken})
        for average in (self.ema, *self.averages.values()):
            average.update({name: p.clone() for name, p in self.unet.state_dict().items()})

    def restore(
        self,
        step: int,
        ema: Mapping[str, Tensor],
        averages: Mapping[float, Mapping[str, Tensor]],
        state: Mapping[str, Tensor],
    ) -> None:
        """Goes on from a checkpoint of that step."""
        self.ema = {name: ema[name].to(self.world.device) for name in self.ema}
        for decay, weights in averages.items():
            self.averages[decay] = {name: weights[name].to(self.world.device) for name in self.ema}
        self.unet.load_state_dict({name: state[f"weights.{name}"] for name in self.ema})
        names = [name for name, _ in self.unet.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {key: state[f"{key}.{name}"] for key in keys} for i, name in enumerate(names)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            self.history = History(state["history.losses"], state["history.seen"])
        self.step = step


class _Averaged:
    """Puts the EMA weights into the network for the length of a `with`, and gives the `model` that it is part of."""

    def __init__(self, unet: nn.Module, ema: dict[str, Tensor], model: Denoiser) -> None:
        self.unet, self.ema, self.model = unet, ema, model

    def __enter__(self) -> Model:
        self.raw = {name: p.clone() for name, p in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.ema)
        self.unet.eval()
        return self.model

    def __exit__(self, *_: object) -> None:
        self.unet.load_state_dict(self.raw)


def make_trial_config(trial: Trial, dataset: Dataset) -> dict[str, Any]:
    """The config.json of the trial's network for images of the data set."""
    learned, dropout = trial.diffusion.learned, trial.training.label_dropout
    classes, sides = dataset.classes, dataset.sides
    return make_network_config(trial.model, dataset.shape, learned, sides=sides, classes=classes, label_dropout=dropout)


def repeat_steps(trial: Trial, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Steps of a training that is neither validated nor kept, without end: what they take can be measured."""
    learner = Learner(trial, dataset, World(device=device))
    while True:
        learner.train_step()
        yield


def send(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; a GPU gets them without anybody waiting until it has done what it was told before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


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
    bf16 has not.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = has_bf16 and trial.model.kind == UNET and trial.model.channels >= 32
    fast = fast and (trial.diffusion.continuous or PREDICTIONS[trial.diffusion.prediction].in_bf16)
    enabled = trial.training.precision == "bf16" or (trial.training.precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
