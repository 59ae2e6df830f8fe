"""The settings of the network, which decides what a trial is: its family, and what that reads of the other sections."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from workers.entries import add_settings_of
from workers.kinds import AUTOENCODER, DENOISER, NETWORKS
from workers.sections import NameOf, OpenRecord

# No type checker sees the kinds that come from installed packages.
if TYPE_CHECKING:
    NetworkName = str
else:
    NetworkName = Annotated[Literal[tuple(NETWORKS)], NameOf(NETWORKS, takes_settings=True)]

# Settings that not every family reads, by their paths in a trial; what is in none of these lists all read.
FAMILY_READS: dict[str, tuple[str, ...]] = {
    DENOISER: (
        "model.labels", "diffusion", "training.timesteps", "training.label_dropout", "evaluation.ode_nll",
        "evaluation.variance", "evaluation.nll.timesteps", "evaluation.nll.proposal", "evaluation.fid.sampler",
    ),
    AUTOENCODER: ("evaluation.reconstructions",),
}  # fmt: skip


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
    latent_channels: int = Field(default=4, ge=1, le=8192, description="channels of the latents of an autoencoder")
    labels: bool = Field(default=False, description="tell the network the class of each image, which the data label")

    @property
    def family(self) -> str:
        """What trials of this network are."""
        return NETWORKS[self.kind].family
