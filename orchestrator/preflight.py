"""What can be known before anything starts: trials that would mean nothing, what the rest cost, and a table of both.

Pure functions of the experiment and of the descriptions of its data; neither torch nor ray is imported.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator.experiment import Experiment, ExperimentError, Variant, told
from orchestrator.settings import show
from workers.config import (
    SAMPLE_GRID,
    SAMPLE_GRID_STEPS,
    SCHEDULE_READS,
    VALIDATION_IMAGES,
    VALIDATION_TIMESTEPS,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FIDConfig,
    Trial,
    adaptive_evaluations,
    evaluations,
    trained_by,
)
from workers.data import Source
from workers.diffusion.schedules import alpha_bars, betas, log_snrs, prior_bpd
from workers.unet_config import unet_mistakes

PHOTOGRAPHS = 0.25  # E[x_0^2] of photographs on the [-1, 1] scale, about
WARN_AT = 0.1  # of the prior gap that is refused
DIMENSIONS = {"classifier": 64, "inception": 2048}  # of the feature spaces; workers.features needs torch to say so
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


# ---- Preflight -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The ends of a forward process."""

    beta_max: float
    alpha_bar_1: float
    alpha_bar_T: float
    prior_bpd: float  # L_T at E[x_0^2] = 1: an upper bound for all data in [-1, 1]
    photographs_bpd: float  # L_T at E[x_0^2] = 0.25
    log_snr_1: float
    log_snr_T: float  # -inf where alpha_bar_T = 0


@dataclass(frozen=True)
class Finding:
    text: str
    refused: bool = True


@lru_cache(maxsize=1024)
def chain(diffusion: DiffusionConfig) -> Chain:
    """The ends of the chain; the gaps are NaN where a beta is not below 1."""
    with np.errstate(all="ignore"):
        beta = betas(diffusion)
        alpha_bar = alpha_bars(beta)
        gaps = [float(prior_bpd(beta, moment)) for moment in (1.0, PHOTOGRAPHS)]
        log_snr = log_snrs(beta)
    ends = [float(x) for x in (beta.max(), alpha_bar[0], alpha_bar[-1], *gaps, log_snr[0], log_snr[-1])]
    return Chain(*ends)


def log_snr_curves(trials: Mapping[str, Trial]) -> dict[str, np.ndarray]:
    """log SNR_1..log SNR_T of each trial, float64 (T,): the axis on which schedules compare. -inf where SNR_T = 0."""
    return {digest: log_snrs(betas(trial.diffusion)) for digest, trial in trials.items()}


def schedule_name(diffusion: DiffusionConfig) -> str:
    """A schedule in a few words, such as `T=100 linear beta_start=0.0001 beta_end=0.02 scale=per_1000`."""
    s = diffusion.schedule
    read = [f"{n}={_cell(getattr(s, n))}" for n in SCHEDULE_READS[s.kind] if n != "betas"]
    return " ".join([f"T={diffusion.T}", s.kind, *read])


def preflight(experiment: Experiment, variants: Sequence[Variant], sources: Mapping[DataConfig, Source]) -> list[str]:
    """Warnings about the variants. Raises ExperimentError with all that would make a trial meaningless or fail."""
    found = [(f, v) for v in variants for f in findings(experiment, v.trial, sources[v.trial.data])]
    problems, warnings = (
        told(((f.text, variant) for f, variant in found if f.refused is refused), len(variants))
        for refused in (True, False)
    )
    if problems:
        raise ExperimentError(problems, experiment.name)
    return warnings


def findings(experiment: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    """All that there is to say of a trial before it starts."""
    return (finding for check in CHECKS for finding in check(experiment, trial, source))


def _noise(experiment: Experiment, trial: Trial, _: Source) -> Iterator[Finding]:
    """The chain must consist of steps in (0, 1) and end in noise."""
    schedule, T, ends, limit = trial.diffusion.schedule, trial.diffusion.T, chain(trial.diffusion), _limit(experiment)
    if ends.beta_max >= 1 and "scale" in SCHEDULE_READS[schedule.kind]:
        first = max(2, math.floor(1000 * schedule.beta_end + 1e-9) + 1)
        yield Finding(
            f"diffusion.schedule.scale: per_1000 makes the largest beta {ends.beta_max:.3g} at diffusion.T = {T}, "
            f"outside (0, 1); it works from T = {first} on, or with a smaller beta_end than {schedule.beta_end:g}"
        )
    elif ends.alpha_bar_1 == 1:
        yield Finding(f"diffusion.schedule: beta_1 is too small for float64, as 1 - beta_1 = 1 at diffusion.T = {T}")
    elif schedule.kind == "jsd" and trial.diffusion.prediction == "eps":
        yield Finding(
            "diffusion.schedule.kind: jsd ends at alpha_bar_T = 0, where diffusion.prediction: eps does not determine "
            "x_0 (it divides by alpha_bar_T); take prediction: x_0 or v, or another schedule"
        )
    elif schedule.kind == "jsd":
        return
    elif ends.alpha_bar_T == 0:
        yield Finding(
            f"diffusion.schedule: alpha_bar_T = 0 in float64 at diffusion.T = {T}: nothing of x_0 is left, and the "
            "first steps of sampling divide by it; take a smaller beta_end or T"
        )
    elif ends.alpha_bar_T < FLOAT32_TINY:
        yield Finding(
            f"diffusion.schedule: alpha_bar_T = {ends.alpha_bar_T:.2g} at diffusion.T = {T} is zero in float32, so "
            "many steps are spent on noise alone; a smaller beta_end or T would do",
            refused=False,
        )
    elif ends.prior_bpd > limit * WARN_AT:
        refused = ends.prior_bpd > limit
        yield Finding(
            f"diffusion: the chain stops short of noise at T = {T}: its prior gap L_T is up to {ends.prior_bpd:.3g} "
            f"bits/dim (at E[x_0^2] = 1, the most that pixels in [-1, 1] have; {ends.photographs_bpd:.3g} at "
            f"{PHOTOGRAPHS}, as in photographs), {'above' if refused else 'not far below'} "
            f"preflight.max_prior_bpd = {limit:g}; {_remedy(trial.diffusion, limit)}"
            + (", or raise preflight.max_prior_bpd if the gap is what you study" if refused else ""),
            refused,
        )


def _limit(experiment: Experiment) -> float:
    return experiment.preflight.max_prior_bpd


def _remedy(diffusion: DiffusionConfig, limit: float) -> str:
    """What closes the prior gap: the rescaled schedule where that works, else a longer or a stronger one."""
    if "scale" not in SCHEDULE_READS[diffusion.schedule.kind]:
        return {"log_snr": "take a smaller log_snr_end", "list": "take larger betas"}.get(
            diffusion.schedule.kind, "take a larger T"
        )
    schedule = diffusion.schedule.model_copy(update={"scale": "per_1000"})
    scaled = chain(diffusion.model_copy(update={"schedule": schedule}))
    works = diffusion.schedule.scale == "absolute" and scaled.beta_max < 1 and scaled.prior_bpd <= limit * WARN_AT
    return "take " + "diffusion.schedule.scale: per_1000, or " * works + "a larger beta_end or T"


def _weighting(_: Experiment, trial: Trial, __: Source) -> Iterator[Finding]:
    """max(SNR_t, 1) is stated for the error of x_0; of eps it is max(1, 1 / SNR_t), which grows without bound."""
    d, loss, least = trial.diffusion, trial.loss, chain(trial.diffusion).log_snr_T
    if d.prediction == "eps" and loss.weighting == "truncated_snr" and least < 0:
        most = f"{math.exp(-least):,.3g} times" if least > -700 else "infinitely many times"
        yield Finding(
            "loss.weighting: truncated_snr counts the error of eps by max(1, 1 / SNR_t), at t = T "
            f"{most} what it counts near the data, so the loss is nearly that of pure noise alone; take "
            "diffusion.prediction: v or x_0, for which it was made, or another weighting",
            refused=False,
        )


def _network(_: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    yield from (Finding(mistake) for mistake in unet_mistakes(trial.model, resolution=source.shape[0]))


def _images(_: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    """There must be as many images, and such labels, as training and evaluation ask for."""
    yield from evaluation_findings(trial.evaluation, source)
    if trial.training.batch_size > source.train:
        yield Finding(
            f"training.batch_size: {trial.training.batch_size:,} is more than the {source.train:,} training images of "
            f"{source.name}, so a batch holds some of them twice",
            refused=False,
        )


def evaluation_findings(evaluation: EvaluationConfig, source: Source) -> Iterator[Finding]:
    """Whether the data have what an evaluation asks for."""
    fid = evaluation.fid
    for name in ("nll", "ode_nll"):
        part = getattr(evaluation, name)
        if part and part.images != "all" and part.images > source.held_out:
            yield Finding(
                f"evaluation.{name}.images: {part.images:,} is more than the {source.held_out:,} that {source.name} "
                "holds out; take fewer, or all"
            )
    if fid and fid.features == "classifier" and not source.labelled:
        yield Finding(
            f"evaluation.fid.features: a classifier cannot be trained on {source.name}, which has no labels; "
            "set evaluation.fid: null or features: inception, or use labelled data"
        )
    if fid and fid.reference_images != "all" and fid.reference_images > getattr(source, fid.reference):
        yield Finding(
            f"evaluation.fid.reference_images: {fid.reference_images:,} is more than the "
            f"{getattr(source, fid.reference):,} of {source.name}'s {fid.reference} split; take fewer, or all"
        )
    if fid and "precision_recall" in fid.also and (n := min(fid.samples, _references(fid, source))) < 4:
        yield Finding(
            f"evaluation.fid.also: precision_recall takes 4 samples and images or more, and there are {n}; leave it out"
        )
    if fid and "inception_score" in fid.also and fid.samples < 10:
        yield Finding(f"evaluation.fid.samples: {fid.samples} are fewer than the 10 that inception_score takes")
    if fid and (d := DIMENSIONS[fid.features]) >= fid.samples:
        yield Finding(
            f"evaluation.fid.samples: {fid.samples:,} are not more than the {d:,} dimensions of {fid.features}: their "
            "covariance is singular, and the distance says more of their number than of the model; take more",
            refused=False,
        )


def _references(fid: FIDConfig, source: Source) -> int:
    split = int(getattr(source, fid.reference))
    return split if fid.reference_images == "all" else min(fid.reference_images, split)


def _search(experiment: Experiment, trial: Trial, _: Source) -> Iterator[Finding]:
    search, training = experiment.search, trial.training
    if search.mode == "max":
        yield Finding(f"search.mode: max ranks the worst {search.metric} first; lower is better", refused=False)
    if search.scheduler.kind != "none" and search.scheduler.grace >= training.steps:
        yield Finding(
            f"search.scheduler.grace: {search.scheduler.grace} steps are all of training.steps = {training.steps}, "
            "so no trial will be stopped early",
            refused=False,
        )


CHECKS: tuple[Callable[[Experiment, Trial, Source], Iterator[Finding]], ...] = (
    _noise,
    _weighting,
    _network,
    _images,
    _search,
)


# ---- Cost ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Evaluations of the network, an image at a time; costs add up. One of training is a forward and a backward."""

    training_evaluations: int = 0
    validation_evaluations: int = 0
    nll_evaluations: int = 0
    sampling_evaluations: int = 0
    ode_nll_evaluations: int = 0  # each with a backward pass for every probe

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def cost(trial: Trial, source: Source) -> Cost:
    """What `trial` costs from its first step to its last evaluation, where nothing of it is there yet.

    Solvers with error control are counted as they were measured: `workers.config.ADAPTIVE`.
    """
    T, training, nll, fid = trial.diffusion.T, trial.training, trial.evaluation.nll, trial.evaluation.fid
    images = source.held_out if nll is None or nll.images == "all" else nll.images
    timesteps = T if nll is None or nll.timesteps == "all" else nll.timesteps
    ode = trial.evaluation.ode_nll
    flows = (source.held_out if ode.images == "all" else ode.images) if ode else 0
    return Cost(
        training_evaluations=training.steps * training.batch_size,
        validation_evaluations=validations(trial) * _validation(T, source),
        nll_evaluations=images * timesteps if nll else 0,
        sampling_evaluations=fid.samples
        * (evaluations(fid.sampler, T) or adaptive_evaluations("samples", fid.sampler.tolerance))
        if fid
        else 0,
        ode_nll_evaluations=flows * adaptive_evaluations("ode_nll", ode.tolerance) if ode else 0,
    )


def costs(trials: Mapping[str, Variant], sources: Mapping[DataConfig, Source]) -> list[Cost]:
    """Of the rows of a sweep: what several have in common, the training and the bound, counts at the first of them."""
    found, done = [], set[Any]()
    for row, variant in trials.items():
        trial, price = variant.trial, cost(variant.trial, sources[variant.trial.data])
        for key, names in (
            (trained_by(row), ("training_evaluations", "validation_evaluations")),
            ((trained_by(row), trial.evaluation.nll), ("nll_evaluations",)),
            ((trained_by(row), trial.evaluation.ode_nll), ("ode_nll_evaluations",)),
        ):
            price = replace(price, **dict.fromkeys(names, 0)) if key in done else price
            done.add(key)
        found.append(price)
    return found


def validations(trial: Trial) -> int:
    """How often the trial is validated: at step 0, every `validate_every` steps and at the end."""
    return math.ceil(trial.training.steps / trial.training.validate_every) + 1


def _validation(T: int, source: Source) -> int:
    """The evaluations of one: t = 1 and the strata of 2..T for each image, and the grid of samples."""
    timesteps = 1 + min(VALIDATION_TIMESTEPS, T - 1)
    return min(VALIDATION_IMAGES, source.held_out) * timesteps + SAMPLE_GRID * min(SAMPLE_GRID_STEPS, T)


# ---- The table -------------------------------------------------------------------------------------------------


def dry_run_text(trials: Mapping[str, Variant], sources: Mapping[DataConfig, Source]) -> str:
    """A table of the trials by digest: what is searched, where their chains end, what they cost, and the totals."""
    prices = costs(trials, sources)
    searched = list(next(iter(trials.values())).params) if trials else []
    ends = [chain(v.trial.diffusion) for v in trials.values()]
    head = ["trial", *searched, "alpha_bar_T", "L_T <=", "log SNR"]
    head += ["training", "validation", "nll", "sampling", "ode_nll"]
    rows = [
        [digest, *(_cell(v) for v in variant.params.values()), f"{end.alpha_bar_T:.1e}", f"{end.prior_bpd:.2g}"]
        + [f"{end.log_snr_1:.1f}..{end.log_snr_T:.1f}"]
        + [readable(n) for n in astuple(price)]
        for (digest, variant), end, price in zip(trials.items(), ends, prices, strict=True)
    ]
    trained = len({trained_by(row) for row in trials})
    one = f"{trained} trial" + "s" * (trained != 1) + f", {len(trials)} rows" * (len(trials) != trained)
    total = [one, *[""] * (len(searched) + 3), *(readable(n) for n in astuple(sum(prices, Cost())))]
    if not any(price.ode_nll_evaluations for price in prices):
        head, rows, total = head[:-1], [row[:-1] for row in rows], total[:-1]
    return "\n".join(
        [
            *_aligned([head, *rows, total]),
            "",
            "L_T: the prior gap in bits/dim at E[x_0^2] = 1; log SNR: of t = 1 and T. The columns after it count",
            "evaluations of the network, an image at a time; one of training is a forward and a backward.",
        ]
    )


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else show(value)


def readable(n: int) -> str:
    """A count in three or four characters: 850, 1.2k, 512k, 1.2M, 34G."""
    for unit, size in (("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12)):
        x = n / size
        if float(f"{x:.2g}" if x < 10 else f"{x:.0f}") < 1000:
            return f"{n}" if not unit else f"{x:.2g}{unit}" if x < 9.95 else f"{x:.0f}{unit}"
    return f"{n / 10**12:,.0f}T"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right; a rule under the head and the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
