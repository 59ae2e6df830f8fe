"""Training a network: one generator loop, the same under plain Python, a Tune actor and Ray Train.

`train` yields a `Progress` at every validation and knows neither Ray nor MLflow; whoever iterates it is its host.
All it measures goes to the trial's journal and checkpoints in the storage, so a stopped loop resumes by being called
again. What a step does to the network is in `workers.learner`.
"""

import math
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch

from workers.bits import VALIDATIONS
from workers.code import drop_pin
from workers.config import (
    Trial,
)
from workers.data.dataset import Dataset
from workers.first_weights import load_first_weights, load_teacher
from workers.journal import Journal
from workers.latents import open_latents
from workers.learner import Learner, compute_learning_rate
from workers.network import averages, manifest
from workers.network import checkpoint as checkpoints
from workers.pausing import Lookout, Paused
from workers.peak import describe_peak
from workers.speed import Meter, name_training_kind, wait_for
from workers.storage import Storage
from workers.warm_start import INIT, TEACHER, TRUNK, list_models
from workers.world import World

State = Literal["running", "finished", "diverged", "pruned", "paused"]
POINTS = 10  # training points in the journal between two validations


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
    starts: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Progress]:
    """Trains `trial` in `folder` of the storage until the checkpoints of its last step, and of the steps to
    `also_keep`, are there: each from the nearest checkpoint before it, or else from the one of another trial that
    is to begin it. Without that it begins at step 0. `starts` has the folders of the checkpoints that the trial names,
    and of its trunk, by their slots (`workers.warm_start`).

    Yields at step 0, every `validate_every` steps and at each of those. Raises CheckpointError where a checkpoint is
    damaged, and RuntimeError of torch where memory runs out.
    """
    world, asked = world or World(), sorted({*also_keep, trial.training.steps})
    there = [step for step in asked if manifest.find_at_step(storage, name_checkpoints_folder(folder), step)]
    missing = [step for step in asked if step not in there] or asked[-1:]
    loop, told = _Loop(trial, dataset, storage, folder, world, asked=asked, starts=starts), -1
    try:
        for target in missing:
            if not loop.leads_to(target):
                loop, told = _Loop(trial, dataset, storage, folder, world, asked=asked, starts=starts), -1
            loop.resume(target)
            while True:
                if loop.is_due(trial.training.validate_every) and loop.step != told:
                    with loop.meter.measure("validations", 1):
                        loop.validate()
                    yield loop.report("finished" if loop.step == missing[-1] else "running")
                    told = loop.step
                if loop.step == target:
                    break
                loop.advance()
    except Diverged as diverged:
        yield loop.report("diverged", f"diverged by step {loop.step}: {diverged}")
    except Pruned:
        yield loop.report("pruned", f"pruned by step {loop.step}")
    except Paused:
        yield loop.report("paused", f"paused at step {loop.step}")


class _Loop:
    """The state of one training run, and its transitions."""

    def __init__(
        self,
        trial: Trial,
        dataset: Dataset,
        storage: Storage,
        folder: str,
        world: World,
        *,
        asked: Sequence[int],
        starts: Mapping[str, str],
    ) -> None:
        """At step 0. The checkpoints of the steps that are `asked` for stay."""
        self.trial, self.dataset, self.storage, self.folder, self.world = trial, dataset, storage, folder, world
        self.asked, self.starts = asked, starts
        absent = set(list_models(trial)) - starts.keys() - ({INIT} if TRUNK in starts else set())
        assert not absent, f"what the trial starts from was not handed over: {absent}"
        self.first = trial.training.trunk_steps if TRUNK in starts else 0  # the steps that another trial has made
        teacher = trial.loss.teacher if TEACHER in starts else None
        taught = load_teacher(self._open_start(TEACHER), teacher.weights) if teacher else None
        latents = open_latents(trial, dataset, storage, starts, world.device)
        self.learner = Learner(trial, dataset, world, teacher=taught, latents=latents)
        self.clock = world.clock
        self.clock.resume({})
        self.meter = Meter(world.device, share=world.gpus)
        self.checkpoint: manifest.Checkpoint | None = None  # the newest that this training knows
        self.posthoc: dict[str, str] = {}  # the files of averages that were kept up to now, with their sha256
        self.journal = Journal(storage, folder)
        self.lookout = Lookout(world.pulse, world.size, world.device)

    @property
    def step(self) -> int:
        return self.learner.step

    def leads_to(self, step: int) -> bool:
        """Whether this training comes to that step as soon as one from a checkpoint."""
        nearest = manifest.find_newest(self.storage, name_checkpoints_folder(self.folder), up_to=step)
        return self.step <= step and (nearest is None or (nearest.step or 0) <= self.step)

    def resume(self, step: int) -> None:
        """Goes on from the nearest checkpoint before that step, where there is one beyond this; a training that has
        none yet, from where it starts."""
        nearest = manifest.find_newest(self.storage, name_checkpoints_folder(self.folder), up_to=step)
        if nearest and (nearest.step or 0) > self.step:
            self._restore(nearest)
            self.checkpoint = nearest
        elif self.step == 0:
            self._begin()

    def _begin(self) -> None:
        """From the checkpoint of another trial, where there is one: as if its training went on, or with its weights
        alone."""
        if TRUNK in self.starts:
            self._restore(self._open_start(TRUNK), of_other=True)
        elif init := self.trial.training.init:
            self.learner.begin_with(load_first_weights(self._open_start(INIT), init.weights), init.fresh)
        elif (teacher := self.trial.loss.teacher) and TEACHER in self.starts:
            self.learner.begin_with(load_first_weights(self._open_start(TEACHER), teacher.weights), ())

    def _open_start(self, slot: str) -> manifest.Checkpoint:
        return manifest.open_committed(self.storage, self.starts[slot])

    def is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step in self.asked

    def advance(self) -> None:
        """Trains up to the next validation, with a journal point now and then and checkpoints where they are due.

        Raises Paused, after a checkpoint, where the trial is asked to pause.
        """
        training = self.trial.training
        point_every = max(1, training.validate_every // POINTS)
        self._make_ready()
        first, busy = self.step, self.meter.now()
        self.clock.turn_to("training")
        while True:
            self.learner.train_step()
            self.world.pulse.begin_step()
            self.world.gauge()
            if self.is_due(point_every):
                self._note_training()
            if training.posthoc and self.step % training.posthoc.every == 0:
                self._keep_averages()  # before a checkpoint of the same step, which names them
                self.clock.turn_to("training")
            if self.is_due(training.checkpoint_every):
                self._save()
                self.clock.turn_to("training")
            if self.lookout.sees_pause():
                self._save()
                raise Paused
            if self.is_due(training.validate_every):
                break
        self.world.pulse.rest()
        wait_for(self.world.device)  # its last steps are training, too
        self.clock.turn_to("waiting")
        images = (self.step - first) * training.batch_size // self.world.size
        self.meter.add(name_training_kind(training), images, self.meter.now() - busy)

    def _make_ready(self) -> None:
        """Readies the network for the steps that follow."""
        if self.learner.network is None and self.learner.compiles:
            self.clock.turn_to("compiling")
            with self.meter.measure("compiling", 1):
                self.learner.begin()
        self.learner.module.train()

    def _note_training(self) -> None:
        """A point of means since the last one, over all workers. Raises Diverged or Pruned on all of them at once."""
        sums = self.learner.sums.clone()
        self.learner.sums.zero_()
        sums[-1] = self.world.rank == 0 and self.storage.exists(name_stop_file(self.folder))
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        *totals, steps, stopped = sums.tolist()  # a GPU is waited for here, once a point
        if stopped:
            raise Pruned
        weighted, *told, norm = (total / steps for total in totals)
        if not (math.isfinite(weighted) and math.isfinite(norm)):
            raise Diverged(f"loss {weighted:g}, gradient norm {norm:g}")
        loss = self.trial.loss
        self.journal.add_metrics(
            self.step,
            {
                f"train/loss_{drop_pin(loss.weighting if loss.objective == 'mse' else loss.objective)}": weighted,
                **dict(zip(self.learner.lesson.told, told, strict=True)),
                "train/grad_norm": norm,
                "train/lr": compute_learning_rate(self.trial.training, self.step - 1),
            },
        )

    @torch.no_grad()
    def validate(self) -> None:
        """What the lesson measures with the EMA weights.

        Rank 0 does it. The others learn only whether it was finite, so that all of them end together.
        """
        self.clock.turn_to("validation")
        name = self.learner.lesson.measure
        measured = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        if self.world.rank == 0 and self.journal.get(self.step, name) is None:
            with self.learner.use_averaged() as network, self.learner.autocast:
                found = self.learner.lesson.validate(network)
            measured[0] = found.values[name]
            if math.isfinite(found.values[name]):
                self.journal.add_metrics(self.step, {**found.values, "train/images_per_s": self.images_per_s})
                for image, png in found.images.items():
                    self.journal.add_image(self.step, image, png)
        if self.world.size > 1:
            torch.distributed.broadcast(measured, src=0)
        if not math.isfinite(measured.item()):
            raise Diverged(f"{name} {measured.item():g}")

    def report(self, state: State, detail: str = "") -> Progress:
        self.clock.turn_to("waiting")
        name = self.learner.lesson.measure
        metrics = {n: v for n in (name, f"{name}_se") if (v := self.journal.get(self.step, n)) is not None}
        progress = Progress(self.step, state, metrics, self.images_per_s, detail)
        if self.world.rank == 0:
            self.journal.flush()
            speed = {"spent": self.meter.spent, "seconds": self.clock.seconds, "peak": self.peak}
            of = self.storage, self.folder, progress, self.trial.training.steps, self.checkpoint
            uncompiled = {"uncompiled": self.learner.uncompiled} if self.learner.uncompiled else {}
            write_status(*of, speed={"hardware": self.meter.hardware, **speed, **uncompiled})
        return progress

    @cached_property
    def peak(self) -> dict[str, Any]:
        """What training can be held against, asked for at the first status: before the first step of a trial."""
        of = self.learner.config, self.learner.autocast
        return describe_peak(self.storage, *of, self.world.device, self.world.size)

    @property
    def images_per_s(self) -> float:
        seconds, steps = self.clock.seconds.get("training", 0.0), self.step - self.first
        return steps * self.trial.training.batch_size / seconds if seconds else 0.0

    def _keep_averages(self) -> None:
        """What averages of other widths are made of, once the training is done."""
        self.world.pulse.rest()
        self.clock.turn_to("checkpoints")
        if self.world.rank == 0:
            self.posthoc |= averages.keep(self.storage, self.folder, self.step, self.learner.widths)

    def _save(self) -> None:
        self.world.pulse.rest()
        self.clock.turn_to("checkpoints")
        sums = self.learner.sums
        if self.world.size > 1 and sums[-2]:  # between two points of the journal: rank 0 keeps what all have summed
            torch.distributed.all_reduce(sums)
            sums *= self.world.rank == 0
        if self.world.rank != 0:
            return
        self.journal.flush()
        snapshot = checkpoints.Snapshot(
            step=self.step,
            unet_config=self.learner.config,
            stage=self.learner.lesson.space.describe_stage(),
            process=self.learner.lesson.process,
            student=self.learner.lesson.student,
            prediction=self.learner.lesson.prediction,
            ema=self.learner.ema,
            averages=self.learner.averages,
            widths=self.learner.widths,
            posthoc=self.posthoc,
            state=self.learner.collect_state(),
            progress={"seconds": self.clock.seconds, "sums": sums.tolist()},
            journal=self.journal.make_content(),
        )
        folder, kept = name_checkpoints_folder(self.folder), self.step in self.asked
        self.checkpoint = checkpoints.save(self.storage, folder, snapshot, kept=kept)

    def _restore(self, checkpoint: manifest.Checkpoint, of_other: bool = False) -> None:
        """Goes on from a checkpoint of this trial, or of another one whose steps were the same until then."""
        ema, state, progress = checkpoints.load_state(checkpoint)
        of, widths = checkpoints.load_averages(checkpoint, self.learner.averages), self.learner.widths
        self.learner.restore(progress["step"], ema, of, state, widths=averages.load_widths(checkpoint, widths))
        self.posthoc = dict(checkpoint.posthoc)
        if self.world.rank == 0 and "sums" in progress:
            self.learner.sums.copy_(torch.tensor(progress["sums"], dtype=torch.float64))
        if not of_other:  # of which the seconds are its own; a checkpoint of before knows those of training alone
            self.clock.resume(progress.get("seconds") or {"training": progress["train_seconds"]})


def name_checkpoints_folder(folder: str) -> str:
    return f"{folder}/checkpoints"


def name_stop_file(folder: str) -> str:
    """The file that asks the trial in `folder` to stop at its next journal point."""
    return f"{folder}/stop"


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
            **{name.replace("/", "_"): v for name, v in progress.metrics.items() if name in VALIDATIONS},
            "images_per_s": progress.images_per_s,
            "detail": progress.detail,
            "checkpoint": checkpoint.digest if checkpoint else None,
            "host": socket.gethostname(),
            **speed,
            "updated_ms": time.time_ns() // 1_000_000,
        },
    )
