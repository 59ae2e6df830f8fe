"""Families of trials: what each reads of a file, what is refused of it, and that denoisers are as they were."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_files import experiment, problems, search

from orchestrator.experiment.dry_run import format_dry_run
from orchestrator.experiment.expand import expand, group_by_row
from orchestrator.experiment.preflight import check_before_start
from orchestrator.experiment.records import ExperimentError
from workers.config import EvaluationConfig, FIDConfig, Measurement, Trial
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.evaluation import blocks
from workers.evaluation.blocks import Images
from workers.evaluation.make import Bench, make
from workers.evaluation.rates import Stage
from workers.evaluation.summary import summarise
from workers.identity import collect_settings_read, compute_trial_id, describe_evaluation
from workers.kinds import NETWORKS
from workers.model_settings import FAMILY_READS
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.storage import Storage
from workers.training import train

VAE: dict[str, Any] = {
    "model": {"kind": "autoencoder", "channels": 8, "multipliers": [1, 2], "blocks": 1},
    "loss": {"objective": "elbo"},
}
GAN: dict[str, Any] = {
    "model": {"kind": "generator", "channels": 8, "multipliers": [1, 2], "blocks": 1},
    "loss": {"objective": "gan", "discriminator_channels": 4, "discriminator_layers": 2, "r1": 0.1},
}


def with_(base: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**base, **{name: {**base.get(name, {}), **section} for name, section in sections.items()}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_family_says_what_it_reads() -> None:
    assert {entry.family for entry in NETWORKS.values()} == set(FAMILY_READS)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a process": (with_(VAE, diffusion={"T": 50}), 'diffusion: {"T": 50} is without effect on model.kind: autoencoder'),
    "a way of drawing t": (
        with_(VAE, training={"timesteps": "stratified"}),
        "training.timesteps: stratified is without",
    ),
    "labels": (with_(VAE, model={"labels": True}), "model.labels: true is without effect on model.kind: autoencoder"),
    "a sampler": (
        with_(VAE, evaluation={"fid": {"sampler": {"kind": "heun", "steps": 5}}}),
        r'evaluation.fid.sampler: {"kind": "heun", "steps": 5} is without effect .* take model.kind: unet',
    ),
    "the ODE": (with_(VAE, evaluation={"ode_nll": {}}), "evaluation.ode_nll: {} is without effect on model.kind"),
    "a denoiser's objective": (
        with_(VAE, loss={"objective": "kl"}),
        "loss.objective: kl is for denoisers, and model.kind: autoencoder is of the autoencoders|"
        "take objective: elbo, or model.kind: unet",
    ),
    "an autoencoder's objective": (
        {"loss": {"objective": "elbo"}},
        "take objective: consistency or hybrid or kl or mse or progressive",
    ),
    "its beta": ({"loss": {"beta": 0.5}}, "loss.beta: 0.5 is without effect on objective: mse.*take objective: elbo"),
    "a discriminator's setting": (
        with_(VAE, loss={"game": "non_saturating"}),
        "loss.game: non_saturating is without effect on adversarial: null; .*take adversarial: a number",
    ),
    "a bound of a generator": (
        with_(GAN, evaluation={"nll": {"images": 5}}),
        'evaluation.nll: {"images": 5} is without effect on model.kind: generator; leave it out, or take model.kind: '
        "unet or autoencoder",
    ),
    "generators ranked by a bound": (
        with_(GAN, search=search({"seed": {"grid": [1, 2]}})),
        "search.metric: eval/nll_bpd is not measured of model.kind: generator.*take eval/fd_classifier",
    ),
    "generators stopped by a bound": (
        with_(GAN, search=search({"seed": {"grid": [1, 2]}}, metric="eval/fd_classifier", scheduler={"kind": "asha"})),
        "search.scheduler.kind: asha stops trials by their bound",
    ),
    "a bound in continuous time": (
        with_(VAE, search=search({"seed": {"grid": [1, 2]}}, metric="eval/continuous_nll_bpd")),
        "the bound of autoencoder is eval/nll_bpd",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_does_not_read_is_refused_with_what_to_do(name: str) -> None:
    sections, expected = REFUSED[name]
    found = "\n".join(problems(**sections))
    for pattern in expected.split("|"):
        assert re.search(pattern.replace("{", r"\{").replace("}", r"\}"), found), found


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (with_(VAE, model={"multipliers": [1, 1, 1, 1, 1]}), "8 pixels can be halved only 3 times; take at most 4"),
        (with_(VAE, model={"channels": 50}), "50 cannot be split into 12 equal groups"),
        (with_(VAE, loss={"adversarial": 1.0, "discriminator_layers": 4}), "smaller side has 8 pixels; take at most 3"),
        (with_(GAN, loss={"discriminator_layers": 5}), "take at most 3"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_before_anything_starts(sections: dict, expected: str) -> None:
    of = experiment(**sections)
    with pytest.raises(ExperimentError, match=expected):
        check_before_start(of, expand(of), {of.data: describe(of.data)})


def test_what_a_family_does_not_read_is_in_no_id() -> None:
    bare = experiment(**VAE).trial
    other = with_(VAE, diffusion={"T": 50}, evaluation={"nll": {"timesteps": 9}, "fid": {"sampler": {"eta": 0.5}}})
    told = Trial.model_validate({**bare.model_dump(), **other, "data": {"source": "digits"}})
    assert compute_trial_id(bare, "data") == compute_trial_id(told, "data")
    assert describe_evaluation(Measurement.of(told)) == {} == describe_evaluation(Measurement.of(bare))
    assert "diffusion" not in collect_settings_read(told)
    denoiser = experiment(diffusion={"T": 50}).trial
    assert compute_trial_id(denoiser, "data") != compute_trial_id(experiment().trial, "data")


def test_a_search_over_families_gives_each_what_it_reads() -> None:
    """Of settings that some variants read the others are rid; a generator in it is asked for no bound."""
    unet = {"kind": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "labels": True}
    models = [unet, VAE["model"], GAN["model"]]
    of = experiment(
        diffusion={"T": 50, "schedule": {"scale": "per_1000"}},
        evaluation={"nll": {"timesteps": 20}, "fid": {"sampler": {"kind": "ddim", "steps": 5}}},
        search=search(
            {"model": {"grid": models}, "loss.objective": {"grid": ["mse", "elbo", "gan"]}},
            without=[
                {"model": model, "loss.objective": objective}
                for model, own in zip(models, ("mse", "elbo", "gan"), strict=True)
                for objective in ("mse", "elbo", "gan")
                if objective != own
            ],
        ),
    )
    variants, source = expand(of), describe(of.data)
    assert check_before_start(of, variants, {of.data: source}) == []
    measured = [Measurement.of(variant.trial) for variant in variants]
    assert [m.family for m in measured] == ["denoiser", "autoencoder", "generator"]
    assert [m.T for m in measured] == [50, None, None] and [m.told for m in measured] == ["labels", None, None]
    assert measured[1].evaluation.nll is not None and measured[2].evaluation.nll is None
    kinds = [{block.kind for block in blocks.list_blocks(m, "c", Images.of(source))} for m in measured]
    common = {"samples", "features", "reference"}
    assert kinds == [common | {"nll"}, common | {"nll", "reconstructions", "held_out"}, common]
    assert [len(blocks.list_blocks(m, "c", Images.of(source))) for m in measured] == [
        blocks.count_blocks(m, Images.of(source)) for m in measured
    ]
    rows, _ = group_by_row(variants, {of.data: source.digest})
    table = format_dry_run(rows, {of.data: source})
    assert len(rows) == 3 and table.count(" - ") >= 4


def learn(trial: Trial, storage: Storage, until: int) -> manifest.Checkpoint:
    """Trains to a validation, where the loop is cut off, and gives the newest checkpoint."""
    loop: Any = train(trial, prepare(trial.data), storage, "trials/a")
    while next(loop).step < until:
        pass
    loop.close()
    found = manifest.find_newest(storage, "trials/a/checkpoints")
    assert found
    return found


def test_a_generator_learns_resumes_and_is_measured_without_a_bound(tmp_path: Path) -> None:
    training = {"steps": 4, "batch_size": 16, "lr": 1e-3, "precision": "float32", "validate_every": 2,
                "checkpoint_every": 1}  # fmt: skip
    trial = experiment(**with_(GAN, training=training)).trial
    trial = trial.model_copy(update={"evaluation": EvaluationConfig(fid=FIDConfig(samples=100, also=()))})
    storage, whole = Storage(tmp_path / "parts"), learn(trial, Storage(tmp_path / "whole"), 4)
    assert learn(trial, storage, 2).step == 2
    checkpoint, state = learn(trial, storage, 4), "state/training.safetensors"
    assert checkpoint.digest == whole.digest and dict(checkpoint.sums)[state] == dict(whole.sums)[state]
    data, m = prepare(trial.data), Measurement.of(trial)
    bench = Bench(storage, m, data, checkpoint, torch.device("cpu"))
    for block in blocks.list_blocks(m, checkpoint.digest, Images.of(data)):
        make(bench, block)
    summary = summarise(storage, m, data, Stage.of(checkpoint), checkpoint.digest, space=bench.space)
    assert set(summary["passports"]) == {"samples"} and "eval/nll_bpd" not in summary["metrics"]
    assert "no likelihood" in summary["passports"]["samples"]["subject"]["bound"]
    export = tmp_path / "exported"
    checkpoints.export(checkpoint, export)
    assert checkpoints.open_folder(export).digest == checkpoint.digest
    with pytest.raises(manifest.CheckpointError, match="holds no autoencoder, but a model of the generators"):
        checkpoints.load_autoencoder(checkpoint)
