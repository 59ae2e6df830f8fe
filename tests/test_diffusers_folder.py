"""Folders that diffusers saved give the same numbers here."""

import copy
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers_folder
import pytest
import torch
from diffusers_folder import WEIGHTS, T, diffusers, halved, put, saved
from safetensors.torch import load_file, save_file

from workers.config import DiffusionConfig, SamplerConfig
from workers.diffusion.formulations import Continuous
from workers.diffusion.process import Process
from workers.diffusion.samplers import ancestral
from workers.network.checkpoint import Description, describe, export, load, open_folder
from workers.network.diffusers_config import (
    BETAS,
    PREDICTION_TYPES,
    SCHEDULERS,
    make_scheduler_config,
    read_scheduler,
)
from workers.noise import make_generator

one_thread = diffusers_folder.one_thread
unet = diffusers_folder.unet
original = diffusers_folder.original
folder = diffusers_folder.folder


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
    assert isinstance(process, Process)
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


# Weights in several files, and variants of them.


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


# Continuous time.


def test_a_flow_is_measured_between_ends_of_its_own(folder):
    """They stay with its folder, in names that diffusers keeps and does not read; without them it says nothing more."""
    own = DiffusionConfig(formulation="flow", t_min=0.01, t_max=0.95)
    config = make_scheduler_config(Continuous.of(own))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    _, process = load(open_folder(folder))
    assert process == Continuous.of(own) and process.ends == pytest.approx((0.01 / 0.99, 19))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config["_t_max"] == 0.95
    assert set(config) - set(make_scheduler_config(Continuous.of(DiffusionConfig(formulation="flow")))) == {
        "_t_min",
        "_t_max",
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EDMEulerScheduler", {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.4}),
        ("EDMDPMSolverMultistepScheduler", {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.4}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
def test_folders_of_continuous_time_open(unet, folder, name, settings):
    """Their x_0_hat of the same x_t, and the folder that is written of it opens as the same."""
    scheduler, edm = getattr(diffusers, name)(**settings), "EDM" in name
    scheduler.save_pretrained(folder / "scheduler")
    checkpoint = open_folder(folder)
    network, process = load(checkpoint)
    assert isinstance(process, Continuous) and describe(checkpoint).T is None
    assert process.ends == pytest.approx((0.01, 50.0) if edm else (1 / 999, 999))
    x, t = torch.randn((2, 1, 8, 8), generator=make_generator("x")), torch.tensor([0.7], dtype=torch.float64)
    with torch.no_grad():
        found = network(x, t.expand(2)).x_0
        if edm:
            output = unet(scheduler.precondition_inputs(x, 0.7), scheduler.precondition_noise(t)).sample
            expected = scheduler.precondition_outputs(x, output, 0.7)
        else:
            expected = x - 0.7 * unet(x, 700.0).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    export(checkpoint, folder.parent / "exported")
    again, other = load(open_folder(folder.parent / "exported"))
    assert other == process
    with torch.no_grad():
        assert torch.equal(again(x, t.expand(2)).x_0, found)
    written = getattr(diffusers, make_scheduler_config(process)["_class_name"])
    assert written.from_config(make_scheduler_config(process)).config.num_train_timesteps == 1000
