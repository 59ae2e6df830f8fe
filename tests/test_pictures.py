"""Pictures of a model: their laws on Gaussian pixels, and the command that writes them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator import sample as command
from workers.config import DiffusionConfig, ModelConfig, SamplerConfig, ScheduleConfig
from workers.data.pixels import draw_grid
from workers.diffusion.formulations import AnyProcess, Continuous
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import Prediction, Process
from workers.diffusion.samplers import draw
from workers.evaluation.pictures import (
    compute_coding_curve,
    decode_at,
    draw_progressive,
    interpolate,
    interpolate_along_flow,
)
from workers.network import checkpoint as checkpoints
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.storage import Storage

P = Process.of(DiffusionConfig(T=40, schedule=ScheduleConfig(scale="per_1000")))
S = 0.2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def best():
    def eps_theta(x, t):
        alpha_bar = P.alpha_bar_at(t).to(x.dtype)[:, None, None, None]
        return (1 - alpha_bar).sqrt() / (alpha_bar * S**2 + 1 - alpha_bar) * x

    return from_eps(P, eps_theta)


def noise(n: int, *where: int | str) -> torch.Tensor:
    return torch.randn((n, 1, 4, 4), generator=make_generator("pictures", *where))


@pytest.mark.parametrize("sampler", [SamplerConfig(), SamplerConfig(kind="heun", steps=9)])
def test_progressive_generation_ends_in_the_sample(sampler):
    """Its first frame is x_0_hat(x_T), about 0; what it settles on has the pixels' size."""
    x_T = noise(3)
    strip = draw_progressive(P, best(), sampler, x_T, make_generator("z"), frames=6)
    assert strip.shape == (3, 6, 1, 4, 4)
    assert torch.equal(strip[:, -1], draw(P, best(), sampler, x_T, make_generator("z"), clip=True).x_0.clamp(-1, 1))
    size = strip.square().mean((0, 2, 3, 4))
    assert size[0] < 0.01 * size[-1] and size[-1] == pytest.approx(S**2, rel=0.5)


def test_interpolation_near_the_data_is_a_blend_and_from_noise_forgets_both():
    """At t = 1 x_t holds nearly all of x_0; from t = T what comes out has little to do with the ends."""
    ends = S * noise(2, "ends")
    weights = torch.linspace(0, 1, 5)
    near = interpolate(P, best(), ends, 1, weights, generator=make_generator("near"))
    blend = (1 - weights)[:, None, None, None] * ends[:1] + weights[:, None, None, None] * ends[1:]
    torch.testing.assert_close(near, blend, rtol=0, atol=4 * float(P.noise_level[0]))
    far = interpolate(P, best(), ends, P.T, weights, generator=make_generator("far"))
    assert (far[0] - ends[0]).square().mean() > S**2 / 4
    again = interpolate(P, best(), ends, P.T, weights[:1], generator=make_generator("far"))
    torch.testing.assert_close(again[0], far[0])  # the noise is one for all weights


def test_what_is_decoded_nears_the_image_as_t_falls():
    """E|x_0 - x_0_hat|^2 = s^2 sigma_t^2 / (s^2 + sigma_t^2) a pixel, of the best x_0_hat."""
    x_0, times = S * noise(3000, "x_0"), [40, 20, 8, 1]
    shown = decode_at(P, best(), x_0, times, make_generator("decoded"))
    error = (shown - x_0[:, None]).square().mean((0, 2, 3, 4)).double()
    level = P.noise_level[torch.tensor(times) - 1] ** 2
    torch.testing.assert_close(error, S**2 * level / (S**2 + level), rtol=0.03, atol=0)


def test_the_coding_curve_rises_in_rate_and_falls_in_distortion():
    pixels = ((S * noise(20, "curve")).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    rate, rmse = compute_coding_curve(P, best(), pixels, 256, make_generator("curve"))
    assert rate.shape == rmse.shape == (P.T,) and (np.diff(rate) > 0).all()
    assert rmse[0] == pytest.approx(127.5 * S, rel=0.1) and rmse[-1] < rmse[0] / 3


def test_a_grid_has_the_columns_it_is_given():
    images = torch.zeros(6, 4, 4, 1, dtype=torch.uint8)
    shown = Image.open(io.BytesIO(draw_grid(images, 17, side=1, columns=3)))
    assert shown.size == (3 * (3 * 5 - 1), 3 * (2 * 5 - 1))


def test_a_grid_shows_every_image_and_ends_in_grey():
    shown = Image.open(io.BytesIO(draw_grid(torch.full((7, 4, 4, 1), 16, dtype=torch.uint8), 17, side=1)))
    pixels = np.asarray(shown)[::3, ::3]
    assert pixels.shape == (14, 14) and (pixels == 255).sum() == 7 * 16 and (pixels[10:, 5:] == 128).all()


def test_a_grid_shows_the_channels_of_other_images_side_by_side():
    images = torch.tensor([0, 8]).expand(4, 2, 3, 2).to(torch.uint8)
    pixels = np.asarray(Image.open(io.BytesIO(draw_grid(images, 9, side=1))))[::3, ::3]
    assert pixels.shape == (2 * 3 - 1, 2 * 7 - 1)
    assert (pixels[:2, :3] == 0).all() and (pixels[:2, 3:6] == 255).all() and (pixels[:2, 6] == 128).all()


def test_a_name_stands_beside_each_row():
    plain, named = (
        np.asarray(
            Image.open(io.BytesIO(draw_grid(torch.zeros(6, 8, 8, 1, dtype=torch.uint8), 17, columns=2, names=n)))
        )
        for n in ((), ("cat", "owl", "dog"))
    )
    margin = named[:, : named.shape[1] - plain.shape[1]]
    assert np.array_equal(named[:, margin.shape[1] :], plain)
    assert all((rows < 128).any() for rows in np.array_split(margin, 3)), "ink in each third"


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_blends_along_the_flow_are_those_of_gaussian_pixels(name):
    """Of pixels N(0, s^2) the flow scales y = x_0 + sigma eps by sqrt((s^2 + low^2) / (s^2 + sigma^2))."""
    process, s, sigma = Continuous.of(DiffusionConfig(formulation=name)), 0.1, 0.8

    def exact(x_t, t):
        level = process.noise_level_at(t)[:, None, None, None]
        y = x_t * process.divisor_at(level)
        x_0 = y * s**2 / (s**2 + level**2)
        return Prediction(x_0=x_0, eps=(y - x_0) / level)

    weights, ends = torch.tensor([0.0, 0.25, 1.0]), s * torch.randn((2, 1, 3, 3), generator=make_generator("ends"))
    found = interpolate_along_flow(process, exact, ends, sigma, weights, generator=make_generator("noise"))
    noise = torch.randn((1, 1, 3, 3), generator=make_generator("noise"))
    blends = torch.lerp(ends[:1], ends[1:], weights[:, None, None, None]) + sigma * noise
    low = process.ends[0]
    torch.testing.assert_close(found, blends * ((s**2 + low**2) / (s**2 + sigma**2)) ** 0.5, rtol=0.02, atol=1e-3)


# ---- The command -----------------------------------------------------------------------------------------------


def folder(root: Path, process: AnyProcess | None = None) -> str:
    """A checkpoint of a small network for the digits, in a storage of its own."""
    config = make_unet_config(
        ModelConfig(channels=4, multipliers=(1,), blocks=1, attention=(), dropout=0.0), image_channels=1, resolution=8
    )
    unet = UNet(config, make_generator("unet"))
    checkpoint = checkpoints.save(
        Storage(root),
        "elsewhere",
        checkpoints.Snapshot(step=3, unet_config=config, process=process or P, ema=unet.state_dict()),
    )
    return f"{root}/{checkpoint.path}"


def test_the_command_writes_its_pictures_and_mlflow_has_them(tmp_path, capsys):
    words = [folder(tmp_path / "a"), "data.source=digits", "--storage", str(tmp_path / "runs"), "--n", "9", "--at", "5"]
    assert command.main(words) == 0
    paths = capsys.readouterr().out.split()
    names = ["samples", "progressive", "interpolation", "coding", "coding_curve"]
    assert [Path(p).stem for p in paths] == names
    first = [Path(p).read_bytes() for p in paths]
    assert Image.open(paths[0]).size[0] == Image.open(paths[0]).size[1]
    assert Image.open(paths[2]).size[0] > 5 * Image.open(paths[2]).size[1]  # 11 images a row, one row
    shown = sorted(p.name for p in (tmp_path / "runs").rglob("images/*.png"))
    assert [name.partition("+")[0] for name in shown] == sorted(f"pictures~{name}" for name in names)
    assert command.main(words) == 0
    assert [Path(p).read_bytes() for p in paths] == first
    assert len(list((tmp_path / "runs").rglob("images/*.png"))) == len(names)


def test_a_model_in_continuous_time_has_the_pictures_that_need_no_chain(tmp_path, capsys):
    target = folder(tmp_path / "a", Continuous.of(DiffusionConfig(formulation="flow")))
    words = [target, "data.source=digits", "--storage", str(tmp_path / "runs"), "--n", "4"]
    assert command.main([*words, "evaluation.fid.sampler.steps=3"]) == 0
    assert [Path(p).stem for p in capsys.readouterr().out.split()] == ["samples", "progressive", "interpolation"]
    assert command.main([*words, "--at", "5"]) == 2
    assert "--at: the model is of continuous time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "--n 0: 1 to 10,000"),
        (["--between", "0", "300"], "--between 300: the held-out images of digits are 0..299"),
        (["--at", "41"], "--at 41: the times are 1..40"),
        (["evaluation.fid.sampler.kind=hen"], "did you mean 'heun'?"),
        (["evaluation.ema=0.5"], "holds no average of evaluation.ema = 0.5; it has none"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, words, message):
    target = folder(tmp_path / "a")
    assert command.main([target, "data.source=digits", "--storage", str(tmp_path / "runs"), *words]) == 2
    assert message in capsys.readouterr().err
