"""The share of its device's peak that training reaches: what is counted and measured for it.

A training step's operations are 3 times those of a forward pass: the backward makes the gradients of the weights and
of the activations, each as much work. The peak is what the device's own matrix product does in the precision of the
training, or in float32 where a processor is faster at that. It is measured once for each kind of hardware, precision
and number of threads, before a first training step, and kept in the storage beside the speeds.
"""

import json
import math
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from workers.identity import compute_digest
from workers.layout import name_peak_file
from workers.network.build import build_network, is_foreign, make_inputs
from workers.noise import make_generator
from workers.speed import name_hardware, wait_for
from workers.storage import Storage

MEASURED_S = 0.3  # a product that is cut off by a neighbour is slower, so the fastest of many counts
SIDE = {"cpu": 512, "gpu": 8192}  # of the square matrices: 2 x 512^3 operations take a core some milliseconds
TF32 = "tf32"  # what PyTorch's convolutions use for float32 on a GPU, unless told not to


def describe_peak(
    storage: Storage, config: dict[str, Any], autocast: AbstractContextManager[Any], device: torch.device, workers: int
) -> dict[str, Any]:
    """What the share of the peak is computed from (`orchestrator.state.rows.Row.of_peak`), in plain types.

    `config` is the network's, `autocast` the context that training runs in, `workers` the number of its devices.
    """
    with autocast:
        dtype = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
    allowed = device.type != "cpu" and torch.backends.cudnn.allow_tf32
    precision = TF32 if dtype == torch.float32 and allowed else str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    path = name_peak_file(compute_digest([name_hardware(device), precision, threads]))
    known = storage.read_sealed(path, "it is measured again")
    if known is None:
        speeds = {precision: measure_matrix_product(device, dtype, precision == TF32)}
        if device.type == "cpu" and dtype != torch.float32:  # which a processor without it computes in, and faster
            speeds["float32"] = measure_matrix_product(device, torch.float32, False)
        fastest = max(speeds, key=lambda name: speeds[name])
        found = {
            "hardware": name_hardware(device),
            "precision": fastest,
            "threads": threads,
            "flops_per_s": speeds[fastest],
            "host": socket.gethostname(),
            "date": time.strftime("%Y-%m-%d"),
        }
        known = storage.read_sealed(path)  # of two that measured at once, the first counts for both
        if known is None:
            storage.write_sealed(path, known := found)
    of_device = {name: known[name] for name in ("hardware", "precision", "threads", "flops_per_s")}
    return {**of_device, "workers": workers, "flops_per_image": count_training_flops(json.dumps(config))}


@lru_cache
def count_training_flops(config: str) -> int:
    """The operations of a training step per image, an addition and a multiplication being two.

    `config` is the network's config.json. A U-Net is built without memory, so that nothing is computed.
    """
    c = json.loads(config)
    with torch.device("cpu" if is_foreign(c) else "meta"), torch.no_grad():
        network = build_network(c, make_generator(0)).eval()
        with FlopCounterMode(display=False) as counted:
            network(*make_inputs(c))
    return 3 * int(counted.get_total_flops())


def measure_matrix_product(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
    """The fastest of the products of two square matrices that `MEASURED_S` has time for, after one to warm up."""
    side = SIDE["cpu"] * math.isqrt(torch.get_num_threads()) if device.type == "cpu" else SIDE["gpu"]
    a = torch.rand(side, side, generator=make_generator(0)).to(device, dtype)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        _measure_seconds(lambda: a @ a, device)
        ends, fastest = time.monotonic() + MEASURED_S, math.inf
        while fastest == math.inf or time.monotonic() < ends:
            fastest = min(fastest, _measure_seconds(lambda: a @ a, device))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / fastest


def _measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began
