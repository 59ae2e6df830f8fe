"""In which precision the networks of an evaluation compute: a setting, in the passport and in the ids of what it makes.

float32  without TF32, so that a GPU's squared errors are the CPU's within 1e-6 of their value
tf32     products of matrices and convolutions round their factors to 10 bits (NVIDIA, from compute capability 8.0 on)
bf16     autocast: the same in bfloat16, of 7 bits; what it does not list, and all outside of the network, is float32
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workers.config import Mistake


def list_precisions(device: torch.device) -> list[str]:
    """Those that the device computes in."""
    tf32 = device.type != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ["float32", *(["tf32"] if tf32 else []), "bf16"]


@contextmanager
def compute_in(precision: str, device: torch.device) -> Iterator[None]:
    """Networks on the device compute in the precision within the block. Raises Mistake where it has no such one."""
    if precision not in list_precisions(device):
        raise Mistake(f"evaluation.precision: {precision} is not known to {device.type}; take float32 or bf16")
    with round_products(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextmanager
def round_products(precision: str) -> Iterator[None]:
    """What a GPU multiplies in float32 it rounds as the precision says, and always alike: gradients, too, of what was
    computed in the precision before."""
    tf32, cudnn, before = precision == "tf32", torch.backends.cudnn, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=tf32):  # which would switch it off
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
