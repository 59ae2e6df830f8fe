"""Folders that diffusers saved give the same numbers here, and what cannot be measured is refused with the reason."""

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.measuring import subjects
from workers.config import DataConfig, Mistake, SamplerConfig
from workers.data import sources
from workers.diffusion.samplers import ancestral
from workers.network.checkpoint import Description, describe, export, load, open_folder
from workers.network.diffusers_config import BETAS, OTHER_SCHEDULERS, PREDICTION_TYPES, SCHEDULERS, read_scheduler
from workers.network.manifest import CheckpointError
from workers.noise import make_generator
from workers.storage import Storage

diffusers = pytest.importorskip("diffusers")

T = 50
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def original(unet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=T, beta_end=0.1)).save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def put(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; those set to ... are removed."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# The same numbers.


@pytest.mark.parametrize(
    "scheduler",
    [
        *(
            {"beta_schedule": b, "prediction_type": p, "beta_end": 0.1}
            for b in BETAS
            for p in PREDICTION_TYPES
            if p != "mu"
        ),
        {"trained_betas": torch.linspace(0.3, 0.001, T).tolist(), "prediction_type": "v_prediction"},
        {"variance_type": "fixed_large", "beta_end": 0.1},
        {"variance_type": "fixed_small_log", "beta_end": 0.1},
        {"kind": "DDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    ],
    ids=lambda s: "-".join(str(value)[:20] for value in s.values()),
)
def test_a_step_is_that_of_diffusers(unet, folder, scheduler):
    """x_0_hat and one ancestral step from the same x_t with the same noise; eps where it is what is predicted."""
    scheduler = dict(scheduler)
    saved = getattr(diffusers, scheduler.pop("kind", "DDPMScheduler"))(num_train_timesteps=T, **scheduler)
    saved.save_pretrained(folder / "scheduler")
    network, process = load(open_folder(folder))
    theirs = diffusers.DDPMScheduler.from_config(saved.config)
    torch.testing.assert_close(process.beta, theirs.betas.double(), rtol=1e-5, atol=0)
    # In diffusers 1 - alpha_bar_t is a difference in float32, which at small t has few digits left.
    theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)
    x_t = torch.randn((3, 1, 8, 8), generator=make_generator("x_t"))
    for t in (1, 2, T // 2, T - 1, T):
        time = torch.full((3,), t)
        with torch.no_grad():
            output, predicted = unet(x_t, t - 1).sample, network(x_t, time)
        if saved.config.prediction_type == "epsilon":
            torch.testing.assert_close(predicted.eps, output, rtol=0, atol=1e-5)
        step = theirs.step(output, t - 1, x_t, generator=make_generator("z"))
        predicted = replace(predicted, x_0=predicted.x_0.clamp(-1, 1))
        # x_0_hat is a difference over sqrt(alpha_bar_t): late in the chain eps in float32 allows no more.
        atol = max(1e-5, 1e-6 / float(process.alpha_bar[t - 1].sqrt()))
        torch.testing.assert_close(predicted.x_0, step.pred_original_sample, rtol=0, atol=atol)
        found = ancestral(process, SamplerConfig(), x_t, predicted, time, generator=make_generator("z"))
        torch.testing.assert_close(found, step.prev_sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_keys_left_out_have_the_defaults_of_diffusers(name):
    found = read_scheduler({"_class_name": name})
    theirs = getattr(diffusers, name)()
    torch.testing.assert_close(found.process.beta, theirs.betas.double(), rtol=1e-5, atol=0)
    assert found.process.T == 1000 and found.prediction == PREDICTION_TYPES[theirs.config.prediction_type]
    assert found.clip == theirs.config.get("clip_sample", False)
    assert found.process.variance == (theirs.config.get("variance_type") or "fixed_small")
    assert "use_flow_sigmas" not in inspect.signature(type(theirs)).parameters or not theirs.config.use_flow_sigmas


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_a_variance_by_its_logarithm_is_the_same(variance):
    process = read_scheduler({"_class_name": "DDPMScheduler", "variance_type": variance}).process
    expected = process.beta if "large" in variance else process.beta_tilde
    assert torch.equal(process.sigma_squared[1:], expected[1:])


def flat(folder: Path) -> None:
    """As the hub's repositories of 2022: everything in the root."""
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()


def bare(folder: Path) -> None:
    flat(folder)
    (folder / "model_index.json").unlink()


def unet_flat(folder: Path) -> None:
    for file in (folder / "unet").iterdir():
        file.rename(folder / file.name)
    (folder / "unet").rmdir()


@pytest.mark.parametrize("layout", [flat, bare, unet_flat])
def test_the_same_files_are_the_same_checkpoint_in_any_layout(folder, layout, unet):
    nested = open_folder(folder)
    layout(folder)
    moved = open_folder(folder)
    assert moved.digest == nested.digest and moved.step is None and hash(moved) != hash(nested)
    network, _ = load(moved)
    x = torch.randn((2, 1, 8, 8), generator=make_generator("x"))
    with torch.no_grad():
        torch.testing.assert_close(network(x, torch.tensor([4, 4])).eps, unet(x, 3).sample, rtol=0, atol=1e-5)


def test_a_repository_of_2022_opens(folder, unet):
    """As google/ddpm-cat-256 on the hub: all in the root, fewer keys in the configs, other names in the attention."""
    flat(folder)
    later = """dropout mid_block_type downsample_type upsample_type attn_norm_num_groups class_embed_type add_attention
        num_class_embeds num_train_timesteps resnet_time_scale_shift time_embedding_dim""".split()
    put(folder / "config.json", _diffusers_version="0.0.4", **dict.fromkeys(later, ...))
    scheduler: dict[str, Any] = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.0.4"}
    scheduler |= {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "clip_sample": True,
        "num_train_timesteps": 1000,
    }
    scheduler |= {"timestep_values": None, "trained_betas": None, "variance_type": "fixed_large"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    file, renamed = folder / "diffusion_pytorch_model.safetensors", {}
    for name, w in load_file(file).items():
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = w
    save_file(renamed, file)
    checkpoint = open_folder(folder)
    assert describe(checkpoint) == Description((8, 8, 1), 1000, "eps", "fixed_large", True, unet.num_parameters())
    network, process = load(checkpoint)
    theirs = diffusers.DDPMPipeline.from_pretrained(folder)
    torch.testing.assert_close(process.beta, theirs.scheduler.betas.double(), rtol=1e-5, atol=0)
    x = torch.randn((2, 1, 8, 8), generator=make_generator("x"))
    with torch.no_grad():
        torch.testing.assert_close(network(x, torch.tensor([4, 4])).eps, theirs.unet(x, 3).sample, rtol=0, atol=1e-5)


def test_what_describes_it_is_read_without_the_weights(folder, unet):
    put(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", clip_sample=False)
    checkpoint = open_folder(folder)
    (folder / WEIGHTS).unlink()
    found = describe(checkpoint)
    assert found == Description((8, 8, 1), T, "v", "fixed_small", False, unet.num_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_widened(folder, dtype):
    weights = {name: w.to(dtype) for name, w in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    network, _ = load(open_folder(folder))
    assert all(torch.equal(w, weights[name].float()) for name, w in network.network.state_dict().items())


# Refusals.


def scheduler(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder / "scheduler/scheduler_config.json", **changes)


def network(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder / "unet/config.json", **changes)


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
    "conditional": (network(_class_name="UNet2DConditionModel"), r"unet/config\.json: a UNet2DConditionModel, not"),
    "classes": (network(num_class_embeds=10), r"unet/config\.json: a class-conditional network.*10"),
    "class kind": (network(class_embed_type="timestep"), r"class-conditional network.*timestep"),
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


def saved(unet: Any, folder: Path, **how: Any) -> Path:
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=T, beta_end=0.1)).save_pretrained(
        folder, **how
    )
    return folder


def halved(unet: Any) -> Any:
    """The network in float16; the one of the tests stays as it is."""
    return copy.deepcopy(unet).half()


def output(folder: Path) -> torch.Tensor:
    x, t = torch.randn(2, 1, 8, 8, generator=make_generator("x")), torch.tensor([1, T])
    network, _ = load(open_folder(folder))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    with torch.no_grad():
        return torch.as_tensor(network(x, t).eps)


def test_weights_in_several_files_are_those_in_one(unet, original, tmp_path):
    folder = saved(unet, tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2 and not (folder / WEIGHTS).exists()
    assert torch.equal(output(folder), output(original))
    checkpoint = open_folder(folder)
    assert {Path(name).name for name, _ in checkpoint.sums} >= {shard.name for shard in shards}
    export(checkpoint, tmp_path / "exported")
    assert torch.equal(output(tmp_path / "exported"), output(original))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert open_folder(moved).digest == checkpoint.digest
    other = load_file(shards[1])
    save_file({name: w + 1 for name, w in other.items()}, moved / "unet" / shards[1].name)
    assert open_folder(moved).digest != checkpoint.digest


@pytest.mark.parametrize("how", [{"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "10KB"}])
def test_a_variant_is_opened_where_it_is_alone_and_in_float32(unet, original, tmp_path, how):
    folder = saved(halved(unet), tmp_path / "half", **how)
    assert not (folder / WEIGHTS).exists() and list((folder / "unet").glob("*fp16*"))
    exact = copy.deepcopy(unet)
    exact.load_state_dict({name: w.half().float() for name, w in unet.state_dict().items()})
    assert torch.equal(output(folder), output(saved(exact, tmp_path / "exact")))
    shutil.copytree(original / "unet", folder / "unet", dirs_exist_ok=True)
    assert torch.equal(output(folder), output(original))  # the weights themselves go before a variant


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
