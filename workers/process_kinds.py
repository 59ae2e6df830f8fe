"""The kinds of diffusion processes: formulations, noise schedules, predictions and variances. All else knows them by
`workers.kinds`, which lists them beside the other kinds."""

from dataclasses import dataclass
from typing import Any

from workers.entries import Entry, Kinds

# ---- Formulations: a `workers.diffusion.formulations.Formulation` each, but for the discrete one -----------------


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
            "flow", "(1 - t) x_0 + t eps, whose velocity is learned (Lipman et al. 2023)",
            "t_law", "t_mean", "t_std", "t_min", "t_max",
            check="workers.diffusion.laws:check_of_flow", more_noise="take a larger diffusion.t_max",
        ),
    }
)  # fmt: skip


# ---- Noise schedules: (ScheduleConfig, T) -> beta_1..beta_T -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry(Entry):
    check: str = ""  # "module:name" of (ScheduleConfig, T) -> what is wrong with its settings
    ends_at_zero: bool = False  # alpha_bar_T = 0 by design
    more_noise: str = "take a larger T"  # what closes its prior gap, where it has no range to scale


def _make_schedule(name: str, about: str, *reads: str, **more: Any) -> ScheduleEntry:
    return ScheduleEntry(function=f"workers.diffusion.schedules:{name}", about=about, reads=reads, **more)


_RANGE = ("beta_start", "beta_end", "scale")
SCHEDULES = Kinds(
    {
        "linear": _make_schedule("linear", "beta_t linear in t (Ho et al. 2020)", *_RANGE),
        "quadratic": _make_schedule("quadratic", "sqrt(beta_t) linear in t (Song et al. 2020a)", *_RANGE),
        "constant": _make_schedule("constant", "beta_t = beta_end", "beta_end", "scale"),
        "jsd": _make_schedule("jsd", "beta_t = 1 / (T - t + 1) (Sohl-Dickstein et al. 2015)", ends_at_zero=True),
        "warmup10": _make_schedule("warmup10", "a linear rise over a tenth of the times, then beta_end", *_RANGE),
        "warmup50": _make_schedule("warmup50", "a linear rise over half of the times, then beta_end", *_RANGE),
        "cosine": _make_schedule("cosine", "alpha_bar_t a squared cosine (Nichol & Dhariwal 2021)"),
        "sigmoid": _make_schedule("sigmoid", "beta_t a sigmoid in t (Xu et al. 2022)", *_RANGE),
        "list": _make_schedule(
            "given", "the betas of the file", "betas",
            check="workers.diffusion.schedules:find_given_mistakes", more_noise="take larger betas",
        ),
        "log_snr": _make_schedule(
            "log_snr", "log SNR_t linear in t (Kingma et al. 2021)", "log_snr_start", "log_snr_end",
            check="workers.diffusion.schedules:find_log_snr_mistakes", more_noise="take a smaller log_snr_end",
        ),
    }
)  # fmt: skip


# ---- Predictions: a `workers.diffusion.predictions.Target` each ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PredictionEntry(Entry):
    without_signal: bool = True  # whether it determines x_0 where alpha_bar_t = 0
    between_times: bool = True  # whether it means something at real t
    in_bf16: bool = True  # whether bf16 has digits enough for it
    ends_clean: bool = False  # whether x_0 is x_t itself at sigma = 0, whatever the network says
    diffusers: str = ""  # diffusers' name of it; its own where empty


def _make_prediction(name: str, about: str, **more: Any) -> PredictionEntry:
    return PredictionEntry(function=f"workers.diffusion.predictions:{name}", about=about, **more)


PREDICTIONS = Kinds(
    {
        "eps": _make_prediction(
            "EPS", "the noise (Ho et al. 2020, eq. 14)", without_signal=False, diffusers="epsilon", ends_clean=True
        ),
        "x_0": _make_prediction("X_0", "the image", diffusers="sample"),
        "mu": _make_prediction("MU", "the mean of the posterior (eq. 7)", between_times=False, in_bf16=False),
        "v": _make_prediction("V", "the velocity (Salimans & Ho 2022)", diffusers="v_prediction", ends_clean=True),
    }
)


# ---- Variances of p_theta: (Process) -> sigma_1^2..sigma_T^2; learned: (Process, t, head) -> log sigma_t^2 -----------


@dataclass(frozen=True, kw_only=True)
class VarianceEntry(Entry):
    learned: bool = False  # whether it is made of a second head of the network


def _make_variance(name: str, about: str, **more: Any) -> VarianceEntry:
    return VarianceEntry(function=f"workers.diffusion.process:{name}", about=about, **more)


VARIANCES = Kinds(
    {
        "fixed_small": _make_variance("fixed_small", "beta_tilde_t, the best for a single point (Ho et al. 2020)"),
        "fixed_large": _make_variance("fixed_large", "beta_t, the best for N(0, I) (Ho et al. 2020)"),
        "learned": _make_variance(
            "learned", "beta_t exp(head), each pixel its own (Ho et al. 2020, table 2)", learned=True
        ),
        "learned_range": _make_variance(
            "learned_range", "between these two, in the logarithm (Nichol & Dhariwal 2021)", learned=True
        ),
    }
)
