"""What names say of splits, classes and shards: `workers.data.splits`, without a file."""

import pytest

from workers.data.splits import DataError, arrange_images, arrange_shards, show_name, split_name


def images(*folders: str, each: int = 3) -> list[str]:
    return sorted(f"{folder}/{k}.png".lstrip("/") for folder in folders for k in range(each))


def refused(read, names: list[str], *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(names)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "rest"),
    [
        ("Train", "train", ""),
        ("TRAINING", "train", ""),
        ("training_set", "train", "set"),
        ("train2017", "train", "2017"),
        ("trainA", "train", "a"),
        ("seg_test", "test", "seg"),
        ("Test-Images", "test", "images"),
        ("val", "validation", ""),
        ("dev", "validation", ""),
        ("held_out", "validation", ""),
        ("held-out", "validation", ""),
        ("trains", None, "trains"),
        ("contest", None, "contest"),
        ("train_val", None, "train_val"),
        ("n01440764", None, "n01440764"),
    ],
)
def test_the_split_that_a_name_speaks_of(name: str, split: str | None, rest: str) -> None:
    assert split_name(name) == (split, rest)


PAIRS = [("train", "test"), ("train", "val"), ("train", "valid"), ("training", "testing"), ("Train", "Test"),
         ("TRAIN", "Validation"), ("training_set", "test_set"), ("seg_train", "seg_test"), ("train2017", "val2017"),
         ("train", "dev"), ("train", "eval"), ("train", "held_out"), ("trainA", "testA")]  # fmt: skip


@pytest.mark.parametrize("above", ["", "data/", "set/data/"])
@pytest.mark.parametrize(("train", "held_out"), PAIRS)
def test_splits_and_classes_wherever_they_are(above: str, train: str, held_out: str) -> None:
    train, held_out = above + train, above + held_out
    names = images(f"{train}/cat", f"{train}/dog", f"{held_out}/cat", f"{held_out}/dog")
    found = arrange_images(names)
    assert found.train == images(f"{train}/cat", f"{train}/dog")
    assert found.held_out == images(f"{held_out}/cat", f"{held_out}/dog")
    assert found.labels == {name: int("/dog/" in name) for name in names}
    assert found.where == (f"{train}/", f"{held_out}/") and not found.warnings


def test_splits_inside_of_each_class_and_wrapped_ones() -> None:
    found = arrange_images(names := images("cat/train", "cat/test", "dog/train", "dog/test"))
    assert found.train == images("cat/train", "dog/train") and found.held_out == images("cat/test", "dog/test")
    assert found.labels == {name: int(name.startswith("dog")) for name in names} and found.where == (
        "*/train/",
        "*/test/",
    )
    found = arrange_images(images("t/train/train/a", "t/train/train/b", "t/test/test/a", "t/test/test/b"))
    assert sorted(set(found.labels.values())) == [0, 1] and not found.warnings
    found = arrange_images(images("train/only", "test/only"))
    assert found.held_out == images("test/only") and found.labels == {}


def test_without_a_split_folders_are_classes() -> None:
    for above in ("", "images/", "train/"):
        found = arrange_images(images(f"{above}cat", f"{above}dog"))
        assert found.held_out is None and sorted(found.labels.values()) == [0, 0, 0, 1, 1, 1] and not found.warnings
    found = arrange_images(images("cat", "train_station", "test_tube"))
    assert found.held_out is None and len(set(found.labels.values())) == 3
    assert "test_tube/, train_station/ are taken for classes" in found.warnings[0]
    assert arrange_images(images("")).labels == {} and not arrange_images(images("")).warnings
    found = arrange_images([*images("cat", "dog"), "loose.png"])
    assert found.labels == {} and "1 of 7 images are in no class's folder (such as loose.png)" in found.warnings[0]


def test_what_lies_beside_the_splits_is_left_out_with_a_word() -> None:
    found = arrange_images([*images("train", "test", "val", "extra"), "loose.png"])
    assert found.train == images("train") and found.held_out == images("test")
    assert found.warnings == (
        "left out: 1 image beside train/ and test/",
        "left out: 3 images in extra/, as it is neither train/ nor test/",
        "left out: 3 images in val/, as test/ is what is held out",
    )
    assert arrange_images(images("train/a", "train/val", "test/a")).warnings[0].startswith("train/val/ is trained on")
    assert "not trained on: bird" in arrange_images(images("train/a", "train/b", "val/a", "val/bird")).warnings[0]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["test"], ["all images lie in test/"]),
        (["data/val/cat", "data/val/dog"], ["all images lie in val/", "path of data/val/"]),
        (["test", "val"], ["test/", "no train/ beside it"]),
        (["train/cat", "train/dog", "archive/test"], ["archive/test/", "no train/ beside it, only train/"]),
        (["cat/a/val", "dog/a"], ["cat/a/val/"]),
        (["test", "cat", "dog"], ["test/", "only cat/, dog/"]),
        (["train", "val", "valid"], ["train/, val/, valid/", "give the path"]),
        (["train", "Training", "test"], ["Training/, test/, train/"]),
        (["trainA", "trainB", "testA", "testB"], ["testA/, testB/, trainA/, trainB/"]),
        (["cat/train", "cat/test", "dog"], ["cat/", "others"]),
        (["cat/train", "cat/test", "dog/train", "dog/val"], ["cat/, dog/"]),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(folders: list[str], words: list[str]) -> None:
    refused(arrange_images, images(*folders), *words)


def shards(split: str, numbers: list[int], count: int) -> list[str]:
    return [f"{split}-{k:05}-of-{count:05}.parquet" for k in numbers]


def test_parquet_files_by_their_names_and_folders() -> None:
    train, test = shards("train", [0, 1], 2), shards("test", [0], 1)
    for above in ("", "data/"):
        names = [above + name for name in (*test, *train)]
        found = arrange_shards(sorted(names))
        assert found.train == [above + n for n in train] and found.held_out == [above + n for n in test]
        assert not found.warnings
    found = arrange_shards(["default/test/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet"])
    assert found.train == ["default/train/0000.parquet", "default/train/0001.parquet"] and found.held_out
    assert arrange_shards(["a.parquet", "b.parquet"]).train == ["a.parquet", "b.parquet"]
    found = arrange_shards([*train, *test, "validation.parquet", "other.parquet"])
    assert found.held_out == test
    assert [w.split(",")[0] for w in found.warnings] == ["left out: validation.parquet", "left out: other.parquet"]


def test_shards_that_are_missing() -> None:
    refused(arrange_shards, shards("train", [0, 1, 3], 5), "missing: 2, 4, of 5 in all")
    refused(arrange_shards, [*shards("train", [0], 1), *shards("test", [0], 2)], "shards of test", "missing: 1")
    refused(arrange_shards, [*shards("train", [0], 2), *shards("train", [1], 3)], "of 2 and of 3")
    refused(arrange_shards, ["a/train-0.parquet", "b/train-0.parquet"], "several data sets: a/, b/")
    refused(arrange_shards, ["test-0.parquet"], "test-0.parquet but no train-*.parquet")
    assert not arrange_shards(shards("train", [1, 2], 2)).warnings, "counted from 1"
    assert "missing: 2" in arrange_shards([f"train-{k}.parquet" for k in (0, 1, 3)]).warnings[0]
    [warning] = arrange_shards(["train-0.parquet", f"train-{10**20}.parquet"]).warnings
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9 and 1 more" in warning


def test_names_stay_on_one_line() -> None:
    assert show_name("a b é 世.png") == "a b é 世.png"
    assert show_name("a\nb") == r"'a\nb'" and show_name("\udcff.png") == r"'\udcff.png'"
