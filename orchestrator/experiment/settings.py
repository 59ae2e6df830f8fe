"""Settings as data: YAML in and out, dotted paths, and what is wrong with them in words that teach.

It knows the records of `workers.config` only as a kind: what it says of a setting it reads off the record's fields.
"""

import difflib
import json
import math
import re
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from workers.config import Record
from workers.sections import OpenRecord

R = TypeVar("R", bound=Record)

# ---- YAML ------------------------------------------------------------------------------------------------------

# YAML 1.2's core scalars. PyYAML follows 1.1, where 1e-4 is text, `no` is false, 010 is 8 and 1:30 is 90.
TAG = "tag:yaml.org,2002:"
SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][\d_]*)",
    "float": r"[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
PATTERNS = {TAG + name: re.compile(rf"(?:{pattern})$", re.ASCII) for name, pattern in SCALARS.items()}
BUILT = (None, *(TAG + name for name in ("null", "bool", "int", "float", "str")))


MOST_BYTES, MOST_VALUES = 2**22, 1_000_000  # of a file of settings


class NotYAML(ValueError):
    """The text is not YAML; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's plain types, and collects keys that a mapping holds twice in `twice`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[int, str]] = []

    def construct_unique_mapping(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (TAG + "str", TAG + "merge"):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key.start_mark)
            if key.value in lines:
                self.twice.append(
                    (line, f"line {line}: {key.value!r} is there twice, first in line {lines[key.value]}")
                )
            elif key.tag == TAG + "str":
                lines[key.value] = line
        return self.construct_mapping(node, deep=True)

    def construct_whole_sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)


_Loader.yaml_implicit_resolvers = {None: list(PATTERNS.items())}
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in BUILT}
_Loader.add_constructor(TAG + "map", _Loader.construct_unique_mapping)
_Loader.add_constructor(TAG + "seq", _Loader.construct_whole_sequence)


class _Dumper(yaml.SafeDumper):
    """Quotes also the texts that only YAML 1.2 takes for numbers, such as 1e-4."""


_Dumper.add_implicit_resolver(TAG + "float", PATTERNS[TAG + "float"], list("-+.0123456789"))


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """The content of a YAML text, and a problem for each key that is there twice. Raises NotYAML."""
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
        if _count_values(content, {}) > MOST_VALUES:
            raise NotYAML(
                f"its anchors (&) and aliases (*) make more than {MOST_VALUES:,} values of it; write them out"
            )
        return content, [problem for _, problem in sorted(loader.twice)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        advice = "; indent by spaces, not by tabs" if "\\t" in str(error.problem) else ""
        raise NotYAML(f"{line}not valid YAML: {error.problem or error.context}{advice}") from None
    except NotYAML:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise NotYAML(f"not valid YAML: {str(error).splitlines()[0]}") from None


def _count_values(content: Any, known: dict[int, float]) -> float:
    """How many values there are in the content, where each alias counts as what it stands for."""
    if not isinstance(content, dict | list):
        return 1
    if id(content) not in known:
        known[id(content)] = math.inf  # until it is known: it holds itself
        inside = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_count_values(value, known) for value in inside)
    return known[id(content)]


def read_text(path: Path) -> str:
    """The text of a file of settings. Raises OSError, and ValueError where it is none."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes, so not a file of settings")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is no text in UTF-8: save the file in that encoding") from None


def read_file(path: Path, needs: str) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file, and the keys that it holds twice. Raises ValueError where there is nothing to check.

    `needs` says to the writer of an empty one what such a file needs.
    """
    try:
        content, problems = read_yaml(read_text(path))
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ValueError(f"no such file (looked at {path.absolute()}){suggest_choice(path.name, siblings)}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if content is None:
        raise ValueError(f"the file is empty; {needs}")
    if not isinstance(content, dict):
        raise ValueError(f"{show(content)} is not a mapping of settings, such as 'name: my_experiment'")
    return content, problems


def write_yaml(content: Any) -> str:
    """The text of which `read_yaml` makes `content`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---- Paths -----------------------------------------------------------------------------------------------------


def list_fields(record: type[Record], prefix: str = "", own: bool = False) -> Iterator[tuple[str, FieldInfo]]:
    """The dotted path and the field of every setting of a record, sections too.

    With `own` those too that kinds from outside have, as far as the file that was read last names them.
    """
    for name, field in (record.find_fields() if own else record.model_fields).items():
        yield prefix + name, field
        if section := _find_record(field.annotation):
            yield from list_fields(section, f"{prefix}{name}.", own)


def list_paths(record: type[Record], own: bool = False) -> list[str]:
    """The dotted paths of all settings of a record, sections too."""
    return [path for path, _ in list_fields(record, own=own)]


def put(content: Any, path: Sequence[str], value: Any) -> Any:
    """`content` with `value` at `path`. Where something other than a section is in the way it stays as it is."""
    if not path:
        return value
    if not isinstance(content, Mapping | None):
        return content
    return {**(content or {}), path[0]: put((content or {}).get(path[0]), path[1:], value)}


def merge(content: Any, update: Any) -> Any:
    """`content` changed by `update`: sections are merged, anything else is replaced."""
    if not (isinstance(content, Mapping) and isinstance(update, Mapping)):
        return update
    return {**content, **{name: merge(content.get(name), value) for name, value in update.items()}}


def list_leaves(path: str, value: Any) -> dict[str, Any]:
    """The settings that putting `value` at `path` sets: one, or all those inside a mapping."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {leaf: v for name, inner in value.items() for leaf, v in list_leaves(f"{path}.{name}", inner).items()}


def overlap(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two sets of paths have a setting in common."""
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in some for b in others)


# ---- Mistakes --------------------------------------------------------------------------------------------------


def find_invalid(record: type[Record], content: Any) -> list[tuple[str, str]]:
    """(path, what is wrong and what to do) for every setting of `content` that `record` does not take."""
    try:
        record.model_validate(content)
        return []
    except ValidationError as error:
        found = [_explain(record, content, dict(details)) for details in error.errors(include_url=False)]
        unknown = [{"type": "extra_forbidden", "loc": location} for location in _list_unknown(record, content)]
        found += [_explain(record, content, details) for details in unknown]
        return list({path: (path, text) for path, text in found}.values())  # a union has an error for each member


def _list_unknown(record: type[Record], content: Any) -> Iterator[tuple[str, ...]]:
    """Where the keys are that no kind has: an open record says so itself only where its other settings are valid."""
    if not isinstance(content, Mapping):
        return
    if issubclass(record, OpenRecord):
        yield from ((name,) for name in content if name not in record.find_fields(content))
    for name, field in record.model_fields.items():
        if name in content and (section := _find_record(field.annotation)):
            yield from ((name, *location) for location in _list_unknown(section, content[name]))


def parse_valid(record: type[R], content: Any) -> R | None:
    return None if find_invalid(record, content) else record.model_validate(content)


def _explain(record: type[Record], content: Any, details: dict[str, Any]) -> tuple[str, str]:
    """pydantic's error in our words: where, what, and what would be valid."""
    path, kind, value, location = "", record, content, list(details["loc"])
    # What of the location names no setting (a member of a union, an end of a range) is left over.
    while location and (member := _find_member(kind, location[0], value)) is not None:
        kind, step = member, location.pop(0)
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        value = value.get(step) if isinstance(value, Mapping) else value[step]
    if details["type"] == "extra_forbidden":
        section = _find_record(kind)
        assert section is not None, details
        path = f"{path}.{location[0]}".lstrip(".")
        fields = section.find_fields(value)
        return (
            path,
            f"unknown key{suggest_path(path, list_paths(record, own=True), fields)}; valid: {', '.join(fields)}",
        )
    if details["type"] == "missing" and not location:
        return path, f"missing; it is {describe(kind)}"
    if details["type"] == "value_error":
        return path, str(details["ctx"]["error"])
    wanted = describe(kind)
    if isinstance(value, float) and not math.isfinite(value):
        wanted = wanted.replace("a number", "a finite number")
    return path, f"{show(value)} is not {wanted}{_suggest_type(kind, value)}"


def _suggest_type(kind: Any, value: Any) -> str:
    """What may have been meant by a value of the wrong type."""
    kinds = [plain for plain, _ in _list_members(kind)]
    if isinstance(value, str):
        if {int, float} & {*kinds} and re.fullmatch(r"[+-]?(\d+|\d*\.\d+)(e[+-]?\d+)?", value):
            return f"; write {value}, without quotes"
        choices = [choice for plain in kinds if get_origin(plain) is Literal for choice in get_args(plain)]
        return suggest_choice(value, [choice for choice in choices if isinstance(choice, str)])
    if str in kinds and isinstance(value, int | float):
        return "; put it in quotes"
    if int in kinds and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def suggest_choice(word: str, choices: Iterable[str]) -> str:
    """The choice that a wrong word is like, as the end of a message; empty where there is none."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggest_path(path: str, known: Sequence[str], fields: Iterable[str] = ()) -> str:
    """The same for an unknown path: one of its section's `fields`, or the path of a setting of that name elsewhere."""
    name = path.rpartition(".")[2]
    homes = [other for other in known if other.rpartition(".")[2] == name]
    home = difflib.get_close_matches(path, homes, n=1, cutoff=0)
    return suggest_choice(name, fields) or (f"; did you mean {home[0]!r}?" if home else suggest_choice(path, known))


def show(value: Any) -> str:
    """A value as one would write it in the file, cut to a readable length."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe(kind: Any) -> str:
    """A type of ours in words, e.g. "'all' or a whole number of at least 1"."""
    return " or ".join(_describe(plain, constraints) for plain, constraints in _list_members(kind))


def _describe(kind: Any, constraints: Sequence[Any]) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if get_origin(kind) is tuple and arguments[-1] is ...:
        number = "one or more values" if any(hasattr(c, "min_length") for c in constraints) else "values"
        most = next((c.max_length for c in constraints if getattr(c, "max_length", None) is not None), None)
        number = number if most is None else f"at most {most} values"
        return f"a list of {number}" + ("" if arguments[0] is Any else f", each {describe(arguments[0])}")
    if get_origin(kind) is tuple and len(arguments) != 2:
        return f"a list of {len(arguments)} values, each {describe(arguments[0])}"
    if get_origin(kind) is tuple:
        if pair := next((c for c in constraints if isinstance(c, str)), None):
            return f"a pair {pair}, each {describe(arguments[0])}"
        return f"a range [low, high] of {describe(arguments[0]).removeprefix('a ')}s"
    if kind is type(None):
        return "null"  # has no bounds, whatever those of the other members are
    if section := _find_record(kind):
        return f"a section with the keys {_list_names(section)}"
    bounds = " and ".join(
        f"{words} {getattr(c, bound):,}"
        for c in constraints
        for bound, words in BOUNDS.items()
        if getattr(c, bound, None) is not None
    )
    return KINDS.get(kind, "a mapping") + " of" * bounds.startswith("at") + f" {bounds}" * bool(bounds)


def _list_names(section: type[Record]) -> str:
    return ", ".join(section.model_fields)


def _list_members(kind: Any, constraints: Sequence[Any] = ()) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The members of a union (or the one type), each with the constraints on it."""
    if isinstance(kind, FieldInfo):
        yield from _list_members(kind.annotation, [*constraints, *kind.metadata])
    elif get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        more = [constraint for m in more for constraint in (m.metadata if isinstance(m, FieldInfo) else [m])]
        yield from _list_members(inner, [*constraints, *more])
    elif get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _list_members(member, constraints)
    else:
        yield kind, constraints


def _find_record(kind: Any) -> type[Record] | None:
    """The section among the members of a type."""
    return next((k for k, _ in _list_members(kind) if isinstance(k, type) and issubclass(k, Record)), None)


def _find_member(kind: Any, step: str | int, content: Any) -> Any:
    """The type one step further into a section, a mapping or a list; None where nothing is."""
    if section := _find_record(kind):
        return section.find_fields(content).get(str(step))
    for plain, _ in _list_members(kind):
        if get_origin(plain) is dict:
            return get_args(plain)[1]
        if get_origin(plain) is tuple and get_args(plain)[-1] is ... and isinstance(step, int):
            return get_args(plain)[0]
    return None
