"""The kinds of records that settings are: what is common to them, and how a kind from outside adds to one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from workers.code import CodeError, drop_pin
from workers.entries import Entry, Kinds, Reads, call, is_outside
from workers.syntax import NAMED

OWN_ONLY = "own only"


class Record(BaseModel):
    """Settings that belong together. `READS` declares which of them each choice of another one reads.

    By the field that chooses and by its choices ("null" and "a number" where it is none of a few words), in the order
    in which they govern. A field that stands in none of the lists is always read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    READS: ClassVar[Mapping[str, Mapping[str, tuple[str, ...]]]] = {}

    def find_foreign(self) -> dict[str, tuple[str, ...]]:
        """See `OpenRecord`."""
        return {}

    @classmethod
    def find_fields(cls, content: object = None) -> dict[str, FieldInfo]:
        """Its settings by name; `content` is what a file says of it, or a record."""
        return dict(cls.model_fields)


class OpenRecord(Record):
    """A record to whose settings the kinds that it names from outside add their own, which stand beside the others.

    Those of kinds that the file names elsewhere, but not here, are foreign. They are checked, and stay where a search
    may choose those kinds; validated with the context OWN_ONLY a record is without them.
    """

    model_config = ConfigDict(extra="allow")

    @classmethod
    def find_fields(cls, content: object = None) -> dict[str, FieldInfo]:
        get = content.get if isinstance(content, Mapping) else lambda name: getattr(content, name, None)
        found: dict[str, FieldInfo] = {}
        for field, table in cls._list_tables():
            chosen = [entry for kind, (entry, _) in table.outside.items() if get(field) in (kind, drop_pin(kind))]
            for entry in [*(entry for entry, _ in table.outside.values()), *chosen]:
                found |= entry.own_fields
        return {**found, **cls.model_fields}

    @classmethod
    def _list_tables(cls) -> list[tuple[str, Kinds[Entry]]]:
        return [(field, reads.table) for field, reads in cls.READS.items() if isinstance(reads, Reads)]

    def find_foreign(self) -> dict[str, tuple[str, ...]]:
        """Settings that only kinds which are not chosen have, each with these."""
        tables = self._list_tables()
        own = {setting for field, table in tables for setting in table[getattr(self, field)].own_fields}
        outside = [(drop_pin(kind), entry) for _, table in tables for kind, (entry, _) in table.outside.items()]
        foreign = (self.model_extra or {}).keys() - own
        return {name: tuple(kind for kind, entry in outside if name in entry.own_fields) for name in sorted(foreign)}

    @model_validator(mode="after")
    def _take_own_settings(self, info: ValidationInfo) -> "OpenRecord":
        extra = self.__pydantic_extra__
        assert extra is not None
        given, taken, foreign = dict(extra), dict[str, Any](), dict[str, Any]()
        tables = [table for _, table in self._list_tables()]
        for field, table in self._list_tables():
            if is_outside(name := getattr(self, field)):
                entry = table[name]
                _check_fits(entry, drop_pin(name), type(self))
                content = {setting: given.pop(setting) for setting in entry.own_fields if setting in given}
                taken |= dict(_validate(name, entry.own_record.model_validate, content)) if entry.settings else {}
        outside = [(kind, entry) for table in tables for kind, (entry, _) in table.outside.items()]
        for setting in list(given):
            owners = [(kind, entry.own_record) for kind, entry in outside if setting in entry.own_fields]
            if owners:
                _check_any(owners, setting, given[setting])
                foreign[setting] = given.pop(setting)
        if given:
            lines = [
                InitErrorDetails(type="extra_forbidden", loc=(name,), input=value) for name, value in given.items()
            ]
            raise ValidationError.from_exception_data(type(self).__name__, lines)
        extra.clear()
        extra.update(taken if info.context == OWN_ONLY else {**foreign, **taken})
        return self


def _validate(kind: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """Raises ValidationError, and CodeError where a validator of somebody's own raises something else."""
    wrong: list[ValidationError] = []

    def validate() -> Any:
        try:
            return check(*arguments)
        except ValidationError as error:
            wrong.append(error)

    found = call(kind, validate)
    if wrong:
        raise wrong[0]
    return found


def _check_any(owners: Sequence[tuple[str, type[BaseModel]]], setting: str, value: Any) -> None:
    """Raises ValidationError where none of the kinds that have a setting of this name takes the value."""
    wrong: list[ValueError] = []
    for kind, record in owners:
        try:
            _validate(kind, record.__pydantic_validator__.validate_assignment, record.model_construct(), setting, value)
            return
        except (ValidationError, CodeError) as error:
            wrong.append(error)
    raise wrong[0]


def _check_fits(entry: Entry, name: str, record: type[Record]) -> None:
    """Raises ValueError where a kind declares settings that the record has, or reads some that it lacks."""
    if twice := sorted(entry.own_fields.keys() & record.model_fields):
        raise ValueError(f"{name}: {record.__name__} has a setting {twice[0]!r} already; rename it")
    if unknown := sorted(set(entry.reads) - set(record.model_fields)):
        raise ValueError(f"{name}: reads {unknown}, which {record.__name__} lacks; declare them in `settings`")


class NameOf:
    """Of a setting whose values are the names of a table's kinds: it also takes `module:NAME`, and pins names."""

    def __init__(self, table: Kinds[Any], takes_settings: bool = False) -> None:
        self.table, self.takes_settings = table, takes_settings

    def check(self, name: Any, is_listed: Callable[[Any], Any]) -> Any:
        if isinstance(name, str) and is_outside(name):
            pinned = self.table.pin(name)
            if self.table[pinned].settings and not self.takes_settings:
                raise ValueError(f"{name!r} has settings, which a {self.table.entry_type.__name__} cannot have")
            return pinned
        if not isinstance(name, str):
            return is_listed(name)
        is_listed(drop_pin(name))
        return self.table.pin(name)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": f"^{NAMED.pattern}$"}]}
