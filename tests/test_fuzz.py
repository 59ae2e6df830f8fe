"""A minute of damaged and foreign input: see fuzzing.py, which also says how a finding is made again."""

import time
from pathlib import Path

import fuzzing
import pytest
from fuzzing import fuzz, wrong
from outcome import Outcome, Prepared
from preparation import prepare_all

SEED, TRY_S = 0, 50.0


@pytest.mark.faults
def test_whatever_is_read_is_proven_or_told(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    tries, found = fuzz(prepare_all(finished[1], tmp_path), SEED, TRY_S)
    assert tries > 10
    assert not found, "\n".join(f"--seed {SEED} --only {f.number}  {f.what}\n    {f.why}" for f in found)


# ---- The fuzzer itself finds what it looks for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (Outcome(0, "fine", {"nll": 1.0}, ["a.json"]), ""),
        (Outcome(2, "a.json is damaged"), ""),
        (Outcome(0, "a.json is damaged: made again", {"nll": 2.0}, ["a.json"]), ""),
        (Outcome(0, "fine", {"nll": 2.0}, ["a.json"]), "other numbers without a word"),
        (Outcome(3, "alarm"), "status 3"),
        (Outcome(1, " \n"), "without a word"),
        (Outcome(1, "Traceback (most recent call last):\n  File"), "a traceback is told"),
    ],
)
def test_how_a_command_may_end(outcome: Outcome, why: str) -> None:
    found = wrong(outcome, {"status": {"nll": 1.0}}, "status after a.json: cut")
    assert why in found and bool(why) == bool(found)


def crashes() -> Outcome:
    raise KeyError("a")


def hangs() -> Outcome:
    time.sleep(60)
    return Outcome(0)


def believes() -> Outcome:
    return Outcome(0, str(len(bytearray(fuzzing.MEMORY + 2**30))))


@pytest.mark.parametrize(
    ("ran", "why"), [(crashes, "KeyError at"), (hangs, "hangs for 1 s"), (believes, "MemoryError at")]
)
def test_a_crash_a_hang_and_a_claim_that_is_believed_are_found(
    ran: object, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 1.0)
    monkeypatch.setattr(fuzzing, "KINDS", (lambda rng, here, prepared: ("x", ran),))
    _, [first, *_] = fuzz(Prepared(tmp_path, tmp_path, {}), 0, 3)
    assert first.number == 0 and first.why.startswith(why)
