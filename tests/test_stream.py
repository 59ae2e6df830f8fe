"""Shards that are read as they are needed: in the order of the map, in bounded room, and what is told of damage."""

import gc
import io
import itertools
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import image_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_storage
from image_files import COLOUR, LABELS, encoded, fails, pairs, write_parquet

from workers.config import DataConfig, Trial
from workers.data import mirror
from workers.data.dataset import Dataset, prepare
from workers.data.sources import describe, describe_source
from workers.data.splits import DataError
from workers.data.windows import ShardOrder
from workers.evaluation import features
from workers.evaluation.features import train_classifier
from workers.identity import compute_trial_id
from workers.learner import Learner
from workers.storage import Storage
from workers.world import World

cache = image_files.cache
endpoint = s3_storage.endpoint
own = s3_storage.own

COUNTS = (4, 7, 3, 5, 1)  # images of the shards to train on; the rest of 30 is held out
GB = 48e-9  # of one image of COLOUR, decoded


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray | None = LABELS, kind: str = "cls") -> Path:
    """As WebDataset has them, with a caption that nothing reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for row, image in enumerate(images):
            add(f"a/{row:04}.txt", b"a caption")
            add(f"a/{row:04}.png", encoded(image))
            if labels is not None:
                told = str(labels[row]) if kind == "cls" else json.dumps({"label": int(labels[row]), "id": "x"})
                add(f"a/{row:04}.{kind}", told.encode())
    return path


def write_shards(folder: Path, kind: str = "tar", test: bool = True) -> Path:
    ends = np.cumsum([0, *COUNTS, 10])
    for k, (first, end) in enumerate(itertools.pairwise(ends)):
        split = "test-0" if k == len(COUNTS) and test else f"train-{k}" if test else f"{k:05}"
        write = write_tar if kind == "tar" else write_parquet
        write(folder / f"{split}.{kind}", COLOUR[first:end], LABELS[first:end])
    return folder


def upload(storage: Storage, folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        storage.write(f"d/{path.name}", path.read_bytes())
    return storage.find_url("d")


def trial_of(data: DataConfig, **training) -> Trial:
    return Trial.model_validate(
        {
            "data": data.model_dump(),
            "model": {"channels": 8, "multipliers": [1], "blocks": 1, "attention": [], "labels": True},
            "diffusion": {"T": 10},
            "training": {"steps": 9, "batch_size": 8, "precision": "float32", **training},
        }
    )


def batches(data: Dataset, config: DataConfig, steps: range, size: int = 6) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images and labels of each step, as a training asks for them."""
    assert config.shuffle and data.train_labels is not None
    order = ShardOrder(3, data.shards, config.shuffle)
    for step in steps:
        data.expect(order.list_shards(step, size))
        rows = order.draw(step, size)
        yield data.train[rows], data.train_labels[rows]


def take(data: Dataset, name: str) -> np.ndarray:
    """The images of a shard."""
    assert data.intake
    shard = [shard.name for shard in data.intake.shards].index(name)
    return data.train[data.intake.first[shard] : data.intake.first[shard + 1]]


# ---- The order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_each_epoch_has_each_image_once_window_after_window(window: int) -> None:
    counts = (4, 7, 0, 3, 5, 1)
    first, n, size = np.cumsum([0, *counts]), sum(counts), 6
    order = ShardOrder(3, counts, window)
    drawn = [order.draw(step, size) for step in range(n)]
    for epoch in np.concatenate(drawn).reshape(size, n):
        assert sorted(epoch) == list(range(n))
        shards = (np.searchsorted(first, epoch, side="right") - 1).tolist()
        runs = list(dict.fromkeys(shards))
        spans = [range(shards.index(k), len(shards) - shards[::-1].index(k)) for k in runs]
        assert max(sum(place in span for span in spans) for place in range(n)) <= window
    assert not np.array_equal(drawn[0], order.draw(n // size * 3, size))
    for step in (7, 2, n - 1):  # by itself, whatever came before
        alone = ShardOrder(3, counts, window)
        assert np.array_equal(alone.draw(step, size), drawn[step])
        ahead = alone.list_shards(step, size)
        assert {int(k) for k in np.searchsorted(first, drawn[step], side="right") - 1} <= set(ahead)
    assert len(order._kept) <= 2 + size // min(c for c in counts if c)


# ---- The stream is the map ---------------------------------------------------------------------------------------


def test_a_stream_teaches_the_classifier_as_the_map_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its first images, piece by piece, in a room of two shards."""
    mapped = DataConfig(source=str(write_shards(tmp_path / "d", "parquet")), shuffle=1)
    here, there = (prepare(mapped.model_copy(update={"stream": room})) for room in (None, 12 * GB))
    monkeypatch.setattr(features, "READ", 3)
    whole = train_classifier(here).digest
    assert train_classifier(there).digest == whole and features.name_classifier(there) == features.name_classifier(here)
    monkeypatch.setattr(features, "TAUGHT", 8)
    first = train_classifier(here).digest
    assert train_classifier(there).digest == first != whole
    assert features.name_classifier(there).endswith("-classifier-8.npz")


def test_floats_have_a_stream_where_their_range_is_stated(tmp_path: Path) -> None:
    """Of tensors in Parquet; a value that is none ends it, by its name."""
    values, ends = np.random.RandomState(1).randn(30, 4, 4, 3).astype(np.float32), np.cumsum([0, *COUNTS, 10])

    def save(k: int, images: np.ndarray) -> None:
        name = "test-0" if k == len(COUNTS) else f"train-{k}"
        table = {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "label": LABELS[: len(images)]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")

    for k, (first, end) in enumerate(itertools.pairwise(ends)):
        save(k, values[first:end])
    ranges = [[-1, 1], [-4, 4], [0, 2]]
    config = DataConfig.model_validate({"source": str(tmp_path), "shuffle": 2, "stream": 80 * GB, "ranges": ranges})
    here, there = prepare(config.model_copy(update={"stream": None})), prepare(config)
    assert here.digest == there.digest and here.span == there.span == ((-1, -4, 0), (1, 4, 2))
    for ours, theirs in zip(batches(there, config, range(5)), batches(here, config, range(5)), strict=True):
        assert np.array_equal(ours[0], theirs[0])
    assert here.train.max() > 1 and float(here.held_out[..., 1].max()) == pytest.approx(values[20:, ..., 1].max() / 4)
    more = {"shuffle": 2, "stream": 80 * GB}
    fails(tmp_path, "state it in data.ranges, as [[low, high]] or one for each channel", **more)
    fails(
        tmp_path, "data.ranges: there are 2; give one for all values or one for each of 3", **more, ranges=((0, 1),) * 2
    )
    fails(tmp_path, "data.ranges: [1.0, 0.0] is no range; give [low, high]", **more, ranges=((1, 0),))
    values[1, 2, 3, 0] = np.nan
    save(0, values[: COUNTS[0]])
    with pytest.raises(DataError, match="row 1 has nan at row 2, column 3, channel 0; every value must be finite"):
        prepare(config).train[:]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("test", [True, False])
def test_the_rows_of_a_stream_are_those_of_the_map(tmp_path: Path, kind: str, test: bool) -> None:
    """And its id is that of the map, as are its held-out images; a third of the files where none is called test."""
    source = str(write_shards(tmp_path / "d", kind, test))
    mapped = DataConfig(source=source, shuffle=2, held_out=0.3)
    config = mapped.model_copy(update={"stream": 20 * GB})
    here, there = prepare(mapped), prepare(config)
    assert here.digest == there.digest == describe(config).digest == describe(mapped).digest
    assert np.array_equal(here.train, there.train[:])
    assert here.digest != describe(mapped.model_copy(update={"shuffle": None})).digest, "another order of images"
    assert np.array_equal(here.held_out, there.held_out)
    assert pairs(here.held_out, here.held_out_labels) == pairs(there.held_out, there.held_out_labels)
    assert here.classes and there.classes and here.classes.images == there.classes.images
    seen = []
    for ours, theirs in zip(batches(there, config, range(12)), batches(here, mapped, range(12)), strict=True):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
        seen.append(ours)
    every = pairs(there.train[:], there.train_labels)
    assert every + pairs(there.held_out, there.held_out_labels) == pairs(COLOUR, LABELS)
    assert set(pairs(*map(np.concatenate, zip(*seen, strict=True)))) == set(every)
    again = next(batches(prepare(config), config, range(7, 8)))
    assert np.array_equal(again[0], seen[7][0]), "a step by itself, as after a kill"


def test_a_training_by_a_stream_ends_in_the_weights_of_the_map(tmp_path: Path) -> None:
    source = str(write_shards(tmp_path / "d"))
    mapped = trial_of(DataConfig(source=source, shuffle=2))
    streamed = trial_of(DataConfig(source=source, shuffle=2, stream=20 * GB))

    def train(trial: Trial, *worlds: World) -> list[np.ndarray]:
        learner = Learner(trial, prepare(trial.data), World())
        for _ in range(9):
            learner.train_step()
        return [p.detach().numpy() for p in learner.module.parameters()]

    assert all(map(np.array_equal, train(mapped), train(streamed)))
    digest = describe(mapped.data).digest
    assert compute_trial_id(mapped, digest) == compute_trial_id(streamed, digest)
    others = [mapped.data.model_copy(update={"shuffle": shuffle}) for shuffle in (None, 3)]
    ids = {compute_trial_id(mapped.model_copy(update={"data": data}), digest) for data in (mapped.data, *others)}
    assert len(ids) == 3, "another order is another sequence of weights"


def test_two_workers_take_the_images_of_one(tmp_path: Path) -> None:
    trial = trial_of(DataConfig(source=str(write_shards(tmp_path / "d")), shuffle=2, stream=20 * GB))
    data = prepare(trial.data)
    learners = [Learner(trial, data, World()), *(Learner(trial, prepare(trial.data), World()) for _ in range(2))]
    for rank, learner in enumerate(learners[1:]):
        learner.world = World(rank, 2)
    for step in (0, 5, 3):
        whole, *parts = [(setattr(learner, "step", step), learner._draw_rows())[1] for learner in learners]
        assert np.array_equal(whole, np.concatenate(parts))


# ---- Room --------------------------------------------------------------------------------------------------------


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, cache: Path) -> None:
    """Files of an image each, two of them in a window, and room for five."""
    for k, image in enumerate(COLOUR):
        write_tar(tmp_path / f"d/{'test' if k == 0 else 'train'}-{max(k - 1, 0)}.tar", image[None])
    config, room = DataConfig(source=str(tmp_path / "d"), shuffle=2, stream=5 * (GB + 128e-9)), cache / "streams"
    data = prepare(config)

    def kept() -> int:
        sizes = []
        for path in room.glob("*/*"):
            with suppress(FileNotFoundError):  # a thread has renamed or removed it just now
                sizes.append(0 if path.suffix == ".lock" else path.stat().st_size)
        return sum(sizes)

    for _ in batches(data, config, range(40), 2):
        assert 0 < kept() <= (5 + 2) * (48 + 128), "a thread may hold what it has just made"
    leftover = room / "another" / "000000.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(bytes(500))
    os.utime(leftover, (0, 0))
    [_ for _ in batches(data, config, range(40, 50), 2)]
    assert not leftover.exists(), "of a process that was killed"
    fails(config.source, "data.stream: ", "4 decoded files", "up to 1.92e-07 GB", shuffle=2, stream=3 * GB)


def test_what_another_process_uses_is_not_removed(tmp_path: Path, cache: Path) -> None:
    config = DataConfig(source=str(write_shards(tmp_path / "d")), shuffle=1, stream=13 * GB)
    one, other = prepare(config), prepare(config)
    one.expect([0, 1])
    held = {int(row): one.train[np.array([row])] for row in (0, 5)}
    [_ for _ in batches(other, config, range(30))]
    assert {path.name for path in (cache / "streams").glob("*/*.npy")} >= {"000000.npy", "000001.npy"}
    assert all(np.array_equal(one.train[np.array([row])], image) for row, image in held.items())


# ---- On an object store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_stream_from_an_object_store(tmp_path: Path, cache: Path, own: Storage, kind: str, monkeypatch) -> None:
    folder = write_shards(tmp_path / "d", kind)
    url = upload(own, folder)
    mapped = DataConfig(source=str(folder), shuffle=2)
    config = DataConfig(source=url, shuffle=2, stream=24 * GB)
    read: list[str] = []
    opened = mirror.Remote.open

    def note(self, name):
        read.append(name)
        return opened(self, name)

    monkeypatch.setattr(mirror.Remote, "open", note)
    source = describe(config)
    assert (source.train, source.held_out, source.classes, source.shape) == (20, 10, 7, (4, 4, 3))
    assert " in a stream, " in describe_source(source)
    read.clear()
    assert describe(config) == source and not read, "headers are read once"
    data = prepare(config)
    for ours, theirs in zip(batches(data, config, range(5)), batches(prepare(mapped), mapped, range(5)), strict=True):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert not list(cache.rglob(f"*.{kind}")), "no shard is copied"


def test_a_shard_that_is_gone_or_another_is_told_by_its_name(tmp_path: Path, own: Storage) -> None:
    folder = write_shards(tmp_path / "d", "tar")
    config = DataConfig(source=upload(own, folder), shuffle=1, stream=24 * GB)
    digest = describe(config).digest
    data = prepare(config)
    own.write("d/train-1.tar", write_tar(tmp_path / "other.tar", COLOUR[:7]).read_bytes())
    with pytest.raises(DataError, match=r"data\.source = .*train-1\.tar has changed at s3://.*run the same command"):
        take(data, "train-1.tar")
    own.delete("d/train-2.tar")
    with pytest.raises(DataError, match=r"train-2\.tar is gone from s3://"):
        take(data, "train-2.tar")
    assert len(take(data, "train-0.tar")) == 4, "others are read"
    own.write("d/train-2.tar", (folder / "train-2.tar").read_bytes())
    assert describe(config).digest != digest


# ---- What is refused, and damage ---------------------------------------------------------------------------------


def test_what_a_stream_cannot_be(tmp_path: Path) -> None:
    fails("digits", "data.shuffle: 2 is of files, and digits has none", shuffle=2)
    image_files.write_images(tmp_path / "images", COLOUR)
    fails(tmp_path / "images", "data.shuffle: 2 is of files that hold many images each", "this is images", shuffle=2)
    write_tar(tmp_path / "one.tar", COLOUR)
    fails(tmp_path / "one.tar", "whole files are held out, and there is one", shuffle=2)


def test_a_stream_from_a_store_is_of_shards(tmp_path: Path, own: Storage) -> None:
    own.write("d/a.png", encoded(COLOUR[0]))
    fails(own.find_url("d"), "data.stream: it is of Parquet or tar files, and there are none", shuffle=1, stream=1.0)


def test_damage_is_told_by_the_name_of_the_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d")
    path, config = folder / "train-1.tar", DataConfig(source=str(folder), shuffle=1, stream=24 * GB)
    whole = path.read_bytes()
    for damaged in (whole[:3000], whole[:4096] + b"\x55" * 512 + whole[4608:]):
        path.write_bytes(damaged)
        fails(folder, "train-1.tar is damaged or cut off")
    path.write_bytes(whole)
    data = prepare(config)
    start = whole.index(b"\x89PNG") + 40
    path.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    with pytest.raises(DataError, match=r"train-1\.tar a/0000\.png is damaged"):
        take(data, "train-1.tar")
    for others in (COLOUR[:6], COLOUR[:8], COLOUR[1:8]):
        write_tar(path, others, LABELS[4:])
        with pytest.raises(DataError, match=r"train-1\.tar holds other images than when it was looked at"):
            take(data, "train-1.tar")


def test_labels_of_tar_files(tmp_path: Path) -> None:
    plain = prepare(DataConfig(source=str(write_tar(tmp_path / "plain.tar", COLOUR, None))))
    assert plain.train_labels is None and len(plain.train) == 27
    told = prepare(DataConfig(source=str(write_tar(tmp_path / "json.tar", COLOUR, LABELS, "json"))))
    assert pairs(told.train, told.train_labels) + pairs(told.held_out, told.held_out_labels) == pairs(COLOUR, LABELS)
    path = write_tar(tmp_path / "cat.tar", COLOUR, np.array(["cat"] * 30))
    fails(path, "a/0000.cls of cat.tar is 'cat'", "a whole number")


def test_a_training_image_of_another_kind_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "d/test-0.tar", image_files.GREY[:5])
    write_tar(tmp_path / "d/train-0.tar", image_files.GREY[5:10])
    write_tar(tmp_path / "d/train-1.tar", COLOUR[:5])
    data = prepare(DataConfig(source=str(tmp_path / "d"), shuffle=1, stream=24 * GB))
    assert data.shape == (4, 4, 1) and len(take(data, "train-0.tar")) == 5
    with pytest.raises(DataError, match=r"train-1\.tar a/0000\.png is in colour, and the held-out images, .* are not"):
        take(data, "train-1.tar")


def test_headers_are_read_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.data import cache as cache_folder

    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    path = write_tar(tmp_path / "d.tar", COLOUR)
    assert describe(DataConfig(source=str(path))).train == 27
    write_tar(path, COLOUR[:20])
    assert describe(DataConfig(source=str(path))).train == 18


def test_an_intake_that_nobody_holds_ends_its_threads(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_shards(tmp_path / "d")), shuffle=2, stream=24 * GB)
    before = set(threading.enumerate())
    data = prepare(config)
    data.expect([0, 1, 2])
    assert len(data.train[:1]) == 1
    started = set(threading.enumerate()) - before
    assert any(re.match("intake", thread.name) for thread in started)
    del data
    gc.collect()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()
