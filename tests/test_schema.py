"""What editors and people read of the settings is that of the records: the JSON schemas, and the tables of docs/."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT

from orchestrator.experiment.load import find_mistakes
from orchestrator.experiment.settings import list_paths, read_yaml
from orchestrator.schema import (
    MARKERS,
    RECORDS,
    SCHEMAS,
    main,
    make_schema,
    replace_table,
    write_settings_table,
    write_tables,
)

FILES = sorted((ROOT / "experiments").glob("*.yaml"))
SHIPPED = {"experiment": "schema.json", "nightly": "nightly.schema.json"}
PAGES = {"experiment": ROOT / "docs" / "experiment-file.md", "nightly": ROOT / "docs" / "nightly.md"}
VALIDATOR = jsonschema.Draft202012Validator(make_schema())
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
        {"search": {"space": {"training.step": {"grid": [10]}}}},
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
    assert not VALIDATOR.is_valid({**LEAST, **wrong}) and find_mistakes({**LEAST, **wrong})


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
    assert find_mistakes({**LEAST, **right}) == []


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys: Any) -> None:
    assert main([]) == 0 and json.loads(capsys.readouterr().out) == make_schema()
    assert main(["--output", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == make_schema()


@pytest.mark.parametrize("kind", PAGES)
def test_the_page_shows_the_settings_as_they_are(kind: str) -> None:
    page = PAGES[kind].read_text()
    assert page == replace_table(page, write_tables(kind)), "make schema"


@pytest.mark.parametrize("kind", PAGES)
def test_a_table_has_every_setting_and_says_what_it_is(kind: str) -> None:
    rows = [row.split(" | ") for row in write_settings_table(kind).splitlines()[2:]]
    assert all(len(row) == 4 and row[1] and row[3] not in ("None |", "|") for row in rows), rows
    named = {row[0].strip("| `") for row in rows}
    wanted = {path for path in list_paths(RECORDS[kind]) if kind == "experiment" or not path.startswith("evaluation.")}
    assert wanted <= named and len(named) == len(rows)


def test_a_table_goes_between_its_markers(tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}of yesterday\n{MARKERS[1]}after\n")
    command = ["nightly", "--markdown", "--output", str(page)]
    assert main(command) == 0 and page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert write_settings_table("nightly") in page.read_text() and "of yesterday" not in page.read_text()
    written = page.read_text()
    assert main(command) == 0 and page.read_text() == written
    page.write_text("no markers")
    assert main(command) == 2 and MARKERS[0] in capsys.readouterr().err and page.read_text() == "no markers"
