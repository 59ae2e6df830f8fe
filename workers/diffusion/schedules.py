"""The noise schedules beta_1..beta_T, in float64 and NumPy, so that a dry run can check them without torch.

Each schedule is a function of its settings next to its formula; `workers.kinds` lists them.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from workers.config import DiffusionConfig, ScheduleConfig
from workers.kinds import SCHEDULES

Betas = Float64[np.ndarray, "T"]  # index t-1


def _scale_range(schedule: ScheduleConfig, T: int) -> tuple[float, float]:
    """beta_1 and beta_T after the scaling that the schedule names."""
    factor = 1000 / T if schedule.scale == "per_1000" else 1.0
    return schedule.beta_start * factor, schedule.beta_end * factor


def linear(schedule: ScheduleConfig, T: int) -> Betas:
    """beta_t linear in t from beta_start to beta_end (Ho et al. 2020, section 4)."""
    start, end = _scale_range(schedule, T)
    return np.linspace(start, end, T, dtype=np.float64)


def quadratic(schedule: ScheduleConfig, T: int) -> Betas:
    """sqrt(beta_t) linear in t (Song et al. 2020a; "scaled_linear" in diffusers)."""
    start, end = _scale_range(schedule, T)
    return np.linspace(start**0.5, end**0.5, T, dtype=np.float64) ** 2


def constant(schedule: ScheduleConfig, T: int) -> Betas:
    """beta_t = beta_end."""
    return np.full(T, _scale_range(schedule, T)[1], dtype=np.float64)


def cosine(schedule: ScheduleConfig, T: int) -> Betas:
    """alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, beta <= 0.999 (Nichol 2021, eq. 17)."""
    s = 0.008
    f = np.cos((np.arange(T + 1, dtype=np.float64) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def jsd(schedule: ScheduleConfig, T: int) -> Betas:
    """beta_t = 1 / (T - t + 1): 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015). alpha_bar_t = 1 - t/T: 0 at T."""
    return 1 / np.arange(T, 0, -1, dtype=np.float64)


def _warm_up(schedule: ScheduleConfig, T: int, fraction: float) -> Betas:
    """beta_end, but for a linear rise from beta_start to it over a fraction of the times."""
    start, end = _scale_range(schedule, T)
    rise = int(T * fraction)
    return np.concatenate([np.linspace(start, end, rise, dtype=np.float64), np.full(T - rise, end)])


def warmup10(schedule: ScheduleConfig, T: int) -> Betas:
    """A linear rise over the first tenth of the times, then beta_end (the code of Ho et al. 2020)."""
    return _warm_up(schedule, T, 0.1)


def warmup50(schedule: ScheduleConfig, T: int) -> Betas:
    """A linear rise over the first half of the times, then beta_end (the code of Ho et al. 2020)."""
    return _warm_up(schedule, T, 0.5)


def sigmoid(schedule: ScheduleConfig, T: int) -> Betas:
    """beta_t = beta_start + (beta_end - beta_start) / (1 + exp(-s)), s even from -6 to 6 (GeoDiff, Xu et al. 2022)."""
    start, end = _scale_range(schedule, T)
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T, dtype=np.float64)))


def given(schedule: ScheduleConfig, T: int) -> Betas:
    """The betas of the file; the experiment's checks hold them to T values."""
    return np.array(schedule.betas, dtype=np.float64)


def find_given_mistakes(schedule: ScheduleConfig, T: int) -> Iterator[str]:
    """What is wrong with the betas of the file."""
    betas = schedule.betas or ()
    if len(betas) != T:
        yield (
            f"diffusion.schedule.betas: kind: list needs one value for each of diffusion.T = {T} timesteps; "
            f"given: {len(betas)}"
        )
    if outside := [beta for beta in betas if not 0 < beta < 1]:
        yield f"diffusion.schedule.betas: {outside[:5]} must lie between 0 and 1, both excluded"


def log_snr(schedule: ScheduleConfig, T: int) -> Betas:
    """log SNR_t linear in t between the two ends: alpha_bar_t = 1 / (1 + 1/SNR_t) (Kingma et al. 2021, section 3.2)."""
    snr = np.exp(np.linspace(schedule.log_snr_start, schedule.log_snr_end, T, dtype=np.float64))
    alpha_bar = snr / (1 + snr)
    return 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])


def find_log_snr_mistakes(schedule: ScheduleConfig, T: int) -> Iterator[str]:
    """Ends in the wrong order."""
    if schedule.log_snr_start <= schedule.log_snr_end:
        yield (
            f"diffusion.schedule.log_snr_start: {schedule.log_snr_start:g} is not above log_snr_end = "
            f"{schedule.log_snr_end:g}, but t = 1 has more signal than T; swap them"
        )


def betas(diffusion: DiffusionConfig) -> Betas:
    """beta_1..beta_T. Not checked here: a scaled range may leave (0, 1); the preflight refuses it."""
    made: Betas = SCHEDULES[diffusion.schedule.kind].load()(diffusion.schedule, diffusion.T)
    return made


def alpha_bars(betas: Betas) -> Float64[np.ndarray, "T"]:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s)."""
    return np.cumprod(1 - betas)


def log_snrs(betas: Betas) -> Float64[np.ndarray, "T"]:
    """log SNR_t = log(alpha_bar_t / (1 - alpha_bar_t)); -inf where alpha_bar_t = 0."""
    alpha_bar = alpha_bars(betas)
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar) - np.log1p(-alpha_bar)


def prior_bpd(betas: Betas, second_moment: float = 1.0) -> float:
    """L_T = KL(q(x_T|x_0) || N(0, I)) in bits/dim, for data with E[x_0^2] = `second_moment` on the [-1, 1] scale.

    With the default of 1, the largest that pixels allow, it bounds L_T from above for every data set.
    """
    last = float(alpha_bars(betas)[-1])
    return 0.5 * (last * second_moment - last - np.log1p(-last)) / float(np.log(2))
