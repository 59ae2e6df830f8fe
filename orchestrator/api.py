"""The commands as functions: preview and run a sweep, load results, open a model.

A user's mistake is raised as `Mistake`, with the text that the command prints. What the command warns of goes to
`warnings.warn`, which a program may filter, turn into errors or record.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import cli
from orchestrator import sweep as command
from orchestrator.clusters.cluster import read_cluster
from orchestrator.command import Command
from orchestrator.experiment.effort import Cost, count_costs
from orchestrator.experiment.load import load
from orchestrator.experiment.preflight import describe_data, measure_chain
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.origins import pin_starts
from orchestrator.output.table import make_columns, make_frame
from orchestrator.state.events import read_events
from orchestrator.state.rows import list_asked, rank_rows
from orchestrator.state.saved import open_sweep, read_rows
from workers.config import DataConfig, Mistake, SamplerConfig
from workers.consent import give_consent
from workers.data.sources import Source
from workers.layout import RowId, name_report_file
from workers.storage import Storage
from workers.students import check_drawing, choose_own_sampler

if TYPE_CHECKING:  # torch and pandas take seconds: each function loads what it needs
    import numpy as np
    import pandas as pd
    import torch

    from workers.diffusion.formulations import AnyProcess
    from workers.network.latent_space import PixelSpace
    from workers.network.manifest import Checkpoint


DRAWN_AT_ONCE = 256  # images of `DiffusionModel.sample`
CONTINUOUS_STEPS = 18  # of its samples in continuous time: 35 evaluations (Karras et al. 2022)


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    name: str
    storage: str
    exit_status: int  # 0 all done, 1 some trial failed, 130 interrupted: the same call resumes (see `cli`)

    @property
    def ok(self) -> bool:
        return self.exit_status == cli.DONE

    @property
    def report(self) -> str:
        """Where its report lies."""
        return Storage(self.storage).find_url(name_report_file(self.name))

    def results(self) -> "pd.DataFrame":
        return load_results(self.name, self.storage)


def preview(file: str | Path, *overrides: str, smoke: bool = False, storage: str | Path = "runs") -> "pd.DataFrame":
    """The trials that an experiment file means (of an adaptive search those of its first round), a row each: what is
    searched, where the chain ends, what it costs.

    Costs count evaluations of the network, an image at a time. `storage` is where sweeps and trials are looked for that
    the file starts from. Starts nothing. Warns as the command does. Raises
    Mistake with all mistakes.
    """
    import pandas as pd

    trials, sources = _load_trials(pin_starts(load(file, overrides, smoke), str(storage)))
    names = [field.name for field in fields(Cost)]
    params = make_columns(list(trials.values()))
    return pd.DataFrame(
        {
            "trial": row,
            **{path: values[i] for path, values in params.items()},
            "alpha_bar_T": measure_chain(variant.trial.diffusion).alpha_bar_T if variant.trial.diffuses else None,
            "prior_bpd": measure_chain(variant.trial.diffusion).prior_bpd if variant.trial.diffuses else None,
            **dict(zip(names, price.parts, strict=True)),
        }
        for i, ((row, variant), price) in enumerate(zip(trials.items(), count_costs(trials, sources), strict=True))
    )


def run_sweep(
    file: str | Path,
    *overrides: str,
    storage: str | Path = "runs",
    smoke: bool = False,
    fresh: bool = False,
    ray_address: str | None = None,
    cluster: str | Path | None = None,
    tracking_uri: str | None = None,
    quiet: bool = True,
    verbose: bool = False,
) -> Outcome:
    """Makes what is missing of a sweep, as `python -m orchestrator.sweep` does with the options of these names.

    `smoke` applies the file's own section of that name, and `fresh` forgets what is there of the trials. Without
    `ray_address` (auto or HOST:PORT) a Ray of this machine is started; `cluster` is the file for `ray up` of the one
    at that address. `tracking_uri` is an MLflow server. `quiet` prints the result alone, `verbose` more than usual.

    In the main thread ctrl-C and SIGTERM end it in good order; of several threads one after the other runs a sweep.
    Warns as the command does, of settings and data that may not be meant so. Raises Mistake before Ray starts, and of
    Mistakes ClusterLost where Ray was lost and did not come back.
    """
    if cluster and not ray_address:
        raise Mistake(f"cluster={str(cluster)!r} goes with ray_address: this sweep would run on this machine")
    experiment = pin_starts(load(file, command.add_tracking(overrides, tracking_uri), smoke), str(storage))
    trials, sources = _load_trials(experiment)
    grows_to = read_cluster(Path(cluster)) if cluster else None
    cli.tell(describe_data(sources.values()), (), quiet=quiet)
    asked = Command(
        storage=str(storage),
        ray_address=ray_address,
        cluster=grows_to,
        fresh=fresh,
        quiet=quiet,
        verbose=verbose,
    )
    status = command.make(experiment, trials, sources, asked)
    return Outcome(experiment.name, str(storage), status)


def _load_trials(experiment: Experiment) -> tuple[dict[RowId, Variant], dict[DataConfig, Source]]:
    """The trials by id, and their data. Warns at the line that called the function which calls this one."""
    trials, sources, texts = command.list_trials(experiment)
    for text in texts:
        warnings.warn(text, stacklevel=3)
    return trials, sources


def load_results(sweep: str, storage: str | Path = "runs", *, collapse_seeds: bool = False) -> "pd.DataFrame":
    """A row a trial, the best first, as the storage has it now: also while the sweep runs. Raises Mistake.

    Where seeds were searched, those of one setting stand together, at the place of their mean; `collapse_seeds` makes
    one row of them, with means, standard errors over seeds and over images, and counts: see `make_frame`.
    """
    place = Storage(storage)
    kept = open_sweep(place, sweep)
    rows = read_rows(place, kept, read_events(place, sweep))
    return make_frame(rank_rows(list_asked(rows), kept.metric), collapse_seeds)


@dataclass(frozen=True)
class DiffusionModel:
    """A trained eps_theta with its process, on the CPU. `shape` is that of an image: (height, width, channels)."""

    network: Any  # workers.diffusion.predictions.Denoiser: of p_theta all that it says
    process: "AnyProcess"
    shape: tuple[int, int, int]
    checkpoint: "Checkpoint"
    space: "PixelSpace"  # what is diffused: where it is a LatentSpace, x_t are latents

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label: of a model that is told the class of each image; else none."""
        return self.network.classes.names if self.network.classes else ()

    def __call__(
        self,
        x_t: "torch.Tensor",
        t: "torch.Tensor",
        *,
        labels: "torch.Tensor | None" = None,
        vectors: "np.ndarray | torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """eps_theta(x_t, t): x_t float32 (N, C, H, W), t int64 (N,) in 1..T; of a continuous process real, float64.

        A model that is told classes takes `labels`, int64 (N,): -1 tells none, where it was trained without, too. One
        that is told vectors takes `vectors`, float32 (N, length, width), or (length, width) for all; zeros tell none.
        """
        import torch

        told = self._check_told(labels, vectors, len(x_t))
        if told is None and self.network.told:
            what = "the class of each image; give labels" if self.class_names else "vectors of each image; give vectors"
            raise Mistake(f"this model is told {what}=...")
        with torch.no_grad():
            return torch.as_tensor(self.network(x_t, t, told).eps)

    def _check_told(self, labels: Any, vectors: Any, n: int) -> "torch.Tensor | None":
        """What n images are said to be of: labels, or vectors, float32 (n, length, width). Raises Mistake."""
        import torch

        from workers.classes import Vectors

        if vectors is None:
            return self._check_labels(labels, n)
        told = self.network.told
        if labels is not None or not isinstance(told, Vectors):
            raise Mistake("this model is told no vectors; leave vectors out")
        found = torch.as_tensor(vectors, dtype=torch.float32)
        found = found.expand(n, *found.shape) if found.dim() == 2 else found
        fits = found.dim() == 3 and len(found) == n and told.fits(found.shape[1], found.shape[2])
        if not fits or not found.isfinite().all():
            one = f"{told.length or 'length'}, {told.width}"
            raise Mistake(
                f"vectors: {tuple(found.shape)} were given; give finite numbers, ({one}) for all or ({n}, {one}), a "
                f"row for each of {n} images"
            )
        return found

    def _check_labels(self, labels: Any, n: int) -> "torch.Tensor | None":
        """int64 (n,): of one label for all, by name or number, or of one each. Raises Mistake."""
        import torch

        if labels is None:
            return None
        classes, least = self.network.classes, -1 if self.network.takes_no_label else 0
        if classes is None:
            raise Mistake("this model is told no classes; leave labels out")
        listed = [labels] * n if isinstance(labels, str | int) else list(labels)
        found = torch.tensor([classes.find(label) if isinstance(label, str) else int(label) for label in listed])
        if len(found) != n or not ((found >= least) & (found < len(classes.names))).all():
            most = len(classes.names) - 1
            raise Mistake(f"labels: give one for all or one for each of {n} images, of {least} to {most} or by name")
        return found

    def _choose_sampler(self, n: int, steps: int | None, eta: float) -> SamplerConfig:
        """Raises Mistake where so many samples or steps cannot be drawn."""
        T, student = self.process.T, self.process.student
        if n < 1 or (steps is not None and not 1 <= steps <= (T or max(steps, 1))):
            most = f"1 to T = {T}" if T else "at least 1"
            raise Mistake(f"sample({n}, steps={steps}): n is at least 1, and steps are {most} or None")
        if student:
            own = choose_own_sampler(student, steps).model_copy(update={"eta": eta})
            check_drawing(student, own)
            return own
        if T is None and eta:
            raise Mistake(f"sample(eta={eta}): DDIM steps along T times, and the process is continuous; leave it out")
        if T is None:
            return SamplerConfig(kind="heun", steps=steps or CONTINUOUS_STEPS)
        return SamplerConfig(kind="ddim", steps=steps, eta=eta) if steps else SamplerConfig()

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        eta: float = 0.0,
        labels: "int | str | Sequence[int | str] | None" = None,
        vectors: "np.ndarray | torch.Tensor | None" = None,
        guidance: float | None = None,
        levels: int | None = 256,
    ) -> "np.ndarray":
        """n samples (n, H, W, C): ancestral, or by DDIM where `steps` are given.

        In 0..levels-1, of uint8 or uint16; where `levels` are None, which is for data that are not discrete, float32
        in [-1, 1]. Of a continuous process they are by Heun's rule, in 18 steps where none are given; `eta` is not for
        it. Of a student they are as it was made to be drawn.

        Of a model that is told classes they are of `labels`, one for all or one each, by number or name, and else in
        the proportions of the training images; of one that is told vectors they are of `vectors`, (length, width) for
        all or (n, length, width). `guidance` is the scale of `workers.diffusion.guidance`.
        """
        import numpy as np
        import torch

        from workers.data.decoding import choose_type
        from workers.data.pixels import to_data
        from workers.diffusion.guidance import tell
        from workers.diffusion.samplers import sample
        from workers.network.manifest import get_most_bytes
        from workers.noise import make_generator

        config = self._choose_sampler(n, steps, eta)
        height, width, channels = self.shape
        rows, columns, deep = self.space.find_shape(self.shape)
        if (size := n * height * width * channels) > get_most_bytes():
            raise Mistake(
                f"sample({n}): {n:,} images of {height}x{width} are {size / 1e9:,.1f} GB, more than the "
                f"{get_most_bytes() / 1e9:.1f} GB that are taken here at once; ask for fewer, by several seeds"
            )
        if guidance is not None and (guidance < 0 or (guidance != 1 and not self.network.takes_no_label)):
            needed = "at least 0" if guidance < 0 else "1 for a model that was not trained with training.label_dropout"
            raise Mistake(f"guidance={guidance}: it is {needed}")
        if levels is not None and not 2 <= levels <= 2**16:
            raise Mistake(f"levels={levels}: they are 2 to {2**16:,}, or None")
        told = self._check_told(labels, vectors, n)
        if told is None and self.network.told:
            if not self.network.classes:
                raise Mistake("this model is told vectors of each image; give vectors=...")
            told = torch.from_numpy(self.network.classes.assign(np.arange(n)))
        found = np.empty((n, height, width, channels), choose_type(levels))
        for first in range(0, n, DRAWN_AT_ONCE):  # the network's memory is that of so many, whatever n is
            shape = (min(DRAWN_AT_ONCE, n - first), deep, rows, columns)
            noise = make_generator(seed, "model", *([first] if first else []))
            with torch.no_grad():
                part = None if told is None else told[first : first + shape[0]]
                model, clip = tell(self.network, part, guidance), self.space.bounded
                images = self.space.decode(sample(self.process, model, config, shape, noise, clip=clip))
            found[first : first + len(images)] = to_data(images, levels).numpy()
        return found


def open_model(target: str | Path, storage: str | Path = "runs", *, trust_code: bool = False) -> DiffusionModel:
    """The model of a trial (its id or the start of one), of a sweep's best trial, or of a checkpoint's folder.

    `trust_code` consents to run code of one's own that lies there and never ran on this machine: from here on, and all
    that this process finds. Raises Mistake where there is no model, or where its bytes are damaged.
    """
    from orchestrator.measuring import subjects
    from workers.network import checkpoint as checkpoints
    from workers.network.latent_space import load_space

    if trust_code:
        give_consent()
    checkpoint = subjects.find_model(str(target), Storage(storage))
    network, process = checkpoints.load(checkpoint)
    return DiffusionModel(network, process, checkpoints.describe(checkpoint).shape, checkpoint, load_space(checkpoint))
