"""How often a sampler evaluates the network: for one prediction, and for a sample."""

from workers.config import SamplerConfig
from workers.entries import call
from workers.kinds import SAMPLERS


def is_guided(guidance: float | None) -> bool:
    """Whether a prediction at this scale takes two, with the label and without: 0 and 1 are one of them alone."""
    return guidance not in (None, 0, 1)


def count_passes(sampler: SamplerConfig) -> int:
    """Evaluations of the network for one prediction."""
    return 2 if is_guided(sampler.guidance) else 1


def plan_evaluations(sampler: SamplerConfig, T: int) -> int:
    """Evaluations of the network that a sample costs: so many, or about so many where error control decides it.

    Raises CodeError.
    """
    count = call(sampler.kind, SAMPLERS[sampler.kind].evaluations, sampler, min(sampler.steps or T, T))
    return count_passes(sampler) * int(count)


def count_evaluations(sampler: SamplerConfig, T: int) -> int | None:
    """The same; None where it is not known beforehand."""
    return plan_evaluations(sampler, T) if SAMPLERS[sampler.kind].exact else None
