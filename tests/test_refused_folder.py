"""Folders of diffusers that cannot be measured are refused with the file, the reason and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_folder
import pytest
import torch
from diffusers_folder import WEIGHTS, T, diffusers, halved, network, put, saved, scheduler
from safetensors.torch import load_file, save_file

from orchestrator.measuring import subjects
from workers.config import DataConfig, Mistake
from workers.data import sources
from workers.network.checkpoint import load, open_folder
from workers.network.diffusers_config import OTHER_SCHEDULERS
from workers.network.manifest import CheckpointError
from workers.storage import Storage

one_thread = diffusers_folder.one_thread
unet = diffusers_folder.unet
original = diffusers_folder.original
folder = diffusers_folder.folder


# Refusals.


def index(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder / "model_index.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def header(change):
    """Other claims in the header of the weights."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def sparse(name, size):
    """A file of that size which takes no room on the disk."""

    def damage(folder):
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return damage


VAE = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
REFUSED = {
    "latent": (index(**VAE), r"model_index\.json: a StableDiffusionPipeline with vae.*latent.*DDPMPipeline"),
    "vqvae": (index(_class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]), r"LDMPipeline with vqvae"),
    "no unet": (index(unet=...), r"model_index\.json: a DDPMPipeline without unet"),
    "absent": (index(unet=[None, None]), r"model_index\.json: a DDPMPipeline without unet"),
    "index": (written("model_index.json", b"{"), r"model_index\.json is damaged"),
    "volumes": (network(_class_name="UNet3DConditionModel"), r"unet/config\.json: a UNet3DConditionModel, not"),
    "conditional": (network(_class_name="UNet2DConditionModel"), r"'AttnDownBlock2D' is not supported; choose"),
    "classes": (network(num_class_embeds=2, _labels=[["cat", -1]]), r"unet/config\.json.*_labels"),
    "class kind": (network(class_embed_type="timestep"), r"class_embed_type 'timestep'"),
    "learned channels": (network(out_channels=2), r"variance is fixed_small, but the network .* has out_channels 2"),
    "other channels": (network(out_channels=3), r"out_channels 3 for in_channels 1: there must be as many"),
    "no size": (network(sample_size=None), r"sample_size is missing: set it"),
    "odd size": (network(sample_size=[8, 9]), r"unet/config\.json: sample_size \[8, 9\] cannot be halved 1 times"),
    "odd width": (network(block_out_channels=[5, 16], norm_num_groups=1), r"config\.json: block_out_channels\[0\] 5"),
    "one wave": (network(block_out_channels=[2, 16], freq_shift=1, norm_num_groups=1), r"block_out_channels\[0\] 2 is"),
    "groups": (network(norm_num_groups=3), r"unet/config\.json does not describe.*norm_num_groups: 3 must divide"),
    "fourier": (network(time_embedding_type="fourier"), r"time_embedding_type: 'fourier' is not supported"),
    "wider": (network(block_out_channels=[8, 32]), r"model\.safetensors does not fit.*size mismatch"),
    "deeper": (network(layers_per_block=2), r"model\.safetensors does not fit.*Missing key"),
    "text": (network(norm_num_groups="4"), r"unet/config\.json: norm_num_groups: '4': Input should be"),
    "bool": (network(downsample_padding=True), r"downsample_padding: True: "),
    "zero": (network(norm_num_groups=0), r"norm_num_groups: 0: "),
    "none": (network(block_out_channels=[]), r"block_out_channels: \[\]: "),
    "huge image": (network(sample_size=65536), r"sample_size.*: 65536: "),
    "huge colour": (network(in_channels=65536, out_channels=65536), r"in_channels: 65536: "),
    "huge width": (network(block_out_channels=[65536] * 2), r"model\.safetensors does not fit.*size mismatch"),
    "huge claim": (header(lambda text: text.replace("[8]", "[9999999999]", 1)), r"model\.safetensors is damaged"),
    "huge header": (written(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), r"model\.safetensors is damaged"),
    "wrong place": (header(lambda text: text.replace('"data_offsets":[0', '"data_offsets":[4', 1)), r"is damaged"),
    "eight bits": (weights(lambda w: w.update({"conv_in.bias": torch.zeros(8).to(torch.float8_e4m3fn)})), r"finite"),
    "too large": (weights(lambda w: w.update({"conv_in.bias": 1e300 * torch.ones(8).double()})), r"finite"),
    "sparse": (sparse(WEIGHTS, 2**43), r"model\.safetensors has 8,796,093,022,208 bytes, more than"),
    "sparse text": (sparse("unet/config.json", 2**40), r"config\.json has 1,099,511,627,776 bytes, more than the 67"),
    "huge": (network(layers_per_block=10**9), r"layers_per_block: 1000000000: "),
    "blocks": (network(down_block_types=None), r"down_block_types: None: "),
    "list": (written("unet/config.json", b"[]"), r"unet/config\.json is damaged"),
    "learned": (scheduler(variance_type="learned"), r"scheduler_config\.json: variance_type: 'learned' is not"),
    "range": (scheduler(variance_type="learned_range"), r"is learned_range, but .* has out_channels 1 for in"),
    "betas": (scheduler(beta_schedule="laplace"), r"beta_schedule: 'laplace' is not supported; choose from.*sigmoid"),
    "flow": (scheduler(prediction_type="flow_prediction"), r"prediction_type: 'flow_prediction' is not"),
    "snr": (scheduler(rescale_betas_zero_snr=True), r"rescale_betas_zero_snr: alpha_bar_T would be 0"),
    "thresholding": (scheduler(thresholding=True), r"thresholding: .*clip"),
    "flow sigmas": (scheduler(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), r"flow matching"),
    "pixels": (scheduler(clip_sample_range=3.0), r"clip_sample_range: 3\.0"),
    "lengths": (scheduler(trained_betas=[0.1, 0.2]), r"trained_betas: 2 values for num_train_timesteps 50"),
    "beta": (scheduler(beta_end=1.5), r"scheduler_config\.json: beta_end: 1\.5: "),
    "no noise": (scheduler(trained_betas=[1e-300] * T), r"alpha_bar from 1\.0 to 1\.0"),
    "no signal": (scheduler(num_train_timesteps=90_000, beta_end=0.9), r"alpha_bar from .* to 0\.0"),
    "T": (scheduler(num_train_timesteps=0), r"num_train_timesteps: 0: "),
    "nan": (scheduler(beta_start=float("nan")), r"beta_start: nan: "),
    "two": (scheduler(beta_schedule="x", prediction_type="y"), r"beta_schedule: 'x'.*prediction_type: 'y'"),
    "class": (scheduler(_class_name=["DDPMScheduler"]), r"_class_name: \['DDPMScheduler'\] is not known"),
    **{name: (scheduler(_class_name=name), f"'{name}' is .*; choose from.*DDPM") for name in OTHER_SCHEDULERS},
    "pickle": (pickled, r"lacks unet/.*safetensors: unet/.*\.bin.*safe_serialization=True"),
    "no weights": (without(WEIGHTS), r"lacks unet/diffusion_pytorch_model\.safetensors: it holds"),
    "no config": (without("unet/config.json"), r"lacks unet/config\.json: "),
    "no scheduler": (without("scheduler/scheduler_config.json"), r"lacks scheduler/scheduler_config\.json: "),
    "empty": (written(WEIGHTS, b""), r"model\.safetensors is damaged"),
    "text weights": (written(WEIGHTS, b"weights, they said"), r"model\.safetensors is damaged"),
    "not finite": (weights(lambda w: w["conv_in.bias"].fill_(float("nan"))), r"conv_in\.bias .*finite"),
    "integers": (weights(lambda w: w.update({"conv_in.bias": torch.zeros(8).char()})), r"conv_in\.bias .*int8"),
    "a part": (weights(lambda w: w.pop("conv_in.bias")), r'does not fit.*Missing key.*"conv_in\.bias"'),
    "too much": (weights(lambda w: w.update(more=torch.zeros(1))), r'does not fit.*Unexpected key.*"more"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_file_and_the_reason(folder, case):
    damage, reason = REFUSED[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=f"(?s){reason}") as error:
        open_folder(folder)
    assert str(folder) in str(error.value)


def test_the_other_schedulers_are_those_of_diffusers():
    deprecated = {"KarrasVeScheduler", "ScoreSdeVpScheduler"}  # not to be had there without transformers
    assert set(dir(diffusers)) | deprecated >= OTHER_SCHEDULERS.keys()


def test_a_place_that_is_no_folder(folder, tmp_path):
    for place, reason in (
        (tmp_path / "nowhere", "not a folder.*hf download"),
        (folder / WEIGHTS, "Not a directory.*give"),
        (folder / "unet", "lacks scheduler_config.json"),
        ("nothing://bucket", "cannot be opened.*s3://"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            open_folder(place)


@pytest.mark.parametrize("kept", [1, 7, 8, 200, 0.5, -1])
def test_truncated_weights_are_refused(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        open_folder(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_file_that_changes_after_opening_is_refused(folder, name):
    checkpoint = open_folder(folder)
    content = (folder / name).read_bytes()
    for place in (0, 8, len(content) // 3, len(content) - 1):
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{name} is damaged: its sha256.*opened"):
            load(checkpoint)
    (folder / name).write_bytes(content)
    load(checkpoint)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(checkpoint)


# Weights in several files, and variants of them.


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    return str(caught.value)


def test_several_files_that_are_not_what_their_index_says_are_refused(unet, tmp_path):
    whole = saved(unet, tmp_path / "whole", max_shard_size="20KB")
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads((whole / index).read_text())["weight_map"]
    first, second, *_ = sorted(set(weight_map.values()))
    name = next(name for name, file in weight_map.items() if file == first)

    def changed(label: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / label))

    folder = changed("a file is missing")
    (folder / "unet" / second).unlink()
    assert f"lacks unet/{second}" in refusal(folder)
    folder = changed("two files are swapped")
    (folder / "unet" / first).rename(folder / "unet/x")
    (folder / "unet" / second).rename(folder / "unet" / first)
    (folder / "unet/x").rename(folder / "unet" / second)
    assert f"{first} does not hold what" in refusal(folder)
    folder = changed("a tensor is elsewhere")
    put(folder / index, weight_map={**weight_map, name: second})
    assert "does not hold what" in refusal(folder) and name in refusal(folder)
    for label, wrong in {
        "outside": {name: "../../../etc/passwd"}, "a number": {name: 1}, "a pickle": {name: "model.bin"}, "none": {},
        "a list": [1],
    }.items():  # fmt: skip
        folder = changed(label)
        put(folder / index, weight_map=wrong)
        assert f"{index} is damaged" in refusal(folder)
    folder = changed("cut")
    (folder / "unet" / second).write_bytes((folder / "unet" / second).read_bytes()[:-7])
    assert f"{second} is damaged" in refusal(folder)
    checkpoint = open_folder(whole)
    (whole / "unet" / second).write_bytes(b"x" + (whole / "unet" / second).read_bytes()[1:])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(checkpoint)


def test_several_variants_or_pointers_are_refused_with_what_to_do(unet, folder, tmp_path):
    both = saved(halved(unet), tmp_path / "both", variant="fp16")
    shutil.copy(folder / WEIGHTS, both / "unet/diffusion_pytorch_model.non_ema.safetensors")
    assert "several variants" in refusal(both) and "leave one there" in refusal(both)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("google/ddpm-cifar10-32", "hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32,"),
        ("hf://google/ddpm-cifar10-32", "hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32,"),
        ("hf://google/ddpm-cifar10-32/unet", "hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32,"),
        ("hf://datasets/ylecun/mnist", "hf download ylecun/mnist --repo-type dataset --local-dir mnist,"),
        ("hf://", "hf download NAME --local-dir NAME,"),
    ],
)
def test_a_repository_of_the_hub_says_how_it_becomes_a_folder(target, command, tmp_path):
    with pytest.raises(Mistake) as caught:
        subjects.find(target, Storage(tmp_path), ["data.source=digits"], None)
    assert command in str(caught.value) and "\n" not in str(caught.value)
    if "://" in target:
        with pytest.raises(Mistake, match="hf download"):
            sources.describe(DataConfig(source=target))
