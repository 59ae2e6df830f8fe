"""The names under which likelihoods in bits/dim are kept.

Of data in levels they are probabilities of levels, `nll`. Of data that are not discrete they are densities on the scale
of [-1, 1], `density`: these may be below 0 and never stand beside the others, so they have names of their own.
"""

from collections.abc import Iterable

PIXEL_KID = "valid/pixel_kid"  # of generators, which have no bound
STUDENT = "valid/teacher_mse"  # of a student, which has no bound: how far it is from its teacher
VALIDATIONS = ("valid/nll_bpd", "valid/density_bpd", PIXEL_KID, STUDENT)
SEEN = "validation_bpd"  # in a result of Ray Tune: the trial's validation under the one name that schedulers know


def name_likelihood(levels: int | None) -> str:
    """`nll`, or `density` where the data are not discrete."""
    return "density" if levels is None else "nll"


def name_validation(levels: int | None, is_student: bool = False) -> str:
    """What a validation measures of data in so many levels, or of a student."""
    return STUDENT if is_student else f"valid/{name_likelihood(levels)}_bpd"


def find_validation(names: Iterable[str]) -> str | None:
    """The name of the validation among others; None where there is none."""
    return next((name for name in VALIDATIONS if name in set(names)), None)
