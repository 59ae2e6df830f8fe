"""The experiment file: read it, override it from the command line, and check it.

    file + overrides -> load -> Experiment

A file may also say by which overrides it becomes small (`smoke`); what is loaded has them applied, or not at all.
`load` tells all mistakes at once. Everything but the reading of the file is a pure function.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.experiment.check import find_experiment_mistakes, get_space, list_settings_set, parse_axes
from orchestrator.experiment.records import Axis, Experiment, ExperimentError
from orchestrator.experiment.settings import (
    list_leaves,
    list_paths,
    overlap,
    put,
    read_file,
    read_yaml,
    show,
    suggest_path,
    write_yaml,
)
from workers import code
from workers.config import Measurement, Mistake
from workers.kinds import NAMED_AT
from workers.syntax import NAMED


def load(path: str | Path, overrides: Sequence[str] = (), smoke: bool = False) -> Experiment:
    """The experiment in a YAML file, with `a.b=value` overrides applied. Raises ExperimentError with all mistakes.

    An override replaces what is at its path, be it a whole section. `search.space.<path>.<kind>=[...]` replaces how
    a path is searched and `search.space.<path>=null` takes it out of the search. With `smoke` those of the file's own
    section come first, and the name gets a `-smoke`; without it they are checked all the same.
    """
    try:
        content, problems = read_file(Path(path), "an experiment needs name, data and training")
    except ValueError as mistake:
        raise ExperimentError([str(mistake)], str(path)) from None
    if smoke and not content.get("smoke"):
        problems.append("smoke: the file has no such section; add one, such as smoke: {training.steps: 4}")
    given: list[tuple[str, str, Any]] = []
    for text in overrides:
        try:
            given.append((f"override {text!r}", *parse_assignment(text)))
        except ValueError as mistake:
            problems.append(f"override {text!r}: {mistake}")
    roots = {"code": content.get("code", ()), **{key: value for _, key, value in given if key == "code"}}["code"]
    problems += open_code(roots, Path(path).parent, [content, [value for _, _, value in given]])
    changed, wrong = _apply_smoke(content) if smoke else (_read_whole(content), _find_smoke_mistakes(content))
    changed, without = _apply_overrides(changed, given)
    if smoke and isinstance(changed.get("name"), str):
        changed["name"] += "-smoke"
    if problems := [*problems, *wrong, *without, *find_experiment_mistakes(changed)]:
        raise ExperimentError(_drop_consequences(problems, changed), str(path))
    return Experiment.model_validate(changed)


def _drop_consequences(problems: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """The problems without those that follow from another: where a kind of one's own cannot be read, nobody knows the
    settings that it adds to its section."""
    told = {text.partition(": ")[0] for text in problems}
    unread = {
        name
        for name, section in content.items()
        if f"{name}.kind" in told and isinstance(section, Mapping) and NAMED.fullmatch(str(section.get("kind")))
    }

    def follows(text: str) -> bool:
        path, _, what = text.partition(": ")
        section = path.removeprefix("search.space.").rpartition(".")[0]
        return section in unread and what.startswith(("unknown key", "no such setting of a trial"))

    return [text for text in problems if not follows(text)]


def parse(content: Mapping[str, Any]) -> Experiment:
    """The experiment that `content` describes. Raises ExperimentError with all mistakes."""
    if problems := find_mistakes(content):
        raise ExperimentError(problems)
    return Experiment.model_validate(_read_whole(content))


def resolve(experiment: Experiment) -> dict[str, Any]:
    """Every setting with its value, in plain types, name first: `parse` makes an equal experiment of it."""
    content = experiment.model_dump(mode="json")
    if not experiment.code:
        del content["code"]
    return {"name": content.pop("name"), **content}


def to_yaml(experiment: Experiment) -> str:
    """`resolve` as the text of an experiment file: `load` makes an equal experiment of it."""
    return write_yaml(resolve(experiment))


def open_code(roots: object, folder: Path, content: object) -> list[str]:
    """Has modules looked for under the `roots`, and takes note of the kinds that `content` names from there.

    Returns which of the roots are no folders. What of a name is wrong, the setting that has it tells.
    """
    names = [name for name in roots if isinstance(name, str)] if isinstance(roots, list | tuple) else []
    places = {name: (folder / name).resolve() for name in names}
    code.open_roots([place for place in dict.fromkeys(places.values()) if place.is_dir()])
    for table in NAMED_AT.values():
        table.outside.clear()
    for name in filter(NAMED.fullmatch, map(code.drop_pin, _list_texts(content))):
        for table in NAMED_AT.values():
            with suppress(code.CodeError):
                table.pin(name)
    return [f"code[{i}]: {places[name]} is no folder" for i, name in enumerate(names) if not places[name].is_dir()]


def open_folders(folders: Sequence[str], content: object) -> None:
    """The same of the folders of --code, which are relative to where the command runs. Raises Mistake."""
    if missing := open_code(list(folders), Path.cwd(), content):
        raise Mistake("\n".join(f"--{text}" for text in missing))


def _list_texts(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping | list):
        for inner in content.values() if isinstance(content, Mapping) else content:
            yield from _list_texts(inner)


def parse_assignment(text: str) -> tuple[str, Any]:
    """The path and the value of `a.b=value`. Raises ValueError."""
    path, equals, right = (part.strip() for part in text.partition("="))
    if not (path and equals and right):
        raise ValueError("write a.b=value, and null for no value")
    value, problems = read_yaml(right)
    if problems:
        raise ValueError("; ".join(problems))
    return path, value


def list_values(overrides: Sequence[str]) -> list[Any]:
    """What overrides set, of those that can be read."""
    found = []
    for text in overrides:
        with suppress(ValueError):
            found.append(parse_assignment(text)[1])
    return found


def _read_whole(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file without what makes it small."""
    return {name: value for name, value in content.items() if name != "smoke"}


def _apply_smoke(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a file as its own `smoke` changes it, and which of those overrides are wrong."""
    smoke = content.get("smoke", {})
    if not isinstance(smoke, Mapping):
        return _read_whole(content), [f"smoke: {show(smoke)} is not a mapping of paths, such as {{training.steps: 4}}"]
    return _apply_overrides(_read_whole(content), [(f"smoke.{path}", path, value) for path, value in smoke.items()])


def _apply_overrides(
    content: dict[str, Any], given: Sequence[tuple[str, str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """`content` with the overrides (how each is called, its path, its value), and which of them are wrong."""
    content, taken, problems = dict(content), list[tuple[str, str, Any]](), list[str]()
    for name, path, value in given:
        try:
            content = _override(content, path, value)
            taken.append((name, path, value))
        except ValueError as mistake:
            problems.append(f"{name}: {mistake}")
    return content, problems + [
        f"{name}: without effect, as search.space sets {key} in every trial; "
        f"override search.space.{key}.grid=[...], or end its search with search.space.{key}=null"
        for name, path, value in taken
        for key, axis in parse_axes(content).items()
        if overlap(list_leaves(path, value), list_settings_set(key, axis))
    ]


def _override(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`content` with `value` at `path`, which may go through a key of search.space. Raises ValueError."""
    key = path.removeprefix("search.space.")
    if key == path:
        if path not in (known := list_paths(Experiment, own=True)):
            raise ValueError(f"unknown path{suggest_path(path, known)}")
        return dict(put(content, path.split("."), value))
    stem, _, kind = key.rpartition(".")
    if stem and kind in Axis.model_fields:
        key, value = stem, {kind: value}
    space = get_space(content)
    if value is None and key not in space:
        raise ValueError(f"{key} is not searched{suggest_path(key, list(space))}")
    space = {name: axis for name, axis in {**space, key: value}.items() if axis is not None}
    return dict(put(content, ["search", "space"], space))


def find_mistakes(content: Mapping[str, Any]) -> list[str]:
    """All mistakes in the content of an experiment file; empty if it is valid."""
    return find_experiment_mistakes(_read_whole(content)) + _find_smoke_mistakes(content)


def _find_smoke_mistakes(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with a file's `smoke`, and with the experiment that it makes beside what is wrong anyway."""
    if content.get("smoke", {}) == {}:
        return []
    small, problems = _apply_smoke(content)
    known = find_experiment_mistakes(_read_whole(content))
    return problems + [f"smoke: {text}" for text in find_experiment_mistakes(small) if text not in known]


def list_measurement_settings() -> list[str]:
    """Those of a measurement, which may be others than those of the trial that is measured."""
    paths = (path for path in list_paths(Measurement, own=True) if not path.startswith("data.encoder"))
    return [path for path in paths if path.split(".")[0] in ("seed", "data", "evaluation")]


SETTINGS = list_paths(Experiment)
