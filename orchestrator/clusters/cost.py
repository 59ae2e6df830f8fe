"""What a sweep takes in hours and money: its work, from speeds that were measured, on the machines that there are.

Speeds lie in the storage (`speeds/<key>.json`, a file for each network, precision and image shape, by hardware). A
sweep writes them as it goes, and `--calibrate` beforehand; nothing is guessed. `estimate` and `text` are pure.
"""

import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from orchestrator.clusters.cluster import Cluster, NodeType
from orchestrator.experiment.effort import Cost, count_cost, count_validations
from orchestrator.experiment.records import SearchConfig, Variant
from orchestrator.experiment.settings import read_text, read_yaml
from orchestrator.planning.makespan import Work, compute_makespan
from orchestrator.planning.place import Node, Size, find_nodes_in_use, list_never_fitting
from workers import speed
from workers.config import DataConfig, Measurement, Mistake, Record, Trial
from workers.data.sources import Source
from workers.evaluation.blocks import IMAGES, Images, count_reconstructions, count_reference_images, list_blocks
from workers.identity import compute_trial_id
from workers.layout import RowId, name_speed_file
from workers.sharing import round_as_ray
from workers.speed import CORE, Spent, add_spent, make_model_key, name_training_kind
from workers.storage import Storage

START_S = 20.0  # until the first trial trains, where no sweep has told: Ray, its workers, MLflow's database
RELEARNED = "it is learned again by the next sweep"
# The GPU of an instance family, by a part of the name that its driver gives it.
FAMILIES = {
    "g4dn": "T4", "g5": "A10G", "g6": "L4", "g6e": "L40S", "p3": "V100", "p4d": "A100", "p4de": "A100", "p5": "H100",
}  # fmt: skip


# ---- Speeds ----------------------------------------------------------------------------------------------------


def learn(storage: Storage, trial: Trial, source: Source, hardware: str, spent: Spent, *, said_by: str) -> None:
    """Keeps what work of each kind took; of a kind that was known the newer counts."""
    if not spent:
        return
    path = _name_file(trial, source)
    known = storage.read_sealed(path, RELEARNED) or {}
    before = known.get(hardware, {})
    known[hardware] = {
        "host": socket.gethostname(),
        "said_by": said_by,
        "date": time.strftime("%Y-%m-%d"),
        "work": {**before.get("work", {}), **{kind: list(each) for kind, each in spent.items()}},
    }
    storage.write_sealed(path, known)


def _name_file(trial: Trial, source: Source) -> str:
    return name_speed_file(make_model_key(trial.model, trial.training, source.diffused, trial.evaluation.precision))


def split_spent(made: Spent, trial: Trial, source: Source) -> Spent:
    """What blocks took, by the kinds of work in a speed file: from a number of blocks to what they are made of."""
    total, kinds = _count_work(trial, source), _count_blocks(trial, source)
    spent: Spent = {}
    for kind, (count, seconds) in made.items():
        spent = add_spent(spent, {_name_work(kind, trial): (count / kinds[kind] * total[kind], seconds)})
    return spent


def estimate_longest_block_s(storage: Storage, trial: Trial, source: Source, *, on_gpu: bool) -> float | None:
    """How long a block of the trial's evaluation takes: of the kind that takes longest, on the slowest known hardware.

    None where a speed is not known.
    """
    known = storage.read_sealed(_name_file(trial, source), RELEARNED) or {}
    works = [each["work"] for name, each in known.items() if name.endswith(CORE) != on_gpu]
    total, kinds = _count_work(trial, source), _count_blocks(trial, source)
    if not works or any(_name_work(kind, trial) not in work for kind in kinds for work in works):
        return None
    slowest = {kind: max(_divide(work[_name_work(kind, trial)]) for work in works) for kind in kinds}
    return max((total[kind] / count * slowest[kind] for kind, count in kinds.items()), default=0.0)


def estimate_checkpoint_s(storage: Storage, trial: Trial, source: Source) -> float | None:
    """How long it takes from one checkpoint of the trial to the next, on the fastest hardware that was measured; None
    where no speed is known."""
    training = trial.training
    works = [each["work"] for each in (storage.read_sealed(_name_file(trial, source), RELEARNED) or {}).values()]
    speeds = [_divide(work[kind]) for work in works if (kind := _find_similar(name_training_kind(training), work))]
    images = min(training.checkpoint_every, training.steps) * training.batch_size / training.workers
    return images * min(speeds) if speeds else None


def _count_blocks(trial: Trial, source: Source) -> Counter[str]:
    return Counter(block.kind for block in list_blocks(Measurement.of(trial), "", Images.of(source)))


def _count_work(trial: Trial, source: Source) -> dict[str, float]:
    """How much work the blocks of each kind are together."""
    price = count_cost(trial, source)
    bounds = {"nll": price.nll_evaluations, "ode_nll": price.ode_nll_evaluations}
    images = _count_feature_images(trial, source)
    made = {"samples": price.sampling_evaluations - images["held_out"], "reconstructions": images["held_out"]}
    return {**bounds, "latents": IMAGES * _count_blocks(trial, source)["latents"], **made, **images}


def _name_work(kind: str, trial: Trial) -> str:
    """The kind of work in a speed file that blocks of a kind are."""
    fid = trial.evaluation.fid
    kind = {"reconstructions": "samples", "latents": "nll"}.get(kind, kind)  # either is a pass an image
    return f"features-{fid.features}" if fid and kind in ("features", "reference", "held_out") else kind


def _count_feature_images(trial: Trial, source: Source) -> dict[str, int]:
    fid, again = trial.evaluation.fid, count_reconstructions(Measurement.of(trial), Images.of(source))
    real = count_reference_images(fid, Images.of(source)) if fid else 0
    return {"features": (fid.samples if fid else 0) + again, "reference": real, "held_out": again}


# ---- Prices ----------------------------------------------------------------------------------------------------


Price = Annotated[float, Field(ge=0, le=1e6)]


class Prices(Record):
    """`prices.yaml`: what an hour of an instance costs. The user's to keep: the program knows no price by itself."""

    currency: str
    date: str = Field(description="of the prices")
    source: str
    hourly: dict[str, Price] = Field(description="by instance type, on demand")
    spot: dict[str, Price] = Field(default_factory=dict, description="the same for spot instances")


def read_prices(path: Path) -> Prices:
    """Raises Mistake with all that is wrong with the file."""
    try:
        content, problems = read_yaml(read_text(path))
        if not problems:
            return Prices.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    except (OSError, ValueError) as error:
        problems = [str(error)]
    raise Mistake("\n  ".join([f"--prices {path}:", *problems]))


# ---- The plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a sweep takes where nothing of it is there: `training_s` and `evaluation_s` are of one core or GPU."""

    hardware: str
    wall_s: float
    training_s: float
    evaluation_s: float
    said_by: str  # what has measured the speeds
    scaled: bool  # whether a number of workers was asked for that nobody has measured


@dataclass(frozen=True)
class Unknown:
    """Why there is no plan."""

    why: str


def estimate(
    trials: Sequence[Trial],
    sources: Mapping[DataConfig, Source],
    speeds: Mapping[str, Mapping[str, Any]],
    hardware: str,
    nodes: Sequence[Node],
    *,
    cores: float,
    most: int | None,
) -> Plan | Unknown:
    """The plan for `trials` on `nodes` of which each worker has one `hardware`.

    `speeds` holds the content of a speed file by its path. Reference features count once per data set, the bound once
    per checkpoint, and the training once per trial, as far as the longest row asks.
    """
    on_gpus = any(node.gpus for node in nodes)
    works, said_by, scaled, referenced = [], list[str](), False, set[Any]()
    ids = [compute_trial_id(trial, sources[trial.data].digest) for trial in trials]
    longest: dict[str, int] = {}
    for trial, trained in zip(trials, ids, strict=True):
        longest[trained] = max(longest.get(trained, 0), trial.training.steps)
    for trial, trained in zip(trials, ids, strict=True):
        source = sources[trial.data]
        known = speeds.get(_name_file(trial, source), {}).get(hardware)
        if known is None:
            return Unknown(f"no throughput is known of this model on {hardware}")
        work = known["work"]
        kind = _find_similar(name_training_kind(trial.training), work)
        price = count_cost(trial, source)
        wanted = _count_evaluation(trial, source, price, first=(trial.data, trial.evaluation.fid) not in referenced)
        missing = [name for name in wanted if name not in work] + ["training"] * (kind is None)
        if missing or kind is None:
            return Unknown(f"no throughput is known of {', '.join(sorted(set(missing)))} on {hardware}")
        referenced.add((trial.data, trial.evaluation.fid))
        scaled |= kind != name_training_kind(trial.training)
        checkpoint = trained, trial.training.steps
        if (checkpoint, trial.evaluation.nll) in referenced:
            wanted.pop("nll", None)
        images, training = price.training_evaluations / trial.training.workers, 0.0
        if trained not in referenced and trial.training.steps == longest[trained]:
            training = images * _divide(work[kind]) + _estimate_validation(trial, price, work)
            referenced.add(trained)
        referenced.add((checkpoint, trial.evaluation.nll))
        size = Size.of(trial.training, _count_gpus(trial, on_gpus))
        # Of a trial that shares a GPU speeds count its part of the time.
        wall_s = training / (size.gpus if on_gpus and 0 < size.gpus < 1 else 1)
        works.append(Work(size, wall_s, sum(n * _divide(work[name]) for name, n in wanted.items())))
        said_by.append(f"{known['said_by']} on {known['date']}")
    start = [each for file in speeds.values() if (each := file.get(hardware, {}).get("work", {}).get("start"))]
    return Plan(
        hardware,
        compute_makespan(works, nodes, cores, most) + (_divide(start[-1]) if start else START_S),
        sum(w.training_s * w.size.workers * (w.size.gpus if on_gpus and w.size.gpus else 1) for w in works),
        sum(w.evaluation_s for w in works),
        ", ".join(dict.fromkeys(said_by)),
        scaled,
    )


def _count_evaluation(trial: Trial, source: Source, price: Cost, first: bool) -> dict[str, float]:
    """How much work of each kind measuring a trial is."""
    wanted: dict[str, float] = {}
    if trial.evaluation.nll:
        wanted["nll"] = price.nll_evaluations
    if trial.evaluation.ode_nll:
        wanted["ode_nll"] = price.ode_nll_evaluations
    if fid := trial.evaluation.fid:
        images = _count_feature_images(trial, source)
        wanted["samples"] = price.sampling_evaluations
        wanted[f"features-{fid.features}"] = images["features"] + first * (images["reference"] + images["held_out"])
    return wanted


def _estimate_validation(trial: Trial, price: Cost, work: Mapping[str, Any]) -> float:
    """Measured as such where it was, else as so many evaluations of the network."""
    if "validations" in work:
        return count_validations(trial) * _divide(work["validations"])
    return price.validation_evaluations * _divide(work.get("nll") or work["samples"])


def _find_similar(kind: str, work: Mapping[str, Any]) -> str | None:
    """The kind of training itself, or the one that was measured the longest, per image of a worker."""
    if kind in work:
        return kind
    others = [name for name in work if name.startswith("training-")]
    return max(others, key=lambda name: work[name][0], default=None)


def _divide(counted: Sequence[float]) -> float:
    return counted[1] / counted[0]


# ---- In words --------------------------------------------------------------------------------------------------


def describe_cost(
    trials: Mapping[RowId, Variant],
    sources: Mapping[DataConfig, Source],
    storage: Storage,
    search: SearchConfig,
    *,
    cluster: Cluster | None,
    prices: Prices | None,
) -> str:
    """Hours and price of the whole sweep, on the cluster of a file or here, or why they are not known."""
    machines = list_machines(trials, search, cluster) if cluster else []
    found = make_plan(trials, sources, storage, search, machines)
    if isinstance(found, Unknown):
        return (
            f"Time: {found.why}. Run the sweep once, or --dry-run --calibrate on such a machine, "
            "with the same --storage: it takes seconds."
        )
    unit = "core" if found.hardware.endswith(CORE) else "GPU"
    lines = [
        f"Time: about {format_duration(found.wall_s)} on {_describe_place(machines, unit)}: "
        f"{_format_hours(found.training_s, unit)} of training and {_format_hours(found.evaluation_s, unit)} of "
        f"evaluation, at the throughput of {found.hardware}, measured by {found.said_by}."
    ]
    if found.scaled:
        lines.append("Data-parallel training of this size was not measured: it is taken to be as fast a worker.")
    if cluster:
        lines += ["The time that nodes take to start is not in it.", describe_price(machines, found.wall_s, prices)]
    return "\n".join(lines)


def make_plan(
    trials: Mapping[RowId, Variant],
    sources: Mapping[DataConfig, Source],
    storage: Storage,
    search: SearchConfig,
    machines: Sequence[NodeType] = (),
) -> Plan | Unknown:
    """The plan from what the storage knows, on `machines` of a cluster or else on this one."""
    configs = [v.trial for v in trials.values()]
    paths = dict.fromkeys(_name_file(trial, sources[trial.data]) for trial in configs)
    speeds = {path: content for path in paths if (content := storage.read_sealed(path, RELEARNED))}
    known = {name: each for file in speeds.values() for name, each in file.items()}
    hardware = choose_hardware(known, machines)
    if hardware is None:
        on = "this machine" if not machines else ", ".join(dict.fromkeys(m.instance or m.name for m in machines))
        return Unknown(f"no throughput is known of these models on {on}")
    if machines:
        nodes, cores = [m.node for m in machines], sum(m.node.cpus for m in machines)
    else:  # as `execution.session.session` starts Ray
        cores = speed.count_cores()
        nodes = [Node(cores + 1, 0 if hardware.endswith(CORE) else 1)]
    return estimate(configs, sources, speeds, hardware, nodes, cores=cores, most=_count_machines(search))


def list_machines(trials: Mapping[RowId, Variant], search: SearchConfig, cluster: Cluster) -> list[NodeType]:
    """The head, and the nodes that the trials would make the cluster have.

    Raises Mistake with all sizes of trials that it never holds.
    """
    kinds, nodes = cluster.kinds(), cluster.nodes()
    there = any(node.gpus for node in nodes)
    sizes = [Size.of(v.trial.training, _count_gpus(v.trial, there)) for v in trials.values()]
    if problems := list_never_fitting(sizes, nodes):
        raise Mistake("\n".join(problems))
    return [kinds[0], *(kinds[i] for i in find_nodes_in_use(sizes, nodes, _count_machines(search)) if i)]


def _count_machines(search: SearchConfig) -> int | None:
    return None if search.max_concurrent == "auto" else search.max_concurrent


def _count_gpus(trial: Trial, there: bool) -> float:
    """GPUs per worker; of `auto` a whole one, as how many trials share it is measured when they train."""
    return int(there) if trial.training.gpus == "auto" else round_as_ray(trial.training.gpus)


def choose_hardware(known: Mapping[str, Mapping[str, Any]], machines: Sequence[NodeType]) -> str | None:
    """The hardware to plan for, of those with a known throughput: the machines', or else what this one has."""
    gpus = [name for name in known if not name.endswith(CORE)]
    cores = sorted((name for name in known if name.endswith(CORE)), key=lambda name: name != speed.name_hardware())
    if not machines:
        mine = [name for name in gpus if known[name]["host"] == socket.gethostname()]
        return next(iter([*mine, *(name for name in cores if name == speed.name_hardware())]), None)
    with_gpus = [m for m in machines if m.node.gpus]
    if not with_gpus:
        return next(iter(cores), None)
    wanted = [FAMILIES.get((m.instance or "").partition(".")[0]) for m in with_gpus]
    fitting = [name for part in wanted for name in gpus if part is None or part in name.replace("-", " ").split()]
    return next(iter(fitting), None)


def describe_price(machines: Sequence[NodeType], wall_s: float, prices: Prices | None) -> str:
    """What the machines cost for the whole time."""
    if prices is None:
        return "Price: not given; write hourly prices by instance type into prices.yaml beside the cluster file."
    total, terms, missing = 0.0, list[str](), list[str]()
    for kind, n in Counter(machines).items():
        name = kind.instance or kind.name
        spot = prices.spot.get(name) if kind.spot else None
        hourly = prices.hourly.get(name) if spot is None else spot
        if hourly is None:
            missing.append(name)
            continue
        how = "" if not kind.spot else " (spot)" if spot is not None else " (on demand, as no spot price is given)"
        total += n * hourly * wall_s / 3600
        terms.append(f"{n} {name} at {hourly:g}{how}")
    if missing:
        return f"Price: not known, as the price file does not give {', '.join(dict.fromkeys(missing))}."
    return (
        f"Price: about {prices.currency} {total:,.2f} with {', '.join(terms)} an hour, all of the time "
        f"({prices.source}, {prices.date})."
    )


def _describe_place(machines: Sequence[NodeType], unit: str) -> str:
    if not machines:
        return "this machine"
    total = sum(m.node.gpus if unit == "GPU" else m.node.cpus for m in machines)
    return f"{total:g} {unit}{'s' * (total != 1)} of {len(machines)} machine{'s' * (len(machines) != 1)}"


def _format_hours(seconds: float, unit: str) -> str:
    return f"{seconds / 3600:,.1f} {unit}-hours" if seconds >= 3600 else f"{seconds / 60:.1f} {unit}-minutes"


def format_duration(seconds: float) -> str:
    """42 s, 4 min 40 s, 3.2 h, 2.5 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
