"""The nightly file: what it takes, and that all its mistakes are told at once, with what would be valid."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from orchestrator.experiment.records import ExperimentError
from orchestrator.nights.suite import Suite, find_mistakes, load, note_missing_rules, split_registered

SUITE: dict[str, Any] = {
    "name": "small",
    "models": ["*@champion", "*@candidate"],
    "evaluation": {"nll": {"images": "all"}, "fid": {"samples": 200}},
    "schedule": {"at": "02:30", "zone": "Europe/Berlin"},
    "regression": {"rules": [{"metric": "eval/nll_bpd", "standard_errors": 3}]},
}


def told(**changes: Any) -> str:
    return "\n".join(find_mistakes({**SUITE, **changes}))


def test_the_file_that_comes_with_the_project_is_valid() -> None:
    suite = load(ROOT / "experiments/nightly.yaml")
    assert suite.schedule.zone and not suite.promote and suite.label == "nightly"
    assert Suite.model_validate(SUITE).label == "nightly-small"


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    file = ROOT / "experiments/nightly.yaml"
    suite = load(file, ["schedule={at: 04:15, zone: Asia/Tokyo}", "promote=true", "evaluation.fid.samples=5000"])
    assert str(suite.schedule) == "04:15 Asia/Tokyo" and suite.promote and suite.evaluation.fid.samples == 5000
    with pytest.raises(ExperimentError, match=r"did you mean 'schedule\.zone'"):
        load(file, ["schedule.zoen=UTC"])
    with pytest.raises(ExperimentError, match=r"did you mean 'nightly\.yaml'"):
        load(file.with_name("nigthly.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ExperimentError, match="a nightly file needs name, models, schedule and regression"):
        load(tmp_path / "empty.yaml")


def test_all_mistakes_are_told_at_once() -> None:
    wrong = told(
        modles=["a"], models=[], schedule={"at": "half past two"}, promote="yes",
        regression={"rules": [{"metric": "eval/nll_bpd"}]}, hooks={"webhook": "https://hooks.example/T0/secret"},
    )  # fmt: skip
    for text in (
        "did you mean 'models'", "models: [] is empty", "schedule.at: 'half past two' is not a time of day",
        "schedule.zone: missing", "promote: 'yes' is not true or false", "regression.rules[0]: takes standard_errors",
        "hooks.webhook: not the name of an environment variable",
    ):  # fmt: skip
        assert text in wrong
    assert "secret" not in wrong


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"regression": {"rules": [{"metric": "eval/fid", "relative": 0.1}]}}, "density_bpd, eval/fd_class"),
        ({"regression": {"rules": [{"metric": "eval/fd_classifer", "relative": 0.1}]}}, "mean 'eval/fd_classifier'"),
        ({"regression": {"rules": [{"metric": "eval/nll_bpd", "relative": 1}] * 2}}, "eval/nll_bpd is there twice"),
        ({"evaluation": {"nll": None, "fid": None}}, "nothing is measured"),
        ({"regression": {"rules": [{"metric": "eval/ode_nll_bpd", "relative": 1}]}}, "not measured by this evaluation"),
        ({"evaluation": {"nll": {"images": 1}}}, "a single image has no error"),
        ({"evaluation": {"fid": {"also": ["inception_score"]}}}, "inception_score needs features: inception"),
        ({"models": ["*@candidate"]}, "against: champion takes a champion, and models names none; add '*@champion'"),
        ({"models": ["small@champion"], "promote": True}, "promote: true takes a candidate"),
    ],
)
def test_settings_that_do_not_go_together_are_told(changes: dict[str, Any], text: str) -> None:
    assert text in told(**changes)


def test_a_rule_by_standard_errors_takes_a_metric_that_has_one() -> None:
    few = {"fid": {"samples": 60}}
    rule = {"metric": "eval/fd_classifier", "standard_errors": 3}
    assert "has no standard error with so few samples" in told(evaluation=few, regression={"rules": [rule]})
    rule = {"metric": "eval/fd_classifier", "relative": 0.1}
    assert told(evaluation=few, regression={"rules": [rule]}) == ""


def test_bounds_in_continuous_time_and_likelihoods_by_the_ode_have_rules() -> None:
    names = ("eval/nll_bpd", "eval/continuous_nll_bpd", "eval/ode_nll_bpd")
    rules = {"rules": [{"metric": name, "standard_errors": 3} for name in names]}
    measured = {"nll": {"timesteps": 50}, "ode_nll": {"images": 20}, "fid": {"sampler": {"kind": "heun", "steps": 10}}}
    assert told(evaluation=measured, regression=rules) == ""
    suite = Suite.model_validate({**SUITE, "evaluation": measured, "regression": rules})
    assert not [*note_missing_rules(suite, "flow@newest", 17, continuous=True)]
    [note] = note_missing_rules(Suite.model_validate(SUITE), "flow@newest", 17, continuous=True)
    assert note.startswith("flow@newest: what is measured of it is eval/continuous_nll_bpd, of which there is no rule")


def test_what_looks_like_an_alias_is_one_and_a_path_is_not() -> None:
    assert split_registered("*@champion") == ("*", "champion") and split_registered("beta_2.1@newest") == (
        "beta_2.1",
        "newest",
    )
    assert (
        split_registered("53964d91") is None
        and split_registered("runs/a@b/step-1") is None
        and split_registered("s3://a@b/c") is None
    )
