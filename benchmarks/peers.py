"""What `speed.py` measures ours against: other people's code on our weights, and the images that both take.

They compute as PyTorch has it by default, so on a GPU their convolutions use TF32 for float32.
"""

import hashlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from workers.config import ModelConfig
from workers.evaluation import inception
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator

SHAPE = (32, 32, 3)


def unet(model: ModelConfig, device: torch.device) -> UNet:
    """With weights that are nowhere zero, so that every layer has work to do and its result is seen."""
    config = make_unet_config(model, image_channels=SHAPE[2], resolution=SHAPE[0], learned=False)
    network = UNet(config, make_generator("speed", "weights"))
    noise = make_generator("speed", "last layers")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=noise))
    return network.to(device)


def diffusers_unet(model: ModelConfig, device: torch.device) -> nn.Module:
    """diffusers' network with the same weights."""
    from diffusers import UNet2DModel

    ours = unet(model, torch.device("cpu"))
    theirs = UNet2DModel.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    moved: nn.Module = theirs.to(device)
    return moved


def photographs(n: int) -> np.ndarray:
    """Smooth random images, uint8 (n, 32, 32, 3)."""
    coarse = torch.rand((n, 3, 8, 8), generator=make_generator("speed", "images"))
    fine = nn.functional.interpolate(coarse, size=SHAPE[:2], mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def diffusers_step(
    model: ModelConfig,
    batch: int,
    device: torch.device,
    *,
    bf16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> Callable[[], object]:
    """The step of diffusers' example of unconditional training."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network: Any = diffusers_unet(model, device).train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, fused=True)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
    images = torch.from_numpy(photographs(1024)).permute(0, 3, 1, 2)
    called = torch.compile(network) if compiled else network

    def step() -> None:
        rows = torch.randint(0, len(images), (batch,))
        x_0 = images[rows].to(device).float() / 127.5 - 1
        eps = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,), device=device)
        x_t = scheduler.add_noise(x_0, eps, t)
        if channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = nn.functional.mse_loss(called(x_t, t).sample.float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step


def fidelity_extractor(scratch: Path) -> nn.Module:
    """torch-fidelity's network with the weights that ours has.

    Its package imports torchvision for another network, which does not import beside every torch: so its modules are
    imported without what the package itself does.
    """
    found = importlib.util.find_spec("torch_fidelity")
    if found is None or not found.submodule_search_locations:
        raise ImportError("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    content = inception.find_weights().read_bytes()
    shapes = [m.weight.shape for m in inception.make_network().modules() if isinstance(m, nn.Conv2d)]
    layers, _ = inception.READERS[hashlib.sha256(content).hexdigest()](content, shapes)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for name, (weight, beta, mean, variance) in zip(inception.NAMES, layers, strict=True):
        state |= {
            f"{name}.conv.weight": weight, f"{name}.bn.weight": torch.ones_like(beta), f"{name}.bn.bias": beta,
            f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": variance,
            f"{name}.bn.num_batches_tracked": torch.tensor(0),
        }  # fmt: skip
    torch.save(state, scratch / "inception.pth")
    made: nn.Module = module.FeatureExtractorInceptionV3("inception", ["2048"], str(scratch / "inception.pth"))
    return made
