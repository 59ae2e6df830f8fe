"""Training a network: one generator loop, the same under plain Python, a Tune actor and Ray Train.

`train` yields a `Progress` at every validation and knows neither Ray nor MLflow; whoever iterates it is its host.
All it measures goes to the trial's journal and checkpoints in the storage, so a stopped loop resumes by being called
again. Data order and noise are addressed by (seed, step, sub-batch): the same at any number of workers.
"""

import math
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workers.config import (
    SAMPLE_GRID,
    SAMPLE_GRID_STEPS,
    VALIDATION_IMAGES,
    VALIDATION_TIMESTEPS,
    SamplerConfig,
    TrainingConfig,
    Trial,
    count_sub_batches,
)
from workers.data.dataset import Dataset
from workers.data.pixels import draw_grid, to_levels, to_model
from workers.diffusion.likelihood import estimate
from workers.diffusion.objectives import Objective
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model
from workers.diffusion.samplers import sample
from workers.diffusion.timesteps import History, Part
from workers.journal import Journal
from workers.kinds import PREDICTIONS, TIMESTEPS
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.peak import describe_peak
from workers.pulse import Pulse
from workers.speed import Meter, Stopwatch, name_training_kind
from workers.storage import Storage

State = Literal["running", "finished", "diverged", "pruned"]
POINTS = 10  # training points in the journal between two validations


@dataclass(frozen=True)
class World:
    """This process among the data-parallel workers of a trial; torch.distributed is set up where size > 1."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pulse: Pulse = field(default_factory=Pulse)  # hears of each step
    clock: Stopwatch = field(default_factory=Stopwatch)  # counts from the moment that the trial is taken up
    gauge: Callable[[], None] = lambda: None  # called after each step
    gpus: float = 1  # the part of a GPU that is this process' own


@dataclass(frozen=True)
class Progress:
    """What a host learns at each validation. `metrics` are those of the journal at `step`; rank 0 alone has them."""

    step: int
    state: State
    metrics: dict[str, float]
    images_per_s: float
    detail: str = ""


class Pruned(Exception):
    """The driver asked the trial to stop."""


class Diverged(Exception):
    """The loss or the gradient is not finite: a result of the trial, not a fault."""


def train(
    trial: Trial,
    dataset: Dataset,
    storage: Storage,
    folder: str,
    world: World | None = None,
    *,
    also_keep: Collection[int] = (),
) -> Iterator[Progress]:
    """Trains `trial` in `folder` of the storage until the checkpoints of its last step, and of the steps to
    `also_keep`, are there: each from the nearest checkpoint before it.

    Yields at step 0, every `validate_every` steps and at each of those. Raises CheckpointError where a checkpoint is
    damaged, and RuntimeError of torch where memory runs out.
    """
    world, asked = world or World(), sorted({*also_keep, trial.training.steps})
    there = [step for step in asked if manifest.find_at_step(storage, name_checkpoints_folder(folder), step)]
    missing = [step for step in asked if step not in there] or asked[-1:]
    loop, told = _Loop(trial, dataset, storage, folder, world, asked=asked), -1
    try:
        for target in missing:
            if not loop.leads_to(target):
                loop, told = _Loop(trial, dataset, storage, folder, world, asked=asked), -1
            loop.resume(target)
            while True:
                if loop.is_due(trial.training.validate_every) and loop.step != told:
                    with loop.meter.measure("validations", 1):
                        loop.validate()
                    yield loop.report_reached(finished=loop.step == missing[-1])
                    told = loop.step
                if loop.step == target:
                    break
                loop.advance()
    except Diverged as diverged:
        yield loop.report_ended("diverged", f"diverged by step {loop.step}: {diverged}")
    except Pruned:
        yield loop.report_ended("pruned", f"pruned by step {loop.step}")


def repeat_steps(trial: Trial, dataset: Dataset, storage: Storage, device: torch.device) -> Iterator[None]:
    """Steps of a training that is neither validated nor kept, without end: what they take can be measured."""
    loop = _Loop(trial, dataset, storage, "steps", World(device=device), asked=[])
    loop.network.train()
    while True:
        loop._train_step()
        loop.step += 1
        yield


class _Loop:
    """The state of one training run, and its transitions."""

    def __init__(
        self, trial: Trial, dataset: Dataset, storage: Storage, folder: str, world: World, *, asked: Sequence[int]
    ) -> None:
        """At step 0. The checkpoints of the steps that are `asked` for stay."""
        self.trial, self.dataset, self.storage, self.folder, self.world = trial, dataset, storage, folder, world
        self.asked = asked
        height, _, channels = dataset.shape
        self.objective = Objective.of(trial.diffusion, trial.loss, dataset.levels)
        self.process, self.history = self.objective.process, History.empty(trial.diffusion.T)
        learned = trial.diffusion.learned
        self.config = make_unet_config(trial.model, image_channels=channels, resolution=height, learned=learned)
        self.unet = UNet(self.config, make_generator(trial.seed, "weights")).to(world.device)
        self.raw = list(self.unet.state_dict().values())  # views of the parameters, not copies
        self.ema = {name: p.clone() for name, p in self.unet.state_dict().items()}
        self.averages = {decay: {n: p.clone() for n, p in self.ema.items()} for decay in trial.training.averages}
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=trial.training.lr, fused=True)
        self.autocast = choose_autocast(trial, world.device)
        self.step, self.clock = 0, world.clock
        self.clock.resume({})
        self.meter = Meter(world.device, share=world.gpus)
        self.checkpoint: manifest.Checkpoint | None = None  # the newest that this training knows
        self.journal = Journal(storage, folder)
        self.network: nn.Module = DistributedDataParallel(self.unet) if world.size > 1 else self.unet
        self.sums = torch.zeros(5, dtype=torch.float64, device=world.device)
        self.orders: dict[int, np.ndarray] = {}

    def leads_to(self, step: int) -> bool:
        """Whether this training comes to that step as soon as one from a checkpoint."""
        nearest = manifest.find_newest(self.storage, name_checkpoints_folder(self.folder), up_to=step)
        return self.step <= step and (nearest is None or (nearest.step or 0) <= self.step)

    def resume(self, step: int) -> None:
        """Goes on from the nearest checkpoint before that step, where there is one beyond this."""
        nearest = manifest.find_newest(self.storage, name_checkpoints_folder(self.folder), up_to=step)
        if nearest and (nearest.step or 0) > self.step:
            self._restore(nearest)
            self.checkpoint = nearest

    def is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step in self.asked

    def advance(self) -> None:
        """Trains up to the next validation, with a journal point now and then and checkpoints where they are due."""
        training = self.trial.training
        point_every = max(1, training.validate_every // POINTS)
        self.network.train()
        first, busy = self.step, self.meter.now()
        self.clock.turn_to("training")
        while True:
            self._train_step()
            self.step += 1
            self.world.pulse.begin_step()
            self.world.gauge()
            if self.is_due(point_every):
                self._note_training()
            if self.is_due(training.checkpoint_every):
                self.world.pulse.rest()
                self.clock.turn_to("checkpoints")
                self._save()
                self.clock.turn_to("training")
            if self.is_due(training.validate_every):
                break
        self.world.pulse.rest()
        self.clock.turn_to("waiting")
        images = (self.step - first) * training.batch_size // self.world.size
        self.meter.add(name_training_kind(training), images, self.meter.now() - busy)

    def _train_step(self) -> None:
        training, world = self.trial.training, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(training, self.step)
        noises = [
            make_generator(self.trial.seed, "train", self.step, j, device=world.device)
            for j in take_share(range(count_sub_batches(training.batch_size)), world)
        ]
        probability = self.history.probability()
        x_0, t, eps = self._make_batch(noises, probability)
        self.unet.set_noise(noises)
        with self.autocast:
            loss = self.objective(lambda x, s: self.network(x, s - 1), x_0, t, eps)
        weighted = loss.weighted
        if TIMESTEPS[training.timesteps].remembers:
            weighted = weighted / (self.process.T * probability.to(t.device)[t - 1]).to(weighted.dtype)
            self._remember(t, loss.weighted.detach())
        weighted.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.sums[:4] += torch.stack([weighted.detach().mean(), loss.eps_mse.mean(), norm, torch.ones_like(norm)])

    def _make_batch(self, noises: Sequence[torch.Generator], probability: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This worker's part of the global batch: x_0 and eps float32 (n, C, H, W), t int64 (n,) in 1..T."""
        size, flip = self.trial.training.batch_size, self.trial.data.flip
        rows = take_share(
            draw_batch_rows(self.trial.seed, self.step, size, len(self.dataset.train), self.orders), self.world
        )
        device = self.world.device
        images = torch.from_numpy(self.dataset.train[rows]).to(device)
        x_0 = to_model(images, self.dataset.levels)
        n = len(x_0) // len(noises)
        count = count_sub_batches(size)
        parts = take_share([Part(n, index, count) for index in range(count)], self.world)
        draw, T = TIMESTEPS[self.trial.training.timesteps].load(), self.process.T
        t = torch.cat([draw(T, part, g, probability) for part, g in zip(parts, noises, strict=True)])
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

    def _note_training(self) -> None:
        """A point of means since the last one, over all workers. Raises Diverged or Pruned on all of them at once."""
        sums = self.sums.clone()
        self.sums.zero_()
        sums[4] = self.world.rank == 0 and self.storage.exists(name_stop_file(self.folder))
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        if sums[4]:
            raise Pruned
        weighted, mse, norm = (sums[:3] / sums[3]).tolist()
        if not (math.isfinite(weighted) and math.isfinite(norm)):
            raise Diverged(f"loss {weighted:g}, gradient norm {norm:g}")
        loss = self.trial.loss
        self.journal.add_metrics(
            self.step,
            {
                f"train/loss_{loss.weighting if loss.objective == 'mse' else loss.objective}": weighted,
                "train/eps_mse": mse,
                "train/grad_norm": norm,
                "train/lr": compute_learning_rate(self.trial.training, self.step - 1),
            },
        )

    @torch.no_grad()
    def validate(self) -> None:
        """bits/dim of held-out images and a grid of samples, both with the EMA weights and noise that trials share.

        Rank 0 does it. The others learn only whether it was finite, so that all of them end together.
        """
        self.clock.turn_to("validation")
        nll_bpd = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        if self.world.rank == 0 and self.journal.get(self.step, "valid/nll_bpd") is None:
            with self.use_averaged() as model, self.autocast:
                seed, levels, device = self.trial.seed, self.dataset.levels, self.world.device
                held_out = torch.from_numpy(np.array(self.dataset.held_out[:VALIDATION_IMAGES])).to(device)
                x_0 = to_model(held_out, levels)
                bound = estimate(self.process, model, x_0, VALIDATION_TIMESTEPS, levels, seed, "valid")
                sampler = SamplerConfig(kind="ddim", steps=min(SAMPLE_GRID_STEPS, self.process.T))
                noise = make_generator(seed, "grid", device=device)
                images = sample(self.process, model, sampler, (SAMPLE_GRID, *x_0.shape[1:]), noise)
            nll_bpd[0] = bound.mean
            if math.isfinite(bound.mean):
                values = {"valid/nll_bpd": bound.mean, "valid/nll_bpd_se": bound.standard_error}
                self.journal.add_metrics(self.step, {**values, "train/images_per_s": self.images_per_s})
                self.journal.add_image(self.step, "samples", draw_grid(to_levels(images, levels), levels))
        if self.world.size > 1:
            torch.distributed.broadcast(nll_bpd, src=0)
        if not math.isfinite(nll_bpd.item()):
            raise Diverged(f"valid/nll_bpd {nll_bpd.item():g}")

    def report_reached(self, finished: bool) -> Progress:
        return self._report("finished" if finished else "running")

    def report_ended(self, state: State, why: str) -> Progress:
        return self._report(state, why)

    def _report(self, state: State, detail: str = "") -> Progress:
        self.clock.turn_to("waiting")
        names = ("valid/nll_bpd", "valid/nll_bpd_se")
        metrics = {n: v for n in names if (v := self.journal.get(self.step, n)) is not None}
        progress = Progress(self.step, state, metrics, self.images_per_s, detail)
        if self.world.rank == 0:
            self.journal.flush()
            speed = {"spent": self.meter.spent, "seconds": self.clock.seconds, "peak": self.peak}
            of = self.storage, self.folder, progress, self.trial.training.steps, self.checkpoint
            write_status(*of, speed={"hardware": self.meter.hardware, **speed})
        return progress

    @cached_property
    def peak(self) -> dict[str, Any]:
        """What training can be held against, asked for at the first status: before the first step of a trial."""
        return describe_peak(self.storage, self.config, self.autocast, self.world.device, self.world.size)

    @property
    def images_per_s(self) -> float:
        train_seconds = self.clock.seconds.get("training", 0.0)
        return self.step * self.trial.training.batch_size / train_seconds if train_seconds else 0.0

    def use_averaged(self) -> "_Averaged":
        return _Averaged(self.unet, self.ema, Denoiser(self.unet, self.process, self.trial.diffusion.prediction))

    def _save(self) -> None:
        if self.world.rank != 0:
            return
        state = {f"weights.{name}": p for name, p in self.unet.state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        for (name, _), values in zip(self.unet.named_parameters(), moments.values(), strict=True):
            state |= {f"{key}.{name}": value for key, value in values.items()}
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            state |= {"history.losses": self.history.losses, "history.seen": self.history.seen}
        self.journal.flush()
        snapshot = checkpoints.Snapshot(
            step=self.step,
            unet_config=self.config,
            process=self.process,
            prediction=self.trial.diffusion.prediction,
            ema=self.ema,
            averages=self.averages,
            state=state,
            progress={"seconds": self.clock.seconds},
            journal=self.journal.make_content(),
        )
        self.checkpoint = checkpoints.save(
            self.storage, name_checkpoints_folder(self.folder), snapshot, kept=self.step in self.asked
        )

    def _restore(self, checkpoint: manifest.Checkpoint) -> None:
        ema, state, progress = checkpoints.load_state(checkpoint)
        self.ema = {name: ema[name].to(self.world.device) for name in self.ema}
        for decay, weights in checkpoints.load_averages(checkpoint, self.averages).items():
            self.averages[decay] = {name: weights[name].to(self.world.device) for name in self.ema}
        self.unet.load_state_dict({name: state[f"weights.{name}"] for name in self.ema})
        names = [name for name, _ in self.unet.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {key: state[f"{key}.{name}"] for key in keys} for i, name in enumerate(names)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if TIMESTEPS[self.trial.training.timesteps].remembers:
            self.history = History(state["history.losses"], state["history.seen"])
        self.step = progress["step"]
        # A checkpoint of before knows the seconds of training alone.
        self.clock.resume(progress.get("seconds") or {"training": progress["train_seconds"]})


class _Averaged:
    """Puts the EMA weights into the network for the length of a `with`, and gives the `model` that it is part of."""

    def __init__(self, unet: UNet, ema: dict[str, Tensor], model: Denoiser) -> None:
        self.unet, self.ema, self.model = unet, ema, model

    def __enter__(self) -> Model:
        self.raw = {name: p.clone() for name, p in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.ema)
        self.unet.eval()
        return self.model

    def __exit__(self, *_: object) -> None:
        self.unet.load_state_dict(self.raw)


def name_checkpoints_folder(folder: str) -> str:
    return f"{folder}/checkpoints"


def name_stop_file(folder: str) -> str:
    """The file that asks the trial in `folder` to stop at its next journal point."""
    return f"{folder}/stop"


def compute_learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of 0-based `step`: linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / training.warmup) if training.warmup else 1.0
    if training.decay == "none":
        return training.lr * warm
    return training.lr * warm * 0.5 * (1 + math.cos(math.pi * step / training.steps))


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


def take_share(items: Any, world: World) -> Any:
    """This worker's contiguous share of a sequence; the sizes divide evenly, as the preflight has checked."""
    assert len(items) % world.size == 0, (len(items), world.size)
    n = len(items) // world.size
    return items[world.rank * n : (world.rank + 1) * n]


def choose_autocast(trial: Trial, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the trial asks for it, or `auto` finds it faster; parameters stay float32.

    `auto` takes it on GPUs that have it, and on CPUs with AMX or AVX512-BF16 from a width of 32 channels on: below, it
    measured no faster than float32. Never for the prediction mu, which differs from x_t in digits that bf16 has not.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = has_bf16 and trial.model.channels >= 32
    fast = fast and PREDICTIONS[trial.diffusion.prediction].in_bf16
    enabled = trial.training.precision == "bf16" or (trial.training.precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def write_status(
    storage: Storage,
    folder: str,
    progress: Progress,
    steps: int,
    checkpoint: manifest.Checkpoint | None,
    *,
    speed: Mapping[str, Any],
) -> None:
    """`status.json`: where the trial stands, for the driver that comes next and for a person.

    Where it stands further already, and an earlier checkpoint is made again, that remains.
    """
    path = f"{folder}/status.json"
    before = storage.read_sealed(path)
    if before and before["step"] > progress.step and before["state"] != "running":
        return
    storage.write_sealed(
        path,
        {
            "state": progress.state,
            "step": progress.step,
            "steps": steps,
            "valid_nll_bpd": progress.metrics.get("valid/nll_bpd"),
            "images_per_s": progress.images_per_s,
            "detail": progress.detail,
            "checkpoint": checkpoint.digest if checkpoint else None,
            "host": socket.gethostname(),
            **speed,
            "updated_ms": time.time_ns() // 1_000_000,
        },
    )
