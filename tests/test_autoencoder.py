"""An autoencoder: its bound in closed forms, its weights in diffusers, its training, and what is measured of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from workers.adversarial import GAMES, Critic, find_weight
from workers.autoencoding import Autoencoding, compute_bits, elbo
from workers.config import DataConfig, EvaluationConfig, FIDConfig, LossConfig, Measurement, Trial
from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import prepare
from workers.data.pixels import to_model
from workers.data.sources import describe
from workers.diffusion.bound import decoder_term, log_laplace_interval
from workers.evaluation import blocks
from workers.evaluation.blocks import Images
from workers.evaluation.make import Bench, make
from workers.evaluation.rates import Stage
from workers.evaluation.summary import summarise
from workers.first_weights import describe_checkpoint, find_misfits, keep_copy, load_first_weights
from workers.learner import Learner
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.autoencoder import Autoencoder, FirstStage, Posterior
from workers.network.autoencoder_config import make_autoencoder_config
from workers.network.manifest import CheckpointError
from workers.noise import make_generator
from workers.storage import Storage
from workers.training import train
from workers.warm_start import INIT
from workers.world import World

BASE: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"kind": "autoencoder", "channels": 8, "multipliers": [1, 2], "blocks": 1, "latent_channels": 2},
    "loss": {"objective": "elbo"},
    "training": {
        "steps": 6, "batch_size": 16, "lr": 2e-3, "ema": 0.9, "precision": "float32", "validate_every": 3,
        "checkpoint_every": 2,
    },
}  # fmt: skip
GAME = {"adversarial": 0.5, "adversarial_start": 2, "discriminator_channels": 4, "discriminator_layers": 2}


def trial(**changes: Any) -> Trial:
    content = {name: dict(section) for name, section in BASE.items()}
    for name, section in changes.items():
        content[name] = {**content.get(name, {}), **section}
    return Trial.model_validate(content)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator("test_autoencoder", seed), dtype=torch.float64)


class Linear(FirstStage):
    """Probabilistic PCA (Tipping & Bishop 1999): x = W z + sigma eps with orthogonal columns of W, whose posterior is
    N(M^-1 W' x, sigma^2 M^-1), M = W' W + sigma^2 I, diagonal; here it is the encoder."""

    law = "gaussian"

    def __init__(self, w: torch.Tensor, sigma: float) -> None:
        super().__init__()
        self.w, self.m = w, w.square().sum(0) + sigma**2
        self.log_scale = nn.Parameter(torch.tensor(sigma, dtype=torch.float64).log())
        self.sigma = sigma

    def encode(self, x: torch.Tensor) -> Posterior:
        mean = (x.flatten(1) @ self.w / self.m)[:, :, None, None]
        return Posterior(mean, (self.sigma**2 / self.m).log()[None, :, None, None].expand_as(mean))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return (z.flatten(1) @ self.w.T).reshape(len(z), 1, 3, 4)


def test_the_bound_of_a_linear_autoencoder_at_its_optimum_is_the_likelihood_of_probabilistic_pca() -> None:
    """The distortion is quadratic in eps, so its mean over eps and over -eps in each coordinate is its expectation."""
    w, sigma = torch.linalg.qr(normal(12, 2))[0] * torch.tensor([1.5, 0.7]), 0.3
    stage, n = Linear(w, sigma), 5
    x = (normal(n, 2, seed=1) @ w.T + sigma * normal(n, 12, seed=2)).reshape(n, 1, 3, 4)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)

    def average(of: Linear) -> torch.Tensor:
        at = [of(x, c[None, :, None, None].expand(n, 2, 1, 1)) for c in corners]
        return torch.stack([torch.stack(compute_bits(of, x, found, None)).sum(0) for found in at]).mean(0).detach()

    exact = torch.distributions.MultivariateNormal(
        torch.zeros(12).double(), w @ w.T + sigma**2 * torch.eye(12).double()
    )
    expected = -exact.log_prob(x.flatten(1)) / (12 * math.log(2))
    assert average(stage) == pytest.approx(expected.numpy(), abs=1e-9)  # type: ignore[arg-type]
    other = Linear(w * 1.1, sigma)
    other.decode = stage.decode  # type: ignore[method-assign]
    assert (average(other) > expected).all(), "another q(z | x) is a bound, and no more"


def test_the_rate_is_the_divergence_of_gaussians() -> None:
    mean, log_variance = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(Posterior(mean, log_variance).compute_rate(), expected)
    assert Posterior(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)).compute_rate() == 0
    loss = LossConfig(objective="elbo", beta=0.25)
    assert elbo(loss, torch.tensor([4.0]).double(), torch.tensor([3.0]).double()) == 4.0


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_decoder_of_either_law_sums_to_one_over_the_levels(law: str, levels: int) -> None:
    every = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None, None, None]
    for mean in (-3.0, -0.98, 0.0, 0.123, 1.0, 2.5):
        for scale in (0.003, 0.1, 2.0):
            nats = decoder_term(every, torch.full_like(every, mean), scale, levels, law=law)
            assert float(torch.exp(-nats).sum()) == pytest.approx(1)


def test_the_intervals_of_the_laplace_law_are_accurate_in_its_tails() -> None:
    lower = torch.tensor([-800.0, -0.3, -1e-9, 2.0, 700.0, 5.0], dtype=torch.float64)
    upper = torch.tensor([-799.0, 0.2, 1e-9, 2.5, 701.0, math.inf], dtype=torch.float64)
    expected = [
        math.log((1 - math.exp(-1)) / 2) - 799, math.log(1 - math.exp(-0.3) / 2 - math.exp(-0.2) / 2), math.log(1e-9),
        math.log((math.exp(-2) - math.exp(-2.5)) / 2), math.log((1 - math.exp(-1)) / 2) - 700, math.log(0.5) - 5,
    ]  # fmt: skip
    assert log_laplace_interval(lower, upper).tolist() == pytest.approx(expected)
    x = torch.tensor([[[[0.25]]]], dtype=torch.float64)
    assert float(decoder_term(x, x * 0, 0.5, None, law="laplace")) == pytest.approx(0.5)  # log(2 b) + |x| / b


def test_the_adversarial_weight_is_the_ratio_of_the_gradients_at_the_last_layer() -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    distortion, judged = 0.5 * layer.square().sum(), -2 * layer.sum()  # gradients (3, 4) and (-2, -2)
    assert float(find_weight(distortion, judged, layer, World())) == pytest.approx(5 / math.sqrt(8), rel=1e-4)
    assert float(find_weight(distortion, 0 * layer.sum(), layer, World())) == 1e4  # no more, where nothing is learned


@pytest.mark.parametrize("game", GAMES)
def test_a_discriminator_learns_which_images_are_real(game: Any) -> None:
    loss = LossConfig(objective="elbo", adversarial=1.0, game=game, discriminator_channels=8, discriminator_layers=2)
    critic, noise = Critic(loss, 1, 0, World()), make_generator("critic")
    real, made = (torch.randn(16, 1, 8, 8, generator=noise) * 0.1 + shift for shift in (0.5, -0.5))
    before = critic.judge(made).mean()
    losses = [float(critic.learn(real, made, 2e-3)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert critic.judge(real).mean() < critic.judge(made).mean() and critic.judge(made).mean() > before


def build(**changes: Any) -> Autoencoder:
    of = trial(**changes)
    network = Autoencoder(make_autoencoder_config(of.model, (8, 8, 1)), make_generator("first"))
    for index, weights in enumerate(network.parameters()):  # so that no layer is zero
        nn.init.normal_(weights, std=0.1, generator=make_generator("weights", index))
    return network.eval()


def test_folders_open_in_diffusers_and_theirs_here(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours, x = build(), normal(3, 1, 8, 8).float()
    snapshot = checkpoints.Snapshot(step=1, unet_config=ours.config, ema=ours.state_dict())
    saved = checkpoints.save(Storage(tmp_path), "a", snapshot)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / saved.path, subfolder="vae").eval()
    with torch.no_grad():
        q, p = ours.encode(x), theirs.encode(x).latent_dist
        assert torch.allclose(q.mean, p.mean, atol=1e-5) and torch.allclose(q.log_variance, p.logvar, atol=1e-5)
        assert torch.allclose(q.compute_rate(), p.kl().double(), atol=1e-4)
        assert torch.allclose(ours.decode(q.mean), theirs.decode(q.mean).sample, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = checkpoints.load_autoencoder(checkpoints.open_folder(tmp_path / "theirs"))
        assert torch.equal(back.decode(q.mean), ours.decode(q.mean)) and back.log_scale == 0
    assert set(theirs.state_dict()) == set(ours.state_dict()) - {"log_scale"}
    export = tmp_path / "exported"
    checkpoints.export(saved, export)
    assert checkpoints.open_folder(export).digest == saved.digest
    config = json.loads((export / "vae/config.json").read_text())
    (export / "vae/config.json").write_text(json.dumps({**config, "sample_size": 9}))
    with pytest.raises(CheckpointError, match="sample_size 9 cannot be halved 1 times"):
        checkpoints.open_folder(export / "vae")


def test_it_is_no_denoiser_and_a_denoiser_no_autoencoder(tmp_path: Path) -> None:
    ours = build()
    snapshot = checkpoints.Snapshot(step=1, unet_config=ours.config, ema=ours.state_dict())
    with pytest.raises(CheckpointError, match="holds no denoiser, but a model of the autoencoders; give a trial"):
        checkpoints.load(checkpoints.save(Storage(tmp_path), "a", snapshot))


def run(of: Trial, storage: Storage, world: World | None = None, steps: int = 99) -> manifest.Checkpoint:
    """Trains so many validations far, and gives the newest checkpoint."""
    loop = train(of, prepare(of.data), storage, "trials/a", world)
    for _, _ in zip(range(steps), loop, strict=False):
        pass
    loop.close()  # type: ignore[attr-defined]
    found = manifest.find_newest(storage, "trials/a/checkpoints")
    assert found
    return found


@pytest.mark.parametrize("loss", [{}, GAME], ids=["alone", "with a discriminator"])
def test_a_training_that_was_killed_goes_on_in_the_same_bits(tmp_path: Path, loss: dict[str, Any]) -> None:
    of = trial(loss=loss)
    whole, parts = Storage(tmp_path / "whole"), Storage(tmp_path / "parts")
    expected = run(of, whole)
    assert run(of, parts, steps=2).step == 2  # validated at 0 and 3; the newest checkpoint is of step 2
    found, state = run(of, parts), "state/training.safetensors"
    assert found.digest == expected.digest and dict(found.sums)[state] == dict(expected.sums)[state]
    kept = checkpoints.load_state(found)[1]
    assert any(name.startswith("discriminator.exp_avg") for name in kept) == bool(loss)


def _worker(rank: int, size: int, folder: str, loss: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    run_in = train(trial(loss=loss, training={"workers": size}), prepare(DataConfig(source="digits")),
                   Storage(f"{folder}/two"), "trials/a", World(rank, size))  # fmt: skip
    for _ in run_in:
        pass
    torch.distributed.destroy_process_group()


def test_two_workers_learn_what_one_does(tmp_path: Path) -> None:
    """Up to the order of sums: the same images, noise, weights of the game and steps of the discriminator."""
    one = run(trial(loss=GAME), Storage(tmp_path / "one"))
    spawn(_worker, (2, str(tmp_path), GAME), nprocs=2)
    two = manifest.find_newest(Storage(tmp_path / "two"), "trials/a/checkpoints")
    assert two and two.step == 6
    ours, theirs = (checkpoints.load_state(c)[1] for c in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if "exp_avg" not in name:
            assert torch.allclose(ours[name].float(), theirs[name].float(), atol=2e-4), name


def test_another_autoencoder_is_a_start(tmp_path: Path) -> None:
    """Ours and diffusers' alike; of other latents each mismatch is named."""
    first = build()
    snapshot = checkpoints.Snapshot(step=3, unet_config=first.config, ema=first.state_dict())
    saved = checkpoints.save(Storage(tmp_path), "a", snapshot)
    keep_copy(Storage(tmp_path), "copy", saved)
    copied = manifest.find_newest(Storage(tmp_path), "copy")
    assert copied and copied.digest == saved.digest
    source, offer = describe(DataConfig(source="digits")), describe_checkpoint(copied)
    init = {"init": {"source": "a"}}
    assert find_misfits(INIT, trial(training=init), source, offer) == []
    [misfit] = find_misfits(INIT, trial(training=init, model={"latent_channels": 3}), source, offer)
    assert "quant_conv.weight (6x6x1x1 here, 4x4x1x1 there)" in misfit
    learner = Learner(trial(), prepare(DataConfig(source="digits")), World())
    learner.begin_with(load_first_weights(copied, "ema"), ())
    assert all(torch.equal(w, first.state_dict()[name]) for name, w in learner.ema.items())


def test_noise_and_the_validation_have_addresses() -> None:
    """A step's loss is a function of (seed, step), whatever was drawn before; validations are the same twice."""
    data = prepare(DataConfig(source="digits"))
    first, second = (Learner(trial(), data, World()) for _ in range(2))
    for learner in (first, second):
        learner.begin()
    first.step = second.step = 4
    second._compute_losses()
    assert torch.equal(first._compute_losses().minimised, second._compute_losses().minimised)
    assert isinstance(first.lesson, Autoencoding)
    with torch.no_grad(), first.use_averaged() as network:
        assert first.lesson.validate(network) == first.lesson.validate(network)


def evaluate(tmp_path: Path, of: Trial, checkpoint: manifest.Checkpoint) -> dict[str, Any]:
    """The summary of a trial by its blocks."""
    data, m = prepare(of.data), Measurement.of(of)
    bench = Bench(Storage(tmp_path), m, data, checkpoint, torch.device("cpu"))
    for block in blocks.list_blocks(m, checkpoint.digest, Images.of(data)):
        make(bench, block)
    space = bench.space if m.evaluation.fid else None
    return summarise(bench.storage, m, data, Stage.of(checkpoint), checkpoint.digest, space=space)


def test_what_is_measured_is_the_bound_at_beta_1_whatever_was_trained(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(fid=FIDConfig(samples=120)).model_copy(update={"reconstructions": 150})
    of = trial(loss={"beta": 0.1}, data={"held_out": 0.1}).model_copy(update={"evaluation": evaluation})
    checkpoint = run(of, Storage(tmp_path))
    found = evaluate(tmp_path, of, checkpoint)
    metrics, passport = found["metrics"], found["passports"]["nll"]
    assert metrics["eval/nll_bpd"] == pytest.approx(metrics["eval/rate_bpd"] + metrics["eval/distortion_bpd"])
    assert (
        metrics["eval/nll_bpd"] == pytest.approx(np.mean(found["nll_per_image"])) and len(found["nll_per_image"]) == 300
    )
    assert passport["protocol"]["bound"].startswith("ELBO of an autoencoder at beta = 1")
    assert passport["subject"]["trained with beta"] == "0.1" and passport["subject"]["latents"] == [2, 4, 4]
    assert metrics["eval/fd_classifier"] > 0 and metrics["eval/network_evaluations"] == 1
    assert metrics["eval/reconstruction_fd_classifier"] > 0
    assert found["passports"]["reconstructions"]["protocol"]["images"] == 150


def test_a_trained_linear_law_comes_to_the_entropy_of_gaussian_pixels(tmp_path: Path) -> None:
    """Independent pixels have nothing for a latent: the best bound is the pixels' entropy, at rate 0 and scale 0.2."""
    of = trial(
        data={"source": "gaussian"}, model={"channels": 4, "multipliers": [1]},
        training={"steps": 400, "lr": 1e-2, "batch_size": 64, "decay": "cosine", "validate_every": 400,
                  "checkpoint_every": 400},
    )  # fmt: skip
    learner = Learner(of, prepare(of.data), World())
    for _ in range(of.training.steps):
        learner.train_step()
    data = learner.dataset
    x = to_model(torch.from_numpy(np.array(data.held_out)), data.levels)
    exact = decoder_term(x, torch.zeros_like(x), GAUSSIAN_SD, data.levels) / (64 * math.log(2))
    with torch.no_grad():
        found = learner.module.eval()(x, torch.randn((len(x), 2, 8, 8), generator=make_generator("z")))
        rate, distortion = compute_bits(learner.module, x, found, data.levels)  # type: ignore[arg-type]
    assert float((rate + distortion).mean()) == pytest.approx(float(exact.mean()), abs=0.02)
    assert float(rate.mean()) < 0.02 and float(learner.module.log_scale.detach().exp()) == pytest.approx(
        GAUSSIAN_SD, rel=0.05
    )
