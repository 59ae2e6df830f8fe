"""Conditions by cross-attention, labels or vectors: the network, its training, and what is measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers_folder import diffusers
from experiment_files import content, problems
from small_process import process
from vectored_digits import FORMS, LENGTH, VECTORS, WIDTH, write

from orchestrator import evaluate, sample
from orchestrator.api import open_model
from orchestrator.compare import compare_summaries
from orchestrator.experiment.load import parse
from orchestrator.experiment.preflight import check_trial
from orchestrator.tracking import models
from orchestrator.tracking.models import Candidate
from workers.classes import NO_LABEL, Classes, Told, Vectors
from workers.config import (
    DataConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    Mistake,
    ModelConfig,
    NLLConfig,
    SamplerConfig,
    Trial,
)
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.diffusion.guidance import withhold
from workers.evaluation.blocks import Images, list_blocks, list_nll_blocks, list_sample_blocks
from workers.evaluation.features import load_feature_space
from workers.evaluation.make import Bench, make, make_nll_block, read_block
from workers.evaluation.summary import summarise
from workers.identity import compute_trial_id
from workers.journal import read_points
from workers.learner import Learner
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.unet import UNet
from workers.network.unet_config import count_weights, make_unet_config
from workers.noise import make_generator
from workers.storage import Storage
from workers.training import train
from workers.world import World

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0}
CLASSES = Classes(("cat", "dog", "owl"), (3, 0, 1))
MUCH = 1000.0  # guidance that shows after a few steps
TOLD: dict[str, Told] = {"labels": CLASSES, "vectors": Vectors(LENGTH, WIDTH)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_config(what: str, label_dropout: float = 0.1, **changes: Any) -> dict[str, Any]:
    model = ModelConfig.model_validate({**MODEL, "conditions": what, **changes})
    return make_unet_config(model, image_channels=1, resolution=8, told=TOLD[what], label_dropout=label_dropout)


def make_unet(config: dict[str, Any]) -> UNet:
    """With weights that are nowhere zero."""
    unet, noise = UNet(config, make_generator("weights")).eval(), make_generator("more")
    with torch.no_grad():
        for weights in unet.parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=noise))
    return unet


def draw_inputs(what: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t, what our network is told, and the same as diffusers' is told it."""
    x, t = torch.randn((4, 1, 8, 8), generator=make_generator("x")), torch.tensor([0, 3, 7, 19])
    if what == "labels":
        return x, t, torch.tensor([0, 1, 2, NO_LABEL]), torch.eye(4)[:, None]
    told = torch.randn((4, LENGTH, WIDTH), generator=make_generator("told"))
    told[3] = 0
    return x, t, told, told


# ---- The network ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("what", TOLD)
def test_a_folder_opens_in_diffusers_and_what_that_saves_opens_here(what: str, tmp_path: Path) -> None:
    config = make_config(what)
    unet, (x, t, told, theirs_told) = make_unet(config), draw_inputs(what)
    snapshot = checkpoints.Snapshot(step=1, unet_config=config, process=process(30), ema=unet.state_dict())
    checkpoints.save(Storage(tmp_path), "all", snapshot)
    folder = tmp_path / "all" / "step-00000001"
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert theirs.state_dict().keys() == unet.state_dict().keys()
    expected = theirs(x, t, encoder_hidden_states=theirs_told).sample
    torch.testing.assert_close(unet(x, t, told), expected, rtol=1e-4, atol=1e-5)
    diffusers.DDPMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "back")
    opened = checkpoints.open_folder(tmp_path / "back")
    found = checkpoints.describe(opened)
    assert found.told == (CLASSES if what == "labels" else Vectors(LENGTH, WIDTH, True)) and found.takes_no_label
    torch.testing.assert_close(checkpoints.load(opened)[0].network(x, t, told), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_network_of_diffusers_own_making_opens_here(tmp_path: Path) -> None:
    """Of several heads, whose vectors are of any length; what tells nothing it does not say, so it can't be guided."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    ).eval()  # fmt: skip
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path)
    opened = checkpoints.open_folder(tmp_path)
    found, (x, t, told, _) = checkpoints.describe(opened), draw_inputs("vectors")
    assert found.told == Vectors(0, WIDTH) and not found.takes_no_label
    expected = theirs(x, t, encoder_hidden_states=told).sample
    torch.testing.assert_close(checkpoints.load(opened)[0].network(x, t, told), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("what", TOLD)
def test_it_begins_as_zero_and_hears_what_it_is_told(what: str) -> None:
    x, t, told, _ = draw_inputs(what)
    assert not UNet(make_config(what), make_generator(0))(x, t, told).any()
    unet = make_unet(make_config(what))
    heard, without = unet(x, t, told), unet(x, t, withhold(told))
    differ = (heard - without).abs().flatten(1).amax(1) > 1e-3
    assert differ.tolist() == [True, True, True, False], "the last is told nothing"
    torch.testing.assert_close(unet(x[:2], t[:2], told[:2]), heard[:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vectors_are_a_set_to_attention() -> None:
    """Softmax over them knows no order; two that are equal are one."""
    x, t, told, _ = draw_inputs("vectors")
    unet = make_unet(make_config("vectors"))
    torch.testing.assert_close(unet(x, t, told.flip(1)), unet(x, t, told), rtol=1e-4, atol=1e-5)
    once = told[:, :1]
    torch.testing.assert_close(unet(x, t, once.repeat(1, 3, 1)), unet(x, t, once), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [{}, {"channels": 64, "multipliers": [1, 2, 2, 4], "blocks": 3, "attention": [8, 2]}])
def test_the_weights_are_counted_without_building_the_network(model: dict[str, Any]) -> None:
    config = make_config("vectors", **model)
    with torch.device("meta"):
        unet = UNet(config)
    matrices = sum(p.numel() for p in unet.parameters() if p.dim() > 1) - unet.encoder_hid_proj.weight.numel()
    asked = ModelConfig.model_validate({**MODEL, "conditions": "vectors", **model})
    assert count_weights(asked, resolution=8) == matrices - 2 * 9 * asked.channels


@pytest.mark.parametrize("vectors", [[0, 4, False], [2, 4], "text", [2, 2**17, True]])
def test_a_config_that_means_no_vectors_is_refused(vectors: Any) -> None:
    with pytest.raises(ValueError, match=r"_vectors: .* is no \[length, width"):
        UNet({**make_config("vectors"), "_vectors": vectors})
    with pytest.raises(ValueError, match="_vectors: of 4 numbers each, which encoder_hid_dim is not"):
        UNet({**make_config("vectors"), "_vectors": [2, 4, True]})


# ---- Training and measurements -------------------------------------------------------------------------------------


def make_trial(data: DataConfig, what: str = "vectors", **training: Any) -> Trial:
    settings = {
        "data": data.model_dump(mode="json"),
        "model": {**MODEL, "conditions": what},
        "diffusion": {"T": 30, "schedule": {"scale": "per_1000"}},
        "training": {
            "steps": 4, "batch_size": 16, "lr": 2e-3, "ema": 0.5, "precision": "float32", "label_dropout": 0.25,
            "validate_every": 4, "checkpoint_every": 4, **training,
        },
    }  # fmt: skip
    return Trial.model_validate(settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write(tmp_path_factory.mktemp("data") / "digits.parquet", FORMS["fixed"](VECTORS))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> Storage:
    """Of two trials, trained in plain Python: vectors, and labels."""
    torch.set_num_threads(1)
    found = Storage(tmp_path_factory.mktemp("runs"))
    for what in TOLD:
        trial = make_trial(data, what)
        for _ in train(trial, prepare(trial.data), found, f"trials/{what}"):
            pass
    return found


def find(storage: Storage, what: str = "vectors") -> manifest.Checkpoint:
    found = manifest.find_newest(storage, f"trials/{what}/checkpoints")
    assert found
    return found


def measure(
    storage: Storage, config: DataConfig, what: Any = "vectors", **sampler: Any
) -> tuple[Bench, dict[str, Any]]:
    of = FIDConfig(samples=70, sampler=SamplerConfig(kind="ddim", steps=2, guidance=MUCH))
    evaluation = EvaluationConfig(nll=NLLConfig(images=6, timesteps=3), fid=of)
    m, dataset = Measurement(data=config, T=30, told=what, evaluation=evaluation), prepare(config)
    bench = Bench(storage, m, dataset, find(storage, what), CPU)
    for block in list_blocks(m, bench.checkpoint.digest, Images.of(dataset)):
        make(bench, block)
    space = load_feature_space(storage, dataset, "classifier", CPU)
    of_process = checkpoints.load_process(bench.checkpoint), bench.checkpoint.digest
    return bench, summarise(storage, m, dataset, *of_process, space=space)


def test_the_id_counts_what_is_told_and_its_column(data: DataConfig) -> None:
    trials = [make_trial(data, what) for what in TOLD]
    plain = trials[0].model_copy(update={"model": ModelConfig.model_validate(MODEL)})
    assert len({compute_trial_id(trial, "d" * 16) for trial in (*trials, plain)}) == 3


def test_vectors_are_kept_from_the_network_as_often_as_is_asked(data: DataConfig) -> None:
    trial, dataset = make_trial(data, batch_size=64), prepare(data)
    learner, seen = Learner(trial, dataset, World()), []
    learner.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    for _ in range(20):
        learner.train_step()
    told = torch.cat([each for each in seen if len(each) == 64])
    assert dataset.train_vectors is not None
    share = float((told.flatten(1) == 0).all(1).float().mean())
    assert abs(share - 0.25) < 0.05
    known = {row.tobytes() for row in np.asarray(dataset.train_vectors)}
    assert {row.tobytes() for row in told[told.flatten(1).any(1)].numpy()} <= known


def test_a_validation_tells_each_image_its_own(storage: Storage) -> None:
    for what in TOLD:
        last = {
            name: v for point in read_points(storage, f"trials/{what}") for name, v in point.get("metrics", {}).items()
        }
        assert np.isfinite(last["valid/nll_bpd"])


def test_the_bound_is_of_each_image_given_its_vectors(storage: Storage, data: DataConfig) -> None:
    bench, summary = measure(storage, data)
    subjects = {kind: summary["passports"][kind]["subject"] for kind in ("nll", "samples")}
    assert "given its vectors" in subjects["nll"]["vectors"] and "data's order" in subjects["samples"]["vectors"]
    [block, *_] = list_nll_blocks(bench.m, bench.checkpoint.digest, Images.of(bench.dataset))
    own = read_block(storage, block)["squared_error"].to_numpy()
    assert bench.dataset.held_out_vectors is not None
    moved = replace(bench.dataset, held_out_vectors=np.roll(bench.dataset.held_out_vectors, 1, axis=0))
    assert np.array_equal(make_nll_block(bench, block)["squared_error"].to_numpy(), own)
    assert not np.array_equal(make_nll_block(replace(bench, dataset=moved), block)["squared_error"].to_numpy(), own)
    _, labelled = measure(storage, data, "labels")
    plain = json.loads(json.dumps(summary))
    del plain["passports"]["nll"]["subject"]["vectors"]
    for first, words in ((plain, "B was told the vectors of each image and A was not: p(x | vectors) against p(x)"),
                         (labelled, "A was told the label of each image and B the vectors")):  # fmt: skip
        lines, differing = compare_summaries(first, summary)
        assert any(words in line for line in lines), lines
        assert not differing


def test_samples_take_the_vectors_of_the_training_images_in_their_order(storage: Storage, data: DataConfig) -> None:
    bench, _ = measure(storage, data)
    of = bench.m, bench.checkpoint.digest
    [block] = list_sample_blocks(*of, Images.of(bench.dataset))
    assert [block] != list_sample_blocks(*of, Images.of(bench.dataset)._replace(digest="other"))
    drawn = np.stack([np.frombuffer(image, np.uint8) for image in read_block(storage, block)["image"].to_pylist()])
    vectors = bench.dataset.train_vectors
    assert vectors is not None
    fid = bench.m.evaluation.fid
    assert fid
    models.save(Candidate(trial="a", checkpoint=bench.checkpoint, levels=256, fid=fid), Path(storage.root, "model"))
    model = mlflow.pyfunc.load_model(str(Path(storage.root, "model")))
    asked = pd.DataFrame({"n": [100], "seed": [0], "vectors": [vectors[3].tolist()]})
    given = model.predict(asked).reshape(100, -1)
    same = (given == drawn).all(1)
    assert same[[3, 3 + len(vectors)]].all() and same.sum() <= 4, "sample k has the vectors of image k"
    for wrong in ({}, {"vectors": [[[1.0]]]}):
        with pytest.raises(Exception, match="vectors"):
            model.predict(pd.DataFrame({"n": [1], "seed": [0], **wrong}))


def test_a_model_takes_vectors_and_a_scale(storage: Storage) -> None:
    model, told = open_model(find(storage).url), torch.from_numpy(VECTORS[:2])
    one, two = (model.sample(2, steps=2, vectors=of, guidance=MUCH) for of in told)
    each = model.sample(2, steps=2, vectors=told, guidance=MUCH)
    assert np.array_equal(each, np.stack([one[0], two[1]])) and not np.array_equal(one, two)
    one, two = (model.sample(2, steps=2, vectors=of, guidance=0) for of in told)
    assert np.array_equal(one, two)
    x_t, t = torch.zeros(1, 1, 8, 8), torch.tensor([5])
    assert not torch.equal(model(x_t, t, vectors=told[0]), model(x_t, t, vectors=0 * told[0]))
    for wrong in ({}, {"vectors": told[:, :1]}, {"vectors": told[0] * np.nan}, {"labels": 1}):
        with pytest.raises(Mistake):
            model.sample(2, **wrong)  # type: ignore[arg-type]
    with pytest.raises(Mistake, match="give vectors="):
        model(x_t, t)
    with pytest.raises(Mistake, match="told no vectors"):
        open_model(find(storage, "labels").url).sample(1, vectors=told)


def test_the_command_draws_by_the_vectors_of_held_out_images(
    storage: Storage, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = f"evaluation.fid.sampler={{kind: ddim, steps: 2, guidance: {MUCH}}}"
    words = [find(storage).url, f"data.source={data.source}", "data.condition=text", sampler]
    more = ["--storage", str(tmp_path), "--n", "6", "--at", "5"]
    drawn = []
    for rows in ([], ["--row", "1"], ["--row", "2"], ["--row", "2", "1"]):
        assert sample.main([*words, *more, *rows]) == 0, capsys.readouterr().err
        drawn.append(Path(capsys.readouterr().out.split()[0]).read_bytes())
    assert len(set(drawn)) == 4
    assert sample.main([*words, *more, "--row", "6"]) == 2
    assert "--row 6: the held-out images of digits are 0..5" in capsys.readouterr().err
    assert sample.main([*words, *more, "--label", "1"]) == 2
    assert "is told no classes" in capsys.readouterr().err


# ---- Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"labels": True, "conditions": "labels"}}, "told one thing, one way, so leave one of them out"),
        ({"model": {"conditions": "vectors"}}, "data.condition names none; set data.condition to the column"),
        ({"model": {"conditions": "vector"}, "data": {"condition": "text"}}, "model.conditions"),
        (
            {"model": {"conditions": "labels"}, "evaluation": {"fid": {"sampler": {"guidance": 2}}}},
            "always told the label; train one with training.label_dropout above 0, or take 1",
        ),
        (
            {
                "model": {"conditions": "vectors"},
                "data": {"condition": "a"},
                "evaluation": {"fid": {"sampler": {"guidance": 2}}},
            },
            "always told the vectors",
        ),
    ],
)
def test_what_does_not_go_together_is_told(sections: dict[str, Any], told: str) -> None:
    [problem] = problems(**sections)
    assert told in problem


def test_the_data_must_have_what_a_network_is_told(
    storage: Storage, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = parse(content(data={"source": "gaussian"}, model={"conditions": "labels"}, evaluation={"fid": None}))
    found = [f.text for f in check_trial(experiment, experiment.trial, describe(experiment.trial.data)) if f.refused]
    assert any("gaussian has no labels" in text for text in found)
    narrow = write(tmp_path / "narrow.parquet", FORMS["lists of doubles"](VECTORS[:, :, :4]))
    for more, words in (
        ([f"data.source={data.source}"], "no column of digits is named; set data.condition"),
        (
            [f"data.source={narrow.source}", "data.condition=text"],
            "is told 2 vectors of 5 numbers, and data.condition of",
        ),
    ):
        of = [find(storage).url, *more, "evaluation.fid=null", "--storage", str(tmp_path)]
        assert evaluate.main(of) == 2
        assert words in capsys.readouterr().err
