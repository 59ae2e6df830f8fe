"""What a student is: a network that learned from a teacher how to draw in few steps, and that has no bound.

Its output is where its teacher's flow leads to, and no posterior mean, so that it means something to the sampler alone
that it was made for. Without torch, so that the check of a file knows it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workers.config import EvaluationConfig, LossConfig, SamplerConfig
from workers.kinds import OBJECTIVES, SAMPLERS
from workers.mistakes import Mistake
from workers.warm_start import split_pin

FEW = 2  # steps of a student that has none of its own


@dataclass(frozen=True)
class Student:
    """What is known of a student beside its network, in a trial as in a checkpoint."""

    objective: str
    teacher: str  # what it is pinned to (`workers.warm_start`); empty in a file that is still to be pinned
    steps: int | None = None  # that it has, of a process of T times evenly spaced; None: it has no steps of its own
    guidance: float | None = None  # of its teacher

    def __str__(self) -> str:
        steps = f" in {self.steps} step{'s' * (self.steps > 1)}" if self.steps else ""
        return f"a student of {self.teacher or 'its teacher'} by {self.objective}{steps}"

    def describe(self) -> dict[str, Any]:
        """For a passport."""
        guided = {} if self.guidance is None else {"guidance of the teacher": self.guidance}
        return {"bound": f"no bound: {self}", **guided}


def describe_student(loss: LossConfig) -> Student | None:
    """What training by these settings makes; None where it is no student."""
    if not OBJECTIVES[loss.objective].drawn_by:
        return None
    steps = loss.student_steps if "student_steps" in OBJECTIVES[loss.objective].reads else None
    pin, guidance = (split_pin(loss.teacher.source)[1], loss.teacher.guidance) if loss.teacher else ("", None)
    return Student(loss.objective, pin, steps, guidance)


def find_student_mistakes(student: Student, evaluation: EvaluationConfig) -> Iterator[str]:
    """What is asked of a student that it has not."""
    for name in ("nll", "ode_nll"):
        if getattr(evaluation, name):
            yield (
                f"evaluation.{name}: {student} has no bound and no likelihood, as it says where its teacher's flow "
                "leads to and no posterior mean; set it to null"
            )
    if evaluation.fid:
        yield from find_drawing_mistakes(student, evaluation.fid.sampler)


def find_drawing_mistakes(student: Student | None, sampler: SamplerConfig) -> Iterator[str]:
    """A sampler that does not go with a student, or one that goes with students alone."""
    where = "evaluation.fid.sampler"
    if student is None:
        if SAMPLERS[sampler.kind].of_students:
            makers = OBJECTIVES.list_names(lambda entry: sampler.kind in entry.drawn_by)
            yield f"{where}.kind: {sampler.kind} draws from students alone (loss.objective: {makers}); take another"
        return
    drawn_by = OBJECTIVES[student.objective].drawn_by
    if sampler.kind not in drawn_by:
        yield f"{where}.kind: {sampler.kind} does not draw from {student}; take {' or '.join(drawn_by)}"
    elif student.steps and (sampler.eta or sampler.steps not in (None, student.steps)):
        asked = f"eta: {sampler.eta:g}" if sampler.eta else f"steps: {sampler.steps}"
        yield f"{where}: {asked} is asked of {student}; take steps: {student.steps} or null, and eta: 0"


def choose_own_sampler(student: Student, steps: int | None = None) -> SamplerConfig:
    """How a student is drawn from where nobody says it."""
    return SamplerConfig(kind=OBJECTIVES[student.objective].drawn_by[0], steps=steps or student.steps or FEW)


def check_drawing(student: Student | None, sampler: SamplerConfig) -> None:
    """Raises Mistake with what keeps a sampler from drawing."""
    if problems := list(find_drawing_mistakes(student, sampler)):
        raise Mistake("\n".join(problems))


def write_student(student: Student) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    return {name: value for name, value in vars(student).items() if value is not None}


def read_student(content: Any) -> Student:
    """Raises ValueError where a checkpoint does not say it as `write_student` does."""
    if not isinstance(content, Mapping) or not {"objective", "teacher"} <= content.keys() <= set(vars(NONE)):
        raise ValueError(f"student: {content!r:.80} is no description of a student")
    student = Student(**content)
    known = [name for name, entry in OBJECTIVES.items() if entry.drawn_by]
    if student.objective not in known:
        raise ValueError(f"student.objective: {student.objective!r:.40} is not known here; there are {known}")
    if student.steps is not None and not (isinstance(student.steps, int) and student.steps >= 1):
        raise ValueError(f"student.steps: {student.steps!r:.40} is no number of steps")
    return student


NONE = Student("", "")
