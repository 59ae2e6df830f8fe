"""Trials whose network is told labels: ids, training, measurements, commands, names and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from experiment_files import content, problems
from image_files import COLOUR, LABELS, write_images, write_parquet
from PIL import Image
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from orchestrator import evaluate, sample
from orchestrator.api import open_model
from orchestrator.compare import compare_summaries
from orchestrator.experiment.load import parse
from orchestrator.experiment.preflight import check_trial
from orchestrator.tracking import models
from orchestrator.tracking.models import Candidate
from workers.config import (
    DataConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    Mistake,
    NLLConfig,
    SamplerConfig,
    Trial,
)
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.evaluation import blocks
from workers.evaluation.blocks import Images, list_blocks, list_sample_blocks
from workers.evaluation.features import load_feature_space
from workers.evaluation.make import Bench, make, make_nll_block, read_block
from workers.evaluation.summary import summarise
from workers.identity import compute_trial_id, describe_sampler
from workers.journal import read_points
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.checkpoint import load_process
from workers.storage import Storage
from workers.training import train
from workers.world import World

SETTINGS: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "labels": True},
    "diffusion": {"T": 30, "schedule": {"scale": "per_1000"}},
    "training": {
        "steps": 4, "batch_size": 16, "lr": 2e-3, "ema": 0.5, "precision": "float32", "label_dropout": 0.25,
        "validate_every": 4, "checkpoint_every": 4,
    },
}  # fmt: skip
CPU = torch.device("cpu")
MUCH = 1000.0  # guidance that shows, where a network has had a few steps


def make_trial(workers: int = 1, **sections: Any) -> Trial:
    settings = {name: {**section, **sections.get(name, {})} for name, section in SETTINGS.items()}
    settings["training"]["workers"] = workers
    return Trial.model_validate(settings)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Of the trial, trained in plain Python."""
    torch.set_num_threads(1)
    found, trial = Storage(tmp_path_factory.mktemp("runs")), make_trial()
    for _ in train(trial, prepare(trial.data), found, "trials/a"):
        pass
    return found


def find(storage: Storage) -> manifest.Checkpoint:
    found = manifest.find_newest(storage, "trials/a/checkpoints")
    assert found
    return found


def measure(storage: Storage, **fid: Any) -> tuple[Bench, dict[str, Any]]:
    sampler = SamplerConfig(kind="ddim", steps=2, **fid)
    evaluation = EvaluationConfig(nll=NLLConfig(images=30, timesteps=3), fid=FIDConfig(samples=70, sampler=sampler))
    m = Measurement(data=DataConfig(source="digits"), T=30, told="labels", evaluation=evaluation)
    data = prepare(m.data)
    bench = Bench(storage, m, data, find(storage), CPU)
    for block in list_blocks(m, bench.checkpoint.digest, Images.of(data)):
        make(bench, block)
    space = load_feature_space(storage, data, "classifier", CPU)
    process, digest = load_process(bench.checkpoint), bench.checkpoint.digest
    return bench, summarise(storage, m, data, process, digest, space=space)


# ---- Ids -------------------------------------------------------------------------------------------------------------


def test_labels_and_their_dropout_are_in_the_id_and_guidance_is_not() -> None:
    trials = [
        make_trial(),
        make_trial(training={"label_dropout": 0.1}),
        make_trial(model={"labels": False}, training={"label_dropout": 0.0}),
    ]
    assert len({compute_trial_id(trial, "d" * 16) for trial in trials}) == 3
    evaluation = EvaluationConfig(fid=FIDConfig(sampler=SamplerConfig(guidance=2)))
    guided = trials[0].model_copy(update={"evaluation": evaluation})
    assert compute_trial_id(guided, "d" * 16) == compute_trial_id(trials[0], "d" * 16)


def test_guidance_one_is_none_and_none_leaves_ids_and_passports_as_they_are() -> None:
    images = Images("d1", 40, 10, 17)

    def list_of(guidance: float | None) -> list[blocks.Block]:
        fid = FIDConfig(sampler=SamplerConfig(guidance=guidance))
        m = Measurement(data=DataConfig(source="digits"), T=30, evaluation=EvaluationConfig(nll=None, fid=fid))
        return list_sample_blocks(m, "c", images)

    assert list_of(None) == list_of(1.0) != list_of(2.0)
    assert list_of(None)[0].folder == "evaluations/c/samples-94a08f781c6a1012"
    assert describe_sampler(SamplerConfig()) == {"kind": "ancestral", "steps": None}


# ---- Training ----------------------------------------------------------------------------------------------------


def _worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    trial = make_trial(workers=size)
    for _ in train(trial, prepare(trial.data), Storage(f"{folder}/two"), "trials/a", World(rank, size)):
        pass
    torch.distributed.destroy_process_group()


@pytest.mark.faults
def test_two_workers_keep_the_same_labels_from_the_network(storage: Storage, tmp_path: Path) -> None:
    """A label more or less would move the loss by far more than rounding does."""
    spawn(_worker, (2, str(tmp_path)), nprocs=2)
    last = []
    for place in (storage, Storage(tmp_path / "two")):
        found: dict[str, float] = {}
        for point in read_points(place, "trials/a"):
            found |= point.get("metrics", {})
        last.append({name: found[name] for name in ("train/loss_simple", "train/grad_norm", "valid/nll_bpd")})
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def test_the_grid_of_a_validation_has_a_row_a_class(storage: Storage) -> None:
    [path, *_] = [point["path"] for point in read_points(storage, "trials/a") if "image" in point]
    width, height = Image.open(Path(storage.root, path)).size
    assert height / width > 1.5  # ten rows of five, and the names


# ---- Measurements ------------------------------------------------------------------------------------------------


def test_the_passport_says_what_the_network_was_told(storage: Storage) -> None:
    _, summary = measure(storage)
    assert "own" in summary["passports"]["nll"]["subject"]["labels"]
    assert "proportions" in summary["passports"]["samples"]["subject"]["labels"]
    assert summary["metrics"]["eval/network_evaluations"] == 2
    _, guided = measure(storage, guidance=3.0)
    assert guided["passports"]["samples"]["protocol"]["sampler"]["guidance"] == 3.0
    assert guided["metrics"]["eval/network_evaluations"] == 4
    assert guided["nll_per_image"] == summary["nll_per_image"]
    plain = json.loads(json.dumps(summary))
    del plain["passports"]["nll"]["subject"]["labels"]
    lines, differing = compare_summaries(plain, summary)
    assert "not of one kind: nll: B was told the label of each image and A was not: p(x | label) against p(x)" in lines
    assert not differing and any(line.startswith("nll_bpd") for line in lines), "they may stand beside each other"


def test_the_bound_is_that_of_each_image_s_own_label(storage: Storage) -> None:
    """With the labels of other images it is another one."""
    bench, _ = measure(storage)
    [block, *_] = blocks.list_nll_blocks(bench.m, bench.checkpoint.digest, Images.of(bench.dataset))
    own = read_block(storage, block)["squared_error"].to_numpy()
    data = bench.dataset
    assert data.held_out_labels is not None
    assert np.array_equal(make_nll_block(bench, block)["squared_error"].to_numpy(), own)
    moved = replace(bench, dataset=replace(data, held_out_labels=np.roll(data.held_out_labels, 1)))
    assert not np.array_equal(make_nll_block(moved, block)["squared_error"].to_numpy(), own)


# ---- Commands, the library and MLflow's model -----------------------------------------------------------------


def test_a_model_is_asked_for_a_class_by_number_or_name(storage: Storage, tmp_path: Path) -> None:
    model = open_model(find(storage).url)
    assert model.class_names == tuple("0123456789")
    asked: list[Any] = [3, ["3", 3], 4]
    three, again, four = (model.sample(2, steps=2, labels=of, guidance=MUCH) for of in asked)
    assert np.array_equal(three, again) and not np.array_equal(three, four)
    three, four = (model.sample(2, steps=2, labels=of, guidance=0) for of in (3, 4))
    assert np.array_equal(three, four)
    assert model.sample(2, steps=2, guidance=2.5).shape == (2, 8, 8, 1)
    x_t, t = torch.zeros(1, 1, 8, 8), torch.tensor([5])
    assert not torch.equal(model(x_t, t, labels=torch.tensor([3])), model(x_t, t, labels=torch.tensor([-1])))
    for labels in (10, "ten", [1], -2):
        with pytest.raises(Mistake, match="to 9"):
            model.sample(2, labels=labels)  # type: ignore[arg-type]
    with pytest.raises(Mistake, match="labels="):
        model(x_t, t)


def test_the_command_draws_a_class(storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = f"evaluation.fid.sampler={{kind: ddim, steps: 2, guidance: {MUCH}}}"
    words = [find(storage).url, "data.source=digits", sampler, "--storage", str(tmp_path), "--n", "20", "--at", "5"]
    drawn = []
    for more in ([], ["--label", "3"], ["--label", "4"]):
        assert sample.main([*words, *more]) == 0
        drawn.append(Path(capsys.readouterr().out.split()[0]).read_bytes())
    assert len(set(drawn)) == 3
    assert sample.main([*words, "--label", "ten"]) == 2
    assert "--label: there is no class 'ten'; give a number of 0 to 9" in capsys.readouterr().err


def test_a_registered_model_takes_a_label_and_a_scale(storage: Storage, tmp_path: Path) -> None:
    bench, _ = measure(storage)
    fid = bench.m.evaluation.fid
    assert fid
    models.save(Candidate(trial="a", checkpoint=bench.checkpoint, levels=17, fid=fid), tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    [block] = list_sample_blocks(bench.m, bench.checkpoint.digest, Images.of(bench.dataset))
    measured = [np.frombuffer(image, np.uint8) for image in read_block(storage, block)["image"].to_pylist()]
    assert np.array_equal(model.predict(pd.DataFrame({"n": [100], "seed": [0]})).reshape(100, -1), np.stack(measured))
    asked = pd.DataFrame({"n": [3, 3], "seed": [0, 0], "label": ["3", "4"], "guidance": [MUCH, MUCH]})
    three, four = np.split(model.predict(asked), 2)
    assert not np.array_equal(three, four)
    for wrong in ({"label": ["ten"]}, {"guidance": [-1.0]}):
        with pytest.raises(ValueError):
            model.predict(pd.DataFrame({"n": [1], "seed": [0], **wrong}))


# ---- Names -------------------------------------------------------------------------------------------------------


def test_classes_have_the_names_of_their_folders_and_of_parquet_s_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    folder = DataConfig(source=str(write_images(tmp_path / "images", COLOUR, LABELS)))
    names = tuple(f"class{k}" for k in range(7))
    assert describe(folder).class_names == names
    classes = prepare(folder).classes
    assert classes and classes.names == names and sum(classes.images) == 27
    path = write_parquet(tmp_path / "all.parquet", COLOUR)
    info = {"info": {"features": {"label": {"names": list("abcdefg"), "_type": "ClassLabel"}}}}
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(pa.table(table), path)
    classes = prepare(DataConfig(source=str(path))).classes
    assert classes and classes.names == tuple("abcdefg")
    plain = prepare(DataConfig(source=str(write_parquet(tmp_path / "plain.parquet", COLOUR)))).classes
    assert plain and plain.names == tuple("0123456")


# ---- Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"training": {"label_dropout": 0.1}}, "training.label_dropout: 0.1 keeps labels from a network that is told"),
        ({"evaluation": {"fid": {"sampler": {"guidance": 2.0}}}}, "a network that is told none; train one with model"),
        (
            {"model": {"labels": True}, "evaluation": {"fid": {"sampler": {"guidance": 0.5}}}},
            "always told the label; train one with training.label_dropout above 0, or take 1",
        ),
        ({"evaluation": {"fid": {"sampler": {"guidance": -1}}}}, "evaluation.fid.sampler.guidance"),
        ({"training": {"label_dropout": 1.0}}, "training.label_dropout"),
    ],
)
def test_what_does_not_go_together_is_told(sections: dict[str, Any], told: str) -> None:
    [problem] = problems(**sections)
    assert told in problem


def test_labels_need_data_that_have_them(storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = parse(content(data={"source": "gaussian"}, model={"labels": True}, evaluation={"fid": None}))
    found = [f.text for f in check_trial(experiment, experiment.trial, describe(experiment.trial.data)) if f.refused]
    assert any(text.startswith("model.labels:") and "gaussian has no labels" in text for text in found)
    words = [find(storage).url, "data.source=gaussian", "evaluation.fid=null", "--storage", str(tmp_path)]
    assert evaluate.main(words) == 2
    assert "gaussian has no labels" in capsys.readouterr().err


def test_guidance_is_refused_of_a_checkpoint_that_knows_no_absence_of_labels(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, trial = Storage(tmp_path), make_trial(training={"label_dropout": 0.0, "steps": 1})
    for _ in train(trial, prepare(trial.data), place, "trials/a"):
        pass
    assert not checkpoints.describe(find(place)).takes_no_label
    words = [find(place).url, "data.source=digits", "evaluation.fid.sampler.guidance=2", "--storage", str(tmp_path)]
    assert evaluate.main(words) == 2
    assert "always told the label" in capsys.readouterr().err
    with pytest.raises(Mistake, match="guidance=2"):
        open_model(find(place).url).sample(1, guidance=2)
