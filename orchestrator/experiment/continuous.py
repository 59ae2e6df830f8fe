"""What goes together with a family of networks, with a process of T times, and with one in continuous time."""

import math
from collections.abc import Iterator
from functools import lru_cache

from orchestrator.experiment.metrics import CONTINUOUS_DENSITY, CONTINUOUS_NLL, DENSITY, NLL
from orchestrator.experiment.records import SearchConfig
from workers.code import CodeError, describe_error, drop_pin
from workers.config import DiffusionConfig, SamplerConfig, ScheduleConfig, Trial
from workers.entries import ask, call, is_outside, load
from workers.kinds import DENOISER, FORMULATIONS, GENERATOR, NETWORKS, OBJECTIVES, SAMPLERS, SCHEDULES, TIMESTEPS
from workers.passes import plan_evaluations


def find_family_mistakes(trial: Trial) -> Iterator[str]:
    """The objective must be one for the family of the network."""
    family, objective = trial.model.family, trial.loss.objective
    if is_outside(trial.model.kind) and family != DENOISER:
        yield f"model.kind: {drop_pin(trial.model.kind)} is of the {family}s; networks of one's own are denoisers"
    if trial.training.compile == "always" and trial.loss.adversarial and family == OBJECTIVES[objective].family:
        yield (
            "training.compile: always, but a step with loss.adversarial goes backward through the network three times, "
            "which compiled code cannot; take auto or never"
        )
    if (other := OBJECTIVES[objective].family) != family:
        kind = drop_pin(trial.model.kind)
        mine = NETWORKS.list_names(lambda network: network.family == other)
        yield (
            f"loss.objective: {objective} is for {other}s, and model.kind: {kind} is of the {family}s; take "
            f"objective: {OBJECTIVES.list_names(lambda each: each.family == family)}, or model.kind: {mine}"
        )


def find_schedule_mistakes(diffusion: DiffusionConfig) -> Iterator[str]:
    s, entry = diffusion.schedule, SCHEDULES[diffusion.schedule.kind]
    if "beta_start" in entry.reads and s.beta_start > s.beta_end:
        yield (
            f"diffusion.schedule.beta_start: {s.beta_start:g} is above beta_end = {s.beta_end:g}; the range is reversed"
        )
    yield from ask(s.kind, entry.check, s, diffusion.T)
    if is_outside(s.kind):
        yield from _try_schedule(s, diffusion.T)


@lru_cache
def _try_schedule(schedule: ScheduleConfig, T: int) -> list[str]:
    """What is wrong with the form of what a schedule from outside makes; of the betas the preflight tells."""
    try:
        made = SCHEDULES[schedule.kind].load()(schedule, T)
    except Exception as error:  # noqa: BLE001 somebody's own code
        return [f"diffusion.schedule.kind: {describe_error(error, schedule.kind)}"]
    if getattr(made, "shape", None) != (T,) or made.dtype != "float64":
        what = f"{made.dtype} {made.shape}" if hasattr(made, "shape") else type(made).__name__
        return [f"diffusion.schedule.kind: {schedule.kind} makes {what} of T = {T}, in place of float64 {(T,)}"]
    return []


def find_continuous_mistakes(trial: Trial) -> Iterator[str]:
    """What a process without T times cannot have."""
    d, loss, training = trial.diffusion, trial.loss, trial.training
    of = f"diffusion.formulation: {d.formulation}"
    yield from ask(d.formulation, FORMULATIONS[d.formulation].check, d)
    if is_outside(d.formulation):
        yield from _try_ends(d)
    if OBJECTIVES[loss.objective].needs_steps and OBJECTIVES[loss.objective].needs_teacher:
        possible = OBJECTIVES.list_names(lambda other: other.needs_teacher and not other.needs_steps)
        yield f"loss.objective: {loss.objective} halves the steps of a chain, and {of} has none; take {possible}"
    elif OBJECTIVES[loss.objective].needs_steps:
        possible = OBJECTIVES.list_names(
            lambda other: other.family == DENOISER and not other.needs_steps and not other.needs_teacher
        )
        yield (
            f"loss.objective: {loss.objective} is a sum over the steps of a chain, and {of} has none; take objective: "
            f"{possible}, with weighting: vlb for the bound"
        )
    if TIMESTEPS[training.timesteps].remembers:
        possible = TIMESTEPS.list_names(lambda other: not other.remembers)
        yield (
            f"training.timesteps: {training.timesteps} remembers the losses at each of T times, and {of} has real "
            f"times; take {possible}"
        )


def _try_ends(diffusion: DiffusionConfig) -> Iterator[str]:
    """What is wrong with the noise levels between which a formulation from outside says that it is measured."""
    try:
        ends = call(diffusion.formulation, lambda: load(FORMULATIONS[diffusion.formulation].ends)(diffusion))
    except CodeError as error:
        yield f"diffusion.formulation: {error}"
        return
    if not (isinstance(ends, tuple) and len(ends) == 2 and 0 < ends[0] < ends[1] < math.inf):
        yield (
            f"diffusion.formulation: {drop_pin(diffusion.formulation)}: its ends are {ends!r:.80}, where two noise "
            "levels are expected, the second larger"
        )


def find_bound_mistakes(search: SearchConfig | None, trial: Trial) -> Iterator[str]:
    """A discrete bound and one in continuous time have names of their own, and a trial has one of them."""
    pairs = {NLL: CONTINUOUS_NLL, DENSITY: CONTINUOUS_DENSITY}
    own = pairs if trial.continuous else {theirs: ours for ours, theirs in pairs.items()}
    if search and search.scheduler.kind != "none" and trial.model.family == GENERATOR:
        yield (
            f"search.scheduler.kind: {search.scheduler.kind} stops trials by their bound while training, and "
            f"model.kind: {drop_pin(trial.model.kind)} has none; take kind: none"
        )
    for where, name in list_objectives(search) if search and (search.space or trial.evaluation.nll) else ():
        if name in own and not trial.diffuses:
            yield f"{where}: {name} is of a process in continuous time; the bound of {trial.model.kind} is {own[name]}"
        elif name in own:
            yield (
                f"{where}: {name} is not measured of diffusion.formulation: {trial.diffusion.formulation}, whose bound "
                f"is {own[name]}; take that, or eval/ode_nll_bpd with evaluation.ode_nll to compare formulations"
            )


def find_sampler_mistakes(sampler: SamplerConfig, T: int | None) -> list[str]:
    """A sampler of another kind of process, more steps than there are times, a plan that cannot be made."""
    entry, continuous = SAMPLERS[sampler.kind], T is None
    if not entry.suits(continuous) and not entry.of_students:
        why = "steps along the times of a chain, and" if continuous else "follows real times, and"
        here = "the process is continuous" if continuous else f"there are diffusion.T = {T} whole ones"
        return [
            f"evaluation.fid.sampler.kind: {sampler.kind} {why} {here}; take "
            f"{SAMPLERS.list_names(lambda other: other.suits(continuous))}"
        ]
    if is_outside(sampler.kind):
        try:
            if (count := plan_evaluations(sampler, T)) < 1:
                return [f"evaluation.fid.sampler.kind: {sampler.kind}: its entry counts {count} evaluations a sample"]
        except CodeError as error:
            return [f"evaluation.fid.sampler.kind: {sampler.kind}: {error}"]
    if T is None:
        if "steps" in entry.reads and sampler.steps is None:
            return [
                "evaluation.fid.sampler.steps: null is all T times, and a continuous process has none; give a number"
            ]
        return []
    if "steps" in SAMPLERS[sampler.kind].reads and sampler.steps and sampler.steps > T:
        return [f"evaluation.fid.sampler.steps: {sampler.steps} is more than diffusion.T = {T}; at most T, or null"]
    return []


def list_objectives(search: SearchConfig) -> list[tuple[str, str]]:
    """The settings that name metrics, and these."""
    return [("search.metric", search.metric), *(("search.also", name) for name in search.also)]
