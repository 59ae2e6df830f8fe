"""What a storage keeps of sweeps and trials: read as far as it is whole, and of whichever sweep says how to measure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stored_sweep import SOURCE

from orchestrator import status
from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse
from orchestrator.experiment.records import Experiment
from orchestrator.state.events import EventLog, read_events
from orchestrator.state.saved import keep_sweep, keep_trial, open_trial
from workers.config import DataConfig, Mistake
from workers.layout import RowId
from workers.storage import Storage

EVENTS = "sweeps/small/events.jsonl"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def happened(storage: Storage) -> list[str]:
    return [event["event"] for event in read_events(storage, "small")]


@pytest.fixture
def eventful(storage: Storage) -> Storage:
    events = EventLog(storage, "small")
    events.add("started", host="here", pid=1)
    events.add("began", "a" * 16, step=0, cpus=1, gpus=0)
    events.add("ended")
    events.flush()
    return storage


def test_events_come_back_and_go_on(eventful: Storage) -> None:
    again = EventLog(eventful, "small")
    again.add("started", host="there", pid=2)
    again.flush()
    assert happened(eventful) == ["started", "began", "ended", "started"]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda content: content[:-20], ["started", "began", "ended"]),  # the line that counts them
        (lambda content: content[: content.index(b'"ended"')], ["started", "began"]),
        (lambda content: content.replace(b'"pid": 1', b'"pid": 2'), ["began", "ended"]),
        (lambda content: content + b'{"time_ms": 1, "event": "failed"}\n', ["started", "began", "ended"]),
        (lambda content: b"\x00\xff\xfe" * 50, []),
        (lambda content: b"", []),
    ],
)
def test_events_are_read_as_far_as_they_are_whole(
    eventful: Storage, caplog: pytest.LogCaptureFixture, damage: Any, left: list[str]
) -> None:
    damaged = damage(eventful.read(EVENTS))
    eventful.write(EVENTS, damaged)
    assert happened(eventful) == left and "events.jsonl is damaged" in caplog.text
    events = EventLog(eventful, "small")
    events.add("started", host="here", pid=3)
    events.flush()
    assert happened(eventful) == [*left, "started"]
    assert eventful.read(f"{EVENTS}.damaged") == damaged


def experiment(name: str, evaluation: Mapping[str, Any]) -> Experiment:
    content = {"name": name, "data": {"source": "digits"}, "training": {"steps": 10, "batch_size": 8}}
    return parse({**content, "evaluation": evaluation, "search": {"metric": "valid/nll_bpd"}})


def keep(storage: Storage, name: str, evaluation: Mapping[str, Any]) -> None:
    of = experiment(name, evaluation)
    [variant] = expand(of)
    keep_sweep(storage, of, {RowId("a" * 16): variant}, {DataConfig(source="digits"): SOURCE})
    keep_trial(storage, "a" * 16, variant.trial)


NOTHING = {"nll": None, "fid": None}


def test_a_trial_is_measured_as_a_sweep_asks_that_measures_something(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    keep(storage, "b", {"nll": {"images": 20}, "fid": None})
    keep(storage, "a", NOTHING)
    assert open_trial(storage, "a" * 16).evaluation.nll.images == 20
    assert "is measured as" not in caplog.text
    keep(storage, "c", {"nll": {"images": 30}, "fid": None})
    assert open_trial(storage, "a" * 16).evaluation.nll.images == 20
    assert "is measured as the sweep b asks; otherwise ask c" in caplog.text
    storage.write("sweeps/b/sweep.json", b"{}")
    assert open_trial(storage, "a" * 16).evaluation.nll.images == 30


def test_without_its_sweeps_a_trial_has_its_own_file(storage: Storage) -> None:
    keep(storage, "a", {"nll": {"images": 20}, "fid": None})
    path = f"trials/{'a' * 16}/trial.yaml"
    content = storage.read(path)
    storage.delete("sweeps")
    assert open_trial(storage, "a" * 16).evaluation.nll.images == 20
    storage.write(path, content.replace(b"images: 20", b"images: 21"))
    with pytest.raises(Mistake, match=r"trial\.yaml is damaged"):
        open_trial(storage, "a" * 16)
    keep(storage, "a", NOTHING)  # written again, and from then on left as it is
    whole = storage.read(path)
    keep(storage, "b", {"nll": {"images": 20}, "fid": None})
    assert storage.read(path) == whole != content


def test_a_sweep_that_cannot_be_read_hides_no_other(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        keep(storage, name, NOTHING)
    content = storage.read("sweeps/b/sweep.json")
    for damaged in (content[:-9], content.replace(b'"metric"', b'"metrio"'), b"[]", b"", b"\xff"):
        storage.write("sweeps/b/sweep.json", damaged)
        assert status.main(["--storage", storage.root]) == 0
        out = capsys.readouterr().out
        assert "sweeps/b/sweep.json is damaged; run the same sweep command again" in out
        assert all(any(line.startswith(name) for line in out.splitlines()) for name in ("a", "c"))
        assert status.main(["b", "--storage", storage.root]) == 2
        assert "sweeps/b/sweep.json is damaged" in capsys.readouterr().err
        assert status.main(["--json", "--storage", storage.root]) == 0
        assert [sweep["name"] for sweep in json.loads(capsys.readouterr().out)["sweeps"]] == ["a", "c"]
