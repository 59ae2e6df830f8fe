"""The scheduler's config of a student, which says beside its process what it is; of all others that of diffusers."""

from dataclasses import replace
from typing import Any

from workers.diffusion.formulations import AnyProcess, Continuous
from workers.identity import collect_settings_read
from workers.network.diffusers_config import Scheduler, make_scheduler_config, read_scheduler
from workers.students import Student, read_student, write_student

OWN, CLASS = "ConsistencyStudent", "_class_name"  # of a chain, whose scheduler no class of diffusers is


def read_config(config: dict[str, Any]) -> Scheduler:
    """What a scheduler's config says, and of which student. Raises ValueError with what is wrong with it."""
    if "student" not in config:
        return read_scheduler(config)
    student = read_student(config["student"])
    read = read_scheduler({**config, CLASS: "DDIMScheduler"} if config.get(CLASS) == OWN else config)
    if student.steps and (read.process.T is None or read.process.T % student.steps):
        raise ValueError(f"student.steps: {student.steps} does not divide num_train_timesteps, {read.process.T}")
    return replace(read, student=student)


def make_config(
    process: AnyProcess, prediction: str = "eps", student: Student | None = None, *, clip: bool = True
) -> dict[str, Any]:
    """`make_scheduler_config`, and of a student of N steps a DDIMScheduler that samples it in N steps.

    A student by consistency has none of diffusers': what they have for it tells the network other times. The class that
    is named is therefore unknown there.
    """
    whole = make_scheduler_config(process, prediction, clip=clip)
    if student is None:
        return whole
    own = {"student": write_student(student)}
    if isinstance(process, Continuous):
        settings = {n: v for n, v in collect_settings_read(process.config).items() if n != "formulation"}
        return {CLASS: process.config.formulation, "settings": settings, **own}
    if student.steps is None:
        return {**whole, CLASS: OWN, **own}
    del whole["variance_type"]
    return {**whole, CLASS: "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True, **own}
