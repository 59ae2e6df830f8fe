"""The commands as functions, for Python without a notebook: preview and run a sweep, load results, open a model.

A user's mistake is raised as `workers.config.Mistake`, with the text that the command prints.
"""

from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiment import load
from orchestrator.preflight import Cost, chain, costs
from orchestrator.reports import archive, results
from orchestrator.reports.page import path as report_path
from orchestrator.sweep import trials_of
from workers.config import Mistake, SamplerConfig, Trial, trained_by
from workers.storage import Storage

if TYPE_CHECKING:  # torch and pandas take seconds: each function loads what it needs
    import numpy as np
    import pandas as pd
    import torch

    from workers.checkpoint import Checkpoint
    from workers.diffusion.process import Process


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    name: str
    storage: str
    exit_status: int  # 0 all done, 1 some trial failed, 130 interrupted: the same call resumes

    @property
    def ok(self) -> bool:
        return self.exit_status == 0

    @property
    def report(self) -> str:
        """Where its report lies."""
        return Storage(self.storage).url(report_path(self.name))

    def results(self) -> "pd.DataFrame":
        return load_results(self.name, self.storage)


def preview(file: str | Path, *overrides: str, smoke: bool = False) -> "pd.DataFrame":
    """The trials that an experiment file means (of an adaptive search those of its first round), a row each: what is
    searched, where the chain ends, what it costs.

    Costs count evaluations of the network, an image at a time. Starts nothing. Raises Mistake with all mistakes.
    """
    import pandas as pd

    trials, sources, _ = trials_of(load(file, overrides, smoke))
    names = [field.name for field in fields(Cost)]
    return pd.DataFrame(
        {
            "trial": address,
            **{p: str(v) if isinstance(v, dict) else v for p, v in variant.params.items()},
            "alpha_bar_T": chain(variant.trial.diffusion).alpha_bar_T,
            "prior_bpd": chain(variant.trial.diffusion).prior_bpd,
            **dict(zip(names, astuple(price), strict=True)),
        }
        for (address, variant), price in zip(trials.items(), costs(trials, sources), strict=True)
    )


def run_sweep(
    file: str | Path,
    *overrides: str,
    storage: str | Path = "runs",
    address: str | None = None,
    fresh: bool = False,
    quiet: bool = True,
    smoke: bool = False,
) -> Outcome:
    """Makes what is missing of a sweep, as the command does; `quiet` prints its result alone, `smoke`
    applies the file's own section of that name.

    To be called from the main thread, as ctrl-C and SIGTERM end it in good order. Raises Mistake before Ray starts.
    """
    experiment = load(file, overrides, smoke)
    trials, sources, _ = trials_of(experiment)
    from orchestrator.controller import run

    status = run(experiment, trials, sources, str(storage), address, fresh, quiet)
    return Outcome(experiment.name, str(storage), status)


def load_results(sweep: str, storage: str | Path = "runs") -> "pd.DataFrame":
    """A row a trial, the best first, as the storage has it now: also while the sweep runs. Raises Mistake."""
    place = Storage(storage)
    kept = archive.open_sweep(place, sweep)
    rows = archive.rows(place, kept, archive.events(place, sweep))
    return results.frame(results.ranked(rows, kept.metric, kept.mode))


@dataclass(frozen=True)
class DiffusionModel:
    """A trained eps_theta with its process, on the CPU. `shape` is that of an image: (height, width, channels)."""

    network: Any  # workers.diffusion.predictions.Denoiser: of p_theta all that it says
    process: "Process"
    shape: tuple[int, int, int]
    checkpoint: "Checkpoint"

    def __call__(self, x_t: "torch.Tensor", t: "torch.Tensor") -> "torch.Tensor":
        """eps_theta(x_t, t): x_t float32 (N, C, H, W), t int64 (N,) in 1..T."""
        import torch

        with torch.no_grad():
            return torch.as_tensor(self.network(x_t, t).eps)

    def sample(self, n: int, seed: int = 0, steps: int | None = None, eta: float = 0.0) -> "np.ndarray":
        """n samples, uint8 (n, H, W, C) in 0..255: ancestral, or by DDIM where `steps` are given."""
        import torch

        from workers.diffusion.samplers import sample
        from workers.noise import generator
        from workers.pixels import to_levels

        if n < 1 or (steps is not None and not 1 <= steps <= self.process.T):
            raise Mistake(
                f"sample({n}, steps={steps}): n is at least 1, and steps are 1 to T = {self.process.T} or None"
            )
        height, width, channels = self.shape
        config = SamplerConfig(kind="ddim", steps=steps, eta=eta) if steps else SamplerConfig()
        with torch.no_grad():
            x_0 = sample(self.process, self.network, config, (n, channels, height, width), generator(seed, "model"))
        return to_levels(x_0, 256).numpy()


def open_model(target: str | Path, storage: str | Path = "runs") -> DiffusionModel:
    """The model of a trial (its address or the start of one), of a sweep's best trial, or of a checkpoint's folder.

    Raises Mistake where there is none, or where its bytes are damaged.
    """
    from workers import checkpoint as checkpoints

    checkpoint = _checkpoint(str(target), Storage(storage))
    network, process = checkpoints.load(checkpoint)
    return DiffusionModel(network, process, checkpoints.describe(checkpoint).shape, checkpoint)


def _average(trial: Trial) -> list[str]:
    """The override that names the average that a trial measures."""
    return [] if trial.evaluation.ema is None else [f"evaluation.ema={trial.evaluation.ema}"]


def _checkpoint(target: str, storage: Storage) -> "Checkpoint":
    from orchestrator import subjects
    from workers import checkpoint as checkpoints

    if target in archive.names(storage):
        kept = archive.open_sweep(storage, target)
        rows = [row for row in archive.rows(storage, kept) if kept.metric in row.metrics]
        if not rows:
            raise Mistake(f"no trial of the sweep {target} has {kept.metric} yet")
        best = results.ranked(rows, kept.metric, kept.mode)[0]
        [subject] = subjects.find(trained_by(best.digest), storage, _average(best.variant.trial), None)
        return subject.checkpoint
    if "://" in target or Path(target).is_dir():
        return checkpoints.open_folder(target)
    [subject] = subjects.find(target, storage, (), None)
    return subject.checkpoint
