"""Latent diffusion: the bound of the hierarchy, and that it is pixel diffusion where the encoder is the identity."""

import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import small_evaluation as small
import torch
from experiment_files import experiment, problems, search
from linear_stage import LinearStage, make_identity, make_stage
from mlflow import MlflowClient
from saved_model import asked

from orchestrator.api import open_model
from orchestrator.experiment.dry_run import format_dry_run
from orchestrator.experiment.records import ExperimentError
from orchestrator.experiment.settings import merge
from orchestrator.origins import keep_copies, pin_starts
from orchestrator.sweep import list_trials
from orchestrator.tracking.models import Candidate
from orchestrator.tracking.tracker import Tracker
from workers.config import (
    DataConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    NLLConfig,
    ODENLLConfig,
    SamplerConfig,
    Trial,
)
from workers.data.dataset import Dataset, prepare
from workers.data.sources import describe_source
from workers.diffusion.gaussian import GaussianDenoiser, make_denoiser_config
from workers.diffusion.hierarchy import StageTerms
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process
from workers.evaluation.blocks import Images, list_blocks
from workers.evaluation.loaded import LoadedModel, load_model
from workers.evaluation.make import Bench, draw_block, make
from workers.evaluation.summary import summarise
from workers.kinds import VARIANCES, VarianceEntry
from workers.latents import TrainingLatents, prepare_latents
from workers.layout import name_start_folder
from workers.learner import Learner
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.latent_space import PIXELS, LatentSpace
from workers.network.manifest import Checkpoint
from workers.noise import make_generator
from workers.storage import Storage
from workers.training import train
from workers.warm_start import ENCODER, split_pin
from workers.world import World

F64 = torch.float64
CPU = torch.device("cpu")
N = 60
PARTS = ("prior", "diffusion", "decoder", "posterior")  # of the rate


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def best(p: Process) -> torch.Tensor:
    """Var[x_{t-1} | x_t] of pixels from N(0, I)."""
    return p.beta_tilde + p.posterior_x_0.square() * (1 - p.alpha_bar)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """Each of whose steps is the true one of N(0, I), at t = 1 as well: its bound of such data is their entropy."""
    monkeypatch.setitem(VARIANCES, "best", VarianceEntry(function=best, about="the true one"))
    monkeypatch.setattr("workers.diffusion.process._for_decoder", lambda process, variance: variance)
    monkeypatch.setattr(Process, "decoder_sigma_squared", property(lambda q: q.sigma_squared[0]))
    return Process.of_betas(torch.linspace(0.01, 0.6, 12), "best")


def make_dataset(images: np.ndarray) -> Dataset:
    return Dataset("d3", "linear", None, (4, 4, 1), images, images, None, None, span=(-1.0, 1.0))


def draw_dataset(stage: LinearStage, n: int = N) -> Dataset:
    return make_dataset(stage.draw(n, make_generator("x")).permute(0, 2, 3, 1).numpy())


# ---- The bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_terms_of_an_exact_posterior_are_the_likelihood_of_each_image(scale: float) -> None:
    """log p(x) = log p(x | z) + log p(z) - log q(z | x) for any z where q is the posterior, on any scale of z."""
    stage = make_stage(3)
    x, image = stage.draw(N, make_generator("x")), np.arange(N)
    z, terms = LatentSpace(stage, scale).measure(x, None, 0, image)
    assert isinstance(terms, StageTerms) and np.allclose(terms.squared_norm, z.double().square().flatten(1).sum(1))
    prior = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), scale).log_prob(z.double()).flatten(1).sum(1)
    found = torch.from_numpy(terms.distortion + terms.posterior) - prior
    torch.testing.assert_close(found, stage.compute_exact(x), rtol=0, atol=1e-3)
    again = LatentSpace(stage, scale).encode(x[7:9], 0, image[7:9])
    torch.testing.assert_close(again, z[7:9])  # an image's draw is its own, in whatever batch it is


def evaluate(root: Path, model: LoadedModel, dataset: Dataset, **evaluation: Any) -> dict[str, Any]:
    """The summary of a model that is not loaded of a checkpoint, by blocks."""
    m = Measurement(
        seed=1, data=DataConfig(source="digits"), T=model.process.T, latent=not model.space.bounded,
        evaluation=EvaluationConfig(fid=None, **evaluation),
    )  # fmt: skip
    bench = Bench(Storage(root), m, dataset, small.checkpoint_in(Storage(root)), CPU)
    vars(bench)["model"] = model
    for block in list_blocks(m, bench.checkpoint.digest, Images.of(dataset)):
        make(bench, block)
    return summarise(bench.storage, m, dataset, model.process, bench.checkpoint.digest, space=None)


def test_the_bound_of_linear_gaussian_images_is_their_likelihood(tmp_path: Path, process: Process) -> None:
    """The best denoiser of N(0, I) in the latents, by blocks: within 4 standard errors of the noise of x_t, by either
    likelihood; the parts add up, and all is a dimension of the image."""
    stage = make_stage(3)
    dataset = draw_dataset(stage)
    denoiser = Denoiser(GaussianDenoiser(make_denoiser_config(1.0, 1, 3), process), process, "eps")
    model = LoadedModel(denoiser, process, CPU, space=LatentSpace(stage, 1.0))
    summary = evaluate(tmp_path, model, dataset, nll=NLLConfig(), ode_nll=ODENLLConfig(images=20, tolerance=1e-5))
    exact = stage.compute_exact(torch.from_numpy(dataset.held_out).permute(0, 3, 1, 2)).numpy() / (16 * math.log(2))
    metrics, found = summary["metrics"], np.array(summary["density_per_image"])
    noise = found - exact
    assert abs(noise.mean()) < 4 * noise.std(ddof=1) / N**0.5 and noise.std(ddof=1) < 0.5
    assert metrics["eval/density_bpd"] == pytest.approx(found.mean())
    rate = sum(metrics[f"eval/density_{part}_bpd"] for part in PARTS)
    assert rate == pytest.approx(metrics["eval/rate_bpd"])
    assert rate + metrics["eval/density_distortion_bpd"] == pytest.approx(metrics["eval/density_bpd"])
    by_t = sum(summary["nll_by_t"]) + metrics["eval/density_posterior_bpd"]
    assert by_t == pytest.approx(metrics["eval/rate_bpd"])
    ode = np.array(summary["ode_density_per_image"])
    np.testing.assert_allclose(ode, exact[:20], atol=0.02)
    passport = summary["passports"]["nll"]["protocol"]
    assert passport["x_0_hat"] == "not clipped" and "a dimension of the image" in passport["hierarchy"]
    assert "hierarchy" in summary["passports"]["ode_nll"]["protocol"] and "rate_distortion" not in summary


# ---- The identity ------------------------------------------------------------------------------------------------

TRIAL = experiment(
    model={"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [2], "dropout": 0.1},
    diffusion={"T": 25, "schedule": {"scale": "per_1000"}},
    training={"steps": 3, "batch_size": 16, "lr": 1e-3, "precision": "float32"},
).trial


def make_values(n: int = 64) -> np.ndarray:
    return (0.2 * np.random.RandomState(4).randn(n, 4, 4, 1)).clip(-1, 1).astype(np.float32)


def test_with_the_identity_the_losses_of_latents_are_those_of_pixels(tmp_path: Path) -> None:
    """Of each step: batches, times, noise of x_t and dropout are the same, and only z differs from x by a millionth."""
    dataset = make_dataset(make_values())
    made = prepare_latents(dataset, stage := make_identity(), "identity", tmp_path)
    latents = TrainingLatents(made.kept, LatentSpace(stage, 1.0))
    pixels, hidden = Learner(TRIAL, dataset, World()), Learner(TRIAL, dataset, World(), latents=latents)
    assert hidden.config == pixels.config
    for _ in range(TRIAL.training.steps):
        pixels.train_step()
        hidden.train_step()
    torch.testing.assert_close(hidden.sums, pixels.sums, rtol=1e-4, atol=0)


def test_with_the_identity_bound_and_samples_are_those_of_pixels(tmp_path: Path) -> None:
    dataset, p = make_dataset(make_values(12)), small.PROCESS
    best = Denoiser(GaussianDenoiser(make_denoiser_config(0.2, 4, 1), p), p, "eps")
    pixels, hidden = (LoadedModel(best, p, CPU, space=space) for space in (PIXELS, LatentSpace(make_identity(), 1.0)))
    own, found = (
        evaluate(tmp_path / str(k), model, dataset, nll=NLLConfig())["metrics"]
        for k, model in enumerate((pixels, hidden))
    )
    for part in ("prior", "diffusion", "decoder"):
        name = f"eval/density_{part}_bpd"
        assert found[name] == pytest.approx(own[name], abs=1e-4)
    # What is coded twice, by noise of a millionth around each pixel, is taken back.
    assert found["eval/density_bpd"] == pytest.approx(own["eval/density_bpd"], abs=1e-3)
    fid = FIDConfig(sampler=SamplerConfig(kind="heun", steps=4))
    images, again = (draw_block(m, fid, 0, 0, shape=(4, 4, 1), levels=17)[0] for m in (pixels, hidden))
    assert np.array_equal(images, again)


# ---- What is kept of the training images -------------------------------------------------------------------------


def test_latents_are_made_once_scaled_and_made_again_where_they_are_damaged(tmp_path: Path) -> None:
    stage = make_stage(3)
    dataset = draw_dataset(stage, 2000)
    made = prepare_latents(dataset, stage, "a", tmp_path)
    noise = torch.randn(2000, 3, 1, 1, generator=make_generator("noise"))
    z = made.draw(torch.from_numpy(np.array(made.kept)), noise)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    x = torch.from_numpy(dataset.train).permute(0, 3, 1, 2)
    expected = made.space.scale * stage.encode(x).sample(noise)
    torch.testing.assert_close(z, expected)
    [file], before = tmp_path.glob("latents/*/posteriors.npy"), np.array(made.kept)
    written = file.stat().st_mtime_ns
    assert prepare_latents(dataset, stage, "a", tmp_path).space.scale == made.space.scale
    assert file.stat().st_mtime_ns == written
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(prepare_latents(dataset, stage, "a", tmp_path).kept, before)
    assert prepare_latents(dataset, stage, "b", tmp_path) and len(list(tmp_path.glob("latents/*/meta.json"))) == 2


# ---- A trial of latents ------------------------------------------------------------------------------------------

STAGE = {"kind": "autoencoder", "channels": 8, "multipliers": [1, 2], "blocks": 1, "latent_channels": 2}
LATENT = {
    "data": {"encoder": {"source": "vae"}},
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "diffusion": {"T": 25, "schedule": {"scale": "per_1000"}},
    "training": {"steps": 6, "batch_size": 16, "precision": "float32", "validate_every": 3, "checkpoint_every": 3},
    "needs": {"vae": {"model": STAGE, "loss": {"objective": "elbo"}, "training.steps": 4}},
}


def test_latents_are_known_before_the_autoencoder_is_trained(tmp_path: Path) -> None:
    pinned = pin_starts(experiment(**LATENT), str(tmp_path))
    rows, sources, warned = list_trials(pinned)
    assert any("no prediction of latents is clipped" in text for text in warned)  # beta_T is 0.8
    vae, latent = rows
    assert rows[vae].role == "vae" and rows[latent].trial.data.encoder.latents == (2, 1)
    assert rows[vae].trial.data.encoder is None and rows[vae].trial.model.family == "autoencoder"
    source = sources[rows[latent].trial.data]
    assert source.diffused == (4, 4, 2) and "diffused as latents of 4x4 in 2 channels" in describe_source(source)
    line = next(line for line in format_dry_run(rows, sources).splitlines() if line.startswith(latent))
    assert vae[:8] in line
    longer = experiment(**merge(LATENT, {"needs": {"vae": {**LATENT["needs"]["vae"], "training.steps": 5}}}))
    assert list(list_trials(pin_starts(longer, str(tmp_path)))[0])[1] != latent
    space = search({"data.encoder": {"grid": [None, {"source": "vae"}]}})
    both = list_trials(pin_starts(experiment(**{**LATENT, "search": space}), str(tmp_path)))[0]
    assert list(both)[::2] == [vae, latent] and len(both) == 3


def test_what_is_no_encoder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def told(**changes: Any) -> list[str]:
        with pytest.raises(ExperimentError) as caught:
            pin_starts(experiment(**merge(LATENT, changes)), str(tmp_path))
        return caught.value.problems

    needs = LATENT["needs"]["vae"]
    [denoiser] = told(needs={"vae": {**needs, "model": {"kind": "unet"}, "loss": {"objective": "mse"}}})
    assert denoiser.startswith("data.encoder.source: vae: is a denoiser, which encodes nothing; name a trial with")
    [size] = told(needs={"vae": {**needs, "data.resolution": 4}})
    assert "encodes images of 4x4 in 1 channels, and those of digits are 8x8 in 1" in size
    [weights] = told(data={"encoder": {"weights": 0.5}})
    assert "has no weights 0.5; it has ema, raw" in weights
    found = problems(**merge(LATENT, {"data": {"flip": True, "stream": 1.0, "shuffle": 2}}))
    assert [text.partition(":")[0] for text in found] == ["data.flip", "data.stream"]
    [preset] = problems(**merge(LATENT, {"data": {"encoder": {"latents": [2, 1]}}}))
    assert preset.startswith("data.encoder.latents: (2, 1) is found by the program")
    [stage] = problems(**merge(LATENT, {"model": STAGE, "loss": {"objective": "elbo"}, "needs": {"vae": {"loss": {}}}}))
    assert stage.startswith("data.encoder: model.kind: autoencoder diffuses nothing and learns from images")
    with pytest.raises(ExperimentError, match=r"model\.attention: "):
        list_trials(pin_starts(experiment(**merge(LATENT, {"model": {"attention": [8]}})), str(tmp_path)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An autoencoder that diffusers saved, with its first weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    of = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    stage = diffusers.AutoencoderKL(
        1, 1, block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, sample_size=8, **of
    )
    stage.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def train_latents(folder: Path, root: Path) -> tuple[Storage, Trial]:
    e = experiment(**{**LATENT, "data": {"encoder": {"source": str(folder)}}, "needs": {}})
    pinned = pin_starts(e, str(root))
    [trial] = [variant.trial for variant in list_trials(pinned)[0].values()]
    keep_copies(pinned, [trial], storage := Storage(root))
    assert trial.data.encoder
    start = f"{name_start_folder(split_pin(trial.data.encoder.source)[1])}/{manifest.name_step(0)}"
    told = [p for p in train(trial, prepare(trial.data), storage, "trials/a", starts={ENCODER: start})]
    assert [p.step for p in told] == [0, 3, 6] and all(math.isfinite(p.metrics["valid/nll_bpd"]) for p in told)
    return storage, trial


FID = FIDConfig(sampler=SamplerConfig(kind="ddim", steps=3))


def draw_registered(storage: Storage, checkpoint: Checkpoint, n: int) -> np.ndarray:
    """Images of the model that MLflow keeps of the checkpoint, registered as a sweep does it."""
    tracker = Tracker(storage, "latents")
    tracker.open_sweep({}, {})
    tracker.open_trial("a", "a", {}, {})
    tracker.register(Candidate(trial="a", checkpoint=checkpoint, levels=17, fid=FID))
    assert (left := tracker.flush(120)).complete, str(left)
    version = MlflowClient(tracker.uri).get_model_version_by_alias("latents", "candidate")
    return np.asarray(mlflow.pyfunc.load_model(version.source).predict(asked(n=n, seed=0)))


def test_a_trained_model_of_latents_draws_pixels_here_in_mlflow_and_in_diffusers(folder: Path, tmp_path: Path) -> None:
    import diffusers

    storage, _ = train_latents(folder, tmp_path / "runs")
    checkpoint = manifest.find_newest(storage, "trials/a/checkpoints")
    assert checkpoint and manifest.open_stage(checkpoint)
    described = checkpoints.describe(checkpoint)
    assert described.latent and described.shape == (8, 8, 1)
    checkpoints.export(checkpoint, tmp_path / "exported")
    again = checkpoints.open_folder(tmp_path / "exported")
    assert again.digest == checkpoint.digest and checkpoints.describe(again) == described
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert type(pipeline).__name__ == "LDMPipeline"
    images = pipeline(batch_size=2, num_inference_steps=20, output_type="np", generator=make_generator("a")).images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()
    model, z = open_model(tmp_path / "exported"), torch.randn(3, 2, 4, 4, generator=make_generator("z"))
    theirs = pipeline.vqvae.decode(z / pipeline.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(model.space.decode(z), theirs.detach(), rtol=1e-4, atol=1e-5)
    assert model.sample(5, steps=3, levels=17).shape == (5, 8, 8, 1)
    measured = draw_block(load_model(checkpoint, CPU), FID, 0, 0, shape=(8, 8, 1), levels=17)[0]
    assert np.array_equal(draw_registered(storage, checkpoint, 5), measured[:5]) and len(np.unique(measured)) > 5
    weights = tmp_path / "exported" / manifest.STAGE_FILES[1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert checkpoints.open_folder(tmp_path / "exported").digest != checkpoint.digest


def test_a_trial_of_latents_is_measured_by_its_checkpoint_alone(folder: Path, tmp_path: Path) -> None:
    """The bound with its parts, samples in the levels of the images, and features of both, after the rest is gone."""
    storage, trial = train_latents(folder, tmp_path / "runs")
    checkpoint = manifest.find_newest(storage, "trials/a/checkpoints")
    storage.delete("starts")
    m = Measurement.of(trial)
    m = m.model_copy(update={"evaluation": EvaluationConfig(
        nll=NLLConfig(images=30, timesteps=4), ode_nll=ODENLLConfig(images=2, tolerance=0.05),
        fid=FIDConfig(samples=120, sampler=FID.sampler),
    )})  # fmt: skip
    dataset = prepare(m.data)
    assert checkpoint and m.latent and m.data.encoder is None
    bench = Bench(storage, m, dataset, checkpoint, CPU)
    for block in list_blocks(m, checkpoint.digest, Images.of(dataset)):
        make(bench, block)
    process = checkpoints.load_process(checkpoint)
    metrics = summarise(storage, m, dataset, process, checkpoint.digest, space=bench.space)["metrics"]
    rate = sum(metrics[f"eval/nll_{part}_bpd"] for part in PARTS)
    assert rate == pytest.approx(metrics["eval/rate_bpd"])
    assert rate + metrics["eval/distortion_bpd"] == pytest.approx(metrics["eval/nll_bpd"])
    assert metrics["eval/fd_classifier"] > 0 and math.isfinite(metrics["eval/ode_nll_bpd"])
