"""What can be known before anything starts: trials that would mean nothing or fail, and what to warn of.

Pure functions of the experiment and of the descriptions of its data; neither torch nor ray is imported.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.experiment.check import tell_once
from orchestrator.experiment.measured_weights import doubt_width
from orchestrator.experiment.metrics import NLLS, choose_likelihood
from orchestrator.experiment.records import MOST_VARIANTS, Experiment, ExperimentError, Variant
from orchestrator.experiment.told import find_missing
from workers.code import drop_digests
from workers.config import (
    DataConfig,
    DiffusionConfig,
    FIDConfig,
    Measurement,
    Trial,
)
from workers.data.sources import Source, describe_held_out, describe_sides, describe_source
from workers.diffusion.schedules import alpha_bars, betas, log_snrs, prior_bpd
from workers.entries import ask, is_outside, load
from workers.evaluation.blocks import MOST_BLOCKS, Images, count_blocks
from workers.kinds import FORMULATIONS, MEASURES, NETWORKS, PREDICTIONS, SCHEDULES, SPACES
from workers.network.autoencoder_config import find_discriminator_mistakes
from workers.network.unet_config import UNET

PHOTOGRAPHS = 0.25  # E[x_0^2] of photographs on the [-1, 1] scale, about
WARN_AT = 0.1  # of the prior gap that is refused
STEEP = 0.5  # of a beta, above which a step of latents is told
# These need torch, and are asked of kinds that are not ours alone.
TRY = "workers.network.build:find_mistakes"
TRY_VARIANCE = "workers.diffusion.process:find_variance_mistakes"
TRY_SPACE = "workers.evaluation.features:find_space_mistakes"
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


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


@lru_cache(maxsize=2 * MOST_VARIANTS)
def measure_chain(diffusion: DiffusionConfig) -> Chain:
    """The ends of the chain, or of a continuous process; the gaps are NaN where a beta is not below 1."""
    if diffusion.continuous:
        return _measure_continuous(diffusion)
    with np.errstate(all="ignore"):
        beta = betas(diffusion)
        alpha_bar = alpha_bars(beta)
        gaps = [float(prior_bpd(beta, moment)) for moment in (1.0, PHOTOGRAPHS)]
        log_snr = log_snrs(beta)
    ends = [float(x) for x in (beta.max(), alpha_bar[0], alpha_bar[-1], *gaps, log_snr[0], log_snr[-1])]
    return Chain(*ends)


def _measure_continuous(diffusion: DiffusionConfig) -> Chain:
    """Of y = x_0 + sigma eps between the noise levels that it is measured at, against the prior of the last alone."""
    low, high = load(FORMULATIONS[diffusion.formulation].ends)(diffusion)
    alpha_bar_1, alpha_bar_T = (1 / (1 + sigma**2) for sigma in (low, high))
    gap = 1 / (2 * high**2 * math.log(2))
    log_snr = -2 * math.log(low), -2 * math.log(high)
    return Chain(0.0, alpha_bar_1, alpha_bar_T, gap, gap * PHOTOGRAPHS, *log_snr)


def check_before_start(
    experiment: Experiment, variants: Sequence[Variant], sources: Mapping[DataConfig, Source]
) -> list[str]:
    """Warnings about the data and the variants. Raises ExperimentError with all that would make a trial meaningless or
    fail.
    """
    found = [(f, v) for v in variants for f in check_trial(experiment, v.trial, sources[v.trial.data])]
    problems, warnings = (
        tell_once(((f.text, variant) for f, variant in found if f.refused is refused), len(variants))
        for refused in (True, False)
    )
    if problems:
        raise ExperimentError(problems, experiment.name)
    told = list_source_warnings(sources.values()) + _warn_of_held_out(experiment, variants, sources) + warnings
    return list(map(drop_digests, told))


def describe_data(sources: Iterable[Source]) -> list[str]:
    """What every command that reads data prints of them, a line a data set: to stderr, as stdout is for results."""
    return [f"data        {describe_source(source)}" for source in dict.fromkeys(sources)]


def list_source_warnings(sources: Iterable[Source]) -> list[str]:
    """What had to be guessed of the data, what of them is left out, and settings for them that have no effect."""
    return list(dict.fromkeys(f"{source.name}: {text}" for source in sources for text in source.warnings))


def _warn_of_held_out(
    experiment: Experiment, variants: Sequence[Variant], sources: Mapping[DataConfig, Source]
) -> list[str]:
    """Warnings where the file sets data.held_out, even to its default, for data with a split of their own."""
    default = DataConfig.model_fields["held_out"].default
    is_set = "held_out" in experiment.data.model_fields_set or "data.held_out" in experiment.search.space
    configs = dict.fromkeys(v.trial.data for v in variants if is_set and v.trial.data.held_out == default)
    return [f"{sources[c].name}: {describe_held_out(c)}" for c in configs if sources[c].own_split]


def check_trial(experiment: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    """All that there is to say of a trial before it starts."""
    checks = (*(OF_PROCESSES if trial.diffuses else ()), *CHECKS)
    return (finding for check in checks for finding in check(experiment, trial, source))


def _check_noise(experiment: Experiment, trial: Trial, _: Source) -> Iterator[Finding]:
    """The chain must consist of steps in (0, 1) and end in noise."""
    schedule, T, ends, limit = (
        trial.diffusion.schedule,
        trial.diffusion.T,
        measure_chain(trial.diffusion),
        _choose_limit(experiment),
    )
    if trial.diffusion.continuous:
        yield from _check_prior_gap(trial.diffusion, ends, limit)
        return
    entry = SCHEDULES[schedule.kind]
    if ends.beta_max >= 1 and "scale" in entry.reads:
        first = max(2, math.floor(1000 * schedule.beta_end + 1e-9) + 1)
        yield Finding(
            f"diffusion.schedule.scale: per_1000 makes the largest beta {ends.beta_max:.3g} at diffusion.T = {T}, "
            f"outside (0, 1); it works from T = {first} on, or with a smaller beta_end than {schedule.beta_end:g}"
        )
    elif ends.alpha_bar_1 == 1:
        yield Finding(f"diffusion.schedule: beta_1 is too small for float64, as 1 - beta_1 = 1 at diffusion.T = {T}")
    elif entry.ends_at_zero and not PREDICTIONS[trial.diffusion.prediction].without_signal:
        yield Finding(
            f"diffusion.schedule.kind: {schedule.kind} ends at alpha_bar_T = 0, where diffusion.prediction: "
            f"{trial.diffusion.prediction} does not determine x_0 (it divides by alpha_bar_T); take prediction: x_0 or "
            "v, or another schedule"
        )
    elif entry.ends_at_zero:
        return
    elif ends.alpha_bar_T == 0:
        yield Finding(
            f"diffusion.schedule: alpha_bar_T = 0 in float64 at diffusion.T = {T}, a log SNR of -inf: nothing of x_0 "
            "is left, and the first steps of sampling divide by it; take a smaller beta_end or T"
        )
    elif ends.alpha_bar_T < FLOAT32_TINY:
        yield Finding(
            f"diffusion.schedule: alpha_bar_T = {ends.alpha_bar_T:.2g} at diffusion.T = {T}, a log SNR of "
            f"{ends.log_snr_T:.3g}, is zero in float32, so many steps are spent on noise alone; a smaller beta_end or "
            "T would do",
            refused=False,
        )
    else:
        yield from _check_prior_gap(trial.diffusion, ends, limit)


def _check_prior_gap(diffusion: DiffusionConfig, ends: Chain, limit: float) -> Iterator[Finding]:
    """What noise should hide of the data has to be small at the end."""
    if ends.prior_bpd > limit * WARN_AT:
        refused = ends.prior_bpd > limit
        what = "process" if diffusion.continuous else f"chain of T = {diffusion.T}"
        yield Finding(
            f"diffusion: the {what} stops short of noise at log SNR = {ends.log_snr_T:.3g}: its prior gap L_T is up to "
            f"{ends.prior_bpd:.3g} bits/dim (at E[x_0^2] = 1, the most that pixels in [-1, 1] have; "
            f"{ends.photographs_bpd:.3g} at {PHOTOGRAPHS}, as in photographs), "
            f"{'above' if refused else 'not far below'} preflight.max_prior_bpd = {limit:g}; "
            + _suggest_remedy(diffusion, limit)
            + (", or raise preflight.max_prior_bpd if the gap is what you study" if refused else ""),
            refused,
        )


def _choose_limit(experiment: Experiment) -> float:
    return experiment.preflight.max_prior_bpd


def _suggest_remedy(diffusion: DiffusionConfig, limit: float) -> str:
    """What closes the prior gap: the rescaled schedule where that works, else a longer or a stronger one."""
    if diffusion.continuous:
        return FORMULATIONS[diffusion.formulation].more_noise or "let it end with more noise"
    entry = SCHEDULES[diffusion.schedule.kind]
    if "scale" not in entry.reads:
        return entry.more_noise
    schedule = diffusion.schedule.model_copy(update={"scale": "per_1000"})
    scaled = measure_chain(diffusion.model_copy(update={"schedule": schedule}))
    works = diffusion.schedule.scale == "absolute" and scaled.beta_max < 1 and scaled.prior_bpd <= limit * WARN_AT
    return "take " + "diffusion.schedule.scale: per_1000, or " * works + "a larger beta_end or T"


def _check_weighting(_: Experiment, trial: Trial, __: Source) -> Iterator[Finding]:
    """max(SNR_t, 1) is stated for the error of x_0; of eps it is max(1, 1 / SNR_t), which grows without bound."""
    d, loss, least = trial.diffusion, trial.loss, measure_chain(trial.diffusion).log_snr_T
    if not d.continuous and d.prediction == "eps" and loss.weighting == "truncated_snr" and least < 0:
        most = f"{math.exp(-least):,.3g} times" if least > -700 else "infinitely many times"
        yield Finding(
            "loss.weighting: truncated_snr counts the error of eps by max(1, 1 / SNR_t), at t = T "
            f"{most} what it counts near the data, so the loss is nearly that of pure noise alone; take "
            "diffusion.prediction: v or x_0, for which it was made, or another weighting",
            refused=False,
        )


def _check_latents(_: Experiment, trial: Trial, __: Source) -> Iterator[Finding]:
    """x_0_hat from eps has an error of eps over sqrt(SNR_t), which clipping keeps small where there is a range."""
    d, most = trial.diffusion, measure_chain(trial.diffusion).beta_max
    if trial.data.encoder and not d.continuous and d.prediction == "eps" and STEEP < most < 1:
        yield Finding(
            f"diffusion.prediction: eps says little of x_0 in steps like the last ones, of beta up to {most:.3g}, "
            "and no prediction of latents is clipped: the bound may be many times too large, and samples far off; take "
            "diffusion.prediction: v, or another diffusion.schedule",
            refused=False,
        )


def _check_network(_: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    entry = NETWORKS[trial.model.kind]
    is_ours = trial.model.kind == UNET or bool(entry.written)
    if source.sides and is_ours:
        yield Finding(
            f"model.kind: {trial.model.kind} is of images, and {source.name} has {describe_sides(source)}; name a "
            "network of your own (docs/extending.md), or read arrays of images with data.dimensions: 2"
        )
        return
    if trial.data.encoder and not source.latents:  # of an encoder that is not known yet there is nothing to say
        return
    shape = source.diffused
    mistakes = ask(trial.model.kind, entry.check, trial.model, shape)
    if entry.written:
        mistakes += find_discriminator_mistakes(trial.loss, shape)
    if not mistakes and not is_ours:
        mistakes = load(TRY)(trial.model, shape, trial.diffusion.learned, source.sides)
    yield from map(Finding, mistakes)


def _check_variance(_: Experiment, trial: Trial, __: Source) -> Iterator[Finding]:
    if trial.diffusion.continuous:
        return
    asked = {"diffusion": trial.diffusion.variance, "evaluation": trial.evaluation.variance}
    for section, variance in asked.items():
        if variance and is_outside(variance):
            for mistake in load(TRY_VARIANCE)(trial.diffusion, variance):
                yield Finding(f"{section}.variance: {mistake}")


def _check_average(_: Experiment, trial: Trial, __: Source) -> Iterator[Finding]:
    if doubt := doubt_width(trial.training, trial.evaluation):
        yield Finding(doubt, refused=False)


def _check_images(_: Experiment, trial: Trial, source: Source) -> Iterator[Finding]:
    """There must be as many images, and such labels, as training and evaluation ask for."""
    yield from check_evaluation(Measurement.of(trial), source)
    if trial.training.batch_size > source.train:
        yield Finding(
            f"training.batch_size: {trial.training.batch_size:,} is more than the {source.train:,} training images of "
            f"{source.name}, so a batch holds some of them twice",
            refused=False,
        )


def check_evaluation(m: Measurement, source: Source) -> Iterator[Finding]:
    """Whether the data have what an evaluation asks for, and whether it is of a size that can be planned."""
    evaluation, fid = m.evaluation, m.evaluation.fid
    yield from map(Finding, find_missing(m.told, source))
    if (count := count_blocks(m, Images.of(source))) > MOST_BLOCKS:
        yield Finding(
            f"evaluation: {count:,} blocks, a file and a task each, are more than {MOST_BLOCKS:,}; take fewer "
            "evaluation.fid.samples, evaluation.nll.images or evaluation.nll.timesteps"
        )
    for name in ("nll", "ode_nll"):
        part = getattr(evaluation, name)
        if part and part.images != "all" and part.images > source.held_out:
            yield Finding(
                f"evaluation.{name}.images: {part.images:,} is more than the {source.held_out:,} that {source.name} "
                "holds out; take fewer, or all"
            )
        elif part and 1 in (part.images, source.held_out):
            yield Finding(
                f"evaluation.{name}: the bound of a single image of {source.name} has no standard error, so that no "
                "difference can be told from chance; measure more",
                refused=False,
            )
    if fid:
        yield from _check_fid(fid, source)


def _check_fid(fid: FIDConfig, source: Source) -> Iterator[Finding]:
    """The same of what is measured of samples."""
    space = SPACES[fid.features]
    if space.labelled and not source.labelled:
        yield Finding(
            f"evaluation.fid.features: {fid.features} cannot be trained on {source.name}, which has no labels; "
            f"set evaluation.fid: null or features: {SPACES.list_names(lambda s: not s.labelled)}, or use labelled data"
        )
    if space.train and source.streamed and not space.streams:
        yield Finding(
            f"evaluation.fid.features: {fid.features} is trained on all images of {source.name} in memory, and "
            "data.stream reads them as they are needed; set evaluation.fid: null or features: "
            f"{SPACES.list_names(lambda s: not s.train or s.streams)}, or say streams=True in its entry where it takes "
            "them piece by piece"
        )
    if space.channels and source.sides:
        yield Finding(
            f"evaluation.fid.features: {fid.features} takes images, and {source.name} has {describe_sides(source)}; "
            f"set evaluation.fid: null or features: {SPACES.list_names(lambda s: not s.channels)}"
        )
    elif space.channels and source.shape[2] not in space.channels:
        yield Finding(
            f"evaluation.fid.features: {fid.features} takes images of {' or '.join(map(str, space.channels))} "
            f"channels, and those of {source.name} have {source.shape[2]}; set evaluation.fid: null or features: "
            f"{SPACES.list_names(lambda s: not s.channels)}"
        )
    if space.form == "network":
        for mistake in load(TRY_SPACE)(fid.features, source.shape):
            yield Finding(f"evaluation.fid.features: {mistake}")
    if fid.quantise != "round" and source.levels is None:
        yield Finding(
            f"evaluation.fid.quantise: {fid.quantise} is of levels, and the data of {source.name} are not discrete, so "
            "that samples are taken as they are; leave it out"
        )
    if fid.reference_images != "all" and fid.reference_images > getattr(source, fid.reference):
        yield Finding(
            f"evaluation.fid.reference_images: {fid.reference_images:,} is more than the "
            f"{getattr(source, fid.reference):,} of {source.name}'s {fid.reference} split; take fewer, or all"
        )
    for name in fid.also:
        measure = MEASURES[name]
        n = min(fid.samples, _count_references(fid, source)) if measure.of_real else fid.samples
        if n < measure.least:
            what = "samples and images" if measure.of_real else "samples"
            yield Finding(
                f"evaluation.fid.also: {name} takes {measure.least} {what} or more, and there are {n}; leave it out"
            )
    if (d := space.dimensions) >= fid.samples:
        yield Finding(
            f"evaluation.fid.samples: {fid.samples:,} are not more than the {d:,} dimensions of {fid.features}: their "
            "covariance is singular, and the distance says more of their number than of the model; take more",
            refused=False,
        )


def _count_references(fid: FIDConfig, source: Source) -> int:
    split = int(getattr(source, fid.reference))
    return split if fid.reference_images == "all" else min(fid.reference_images, split)


def _check_likelihood(experiment: Experiment, _: Trial, source: Source) -> Iterator[Finding]:
    """Trials are ranked by a likelihood of the kind that their data have."""
    values = "not discrete" if source.levels is None else f"in {source.levels} levels"
    search = experiment.search
    for where, name in [("search.metric", search.metric), *(("search.also", name) for name in search.also)]:
        if (own := choose_likelihood(name, source.levels)) != name:
            of = "a density, of data that are not discrete" if name in NLLS else "of data in levels"
            yield Finding(f"{where}: {name} is {of}, and those of {source.name} are {values}; take {own}")


def _check_search(experiment: Experiment, trial: Trial, _: Source) -> Iterator[Finding]:
    search, training = experiment.search, trial.training
    if search.scheduler.kind != "none" and search.scheduler.grace >= training.steps:
        yield Finding(
            f"search.scheduler.grace: {search.scheduler.grace} steps are all of training.steps = {training.steps}, "
            "so no trial will be stopped early",
            refused=False,
        )


Check = Callable[[Experiment, Trial, Source], Iterator[Finding]]
OF_PROCESSES: tuple[Check, ...] = (_check_noise, _check_weighting, _check_latents, _check_variance)  # of denoisers
CHECKS: tuple[Check, ...] = (
    _check_network,
    _check_average,
    _check_images,
    _check_likelihood,
    _check_search,
)
