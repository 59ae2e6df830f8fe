"""A GPU that is none: tensors that say they lie on one, and are computed with on the CPU.

What joins tensors of two devices is refused as PyTorch refuses it, so that a coefficient or an index that was left on
the CPU is found where there is no GPU. The random numbers are those of the CPU, so that all that is computed is equal
to the CPU's, and a test can hold the one against the other. Speed, memory, autocast, compiling and NCCL are not
pretended. PyTorch can't forget a device, so it is entered in a process of its own (`open_process`).
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
# What takes tensors of two devices: copies, and what reads values of the CPU by itself.
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::_index_put_impl_", "aten::set_")
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")  # whose precision PyTorch's flags decide on


class OnGPU(Tensor):
    """A tensor that says it lies on the GPU; `inner` is what it holds."""

    inner: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type["OnGPU"], inner: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of a GPU to numpy: copy it to the CPU first")

    __array__ = numpy  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(function, args, kwargs or {})


class _Generator(torch.Generator):
    """The CPU's numbers, for tensors on either device."""

    _at: torch.device

    def __new__(cls: type["_Generator"], device: torch.device | str = "cpu") -> "_Generator":
        made = super().__new__(cls)
        made._at = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._at


class Flags(NamedTuple):
    """How a product is made: PyTorch's flags at that time."""

    name: str
    cudnn: bool  # whether cuDNN is used at all
    alike: bool  # whether convolutions are made alike each time
    tf32: bool


class Pretending(TorchDispatchMode):
    """Sends what is done with the GPU there."""

    def __init__(self) -> None:
        super().__init__()
        self._flags: set[Flags] | None = None

    @contextmanager
    def watch_products(self, seen: "set[Flags]") -> Iterator[None]:
        """Adds to `seen` how matrices are multiplied within the block."""
        self._flags = seen
        yield
        self._flags = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_gpu(kwargs.get("device")) and not any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::").removesuffix("_backward")
        if name in PRODUCTS and self._flags is not None:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            tf32 = cudnn.allow_tf32 if name == "convolution" else matmul.allow_tf32
            self._flags.add(Flags(name, cudnn.enabled, cudnn.deterministic, tf32))
        return _call(function, args, kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there, here = ([x for x in tensors if isinstance(x, OnGPU) == on] for on in (True, False))
    device = kwargs.get("device")
    if there and here:
        _check_devices(function, args, here)
    kept = {**kwargs, "device": torch.device("cpu")} if _is_gpu(device) else kwargs
    kept = {name: value for name, value in kept.items() if name != "pin_memory"}
    out = function(*tree_map(_take, args), **tree_map(_take, kept))
    if any(a.alias_info and a.alias_info.is_write for a in function._schema.arguments):
        return _find_written(function, args, kwargs) if out is not None else None
    if not (_is_gpu(device) or (there and device is None)):
        return out
    return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, out)


def _find_written(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a call in place gives back: those of its arguments that it has written to."""
    arguments = function._schema.arguments
    given = {**{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}
    written = tuple(given[a.name] for a in arguments if a.alias_info and a.alias_info.is_write and a.name in given)
    return written[0] if len(written) == 1 else written


def _take(x: Any) -> Any:
    return x.inner if isinstance(x, OnGPU) else x


def _check_devices(function: Any, args: Any, here: list[Tensor]) -> None:
    """Raises RuntimeError where PyTorch would: it takes a number (a tensor of no dimension) of the CPU beside tensors
    of the GPU, in what works on each element by itself; and places in a tensor of the GPU may come from the CPU."""
    name = function._schema.name
    if name in CROSSING and (isinstance(args[0], OnGPU) or name in ("aten::copy_", "aten::_to_copy")):
        return
    if torch.Tag.pointwise in function.tags and all(x.dim() == 0 for x in here):
        return
    raise RuntimeError(
        f"{name}: expected all tensors to be on the same device, found {[tuple(x.shape) for x in here]} on cpu"
    )


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@lru_cache
def _register() -> None:
    """Makes the device known to PyTorch and to what asks for the GPU's name; there is no way back."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    told: dict[str, Any] = {
        "get_device_name": "pretended", "get_device_capability": (9, 0), "synchronize": None, "empty_cache": None,
    }  # fmt: skip
    for name, value in told.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
    _wrap_constructors()


def _wrap_constructors() -> None:
    """Those that would read the numbers of the CPU's generator for a GPU, or take values from Python themselves."""
    _device_constructors()  # whom `with torch.device(...)` works on is asked once, so before
    torch.Generator = _Generator  # type: ignore[misc,assignment]
    for name in ("randn", "rand", "randint", "randperm"):
        setattr(torch, name, partial(_draw, getattr(torch, name)))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, partial(_make_of_values, getattr(torch, name)))


def _draw(made: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    generator, device = kwargs.get("generator"), kwargs.get("device") or "cpu"
    if generator is not None and _is_gpu(device) != _is_gpu(generator.device):
        raise RuntimeError(f"a generator on {generator.device} for a tensor on {device}")
    return made(*args, **kwargs)


def _make_of_values(made: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None) if _is_gpu(kwargs.get("device")) else None
    tensor = made(*args, **kwargs)
    return tensor if device is None else tensor.to(device)


@contextmanager
def pretend_gpu() -> Iterator[tuple[torch.device, Pretending]]:
    """The device, and the mode that sends work there, within the block."""
    _register()
    torch.set_num_threads(1)
    with Pretending() as mode:
        yield torch.device(NAME, 0), mode


@contextmanager
def open_process() -> Iterator[Callable[..., Any]]:
    """A process of its own, as a function that calls another there with arguments; both are importable."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
