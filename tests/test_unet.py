"""eps_theta against diffusers' UNet2DModel, and the laws of its dropout, its start and its config."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.config import ModelConfig
from workers.network.build import hand_noise
from workers.network.unet import UNet
from workers.network.unet_config import count_weights, find_unet_mistakes, make_unet_config
from workers.noise import make_generator

# What google/ddpm-cifar10-32 says in its config.json.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
SMALL = ModelConfig(channels=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1)
DIGITS = make_unet_config(SMALL, image_channels=1, resolution=8)
CONFIGS = {
    "cifar10": CIFAR10,
    "digits": DIGITS,
    "heads": {**DIGITS, "attention_head_dim": 8},
    "groups": {**DIGITS, "norm_num_groups": 8, "norm_eps": 1e-5},
    "one_level": make_unet_config(
        ModelConfig(channels=8, multipliers=(1,), blocks=2, attention=(4,)), image_channels=2, resolution=4
    ),
    "not_square": make_unet_config(SMALL, image_channels=2, resolution=(8, 12)),
    # diffusers' own defaults for the rest: 8 channels a head, cosines first, padding on both sides.
    "defaults": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [16, 24, 32],
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    },
}


def scrambled(unet: UNet) -> UNet:
    """Weights without zeros or ones, so that no part of the network can hide."""
    draw = make_generator("test weights")
    with torch.no_grad():
        for name, w in sorted(unet.named_parameters()):
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            w.copy_(centre + torch.randn(w.shape, generator=draw) / max(10.0, w[0].numel() ** 0.5))
    return unet


def batch(config: dict[str, Any], N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C, H, W) and t (N,)."""
    draw, size = make_generator("test batch"), config.get("sample_size") or 8
    x = torch.randn(N, config["in_channels"], *(size if isinstance(size, list) else [size, size]), generator=draw)
    return x, torch.randint(0, 1000, (N,), generator=draw)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_network_of_diffusers(name: str, tmp_path: Path) -> None:
    """Saved by us and opened by diffusers: the same names, shapes, outputs and gradients; and back again."""
    from diffusers import UNet2DModel

    config = CONFIGS[name]
    ours = scrambled(UNet(config)).eval()
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    save_file(ours.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    theirs, report = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())

    x, t = batch(config, 2)
    eps = ours(x, t)
    expected = theirs.eval()(x, t).sample
    assert (eps - expected).abs().max() < 1e-5 * max(1, expected.abs().max())

    eps.square().sum().backward()
    expected.square().sum().backward()
    gradients = {n: w.grad for n, w in theirs.named_parameters()}
    typical = torch.stack([g.norm() for g in gradients.values()]).median()  # that of a key's bias is exactly zero
    for n, w in ours.named_parameters():
        assert (w.grad - gradients[n]).norm() <= 1e-4 * gradients[n].norm() + 1e-5 * typical, n

    UNet(config).load_state_dict(theirs.state_dict())


def test_the_default_model_is_the_paper_s() -> None:
    config = make_unet_config(ModelConfig(), image_channels=3, resolution=32)
    assert {k: v for k, v in config.items() if k in CIFAR10} == {
        k: v for k, v in CIFAR10.items() if k != "_diffusers_version"
    }
    assert sum(w.numel() for w in UNet(config).parameters()) == 35_746_307


def test_weights_under_the_names_of_the_first_diffusers_open() -> None:
    """The published weights of 2022 call the attention's layers query, key, value, proj_attn."""
    unet = scrambled(UNet(DIGITS))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = unet.state_dict()
    for new, name in old.items():
        weights = {k.replace(f".{new}.", f".{name}."): v for k, v in weights.items()}
    assert weights.keys() != unet.state_dict().keys()
    opened = UNet(DIGITS)
    opened.load_state_dict(weights)
    assert all(torch.equal(v, opened.state_dict()[k]) for k, v in unet.state_dict().items())


def test_it_starts_as_zero_and_learns_from_there() -> None:
    """The last layers are zero, as in the paper: eps_theta = 0; the start depends on the generator alone."""
    unet = UNet(DIGITS, make_generator("weights", 0))
    x, t = batch(DIGITS, 4)
    assert unet.eval()(x, t).abs().max() == 0
    again, other = UNet(DIGITS, make_generator("weights", 0)), UNet(DIGITS, make_generator("weights", 1))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in unet.state_dict().items())
    assert not torch.equal(unet.conv_in.weight, other.conv_in.weight)


def test_every_level_knows_the_time() -> None:
    """No group norm may be so fine that it subtracts the time embedding (a group of one channel would)."""
    unet = scrambled(UNet(DIGITS)).eval()
    for block in (unet.down_blocks[0].resnets[0], unet.up_blocks[-1].resnets[-1]):
        h = torch.randn(2, block.conv1.in_channels, 8, 8, generator=make_generator("h"))[:1].expand(2, -1, -1, -1)
        y = block(h, torch.randn(2, 64, generator=make_generator("time")))
        assert (y[0] - y[1]).abs().max() > 1e-2


def test_masks_do_not_depend_on_how_the_batch_is_spread() -> None:
    """One worker with 4 generators, two with 2 each: the same masks; other generators: other masks."""
    unet = scrambled(UNet({**DIGITS, "dropout": 0.5})).train()
    x, t = batch(DIGITS, 8)

    def forward(rows: slice, parts: range, step: int = 0) -> torch.Tensor:
        hand_noise(unet, [make_generator("dropout", step, j) for j in parts])
        return unet(x[rows], t[rows])

    whole = forward(slice(0, 8), range(4))
    halves = torch.cat([forward(slice(0, 4), range(0, 2)), forward(slice(4, 8), range(2, 4))])
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-5)
    assert (forward(slice(0, 8), range(4), step=1) - whole).abs().max() > 0.1


def test_a_mask_drops_its_share_and_keeps_the_mean() -> None:
    unet = UNet({**DIGITS, "dropout": 0.25}).train()
    dropout = unet.mid_block.resnets[0].dropout
    hand_noise(unet, [make_generator("a"), make_generator("b")])
    y = dropout(torch.ones(64, 8, 8, 8))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean().item() - 1) < 0.02


def test_dropout_is_never_drawn_from_nowhere() -> None:
    unet = UNet(DIGITS).train()
    x, t = batch(DIGITS, 4)
    with pytest.raises(AssertionError, match="hand_noise"):
        unet(x, t)
    unet.eval()(x, t)
    draw = make_generator("dropout")
    before = draw.get_state()
    still = UNet({**DIGITS, "dropout": 0.0}).train()
    hand_noise(still, [draw])
    still(x, t)
    assert torch.equal(draw.get_state(), before)
    copy.deepcopy(unet)  # as an average of the weights would


def test_bfloat16_autocast_stays_near_float32() -> None:
    unet = scrambled(UNet(DIGITS)).eval()
    x, t = batch(DIGITS, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eps = unet(x, t)
    exact = unet(x, t)
    assert (eps.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 0),
        ("resnet_time_scale_shift", "scale_shift"),
        ("num_train_timesteps", 1000),
        ("time_embedding_type", "fourier"),
        ("down_block_types", ["SkipDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("norm_num_groups", 3),
        ("attention_head_dim", 5),
        ("downsample_padding", 2),
        ("colour", "blue"),
    ],
)
def test_what_is_not_built_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        UNet({**DIGITS, field: value})
    assert field in str(error.value)
    assert str(value[0] if isinstance(value, list) else value) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "resolution", "told"),
    [
        ({"channels": 150}, 8, "128 or 160"),
        ({"channels": 7}, 8, "even"),
        ({"channels": 2}, 8, "at least 4"),
        ({"multipliers": (1, 2, 2)}, 6, "at most 2 multipliers"),
        ({"multipliers": (1, 2, 2)}, 6, "4 or 8"),
        ({"multipliers": (1, 0)}, 8, "at least 1"),
        ({"attention": (16,)}, 8, "choose from [8, 4]"),
        ({"multipliers": (1, 2, 2)}, (8, 6), "at most 2 multipliers, or data.resolution: [8, 4] or 8"),
        ({"multipliers": (1, 2, 2)}, (12, 9), "[12, 9] pixels can be halved only 0 times"),
        ({"attention": (12,)}, (8, 12), "choose from [8, 4]"),
    ],
)
def test_mistakes_in_the_model_are_told_with_what_to_do(changes: dict[str, Any], resolution: Any, told: str) -> None:
    model = SMALL.model_copy(update=changes)
    with pytest.raises(ValueError) as error:
        make_unet_config(model, image_channels=1, resolution=resolution)
    assert told in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(find_unet_mistakes(ModelConfig(channels=150, multipliers=(1, 0)), resolution=7)) == 3


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 32, 64, 96, 128, 192])
def test_usual_widths_are_accepted_with_the_default_groups(channels: int) -> None:
    model = SMALL.model_copy(update={"channels": channels})
    groups = make_unet_config(model, image_channels=1, resolution=8)["norm_num_groups"]
    assert channels % groups == 0 and channels // groups >= 4


def test_the_config_is_checked_without_torch() -> None:
    code = "import sys, workers.network.unet_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(16,)),
        ModelConfig(channels=64, multipliers=(1, 2, 2, 4), blocks=3, attention=(16, 8, 4)),
        ModelConfig(channels=256, multipliers=(1,), blocks=2, attention=()),
    ],
)
def test_the_weights_are_counted_without_building_the_network(model: ModelConfig) -> None:
    with torch.device("meta"):
        unet = UNet(make_unet_config(model, image_channels=3, resolution=32))
    matrices = sum(p.numel() for p in unet.parameters() if p.dim() > 1)
    ends = 2 * 9 * 3 * model.channels  # to and from the colours of a pixel
    assert count_weights(model, resolution=32) == matrices - ends


def test_a_network_that_no_machine_holds_is_refused_before_it_is_built() -> None:
    hostile = ModelConfig(channels=8192, multipliers=(64, 64), blocks=64, attention=())
    [mistake] = find_unet_mistakes(hostile, resolution=32)
    assert "weights, more than 2e+10" in mistake
