"""What a command line and `smoke` set instead of what the experiment file says."""

from pathlib import Path

import pytest
from experiment_files import SAMPLE, file_problems, load_text

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import find_mistakes, load, parse, resolve
from orchestrator.experiment.records import ExperimentError, Variant
from orchestrator.experiment.settings import read_yaml
from workers.config import ModelConfig, Trial


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
