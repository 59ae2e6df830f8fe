"""From an experiment to its trials: every point of its search space, and which of them are one and the same trial.

Experiment -> expand -> Variants -> by_row -> rows by their id
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from orchestrator.experiment.records import Experiment, SearchConfig, Variant
from orchestrator.experiment.settings import (
    list_leaves,
    merge,
    put,
)
from orchestrator.experiment.starts import find_origins, list_needed, list_slots, make_pin
from workers.config import DataConfig, Measurement, Record, Trial
from workers.identity import compute_digest, compute_trial_id, describe_evaluation
from workers.layout import RowId, TrialId, get_trial_of_row, make_row_id
from workers.sections import OWN_ONLY
from workers.warm_start import TRUNK, pin_models, split_pin

# From u uniform in [0, 1) and the values or ends of an axis to the value drawn.
DRAWS: dict[str, Callable[[tuple[Any, ...], float], Any]] = {
    "choice": lambda values, u: values[int(u * len(values))],
    "uniform": lambda ends, u: ends[0] + u * (ends[1] - ends[0]),
    "loguniform": lambda ends, u: min(ends[0] * (ends[1] / ends[0]) ** u, ends[1]),
    "int_uniform": lambda ends, u: ends[0] + int(u * (ends[1] - ends[0] + 1)),
}


def draw_uniform(*words: int | str) -> float:
    """A number in [0, 1) addressed by `words`: the same everywhere and for ever."""
    content = hashlib.sha256(json.dumps(words).encode()).digest()
    return (int.from_bytes(content[:8]) >> 11) / 2**53


def _draw_random(paths: Sequence[str], n: int, seed: int) -> Iterator[dict[str, float]]:
    """A draw depends on the seed, its own number and its path alone: other paths of the space do not move it."""
    return ({path: draw_uniform(seed, sample, path) for path in paths} for sample in range(n))


def _draw_sobol(paths: Sequence[str], n: int, seed: int) -> Iterator[dict[str, float]]:
    """The points of a Sobol sequence scrambled by the seed (Owen 1998), a dimension a path: of any 2^k that follow
    each other from a multiple of 2^k on, each path has one in every 2^k-th of [0, 1)."""
    if not paths:
        return iter(())
    from scipy.stats.qmc import Sobol  # most of a second, and only this needs it

    points = Sobol(len(paths), rng=seed).random_base2(max(0, n - 1).bit_length())[:n]
    return (dict(zip(paths, map(float, point), strict=True)) for point in points)


# The numbers in [0, 1) that each algorithm draws for the paths that are drawn: a dict a draw, the first ones the same
# whatever their number. An optuna search asks for what comes after its first round: see orchestrator.planning.search.
NUMBERS: dict[str, Callable[[Sequence[str], int, int], Iterator[dict[str, float]]]] = {
    "grid": _draw_random,
    "random": _draw_random,
    "sobol": _draw_sobol,
    "optuna": _draw_sobol,
}


def expand(experiment: Experiment) -> tuple[Variant, ...]:
    """Every trial that the experiment means, in the order of the file, the last path changing fastest; of an optuna
    search those of its first round.

    More samples keep the earlier draws. A search crosses each draw with the grids, which so see the same draws.
    """
    return make_variants(experiment, _list_points(experiment.search, experiment.seed))


def make_variants(experiment: Experiment, points: Iterable[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The trials at points of the search space, each its values by path."""
    base = _dump_to_change(experiment.trial)
    trial = experiment.trial
    made: dict[str, Any] = {}  # sections by what changes them: thousands of trials have few different ones

    def get_section(name: str, params: dict[str, Any]) -> Any:
        if (key := f"{name} {params}") not in made:
            content = merge(base[name], _make_update(params)[name])
            made[key] = getattr(Trial.model_validate({**dict(trial), name: content}, context=OWN_ONLY), name)
        return made[key]

    def make_variant(params: Mapping[str, Any]) -> Variant:
        changed: dict[str, dict[str, Any]] = {}
        for path, value in params.items():
            changed.setdefault(path.partition(".")[0], {})[path] = value
        sections = {name: get_section(name, values) for name, values in changed.items()}
        pinned = pin_models(trial.model_copy(update=sections), experiment.pins, experiment.latents)
        return Variant(params=dict(params), trial=pinned)

    return tuple(map(make_variant, points))


def _dump_to_change(record: Record) -> dict[str, Any]:
    """The settings of a record, without the defaults of a kind from outside: one that takes its place has its own."""
    own = (record.model_extra or {}).keys() - record.model_fields_set
    return {n: _dump_to_change(v) if isinstance(v, Record) else v for n, v in record if n not in own}


def _list_points(search: SearchConfig, seed: int) -> Iterator[dict[str, Any]]:
    space = search.space
    paths = [path for path, axis in space.items() if axis.kind != "grid"]
    for numbers in NUMBERS[search.algorithm](paths, search.first, seed):
        drawn = {path: DRAWS[space[path].kind](space[path].values, u) for path, u in numbers.items()}
        points = itertools.product(*(a.values if p not in drawn else (drawn[p],) for p, a in space.items()))
        for point in (dict(zip(space, values, strict=True)) for values in points):
            if not is_left_out(search, point):
                yield point


def is_left_out(search: SearchConfig, point: Mapping[str, Any]) -> bool:
    """Whether the file leaves a point out: by all values of one of `search.without`, each that of a path of the space
    or of a setting inside of one, or a list of such values."""
    if not search.without:
        return False
    found = {**{leaf: v for path, value in point.items() for leaf, v in list_leaves(path, value).items()}, **point}
    return any(
        all(path in found and _is_one_of(found[path], value) for path, value in values.items())
        for values in search.without
    )


def _is_one_of(value: Any, wanted: Any) -> bool:
    return value == wanted or (isinstance(wanted, list) and value in wanted)


def _make_update(params: Mapping[str, Any]) -> dict[str, Any]:
    update: dict[str, Any] = {}
    for path, value in params.items():
        update = merge(update, put({}, path.split("."), value))
    return update


def group_by_row(
    variants: Sequence[Variant],
    data_digests: Mapping[DataConfig, str],
    always: bool = False,
    named: Mapping[str, Trial] = MappingProxyType({}),
) -> tuple[dict[RowId, Variant], list[str]]:
    """The rows of a sweep in order, each variant by the id of its row, and warnings.

    Variants that differ only in how far they are trained and in how they are measured share a trial, which is trained
    once: the id of each is the trial's with a suffix for its step and measurement (`get_trial_of_row` takes it off).
    `always` gives every row such an id, for where variants that are still to come may share its trial. Variants that
    are alike in both are one row: the first stands for all, and a warning names how many and why. What variants start
    from has rows, too, before theirs, where no variant asks for just that; `named` are the trials of `needs`.
    """
    trained: dict[TrialId, dict[str, list[Variant]]] = {}
    for variant in (*list_needed(variants, named), *variants):
        measurements = trained.setdefault(compute_trial_id(variant.trial, data_digests[variant.trial.data]), {})
        evaluation = describe_evaluation(Measurement.of(variant.trial))
        measured = compute_digest([variant.trial.training.steps, evaluation])[:8]
        measurements.setdefault(measured, []).append(variant)
    found, repeats = dict[RowId, Variant](), list[set[str]]()
    for trial, measurements in trained.items():
        measurements = _drop_unneeded(measurements)
        for measured, (first, *others) in measurements.items():
            found[make_row_id(trial, measured if always or len(measurements) > 1 else "")] = first
            for variant in others:
                ours, theirs = (list_leaves("", v.params).items() for v in (variant, first))
                same = [name for name, value in ours if (name, value) in theirs]
                repeats.append({n.removeprefix(".") for n, _ in [*ours, *theirs] if n not in same})
    if not repeats:
        return found, []
    names = ", ".join(sorted(set().union(*repeats)))
    why = f"differ from it only in {names}, which their other settings leave without effect" if names else "equal it"
    count = sum(not variant.role for variant in found.values())
    return found, [f"{len(variants)} variants are {count} trials: {len(repeats)} repeat another one ({why})"]


def _drop_unneeded(measurements: Mapping[str, Sequence[Variant]]) -> dict[str, list[Variant]]:
    """The rows of a trial without those that others start from, where a variant asks for the same step itself."""
    asked = {v.trial.training.steps for group in measurements.values() for v in group if not v.role}
    kept = {
        name: [v for v in group if not v.role or v.trial.training.steps not in asked]
        for name, group in measurements.items()
    }
    return {name: group for name, group in kept.items() if group}


def find_starting_rows(
    rows: Mapping[RowId, Variant], data_digests: Callable[[DataConfig], str]
) -> dict[RowId, dict[str, RowId]]:
    """The rows that each of those which start from others starts from, by their slots."""
    slots = {row: sources for row, variant in rows.items() if (sources := list_slots(variant.trial))}
    if not slots:
        return {}
    by_pin = {make_pin(get_trial_of_row(row), variant.trial.training.steps): row for row, variant in rows.items()}
    found: dict[RowId, dict[str, RowId]] = {}
    for row, sources in slots.items():
        pins = {slot: split_pin(source)[1] for slot, source in sources.items()}
        if TRUNK in pins:
            trunk = find_origins(rows[row].trial, {})[TRUNK].trial
            pins[TRUNK] = make_pin(compute_trial_id(trunk, data_digests(trunk.data)), trunk.training.steps)
            assert pins[TRUNK] in by_pin, row
        if there := {slot: by_pin[pin] for slot, pin in pins.items() if pin in by_pin}:
            found[row] = there
    return found
