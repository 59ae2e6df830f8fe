"""The journal: the first value of a point stands, and a journal opened again goes on."""

import json

from workers.journal import Journal
from workers.storage import Storage


def lines(storage: Storage) -> list[dict]:
    return [json.loads(line) for line in storage.read("trials/a/journal.jsonl").decode().splitlines()]


def test_a_point_that_is_there_is_not_written_again(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.metrics(1, {"train/lr": 0.5, "train/eps_mse": 1.0})
    journal.metrics(1, {"train/lr": 9.0})
    journal.metrics(1, {"train/lr": 9.0, "valid/nll_bpd": 3.0})
    journal.flush()
    assert [line["metrics"] for line in lines(storage)] == [
        {"train/lr": 0.5, "train/eps_mse": 1.0},
        {"valid/nll_bpd": 3.0},
    ]
    assert journal.get(1, "train/lr") == 0.5 and journal.get(2, "train/lr") is None


def test_a_journal_opened_again_continues(tmp_path):
    storage = Storage(tmp_path)
    first = Journal(storage, "trials/a")
    first.metrics(1, {"train/lr": 0.1 + 0.2})
    first.flush()
    first.metrics(2, {"train/lr": 0.25})  # not flushed: lost with its process
    second = Journal(storage, "trials/a")
    assert second.get(1, "train/lr") == 0.1 + 0.2 and second.get(2, "train/lr") is None
    second.metrics(1, {"train/lr": 9.0})
    second.metrics(2, {"train/lr": 0.125})
    second.flush()
    assert [(line["step"], line["metrics"]["train/lr"]) for line in lines(storage)] == [(1, 0.1 + 0.2), (2, 0.125)]
    assert all(line["time_ms"] > 0 for line in lines(storage))


def test_an_image_lies_beside_the_journal_and_the_first_stands(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.image(500, "samples", b"first")
    journal.image(500, "samples", b"second")
    journal.flush()
    (line,) = lines(storage)
    assert (line["step"], line["image"]) == (500, "samples")
    assert storage.read(line["path"]) == b"first"
    assert Journal(storage, "trials/a").get(500, "samples") == line["path"]


def test_flushing_again_changes_nothing(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.metrics(1, {"train/lr": 0.5})
    journal.flush()
    before = storage.read("trials/a/journal.jsonl")
    Journal(storage, "trials/a").flush()
    assert storage.read("trials/a/journal.jsonl") == before
