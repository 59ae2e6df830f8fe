"""`python -m orchestrator.schema`: the JSON schema of an experiment or nightly file, for editors and other programs.

It is made of the records that check the file, so what an editor underlines the command refuses too; what spans several
settings (a reversed range, a chain short of noise) is said by `--dry-run` alone.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.experiment import SETTINGS, TRIAL_SETTINGS, Axis, ExperimentFile
from orchestrator.nights.suite import Suite

EPILOG = """examples:
  python -m orchestrator.schema
  python -m orchestrator.schema --output experiments/schema.json
  python -m orchestrator.schema nightly

An editor with a YAML language server reads it where a file says:  # yaml-language-server: $schema=schema.json"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.schema",
        description="Print the JSON schema of a file that people write.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("kind", nargs="?", choices=SCHEMAS, default="experiment", help="of which file")
    result.add_argument("--output", type=Path, help="write it there instead")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    text = json.dumps(SCHEMAS[options.kind](), indent=2, ensure_ascii=False) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of an experiment file."""
    content = ExperimentFile.model_json_schema()
    kinds: dict[str, Any] = content["$defs"]
    axis = kinds["Axis"]
    # An axis has exactly one of its forms; pydantic, which gives the others null, does not say so.
    axis["properties"] = {name: _given(axis["properties"][name]) for name in Axis.model_fields}
    axis |= {"minProperties": 1, "maxProperties": 1}
    for name in ("grid", "choice"):
        axis["properties"][name]["minItems"] = 1
    space = kinds["SearchConfig"]["properties"]["space"]
    del space["additionalProperties"]
    space |= {
        "properties": {path: {"$ref": "#/$defs/Axis"} for path in TRIAL_SETTINGS},
        "additionalProperties": False,
    }
    del content["properties"]["smoke"]["additionalProperties"]
    content["properties"]["smoke"] |= _overrides(content)
    return _headed(content, "An experiment of diffusion-orchestrator")


def _overrides(content: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping of dotted paths to values: each takes what the setting at its path does."""
    searched = r"search\.space\.[\w.]+"
    return {
        "properties": {path: {"$ref": place} for path, place in _places(content["$defs"], content["properties"])},
        "patternProperties": {
            rf"^(?!.*\.({'|'.join(Axis.model_fields)})$){searched}$": {
                "anyOf": [{"$ref": "#/$defs/Axis"}, {"type": "null"}]
            },
            **{rf"^{searched}\.{form}$": {"$ref": f"#/$defs/Axis/properties/{form}"} for form in Axis.model_fields},
        },
        "additionalProperties": False,
    }


def _places(
    kinds: dict[str, Any], properties: dict[str, Any], at: str = "#/properties", above: str = ""
) -> Iterator[tuple[str, str]]:
    """The dotted path of each setting of an experiment, and the place in the schema that says what it takes."""
    for name, form in properties.items():
        if above + name in SETTINGS:
            yield above + name, f"{at}/{name}"
        for section in (option["$ref"] for option in (form, *form.get("anyOf", ())) if "$ref" in option):
            inner = kinds[section.removeprefix("#/$defs/")]["properties"]
            yield from _places(kinds, inner, f"{section}/properties", f"{above}{name}.")


def nightly() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a nightly file."""
    return _headed(Suite.model_json_schema(), "A nightly evaluation of diffusion-orchestrator")


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"experiment": schema, "nightly": nightly}


def _headed(content: dict[str, Any], title: str) -> dict[str, Any]:
    content["properties"]["name"]["pattern"] = r"^(?!\.)(?!.*\.\.)[A-Za-z0-9._-]{1,100}$"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content, "title": title}


def _given(form: dict[str, Any]) -> dict[str, Any]:
    """A form of an axis without the null that stands for its absence."""
    [given] = [option for option in form["anyOf"] if option != {"type": "null"}]
    return {**given, "description": form["description"]}


if __name__ == "__main__":
    sys.exit(main())
