"""The kinds that an experiment file can name: one entry each, which names the function and says all else of it.

A new format of data, network, objective, weighting, way of drawing t, sampler, feature space or metric of samples is
one function and one entry here; that of a formulation, schedule, prediction or variance is in `workers.process_kinds`.
Settings, checks, the JSON schema, the tables of docs/, plans of costs and dispatch follow from the entry. A function is
named by "module:name" and imported where it is first used, so that a dry run imports no torch.

A file of settings may name an entry from outside as `module:NAME` (`workers.code` says how it is found). An installed
package may also bring kinds by an entry point of the group POINTS: a module that puts entries into these tables as it
is imported. docs/extending.md shows both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from workers.entries import BrokenPackage, Entry, Kinds, register_for
from workers.process_kinds import FORMULATIONS as FORMULATIONS
from workers.process_kinds import PREDICTIONS as PREDICTIONS
from workers.process_kinds import SCHEDULES as SCHEDULES
from workers.process_kinds import VARIANCES as VARIANCES
from workers.process_kinds import FormulationEntry as FormulationEntry
from workers.process_kinds import PredictionEntry as PredictionEntry
from workers.process_kinds import ScheduleEntry as ScheduleEntry
from workers.process_kinds import VarianceEntry as VarianceEntry

POINTS = "diffusion_orchestrator.kinds"


# ---- Formats of data: `workers.data.tree.Tree` -> `Files`, or None where it holds something else -----------------


@dataclass(frozen=True, kw_only=True)
class FormatEntry(Entry):
    """Where no format is named, each is asked in this order, and the first that finds its own is taken."""


FORMATS = Kinds(
    {
        "parquet": FormatEntry(
            function="workers.data.parquet_files:find_parquet", about="Parquet files of encoded images or of tensors"
        ),
        "cifar10-binary": FormatEntry(function="workers.data.cifar10:find_cifar10", about="CIFAR-10's binary version"),
        "idx": FormatEntry(function="workers.data.idx:find_idx", about="IDX files, as of MNIST"),
        "images": FormatEntry(function="workers.data.formats:find_images", about="a folder of images"),
        "arrays": FormatEntry(function="workers.data.arrays:find_arrays", about="NumPy's .npz and .npy"),
        "tar": FormatEntry(function="workers.data.tar_files:find_tar", about="tar files of samples, as of WebDataset"),
    }
)


# ---- Networks: (ModelConfig, Signature) -> module, which `workers.network.build` describes ---------------------

# What trials are: of a denoiser x_t becomes x_0; an autoencoder is a bound of its own, and the first stage of latent
# diffusion; a generator makes images of noise at once. `workers.lessons` says what each learns in a step.
DENOISER, AUTOENCODER, GENERATOR = "denoiser", "autoencoder", "generator"


@dataclass(frozen=True, kw_only=True)
class NetworkEntry(Entry):
    """Of a family of ours beside denoisers `function` takes (config.json, generator of first weights)."""

    family: str = DENOISER  # which decides about all that its trials have beside the network
    check: str = ""  # "module:name" of (ModelConfig, (height, width, channels)) -> what is wrong with its settings
    config: str = ""  # "module:name" of (ModelConfig, (height, width, channels)) -> config.json, of such a family
    written: str = ""  # its _class_name there


NETWORKS = Kinds(
    {
        "unet": NetworkEntry(
            function="workers.network.unet:UNet", about="the U-Net of Ho et al. 2020, appendix B",
            reads=("channels", "multipliers", "blocks", "attention", "dropout", "norm_groups"),
            check="workers.network.unet_config:find_mistakes",
        ),
        "autoencoder": NetworkEntry(
            function="workers.network.autoencoder:Autoencoder", family=AUTOENCODER,
            about="a variational autoencoder, as AutoencoderKL of latent diffusion (Rombach et al. 2022)",
            reads=("channels", "multipliers", "blocks", "norm_groups", "latent_channels"),
            check="workers.network.autoencoder_config:find_stage_mistakes",
            config="workers.network.autoencoder_config:make_autoencoder_config", written="AutoencoderKL",
        ),
        "generator": NetworkEntry(
            function="workers.network.generator:Generator", family=GENERATOR,
            about="the generator of a GAN: noise to images by one pass (Goodfellow et al. 2014)",
            reads=("channels", "multipliers", "blocks", "norm_groups", "latent_channels"),
            check="workers.network.autoencoder_config:find_stage_mistakes",
            config="workers.network.autoencoder_config:make_generator_config", written="ImageGenerator",
        ),
    }
)  # fmt: skip


# ---- What is minimised: (Objective, Batch) -> losses by image; and (Process, LossConfig, own) -> weights by t --------


@dataclass(frozen=True, kw_only=True)
class ObjectiveEntry(Entry):
    """Of a denoiser the function takes (Objective, Batch); that of another family is for its `workers.lessons`."""

    family: str = DENOISER  # that it is for
    teaches_variance: bool = False  # whether it trains a learned variance
    needs_learned: bool = False  # whether it is for a learned variance alone
    needs_steps: bool = False  # whether it is made of the steps of a chain, so that no continuous formulation has it
    needs_teacher: bool = False
    drawn_by: tuple[str, ...] = ()  # where it makes students (`workers.students`), the samplers that draw from them


@dataclass(frozen=True, kw_only=True)
class WeightingEntry(Entry):
    needs_fixed: bool = False  # whether it is stated with a fixed sigma_t^2


def _make_objective(name: str, about: str, *reads: str, **more: Any) -> ObjectiveEntry:
    return ObjectiveEntry(function=f"workers.diffusion.objectives:{name}", about=about, reads=reads, **more)


def _make_weighting(name: str, about: str, *reads: str, **more: Any) -> WeightingEntry:
    return WeightingEntry(function=f"workers.diffusion.objectives:{name}", about=about, reads=reads, **more)


OBJECTIVES = Kinds(
    {
        "mse": _make_objective(
            "mse", "the weighted squared error of the prediction", "weighting"
        ),
        "kl": _make_objective("kl", "the bound in bits/dim (eq. 5)", teaches_variance=True, needs_steps=True),
        "hybrid": _make_objective(
            "hybrid", "mse, and the bound for the variance (Nichol & Dhariwal 2021)", "weighting", "vlb_weight",
            teaches_variance=True, needs_learned=True, needs_steps=True,
        ),
        "elbo": ObjectiveEntry(
            function="workers.autoencoding:elbo", family=AUTOENCODER,
            about="distortion and beta times the rate, in bits/dim (Kingma & Welling 2014, eq. 3)",
            reads=("beta", "reconstruction", "adversarial"),
        ),
        "gan": ObjectiveEntry(
            function="workers.playing:Playing", family=GENERATOR,
            about="the game against a discriminator (Goodfellow et al. 2014)",
            reads=("game", "discriminator_channels", "discriminator_layers", "r1"),
        ),
        "progressive": ObjectiveEntry(
            function="workers.diffusion.distillation:progressive",
            about="in one step of DDIM where its teacher comes in two (Salimans & Ho 2022)",
            reads=("weighting", "teacher", "student_steps"),
            teaches_variance=False, needs_steps=True, needs_teacher=True, drawn_by=("ddim",),
        ),
        "consistency": ObjectiveEntry(
            function="workers.diffusion.distillation:consistency",
            about="from all points of its teacher's flow to the same end (Song et al. 2023)",
            reads=("teacher", "pairs", "halve_every", "halvings"),
            teaches_variance=False, needs_teacher=True, drawn_by=("consistency",),
        ),
    }
)  # fmt: skip
WEIGHTINGS = Kinds(
    {
        "simple": _make_weighting("simple", "the prediction's own error, L_simple (eq. 14)"),
        "vlb": _make_weighting("vlb", "the bound's own (eq. 8)", needs_fixed=True),
        "snr": _make_weighting("snr", "SNR_t for the error of x_0 (Salimans & Ho 2022)"),
        "truncated_snr": _make_weighting("truncated_snr", "max(SNR_t, 1) (Salimans & Ho 2022)"),
        "min_snr": _make_weighting("min_snr", "min(SNR_t, gamma) (Hang et al. 2023)", "gamma"),
        "p2": _make_weighting("p2", "SNR_t / (k + SNR_t)^gamma (Choi et al. 2022)", "p2_gamma", "p2_k"),
        "sigmoid": _make_weighting("sigmoid", "SNR_t / (1 + e^-bias SNR_t) (Kingma & Gao 2023)", "sigmoid_bias"),
        "edm": _make_weighting("edm", "SNR_t + 1 / sigma_data^2 (Karras et al. 2022)", "weighting_sigma_data"),
    }
)


# ---- How t is drawn: (T, Part, generator, probability) -> t -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DrawEntry(Entry):
    remembers: bool = False  # whether p_t comes of the losses so far (`timesteps.History`), and weighs them


def _make_draw(name: str, about: str, **more: Any) -> DrawEntry:
    return DrawEntry(function=f"workers.diffusion.timesteps:{name}", about=about, **more)


TIMESTEPS = Kinds(
    {
        "uniform": _make_draw("uniform", "each by itself (Ho et al. 2020)"),
        "stratified": _make_draw("stratified", "one from each of as many parts of 1..T as there are images"),
        "antithetic": _make_draw("antithetic", "pairs t and T + 1 - t"),
        "importance": _make_draw(
            "importance", "by the second moment of the loss (Nichol & Dhariwal 2021)", remembers=True
        ),
    }
)


# ---- Samplers ---------------------------------------------------------------------------------------------------

# Evaluations that an image took of the two solvers with error control, at a tolerance, and how they rise as it falls.
# Measured on four models of the digits (T = 100 and 200, fixed and learned variance), 25 images each: samples 50 to 53
# at 1e-3, 26 to 27 at 1e-2, 133 to 178 at 1e-4; ode_nll 89 to 129 at 1e-4, 35 to 42 at 1e-3, 175 to 271 at 1e-5.
ADAPTIVE = {"samples": (52, 1e-3), "ode_nll": (104, 1e-4)}
ADAPTIVE_POWER = 0.37


def guess_adaptive_evaluations(solver: str, tolerance: float) -> int:
    """What a plan of costs counts for an image of a solver with error control."""
    count, at = ADAPTIVE[solver]
    return round(count * (at / tolerance) ** ADAPTIVE_POWER)


@dataclass(frozen=True, kw_only=True)
class SamplerEntry(Entry):
    """The function's form is one of four, which `workers.diffusion.samplers` describes.

    step    one step of a chain of kept times: (process, config, x_t, prediction, t, generator) -> x_s
    levels  through noise levels, which `levels` spaces: (ladder, config, y, generator) -> x_0
    path    along real times, which the formulation spaces: (process, model, config, x_T, generator) -> x_0
    whole   by itself, with times of its own: (process, model, config, x_T, generator) -> Drawn

    A discrete process has all but `path`, a continuous one all but `step`.
    """

    form: str
    levels: str = ""  # "module:name" of (low, high, steps) -> levels
    evaluations: Callable[[Any, int], int] = lambda config, steps: steps  # of the network for an image
    exact: bool = True  # whether that many, or about so many
    clips: bool = False  # whether x_0_hat is clipped to [-1, 1] on the way
    reads_variance: bool = False  # of p_theta
    without_signal: bool = False  # whether it can begin where alpha_bar_T = 0
    of_students: bool = False  # whether it draws from students alone, by the objectives that name it in `drawn_by`

    def suits(self, continuous: bool) -> bool:
        """Whether it can draw by such a process, of a model that is no student."""
        return self.form != ("step" if continuous else "path") and not self.of_students


def _make_sampler(form: str, name: str, about: str, *reads: str, levels: str = "", **more: Any) -> SamplerEntry:
    home = "workers.diffusion.samplers:"
    levels = levels and home + levels
    return SamplerEntry(form=form, function=home + name, about=about, reads=reads, levels=levels, **more)


SAMPLERS = Kinds(
    {
        "ancestral": _make_sampler(
            "step", "ancestral", "a draw of p_theta a step (Ho et al. 2020, Algorithm 2)", "steps",
            clips=True, reads_variance=True, without_signal=True,
        ),
        "ddim": _make_sampler(
            "step", "ddim", "DDIM (Song et al. 2020a)", "steps", "eta", clips=True, without_signal=True,
        ),
        "euler_maruyama": _make_sampler("step", "euler_maruyama", "the reverse SDE (Song et al. 2021)", "steps"),
        "langevin": _make_sampler(
            "levels", "langevin", "annealed Langevin dynamics (Song & Ermon 2019)", "steps", "repeats", "step_size",
            levels="geometric", evaluations=lambda config, steps: steps * config.repeats + 1,  # and one to denoise
        ),
        "heun": _make_sampler(
            "levels", "heun", "the flow by Heun's rule (Karras et al. 2022)", "steps",
            levels="power", evaluations=lambda config, steps: 2 * steps - 1,  # two a step, but for the last
        ),
        "dpmpp": _make_sampler(
            "levels", "dpmpp", "DPM-Solver++(2M) (Lu et al. 2022b)", "steps", levels="geometric", clips=True,
        ),
        "euler": _make_sampler(
            "path", "euler", "the flow over the formulation's own times by Euler's rule (Lipman et al. 2023)", "steps",
        ),
        "path_heun": _make_sampler(
            "path", "path_heun", "the same by Heun's rule", "steps", evaluations=lambda config, steps: 2 * steps - 1,
        ),
        "churn": _make_sampler(
            "path", "churn", "Heun's rule with churn (Karras et al. 2022, Algorithm 2)", "steps",
            "churn", "churn_min", "churn_max", "churn_noise", evaluations=lambda config, steps: 2 * steps - 1,
        ),
        "consistency": _make_sampler(
            "levels", "consistency", "jumps of a student by consistency, noise between (Song et al. 2023)", "steps",
            levels="power_without_least", clips=True, of_students=True,
        ),
        "ode": _make_sampler(
            "whole", "ode", "the flow by a solver with error control", "tolerance",
            evaluations=lambda config, steps: guess_adaptive_evaluations("samples", config.tolerance), exact=False,
        ),
    }
)  # fmt: skip


# ---- Spaces in which samples and real images become features ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpaceEntry(Entry):
    """The function's form is one of two.

    network  (height, width, channels) -> a module, from images, float32 (n, channels, height, width) on [-1, 1], to
             features (n, dimensions); `workers.evaluation.features` builds it, and has it trained where it is
    whole    by itself: (storage, dataset, device, whether TF32 may be used) -> `features.FeatureSpace`
    """

    dimensions: int
    form: str = "network"
    train: str = ""  # "module:name" of (module, Dataset) -> None, which teaches a network the data; else it is as built
    labelled: bool = False  # whether the data must have labels
    streams: bool = False  # whether `train` takes training images piece by piece, as `data.stream` has them
    channels: tuple[int, ...] = ()  # that images can have; any number where empty
    reads_precision: bool = True  # whether it computes in TF32 where `evaluation.precision` is below float32


SPACES = Kinds(
    {
        "classifier": SpaceEntry(
            function="workers.evaluation.features:load_classifier",
            about="the hidden layer of a perceptron that learns the labels of the data",
            form="whole", train="workers.evaluation.features:train_classifier", dimensions=64, labelled=True,
            streams=True, reads_precision=False,
        ),
        "inception": SpaceEntry(
            function="workers.evaluation.features:load_inception_space",
            about="the Inception network that FID is defined by (Heusel et al. 2017)",
            form="whole", dimensions=2048, channels=(1, 3),
        ),
    }
)  # fmt: skip


# ---- Metrics of samples beside the Fréchet distance ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeasureEntry(Entry):
    """The function takes (feature space, features of the samples, blocks of real features).

    It returns ({name: (value, standard error or None)}, how it was measured). Names take the suffix of the feature
    space, as the Fréchet distance does, unless the measure `needs` one.
    """

    lower: tuple[str, ...] = ()  # of the names that it returns, those of which lower is better, to rank trials on
    needs: str = ""  # the one feature space that it is for; any where empty
    least: int = 2  # samples, and where `of_real` real images
    of_real: bool = True  # whether it compares with real images


def _make_measure(name: str, about: str, **more: Any) -> MeasureEntry:
    return MeasureEntry(function=f"workers.evaluation.summary:{name}", about=about, **more)


MEASURES = Kinds(
    {
        "kid": _make_measure("kid", "the kernel distance (Binkowski et al. 2018)", lower=("kid",)),
        "precision_recall": _make_measure(
            "precision_recall", "precision and recall (Kynkäänniemi et al. 2019)", least=4,
        ),
        "inception_score": _make_measure(
            "inception_score", "the Inception score (Salimans et al. 2016)", needs="inception", least=10, of_real=False,
        ),
    }
)  # fmt: skip

# Where experiment files name them, for the tables of docs/.
NAMED_AT: dict[str, Kinds[Any]] = {
    "data.format": FORMATS,
    "model.kind": NETWORKS,
    "diffusion.formulation": FORMULATIONS,
    "diffusion.schedule.kind": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "diffusion.variance": VARIANCES,
    "loss.objective": OBJECTIVES,
    "loss.weighting": WEIGHTINGS,
    "training.timesteps": TIMESTEPS,
    "evaluation.fid.sampler.kind": SAMPLERS,
    "evaluation.fid.features": SPACES,
    "evaluation.fid.also": MEASURES,
    "evaluation.variance": VARIANCES,
}


# Those whose kinds may have settings of their own.
SETTABLE = (
    "diffusion.formulation",
    "diffusion.schedule.kind",
    "loss.objective",
    "loss.weighting",
    "evaluation.fid.sampler.kind",
)


def _load_package(point: EntryPoint) -> None:
    try:
        with register_for(f"{point.dist.name}-{point.dist.version}" if point.dist else ""):
            point.load()
    except (Exception, SystemExit) as error:
        package = f"the installed package {point.dist.name}" if point.dist else "an installed package"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenPackage(
            f"{package} brings kinds by {point.value}, which cannot be imported ({why}); mend or uninstall it"
        ) from error


for _point in entry_points(group=POINTS):
    _load_package(_point)
