"""Whether settings go together: all mistakes of an experiment at once, each with what to do about it."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.experiment.continuous import (
    find_bound_mistakes,
    find_continuous_mistakes,
    find_family_mistakes,
    find_sampler_mistakes,
    find_schedule_mistakes,
    list_objectives,
)
from orchestrator.experiment.distilling import find_distilling_mistakes
from orchestrator.experiment.expand import DRAWS, expand
from orchestrator.experiment.measured_weights import find_average_mistakes
from orchestrator.experiment.metrics import EVALUATIONS, list_metrics
from orchestrator.experiment.needs import (
    LEAST_TRIAL,
    find_cooldown_mistakes,
    find_encoder_mistakes,
    find_need_mistakes,
    find_sourceless,
)
from orchestrator.experiment.records import (
    MOST_VARIANTS,
    Axis,
    Experiment,
    ExperimentFile,
    SearchConfig,
    Variant,
)
from orchestrator.experiment.settings import (
    find_invalid,
    list_leaves,
    list_paths,
    merge,
    overlap,
    parse_valid,
    put,
    show,
    suggest_path,
)
from orchestrator.experiment.told import find_told_mistakes
from workers.code import drop_pin
from workers.config import (
    EvaluationConfig,
    Record,
    Trial,
    count_sub_batches,
)
from workers.evaluation.blocks import list_comparable_metrics
from workers.identity import PLACING, Unread, collect_settings_read, list_own_unread, list_unread
from workers.identity import find_unread as list_unread_of
from workers.kinds import (
    DENOISER,
    MEASURES,
    OBJECTIVES,
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    VARIANCES,
    WEIGHTINGS,
)


def find_experiment_mistakes(content: Mapping[str, Any]) -> list[str]:
    found = [f"{path}: {text}" for path, text in find_invalid(ExperimentFile, content)]
    trial = parse_valid(Trial, {name: value for name, value in content.items() if name in Trial.model_fields})
    search = parse_valid(SearchConfig, content.get("search", {}))
    for path, axis in parse_axes(content).items():
        found += _find_axis_mistakes(path, axis)
    found += find_trial_mistakes(trial) if trial else []
    found += _find_search_mistakes(search) if search else []
    found += _find_metric_mistakes(search, trial) if search and trial else []
    found += find_sourceless(trial, parse_axes(content)) if trial else []
    if found:
        return found
    experiment = Experiment.model_validate(content)
    variants = expand(experiment)
    if not variants:
        return ["search.without: leaves out every variant of the search; no trial would run"]
    wrong = (
        (text, variant)
        for variant in variants
        for text in (*find_trial_mistakes(variant.trial), *find_bound_mistakes(search, variant.trial))
    )
    found = find_unread([v.trial for v in variants], list(get_space(content))) + tell_once(wrong, len(variants))
    return found + find_need_mistakes(experiment, variants, find_trial_mistakes)


def find_unread(records: Sequence[Record], searched: Sequence[str] = (), where: str = "") -> list[str]:
    """The settings that none of the records reads (`Record.READS`), and that are set nevertheless.

    One that some variants of a search read is fine: the others are one and the same trial, which `by_id` tells.
    """
    found: dict[str, list[tuple[Any, Unread]]] = {}
    known: dict[int, list[tuple[str, Any, Unread]]] = {}  # thousands of trials share few different sections
    for record in records:
        left_out = {one.name for one in list_unread_of(record)}
        for name, section in [("", record), *record]:
            if name and (not isinstance(section, Record) or name in left_out):
                continue
            if id(section) not in known:
                prefix = f"{where}{name}." if name else where
                known[id(section)] = list(list_unread(section, prefix) if name else list_own_unread(section, prefix))
            for path, value, why in known[id(section)]:
                found.setdefault(path, []).append((value, why))
    return [_describe_unread(path, cases, searched) for path, cases in found.items() if len(cases) == len(records)]


def _describe_unread(path: str, cases: Sequence[tuple[Any, Unread]], searched: Sequence[str]) -> str:
    value, why = cases[0]
    choices = " or ".join(dict.fromkeys(case.choice for _, case in cases))
    key = next((key for key in searched if overlap({path}, {key})), None)
    value = collect_settings_read(value, only_set=True) if isinstance(value, Record) else value
    shown = "any value" if key else value if isinstance(value, str) else show(value)
    reads = f", which reads {', '.join(why.reads)}" if why.reads else ""
    other = "" if why.chooser == "family" else f", or take {why.chooser}: {' or '.join(why.readers)}"  # no setting
    where = f"search.space.{key}" if key else path
    return f"{where}: {shown} is without effect on {why.chooser}: {choices}{reads}; leave it out{other}"


def tell_once(found: Iterable[tuple[str, Variant]], total: int) -> list[str]:
    """Each text once, with the variants of which it holds where it does not hold of all."""
    variants: dict[str, list[Variant]] = {}
    for text, variant in found:
        variants.setdefault(text, []).append(variant)
    return [
        text if len(some) == total else f"{text} ({len(some)} of {total} variants; first: {some[0]})"
        for text, some in variants.items()
    ]


def _find_axis_mistakes(path: str, axis: Axis) -> list[str]:
    """What is wrong with a path of the search space and with each of its values, taken by itself."""
    where = f"search.space.{path}"
    if path not in (known := list_paths(Trial, own=True)):
        return [f"{where}: no such setting of a trial{suggest_path(path, known)}"]
    if all(re.match(NOT_TRAINED, leaf) for leaf in list_settings_set(path, axis)):
        return [f"{where}: does not change what is trained: all its values are one and the same trial; set it outside"]
    found = []
    for index, value in enumerate(_choose_values(axis)):
        for wrong, text in find_invalid(Trial, merge(LEAST_TRIAL, put({}, path.split("."), value))):
            if not overlap({wrong.partition("[")[0]}, {path}):
                continue  # the setting needs another one, which the file may have
            if axis.kind in ("uniform", "loguniform"):
                text = re.sub("; write .*", "; use int_uniform", text)
            found.append(f"{where}.{axis.kind}[{index}]{wrong.removeprefix(path)}: {text}")
    return found


def find_trial_mistakes(trial: Trial) -> list[str]:
    """Settings, each valid by itself, that do not go together."""
    training = trial.training
    found = [*find_family_mistakes(trial), *find_cooldown_mistakes(training), *find_encoder_mistakes(trial)]
    found += find_distilling_mistakes(trial) if trial.diffuses else []
    parts = count_sub_batches(training.batch_size)
    if parts % training.workers:
        found.append(
            f"training.workers: {training.workers} workers cannot share a batch_size of {training.batch_size}, whose "
            f"noise comes in {parts} sub-batches of {training.batch_size // parts}; "
            f"valid: {', '.join(str(n) for n in range(1, parts + 1) if parts % n == 0)}"
        )
    if isinstance(training.gpus, float) and training.workers > 1:
        found.append(
            f"training.gpus: {training.gpus:g} with training.workers: {training.workers}: NCCL, by which the workers "
            "of a trial exchange gradients, refuses two of them on one GPU; take gpus: 1, or workers: 1"
        )
    found += find_average_mistakes(training, trial.evaluation)
    return found + (_find_denoiser_mistakes(trial) if trial.diffuses else find_measuring_mistakes(trial.evaluation))


def _find_denoiser_mistakes(trial: Trial) -> list[str]:
    """The same of a process, what is predicted of it, and samplers."""
    T, continuous = trial.diffusion.steps, trial.diffusion.continuous
    of_process = find_continuous_mistakes(trial) if continuous else find_schedule_mistakes(trial.diffusion)
    found = [*of_process, *_find_objective_mistakes(trial)]
    found += [] if continuous else find_flow_mistakes(trial.evaluation, trial.diffusion.prediction)
    found += find_told_mistakes(trial)
    fid, kind = trial.evaluation.fid, trial.diffusion.schedule.kind
    ends_at_zero = not continuous and SCHEDULES[kind].ends_at_zero
    if ends_at_zero and fid and not SAMPLERS[fid.sampler.kind].without_signal:
        found.append(
            f"evaluation.fid.sampler.kind: {fid.sampler.kind} goes through noise levels sigma, and "
            f"diffusion.schedule.kind: {kind} begins at sigma_T = inf; take "
            f"{SAMPLERS.list_names(lambda sampler: sampler.without_signal)}, or another schedule"
        )
    if ends_at_zero and trial.evaluation.ode_nll:
        found.append(f"evaluation.ode_nll: diffusion.schedule.kind: {kind} ends at sigma_T = inf; leave one out")
    return found + find_evaluation_mistakes(trial.evaluation, T)


def _find_objective_mistakes(trial: Trial) -> Iterator[str]:
    """What is predicted, its variance and the loss must go together."""
    d, loss = trial.diffusion, trial.loss
    objective, weighting = OBJECTIVES[loss.objective], WEIGHTINGS[loss.weighting]
    if d.continuous or objective.family != trial.model.family:
        return
    if d.learned and not objective.teaches_variance:
        yield (
            f"diffusion.variance: {d.variance} is not trained by loss.objective: {loss.objective}, in which the "
            f"variance has no part; take objective: {OBJECTIVES.list_names(lambda other: other.teaches_variance)}, or "
            f"variance: {VARIANCES.list_names(lambda other: not other.learned)}"
        )
    if not d.learned and objective.needs_learned:
        yield (
            f"loss.objective: {loss.objective} adds the bound to teach a variance, but diffusion.variance: "
            f"{d.variance} is not learned; take variance: {VARIANCES.list_names(lambda v: v.learned)}, or objective: "
            f"{OBJECTIVES.list_names(lambda o: o.family == DENOISER and not o.needs_learned and not o.needs_teacher)}"
        )
    if d.learned and "weighting" in objective.reads and weighting.needs_fixed:
        yield (
            f"loss.weighting: {loss.weighting} weighs t by a fixed sigma_t^2, and diffusion.variance: {d.variance} has "
            "none; take objective: kl for the bound, or another weighting"
        )
    if trial.training.precision == "bf16" and not PREDICTIONS[d.prediction].in_bf16:
        yield (
            f"training.precision: bf16 has not the digits in which diffusion.prediction: {d.prediction} differs from "
            "x_t; take auto or float32, or another prediction"
        )


def find_flow_mistakes(evaluation: EvaluationConfig, prediction: str) -> list[str]:
    """Solvers that choose their own times need a network that says something between those of the training."""
    if PREDICTIONS[prediction].between_times:
        return []
    why = f"asks for eps between the times of the training, where diffusion.prediction: {prediction} has none"
    fid, found = evaluation.fid, [f"evaluation.ode_nll: {why}; set it to null"] if evaluation.ode_nll else []
    if fid and SAMPLERS[fid.sampler.kind].form == "whole":
        found.append(f"evaluation.fid.sampler.kind: {fid.sampler.kind} {why}; take heun or dpmpp")
    return found


def find_evaluation_mistakes(evaluation: EvaluationConfig, T: int | None) -> list[str]:
    """Settings of an evaluation, each valid by itself, that do not go together or with a chain of T steps.

    T is None of a continuous process.
    """
    found, nll, fid = [], evaluation.nll, evaluation.fid
    if evaluation.ema is not None and evaluation.ema_width is not None:
        found.append(
            f"evaluation.ema_width: {evaluation.ema_width:g} and evaluation.ema: {evaluation.ema:g} are two averages, "
            "and one is measured; leave one out"
        )
    if T is None and nll and nll.timesteps == "all":
        found.append(
            "evaluation.nll.timesteps: all T of them are not there in continuous time; give a number, so many an image"
        )
    if T is None and evaluation.variance:
        found.append(
            f"evaluation.variance: {evaluation.variance} is of the steps of a chain, and the process is continuous; "
            "leave it out"
        )
    if T is not None and nll and nll.timesteps != "all" and nll.timesteps > T:
        found.append(f"evaluation.nll.timesteps: {nll.timesteps} is more than diffusion.T = {T}; at most T, or all")
    found += find_sampler_mistakes(fid.sampler, T) if fid else []
    return found + find_measuring_mistakes(evaluation)


def find_measuring_mistakes(evaluation: EvaluationConfig) -> list[str]:
    """The same of settings that have nothing to do with a process."""
    found, fid = list[str](), evaluation.fid
    if evaluation.precision != "float32":
        own = {"ode_nll": evaluation.ode_nll, "fid.sampler": fid and SAMPLERS[fid.sampler.kind].form == "whole"}
        found += [
            f"evaluation.precision: {evaluation.precision} is too coarse for the error control of evaluation.{name}; "
            "take float32, or leave it out"
            for name, chosen in own.items()
            if chosen
        ]
    if evaluation.variance and VARIANCES[evaluation.variance].learned:
        found.append(
            f"evaluation.variance: {evaluation.variance} is made of what a network has learned; take "
            f"{VARIANCES.list_names(lambda v: not v.learned)}, or null for that of the checkpoint"
        )
    for name in fid.also if fid else ():
        if fid and (needs := MEASURES[name].needs) and needs != fid.features:
            found.append(f"evaluation.fid.also: {name} needs features: {needs}, not {fid.features}; leave one out")
    return found


def _find_search_mistakes(search: SearchConfig) -> list[str]:
    """Whether the parts of the search go together."""
    found = []
    drawn = [path for path, axis in search.space.items() if axis.kind != "grid"]
    if search.algorithm == "grid":
        found += [
            f"search.space.{p}: {search.space[p].kind} is drawn; set search.algorithm: random, sobol or optuna"
            for p in drawn
        ]
    elif not drawn:
        kinds = ", ".join(DRAWS)
        found.append(
            f"search.algorithm: {search.algorithm} has nothing to draw; give a path of search.space one of {kinds}"
        )
    elif search.samples is None:
        found.append(f"search.samples: missing; algorithm: {search.algorithm} needs a number of draws")
    found += [*_find_round_mistakes(search), *find_unread([search], where="search.")]
    size = math.prod([search.samples or 1, *(len(a.values) for a in search.space.values() if a.kind == "grid")])
    if size > MOST_VARIANTS:
        found.append(f"search.space: {size:,} variants are more than {MOST_VARIANTS:,}; take fewer values or samples")
    for index, left_out in enumerate(search.without):
        inside = (name for path, axis in search.space.items() for name in list_settings_set(path, axis))
        known = list(dict.fromkeys([*search.space, *inside]))
        found += [
            f"search.without[{index}].{p}: not a path of search.space{suggest_path(p, known)}"
            for p in left_out
            if p not in known
        ]
        if not left_out:
            found.append(f"search.without[{index}]: {{}} would leave out every variant; name paths and values")
    for (one, ours), (other, theirs) in itertools.combinations(search.space.items(), 2):
        if overlap(list_settings_set(one, ours), list_settings_set(other, theirs)):
            found.append(f"search.space.{other}: sets what search.space.{one} sets too; keep one of them")
    return found


def _find_round_mistakes(search: SearchConfig) -> Iterator[str]:
    """What concerns a search in rounds, and its objectives."""
    if search.algorithm == "optuna":
        for path, axis in search.space.items():
            if axis.kind == "grid":
                yield (
                    f"search.space.{path}: grid would cross each draw of algorithm: optuna with all of its values; "
                    f"write {{choice: {show(list(axis.values))}}}, from which one is drawn"
                )
        if search.batch and search.samples and search.batch > search.samples:
            yield (
                f"search.batch: {search.batch} a round are more than search.samples = {search.samples} in all; take "
                "at most as many, and fewer for the search to learn anything"
            )
    for name in dict.fromkeys(search.also):
        if search.objectives.count(name) > 1:
            yield f"search.also: {name} is an objective already; name each once"


def _find_metric_mistakes(search: SearchConfig, trial: Trial) -> list[str]:
    """A search must rank on something that is measured, and so its objectives; a single trial is not ranked."""
    found, fid = [], trial.evaluation.fid
    unread = {one.name for one in list_unread_of(trial)} if "model.kind" not in search.space else set()
    measured = list_comparable_metrics(fid) if fid else []
    for where, name in list_objectives(search):
        part = list_metrics()[name].part if search.space else None
        if part and search.space and f"evaluation.{part}" in unread:
            found.append(
                f"{where}: {name} is not measured of model.kind: {drop_pin(trial.model.kind)}, which has no such "
                f"likelihood; take {' or '.join(measured) or 'evaluation.fid'}"
            )
        elif part and getattr(trial.evaluation, part) is None:
            found.append(f"{where}: {name} is not measured, as evaluation.{part} is null; take another metric")
        elif part == "fid" and name not in (EVALUATIONS, *measured):
            made = " and ".join(measured)
            found.append(f"{where}: {name} is not measured; these settings of evaluation.fid make {made}")
    return found


TRIAL_SETTINGS = list_paths(Trial)
NOT_TRAINED = rf"training\.({'|'.join(PLACING)})$"


def get_space(content: Mapping[str, Any]) -> dict[str, Any]:
    """search.space as the file has it, empty where it has none."""
    search = content.get("search")
    space = search.get("space") if isinstance(search, Mapping) else None
    return dict(space) if isinstance(space, Mapping) else {}


def parse_axes(content: Mapping[str, Any]) -> dict[str, Axis]:
    """The valid entries of the search space, whatever else is wrong."""
    return {path: axis for path, entry in get_space(content).items() if (axis := parse_valid(Axis, entry))}


def _choose_values(axis: Axis) -> tuple[Any, ...]:
    """The values that stand for all: those of a grid or choice, the ends of a range as they are drawn."""
    return tuple(map(float, axis.values)) if axis.kind in ("uniform", "loguniform") else axis.values


def list_settings_set(path: str, axis: Axis) -> set[str]:
    """The settings that an axis of the search space sets in some trial."""
    return {leaf for value in _choose_values(axis) for leaf in list_leaves(path, value)}
