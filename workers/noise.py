"""Noise that has an address: a generator for each piece of work, whoever does it.

No random number of this project comes from a global generator. Training noise is a function of
(seed, step, sub-batch), evaluation noise of (seed, block): so 1, 2 or 8 workers draw the same numbers, a restarted
run goes on as if it had not stopped, and two trials share their noise, which makes their differences precise.
"""

import hashlib

import torch


def compute_address(*words: int | str) -> int:
    """A seed from a sequence of words, equal on every machine and in every process.

    It has 63 bits; torch's generators on the CPU take the lower 32 of them.
    """
    content = "\x1f".join(f"{type(w).__name__}:{w}" for w in words)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) >> 1


def make_generator(*words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator at the address made of `words`."""
    return torch.Generator(device=device).manual_seed(compute_address(*words))
