"""The settings of the process: its formulation, and of the discrete one its schedule. `workers.config` has the rest."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from workers.entries import add_settings_of
from workers.kinds import FORMULATIONS, PREDICTIONS, SCHEDULES, VARIANCES
from workers.sections import NameOf, OpenRecord

# No type checker sees the kinds that come from installed packages.
if TYPE_CHECKING:
    FormulationName = str
    ScheduleName = str
    PredictionName = str
    VarianceName = str
else:
    FormulationName = Annotated[Literal[tuple(FORMULATIONS)], NameOf(FORMULATIONS, takes_settings=True)]
    ScheduleName = Annotated[Literal[tuple(SCHEDULES)], NameOf(SCHEDULES, takes_settings=True)]
    PredictionName = Annotated[Literal[tuple(PREDICTIONS)], NameOf(PREDICTIONS)]
    VarianceName = Annotated[Literal[tuple(VARIANCES)], NameOf(VARIANCES)]


@add_settings_of(SCHEDULES)
class ScheduleConfig(OpenRecord):
    """beta_1..beta_T. `per_1000` states the range for T = 1000 and multiplies it by 1000 / T; `absolute` does not."""

    READS: ClassVar = {"kind": SCHEDULES.reads}

    kind: ScheduleName = Field(default="linear", description="the shape of beta_1..beta_T")
    beta_start: float = Field(default=1e-4, gt=0, lt=1, description="beta_1, of the kinds that have a range")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="beta_T, of the kinds that have a range")
    scale: Literal["absolute", "per_1000"] = Field(
        default="absolute",
        description="per_1000 states the range for T = 1000 and multiplies it by 1000 / T; absolute leaves it as it is",
    )
    betas: tuple[float, ...] | None = Field(default=None, strict=False, description="beta_1..beta_T of kind: list")
    log_snr_start: float = Field(default=9.0, gt=-30, lt=30, description="log SNR_1 of kind: log_snr")
    log_snr_end: float = Field(default=-9.0, gt=-30, lt=30, description="log SNR_T of kind: log_snr")


@add_settings_of(FORMULATIONS)
class DiffusionConfig(OpenRecord):
    """What is diffused and what the network learns of it: its target, and for a learned variance a second head."""

    READS: ClassVar = {
        "formulation": FORMULATIONS.reads,
        "t_law": {"uniform": (), "logit_normal": ("t_mean", "t_std")},
    }

    formulation: FormulationName = Field(
        default="discrete", description="discrete: a chain of T times; edm and flow: continuous time"
    )
    T: int = Field(default=1000, ge=1, le=100_000, description="number of diffusion steps")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="the noise schedule beta_1..beta_T")
    prediction: PredictionName = Field(default="eps", description="what the network is trained to predict")
    variance: VarianceName = Field(
        default="fixed_large",
        description="of p_theta: beta_tilde_t (fixed_small), beta_t (fixed_large), or from a second head",
    )
    sigma_data: float = Field(
        default=0.5, gt=0, description="of edm: the standard deviation of the pixels, by which it is preconditioned"
    )
    sigma_min: float = Field(default=0.002, gt=0, description="of edm: the least noise level of sampling and bounds")
    sigma_max: float = Field(default=80.0, gt=0, description="of edm: the largest noise level of the same")
    p_mean: float = Field(default=-1.2, description="of edm: the mean of log sigma in training")
    p_std: float = Field(default=1.2, gt=0, description="of edm: the standard deviation of log sigma in training")
    t_law: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="of flow: how t in (0, 1) is drawn"
    )
    t_mean: float = Field(default=0.0, description="of logit_normal: the mean of log(t / (1 - t))")
    t_std: float = Field(default=1.0, gt=0, description="of logit_normal: its standard deviation")
    t_min: float = Field(default=0.001, gt=0, lt=1, description="of flow: the least t of sampling and bounds")
    t_max: float = Field(default=0.999, gt=0, lt=1, description="of flow: the largest t of the same")

    @property
    def learned(self) -> bool:
        """Whether the network has a second head, for the variance."""
        return not self.continuous and VARIANCES[self.variance].learned

    @property
    def continuous(self) -> bool:
        """Whether its times are real, so that it has no T."""
        return FORMULATIONS[self.formulation].continuous

    @property
    def steps(self) -> int | None:
        """T, or None where it has none."""
        return None if self.continuous else self.T
