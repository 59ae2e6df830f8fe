"""`python -m orchestrator.schema`: the settings of an experiment or nightly file, for editors and for people.

The JSON schema is made of the records that check the file, so what an editor underlines the command refuses too. What
spans several settings (a reversed range, a chain short of noise) is reported by `--dry-run` alone. With `--markdown`
the same settings, and the kinds that they can name, are tables, which docs/ shows between two markers.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from orchestrator import cli
from orchestrator.experiment.check import TRIAL_SETTINGS
from orchestrator.experiment.load import SETTINGS
from orchestrator.experiment.records import Axis, ExperimentFile
from orchestrator.experiment.settings import describe, list_fields
from orchestrator.nights.suite import Rule, Suite
from workers.config import Mistake, Record
from workers.kinds import NAMED_AT, SETTABLE

EXAMPLES = ("--output experiments/schema.json", "nightly --markdown --output docs/nightly.md")
MORE = "An editor with a YAML language server reads it where a file says:  # yaml-language-server: $schema=schema.json"


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("schema", "[experiment|nightly]", EXAMPLES, more=MORE)
    result.add_argument("kind", nargs="?", choices=SCHEMAS, default="experiment", help="of which file")
    result.add_argument("--markdown", action="store_true", help="a table of its settings, for people")
    result.add_argument("--output", type=Path, help="write it there instead; a table replaces that of a Markdown file")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    try:
        if options.markdown:
            text = write_tables(options.kind)
            text = replace_table(options.output.read_text(encoding="utf-8"), text) if options.output else text
        else:
            text = json.dumps(SCHEMAS[options.kind](), indent=2, ensure_ascii=not options.output) + "\n"  # any terminal
        if options.output:
            options.output.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except OSError as error:
        raise Mistake(str(error)) from error
    return cli.DONE


def make_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of an experiment file."""
    content = ExperimentFile.model_json_schema()
    kinds: dict[str, Any] = content["$defs"]
    axis = kinds["Axis"]
    # An axis has exactly one of its forms; pydantic, which gives the others null, does not say so.
    axis["properties"] = {name: _remove_null(axis["properties"][name]) for name in Axis.model_fields}
    axis |= {"minProperties": 1, "maxProperties": 1}
    for name in ("grid", "choice"):
        axis["properties"][name]["minItems"] = 1
    space = kinds["SearchConfig"]["properties"]["space"]
    del space["additionalProperties"]
    space |= {
        "properties": {path: {"$ref": "#/$defs/Axis"} for path in TRIAL_SETTINGS},
        "patternProperties": {_OF_KINDS: {"$ref": "#/$defs/Axis"}},
        "additionalProperties": False,
    }
    del content["properties"]["smoke"]["additionalProperties"]
    content["properties"]["smoke"] |= _make_overrides(content)
    _open_sections(kinds)
    return _add_head(content, "An experiment of diffusion-orchestrator")


# Paths of settings that kinds from outside may have.
_OF_KINDS = rf"^({'|'.join(dict.fromkeys(re.escape(path.rpartition('.')[0]) for path in SETTABLE))})\.\w+$"


def _open_sections(kinds: dict[str, Any]) -> None:
    """A section takes settings that it does not list where it names a kind from outside, and not otherwise."""
    for form in kinds.values():
        if form.get("additionalProperties") is True and "properties" in form:
            choosers = [name for name, field in form["properties"].items() if "pattern" in str(field.get("anyOf"))]
            named = [{"properties": {n: {"type": "string", "pattern": ":"}}, "required": [n]} for n in choosers]
            del form["additionalProperties"]
            form |= {"if": {"anyOf": named}, "else": {"propertyNames": {"enum": list(form["properties"])}}}


def _make_overrides(content: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping of dotted paths to values: each takes what the setting at its path does."""
    searched = r"search\.space\.[\w.]+"
    return {
        "properties": {path: {"$ref": place} for path, place in _list_places(content["$defs"], content["properties"])},
        "patternProperties": {
            _OF_KINDS: {},
            rf"^(?!.*\.({'|'.join(Axis.model_fields)})$){searched}$": {
                "anyOf": [{"$ref": "#/$defs/Axis"}, {"type": "null"}]
            },
            **{rf"^{searched}\.{form}$": {"$ref": f"#/$defs/Axis/properties/{form}"} for form in Axis.model_fields},
        },
        "additionalProperties": False,
    }


def _list_places(
    kinds: dict[str, Any], properties: dict[str, Any], at: str = "#/properties", above: str = ""
) -> Iterator[tuple[str, str]]:
    """The dotted path of each setting of an experiment, and the place in the schema that says what it takes."""
    for name, form in properties.items():
        if above + name in SETTINGS:
            yield above + name, f"{at}/{name}"
        for section in (option["$ref"] for option in (form, *form.get("anyOf", ())) if "$ref" in option):
            inner = kinds[section.removeprefix("#/$defs/")]["properties"]
            yield from _list_places(kinds, inner, f"{section}/properties", f"{above}{name}.")


def make_nightly_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a nightly file."""
    content = Suite.model_json_schema()
    _open_sections(content["$defs"])
    return _add_head(content, "A nightly evaluation of diffusion-orchestrator")


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"experiment": make_schema, "nightly": make_nightly_schema}


# ---- For people ------------------------------------------------------------------------------------------------

MARKERS = "<!-- settings: `make schema` writes this table -->\n", "<!-- end of the settings -->\n"
RECORDS: dict[str, type[Record]] = {"experiment": ExperimentFile, "nightly": Suite}
# Settings that hold many of a record: how the path of one is written.
INSIDE: dict[str, tuple[str, type[Record]]] = {
    "search.space": ("search.space.PATH", Axis),
    "regression.rules": ("regression.rules[]", Rule),
}


def write_tables(kind: str) -> str:
    """What a page says of the settings of a file, and an experiment's of the kinds that it can name."""
    return write_settings_table(kind) + (f"\nThe kinds:\n\n{write_kinds_table()}" if kind == "experiment" else "")


def write_kinds_table() -> str:
    """A Markdown table of `workers.kinds`."""
    lines = ["| setting | value | what it is | reads |", "|---|---|---|---|"]
    first = {id(table): path for path, table in reversed(NAMED_AT.items())}  # where two settings name the same kinds
    for path, table in NAMED_AT.items():
        if first[id(table)] != path:
            continue
        for name, reads in table.reads.items():
            lines.append(f"| `{path}` | `{name}` | {table[name].about} | {', '.join(f'`{r}`' for r in reads)} |")
    return "\n".join(lines) + "\n"


def write_settings_table(kind: str) -> str:
    """A Markdown table of every setting of a file: its dotted path, what it takes, its default, and what it is.

    A nightly file's `evaluation` is one row, as its settings are those of an experiment file.
    """
    lines = ["| setting | takes | default | what it is |", "|---|---|---|---|"]
    for path, field in sorted(list_fields(RECORDS[kind]), key=lambda setting: setting[0] != "name"):
        if kind == "experiment" or not path.startswith("evaluation."):
            lines.append(_write_row(path, field))
            inner, record = INSIDE.get(path, ("", Record))
            lines += [_write_row(f"{inner}.{name}", form) for name, form in record.model_fields.items()]
    return "\n".join(lines) + "\n"


def _write_row(path: str, field: FieldInfo) -> str:
    takes = re.sub(r"a section with the keys .*?(?=$| or null)", "a section", describe(field))
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "" if isinstance(value, Record) else f"`{value if isinstance(value, str) else json.dumps(value)}`"
    return f"| `{path}` | {takes} | {default} | {field.description} |"


def replace_table(page: str, table: str) -> str:
    """The Markdown page with the table between its markers. Raises Mistake where it has none."""
    before, begin, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        raise Mistake(f"the page has no place for the table; put these two lines there:\n{''.join(MARKERS)}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _add_head(content: dict[str, Any], title: str) -> dict[str, Any]:
    content["properties"]["name"]["pattern"] = r"^(?!\.)(?!.*\.\.)[A-Za-z0-9._-]{1,100}$"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content, "title": title}


def _remove_null(form: dict[str, Any]) -> dict[str, Any]:
    """A form of an axis without the null that stands for its absence."""
    [given] = [option for option in form["anyOf"] if option != {"type": "null"}]
    return {**given, "description": form["description"]}


if __name__ == "__main__":
    sys.exit(cli.call("schema", main))
