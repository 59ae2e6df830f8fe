"""The settings of the network, which decides what a trial is: its family, and what that reads of the other sections."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import Field

from workers.entries import add_settings_of
from workers.kinds import AUTOENCODER, DENOISER, GENERATOR, NETWORKS
from workers.sections import NameOf, OpenRecord, Record

E = TypeVar("E", bound=Record)

# No type checker sees the kinds that come from installed packages.
if TYPE_CHECKING:
    NetworkName = str
else:
    NetworkName = Annotated[Literal[tuple(NETWORKS)], NameOf(NETWORKS, takes_settings=True)]

What = Literal["labels", "vectors"]  # that a network is told of an image

# Settings that not every family reads, by their paths in a trial; what is in none of these lists all read.
FAMILY_READS: dict[str, tuple[str, ...]] = {
    DENOISER: (
        "model.labels", "model.conditions", "diffusion", "training.timesteps", "training.label_dropout",
        "evaluation.ode_nll", "evaluation.variance", "evaluation.nll", "evaluation.nll.timesteps",
        "evaluation.nll.proposal",
        "evaluation.fid.sampler",
    ),
    AUTOENCODER: ("evaluation.nll", "evaluation.reconstructions"),
    GENERATOR: (),
}  # fmt: skip


# Those of them that are of a measurement.
MEASURED_READS = {
    family: tuple(path for path in reads if path.startswith("evaluation.")) for family, reads in FAMILY_READS.items()
}


def reset_unread(evaluation: E, family: str) -> E:
    """The section `evaluation` without what the family does not read, which a search over families may have for
    others: null where a setting takes that, else its default."""
    for path in dict.fromkeys(path for reads in MEASURED_READS.values() for path in reads):
        if path not in MEASURED_READS[family]:
            evaluation = _reset(evaluation, path.split(".")[1:])
    return evaluation


def _reset(section: Any, path: Sequence[str]) -> Any:
    """The section with nothing of its own at a path; as it is where that goes through null."""
    if section is None:
        return None
    name, *inner = path
    field = type(section).model_fields[name]
    nothing = None if type(None) in get_args(field.annotation) else field.get_default()
    return section.model_copy(update={name: _reset(getattr(section, name), inner) if inner else nothing})


class _ReadsByKind(Mapping[str, tuple[str, ...]]):
    """FAMILY_READS by the kind of a network."""

    def __getitem__(self, kind: str) -> tuple[str, ...]:
        return FAMILY_READS[NETWORKS[kind].family]

    def __iter__(self) -> Iterator[str]:
        return iter(NETWORKS)

    def __len__(self) -> int:
        return len(NETWORKS)


KIND_READS = _ReadsByKind()


@add_settings_of(NETWORKS)
class ModelConfig(OpenRecord):
    """eps_theta: the U-Net of Ho et al. 2020, appendix B, or a network of one's own; or a network of another family.
    Defaults are the paper's for CIFAR-10 (35.7M parameters)."""

    READS: ClassVar = {"kind": NETWORKS.reads}

    kind: NetworkName = Field(default="unet", description="the network")
    channels: int = Field(default=128, ge=1, le=8192, description="channels at the highest resolution")
    multipliers: tuple[int, ...] = Field(
        default=(1, 2, 2, 2),
        min_length=1,
        max_length=16,
        strict=False,
        description="of the channels, one per resolution; each further resolution is half the one before",
    )
    blocks: int = Field(default=2, ge=1, le=64, description="residual blocks per resolution")
    attention: tuple[int, ...] = Field(
        default=(16,), strict=False, description="resolutions with self-attention, by the smaller side"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="part of the activations dropped in each residual block"
    )
    norm_groups: int = Field(
        default=32, ge=1, description="groups of the group norms; never fewer than 4 channels in one"
    )
    latent_channels: int = Field(
        default=4, ge=1, le=8192, description="channels of latents: of an autoencoder, and of a generator's noise"
    )
    labels: bool = Field(default=False, description="tell the network the class of each image, which the data label")
    conditions: What | None = Field(
        default=None,
        description="what the network is told of each image by cross-attention: its class, or the vectors in "
        "data.condition",
    )

    @property
    def told(self) -> What | None:
        """What the network is told of each image, whichever way."""
        return "labels" if self.labels else self.conditions

    @property
    def family(self) -> str:
        """What trials of this network are."""
        return NETWORKS[self.kind].family
