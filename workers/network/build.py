"""The network of a trial, from its settings to its config.json, and from that to a module.

Ours are the U-Net, whose config.json is that of diffusers' UNet2DModel, and those of other families, whose entries say
how theirs is made. A network of another kind of `NETWORKS` is a function or class (ModelConfig, Signature) ->
nn.Module; its config.json names it and holds its settings. What such a module has to do is said in docs/extending.md,
and `orchestrator.conform` looks whether it does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from workers.classes import NO_LABEL, Classes, Told, Vectors
from workers.code import drop_pin, locate_error
from workers.config import ModelConfig
from workers.entries import is_outside, load
from workers.identity import collect_settings_read
from workers.kinds import DENOISER, GENERATOR, NETWORKS, NetworkEntry
from workers.network.autoencoder_config import find_latent_size
from workers.network.unet import Dropout, UNet, draw_bits
from workers.network.unet_config import (
    UNET,
    count_rows,
    make_told_fields,
    make_unet_config,
    read_told,
    takes_nothing,
)
from workers.noise import make_generator

CLASS = "_class_name"  # in a config.json, diffusers' name for it


@dataclass(frozen=True)
class Signature:
    """What a network takes and gives: images (n, channels, height, width), and as many `outputs` in their place."""

    channels: int
    height: int
    width: int
    outputs: int  # the channels, twice as many where a variance is learned
    classes: int = 0  # rows of a class embedding, the last of which may stand for no label; 0: it is told no labels
    sides: tuple[int, ...] = ()  # of signals, (length,), and volumes: x is (n, channels, *sides), and so the output
    vectors: tuple[int, int] | None = None  # (length, width) of the sequence that it is told, all zeros being nothing


def make_network_config(
    model: ModelConfig,
    shape: tuple[int, int, int],
    learned: bool,
    *,
    sides: tuple[int, ...] = (),
    told: Told | None = None,
    label_dropout: float = 0.0,
) -> dict[str, Any]:
    """The config.json of the network for images of this shape (height, width, channels).

    `sides` are those of signals and volumes, which are folded into it (`workers.sides`); a U-Net takes none.
    `told` is what the data have of what `model` is told, and `label_dropout` keeps it from the network in training.
    Raises ValueError.
    """
    told = told if model.told else None
    assert not model.told or told, f"the network is told {model.told}, and the data have none"
    height, width, channels = shape
    if model.family != DENOISER:
        config: dict[str, Any] = load(NETWORKS[model.kind].config)(model, shape)
        return config
    if model.kind == UNET:
        return make_unet_config(
            model, image_channels=channels, resolution=(height, width), learned=learned, told=told,
            label_dropout=label_dropout,
        )  # fmt: skip
    settings = {name: value for name, value in collect_settings_read(model).items() if name != "kind"}
    return {
        CLASS: model.kind,
        **make_told_fields(told, label_dropout),
        "sample_size": [height, width],
        "in_channels": channels,
        "out_channels": channels * (1 + learned),
        **({"sides": list(sides)} if sides else {}),
        "settings": settings,
    }


def find_entry(config: Mapping[str, Any]) -> NetworkEntry | None:
    """That of a config.json of another family than denoisers; None of a denoiser."""
    return next((entry for entry in NETWORKS.values() if entry.written and entry.written == config.get(CLASS)), None)


def find_family(config: Mapping[str, Any]) -> str:
    """That of the network of a config.json."""
    entry = find_entry(config)
    return entry.family if entry else DENOISER


def make_inputs(config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a training step calls the network of this config.json with, for an image of zeros."""
    height, width = size if isinstance(size := config["sample_size"], list) else (size, size)
    x, one = torch.zeros(1, config["in_channels"], height, width), torch.zeros(1)
    if entry := find_entry(config):
        latents = torch.zeros(1, *find_latent_size(config))
        return (latents,) if entry.family == GENERATOR else (x, latents)
    return x, one, *make_blank(read_told(config), 1)


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a network that is not ours."""
    kind = config.get(CLASS)
    return isinstance(kind, str) and kind != UNET and (is_outside(kind) or drop_pin(kind) in NETWORKS)


def build_network(config: dict[str, Any], generator: torch.Generator | None = None) -> nn.Module:
    """The network that a config.json describes, with initial weights from the `generator`, None being any.

    One of another kind draws them from PyTorch's global generator, as its modules do by themselves; here that begins
    at the seed of `generator`, and is as before afterwards.
    """
    if entry := find_entry(config):
        made: nn.Module = entry.load()(config, generator)
        return made
    if not is_foreign(config):
        return UNet(config, generator)
    model = ModelConfig.model_validate({"kind": config[CLASS], **config["settings"]})
    height, width = config["sample_size"]
    sides, told = tuple(config.get("sides", ())), read_told(config)
    vectors = (told.length, told.width) if isinstance(told, Vectors) else None
    rows, of = count_rows(config), (config["in_channels"], height, width, config["out_channels"])
    signature = Signature(*of, rows, sides, vectors)
    with torch.random.fork_rng(devices=[]) if generator else nullcontext():
        if generator:
            torch.manual_seed(generator.initial_seed())
        network: Any = NETWORKS[model.kind].load()(model, signature)
    network = Unfolding(network, sides) if sides else network
    network.told, network.takes_no_label = told, takes_nothing(config)
    return network


def make_blank(told: Told | None, n: int) -> list[Tensor]:
    """What tells a network nothing of n images, where it is told something."""
    match told:
        case Classes():
            return [torch.full((n,), NO_LABEL)]
        case Vectors(length, width):
            return [torch.zeros(n, length or 1, width)]
    return []


class Unfolding(nn.Module):
    """A network of signals or volumes, which all else keeps as images: (n, c, h, w) is (n, c, *sides) to it."""

    def __init__(self, network: nn.Module, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.sides = network, sides

    def forward(self, x: Tensor, t: Tensor, *told: Tensor) -> Tensor:
        output: Tensor = self.network(x.reshape(*x.shape[:2], *self.sides), t, *told)
        if output.shape[2:] != self.sides:
            raise ValueError(f"it returns {tuple(output.shape)}, where (n, outputs, *{self.sides}) is expected")
        return output.reshape(*output.shape[:2], *x.shape[2:])


@lru_cache
def find_mistakes(
    model: ModelConfig, shape: tuple[int, int, int], learned: bool, sides: tuple[int, ...] = ()
) -> list[str]:
    """What keeps a network that is not ours from being trained on images of this shape: it is built and called."""
    height, width, channels = shape
    expected = (2, channels * (1 + learned), height, width)
    x, t = torch.zeros(2, channels, height, width), torch.zeros(2, dtype=torch.int64)
    size = " x ".join(map(str, sides or (height, width)))
    what = {1: "signals", 3: "volumes"}.get(len(sides), "images")
    of = f"model.kind: {drop_pin(model.kind)}, built for {size} {what} of {channels} channels,"
    try:
        told = Vectors(2, 3) if model.told == "vectors" else Classes(("a", "b"), (1, 1))
        config = make_network_config(model, shape, learned, sides=sides, told=told, label_dropout=0.5)
        network = build_network(config, make_generator(0)).eval()
        inputs = make_blank(read_told(config), 2)
        if isinstance(read_told(config), Classes):
            inputs[0][1] = 0  # one with a label, one without: a network may look only where there is one
        output = network(x, t, *inputs)
        idle = _find_idle(network, output) if isinstance(output, torch.Tensor) else []
    except Exception as error:  # noqa: BLE001 whatever the code of another one raises: told with its place
        return [f"{of} fails: {' '.join(f'{type(error).__name__}: {error}'.split())}{locate_error(error)}"]
    if not isinstance(output, torch.Tensor) or output.shape != expected:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        return [f"{of} returns {found} for two images, where {expected} is expected"]
    if fixed := [name for name, value in network.state_dict().items() if not value.is_floating_point()]:
        return [f"{of} keeps {fixed[0]}, which is no floating-point tensor: its averages would mean nothing"]
    if idle:
        return [f"{of} has weights that training does not change: {', '.join(idle[:3])}; use them, or leave them out"]
    return []


def _find_idle(network: nn.Module, output: Tensor) -> list[str]:
    """The names of the parameters on which an output does not depend, or that are frozen."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    asked = list(named.values()) if output.requires_grad else []
    grads = torch.autograd.grad(output.sum(), asked, allow_unused=True) if asked else [None] * len(named)
    moved = {name for name, grad in zip(named, grads, strict=True) if grad is not None}
    return [name for name, _ in network.named_parameters() if name not in moved]


def hand_noise(network: nn.Module, generators: Sequence[torch.Generator] | None) -> None:
    """Hands over the generators of the dropout masks, one a sub-batch, for the training steps that follow."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.generators, module.bits = generators, None


@dataclass(frozen=True)
class Masks:
    """The dropout masks of a network, which a step draws for all layers at once and before its forward pass: a GPU is
    told a draw a sub-batch, and not one for each layer too, and none lies within what is compiled."""

    dropouts: Sequence[Dropout]  # each has its place in what is drawn
    bits: int  # of 16 each, a sub-batch

    @staticmethod
    def of(network: nn.Module, call: Callable[[], object], sub_batches: int) -> "Masks | None":
        """As a call of the network in training needs them, in its order; None where it goes through one twice."""
        sizes: list[tuple[Dropout, int]] = []

        def note(dropout: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(dropout, Dropout) and dropout.p:
                sizes.append((dropout, inputs[0].numel() // sub_batches))

        hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, Dropout)]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()
        if len({id(dropout) for dropout, _ in sizes}) < len(sizes):
            return None
        place = 0
        for dropout, size in sizes:
            dropout.place = place
            place += -(-size // 4) * 4  # as a draw by itself would take them
        return Masks([dropout for dropout, _ in sizes], place)

    def hand(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        """Draws the masks of the next step."""
        bits = draw_bits(generators, self.bits, device) if self.dropouts else None
        for dropout in self.dropouts:
            dropout.bits = bits
