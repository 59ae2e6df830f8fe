"""`python -m orchestrator.sample TARGET`: pictures of what a checkpoint makes, as PNG files and MLflow images.

    samples.png          a grid of samples by the sampler of the evaluation; a row a class where the model is told them,
                         and a row a held-out image's vectors where it is told those
    progressive.png      x_0_hat along all T ancestral steps, a sample a row
    interpolation.png    two held-out images blended at several t, or noise levels, and decoded, one a row
    coding.png           held-out images as x_0_hat(x_t) shows them, by the bits received
    coding_curve.png     rate against distortion of progressive coding

Of a model in continuous time there is no coding, of one of latents there are the first two, and of an autoencoder or a
generator samples and what it makes of held-out images. One process, without Ray.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from orchestrator import cli
from orchestrator.experiment.settings import show
from workers.config import SAMPLE_GRID_STEPS, Measurement, Mistake, SamplerConfig
from workers.identity import describe_sampler
from workers.kinds import DENOISER
from workers.layout import name_pictures_folder
from workers.students import Student, choose_own_sampler

EXAMPLES = (
    "aca8d9a9 evaluation.fid.sampler.kind=heun evaluation.fid.sampler.steps=18 --n 100",
    "aca8d9a9 --between 3 7 --at 25 50 75",
    "aca8d9a9 --label 3 evaluation.fid.sampler.guidance=2",
    "ddpm-cifar10-32 data.source=cifar10.parquet",
)
ROWS, FRAMES, BLENDS, RATES = 8, 11, 9, 8  # of the pictures
MOST = 10_000  # samples of the grid, all drawn at once
LEAST_BLENDED = 0.1  # noise level: of less the blends are seen as they are
CURVE_IMAGES = 25  # held-out images of the coding curve where the evaluation has not measured it


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("sample", "TARGET [a.b=value ...]", EXAMPLES)
    result.add_argument(
        "target", metavar="TARGET", help="a trial's id, or a folder with a checkpoint, ours or diffusers'"
    )
    cli.add_overrides(result)
    result.add_argument("--n", type=int, default=64, help="samples of the grid (default: 64)")
    result.add_argument("--between", type=int, nargs=2, default=(0, 1), metavar=("A", "B"),
                        help="the held-out images to interpolate between, by their number (default: 0 1)")  # fmt: skip
    result.add_argument("--at", type=int, nargs="+", metavar="T", help="times to blend at (default: eighths of T)")
    result.add_argument("--label", metavar="CLASS", help="draw samples of this class alone, by its number or name, "
                        "where the model was trained with model.labels")  # fmt: skip
    result.add_argument("--row", type=int, nargs="+", metavar="K", help="draw samples of the vectors of these held-out "
                        "images, by their number, where the model was trained with model.conditions: vectors "
                        f"(default: the first {ROWS})")  # fmt: skip
    cli.add_storage(result)
    cli.add_code(result)
    cli.add_trust(result)
    cli.add_tracking_uri(result, "that of the trial's sweep, or the storage's")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="The same command draws them again.")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    from orchestrator.experiment.load import list_values, open_folders
    from orchestrator.experiment.preflight import describe_data
    from orchestrator.measuring import subjects  # torch loads here: --help does without
    from orchestrator.tracking.outside import record_pictures
    from workers.network import checkpoint as checkpoints
    from workers.storage import Storage

    open_folders(options.code, list_values(options.overrides))
    storage = Storage(options.storage)
    found = subjects.find(options.target, storage, options.overrides, None)
    if len(found) > 1:
        names = ", ".join(dict.fromkeys(str(s.trial)[:8] for s in found))
        raise Mistake(f"{options.target} is a sweep of several trials or measurements; give a trial: {names}")
    [subject] = found
    sources, warnings = subjects.check(found)
    cli.tell(describe_data(sources.values()), warnings)
    source = sources[subject.m.data]
    problems = [] if 1 <= options.n <= MOST else [f"--n {options.n}: 1 to {MOST:,}, which make one picture"]
    problems += [f"{option} {k}: the held-out images of {source.name} are 0..{source.held_out - 1}"
                 for option, rows in (("--between", options.between), ("--row", options.row or ()))
                 for k in rows if not 0 <= k < source.held_out]  # fmt: skip
    if options.row and subject.m.told != "vectors":
        problems.append(
            "--row: this model is told no vectors; leave it out, or train one with model.conditions: vectors"
        )
    T = None if subject.m.latent else subject.m.T
    is_stage = subject.m.family != DENOISER
    if is_stage and (options.at or options.label):
        problems.append("--at and --label are of denoisers, and this model decodes noise by one pass; leave them out")
    elif T is None and options.at:
        what = "diffuses latents" if subject.m.latent else "is of continuous time, whose blends are at noise levels"
        problems.append(f"--at: the model {what}, and pictures at times are of those of pixels with T of them")
    problems += [f"--at {t}: the times are 1..{T}" for t in options.at or () if T and not 1 <= t <= T]
    if problems:
        raise Mistake("\n".join(problems))
    label = None if options.label is None else find_label(subject.checkpoint, options.label)
    storage.check_writable()
    times = options.at or sorted({max(1, T * k // 8) for k in range(1, 9)}, reverse=True) if T else []
    sampler = show(describe_sampler(choose_sampler(subject.m, checkpoints.describe(subject.checkpoint).student)))
    print("samples of the prior" if is_stage else f"samples by evaluation.fid.sampler = {sampler}", file=sys.stderr)
    folder = name_pictures_folder(subject.checkpoint.digest)
    storage.remove_leftovers(folder)
    paths = {}
    asked = label if subject.m.told == "labels" else options.row
    for name, content in make_pictures(storage, subject, options.n, tuple(options.between), times, of=asked).items():
        paths[name] = f"{folder}/{name}.png"
        storage.write(paths[name], content)
        print(storage.find_url(paths[name]))
    if left := record_pictures(storage, options.tracking_uri, subject, paths):
        print(left)
    return cli.DONE


def choose_sampler(m: Measurement, student: Student | None) -> SamplerConfig:
    """The evaluation's; where it draws no samples, that of the papers, or of the student that it is."""
    if m.evaluation.fid:
        return m.evaluation.fid.sampler
    if student:
        return choose_own_sampler(student)
    return SamplerConfig() if m.T else SamplerConfig(kind="heun", steps=18)


def find_label(checkpoint: Any, text: str) -> int:
    """The label of a class by its name or number. Raises Mistake where the checkpoint's network knows none such."""
    from workers.network import checkpoint as checkpoints

    classes = checkpoints.describe(checkpoint).classes
    if classes is None:
        raise Mistake(f"--label {text}: this model is told no classes; leave it out, or train one with model.labels")
    try:
        return int(classes.find(text))
    except Mistake as mistake:
        raise Mistake(f"--label: {mistake}") from None


class _Grid(NamedTuple):
    """Of which classes the samples of a grid are, or of which images' vectors, and how they stand."""

    n: int
    asked: list[int]
    columns: int | None = None  # None: as many as there are rows
    names: Sequence[str] = ()  # of the rows


class _Opened:
    """The model and the data of a `Subject` in memory, and the tensors that its pictures begin with."""

    def __init__(self, subject: Any) -> None:
        import torch

        from workers.data.dataset import prepare
        from workers.evaluation.loaded import load_model
        from workers.evaluation.make import make_measured_process

        self.m = subject.m
        self.dataset = prepare(self.m.data)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(subject.checkpoint, self.device)
        self.network: Any = loaded.network
        self.process: Any = make_measured_process(self.m, loaded.process)
        self.space: Any = loaded.space
        self.sampler = choose_sampler(self.m, loaded.process.student)

    def tell(self, asked: Sequence[int], guidance: float | None = None) -> Any:
        """The model of a batch of these classes, or of the vectors of these held-out images, where it is told any."""
        import numpy as np
        import torch

        from workers.diffusion.guidance import tell

        told = None
        if self.network.classes:
            told = torch.tensor(asked, device=self.device)
        elif self.network.told:
            assert self.dataset.held_out_vectors is not None
            told = torch.from_numpy(np.array(self.dataset.held_out_vectors[list(asked)])).to(self.device)
        return tell(self.network, told, guidance)

    def take_held_out(self, rows: Sequence[int]) -> tuple[Any, Any]:
        """Held-out images, float32 NCHW, and the model of them."""
        import numpy as np
        import torch

        from workers.data.pixels import to_model

        images, labels = self.dataset.held_out[list(rows)], self.dataset.held_out_labels
        told = self.tell(list(rows) if labels is None or not self.network.classes else [int(labels[k]) for k in rows])
        return to_model(torch.from_numpy(np.array(images)), self.dataset.levels).to(self.device), told

    def arrange_grid(self, n: int, of: int | Sequence[int] | None) -> _Grid:
        """About n samples: of one class, or else in rows of a class each, or of the vectors of an image each."""
        classes = self.network.classes
        if self.network.told is None or isinstance(of, int):
            return _Grid(n, [of or 0] * n)  # type: ignore[list-item]
        if classes:
            rows = classes.list_trained()[:n]
            names = [classes.names[row] for row in rows]
        else:
            rows = list(of or range(min(ROWS, len(self.dataset.held_out))))[:n]
            names = [f"image {row}" for row in rows]
        asked = [row for row in rows for _ in range(n // len(rows))]
        return _Grid(len(asked), asked, n // len(rows), names)

    def draw_x_T(self, n: int, *where: str) -> tuple[Any, Any]:
        """x_T, and the generator that it comes from, at an address of its own."""
        import torch

        from workers.noise import make_generator

        height, width, channels = self.space.find_shape(self.dataset.shape)
        noise = make_generator(self.m.seed, "pictures", *where)
        return torch.randn((n, channels, height, width), generator=noise).to(self.device), noise


def make_pictures(
    storage: Any,
    subject: Any,
    n: int,
    between: tuple[int, int],
    times: Sequence[int],
    *,
    of: int | Sequence[int] | None = None,
) -> dict[str, bytes]:
    """The PNG files by name, of a `Subject`. Noise is addressed by its seed, so the same command draws the same.

    Samples are `of` a class, or of the vectors of held-out images, where it is given; real images are shown as those of
    their own class and vectors.
    """
    from workers.autoencoding import draw_stage
    from workers.data.dataset import prepare
    from workers.data.pixels import draw_grid, to_data
    from workers.diffusion.samplers import draw
    from workers.evaluation.pictures import draw_progressive
    from workers.network.checkpoint import load_decoder

    if subject.checkpoint.family != DENOISER:
        stage, dataset = load_decoder(subject.checkpoint), prepare(subject.m.data)
        return draw_stage(stage, dataset, subject.m.seed, n, ROWS)
    opened = _Opened(subject)
    process, sampler, levels, space = opened.process, opened.sampler, opened.dataset.levels, opened.space
    grid, strips = (opened.arrange_grid(count, of) for count in (n, ROWS))
    x_T, noise = opened.draw_x_T(grid.n, "samples")
    told = opened.tell(grid.asked, sampler.guidance)
    samples = space.decode(draw(process, told, sampler, x_T, noise, clip=space.bounded).x_0)
    drawn = {"samples": draw_grid(to_data(samples, levels), levels, columns=grid.columns, names=grid.names)}
    if process.student:  # what is between noise and image means nothing of it
        return drawn
    x_T, noise = opened.draw_x_T(strips.n, "progressive")
    told = opened.tell(strips.asked, sampler.guidance)
    along = SamplerConfig() if process.T else SamplerConfig(kind="euler", steps=SAMPLE_GRID_STEPS)
    strip = draw_progressive(process, told, along, x_T, noise, frames=FRAMES, space=space)
    found = {
        **drawn,
        "progressive": draw_grid(to_data(strip.flatten(0, 1), levels), levels, columns=strip.shape[1]),
    }
    if not space.bounded:  # of latents, whose blends and whose coding are not those of images
        return found
    if process.T:
        return found | _make_pictures_of_chain(storage, subject, opened, between, times)
    return found | {"interpolation": _interpolate_in_continuous_time(opened, between)}


def _interpolate_in_continuous_time(opened: _Opened, between: tuple[int, int]) -> bytes:
    """Blends of two held-out images at noise levels, each as far from the next as a factor says."""
    import numpy as np
    import torch

    from workers.diffusion.guidance import take_rows
    from workers.evaluation.pictures import interpolate_along_flow
    from workers.noise import make_generator

    (ends, told), weights, rows = opened.take_held_out(between), torch.linspace(0, 1, BLENDS), []
    nearer, (low, high) = take_rows(told, (weights > 0.5).long()), opened.process.ends
    sigmas = np.geomspace(high, max(low, LEAST_BLENDED), ROWS).tolist()
    for k, sigma in enumerate(sigmas):
        noise = make_generator(opened.m.seed, "pictures", "interpolation", k)
        blends = interpolate_along_flow(opened.process, nearer, ends, sigma, weights, generator=noise)
        rows += [ends[:1], blends, ends[1:]]
    return _tabulate_blends(torch.cat(rows), between, weights, [f"σ = {sigma:.2g}" for sigma in sigmas], opened)


def _tabulate_blends(x: Any, between: tuple[int, int], weights: Any, sides: Sequence[str], opened: _Opened) -> bytes:
    from workers.data.pixels import to_data, to_picture

    levels = opened.dataset.levels
    heads = [f"image {between[0]}", *(f"{w:.3g}" for w in weights.tolist()), f"image {between[1]}"]
    return draw_labelled(to_picture(to_data(x, levels), levels).numpy(), heads, sides, "share of the second image")


def _make_pictures_of_chain(
    storage: Any, subject: Any, opened: _Opened, between: tuple[int, int], times: Sequence[int]
) -> dict[str, bytes]:
    """Those that are made along the T times: interpolation and progressive coding."""
    import torch

    from workers.data.pixels import to_data, to_picture
    from workers.diffusion.guidance import take_rows
    from workers.evaluation.pictures import decode_at, interpolate
    from workers.noise import make_generator

    m, process, levels = opened.m, opened.process, opened.dataset.levels

    (ends, told), weights, rows = opened.take_held_out(between), torch.linspace(0, 1, BLENDS), []
    nearer = take_rows(told, (weights > 0.5).long())
    for t in times:
        noise = make_generator(m.seed, "pictures", "interpolation", t)
        rows += [ends[:1], interpolate(process, nearer, ends, t, weights, generator=noise), ends[1:]]
    rate, rmse = _find_curve(storage, subject, opened)
    sent = _choose_steps(rmse)
    real, told = opened.take_held_out(range(min(ROWS, len(opened.dataset.held_out))))
    noise = make_generator(m.seed, "pictures", "coding")
    shown = decode_at(process, told, real, [process.T - k for k in sent], noise)
    coded = torch.cat([shown, real[:, None]], dim=1)
    pictures, heads = to_picture(to_data(coded.flatten(0, 1), levels), levels), [f"{rate[k]:.3g}" for k in sent]
    return {
        "interpolation": _tabulate_blends(torch.cat(rows), between, weights, [f"t = {t}" for t in times], opened),
        "coding": draw_labelled(pictures.numpy(), [*heads, "image"], title="bits/dim received"),
        "coding_curve": draw_curve(rate, rmse),
    }


def _find_curve(storage: Any, subject: Any, opened: _Opened) -> tuple[Any, Any]:
    """Rate and distortion by the steps of progressive coding, as they were measured or else of some images."""
    import numpy as np

    from workers.evaluation.blocks import Images, name_summary
    from workers.evaluation.pictures import compute_coding_curve
    from workers.noise import make_generator

    m, dataset = opened.m, opened.dataset
    summary = storage.read_sealed(name_summary(m, subject.checkpoint.digest, Images.of(dataset))) or {}
    if curve := summary.get("rate_distortion"):
        return np.array(curve["rate_bpd"]), np.array(curve["rmse_255"])
    some, told = opened.take_held_out(range(min(CURVE_IMAGES, len(dataset.held_out))))
    return compute_coding_curve(opened.process, told, some, dataset.levels, make_generator(m.seed, "pictures", "curve"))


def _choose_steps(rmse: Any) -> list[int]:
    """Steps evenly spaced in what is seen: most of the bits are spent where the eye finds no difference any more."""
    import numpy as np

    return sorted({int(np.abs(rmse - error).argmin()) for error in np.linspace(rmse[0], rmse[-1], RATES)})


def draw_labelled(images: Any, heads: Sequence[str], sides: Sequence[str] = (), title: str = "") -> bytes:
    """NHWC in 0..255 -> PNG: a column for each of `heads`, which stand above, rows with `sides` at their left."""
    from matplotlib.figure import Figure

    columns = len(heads)
    rows, wide = len(images) // columns, max(1, images.shape[2] / images.shape[1])
    figure = Figure(figsize=(columns * 0.9 * wide, rows * 0.9 + 0.5), layout="constrained")
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.imshow(images[k] / 255, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if k < columns:
            axes.set_title(heads[k], fontsize=8)
        if k % columns == 0 and sides:
            axes.set_ylabel(sides[k // columns], fontsize=8)
    figure.suptitle(title, fontsize=9)
    return _make_png(figure)


def draw_curve(rate: Any, rmse: Any) -> bytes:
    """Distortion against rate, and both against the steps of the reverse process (Ho et al. 2020, figure 5)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    by_step, rates, both = figure.subplots(1, 3)
    steps = range(1, len(rate) + 1)
    by_step.plot(steps, rmse)
    by_step.set(xlabel="steps of the reverse process", ylabel="distortion (RMSE on 0..255)")
    rates.plot(steps, rate)
    rates.set(xlabel="steps of the reverse process", ylabel="rate (bits/dim)")
    both.plot(rate, rmse, marker=".", markersize=3)
    both.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE on 0..255)")
    return _make_png(figure)


def _make_png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(cli.call("sample", main))
