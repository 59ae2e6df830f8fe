"""Damage to files that fuzzing.py does: to any file, and to the values of a YAML text."""

import random
from collections.abc import Sequence
from pathlib import Path

ODD = [
    "", " ", "''", "null", "~", "true", "0", "-1", "1", "2", "0.5", "-0.0", "1e-400", "1e400", ".inf", "-.inf",
    ".nan", "NaN",
    "1000000000", "10000000000", "9223372036854775808", "1" + "0" * 400, "-1" + "0" * 40, "1e308", "5e-324", "0x10",
    "[]",
    "[[]]", "{}", "{a: b}", "[1, 2, 3]", "[null]", "[.nan]", "[1e999]", "all", "auto", "../..", "/dev/zero",
    "/etc/passwd",
    "a/b", "..", ".", "*", "'\\0'", "\"\\ud800\"", "\u202e\u0000",
    "é" * 200, "x" * 5000, "!!python/object:os.system", "&a [*a]",
    "*b", "? a", "<<: 1", "{<<: [1]}", "- a\n- b", "%", "@", "`", "|", ">", "#", "{grid: [1, 2]}", "{grid: []}",
    "{choice: [1]}",
    "{uniform: [0, 1]}", "{int_uniform: [0, " + "9" * 400 + "]}", "{loguniform: [1e-308, 1e308]}", "2026-02-30",
    "1:30", "0o17",
    "s3://", "s3://[", "http://[::1", "file:///", "hf://a/b", "://", "?", "https://127.0.0.1:1/x",
]  # fmt: skip
FOREIGN = [
    b"", b"\n", b"\0" * 64, b"null", b"[]", b"{}", b"0", b'"text"', b"{", b"[" * 100_000, b"NaN", b'{"a": 1e999}',
    b"\xff\xfe\x00",
    b"<html><body>502 Bad Gateway</body></html>", b"PK\x03\x04 a zip", b"PAR1" * 9, b"\x89PNG\r\n\x1a\n",
    b"SQLite format 3\0",
    b"%!PS-Adobe-3.0\n(x) show", b"\x1f\x8b\x08\0", b"\x93NUMPY\x01\x00v\x00{'descr'", b"a: &a [*a]\n", b"x\n" * 1000,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b'{"name": "other", "trials": {}}',
    b"version https://git-lfs.github.com/spec/v1\noid",
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """What was done to the content of a file, and the new one; None where the file is deleted."""
    at = rng.randrange(len(content)) if content else 0
    match rng.choice(
        ["bit", "bit", "bits", "cut", "cut", "empty", "foreign", "deleted", "zeros", "line", "number", "tail"]
    ):
        case "bit" if content:
            flipped = bytearray(content)
            flipped[at] ^= 1 << (bit := rng.randrange(8))
            return f"bit {bit} of byte {at} flipped", bytes(flipped)
        case "bits" if content:
            flipped = bytearray(content)
            for place in (rng.randrange(len(content)) for _ in range(rng.randrange(2, 40))):
                flipped[place] = rng.randrange(256)
            return "random bytes", bytes(flipped)
        case "cut" if content:
            return f"cut to {at} of {len(content)} bytes", content[:at]
        case "zeros" if content:
            return f"zeros from {at}", content[:at] + b"\0" * min(4096, len(content) - at) + content[at + 4096 :]
        case "line" if content.count(b"\n") > 1:
            lines = content.splitlines(keepends=True)
            k = rng.randrange(len(lines))
            new = rng.choice([[], [lines[k]] * 2, [rng.choice(lines)], [rng.choice(FOREIGN)[:200] + b"\n"]])
            return f"line {k} replaced by {len(new)} of others", b"".join([*lines[:k], *new, *lines[k + 1 :]])
        case "number" if places := [i for i, byte in enumerate(content[:100_000]) if 48 <= byte < 58]:
            k = rng.choice(places)
            digit = rng.choice([b"9", b"0", b"-1", b"1e9", b"99999999999", b"null", b"x", b'"1"', b"1.5", b"1e999"])
            return f"a digit at {k} is {digit!r}", content[:k] + digit + content[k + 1 :]
        case "tail":
            return "goes on", content + rng.choice(FOREIGN)[:5000]
        case "deleted":
            return "deleted", None
        case "foreign":
            return "foreign", rng.choice(FOREIGN)
    return "empty", b""


def damage(path: Path, rng: random.Random, others: Sequence[Path] = ()) -> str:
    """Does something to a file, and says what; `others` are what may lie in its place."""
    if rng.random() < 0.2:
        return f"{path.name}: {_replaced(path, rng, [o for o in others if o.suffix == path.suffix and o != path])}"
    how, content = damaged(path.read_bytes(), rng)
    path.unlink()  # it may be a link to the undisturbed one
    if content is not None:
        path.write_bytes(content)
    return f"{path.name}: {how}"


def _replaced(path: Path, rng: random.Random, others: Sequence[Path]) -> str:
    content = rng.choice(others).read_bytes() if others else b"{}"
    path.unlink()
    match rng.choice(["folder", "dangling", "loop", "other", "other", "other"]):
        case "folder":
            path.mkdir()
            return "a folder"
        case "dangling":
            path.symlink_to("nowhere")
            return "a link to nowhere"
        case "loop":
            path.symlink_to(path.name)
            return "a link to itself"
    path.write_bytes(content)
    return "another file of its kind"


def edited(text: str, rng: random.Random) -> tuple[str, bytes]:
    """A YAML text with some of its values replaced, or damaged as any file."""
    if rng.random() < 0.4:
        how, content = damaged(text.encode(), rng)
        return how, content or b""
    words, done = text, []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [i for i, c in enumerate(words) if c == ":" and words[i + 1 : i + 2] == " "]
        i = rng.choice(places)
        end = min((k for k in (words.find(c, i + 2) for c in ",}\n]") if k > 0), default=len(words))
        new = rng.choice(ODD)
        done.append(f"{words[max(0, i - 12) : i].strip()!r} = {new[:60]!r}")
        words = f"{words[: i + 2]}{new}{words[end:]}"
    return "; ".join(done), words.encode(errors="surrogatepass")
