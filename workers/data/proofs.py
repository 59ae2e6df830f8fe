"""Whether a prepared data set is whole: its files are read through once, and that is noted.

Those of a big data set are read through once on each machine until they change or it boots, all others once a process.
"""

import logging
from pathlib import Path
from typing import Any

from workers.memos import hash_file, read_state, recall, remember

BIG = 2**30  # bytes from which on a prepared data set is proven once on a machine, not in each process
log = logging.getLogger(__name__)
_proven: set[tuple[Any, ...]] = set()  # files that this process has read through, by what the file system says of them


def is_whole(folder: Path, tell: bool = True) -> bool:
    """Whether the prepared data set is there as it was written. What is damaged is told, in a line that names it."""
    meta = recall(folder / "meta.json", tell) or {}
    if meta and meta["digest"] != folder.name:
        if tell:
            log.warning("%s is that of another data set: it is decoded again", folder / "meta.json")
        return False
    sums: dict[str, str] = meta.get("files", {})
    states = {name: read_state(folder / name) for name in sums if (folder / name).exists()}
    keys = {name: (str(folder / name), *state, sums[name]) for name, state in states.items()}
    proof = _name_proof(folder)
    if states and states.keys() == sums.keys() and recall(proof) == [_read_boot_id(), states]:
        return True
    for name in sums:
        if name not in keys or (keys[name] not in _proven and hash_file(folder / name) != sums[name]):
            if tell:
                log.warning("%s is %s: it is decoded again", folder / name, "damaged" if name in keys else "gone")
            return False
    if sums:
        note_whole(folder, states, sums)
    return bool(sums)


def note_whole(folder: Path, states: dict[str, list[int]], sums: dict[str, str]) -> None:
    """What was read through is not read again by this process; of a big data set, by none until the next boot."""
    _proven.update((str(folder / name), *state, sums[name]) for name, state in states.items())
    if sum(size for size, *_ in states.values()) >= BIG:
        remember(_name_proof(folder), [_read_boot_id(), states])


def _name_proof(folder: Path) -> Path:
    return folder.parent.parent / "proofs" / f"{folder.name}.json"


def _read_boot_id() -> str:
    """An id of the time since this machine was started, where the kernel has one."""
    place = Path("/proc/sys/kernel/random/boot_id")
    return place.read_text().strip() if place.exists() else ""
