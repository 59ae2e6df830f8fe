"""Whether a network keeps the contract of docs/extending.md: it is built, called and trained on Gaussian pixels.

Each check is a law that training and evaluation rely on: that a trial is its seed, that any number of workers gives the
same bits, that a checkpoint is the network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from workers.config import DataConfig, DiffusionConfig, LossConfig, ModelConfig, ScheduleConfig, TrainingConfig, Trial
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.diffusion.process import Process
from workers.learner import Learner
from workers.network.build import build_network, find_mistakes, hand_noise
from workers.noise import make_generator
from workers.sides import fold
from workers.world import World

STEPS, BATCH, IMAGES, LEVELS, CLASSES = 200, 64, 1024, 256, 2
VECTORS = 3, 4  # the length of the sequence that a network is told, and their width
DIFFUSION = DiffusionConfig(T=50, schedule=ScheduleConfig(scale="per_1000"))
SAME = 1e-4  # of two outputs that are equal but for the order of their sums, relative to the largest


@dataclass(frozen=True)
class Law:
    name: str
    broken: str  # how, and what to do; empty where it is kept

    def __str__(self) -> str:
        return f"{self.name:<9} {f'BROKEN: {self.broken}' if self.broken else 'kept'}"


def check_network(model: ModelConfig, sides: tuple[int, ...], channels: int) -> Iterator[Law]:
    """The laws, one after the other, for images of these sides, (height, width), for signals, (length,), or for
    volumes, (depth, height, width); without the first no other."""
    torch.set_num_threads(1)
    shape, own = (*fold(sides), channels), () if len(sides) == 2 else sides
    mistakes = find_mistakes(model, shape, False, own) or find_mistakes(model, shape, True, own)
    yield Law("shapes", "".join(mistakes))
    if mistakes:
        return
    trial = Trial(
        data=DataConfig(source="gaussian"), model=model, diffusion=DIFFUSION, loss=LossConfig(),
        training=TrainingConfig(steps=STEPS, batch_size=BATCH, lr=2e-3, ema=0.0, precision="float32"),
    )  # fmt: skip
    learner = Learner(trial, _draw_gaussian(shape, own), World())
    network, t = learner.module, torch.arange(8) * 6
    inputs = (_draw_images(shape), t, *_take_told(learner, 8))
    yield Law("seed", _check_seed(learner.config))
    yield Law("noise", _check_noise(network, inputs))
    unmoved = {name for name, p in network.named_parameters() if p.requires_grad}
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    network.train()
    for _ in range(STEPS):
        before = {name: p.detach().clone() for name, p in network.named_parameters() if name in unmoved}
        learner.train_step()
        unmoved -= {name for name, p in network.named_parameters() if name in before and (p != before[name]).any()}
    network.eval()
    still = sorted([*unmoved, *frozen])
    yield Law("gradient", f"{', '.join(still[:3])} never change: leave them out, or use them" if still else "")
    yield Law("state", _check_state(learner, inputs))
    yield Law("batch", _check_batch(network, inputs))
    x, t, *told = inputs
    same = torch.equal(_call(network, inputs), _call(network, (x, t.flip(0), *told)))
    yield Law("time", "the output is the same at any t: let it read t" if same else "")
    if told:
        same = torch.equal(_call(network, inputs), _call(network, (x, t, told[0].flip(0))))
        what, one = ("labels", "label") if model.told == "labels" else ("vectors", "vectors")
        yield Law(what, f"the output is the same for any {one}: let it read {what}" if same else "")
    yield Law("learning", _check_learning(learner))


def _draw_gaussian(shape: tuple[int, int, int], sides: tuple[int, ...]) -> Dataset:
    """Gaussian pixels in whole levels, with labels and vectors that say nothing of them."""
    noise = np.random.RandomState(0).randn(IMAGES, *shape)
    pixels = np.clip(np.rint((noise * GAUSSIAN_SD + 1) / 2 * (LEVELS - 1)), 0, LEVELS - 1).astype(np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    vectors = np.random.RandomState(1).randn(IMAGES, *VECTORS).astype(np.float32)
    return Dataset(
        "", "gaussian", LEVELS, shape, pixels, pixels[:BATCH], labels, labels[:BATCH],
        sides=sides, train_vectors=vectors, held_out_vectors=vectors[:BATCH],
    )  # fmt: skip


def _take_told(learner: Learner, n: int) -> list[Tensor]:
    """What the network is told of the first n images, where it is told anything."""
    values = learner.dataset.get_told(learner.trial.model.told, "train")
    return [] if values is None else [torch.from_numpy(values[:n])]


def _draw_images(shape: tuple[int, int, int]) -> Tensor:
    height, width, channels = shape
    return torch.randn(8, channels, height, width, generator=make_generator("x"))


def _call(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(*inputs)
    return output


def _check_seed(config: dict[str, Any]) -> str:
    torch.rand(1)  # as if other work had drawn from the global generator
    one = build_network(config, make_generator("one")).state_dict()
    torch.rand(1)
    again = build_network(config, make_generator("one")).state_dict()
    if one.keys() == again.keys() and all(torch.equal(w, again[name]) for name, w in one.items()):
        return ""
    return "two networks of one seed begin with other weights: draw them from PyTorch's global generator alone"


def _check_noise(network: nn.Module, inputs: Sequence[Tensor]) -> str:
    network.train()
    outputs = []
    for seed in (1, 2):
        hand_noise(network, [make_generator("noise", j) for j in range(2)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs.append(_call(network, inputs))
    if torch.equal(*outputs):
        return ""
    return "in training the output depends on PyTorch's global generator: take workers.network.unet.Dropout"


def _check_state(learner: Learner, inputs: Sequence[Tensor]) -> str:
    kept = safetensors.torch.save({n: w.detach().contiguous() for n, w in learner.module.state_dict().items()})
    other = build_network(learner.config, make_generator("another")).eval()
    other.load_state_dict(safetensors.torch.load(kept))
    if torch.equal(_call(other, inputs), _call(learner.module, inputs)):
        return ""
    return "another network with its state_dict gives another output: register all that it learns as parameters"


def _check_batch(network: nn.Module, inputs: Sequence[Tensor]) -> str:
    whole = _call(network, inputs)
    each = torch.cat([_call(network, [part[i : i + 1] for part in inputs]) for i in range(len(whole))])
    if (whole - each).abs().max() <= SAME * whole.abs().max():
        return ""
    return "an image's output depends on the others of its batch: normalise each image by itself"


def _check_learning(learner: Learner) -> str:
    """The error of eps against the least there is: Var[eps | x_t] = alpha_bar s^2 / (alpha_bar s^2 + 1 - alpha_bar)."""
    process, T = Process.of(DIFFUSION), DIFFUSION.T
    x_0 = to_model(torch.from_numpy(learner.dataset.train), LEVELS)
    eps = torch.randn(x_0.shape, generator=make_generator("eps"))
    t = torch.arange(len(x_0)) % T + 1
    told = _take_told(learner, len(x_0))
    error = float((_call(learner.module, (process.q_sample(x_0, t, eps), t - 1, *told)) - eps).square().mean())
    signal = process.alpha_bar * GAUSSIAN_SD**2
    least = float((signal / (signal + 1 - process.alpha_bar)).mean())
    if error - least < (1 - least) / 2:
        return ""
    return (
        f"after {STEPS} steps on Gaussian pixels the mean squared error of eps is {error:.3f}, where 1 takes no "
        f"network and {least:.3f} is the least: is the output as large as the noise, and does the network see x and t?"
    )
