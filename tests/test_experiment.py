"""The experiment file: what it reads, and what it goes round as."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from experiment_files import SAMPLE, experiment, file_problems, load_text, search

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import load, parse, resolve, to_yaml
from orchestrator.experiment.records import Experiment, ExperimentError
from orchestrator.experiment.settings import list_paths, read_yaml
from workers.config import Trial

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


# ---- The module


@pytest.mark.parametrize("module", ["load", "preflight"])
def test_importing_it_stays_quick(module: str) -> None:
    heavy = ("torch", "ray", "pandas", "sklearn", "mlflow", "pyarrow", "matplotlib")
    code = f"import sys, orchestrator.experiment.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_of_a_trial_can_be_searched_or_says_why_not() -> None:
    given: dict[str, Any] = {
        "evaluation": {"ode_nll": {}},
        "training": {"steps": 5, "init": {"source": "base@0123456789abcdef"}, "posthoc": {"every": 1}},
        "data": {"source": "digits", "encoder": {"source": "stage@0123456789abcdef"}},
    }
    student: dict[str, Any] = {
        "loss": {"objective": "progressive", "teacher": {"source": "taught@0123456789abcdef"}, "student_steps": 1},
        "evaluation": {"nll": None, "fid": {"sampler": {"kind": "ddim"}}},
        "training": {"steps": 5},
    }
    for path in list_paths(Trial):
        of = student if path.startswith("loss.teacher.") else given
        ranked = {"metric": "eval/fd_classifier"} if of is student else {}
        value = experiment(**of).trial
        for name in path.split("."):
            value = getattr(value, name)
        plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        try:
            (variant,) = expand(experiment(**of, search=search({path: {"grid": [plain]}}, **ranked)))
            assert variant.trial == experiment(**of).trial, path
        except ExperimentError as error:
            assert "does not change what is trained" in str(error), (path, error)
