"""Which settings are read, and the ids that are made of them.

A record declares, for each field that chooses, which of its other fields each choice reads (`Record.READS`). That one
declaration decides everywhere: a setting that nothing reads is refused (`orchestrator.experiment.check`), counts in no
id, and is not shown. One serializer (`collect_settings_read`) makes ids. A setting counts in an id from the first
value on that is not its default, so a setting that comes later moves no id; where a default or what the code computes
changes, `TRAINING_VERSION` or `evaluation.blocks.VERSION` is raised.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from workers.code import drop_pin
from workers.config import Measurement, Record, SamplerConfig, Trial
from workers.kinds import NAMED_AT
from workers.layout import TrialId
from workers.seals import compute_digest as compute_digest
from workers.warm_start import list_models, split_pin

TRAINING_VERSION = (
    1  # of what training computes from given settings; tests/test_recorded_losses.py says when to raise it
)

# Settings of `training` that place or observe a run and leave its weights as they are. How far it is trained is in no
# id either (`steps`): a trial is the whole sequence of its weights, unless the learning rate depends on the last step.
PLACING = ("workers", "cpus", "gpus", "validate_every", "checkpoint_every")


def list_outside(settings: Any) -> dict[str, tuple[str, ...]]:
    """The pinned names of kinds that are not ours, by the setting that has them; of a record or of what one dumps."""
    found = {}
    for path in NAMED_AT:
        value = settings
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        names = tuple(name for name in ([value] if isinstance(value, str) else value or ()) if "@" in name)
        if names:
            found[path] = names
    return found


class Unread(NamedTuple):
    """A setting of a record that its present choices do not read."""

    name: str
    chooser: str  # the field whose choice does not read it
    choice: str
    reads: tuple[str, ...]  # what that choice reads
    readers: tuple[str, ...]  # the choices that would read it


def get_choice(record: Record, field: str) -> str:
    """What is chosen, as `Record.READS` names it."""
    value = get_setting(record, field)
    return value if isinstance(value, str) else "null" if value is None else "a number"


def get_setting(record: Record, path: str) -> Any:
    """What is at a dotted path; None below a section that is null."""
    value: Any = record
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def find_unread(record: Record) -> list[Unread]:
    """The fields of the record itself that nothing reads, whatever their values: what several choices can read is read
    where one of them does."""
    found, read = dict[str, Unread](), set[str]()
    for field, choices in record.READS.items():
        choice = get_choice(record, field)
        reads = () if field in found.keys() - read else choices[choice]
        read.update(reads)
        for name in dict.fromkeys(name for names in choices.values() for name in names):
            if name not in reads:
                readers = tuple(other for other, names in choices.items() if name in names)
                found[name] = Unread(name, field, drop_pin(choice), tuple(reads), readers)
    return [one for name, one in found.items() if name not in read]


def list_own_unread(record: Record, where: str = "") -> Iterator[tuple[str, Any, Unread]]:
    """(dotted path, value, why) of every setting of the record itself that is set and not read."""
    unread = find_unread(record)
    inside = {one.name for one in unread for other in unread if one.name.startswith(f"{other.name}.")}
    for one in (one for one in unread if one.name not in inside):
        above, _, name = one.name.rpartition(".")
        section = get_setting(record, above) if above else record
        is_there = section is not None and name in type(section).model_fields
        value = getattr(section, name) if is_there else None
        if value is not None and value != type(section).model_fields[name].get_default():
            yield f"{where}{one.name}", value, one
    for name, readers in record.find_foreign().items():
        chooser = next(iter(record.READS))
        choice = get_choice(record, chooser)
        why = Unread(name, chooser, drop_pin(choice), tuple(record.READS[chooser][choice]), readers)
        yield f"{where}{name}", (record.model_extra or {})[name], why


def list_unread(record: Record, where: str = "") -> Iterator[tuple[str, Any, Unread]]:
    """The same of the record and of those inside it."""
    yield from list_own_unread(record, where)
    for name, value in record:
        if isinstance(value, Record):
            yield from list_unread(value, f"{where}{name}.")


def collect_settings_read(record: Record, only_set: bool = False) -> dict[str, Any]:
    """The settings that are read, by name, in plain types; `only_set` leaves out those at their defaults."""
    left_out, content = {one.name for one in find_unread(record)}, {}
    defaults = _collect_defaults(type(record)) if only_set else {}
    own = record.model_extra or {}  # of kinds from outside
    if own and only_set:
        fields = {name: field for name, field in record.find_fields(record).items() if name in own}
        values = {n: f.get_default(call_default_factory=True) for n, f in fields.items() if not f.is_required()}
        defaults = {**defaults, **{name: _make_plain(value) for name, value in values.items()}}
    for name in (*type(record).model_fields, *own):
        if name not in left_out:
            value = getattr(record, name)
            plain = _collect_section(value, only_set) if isinstance(value, Record) else _make_plain(value)
            inner = [path.removeprefix(f"{name}.") for path in left_out if path.startswith(f"{name}.")]
            plain = _leave_out(plain, inner, only_set) if inner else plain
            if name not in defaults or plain != defaults[name]:
                content[name] = plain
    return content


def _leave_out(content: Any, paths: Sequence[str], only_set: bool) -> Any:
    """Plain settings without those at dotted paths, and with `only_set` without sections of which nothing is left."""
    if not isinstance(content, dict):
        return content
    found = {}
    for name, value in content.items():
        inner = [path.removeprefix(f"{name}.") for path in paths if path.startswith(f"{name}.")]
        kept = _leave_out(value, inner, only_set) if inner else value
        if name not in paths and not (only_set and inner and kept == {}):
            found[name] = kept
    return found


def describe_evaluation(m: Measurement) -> dict[str, Any]:
    """What is measured, in plain types, as ids have it."""
    content: dict[str, Any] = collect_settings_read(m, only_set=True).get("evaluation", {})
    return content


def describe_sampler(sampler: SamplerConfig) -> dict[str, Any]:
    """The settings of a sampler for a passport, without the scale of a guidance that there is none of."""
    left_out = {"guidance"} if sampler.guidance is None else set()
    return {name: value for name, value in collect_settings_read(sampler).items() if name not in left_out}


@lru_cache(maxsize=1024)
def _collect_section(record: Record, only_set: bool) -> dict[str, Any]:
    """`collect_settings_read`, once for all of the thousands of trials that share a section; not to be changed."""
    return collect_settings_read(record, only_set)


@lru_cache
def _collect_defaults(kind: type[Record]) -> dict[str, Any]:
    """What each setting of a record is by default, as `collect_settings_read` has it."""
    optional = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    values = {name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    return {
        n: collect_settings_read(v, only_set=True) if isinstance(v, Record) else _make_plain(v)
        for n, v in values.items()
    }


def _make_plain(value: Any) -> Any:
    """A setting as JSON has it."""
    match value:
        case BaseModel():
            return value.model_dump(mode="json")
        case list() | tuple():
            return [_make_plain(item) for item in value]
        case dict():
            return {name: _make_plain(item) for name, item in value.items()}
    return value


def compute_trial_id(trial: Trial, data_digest: str) -> TrialId:
    """The id of a trial: the digest of what changes its weights.

    The data count by their content (`data_digest`), not by the path that they lie at.
    """
    content = collect_settings_read(trial, only_set=True)
    content.pop("evaluation", None)
    order = {} if trial.data.shuffle is None else {"shuffle": trial.data.shuffle}
    content["data"] = {"digest": data_digest, "flip": trial.data.flip, **order}
    training = trial.training
    of_length = () if training.decay != "none" or training.cooldown_steps else ("steps", "cooldown")
    content["training"] = {n: v for n, v in content["training"].items() if n not in (*PLACING, *of_length)}
    for slot, model in list_models(trial).items():
        section, _, name = slot.partition(".")
        pin = split_pin(model.source)[1]
        assert pin, f"{slot}.source: {model.source} is not pinned"
        read = {**collect_settings_read(model, only_set=True), "source": pin}
        read.pop("latents", None)  # which follow from it
        content[section] = {**content[section], name: read}
    if training.cooldown_steps:  # however it is said
        content["training"]["cooldown"] = training.cooldown_steps
    return TrialId(compute_digest([TRAINING_VERSION, content]))
