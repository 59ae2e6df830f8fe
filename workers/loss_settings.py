"""The settings of what is minimised, and of the teacher of a student. `workers.config` has the rest."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from workers.entries import add_settings_of
from workers.kinds import OBJECTIVES, WEIGHTINGS
from workers.sections import NameOf, OpenRecord
from workers.warm_start import ModelSource

# No type checker sees the kinds that come from installed packages.
if TYPE_CHECKING:
    ObjectiveName = str
    WeightingName = str
else:
    ObjectiveName = Annotated[Literal[tuple(OBJECTIVES)], NameOf(OBJECTIVES, takes_settings=True)]
    WeightingName = Annotated[Literal[tuple(WEIGHTINGS)], NameOf(WEIGHTINGS, takes_settings=True)]


class TeacherConfig(ModelSource):
    """The model that a student learns from; the student begins with its weights, unless `training.init` has others."""

    guidance: float | None = Field(
        default=None, ge=0, description="scale of its guidance, which the student learns; null: by the label alone"
    )


@add_settings_of(OBJECTIVES, WEIGHTINGS)
class LossConfig(OpenRecord):
    """What is minimised: `mse` the weighted squared error of the target, `kl` the bound, `hybrid` both together."""

    READS: ClassVar = {
        "objective": OBJECTIVES.reads,
        "weighting": WEIGHTINGS.reads,
        "adversarial": {
            "null": (),
            "a number": ("adversarial_start", "game", "discriminator_channels", "discriminator_layers", "r1"),
        },
    }

    objective: ObjectiveName = Field(
        default="mse",
        description="mse: the weighted squared error of the prediction; kl: the bound; hybrid: both together; "
        "elbo: of an autoencoder; gan: of a generator; progressive and consistency: what a teacher's flow leads to",
    )
    weighting: WeightingName = Field(default="simple", description="what each t counts in the squared error")
    gamma: float = Field(default=5.0, gt=0, description="the cap of min-SNR-gamma")
    p2_gamma: float = Field(default=1.0, ge=0, description="the exponent of P2")
    p2_k: float = Field(default=1.0, gt=0, description="what P2 adds to the SNR")
    sigmoid_bias: float = Field(
        default=0.0, description="of sigmoid: the log SNR up to which the error of x_0 counts SNR_t"
    )
    weighting_sigma_data: float = Field(default=0.5, gt=0, description="of the weighting edm: its sigma_data")
    vlb_weight: float = Field(
        default=0.001, gt=0, description="lambda of the hybrid: what a bit/dim of the bound counts"
    )
    teacher: TeacherConfig | None = Field(default=None, description="the model that a student learns from")
    student_steps: int | None = Field(
        default=None, ge=1, description="of progressive: the student's steps, each of which is two of its teacher's"
    )
    pairs: Literal["flow", "noise"] = Field(
        default="flow",
        description="of consistency, what leads from a noisy image to a less noisy one. flow: a step of the teacher's "
        "flow; noise: the image and the noise that it was made of",
    )
    halve_every: int = Field(
        default=500, ge=1, description="of consistency: steps after which the gap within a pair is halved"
    )
    halvings: int = Field(default=8, ge=0, le=30, description="of consistency: how often it is halved at most")
    beta: float = Field(default=1.0, ge=0, description="of elbo: what a bit of rate counts beside one of distortion")
    reconstruction: Literal["gaussian", "laplace"] = Field(
        default="gaussian", description="of elbo: the law of the discrete decoder, whose scale is learned"
    )
    adversarial: float | None = Field(
        default=None,
        gt=0,
        description="of elbo: a discriminator's part in the gradient of the decoder's last layer, as a multiple of the "
        "distortion's; null: none",
    )
    adversarial_start: int = Field(default=0, ge=0, le=10**9, description="the first step with that part")
    game: Literal["hinge", "non_saturating"] = Field(default="hinge", description="that the discriminator plays")
    r1: float = Field(
        default=0.0, ge=0, description="what the squared gradient of the discriminator at real images counts"
    )
    discriminator_channels: int = Field(default=64, ge=1, le=8192, description="of its first layer")
    discriminator_layers: int = Field(default=3, ge=1, le=8, description="its layers of stride 2")
