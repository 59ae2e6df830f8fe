"""Which code from outside has changed since a sweep was begun last, and what is made again for it: pure functions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment.records import Variant
from orchestrator.state.saved import SavedCode
from workers.identity import list_outside
from workers.layout import RowId

SAMPLER, EVALUATION = "evaluation.fid.sampler.kind", "evaluation."  # all names outside of it are of the training
Files = Mapping[str, Mapping[str, str]]  # the digest of each file, by what names are pinned to


@dataclass(frozen=True)
class CodeChange:
    """What of the code of a row is another than before, such as "my_losses.py has changed", and what it makes again."""

    made: str
    why: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.why)


def list_changes(variants: Mapping[RowId, Variant], files: Files, before: SavedCode) -> dict[RowId, CodeChange]:
    """The rows whose code has changed. Those of before are known by the values that are searched."""
    known = {_format(params): names for params, names in before.variants}
    found = {
        row: find_change(list_outside(v.trial), files, known.get(_format(v.params), {}), before.files)
        for row, v in variants.items()
    }
    return {row: change for row, change in found.items() if change}


def _format(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def find_change(
    names: Mapping[str, Sequence[str]], files: Files, before: Mapping[str, Sequence[str]], files_before: Files
) -> CodeChange | None:
    """What has changed of the code of pinned `names` by setting; a name that was not there before has not changed."""
    changed: dict[str, list[str]] = {}
    for path, pinned in names.items():
        old = dict(name.split("@", 1) for name in before.get(path, ()))
        for name, pin in (name.split("@", 1) for name in pinned):
            if name in old and old[name] != pin:
                ours, theirs = files.get(pin, {}), files_before.get(old[name], {})
                of_files = [file for file in sorted({*ours, *theirs}) if ours.get(file) != theirs.get(file)]
                told = [f"{file} has changed" for file in of_files] or [f"{old[name]} is now {pin}"]
                changed.setdefault(path, []).extend(told)
    if not changed:
        return None
    of_training, of_samples = any(not path.startswith(EVALUATION) for path in changed), SAMPLER in changed
    made = "is trained again" if of_training else "has its samples drawn again" if of_samples else "is measured again"
    return CodeChange(made, tuple(dict.fromkeys(text for texts in changed.values() for text in texts)))
