"""Sweeps of denoising diffusion models, from Python:

    from orchestrator import load_results, open_model, preview, run_sweep

`orchestrator.api` holds them; they load when they are first asked for, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import DiffusionModel as DiffusionModel
    from orchestrator.api import Outcome as Outcome
    from orchestrator.api import load_results as load_results
    from orchestrator.api import open_model as open_model
    from orchestrator.api import preview as preview
    from orchestrator.api import run_sweep as run_sweep

__all__ = ["DiffusionModel", "Outcome", "load_results", "open_model", "preview", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
