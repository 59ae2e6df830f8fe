"""How fast the program is beside what one would use instead, on the same work and the same weights, in one run.

    python benchmarks/speed.py --device cpu --budget 600 --output speed.json

Each part measures ours and its peers in turns: rounds in which each does the same work once, after one to warm up. The
table has the median rate of each, the ratio of ours to it with its least and its most over the rounds, what part of the
measured matrix peak it uses, and how far its result is from ours. A part that fails is told, and the others go on; the
exit status is then 1. It needs no network. Peers that are not installed are left out, and named: diffusers, and
torch-fidelity, whose extractor runs without torchvision.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from peers import SHAPE, diffusers_step, diffusers_unet, fidelity_extractor, photographs, unet

from workers.config import DataConfig, DiffusionConfig, ModelConfig, SamplerConfig, TrainingConfig, Trial
from workers.data.dataset import Dataset
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process
from workers.diffusion.samplers import sample
from workers.evaluation import inception
from workers.evaluation.loaded import LoadedModel, move_to_device
from workers.learner import repeat_steps
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.peak import count_training_flops, measure_matrix_product
from workers.precision import list_precisions
from workers.speed import name_hardware

# The paper's network, and two that train on a few cores: their settings, and images per step on a CPU.
MODELS = {
    "4.4M": (ModelConfig(channels=64, multipliers=(1, 2, 2), blocks=1), 32),
    "9.0M": (ModelConfig(channels=64, multipliers=(1, 2, 2, 2), blocks=2), 32),
    "35.7M": (ModelConfig(), 16),
}
GPU_BATCHES = (128, 512)
LEVELS = 256
ROUNDS = 5  # at most; fewer where the time is short


@dataclass
class Contender:
    """One way of doing a part's work: `work` does `count` units of it once."""

    name: str
    work: Callable[[], object]
    count: float
    ours: bool = False
    difference: float | None = None  # of its result from that of ours in float32
    rates: list[float] = field(default_factory=list)


@dataclass
class Line:
    part: str
    name: str
    unit: str
    rate: float  # the median, units a second
    ratios: dict[str, tuple[float, float, float]]  # of each of ours to a peer: the median over rounds, least and most
    of_peak: float | None
    difference: float | None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def race(contenders: Sequence[Contender], device: torch.device, budget_s: float) -> None:
    """Rounds of all of them in turns until the time is up."""
    started = time.monotonic()
    for contender in contenders:
        contender.work()
        synchronise(device)
    for done in range(ROUNDS):
        if done and time.monotonic() - started > budget_s * done / (done + 1):
            return
        for contender in contenders:
            begun = time.perf_counter()
            contender.work()
            synchronise(device)
            contender.rates.append(contender.count / (time.perf_counter() - begun))


def lines_of(
    part: str, unit: str, contenders: Sequence[Contender], flops: float = 0, peak: float = 0
) -> Iterator[Line]:
    for contender in contenders:
        ratios = {}
        for own in (c for c in contenders if c.ours and not contender.ours):
            found = [our / their for our, their in zip(own.rates, contender.rates, strict=True)]
            ratios[own.name] = statistics.median(found), min(found), max(found)
        rate = statistics.median(contender.rates)
        of_peak = rate * flops / peak if flops and peak else None
        yield Line(part, contender.name, unit, rate, ratios, of_peak, contender.difference)


# ---- What is measured against ------------------------------------------------------------------------------------


def forward_flops(model: ModelConfig) -> float:
    """Floating-point operations of one image's forward pass."""
    config = make_unet_config(model, image_channels=SHAPE[2], resolution=SHAPE[0], learned=False)
    return count_training_flops(json.dumps(config)) / 3


def dataset() -> Dataset:
    images = photographs(1024)
    return Dataset("speed", "speed", LEVELS, SHAPE, images[:768], images[768:], None, None)


# ---- Parts -------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    device: torch.device
    seconds: float  # for a part
    scratch: Path
    peaks: dict[str, float]


def training(setting: Setting, name: str, batch: int) -> Iterator[Line]:
    """A step: forward, backward, clipping, Adam and the average of the weights."""
    model, device = MODELS[name][0], setting.device
    trial = Trial(
        data=DataConfig(source="digits"), model=model,
        training=TrainingConfig(steps=10**6, batch_size=batch, precision="auto", cpus=torch.get_num_threads()),
    )  # fmt: skip
    loop = repeat_steps(trial, dataset(), device)
    contenders = [Contender("ours", lambda: next(loop), batch, ours=True)]
    for kind, options in (
        ("diffusers float32", {}),
        ("diffusers bf16", {"bf16": True}),
        ("diffusers bf16 channels_last", {"bf16": True, "channels_last": True}),
        ("diffusers bf16 channels_last compiled", {"bf16": True, "channels_last": True, "compiled": True}),
    ):
        try:
            contenders.append(Contender(kind, diffusers_step(model, batch, device, **options), batch))
        except ImportError as missing:
            print(f"  left out: {kind} ({missing})", flush=True)
    race(contenders, device, setting.seconds)
    yield from lines_of(
        f"training {name}, batch {batch}", "images/s", contenders, 3 * forward_flops(model), setting.peaks["bf16"]
    )


def sampling(setting: Setting, name: str, images: int, count: int) -> Iterator[Line]:
    """Steps of ancestral sampling; a rate is of evaluations of the network, an image at a time."""
    from diffusers import DDPMPipeline, DDPMScheduler

    model, device = MODELS[name][0], setting.device
    process = Process.of(DiffusionConfig(T=count))
    shape, noise = (images, SHAPE[2], *SHAPE[:2]), make_generator("speed", "sampling")
    pipeline: Any = DDPMPipeline(diffusers_unet(model, device), DDPMScheduler(num_train_timesteps=count))
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> object:
        return pipeline(batch_size=images, num_inference_steps=count, output_type="np")

    def ours(kind: str) -> Callable[[], object]:
        loaded = LoadedModel(
            Denoiser(move_to_device(unet(model, device).eval(), device), process, "eps"), process, device, kind
        )
        config = SamplerConfig()
        return lambda: sample(process, loaded.predict, config, shape, noise, device=device)

    names = list_precisions(device)
    with torch.no_grad():
        contenders = [Contender(f"ours {kind}", ours(kind), images * count, ours=True) for kind in names]
        contenders.append(Contender("DDPMPipeline", theirs, images * count))
        race(contenders, device, setting.seconds)
    part = f"sampling {name}, {images} images"
    yield from lines_of(part, "evaluations/s", contenders, forward_flops(model), setting.peaks["bf16"])


def loaded_model(model: ModelConfig, process: Process, device: torch.device, precision: str) -> LoadedModel:
    """Ours as an evaluation has it."""
    network = move_to_device(Denoiser(unet(model, device).eval(), process, "eps"), device)
    return LoadedModel(network, process, device, precision)


def nll(setting: Setting, name: str, images: int, T: int) -> Iterator[Line]:
    """|eps - eps_theta|^2 of every t for some images: a block of ours, and a loop over t."""
    from workers.diffusion.likelihood import list_all_times, measure_pairs

    model, device = MODELS[name][0], setting.device
    process = Process.of(DiffusionConfig(T=T))
    x_0 = (torch.from_numpy(photographs(images)).permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)
    t, weight = (a.reshape(-1) for a in list_all_times(T, images))
    pairs = np.repeat(np.arange(images), T)
    found: dict[str, Tensor] = {}

    def ours(kind: str) -> Callable[[], object]:
        loaded = LoadedModel(
            Denoiser(move_to_device(unet(model, device).eval(), device), process, "eps"), process, device, kind
        )

        def work() -> None:
            noise = make_generator("speed", "nll")
            ledger = measure_pairs(
                process, loaded.predict, x_0[pairs], pairs, t, weight=weight, noise=noise, levels=LEVELS
            )
            found[kind] = torch.from_numpy(ledger.squared_error)

        return work

    network = unet(model, device).eval()
    alpha_bar = process.alpha_bar.float().to(device)

    @torch.no_grad()
    def loop() -> None:
        total = torch.zeros(images, device=device)
        for step in range(1, T + 1):
            times = torch.full((images,), step, device=device)
            eps = torch.randn_like(x_0)
            x_t = alpha_bar[step - 1].sqrt() * x_0 + (1 - alpha_bar[step - 1]).sqrt() * eps
            total += (eps - network(x_t, times - 1)).square().flatten(1).sum(1)

    contenders = [Contender(f"ours {kind}", ours(kind), images * T, ours=True) for kind in list_precisions(device)]
    contenders.append(Contender("a loop over t", loop, images * T))
    race(contenders, device, setting.seconds)
    exact = found["float32"]
    for contender in contenders[:-1]:
        mine = found[contender.name.removeprefix("ours ")]
        contender.difference = float(((mine - exact).abs() / exact).mean())
    yield from lines_of(
        f"NLL {name}, {images} images x {T} t", "pairs/s", contenders, forward_flops(model), setting.peaks["bf16"]
    )


def features(setting: Setting, images: int) -> Iterator[Line]:
    """Inception's features of images of 32x32."""
    device, pictures = setting.device, photographs(images)
    found: dict[str, np.ndarray] = {}

    def ours(kind: str) -> Callable[[], object]:
        space = inception.load_inception(device=device, tf32=kind == "tf32")

        def work() -> None:
            found[kind] = space.compute_features(pictures)

        return work

    kinds = [kind for kind in list_precisions(device) if kind != "bf16"]  # in which features are never made
    contenders = [Contender(f"ours {kind}", ours(kind), images, ours=True) for kind in kinds]
    try:
        extractor = fidelity_extractor(setting.scratch).to(device)
        batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().split(64)

        @torch.no_grad()
        def theirs() -> None:
            found["theirs"] = torch.cat([extractor(batch.to(device))[0].cpu() for batch in batches]).numpy()

        contenders.append(Contender("torch-fidelity", theirs, images))
    except ImportError as missing:
        print(f"  left out: torch-fidelity ({missing})", flush=True)
    race(contenders, device, setting.seconds)
    for contender in contenders:
        mine = found.get(contender.name.removeprefix("ours "), found.get("theirs"))
        contender.difference = float(np.abs(mine - found["float32"]).mean() / np.abs(found["float32"]).mean())
    yield from lines_of("Inception's features", "images/s", contenders)


def parts(device: torch.device) -> Mapping[str, Callable[[Setting], Iterator[Line]]]:
    if device.type == "cuda":
        found = {f"training-{batch}": partial(training, name="35.7M", batch=batch) for batch in GPU_BATCHES}
        return found | {
            "sampling": partial(sampling, name="35.7M", images=500, count=20),
            "nll": partial(nll, name="35.7M", images=100, T=100),
            "inception": partial(features, images=2048),
        }
    return {f"training-{name}": partial(training, name=name, batch=batch) for name, (_, batch) in MODELS.items()} | {
        "sampling": partial(sampling, name="9.0M", images=32, count=4),
        "nll": partial(nll, name="9.0M", images=8, T=50),
        "inception": partial(features, images=64),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=240, help="seconds for all parts together")
    parser.add_argument("--parts", nargs="*", help="only these, for instance nll or training-4.4M")
    parser.add_argument("--threads", type=int, help="of a CPU; all that there are without it")
    parser.add_argument("--output", type=Path, help="write the lines there as JSON")
    options = parser.parse_args()
    device, failed, lines = torch.device(options.device), [], list[Line]()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {name: part for name, part in parts(device).items() if not options.parts or name in options.parts}
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
        peaks = {name: measure_matrix_product(device, kind, False) for name, kind in kinds.items()}
        what = f"{name_hardware(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"{what}; matrix peak " + ", ".join(f"{n} {p / 1e12:.2f} TFLOP/s" for n, p in peaks.items()), flush=True)
        for name, part in chosen.items():
            started = time.monotonic()
            try:
                for line in part(Setting(device, 0.7 * options.budget / len(chosen), Path(scratch), peaks)):
                    lines.append(line)
                    print(text_of(line), flush=True)
            except Exception:  # noqa: BLE001 (the other parts are still worth their time)
                traceback.print_exc()
                failed.append(name)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no GPU
            print(f"  {name}: {time.monotonic() - started:.0f} s", flush=True)
    if options.output:
        head = {"hardware": what, "python": platform.python_version(), "peaks": peaks, "failed": failed}
        options.output.write_text(json.dumps(head | {"lines": [asdict(line) for line in lines]}, indent=2) + "\n")
    print(f"failed: {', '.join(failed)}" if failed else "no part failed")
    return 1 if failed else 0


def text_of(line: Line) -> str:
    ratios = [f"{own} is {r:.2f} times as fast ({a:.2f} to {b:.2f})" for own, (r, a, b) in line.ratios.items()]
    peak = [] if line.of_peak is None else [f"{line.of_peak:.1%} of the peak"]
    difference = [] if line.difference is None else [f"result differs by {line.difference:.1e}"]
    rate = f"{line.rate:,.1f} {line.unit}"
    return f"{line.part:<32} {line.name:<38} {rate:>24}  " + "; ".join(peak + ratios + difference)


if __name__ == "__main__":
    sys.exit(main())
