"""Its entry; no torch is imported here."""

from pydantic import Field

from workers.kinds import SAMPLERS, SamplerEntry

SAMPLERS["adams_bashforth"] = SamplerEntry(
    function="mine.samplers:adams_bashforth",
    about="the flow by the rule of Adams and Bashforth",
    reads=("steps",),
    settings={"order": (int, Field(default=2, ge=1, le=2, description="of Adams and Bashforth's rule"))},
    form="levels",
    levels="workers.diffusion.samplers:power",
)
