"""The formulations that an experiment file can name: a `workers.diffusion.formulations.Formulation` each, but for the
discrete one. `workers.kinds` lists them beside the other kinds."""

from dataclasses import dataclass
from typing import Any

from workers.entries import Entry, Kinds


@dataclass(frozen=True, kw_only=True)
class FormulationEntry(Entry):
    continuous: bool = True  # whether its times are real, so that it has no T
    log_snrs: str = ""  # "module:name" of (DiffusionConfig, shares) -> log SNR at these shares of the trained t
    ends: str = ""  # "module:name" of DiffusionConfig -> the least and the largest sigma that it is measured at
    check: str = ""  # "module:name" of DiffusionConfig -> what is wrong with its settings
    more_noise: str = ""  # what closes its prior gap


def _make_formulation(name: str, about: str, *reads: str, **more: Any) -> FormulationEntry:
    function, laws = f"workers.diffusion.formulations:{name.upper()}", "workers.diffusion.laws:"
    log_snrs, ends = f"{laws}log_snrs_of_{name}", f"{laws}ends_of_{name}"
    return FormulationEntry(function=function, about=about, reads=reads, log_snrs=log_snrs, ends=ends, **more)


FORMULATIONS = Kinds(
    {
        "discrete": FormulationEntry(
            function="workers.diffusion.process:Process", about="a chain of T times (Ho et al. 2020)",
            reads=("T", "schedule", "prediction", "variance"), continuous=False,
        ),
        "edm": _make_formulation(
            "edm", "x_0 + sigma eps, preconditioned, log sigma normal (Karras et al. 2022)",
            "sigma_data", "sigma_min", "sigma_max", "p_mean", "p_std",
            check="workers.diffusion.laws:check_of_edm", more_noise="take a larger diffusion.sigma_max",
        ),
        "flow": _make_formulation(
            "flow", "(1 - t) x_0 + t eps, whose velocity is learned (Lipman et al. 2023)", "t_law", "t_mean", "t_std",
        ),
    }
)  # fmt: skip
