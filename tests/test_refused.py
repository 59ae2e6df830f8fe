"""A command that is refused for a mistake changes nothing that anybody reads of its sweep."""

from pathlib import Path

import pytest

from orchestrator import status, sweep
from orchestrator.state.events import find_driver


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Overrides that are refused late, where the storage is open already: Inception's weights are not there."""
    monkeypatch.setenv("ORCHESTRATOR_INCEPTION", str(tmp_path / "nothing"))
    return ["evaluation.fid.features=inception"]


def kept(storage: Path) -> dict[str, bytes]:
    files = (path for path in storage.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(storage)): path.read_bytes() for path in files}


def test_a_sweep_that_never_began_is_none(
    tiny: Path, tmp_path: Path, no_weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "runs"
    assert sweep.main([str(tiny), *no_weights, "--storage", str(storage)]) == 2
    assert "ORCHESTRATOR_INCEPTION" in capsys.readouterr().err
    assert status.main(["--storage", str(storage)]) == 2
    assert "has no sweep yet" in capsys.readouterr().err
    assert kept(storage) == {}


def test_an_edit_that_is_refused_leaves_the_sweep_as_it_was(
    own: tuple[Path, Path], no_weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, storage = own
    before = kept(storage)
    assert sweep.main([str(file), *no_weights, "--storage", str(storage)]) == 2
    assert kept(storage) == before
    capsys.readouterr()
    assert status.main(["--storage", str(storage)]) == 0
    output = capsys.readouterr().out
    assert "2 done" in output and "ended" in output and "gone" not in output


def test_one_that_is_refused_after_its_beginning_says_so() -> None:
    """As a later round of an adaptive search may be."""
    happened = [
        {"time_ms": 1000, "event": "started", "host": "here", "pid": 1, "trials": 2},
        {"time_ms": 2000, "event": "refused", "why": "a mistake"},
    ]
    assert find_driver(happened, False, [], 3000).state == "refused"
