"""The experiment file's JSON schema is that of the records, is shipped, and is named by every experiment file."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT

from orchestrator.experiment import mistakes
from orchestrator.schema import SCHEMAS, main, schema
from orchestrator.settings import read_yaml

FILES = sorted((ROOT / "experiments").glob("*.yaml"))
SHIPPED = {"experiment": "schema.json", "nightly": "nightly.schema.json"}
VALIDATOR = jsonschema.Draft202012Validator(schema())
LEAST = {"name": "a", "data": {"source": "digits"}, "training": {"steps": 1}}


def content(file: Path) -> Any:
    return read_yaml(file.read_text())[0]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_shipped_schema_is_current(kind: str) -> None:
    assert json.loads((ROOT / "experiments" / SHIPPED[kind]).read_text()) == SCHEMAS[kind](), "make schema"
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind]())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_names_its_schema_and_is_valid(file: Path) -> None:
    kind = "nightly" if "orchestrator.nightly" in file.read_text() else "experiment"
    assert f"# yaml-language-server: $schema={SHIPPED[kind]}" in file.read_text().splitlines()
    jsonschema.Draft202012Validator(SCHEMAS[kind]()).validate(content(file))


@pytest.mark.parametrize(
    "wrong",
    [
        {"trainin": {}},
        {"name": "../outside"},
        {"training": {"steps": 0}},
        {"training": {"steps": "many"}},
        {"training": {}},
        {"loss": {"weighting": "simpel"}},
        {"diffusion": {"schedule": {"beta_end": 1.5}}},
        {"search": {"space": {"diffusion.T": [1, 2]}}},
        {"search": {"space": {"diffusion.T": {"grid": []}}}},
        {"search": {"space": {"diffusion.T": {}}}},
        {"search": {"space": {"diffusion.T": {"grid": [10], "choice": [20]}}}},
        {"search": {"space": {"diffusion.T": {"grid": None}}}},
        {"search": {"space": {"diffusion.t": {"grid": [10]}}}},
        {"search": {"space": {"training.lr": {"uniform": [1]}}}},
        {"search": {"metric": "train/loss_simple"}},
        {"smoke": {"training.stepz": 1}},
        {"smoke": {"training.steps": 0}},
        {"smoke": {"evaluation.fid": {"samples": "few"}}},
        {"smoke": {"search.space.diffusion.T.grid": []}},
        {"smoke": {"search.space.diffusion.T": [1]}},
        {"smoke": {"smoke": {}}},
    ],
    ids=str,
)
def test_what_the_schema_refuses_the_command_refuses_too(wrong: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid({**LEAST, **wrong}) and mistakes({**LEAST, **wrong})


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"search": {"space": {"diffusion.T": {"grid": [10, 20]}, "loss.weighting": {"grid": ["simple", "vlb"]}}}},
        {"search": {"space": {"training.lr": {"loguniform": [1e-4, 1e-2]}}, "algorithm": "random", "samples": 3}},
        {"evaluation": {"nll": None, "fid": {"samples": 500}}},
        {"search": {"space": {"diffusion.schedule": {"grid": [{"kind": "cosine"}]}}}},
        {"smoke": {"training.steps": 2, "evaluation.fid": None, "evaluation.nll.images": 5, "model": {"channels": 8}}},
        {"smoke": {"search.space.diffusion.T.grid": [10], "search.metric": "valid/nll_bpd"}},
        {
            "smoke": {
                "search.space.diffusion.T": {"int_uniform": [10, 20]},
                "search.algorithm": "random",
                "search.samples": 2,
            }
        },
    ],
    ids=str,
)
def test_both_take_what_is_right(right: dict[str, Any]) -> None:
    VALIDATOR.validate({**LEAST, **right})
    assert mistakes({**LEAST, **right}) == []


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys: Any) -> None:
    assert main([]) == 0 and json.loads(capsys.readouterr().out) == schema()
    assert main(["--output", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == schema()
