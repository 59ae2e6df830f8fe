"""What every command writes to its terminal may be lost; the work is not.

What a terminal's encoding lacks is written otherwise; a reader that leaves (`| head`), a full disk behind `>` or a
stream that was closed (`>&-`) ends the writing and not the command, whose exit status says how its work went.
"""

import codecs
import io
import os
import sys
from typing import Any

# What stands for a sign that an encoding lacks; any other is written as its number, such as \u2713.
PLAIN = {"±": "+-", "≈": "~", "×": "x", "·": "|", "–": "-", "…": "...", "é": "e"}
NAMES = {1: "stdout", 2: "stderr"}


def open_streams() -> None:
    """Puts streams in the place of stdout and stderr that take every text and never fail."""
    codecs.register_error("plain", _replace_characters)
    for number in (0, 1, 2):  # one that is closed would be the next file that is opened, which prints then go into
        try:
            os.fstat(number)
        except OSError:
            _point_nowhere(number)
    for number, name in NAMES.items():
        before: io.TextIOWrapper | None = getattr(sys, name)
        if before is not None:
            before.flush()
        raw = _Output(number, "wb", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="plain",
            line_buffering=before is None or before.line_buffering,
            write_through=before is not None and before.write_through,
        )
        setattr(sys, name, stream)


def is_read() -> bool:
    """Whether there may still be somebody who reads stdout."""
    return _find_loss() is None


def is_written() -> bool:
    """Whether all that was printed is written. That nobody reads it (`| head`) is no failure."""
    sys.stdout.flush()
    return isinstance(_find_loss(), BrokenPipeError | None)


def _find_loss() -> OSError | None:
    """Why stdout cannot be written any more; None where it can."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Output) else None


class _Output(io.FileIO):
    """Where a stream's bytes go, until they cannot: from then on they go nowhere."""

    lost: OSError | None = None

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.lost = error
            _point_nowhere(self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                print(f"stdout cannot be written ({error.strerror}); the work goes on without it", file=sys.stderr)
            return len(content)


def _point_nowhere(number: int) -> None:
    """Has a file descriptor take what is written and give it to nobody; child processes inherit it so."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    os.set_inheritable(number, True)
    if null != number:
        os.close(null)


def _replace_characters(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for a character that an encoding lacks; a byte of a file's name that is no text as it was."""
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode(), error.start + 1
