"""How often a sampler evaluates the network: for one prediction, and for a sample."""

from workers.config import SAMPLE_GRID_STEPS, SamplerConfig
from workers.entries import call
from workers.kinds import SAMPLERS
from workers.students import Student, choose_own_sampler

JUMP, TEACHER_STEPS = SamplerConfig(kind="consistency", steps=1), 10  # what a validation holds against each other


def is_guided(guidance: float | None) -> bool:
    """Whether a prediction at this scale takes two, with the label and without: 0 and 1 are one of them alone."""
    return guidance not in (None, 0, 1)


def count_passes(sampler: SamplerConfig) -> int:
    """Evaluations of the network for one prediction."""
    return 2 if is_guided(sampler.guidance) else 1


def plan_evaluations(sampler: SamplerConfig, T: int | None) -> int:
    """Evaluations of the network that a sample costs: so many, or about so many where error control decides it.

    T is None of a continuous process, which has no other steps than are asked for. Raises CodeError.
    """
    steps = sampler.steps or 0 if T is None else min(sampler.steps or T, T)
    count = call(sampler.kind, SAMPLERS[sampler.kind].evaluations, sampler, steps)
    return count_passes(sampler) * int(count)


def count_evaluations(sampler: SamplerConfig, T: int | None) -> int | None:
    """The same; None where it is not known beforehand."""
    return plan_evaluations(sampler, T) if SAMPLERS[sampler.kind].exact else None


def choose_grid_sampler(T: int | None, student: Student | None = None) -> SamplerConfig:
    """How the samples of a validation are drawn: DDIM, or of a continuous process, whose T is None, Heun's rule; of a
    student as it was made to be."""
    if student:
        return choose_own_sampler(student)
    if T is None:
        return SamplerConfig(kind="heun", steps=SAMPLE_GRID_STEPS // 2)
    return SamplerConfig(kind="ddim", steps=min(SAMPLE_GRID_STEPS, T))
