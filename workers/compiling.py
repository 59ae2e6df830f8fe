"""Compiling the network of a trial by torch.compile: whether it is done, how, and what is missing where it can't be.

A compiled network computes the same up to rounding, in fewer and larger pieces of work, and it takes minutes once for
each shape. Whether it is done follows from the trial and its device alone and never from the steps to come: a trial
that is asked for more steps has to end in the bits of one that was asked for them at first.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from workers.config import Mistake, Trial
from workers.data.cache import find_default_cache
from workers.sharing import is_out_of_memory

# Operations of a training step from which on `auto` compiles. The paper's network has 5e12 at its batch of 128, and one
# for the digits 1e9, whose trials would be over before a compiler is. No GPU was at hand to measure it on.
HEAVY = 1e11
BACKEND = "inductor"
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # PyTorch's, which a user may have set
_shapes: list[object] = []  # the one that this process has compiled last


class CannotCompile(Mistake):
    """The network of a trial is not compiled, and why."""


def find_missing_compiler() -> str:
    """What torch.compile lacks on this machine, whatever it compiles for; empty where it lacks nothing."""
    names = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang")
    if any(name and shutil.which(name) for name in names):
        return ""
    return "there is no compiler of C++ on the PATH: install g++, or name one in the environment variable CXX"


def must_compile(trial: Trial, device: torch.device, count_operations: Callable[[], int]) -> bool:
    """Whether the trial's network is to be compiled on that device; a training step has so many operations."""
    setting = trial.training.compile
    return setting == "always" or (setting == "auto" and device.type != "cpu" and count_operations() >= HEAVY)


def compile_network(network: nn.Module, device: torch.device, shape: object, *, whole: bool) -> nn.Module:
    """A module with the parameters of `network`, which is compiled when it is called first.

    `whole`: as a single graph, or that fails; else what the compiler can't read runs as it is. All that the compiled
    code depends on is in `shape`. Networks of one shape share the code, in a process and by the cache. Raises
    CannotCompile.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds, for those who compile alone

    if device.type != "cpu" and not torch.utils._triton.has_triton():
        raise CannotCompile("triton, which writes the code for a GPU, is not there: install a torch that comes with it")
    if missing := find_missing_compiler():
        raise CannotCompile(missing)
    if os.environ.get(CACHE) in (None, default_cache_dir()):  # which parts of PyTorch write there when they are loaded
        os.environ[CACHE] = str(find_default_cache() / "compiled")
    if _shapes != [shape]:  # PyTorch keeps at most eight variants of a piece of code
        torch._dynamo.reset()
        _shapes[:] = [shape]
    # Else some code is what was fastest in a trial of it, so by chance. Older versions of PyTorch have no such option.
    known: dict[str, Any] = {"deterministic": True} if hasattr(torch._inductor.config, "deterministic") else {}
    compiled: Any = torch.compile(network, fullgraph=whole, dynamic=False, backend=BACKEND, options=known)
    assert isinstance(compiled, nn.Module)
    return compiled


def try_out(network: nn.Module, step: Callable[[], object]) -> None:
    """Makes a step with a network that is compiled in it, and leaves the network as it was.

    Raises CannotCompile for whatever the compiler raises, and what says that memory is full.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        step()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        told = " ".join(str(error).split())
        raise CannotCompile(f"torch.compile fails with {type(error).__name__}: {told[:300]}") from error
    finally:
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), before, strict=True):
                buffer.copy_(value)
