"""The journal: the first value of a point stands, and a journal opened again goes on."""

from workers.journal import Journal, is_whole, read_image, read_points, restore
from workers.storage import Storage


def lines(storage: Storage) -> list[dict]:
    return read_points(storage, "trials/a")


def test_a_point_that_is_there_is_not_written_again(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.add_metrics(1, {"train/lr": 0.5, "train/eps_mse": 1.0})
    journal.add_metrics(1, {"train/lr": 9.0})
    journal.add_metrics(1, {"train/lr": 9.0, "valid/nll_bpd": 3.0})
    journal.flush()
    assert [line["metrics"] for line in lines(storage)] == [
        {"train/lr": 0.5, "train/eps_mse": 1.0},
        {"valid/nll_bpd": 3.0},
    ]
    assert journal.get(1, "train/lr") == 0.5 and journal.get(2, "train/lr") is None


def test_a_journal_opened_again_continues(tmp_path):
    storage = Storage(tmp_path)
    first = Journal(storage, "trials/a")
    first.add_metrics(1, {"train/lr": 0.1 + 0.2})
    first.flush()
    first.add_metrics(2, {"train/lr": 0.25})  # not flushed: lost with its process
    second = Journal(storage, "trials/a")
    assert second.get(1, "train/lr") == 0.1 + 0.2 and second.get(2, "train/lr") is None
    second.add_metrics(1, {"train/lr": 9.0})
    second.add_metrics(2, {"train/lr": 0.125})
    second.flush()
    assert [(line["step"], line["metrics"]["train/lr"]) for line in lines(storage)] == [(1, 0.1 + 0.2), (2, 0.125)]
    assert all(line["time_ms"] > 0 for line in lines(storage))


def test_an_image_lies_beside_the_journal_and_the_first_stands(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.add_image(500, "samples", b"first")
    journal.add_image(500, "samples", b"second")
    journal.flush()
    (line,) = lines(storage)
    assert (line["step"], line["image"]) == (500, "samples")
    assert storage.read(line["path"]) == b"first"
    assert Journal(storage, "trials/a").get(500, "samples") == line["path"]


def test_flushing_again_changes_nothing(tmp_path):
    storage = Storage(tmp_path)
    journal = Journal(storage, "trials/a")
    journal.add_metrics(1, {"train/lr": 0.5})
    journal.flush()
    before = storage.read("trials/a/journal.jsonl")
    Journal(storage, "trials/a").flush()
    assert storage.read("trials/a/journal.jsonl") == before


def written(storage: Storage) -> bytes:
    journal = Journal(storage, "trials/a")
    for step in range(1, 7):
        journal.add_metrics(step, {"train/lr": step / 3, "train/eps_mse": 1.0})
        if step == 3:
            checkpoint = journal.make_content()
    journal.add_image(6, "samples", b"png")
    journal.flush()
    return checkpoint


def test_a_cut_journal_keeps_the_lines_that_are_whole_and_its_checkpoint_s(tmp_path):
    storage = Storage(tmp_path)
    copy = written(storage)
    content, points = storage.read("trials/a/journal.jsonl"), read_points(storage, "trials/a")
    assert is_whole(storage, "trials/a")
    storage.write("trials/a/journal.jsonl", content[:-20])  # the line that says how many there are
    assert not is_whole(storage, "trials/a") and read_points(storage, "trials/a") == points
    assert "7 points up to step 6 were found again, 3 of them in its checkpoint" in restore(storage, "trials/a", copy)
    assert storage.read("trials/a/journal.jsonl") == content
    assert storage.read("trials/a/journal.jsonl.damaged") == content[:-20]
    half = content.index(b'"step": 2')
    storage.write("trials/a/journal.jsonl", content[half + 20 :])  # its first two lines
    assert [point["step"] for point in read_points(storage, "trials/a")] == [3, 4, 5, 6, 6]
    restore(storage, "trials/a", copy)
    assert storage.read("trials/a/journal.jsonl") == content


def test_a_deleted_journal_is_that_of_its_checkpoint(tmp_path):
    storage = Storage(tmp_path)
    copy = written(storage)
    storage.delete("trials/a/journal.jsonl")
    assert "was deleted; 3 points up to step 3 were found again" in restore(storage, "trials/a", copy)
    assert [point["step"] for point in read_points(storage, "trials/a")] == [1, 2, 3]
    storage.delete("trials/a/journal.jsonl")
    assert "0 points were found again" in restore(storage, "trials/a", None) and is_whole(storage, "trials/a")


def test_a_journal_of_another_trial_is_not_taken_for_its_own(tmp_path):
    storage = Storage(tmp_path)
    written(storage)
    storage.write("trials/b/journal.jsonl", storage.read("trials/a/journal.jsonl"))
    assert read_points(storage, "trials/b") == [] and not is_whole(storage, "trials/b")


def test_an_image_with_a_changed_byte_or_gone_is_left_out(tmp_path):
    storage = Storage(tmp_path)
    written(storage)
    point = read_points(storage, "trials/a")[-1]
    assert read_image(storage, point) == b"png"
    storage.write(point["path"], b"pnG")
    assert read_image(storage, point) is None
    storage.delete(point["path"])
    assert read_image(storage, point) is None
