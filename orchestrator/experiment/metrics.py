"""The metrics that trials can be ranked on or traded off in. Of all of them, lower is better."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from workers.bits import STUDENT
from workers.evaluation.blocks import name_space
from workers.kinds import MEASURES, SPACES, MeasureEntry

NLL, DENSITY, EVALUATIONS = "eval/nll_bpd", "eval/density_bpd", "eval/network_evaluations"
CONTINUOUS_NLL, CONTINUOUS_DENSITY = "eval/continuous_nll_bpd", "eval/continuous_density_bpd"


@dataclass(frozen=True, kw_only=True)
class Metric:
    head: str  # of its column, and its name in a sentence
    part: str | None  # of `evaluation` that measures it; None, the validation while training
    by_image: str = ""  # of a mean over images: where a summary has its values by image
    is_rank: bool = True  # whether trials can be ranked on it, and not only traded off


def _list_measures(measures: Iterable[MeasureEntry], spaces: Sequence[str]) -> Iterator[tuple[str, Metric]]:
    """Those of samples, in each feature space. In Inception's they have the bare names."""
    named = [name_space(space) for space in spaces if space != "inception"]
    for name in (f"fd_{space}" for space in named):
        yield f"eval/{name}", Metric(head=name, part="fid")
    for name in (f"reconstruction_fd_{name_space(space)}" for space in spaces):
        yield f"eval/{name}", Metric(head=name, part="fid", is_rank=False)
    for measure in measures:
        for key in measure.lower:
            for name in (key,) if measure.needs else (key, *(f"{key}_{space}" for space in named)):
                yield f"eval/{name}", Metric(head=name, part="fid")


METRICS = {
    NLL: Metric(head="NLL bits/dim", part="nll", by_image="nll_per_image"),
    DENSITY: Metric(head="density bits/dim", part="nll", by_image="density_per_image"),
    "eval/fid": Metric(head="fid", part="fid"),
    "eval/fd_classifier": Metric(head="fd_classifier", part="fid"),
    "eval/ode_nll_bpd": Metric(head="ODE NLL bits/dim", part="ode_nll", by_image="ode_nll_per_image"),
    "eval/ode_density_bpd": Metric(head="ODE density bits/dim", part="ode_nll", by_image="ode_density_per_image"),
    CONTINUOUS_NLL: Metric(head="continuous NLL bits/dim", part="nll", by_image="nll_per_image"),
    CONTINUOUS_DENSITY: Metric(head="continuous density bits/dim", part="nll", by_image="density_per_image"),
    "valid/nll_bpd": Metric(head="validation bits/dim", part=None),
    "valid/density_bpd": Metric(head="validation density bits/dim", part=None),
    STUDENT: Metric(head="teacher MSE", part=None),
    EVALUATIONS: Metric(head="network_evaluations", part="fid", is_rank=False),
    **dict(_list_measures(MEASURES.values(), list(SPACES))),
}
# Likelihoods of data in levels, each with that of data that are not discrete.
DENSITIES = {
    NLL: DENSITY,
    CONTINUOUS_NLL: CONTINUOUS_DENSITY,
    "eval/ode_nll_bpd": "eval/ode_density_bpd",
    "valid/nll_bpd": "valid/density_bpd",
}
NLLS = {density: nll for nll, density in DENSITIES.items()}
BOUNDS = (NLL, DENSITY, CONTINUOUS_NLL, CONTINUOUS_DENSITY)  # of which a model has one
RANKS = tuple(name for name, metric in METRICS.items() if metric.is_rank)


def choose_bound(continuous: bool) -> str:
    """The name of the bound of a process: one in continuous time has its own."""
    return CONTINUOUS_NLL if continuous else NLL


def list_metrics() -> dict[str, Metric]:
    """METRICS, with those of the measures and in the feature spaces from outside that were named."""
    measures = [*MEASURES.values(), *(entry for entry, _ in MEASURES.outside.values())]
    return dict(_list_measures(measures, [*SPACES, *SPACES.outside])) | METRICS


def choose_likelihood(metric: str, levels: int | None) -> str:
    """What stands in the place of a metric of data in so many levels, None being not discrete: mostly itself."""
    return (DENSITIES if levels is None else NLLS).get(metric, metric)


def list_other_kinds(metric: str) -> list[str]:
    """Likelihoods that a model has in the place of this one, where its data or its time are of another kind."""
    if metric in BOUNDS:
        return [name for name in BOUNDS if name != metric]
    return [other for table in (DENSITIES, NLLS) if (other := table.get(metric))]


def head_metric(name: str) -> str:
    """What a metric is called in tables and sentences; one that is not in METRICS goes by the end of its name."""
    return METRICS[name].head if name in METRICS else name.removeprefix("eval/")
