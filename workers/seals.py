"""Seals: what is kept carries a sha256 of itself and of its place, and is believed only where it goes with both.

The place (`of`) is the path below the root of the storage: a file that was sealed for another place is as good as a
damaged one. Five forms, by what is sealed; everybody else still reads the file as what it is:

    JSON      a key `seal` beside the others
    lines     JSON lines, each with a `seal`, then a line {"lines": n, "seal": ...} that says that none is missing
    text      a last line `# sha256 ...`, a comment to YAML
    Parquet   the sum before the footer, among what readers find by the footer's offsets
    bytes     a mark and the sum after the last byte

Pure functions. Whoever reads decides what follows from damage: what can be made again is made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEAL = "seal"
COMMENT = "# sha256 "
MARK = b"\nsha256 "
SUM_BYTES = 32


class Damage(ValueError):
    """The bytes are not those that were sealed; the message says how that shows."""


def compute_digest(content: Any) -> str:
    """16 hex digits of the sha256 of `content` (anything JSON can hold), independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- JSON ------------------------------------------------------------------------------------------------------


def seal_json(content: Mapping[str, Any], of: str) -> dict[str, Any]:
    """The same content with its seal."""
    assert SEAL not in content
    return {**content, SEAL: _compute_sum(content, of)}


def open_json(text: bytes | str, of: str) -> dict[str, Any]:
    """What `seal_json` sealed, read from its text. Raises Damage."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damage(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or SEAL not in content:
        raise Damage("it has no seal (an older version wrote it, or it was changed)")
    if content.pop(SEAL) != _compute_sum(content, of):
        raise Damage("it does not go with the sha256 in it")
    return content


def _compute_sum(content: Mapping[str, Any], of: str) -> str:
    """Of the content as JSON gives it back, whatever its spaces and the order of its keys."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return _compute_sha256(of, text.encode()).hex()


def _compute_sha256(of: str, content: bytes) -> bytes:
    return hashlib.sha256(of.encode() + b"\0" + content).digest()


# ---- Lines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """The lines of a file that are whole, without their seals, and what is wrong with the file; empty if nothing."""

    whole: Sequence[dict[str, Any]]
    damage: str = ""


def seal_lines(lines: Iterable[Mapping[str, Any]], of: str) -> bytes:
    """JSON lines, in their order, with the seals of each and of all."""
    sealed = [{**line, SEAL: _compute_sum(line, of)[:16]} for line in lines]
    end = {"lines": len(sealed), SEAL: _compute_line_sum([line[SEAL] for line in sealed])}
    return "".join(json.dumps(line) + "\n" for line in [*sealed, end]).encode()


def open_lines(content: bytes, of: str, unsealed: Callable[[Mapping[str, Any]], bool] = lambda line: False) -> Lines:
    """What `seal_lines` sealed. Of a damaged file, every line that is whole by itself.

    `unsealed` knows the lines of versions that did not seal them: a file of these alone is taken as it is.
    """
    whole: list[dict[str, Any]] = []
    seals: list[str] = []
    old: list[dict[str, Any]] = []
    count, end = 0, ""
    for text in content.splitlines():
        count, end = count + 1, ""
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict):
            continue
        seal = line.pop(SEAL, None)
        if set(line) == {"lines"}:
            end = str(seal) if line["lines"] == count - 1 else ""
        elif seal is None and unsealed(line):
            old.append(line)
        elif seal == _compute_sum(line, of)[:16]:
            whole.append(line)
            seals.append(seal)
    if old and len(old) == count:
        return Lines(old)
    if end == _compute_line_sum(seals) and len(whole) == count - 1:
        return Lines(whole)
    lost = count - len(whole) - bool(end)
    how = f"{lost} of its {count} lines are damaged" if lost else "its end is missing"
    return Lines(whole, how if count else "it is empty")


def _compute_line_sum(seals: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(seals).encode()).hexdigest()[:16]


# ---- Text, Parquet, bytes --------------------------------------------------------------------------------------


def seal_text(text: str, of: str) -> bytes:
    """A text of whole lines, and after it the comment."""
    return f"{text}{COMMENT}{_compute_sha256(of, text.encode()).hex()}\n".encode()


def open_text(content: bytes, of: str) -> str:
    """What `seal_text` sealed. Raises Damage."""
    try:
        text, comment, found = content.decode().rpartition(COMMENT)
    except UnicodeDecodeError as error:
        raise Damage(f"it is not text ({error})") from error
    if not comment or found != _compute_sha256(of, text.encode()).hex() + "\n":
        raise Damage("it does not go with the sha256 at its end")
    return text


def seal_parquet(content: bytes, of: str) -> bytes:
    """A Parquet file with a sha256 of all its bytes: Parquet's own leave out the names and types of the columns."""
    footer = _find_footer(content)
    return content[:footer] + _compute_sha256(of, content) + content[footer:]


def open_parquet(content: bytes, of: str) -> bytes:
    """The file itself, which any reader opens. Raises Damage."""
    footer = _find_footer(content)
    if content[footer - SUM_BYTES : footer] != _compute_sha256(of, content[: footer - SUM_BYTES] + content[footer:]):
        raise Damage("its bytes are not those of the sha256 in it")
    return content


def _find_footer(content: bytes) -> int:
    """Where the footer of a Parquet file begins: its length is in the four bytes before the last four."""
    return max(SUM_BYTES, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))


def seal_bytes(content: bytes, of: str) -> bytes:
    return content + MARK + _compute_sha256(of, content)


def open_bytes(content: bytes, of: str) -> bytes:
    """What `seal_bytes` sealed. Raises Damage."""
    whole, mark = content[: -SUM_BYTES - len(MARK)], content[-SUM_BYTES - len(MARK) : -SUM_BYTES]
    if mark != MARK or content[-SUM_BYTES:] != _compute_sha256(of, whole):
        raise Damage("it does not go with the sha256 at its end")
    return whole
