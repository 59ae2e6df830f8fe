"""Models that are told the class of each image, and guidance: closed forms, batches in parts, and diffusers' layout."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_folder import diffusers
from small_process import process

from workers.classes import NO_LABEL, Classes
from workers.config import ModelConfig, SamplerConfig
from workers.diffusion import likelihood
from workers.diffusion.flow import integrate_log_density
from workers.diffusion.guidance import Conditional, tell
from workers.diffusion.predictions import Denoiser, eps_by_x_0, find_target
from workers.diffusion.process import Prediction, Process
from workers.diffusion.samplers import sample
from workers.kinds import PREDICTIONS, SAMPLERS
from workers.network import checkpoint as checkpoints
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.passes import count_evaluations
from workers.storage import Storage

S = 0.3  # standard deviation of each class
MEANS = torch.tensor([-0.2, 0.1, 0.15, 0.0])  # of the pixels, by label; the last row stands for no label
CLASSES = Classes(("cat", "dog", "owl"), (3, 0, 1))
CONFIG = make_unet_config(
    ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, labels=True),
    image_channels=1,
    resolution=8,
    told=CLASSES,
    label_dropout=0.1,
)


def predict_exactly(p: Process, x_t: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> Prediction:
    """E[x_0 | x_t] and E[eps | x_t] of pixels from N(mean, S^2)."""
    mean, alpha_bar = mean.reshape(-1, 1, 1, 1).to(x_t), p.alpha_bar_at(t).reshape(-1, 1, 1, 1).to(x_t)
    slope = alpha_bar.sqrt() * S**2 / (alpha_bar * S**2 + 1 - alpha_bar)
    x_0 = mean + slope * (x_t - alpha_bar.sqrt() * mean)
    return Prediction(x_0, eps_by_x_0(p, x_t, t, x_0))


@pytest.mark.parametrize("kind", [kind for kind, entry in SAMPLERS.items() if entry.suits(continuous=False)])
def test_guided_samples_are_those_of_the_mean_that_guidance_moves(kind: str) -> None:
    """Where all classes have one variance, guidance is the model of N(u + scale (c - u), S^2), by every sampler."""
    p, labels, scale = process(30), torch.tensor([0, 1, 2, 1, 0]), 2.5
    sampler = SamplerConfig(kind=kind, guidance=scale)
    moved = MEANS[NO_LABEL] + scale * (MEANS - MEANS[NO_LABEL])
    guided = tell(lambda x, t, of: predict_exactly(p, x, t, MEANS[of]), labels, scale)
    exact = tell(lambda x, t, of: predict_exactly(p, x, t, moved[of]), labels)
    shape = 5, 1, 2, 2
    found, expected = (sample(p, model, sampler, shape, make_generator(kind), clip=False) for model in (guided, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_whatever_the_network_predicts(prediction: str) -> None:
    p = process(30)

    class Network(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            exact = predict_exactly(p, x_t, t + 1, MEANS[labels])
            return find_target(prediction).of(p, exact.x_0, x_t, t + 1, exact.eps)

    t, labels = torch.tensor([2, 9, 20]), torch.tensor([0, 1, 2])
    x_t = torch.randn((3, 1, 2, 2), generator=make_generator("x_t"), dtype=torch.float64)
    found = Conditional(Denoiser(Network(), p, prediction), labels, 3.0)(x_t, t)
    exact = predict_exactly(p, x_t, t, MEANS[NO_LABEL] + 3.0 * (MEANS[labels] - MEANS[NO_LABEL]))
    torch.testing.assert_close(found.x_0, exact.x_0)
    torch.testing.assert_close(found.eps, exact.eps)


def make_unet() -> UNet:
    unet = UNet(CONFIG, make_generator("unet")).eval()
    for weight in unet.parameters():  # none of which is zero any more
        torch.nn.init.normal_(weight, std=0.2, generator=make_generator("weights", weight.numel()))
    return unet


@torch.no_grad()
def test_scale_one_is_the_conditional_and_zero_the_unconditional_bit_for_bit() -> None:
    denoiser, calls = Denoiser(make_unet(), process(30), "eps"), []

    def model(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> Prediction:
        calls.append(labels.tolist())
        return denoiser(x_t, t, labels)

    x_t = torch.randn((3, 1, 8, 8), generator=make_generator("x_t"))
    t, labels = torch.tensor([1, 5, 20]), torch.tensor([2, 0, 2])
    told, untold = denoiser(x_t, t, labels), denoiser(x_t, t, torch.full((3,), NO_LABEL))
    assert not torch.equal(told.eps, untold.eps)
    for scale, expected in ((None, told), (1.0, told), (0.0, untold)):
        assert torch.equal(Conditional(model, labels, scale)(x_t, t).eps, expected.eps)
    assert len(calls) == 3
    two = Conditional(model, labels, 2.0)(x_t, t)
    torch.testing.assert_close(two.eps, 2 * told.eps - untold.eps)
    assert calls[3:] == [[2, 0, 2], [NO_LABEL] * 3]


def test_guidance_doubles_the_evaluations_that_are_counted() -> None:
    counts = [count_evaluations(SamplerConfig(kind="heun", steps=9, guidance=g), 50) for g in (None, 1, 0, 0.5, 3)]
    assert counts == [17, 17, 17, 34, 34]


def test_each_pair_and_each_image_of_a_solver_has_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the bound and the open images of the ODE are parts of what the model was told of."""
    p, labels = process(30), torch.tensor([0, 1, 2, 1, 0])

    def model(x_t: torch.Tensor, t: torch.Tensor, of: torch.Tensor) -> Prediction:
        return predict_exactly(p, x_t, t, MEANS[of])

    noise = torch.randn((5, 1, 2, 2), generator=make_generator("x"), dtype=torch.float64)
    x = MEANS[labels].double().reshape(-1, 1, 1, 1) + S * noise
    found, alone = (
        torch.cat([
            integrate_log_density(p, tell(model, labels[k]), x[k], torch.ones(1, *x[k].shape), 1e-6).log_p
            for k in parts
        ])
        for parts in ([slice(0, 5)], [slice(k, k + 1) for k in range(5)])
    )  # fmt: skip
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
    assert len(set(found.round(decimals=3).tolist())) == 5
    monkeypatch.setattr(likelihood, "PIXELS", {"cpu": 8})  # two pairs at once
    t, images = np.array([1, 4, 9, 16, 30]), np.arange(5)
    told = tell(model, labels)
    ledger = likelihood.measure_pairs(
        p, told, x, images, t, weight=np.ones(5), noise=make_generator("pairs"), levels=17, clip=False
    )
    x_t = p.q_sample(x, torch.from_numpy(t), torch.randn(x.shape, generator=make_generator("pairs")))
    exact = predict_exactly(p, x_t, torch.from_numpy(t), MEANS[labels])
    assert ledger.squared_error == pytest.approx((x - exact.x_0).square().flatten(1).sum(1).numpy())


def test_samples_are_of_classes_in_the_proportions_of_the_training_images() -> None:
    classes = Classes(tuple("abcd"), (50, 0, 300, 150))
    labels = classes.assign(np.arange(10_000))
    for n in (10, 100, 1000, 10_000):
        shares = n * np.array(classes.images) / sum(classes.images)
        assert np.abs(np.bincount(labels[:n], minlength=4) - shares).max() <= 2
    assert np.array_equal(labels[700:800], classes.assign(np.arange(700, 800))), "a function of the number alone"
    assert len(set(labels[:10])) == 3


def test_a_class_is_found_by_its_number_and_name() -> None:
    assert [CLASSES.find(text) for text in ("2", "owl", "cat")] == [2, 2, 0]
    for text in ("3", "-1", "cow"):
        with pytest.raises(ValueError, match="give a number of 0 to 2, or of cat, dog, owl"):
            CLASSES.find(text)


# ---- The layout of diffusers ---------------------------------------------------------------------------------------


def save_unet(folder: Path) -> UNet:
    unet = make_unet()
    snapshot = checkpoints.Snapshot(step=1, unet_config=CONFIG, process=process(30), ema=unet.state_dict())
    checkpoints.save(Storage(folder), "all", snapshot)
    return unet


@torch.no_grad()
def test_a_folder_opens_in_diffusers_and_what_that_saves_opens_here(tmp_path: Path) -> None:
    """The names of the classes and their numbers of images survive, as fields that diffusers keeps and passes over."""
    unet = save_unet(tmp_path / "ours")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours" / "all" / "step-00000001" / "unet")
    assert "class_embedding.weight" in theirs.state_dict() and theirs.config.num_class_embeds == 4
    x_t, t = torch.randn((4, 1, 8, 8), generator=make_generator("x_t")), torch.tensor([0, 3, 7, 19])
    expected = theirs(x_t, t, class_labels=torch.tensor([0, 1, 2, 3])).sample
    torch.testing.assert_close(unet(x_t, t, torch.tensor([0, 1, 2, NO_LABEL])), expected, rtol=1e-4, atol=1e-5)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours" / "all" / "step-00000001")
    pipeline.save_pretrained(tmp_path / "back")
    opened = checkpoints.open_folder(tmp_path / "back")
    found = checkpoints.describe(opened)
    assert found.classes == CLASSES and found.takes_no_label
    model, _ = checkpoints.load(opened)
    torch.testing.assert_close(model.network(x_t, t, torch.tensor([0, 1, 2, NO_LABEL])), expected, rtol=1e-4, atol=1e-5)


def test_every_row_of_a_foreign_folder_is_a_class_and_it_cannot_be_guided(tmp_path: Path) -> None:
    save_unet(tmp_path)
    folder = tmp_path / "all" / "step-00000001"
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "unet/config.json").read_text())
    del config["_labels"]
    (folder / "unet/config.json").write_text(json.dumps(config))
    found = checkpoints.describe(checkpoints.open_folder(folder))
    assert found.classes == Classes(("0", "1", "2", "3"), (1, 1, 1, 1)) and not found.takes_no_label


def test_a_network_without_labels_has_the_weights_of_one_with_them() -> None:
    plain: dict[str, Any] = {**CONFIG, "num_class_embeds": None}
    ours, theirs = (UNet(c, make_generator("weights")).state_dict() for c in (CONFIG, plain))
    assert ours.keys() - theirs.keys() == {"class_embedding.weight"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert math.isclose(float(ours["class_embedding.weight"].std()), 1, abs_tol=0.3)
    assert ours["class_embedding.weight"].shape == (4, 32)
