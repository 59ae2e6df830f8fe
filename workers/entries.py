"""Entries of kinds and their tables: what one says, and how those from outside and their settings join the others."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, create_model
from pydantic.fields import FieldInfo

from workers import code
from workers.code import Bundle, CodeError, describe_error, drop_pin
from workers.syntax import NAMED


class BrokenPackage(ValueError):
    """An installed package brings kinds and cannot be used; without it, what a file names would be something else.

    It is raised by the import of this module or of `workers.config`, where no command can catch it yet:
    `orchestrator.interrupts` prints it and ends the command with this status.
    """

    import_status = 2


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A kind: its function, what it is in a phrase, and the settings of its section that it reads.

    `settings` declares those that the section lacks without it: by name, each as (type, pydantic's Field), or as a
    record of pydantic's. `function` is "module:name", or of a kind from outside what this would name.
    """

    function: Any
    about: str
    reads: tuple[str, ...] = ()
    settings: Mapping[str, tuple[Any, Any]] | type[BaseModel] | None = None
    outdated: str = ""  # why it can be read and not called: another version of its package is installed

    def load(self) -> Any:
        """Raises CodeError."""
        if self.outdated:
            raise CodeError(self.outdated)
        return load(self.function)

    @cached_property
    def own_record(self) -> type[BaseModel]:
        """The record of its own settings."""
        if isinstance(self.settings, type):
            return self.settings
        form: dict[str, Any] = dict(self.settings or {})
        strict = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
        return create_model("Settings", __config__=strict, **form)

    @property
    def own_fields(self) -> dict[str, FieldInfo]:
        return dict(self.own_record.model_fields) if self.settings else {}


@dataclass(frozen=True)
class Named:
    """The "module:name" of an entry from outside, whose module may be one of its bundle."""

    bundle: Bundle
    function: str

    def __str__(self) -> str:
        return self.function

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(code.import_from(self.bundle if module in self.bundle.modules else None, module), name)


def load(function: Any) -> Any:
    """What "module:name" names; anything that is no name is itself. Raises CodeError for one from outside."""
    if isinstance(function, Named):
        return function.load()
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def call(name: str, function: Any, *arguments: Any) -> Any:
    """What a function of the kind `name` returns. Raises CodeError where one from outside raises anything."""
    try:
        return load(function)(*arguments)
    except CodeError:
        raise
    except Exception as error:
        if not is_outside(name):
            raise
        raise CodeError(describe_error(error, drop_pin(name))) from error


def ask(name: str, check: Any, *arguments: Any) -> list[str]:
    """The mistakes that the check of a kind tells, and of one from outside also that it fails; none without a check."""
    if not check:
        return []
    try:
        return [str(text) for text in call(name, lambda: list(load(check)(*arguments)))]
    except CodeError as error:
        return [f"{drop_pin(name)}: {error}"]


def is_outside(name: str) -> bool:
    """Whether a kind's name is "module:NAME"."""
    return ":" in name


E = TypeVar("E", bound=Entry)
M = TypeVar("M", bound=BaseModel)
_registering = ""  # the package, NAME-VERSION, that kinds come from just now


@contextmanager
def register_for(package: str) -> Iterator[None]:
    """Kinds that come to a table in the block are those of an installed package, NAME-VERSION."""
    global _registering
    _registering = package
    try:
        yield
    finally:
        _registering = ""


class Kinds(dict[str, E], Generic[E]):
    """Entries by name, those from outside by their pinned names. Raises ValueError where a name is taken.

    Of one from outside KeyError is raised as CodeError. Only ours, and those of entry points, are listed.
    """

    def __init__(self, entries: Mapping[str, E]) -> None:
        super().__init__(entries)
        self.entry_type = type(next(iter(entries.values())))
        self.packages: dict[str, str] = {}  # NAME-VERSION, of the kinds that installed packages have registered
        self.outside: dict[str, tuple[E, Bundle | None]] = {}  # those that were named, by their pinned names

    def __setitem__(self, name: str, entry: E) -> None:
        if name in self:
            raise ValueError(f"two kinds are called {name!r}: {self[name].function} and {entry.function}")
        super().__setitem__(name, entry)
        if _registering:
            self.packages[name] = _registering

    def __missing__(self, name: str) -> E:
        bare, _, pinned = name.partition("@")
        if is_outside(bare):
            return self._open(name if pinned else code.pin(name))
        if not pinned or bare not in self:
            raise KeyError(name)
        return _mark_outdated(self[bare], bare, pinned, self.packages.get(bare, ""))

    def _open(self, name: str) -> E:
        """The entry of a pinned name. Raises CodeError."""
        bare, _, pinned = name.partition("@")
        is_bundled = code.is_digest(pinned)
        if name in self.outside:
            entry, bundle = self.outside[name]
            if not is_bundled or bundle is code.find_bundle(pinned):
                return entry
        entry, bundle = code.find_object(name)
        if not isinstance(entry, self.entry_type):
            kind, wanted = type(entry).__name__, self.entry_type.__name__
            raise CodeError(f"{bare!r}: {code.locate(name)} is of the type {kind}, and a {wanted} belongs here")
        if bundle:
            values = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name != "about"}
            named = {n: v for n, v in values.items() if isinstance(v, str) and NAMED.fullmatch(v)}
            for function in named.values():
                code.check_there(bundle, function, code.locate(name))
            changes: dict[str, Any] = {n: Named(bundle, function) for n, function in named.items()}
            entry = replace(entry, **changes)
        else:
            entry = _mark_outdated(entry, bare, pinned, code.find_distribution(bare.partition(":")[0]))
        self.outside[name] = entry, bundle
        return entry

    def pin(self, name: str) -> str:
        """The name as ids have it: with what tells the code of one that is not ours apart. Raises CodeError."""
        if is_outside(name):
            pinned = code.pin(name)
            assert self[pinned]
            return pinned
        bare = code.drop_pin(name)
        return f"{bare}@{self.packages[bare]}" if name == bare and bare in self.packages else name

    @property
    def reads(self) -> "Reads":
        """The settings that each reads, as `Record.READS` has them."""
        return Reads(self)

    def list_names(self, wanted: Callable[[E], bool]) -> str:
        """The names of the entries that are wanted, as the end of an advice."""
        return " or ".join(sorted(name for name, entry in self.items() if wanted(entry)))


def _mark_outdated(entry: E, name: str, pinned: str, installed: str) -> E:
    if pinned == installed:
        return entry
    return replace(entry, outdated=f"{name}: asked for of {pinned}, and {installed or 'no such package'} is installed")


class Reads(Mapping[str, tuple[str, ...]]):
    """The settings that each kind of a table reads, with those that the table does not list."""

    def __init__(self, table: Kinds[Any]) -> None:
        self.table = table

    def __getitem__(self, name: str) -> tuple[str, ...]:
        entry = self.table[name]
        return (*entry.reads, *entry.own_fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def add_settings_of(*tables: Kinds[Any]) -> Callable[[type[M]], type[M]]:
    """Adds to a record the settings that entries of these tables declare. Raises BrokenPackage where that cannot be."""

    def add(record: type[M]) -> type[M]:
        found: dict[str, Any] = {}
        for name, entry in (item for table in tables for item in table.items()):
            for setting, field in entry.own_fields.items():
                if setting in record.model_fields or setting in found:
                    raise BrokenPackage(
                        f"{entry.function}: {record.__name__} has a setting {setting!r} already; rename it"
                    )
                found[setting] = (field.annotation, field)
            if unknown := set(entry.reads) - set(record.model_fields):
                missing = f"reads {sorted(unknown)}, which {record.__name__} lacks"
                raise BrokenPackage(f"{entry.function} ({name}) {missing}; mend or uninstall its package")
        if not found:
            return record
        more: dict[str, Any] = {"__doc__": record.__doc__, "__module__": record.__module__, **found}
        return create_model(record.__name__, __base__=record, **more)

    return add
