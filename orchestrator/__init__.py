"""Sweeps of denoising diffusion models, from Python:

    from orchestrator import load_results, open_model, preview, run_sweep

    file, changes = "experiments/beta_schedule.yaml", ["name=try", "training.steps=100"]
    print(preview(file, *changes))  # the trials and what they cost; nothing is started
    done = run_sweep(file, *changes, storage="runs")  # resumes, or does nothing where all is there
    trials = load_results("try", storage="runs")  # pandas: a row a trial, the best first
    print(done.ok, done.report, trials[["trial", "diffusion.T", "eval/nll_bpd", "eval/nll_bpd_se"]])
    model = open_model("try", storage="runs")  # of the best trial; or a trial's id, or a checkpoint's folder
    images = model.sample(16, seed=0, steps=25)  # uint8 (16, 8, 8, 1)
    print(images.shape, model.process.T)  # model(x_t, t) is eps_theta

`orchestrator.api` holds them; they load when they are first asked for, so that importing the package costs nothing.
"""

import sys
from typing import TYPE_CHECKING, Any

_COMMANDS = ("-m", "diffusion-orchestrator")  # Python looks for the module of a command, or its script has begun
if sys.argv and sys.argv[0].replace("\\", "/").rpartition("/")[2] in _COMMANDS:
    from orchestrator import interrupts

    interrupts.arm()

if TYPE_CHECKING:
    from orchestrator.api import DiffusionModel as DiffusionModel
    from orchestrator.api import Outcome as Outcome
    from orchestrator.api import load_results as load_results
    from orchestrator.api import open_model as open_model
    from orchestrator.api import preview as preview
    from orchestrator.api import run_sweep as run_sweep
    from workers.config import Mistake as Mistake

__all__ = ["DiffusionModel", "Mistake", "Outcome", "load_results", "open_model", "preview", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
