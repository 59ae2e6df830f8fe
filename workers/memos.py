"""Memos: what the cache remembers of files, so that they need not be read again. JSON, believed only as it was written.

A memo is sealed (`workers.seals`). One that is damaged is told, in a line that names it, and is as good as none: all
that memos hold can be made again.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from workers import seals

log = logging.getLogger(__name__)


def recall(memo: Path, tell: bool = True) -> Any:
    """What was written there; None where there is nothing, or where it is damaged, which is told."""
    try:
        return seals.open_json(memo.read_bytes(), memo.name).get("content")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except seals.Damage as damage:
        if tell:
            log.warning("%s is damaged: %s; what it holds is made again", memo, damage)
        return None


def remember(memo: Path, content: Any) -> None:
    """Writes a memo, whole or not at all. A cache that cannot be written costs time, not the answer."""
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write(memo, content)


def write(memo: Path, content: Any) -> None:
    """Raises OSError where it cannot be written."""
    temporary = memo.with_name(f".{memo.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(seals.seal_json({"content": content}, memo.name)))
        temporary.replace(memo)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path) -> list[int]:
    """What changes when a file does, or when a link to it is pointed elsewhere: also where size and time stay.

    Size, time of change, time of any change of these (which no program can set), device and number of the file.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
