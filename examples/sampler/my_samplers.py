"""A sampler of one's own. The command reads this entry; the function, which needs torch, is loaded where it is used."""

from pydantic import Field

from workers.kinds import SamplerEntry

DEIS = SamplerEntry(
    function="deis:deis",
    about="the flow by exponential multistep integration (Zhang & Chen 2022)",
    reads=("steps",),
    settings={"order": (int, Field(default=2, ge=1, le=4, description="evaluations that a step makes use of"))},
    form="levels",
    levels="workers.diffusion.samplers:geometric",
)
