"""What goes together with a student, and what with a teacher."""

from collections.abc import Iterator

from workers.config import Trial
from workers.kinds import OBJECTIVES, PREDICTIONS
from workers.students import describe_student, find_drawing_mistakes, find_student_mistakes


def find_distilling_mistakes(trial: Trial) -> Iterator[str]:
    """A student without a teacher, steps that do not divide, targets that do not suit, and what it cannot be asked."""
    loss, objective = trial.loss, OBJECTIVES[trial.loss.objective]
    if objective.needs_teacher and not loss.teacher:
        yield (
            f"loss.objective: {loss.objective} learns from a teacher, and none is named; set loss.teacher.source to a "
            "name of needs, a sweep, a trial, a registered model or a folder"
        )
    student = describe_student(loss)
    if student is None:
        if trial.evaluation.fid:
            yield from find_drawing_mistakes(None, trial.evaluation.fid.sampler)
        return
    if "student_steps" in objective.reads and not trial.diffusion.continuous:
        yield from _find_step_mistakes(trial)
    if loss.objective == "consistency" and not trial.diffusion.continuous:
        prediction = trial.diffusion.prediction
        if not PREDICTIONS[prediction].ends_clean:
            yield (
                f"diffusion.prediction: {prediction} makes no function that is the identity without noise, as "
                f"loss.objective: consistency needs; take {PREDICTIONS.list_names(lambda other: other.ends_clean)}"
            )
    yield from find_student_mistakes(student, trial.evaluation)


def _find_step_mistakes(trial: Trial) -> Iterator[str]:
    T, steps, prediction = trial.diffusion.T, trial.loss.student_steps, trial.diffusion.prediction
    possible = [n for n in range(1, T // 2 + 1) if T % (2 * n) == 0]
    shown = ", ".join(map(str, possible)) or "none, as diffusion.T is odd; take an even one"
    if steps is None:
        yield f"loss.student_steps: missing; {trial.loss.objective} makes a student of so many steps, of {shown}"
    elif steps not in possible:
        yield (
            f"loss.student_steps: {steps} do not divide diffusion.T = {T} into steps that its teacher can halve; take "
            f"one of {shown}"
        )
    if not PREDICTIONS[prediction].between_times:
        yield (
            f"diffusion.prediction: {prediction} belongs to a step of the chain of all T times, and a student has "
            f"others; take {PREDICTIONS.list_names(lambda other: other.between_times)}"
        )
