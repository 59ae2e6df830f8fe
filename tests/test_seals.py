"""Seals: any single fault of a file shows, and of lines the others are kept."""

import json
from contextlib import suppress

import pytest

from workers import seals

CONTENT = {"metrics": {"eval/nll_bpd": 2.5, "n": 3}, "values": [1.25, 2.0], "none": None, "text": "ε"}
LINES = [{"step": i, "time_ms": 7, "metrics": {"a": i / 3, "b": None}} for i in range(4)]


def faults(whole: bytes) -> list[bytes]:
    """Every byte changed, in three ways, and every end cut off."""
    flipped = [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (1, 32, 128)]
    return [*flipped, *(whole[:i] for i in range(len(whole)))]


@pytest.mark.parametrize(
    ("seal", "open_", "content"),
    [
        (lambda c, of: json.dumps(seals.seal_json(c, of), indent=2).encode(), seals.open_json, CONTENT),
        (seals.seal_text, seals.open_text, "name: a\nü: 1\n"),
        (seals.seal_bytes, seals.open_bytes, b"\x00PK\xff" * 9),
    ],
)
def test_a_fault_is_damage_or_changes_nothing(seal, open_, content):
    whole = seal(content, "a/b")
    assert open_(whole, "a/b") == content
    for faulty in faults(whole):
        with suppress(seals.Damage):
            assert open_(faulty, "a/b") == content  # such as another white space of JSON
    for other, place in ((whole, "a/c"), (b"", "a/b")):
        with pytest.raises(seals.Damage):
            open_(other, place)


@pytest.mark.parametrize("foreign", [b"[1, 2]", b"3", b"{}", b'{"seal": "0"}', b"[" * 100_000, b"\xff\xfe", b"null"])
def test_foreign_json_is_damage(foreign):
    with pytest.raises(seals.Damage):
        seals.open_json(foreign, "a")
    assert seals.open_lines(foreign, "a") == seals.Lines([], "1 of its 1 lines are damaged")


def test_lines_come_back_and_are_plain_json_lines():
    whole = seals.seal_lines(LINES, "a")
    assert seals.open_lines(whole, "a") == seals.Lines(LINES)
    assert [json.loads(line)["step"] for line in whole.splitlines()[:-1]] == [0, 1, 2, 3]
    assert seals.open_lines(seals.seal_lines([], "a"), "a") == seals.Lines([])


def test_a_fault_in_lines_shows_and_costs_a_line():
    whole = seals.seal_lines(LINES, "a")
    for faulty in faults(whole):
        found = seals.open_lines(faulty, "a")
        if found.damage:
            assert all(line in LINES for line in found.whole)
        else:
            assert found.whole == LINES
    for i in range(len(whole)):
        flipped = seals.open_lines(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :], "a")
        assert len(flipped.whole) >= 2  # at worst the end of a line, which joins it to the next


def test_lines_that_are_missing_doubled_or_swapped_are_damage():
    first, second, *rest = seals.seal_lines(LINES, "a").splitlines(keepends=True)
    for lines in ([second, *rest], [first, first, second, *rest], [second, first, *rest], [first, second, *rest[:-1]]):
        assert seals.open_lines(b"".join(lines), "a").damage
    end = rest[-1]
    assert seals.open_lines(b"".join([first, second, *rest, end]), "a").damage


def test_lines_of_before_are_taken_only_where_all_are():
    old = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    known = lambda line: line.keys() == {"step", "time_ms", "metrics"}  # noqa: E731
    assert seals.open_lines(old, "a", known) == seals.Lines(LINES)
    assert seals.open_lines(old, "a").damage and seals.open_lines(old[:-9], "a", known).damage
    mixed = seals.seal_lines(LINES[:2], "a") + old
    assert seals.open_lines(mixed, "a", known).damage
