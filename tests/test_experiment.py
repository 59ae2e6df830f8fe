"""The experiment file: what it reads, what it refuses and in which words, and the trials it means."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import sent

from orchestrator.experiment.expand import expand, group_by_row
from orchestrator.experiment.load import find_mistakes, load, parse, resolve, to_yaml
from orchestrator.experiment.records import Experiment, ExperimentError, Variant
from orchestrator.experiment.settings import list_paths, merge, put, read_yaml
from workers.config import Measurement, ModelConfig, Trial, count_sub_batches
from workers.identity import compute_trial_id
from workers.layout import RowId, get_trial_of_row

SAMPLE = """
name: beta_schedule
seed: 0
data: {source: digits}                      # digits | a Parquet file or folder of images | an image folder | gaussian
model: {channels: 32, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 200, schedule: {kind: linear, beta_start: 1.0e-4, beta_end: 0.02, scale: per_1000}, prediction: eps, variance: fixed_small}
loss: {weighting: simple}
training: {steps: 2000, batch_size: 128, lr: 2.0e-4, ema: 0.999, precision: auto, workers: 1, validate_every: 500, checkpoint_every: 500}
evaluation: {nll: {images: all, timesteps: all}, fid: {samples: 1000, sampler: {kind: ancestral}, features: classifier}}
search: {space: {diffusion.T: {grid: [50, 200, 1000]}, loss.weighting: {grid: [simple, vlb]}}, algorithm: grid, metric: eval/nll_bpd, scheduler: {kind: none}, max_concurrent: auto}
tracking: {uri: null}
"""  # noqa: E501


def experiment(**sections: Any) -> Experiment:
    """The smallest experiment, with the given sections in it."""
    return parse(content(**sections))


def content(**sections: Any) -> dict[str, Any]:
    return merge({"name": "e", "data": {"source": "digits"}, "training": {"steps": 10}}, sections)


def search(space: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"space": space, **rest}


def load_text(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    return load(file, overrides)


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        experiment(**sections)
    for leak in ("Input should", "pydantic", "validation error", "Extra inputs", "Field required", "Traceback"):
        assert leak not in str(caught.value)
    return caught.value.problems


def file_problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        load_text(tmp_path, text, *overrides)
    assert str(tmp_path / "file.yaml") in str(caught.value)
    return caught.value.problems


# ---- Reading


def test_the_sample_of_the_design_loads(tmp_path: Path) -> None:
    e = load_text(tmp_path, SAMPLE)
    assert (e.name, e.diffusion.T, e.training.lr, e.model.multipliers) == ("beta_schedule", 200, 2e-4, (1, 2))
    assert len(expand(e)) == 6


def test_an_experiment_is_a_trial_and_what_surrounds_it(tmp_path: Path) -> None:
    e = load_text(tmp_path, SAMPLE)
    assert type(e.trial) is Trial
    assert e.trial.model_dump() == {k: v for k, v in e.model_dump().items() if k in Trial.model_fields}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        (".inf", math.inf),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = read_yaml(text)[0]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- 1", "[1] is not a mapping"),
        ("name: x\nmodel: [1", "line 2: not valid YAML"),
        ("name: x\nmodel:\n\tb: 3", "line 3: not valid YAML"),
        ("name: x\n3: y", "line 2: not valid YAML: a key is not text"),
        ("a: &a [*a]", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_experiment_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = file_problems(tmp_path, text)
    assert message in problem


def test_a_key_that_is_there_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    text = SAMPLE.replace("loss: {weighting: simple}", "loss: {weighting: simple,\n  weighting: vlb}\nseed: 1")
    assert file_problems(tmp_path, text) == [
        "line 8: 'weighting' is there twice, first in line 7",
        "line 9: 'seed' is there twice, first in line 3",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "beta.yaml").write_text(SAMPLE)
    (tmp_path / "latin.yaml").write_bytes("name: \xe4".encode("latin-1"))
    for name, message in {"bta.yaml": "'beta.yaml'", "": "directory", "latin.yaml": "UTF-8"}.items():
        with pytest.raises(ExperimentError, match=message):
            load(tmp_path / name)


def test_the_resolved_experiment_goes_round(tmp_path: Path) -> None:
    space = {
        "training.lr": {"loguniform": [1e-5, 1e-2]},
        "model.multipliers": {"choice": [[1, 2], [1, 2, 2]]},
        "diffusion.schedule": {"grid": [{"kind": "linear", "beta_end": 0.03}, {"kind": "cosine"}]},
        "diffusion.T": {"int_uniform": [50, 100]},
    }
    e = experiment(name="1e4", search=search(space, algorithm="random", samples=2), evaluation={"fid": None})
    assert parse(resolve(e)) == e
    assert load_text(tmp_path, to_yaml(e)) == e
    assert next(iter(resolve(e))) == "name"


def test_the_schema_for_editors() -> None:
    schema = Experiment.model_json_schema()
    assert {"name", "data", "training"} == set(schema["required"])


# ---- Overrides


def test_overrides_replace_settings_sections_and_searches(tmp_path: Path) -> None:
    e = load_text(
        tmp_path,
        SAMPLE,
        "training.lr=1e-3",
        "evaluation.fid=null",
        "tracking.uri=http://host:5000",
        "diffusion.schedule={kind: cosine}",
        "search.space.diffusion.T.grid=[7]",
        "search.space.loss.weighting=null",
        "search.space.model.channels.grid=[8, 16]",
    )
    assert (e.training.lr, e.evaluation.fid, e.tracking.uri) == (1e-3, None, "http://host:5000")
    assert e.diffusion.schedule == type(e.diffusion.schedule)(kind="cosine")
    assert [v.params for v in expand(e)] == [{"diffusion.T": 7, "model.channels": c} for c in (8, 16)]
    assert expand(load_text(tmp_path, SAMPLE, "search.space={}")) == (Variant(params={}, trial=e_base(tmp_path)),)


def e_base(tmp_path: Path) -> Trial:
    return load_text(tmp_path, SAMPLE).trial


def test_an_override_may_end_a_search_and_set_its_path(tmp_path: Path) -> None:
    e = load_text(tmp_path, SAMPLE, "search.space.diffusion.T=null", "diffusion.T=9")
    assert {v.trial.diffusion.T for v in expand(e)} == {9}


def test_an_override_may_change_how_a_path_is_searched(tmp_path: Path) -> None:
    e = load_text(
        tmp_path, SAMPLE, "search.space.diffusion.T.int_uniform=[50, 60]", "search.algorithm=random", "search.samples=4"
    )
    assert len(expand(e)) == 8 and all(50 <= v.trial.diffusion.T <= 60 for v in expand(e))


@pytest.mark.parametrize("override", ["diffusion.T=50", "diffusion={T: 50}", "diffusion.T=null"])
def test_an_override_of_what_is_searched_is_refused(tmp_path: Path, override: str) -> None:
    found = file_problems(tmp_path, SAMPLE, override)
    assert any("without effect" in p and "search.space.diffusion.T=null" in p for p in found)


def test_an_override_of_what_a_joint_search_sets_is_refused(tmp_path: Path) -> None:
    joint = "search.space={diffusion.schedule: {grid: [{beta_end: 0.01}, {beta_end: 0.03}]}}"
    load_text(tmp_path, SAMPLE, joint, "diffusion.schedule.beta_start=0.001")
    (problem,) = file_problems(tmp_path, SAMPLE, joint, "diffusion.schedule.beta_end=0.02")
    assert "without effect" in problem


SMOKE = """smoke:
  training.steps: 3
  model: {channels: 8}
  search.space.diffusion.T.grid: [7]
  search.space.loss.weighting: null
"""


def test_smoke_makes_a_file_small_and_is_nothing_without_the_flag(tmp_path: Path) -> None:
    plain, file = load_text(tmp_path, SAMPLE), tmp_path / "small.yaml"
    file.write_text(SAMPLE + SMOKE)
    assert load(file) == plain and "smoke" not in resolve(plain)
    small = load(file, smoke=True)
    assert small.name == f"{plain.name}-smoke" and small.training.steps == 3
    assert small.model == ModelConfig(channels=8)  # a section is replaced whole, as on the command line
    assert [v.params for v in expand(small)] == [{"diffusion.T": 7}]
    assert load(file, ["training.steps=5", "name=other"], smoke=True).training.steps == 5
    assert load(file, ["name=other"], smoke=True).name == "other-smoke"
    assert parse(resolve(small)) == small


@pytest.mark.parametrize(
    ("smoke", "message"),
    [
        ("{trainin.steps: 3}", "smoke.trainin.steps: unknown path; did you mean 'training.steps'?"),
        ("{steps: 3}", "smoke.steps: unknown path; did you mean 'training.steps'?"),
        ("{smoke: {}}", "smoke.smoke: unknown path"),
        ("{training.steps: 0}", "smoke: training.steps: 0 is not a whole number of at least 1"),
        ("{diffusion.T: 7}", "smoke.diffusion.T: without effect, as search.space sets diffusion.T"),
        ("{search.space.diffusion.t.grid: [7]}", "smoke: search.space.diffusion.t: no such setting"),
        ("{search.space.training.lr: null}", "smoke.search.space.training.lr: training.lr is not searched"),
        (
            "{evaluation.fid: null, search.metric: eval/fd_classifier}",
            "smoke: search.metric: eval/fd_classifier is not",
        ),
        ("[training.steps]", 'smoke: ["training.steps"] is not a mapping of paths'),
        ("null", "smoke: null is not a mapping of paths"),
    ],
)
def test_a_mistake_in_smoke_is_one_of_the_file_whether_it_is_used_or_not(
    tmp_path: Path, smoke: str, message: str
) -> None:
    (problem,) = file_problems(tmp_path, f"{SAMPLE}smoke: {smoke}\n")
    assert problem.startswith(message)
    (problem,) = find_mistakes(read_yaml(f"{SAMPLE}smoke: {smoke}\n")[0])
    assert problem.startswith(message)


def test_mistakes_of_the_file_are_not_told_again_of_its_smoke(tmp_path: Path) -> None:
    text = SAMPLE.replace("beta_end: 0.02", "beta_end: 2") + SMOKE
    assert text != SAMPLE + SMOKE and len(file_problems(tmp_path, text)) == 1
    assert load_text(tmp_path, SAMPLE + SMOKE, "search.space.loss.weighting=null")  # which smoke ends as well


def test_a_file_without_smoke_has_nothing_to_run_small(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(SAMPLE)
    with pytest.raises(ExperimentError, match="smoke: the file has no such section; add one"):
        load(file, smoke=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("difusion.T=5", "did you mean 'diffusion.T'"),
        ("lr=5", "did you mean 'training.lr'"),
        ("evaluation.fid.smpler.kind=ddim", "did you mean 'evaluation.fid.sampler.kind'"),
        ("diffusion.T.x=5", "unknown path"),
        ("search.space.diffusion.t.grid=[5]", "did you mean 'diffusion.T'"),
        ("search.space.loss.weightin=null", "did you mean 'loss.weighting'"),
        ("seed", "write a.b=value"),
        ("seed=", "write a.b=value"),
        ("=5", "write a.b=value"),
        ("seed=[1", "not valid YAML"),
        ("model={blocks: 1, blocks: 2}", "'blocks' is there twice"),
        ("seed=x", "seed: 'x' is not a whole number"),
    ],
)
def test_mistaken_overrides(tmp_path: Path, override: str, message: str) -> None:
    (problem,) = file_problems(tmp_path, SAMPLE, override)
    assert message in problem


# ---- Mistakes


def test_all_mistakes_are_told_at_once_each_with_its_path() -> None:
    wrong = content(
        name="../x",
        data={"held_out": 2},
        difusion={"T": 5},
        diffusion={"T": 0, "beta_end": 0.1, "schedule": {"kind": "cosin", "beta_start": 1.0, "beta_end": "0.02"}},
        model={"multipliers": [1, "x"], "attention": 3, "channels": None},
        loss=None,
        training={"steps": 1e5, "lr": math.inf, "batch_size": True},
        evaluation={"nll": {"images": "most", "timesteps": 0}},
        search={
            "metric": "train/loss",
            "scheduler": {"kind": "ahsa"},
            "samples": 0,
            "space": {
                "diffusion.T": {"grid": [50, 0, "x"]},
                "diffusion.t": {"grid": [50]},
                "training.lr": {"uniform": [2, 1]},
                "training.steps": {"uniform": [1, 10]},
                "diffusion.schedule": {"grid": [{"kind": "linear", "beta_end": 2}, {"kin": 4}, 5]},
                "seed": [1, 2],
                "loss.weighting": {"grid": []},
                "loss.gamma": {"gird": [3], "loguniform": [0, 1], "uniform": [1]},
                "training.workers": {"grid": [1, 2]},
                "model.dropout": {"grid": [0.1], "choice": [0.1]},
            },
        },
        tracking={"uri": 5},
    )
    with pytest.raises(ExperimentError) as caught:
        parse(wrong)
    told = dict(problem.split(": ", 1) for problem in caught.value.problems)
    assert all(told[path].startswith(text) or text in told[path] for path, text in EXPECTED.items()), told
    assert set(told) == set(EXPECTED)
    assert str(caught.value).splitlines()[0] == f"the experiment: {len(EXPECTED)} mistakes"
    assert len(str(caught.value).splitlines()) == len(EXPECTED) + 1
    assert str(sent(caught.value)) == str(caught.value)


EXPECTED = {
    "name": "'../x' must stay inside the storage root",
    "data.held_out": "2 is not a number above 0 and below 1",
    "difusion": "unknown key; did you mean 'diffusion'?",
    "diffusion.T": "0 is not a whole number of at least 1 and at most 100,000",
    "diffusion.beta_end": "unknown key; did you mean 'diffusion.schedule.beta_end'?",
    "diffusion.schedule.kind": "'cosin' is not one of linear, quadratic, constant, jsd, warmup10, warmup50, cosine, "
    "sigmoid, list, log_snr; did you mean 'cosine'?",
    "diffusion.schedule.beta_start": "1.0 is not a number above 0 and below 1",
    "diffusion.schedule.beta_end": "'0.02' is not a number above 0 and below 1",
    "model.multipliers[1]": "'x' is not a whole number",
    "model.attention": "3 is not a list of values, each a whole number",
    "model.channels": "null is not a whole number of at least 1 and at most 8,192",
    "loss": "null is not a section with the keys objective, weighting, gamma",
    "training.steps": "100000.0 is not a whole number of at least 1 and at most 1,000,000,000; write 100000",
    "training.lr": "Infinity is not a finite number above 0",
    "training.batch_size": "true is not a whole number of at least 1 and at most 65,536",
    "evaluation.nll.images": "'most' is not 'all' or a whole number of at least 1",
    "evaluation.nll.timesteps": "0 is not 'all' or a whole number of at least 2",
    "search.metric": "across weightings, targets or T; valid: eval/nll_bpd, eval/fid, eval/fd_classifier",
    "search.scheduler.kind": "'ahsa' is not one of none, asha, median; did you mean 'asha'?",
    "search.samples": "0 is an empty search",
    "search.space.diffusion.T.grid[1]": "0 is not a whole number of at least 1",
    "search.space.diffusion.T.grid[2]": "'x' is not a whole number of at least 1",
    "search.space.diffusion.t": "no such setting of a trial; did you mean 'diffusion.T'?",
    "search.space.training.lr.uniform": "[2.0, 1.0] is reversed; write [1.0, 2.0]",
    "search.space.training.steps.uniform[0]": "1.0 is not a whole number of at least 1 and",
    "search.space.training.steps.uniform[1]": "10.0 is not a whole number of at least 1 and",
    "search.space.diffusion.schedule.grid[0].beta_end": "2 is not a number above 0 and below 1",
    "search.space.diffusion.schedule.grid[1].kin": "unknown key; did you mean 'kind'?",
    "search.space.diffusion.schedule.grid[2]": "5 is not a section with the keys kind, beta_start, beta_end, scale",
    "search.space.seed": "write {grid: [1, 2]} to try each",
    "search.space.loss.weighting.grid": "[] is an empty search",
    "search.space.loss.gamma.gird": "unknown key; did you mean 'grid'?",
    "search.space.loss.gamma.loguniform": "[0.0, 1.0] has no logarithm at 0.0",
    "search.space.loss.gamma.uniform": "[1] is not a range [low, high] of numbers",
    "search.space.training.workers": "does not change what is trained",
    "search.space.model.dropout": "takes exactly one of grid, choice, uniform, loguniform, int_uniform",
    "tracking.uri": "5 is not text or null; put it in quotes",
}


def test_what_is_missing_is_told_with_what_it_is() -> None:
    with pytest.raises(ExperimentError) as caught:
        parse({"data": {}, "training": {}})
    assert caught.value.problems == [
        "data.source: missing; it is text",
        "training.steps: missing; it is a whole number of at least 1 and at most 1,000,000,000",
        "name: missing; it is text",
    ]


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a..b", "a b", "x\n", "\u00e4", "a" * 101, "a\\b", "~"])
def test_names_stay_inside_the_storage_root(name: str) -> None:
    (problem,) = problems(name=name)
    assert "storage root" in problem


@pytest.mark.parametrize("batch_size", [1, 6, 8, 100, 128, 129])
def test_workers_share_whole_sub_batches(batch_size: int) -> None:
    assert count_sub_batches(batch_size) == math.gcd(batch_size, 8)
    for workers in range(1, 10):
        training = {"batch_size": batch_size, "workers": workers}
        if count_sub_batches(batch_size) % workers == 0:
            assert batch_size % experiment(training=training).training.workers == 0
        else:
            assert "training.workers" in problems(training=training)[0]


@pytest.mark.parametrize("gpus", ["auto", 0, 1, 0.25, 0.01, 0.99])
def test_a_trial_takes_no_gpu_one_or_a_part_of_one(gpus: Any) -> None:
    assert experiment(training={"gpus": gpus}).training.gpus == gpus


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"gpus": 1.5},
            "training.gpus: 1.5 is not auto, 0, 1 or a part of a GPU such as 0.25; a worker uses at most one",
        ),
        ({"gpus": 2}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": -1}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": -0.5}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": 0.001}, "0.001 is not one of auto, 0, 1 or a number of at least 0.01 and below 1"),
        ({"gpus": "atuo"}, "did you mean 'auto'?"),
        (
            {"gpus": 0.5, "workers": 2},
            "NCCL, by which the workers of a trial exchange gradients, refuses two of them on",
        ),
        ({"gpus": 0.5, "workers": 2}, "take gpus: 1, or workers: 1"),
    ],
)
def test_more_than_a_gpu_and_parts_that_cannot_be_are_refused_with_what_to_do(training: Any, message: str) -> None:
    (problem,) = problems(training=training)
    assert problem.startswith("training.gpus: ") and message in problem


def sampler(**settings: Any) -> dict[str, Any]:
    return {"evaluation": {"fid": {"sampler": settings}}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"diffusion": {"schedule": {"beta_start": 0.03}}}, "diffusion.schedule.beta_start: 0.03 is above beta_end"),
        ({"diffusion": {"T": 50}, "evaluation": {"nll": {"timesteps": 51}}}, "51 is more than diffusion.T = 50"),
        ({"diffusion": {"T": 5}, "evaluation": {"fid": {"sampler": {"steps": 6}}}}, "6 is more than diffusion.T = 5"),
        (
            sampler(eta=0.5),
            "without effect on kind: ancestral, which reads steps; leave it out, or take kind: ddim",
        ),
        (sampler(kind="heun", eta=0.5), "without effect on kind: heun"),
        (sampler(kind="ode", steps=20), "steps: 20 is without effect on kind: ode, which reads tolerance"),
        (sampler(kind="heun", tolerance=0.1), "take kind: ode"),
        (sampler(kind="dpmpp", repeats=2), "take kind: langevin"),
        (sampler(kind="langevin", steps=2000), "2000 is more than diffusion.T = 1000"),
        (sampler(kind="heun", steps=1001), "1001 is more than diffusion.T = 1000"),
        ({**sampler(kind="ode"), "diffusion": {"prediction": "mu"}}, "prediction: mu has none; take heun or dpmpp"),
        (
            {"evaluation": {"ode_nll": {}}, "diffusion": {"prediction": "mu"}},
            "evaluation.ode_nll: asks for eps between",
        ),
        ({**sampler(kind="dpmpp"), "diffusion": {"schedule": {"kind": "jsd"}}}, "jsd begins at sigma_T = inf"),
        ({"evaluation": {"ode_nll": {}}, "diffusion": {"schedule": {"kind": "jsd"}}}, "ends at sigma_T = inf"),
    ],
)
def test_settings_that_do_not_go_together(sections: dict[str, Any], message: str) -> None:
    (problem,) = problems(**sections)
    assert message in problem


UNREAD = [
    ({"diffusion": {"schedule": {"kind": "cosine", "beta_end": 0.5}}}, "diffusion.schedule.beta_end: 0.5",
     "kind: cosine"),
    ({"loss": {"gamma": 3.0}}, "loss.gamma: 3.0", "weighting: simple"),
    ({"loss": {"objective": "kl", "p2_k": 2.0}}, "loss.p2_k: 2.0", "weighting: simple"),
    ({"loss": {"vlb_weight": 0.1}}, "loss.vlb_weight: 0.1", "objective: mse"),
    ({"evaluation": {"nll": {"proposal": "uniform"}}}, "evaluation.nll.proposal: uniform", "timesteps: all"),
    ({"search": {"batch": 4}}, "search.batch: 4", "algorithm: grid"),
    ({"search": {"scheduler": {"grace": 5}}}, "search.scheduler.grace: 5", "kind: none"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "what", "on"), UNREAD, ids=[what for _, what, _ in UNREAD])
def test_a_setting_that_nothing_reads_is_refused_in_every_section(sections: Any, what: str, on: str) -> None:
    (problem,) = problems(**sections)
    assert problem.startswith(f"{what} is without effect on {on}") and "leave it out, or take" in problem


def test_a_setting_that_some_variant_reads_is_taken() -> None:
    """The variants that do not read it are one and the same trial."""
    space = {"loss.weighting": {"grid": ["simple", "min_snr"]}, "loss.gamma": {"grid": [1.0, 3.0]}}
    found, (warning,) = digests(expand(experiment(search=search(space))))
    assert len(found) == 3 and "differ from it only in loss.gamma" in warning
    assert experiment(loss={"gamma": 3.0}, search=search({"loss.weighting": space["loss.weighting"]}))
    (problem,) = problems(search=search({"loss.gamma": space["loss.gamma"]}))
    assert problem.startswith("search.space.loss.gamma: any value is without effect on weighting: simple; leave it")


def test_a_disagreement_of_some_variants_names_them() -> None:
    (problem,) = problems(
        evaluation={"nll": {"timesteps": 60}},
        search=search({"diffusion.T": {"grid": [50, 100]}, "loss.weighting": {"grid": ["simple", "vlb"]}}),
    )
    assert problem.endswith("(2 of 4 variants; first: diffusion.T=50, loss.weighting='simple')")


T_GRID = {"diffusion.T": {"grid": [50, 100]}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"search": search(T_GRID), "evaluation": {"nll": None}},
            "eval/nll_bpd is not measured, as evaluation.nll is null; take another",
        ),
        (
            {"search": search(T_GRID, metric="eval/fd_classifier"), "evaluation": {"fid": None}},
            "eval/fd_classifier is not measured, as evaluation.fid is null; take another",
        ),
        (
            {"search": search(T_GRID, metric="eval/fid")},
            "eval/fid is not measured; these settings of evaluation.fid make eval/fd_classifier",
        ),
        (
            {"evaluation": {"precision": "bf16", "ode_nll": {}}},
            "evaluation.precision: bf16 is too coarse for the error control of evaluation.ode_nll; take float32",
        ),
        (
            {"evaluation": {"precision": "tf32", "fid": {"sampler": {"kind": "ode"}}}},
            "evaluation.precision: tf32 is too coarse for the error control of evaluation.fid.sampler; take float32",
        ),
        ({"search": search(T_GRID, samples=3)}, "search.samples: 3 is without effect"),
        ({"search": search(T_GRID, algorithm="random", samples=3)}, "nothing to draw"),
        ({"search": search({"diffusion.T": {"choice": [5, 6]}})}, "set search.algorithm: random"),
        ({"search": search({"diffusion.T": {"choice": [5]}}, algorithm="random")}, "search.samples: missing"),
        ({"search": search({"seed": {"grid": list(range(10_001))}})}, "10,001 variants are more than 10,000"),
        ({"search": search({**T_GRID, "diffusion": {"grid": [{"T": 5}]}})}, "sets what search.space.diffusion.T sets"),
        ({"search": search({"training.cpus": {"grid": [1, 2]}})}, "does not change what is trained"),
    ],
)
def test_searches_that_make_no_sense(sections: dict[str, Any], message: str) -> None:
    (problem,) = problems(**sections)
    assert message in problem


def test_a_single_trial_needs_no_metric() -> None:
    experiment(evaluation={"nll": None, "fid": None})


# ---- Expanding


def test_a_grid_is_the_product_in_the_order_of_the_file() -> None:
    space: dict[str, list[Any]] = {"loss.weighting": ["simple", "vlb"], "diffusion.T": [10, 20, 30], "seed": [3, 4]}
    variants = expand(experiment(search=search({path: {"grid": values} for path, values in space.items()})))
    assert [tuple(v.params.values()) for v in variants] == list(itertools.product(*space.values()))
    for v in variants:
        assert (v.trial.loss.weighting, v.trial.diffusion.T, v.trial.seed) == tuple(v.params.values())


def test_no_space_is_one_trial() -> None:
    e = experiment()
    assert expand(e) == (Variant(params={}, trial=e.trial),)


def test_joint_settings_merge_into_their_section() -> None:
    values = [{"kind": "linear", "beta_end": 0.03}, {"kind": "cosine"}]
    e = experiment(
        diffusion={"schedule": {"beta_start": 0.001}}, search=search({"diffusion.schedule": {"grid": values}})
    )
    linear, cosine = (v.trial.diffusion.schedule for v in expand(e))
    assert (linear.kind, linear.beta_start, linear.beta_end) == ("linear", 0.001, 0.03)
    assert (cosine.kind, cosine.beta_start, cosine.beta_end) == ("cosine", 0.001, 0.02)


def random_search(samples: int, seed: int = 0, **more: Any) -> tuple[Variant, ...]:
    space = {
        "training.lr": {"loguniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.0, 0.5]},
        "diffusion.T": {"int_uniform": [5, 8]},
        "loss.weighting": {"choice": ["simple", "vlb"]},
        **more,
    }
    return expand(experiment(seed=seed, search=search(space, algorithm="random", samples=samples)))


def test_more_samples_keep_the_earlier_draws() -> None:
    assert random_search(40)[:7] == random_search(7)


def test_another_searched_path_keeps_the_draws() -> None:
    crossed = random_search(5, seed=3, **{"model.blocks": {"grid": [1, 2]}})
    alone = random_search(5, seed=3)
    assert len(crossed) == 10
    for k, v in enumerate(crossed):
        assert v.params == {**alone[k // 2].params, "model.blocks": 1 + k % 2}


def test_draws_differ_by_sample_path_and_seed_and_fill_their_ranges() -> None:
    variants = random_search(400)
    lrs = sorted(v.trial.training.lr for v in variants)
    assert 1e-4 <= lrs[0] < 1.1e-4 and 0.9e-2 < lrs[-1] <= 1e-2
    assert math.isclose(lrs[200], 1e-3, rel_tol=0.3)  # the median of a log-uniform law is its geometric mean
    assert {v.trial.diffusion.T for v in variants} == {5, 6, 7, 8}
    assert {v.trial.loss.weighting for v in variants} == {"simple", "vlb"}
    assert len({v.trial.model.dropout for v in variants}) == 400
    assert random_search(1, seed=1)[0].params != variants[0].params


def test_the_draws_are_those_of_every_machine_and_time() -> None:
    drawn = random_search(1)[0].params
    known = {"training.lr": 0.002912115, "model.dropout": 0.149640332, "diffusion.T": 8, "loss.weighting": "simple"}
    assert {path: v if isinstance(v, str) else round(v, 9) for path, v in drawn.items()} == known


# ---- Addresses


def digests(variants: tuple[Variant, ...], data: str = "d") -> tuple[dict[RowId, Variant], list[str]]:
    return group_by_row(variants, {v.trial.data: data for v in variants})


def test_the_address_counts_only_what_changes_the_weights() -> None:
    base = content(training={"steps": 10, "workers": 1})
    (address,) = digests(expand(parse(base)))[0]
    for path, value in {
        "name": "other",
        "training.workers": 2,
        "training.gpus": 1,
        "training.steps": 11,
        "training.validate_every": 3,
        "evaluation.fid": None,
        "search.max_concurrent": 2,
        "tracking.uri": "http://host",
        "data.source": "another/path",
    }.items():
        assert list(digests(expand(parse(put(base, path.split("."), value))))[0]) == [address], path
    for path, value in {"seed": 1, "training.decay": "cosine", "diffusion.T": 9, "data.flip": True}.items():
        assert list(digests(expand(parse(put(base, path.split("."), value))))[0]) != [address], path
    assert list(digests(expand(parse(base)), data="other bytes")[0]) != [address]


def test_variants_are_what_validation_makes_of_each_and_share_what_they_have_in_common() -> None:
    grid = {"diffusion.T": [50, 100], "diffusion.schedule": [{"kind": "cosine"}, {"beta_end": 0.01}]}
    e = experiment(
        search={"space": {**{path: {"grid": v} for path, v in grid.items()}, "seed": {"grid": [0, 1]},
                          "training.lr": {"grid": [1, 0.5]}, "loss": {"grid": [{"weighting": "vlb"}, {}]}}},
        evaluation={"nll": {"timesteps": 10}},
    )  # fmt: skip
    variants, base = expand(e), e.trial.model_dump()
    for variant in variants:
        whole = base
        for path, value in variant.params.items():
            whole = merge(whole, put({}, path.split("."), value))
        assert variant.trial == Trial.model_validate(whole)
        assert variant.trial.model_dump_json() == Trial.model_validate(whole).model_dump_json()
    assert len(variants) == 32 and len({id(v.trial.diffusion) for v in variants}) == 4
    assert all(v.trial.evaluation is e.evaluation for v in variants)


def test_variants_of_one_address_are_merged_with_a_warning() -> None:
    space = {
        "diffusion.schedule.kind": {"grid": ["linear", "cosine"]},
        "diffusion.schedule.beta_end": {"grid": [0.01, 0.02, 0.03]},
    }
    variants = expand(experiment(search=search(space)))
    trials, (warning,) = digests(variants)
    assert list(trials.values()) == [*variants[:3], variants[3]]
    assert warning == (
        "6 variants are 4 trials: 2 repeat another one (differ from it only in diffusion.schedule.beta_end, "
        "which their other settings leave without effect)"
    )


def test_equal_draws_are_merged_with_a_warning() -> None:
    e = experiment(search=search({"diffusion.T": {"choice": [5, 6]}}, algorithm="random", samples=9))
    trials, (warning,) = digests(expand(e))
    assert len(trials) == 2 and "9 variants are 2 trials: 7 repeat another one (equal it)" in warning


def test_different_trials_are_not_merged(tmp_path: Path) -> None:
    trials, warnings = digests(expand(load_text(tmp_path, SAMPLE)))
    assert len(trials) == 6 and not warnings


# ---- The module


@pytest.mark.parametrize("module", ["load", "preflight"])
def test_importing_it_stays_quick(module: str) -> None:
    heavy = ("torch", "ray", "pandas", "sklearn", "mlflow", "pyarrow", "matplotlib")
    code = f"import sys, orchestrator.experiment.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_of_a_trial_can_be_searched_or_says_why_not() -> None:
    given: dict[str, Any] = {"evaluation": {"ode_nll": {}}}
    for path in list_paths(Trial):
        value = experiment(**given).trial
        for name in path.split("."):
            value = getattr(value, name)
        plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        try:
            (variant,) = expand(experiment(**given, search=search({path: {"grid": [plain]}})))
            assert variant.trial == experiment(**given).trial, path
        except ExperimentError as error:
            assert "does not change what is trained" in str(error), (path, error)


# ---- Rows that share a trial -----------------------------------------------------------------------------------


def test_measurements_of_one_trial_are_rows_that_share_its_address() -> None:
    """What is trained and what is measured cross: a row each, the training's address in front."""
    space = {
        "diffusion.T": {"grid": [50, 60]},
        "evaluation.fid.sampler": {"grid": [{"kind": "ddim"}, {"kind": "heun"}]},
        "evaluation.fid.sampler.steps": {"grid": [5, 10]},
    }
    found, warnings = digests(expand(experiment(search=search(space))))
    assert len(found) == 8 and not warnings
    assert len({get_trial_of_row(row) for row in found}) == 2
    for row, variant in found.items():
        assert get_trial_of_row(row) == compute_trial_id(variant.trial, "d") and row != get_trial_of_row(row)
    alone, _ = digests(expand(experiment(search=search({"diffusion.T": {"grid": [50, 60]}}))))
    assert set(alone) == {get_trial_of_row(row) for row in found}


def test_a_row_keeps_its_address_when_others_come_beside_it() -> None:
    path = "evaluation.fid.sampler.steps"
    few, many = (
        set(digests(expand(experiment(search=search({path: {"grid": steps}}))))[0]) for steps in ([5, 9], [7, 5, 9, 2])
    )
    assert few < many


def test_rows_that_are_measured_alike_are_one() -> None:
    """As many steps as there are is all of them, and the variance of the model itself is no other."""
    space = {
        "evaluation.fid.sampler.steps": {"grid": [None, 1000]},
        "evaluation.variance": {"grid": [None, "fixed_large", "fixed_small"]},
    }
    found, (warning,) = digests(expand(experiment(search=search(space))))
    assert len(found) == 2 and "4 repeat another one" in warning


def test_an_average_that_is_not_kept_is_refused() -> None:
    (problem,) = problems(training={"ema": 0.9, "averages": [0.5]}, evaluation={"ema": 0.99})
    assert "evaluation.ema: 0.99 is no average that is kept in training, which are 0.9, 0.5" in problem
    e = experiment(
        training={"ema": 0.9, "averages": [0.5, 0]}, search=search({"evaluation.ema": {"grid": [0.9, 0.5, 0]}})
    )
    found, _ = digests(expand(e))
    assert [Measurement.of(v.trial).evaluation.ema for v in found.values()] == [None, 0.5, 0]


def test_averages_count_where_there_are_any() -> None:
    plain, kept = (compute_trial_id(experiment(training={"averages": a}).trial, "d") for a in ([], [0.5]))
    assert plain == compute_trial_id(experiment().trial, "d") != kept


# By id: where one changes, the serializer or a default has, and TRAINING_VERSION is to be raised.
RECORDED: dict[str, dict[str, Any]] = {
    "091ab5392ead318b": {},
    "27309ec98f0e46c3": {"diffusion": {"T": 50, "schedule": {"kind": "cosine"}}},
    "4e1315d3d8760a81": {"diffusion": {"schedule": {"kind": "constant", "scale": "per_1000"}}},
    "5062ac261c5d5f1e": {
        "diffusion": {"schedule": {"kind": "quadratic"}, "variance": "fixed_small"},
        "loss": {"weighting": "min_snr", "gamma": 4.0},
    },
    "f5fb13bac89bc0f2": {"loss": {"weighting": "vlb"}, "seed": 3},
    "5f7fb2f8aca455fb": {"training": {"steps": 7, "decay": "cosine"}},
}


@pytest.mark.parametrize("recorded", RECORDED)
def test_ids_stay_what_they_are(recorded: str) -> None:
    """Settings that came later, or that nothing reads, leave the ids of trials that do not set them."""
    settings = {"data": {"source": "digits"}, "training": {"steps": 1}}
    assert compute_trial_id(Trial.model_validate({**settings, **RECORDED[recorded]}), "d" * 16) == recorded


def address_of(**sections: Any) -> str:
    settings = {"data": {"source": "digits"}, "training": {"steps": 1}}
    return compute_trial_id(Trial.model_validate(merge(settings, sections)), "d" * 16)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("linear", {"beta_start", "beta_end", "scale"}),
        ("quadratic", {"beta_start", "beta_end", "scale"}),
        ("warmup10", {"beta_start", "beta_end", "scale"}),
        ("warmup50", {"beta_start", "beta_end", "scale"}),
        ("sigmoid", {"beta_start", "beta_end", "scale"}),
        ("constant", {"beta_end", "scale"}),
        ("cosine", set()),
        ("jsd", set()),
        ("list", {"betas"}),
        ("log_snr", {"log_snr_start", "log_snr_end"}),
    ],
)
def test_what_a_schedule_reads_counts_and_nothing_else(kind, read):
    other = {"beta_start": 2e-4, "beta_end": 0.03, "scale": "per_1000", "betas": [0.1] * 1000}
    other |= {"log_snr_start": 8.0, "log_snr_end": -8.0}
    plain = address_of(diffusion={"schedule": {"kind": kind}})
    for name, value in other.items():
        changed = address_of(diffusion={"schedule": {"kind": kind, name: value}})
        assert (changed != plain) == (name in read), name


def test_what_an_objective_reads_counts_and_nothing_else():
    assert address_of(loss={"p2_gamma": 0.5, "p2_k": 2.0, "vlb_weight": 0.1}) == address_of()
    p2 = {"weighting": "p2"}
    assert (
        len({address_of(loss=p2), address_of(loss={**p2, "p2_gamma": 0.5}), address_of(loss={**p2, "p2_k": 2.0})}) == 3
    )
    learned = {"variance": "learned_range"}
    one, other = (address_of(diffusion=learned, loss={"objective": "hybrid", "vlb_weight": w}) for w in (0.001, 0.01))
    kl = address_of(diffusion=learned, loss={"objective": "kl", "vlb_weight": 0.01})
    assert (
        len(
            {
                one,
                other,
                kl,
                address_of(diffusion={"prediction": "v"}),
                address_of(training={"timesteps": "stratified"}),
            }
        )
        == 5
    )
    assert address_of(training={"timesteps": "uniform"}) == address_of()


# ---- What goes together ----------------------------------------------------------------------------------------

LEARNED = {"diffusion": {"variance": "learned_range"}}
TOGETHER = [
    (LEARNED, "diffusion.variance: learned_range is not trained by loss.objective: mse"),
    ({"loss": {"objective": "hybrid"}}, "loss.objective: hybrid adds the bound to teach a variance"),
    ({"loss": {"objective": "kl", "weighting": "p2"}}, "loss.weighting: p2 is without effect on objective: kl"),
    ({**LEARNED, "loss": {"objective": "hybrid", "weighting": "vlb"}}, "loss.weighting: vlb weighs t by a fixed"),
    ({"diffusion": {"prediction": "mu"}, "training": {"precision": "bf16"}}, "training.precision: bf16 has not"),
    ({"diffusion": {"schedule": {"betas": [0.1]}}}, "betas: [0.1] is without effect on kind: linear"),
    ({"diffusion": {"schedule": {"kind": "list"}}}, "one value for each of diffusion.T = 1000 timesteps; given: 0"),
    ({"diffusion": {"T": 2, "schedule": {"kind": "list", "betas": [0.1, 1.0]}}}, "betas: [1.0] must lie between 0"),
    ({"diffusion": {"schedule": {"kind": "log_snr", "log_snr_end": 9.5}}}, "log_snr_start: 9 is not above log_snr_end"),
    ({"diffusion": {"schedule": {"kind": "sigmoid", "beta_start": 0.5}}}, "beta_start: 0.5 is above beta_end = 0.02"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "text"), TOGETHER, ids=[text[:40] for _, text in TOGETHER])
def test_what_does_not_go_together_is_refused_with_the_reason_and_the_fix(sections, text):
    with pytest.raises(ExperimentError) as caught:
        parse(merge(content(), sections))
    [problem] = caught.value.problems
    assert text in problem and any(
        word in problem for word in ("take ", "leave ", "swap ", "needs ", "between ", "reversed")
    )


@pytest.mark.parametrize(
    "sections",
    [
        {**LEARNED, "loss": {"objective": "kl"}},
        {**LEARNED, "loss": {"objective": "hybrid", "weighting": "min_snr"}},
        {"diffusion": {"variance": "learned"}, "loss": {"objective": "kl"}},
        {"loss": {"objective": "kl"}},
        {"diffusion": {"prediction": "mu"}},
        {"diffusion": {"T": 2, "schedule": {"kind": "list", "betas": [0.1, 0.9]}}},
    ],
)
def test_what_goes_together_is_taken(sections):
    assert parse(merge(content(), sections))


def test_a_search_leaves_out_what_it_is_told_to():
    space = {"loss.objective": {"grid": ["kl", "mse"]}, "diffusion.variance": {"grid": ["learned", "fixed_large"]}}
    without = [{"loss.objective": "mse", "diffusion.variance": "learned"}]
    e = parse(content(search={"space": space, "without": without}))
    assert [tuple(v.params.values()) for v in expand(e)] == [
        ("kl", "learned"),
        ("kl", "fixed_large"),
        ("mse", "fixed_large"),
    ]
    assert parse(resolve(e)) == e
    for wrong, text in (
        ([{"loss.objectve": "mse"}], "search.without[0].loss.objectve: not a path of search.space"),
        ([{}], "search.without[0]: {} would leave out every variant"),
        ([{"loss.objective": "kl"}, {"loss.objective": "mse"}], "search.without: leaves out every variant"),
    ):
        with pytest.raises(ExperimentError) as caught:
            parse(content(search={"space": space, "without": wrong}, diffusion={"variance": "fixed_large"}))
        assert any(text in problem for problem in caught.value.problems), caught.value.problems
