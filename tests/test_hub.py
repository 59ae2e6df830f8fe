"""Repositories of data as the Hugging Face hub lays them out, from their names and the metadata of their README.md."""

import json
from pathlib import Path

import image_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import COLOUR, LABELS, check, encoded, fails, warnings_of, write_parquet

from workers.config import DataConfig
from workers.data.dataset import prepare
from workers.data.hub import choose_config
from workers.data.sources import describe
from workers.data.splits import DataError

cache = image_files.cache

SEVERAL = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: test
    path: ["small/test-*"]
- config_name: large
  data_dir: large
dataset_info:
- config_name: small
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': zero
          '1': one
          '10': ten
          '2': two
- config_name: large
  features: []
---
# A data set
"""
NAMES = ["README.md", "large/data.parquet", "small/test-0.parquet", "small/train-0.parquet", "small/train-1.parquet"]


def test_a_config_is_chosen_by_its_name() -> None:
    small = choose_config(NAMES, SEVERAL, "small")
    assert small.names == ["small/train-0.parquet", "small/train-1.parquet", "small/test-0.parquet"]
    assert list(small.splits.values()) == ["train", "train", "test"]
    assert small.classes == {"label": ("zero", "one", "two", "ten")} and not small.warnings
    large = choose_config(NAMES, SEVERAL, "large")
    assert large.names == ["large/data.parquet"] and not large.splits and not large.classes


def test_the_default_is_taken_and_told() -> None:
    found = choose_config(
        NAMES, SEVERAL.replace("config_name: large\n  data_dir", "config_name: default\n  data_dir"), None
    )
    assert found.names == ["large/data.parquet"]
    assert found.warnings == ("its data set default is taken; data.config names another of small",)
    marked = SEVERAL.replace("config_name: small\n  data_files", "config_name: small\n  default: true\n  data_files")
    assert len(choose_config(NAMES, marked, None).names) == 3


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("train-*", ["train-0.parquet"]),
        ("**/*.parquet", ["a/b/train-1.parquet", "a/train-2.parquet", "train-0.parquet"]),
        ("a/*.parquet", ["a/train-2.parquet"]),
        ("a/**", ["a/b/train-1.parquet", "a/train-2.parquet"]),
        ("train-[0-1].parquet", ["train-0.parquet"]),
        ("./a/train-?.parquet", ["a/train-2.parquet"]),
    ],
)
def test_patterns_are_those_of_the_hub(pattern: str, matches: list[str]) -> None:
    names = ["a/b/train-1.parquet", "a/train-2.parquet", "train-0.parquet"]
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n"
    assert sorted(choose_config(names, readme, None).names) == matches


@pytest.mark.parametrize(
    ("readme", "wanted", "words"),
    [
        (SEVERAL, None, ["it has several data sets, small, large; set data.config to one of them"]),
        (SEVERAL, "smal", ["data.config: it has no data set 'smal'; did you mean small?", "small, large"]),
        (SEVERAL.replace("small/train-*", "tiny/*"), "small", ["the split train of small is tiny/*", "no file has"]),
        (SEVERAL.replace("data_dir: large", "data_dir: huge"), "large", ["large is in huge/, where no file is"]),
        ("---\nconfigs: [\n---\n", None, ["metadata at the head of README.md are no YAML"]),
        ("", "tiny", ["data.config: it has no data set 'tiny'; there is large, small"]),
    ],
)
def test_what_cannot_be_chosen_is_told(readme: str, wanted: str | None, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        choose_config(NAMES, readme, wanted)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("readme", ["", "# A page\n\n---\nconfigs: none\n---\n", "---\nlicense: mit\n---\n"])
def test_without_metadata_all_files_are_one_data_set(readme: str) -> None:
    assert choose_config(NAMES, readme, None).names == NAMES
    assert choose_config(NAMES, readme, "small").names == NAMES[2:]


def test_splits_of_other_names_are_left_out_and_a_single_one_is_trained_on() -> None:
    readme = "---\nconfigs:\n- config_name: a\n  data_files: {train: a-*, unlabeled: b-*, validation: c-*}\n---\n"
    found = choose_config(["a-0.parquet", "b-0.parquet", "c-0.parquet"], readme, None)
    assert found.splits == {"a-0.parquet": "train", "c-0.parquet": "validation"}
    assert found.warnings == ("left out: the split unlabeled",)
    one = choose_config(["test-0.tar"], "---\nconfigs:\n- data_files: [{split: full, path: '*'}]\n---\n", None)
    assert one.splits == {"test-0.tar": "train"}


def test_a_folder_is_read_by_its_metadata(tmp_path: Path) -> None:
    """Files whose names say nothing, or something else."""
    folder = tmp_path / "d"
    write_parquet(folder / "x/0.parquet", COLOUR[:20])
    write_parquet(folder / "x/1.parquet", COLOUR[20:], LABELS[20:])
    write_parquet(folder / "y/0.parquet", COLOUR[:5])
    readme = "---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: train, path: x/0.parquet}\n"
    readme += "  - {split: test, path: x/1.parquet}\n- config_name: y\n  data_dir: y\n"
    names = "{'0': a, '1': b, '2': c, '3': d, '4': e, '5': f, '6': g}"
    readme += "dataset_info:\n  config_name: x\n  features:\n"
    readme += f"  - name: label\n    dtype: {{class_label: {{names: {names}}}}}\n"
    (folder / "README.md").write_text(f"{readme}---\n# It\n")
    fails(folder, "it has several data sets, x, y; set data.config")
    data = prepare(DataConfig(source=str(folder), config="x"))
    check(data, COLOUR)
    assert data.class_names == tuple("abcdefg")
    assert describe(DataConfig(source=str(folder), config="y")).train == 4
    assert "left out" not in warnings_of(folder, config="x")


def test_folders_of_several_data_sets(tmp_path: Path) -> None:
    for config, part in (("en", slice(0, 20)), ("fr", slice(20, 30))):
        write_parquet(tmp_path / f"d/{config}/train-00000-of-00001.parquet", COLOUR[part])
        write_parquet(tmp_path / f"d/{config}/test-00000-of-00001.parquet", COLOUR[:5])
    fails(tmp_path / "d", "Parquet files of several data sets: en/, fr/", "set data.config to the name of its folder")
    fails(tmp_path / "d", "has no data set 'e'", "there is en, fr", config="e")
    found = describe(DataConfig(source=str(tmp_path / "d"), config="fr"))
    assert (found.train, found.held_out) == (10, 5)
    write_parquet(tmp_path / "one.parquet", COLOUR)
    fails(tmp_path / "one.parquet", "data.config: en is of a folder", config="en")


def write_features(path: Path, features: dict, columns: dict) -> Path:
    """Parquet as Hugging Face's datasets writes it, with its features in the schema's metadata."""
    table = pa.table(columns)
    told = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": told}), path)
    return path


def test_columns_are_known_by_their_features(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(image), "path": None} for image in COLOUR]
    kind = {"_type": "ClassLabel", "names": list("abcdefg")}
    features = {"pixels": {"_type": "Image"}, "digit": kind, "n": {"dtype": "int64", "_type": "Value"}}
    columns = {"n": np.arange(30), "digit": LABELS, "pixels": cells}
    path = write_features(tmp_path / "d.parquet", features, columns)
    data = prepare(DataConfig(source=str(path)))
    assert data.class_names == tuple("abcdefg") and len(data.train) == 27
    every = image_files.pairs(data.train, data.train_labels) + image_files.pairs(data.held_out, data.held_out_labels)
    assert every == image_files.pairs(COLOUR, LABELS)
    write_features(path, {**features, "coarse": kind}, {**columns, "coarse": LABELS % 2})
    assert "columns digit, coarse are all of classes; call one label" in warnings_of(path)
    assert not describe(DataConfig(source=str(path))).labelled


def test_folders_of_images_go_by_their_names_and_not_against_the_metadata(tmp_path: Path) -> None:
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 30)), ("more", slice(0, 3))):
        image_files.write_images(tmp_path / "d" / name, COLOUR[part], LABELS[part])
    readme = "---\nconfigs:\n- config_name: a\n  data_files: {train: 'train/**', test: '%s/**'}\n---\n"
    (tmp_path / "d/README.md").write_text(readme % "test")
    check(prepare(DataConfig(source=str(tmp_path / "d"))), COLOUR)
    (tmp_path / "d/README.md").write_text(readme % "more")
    fails(tmp_path / "d", "README.md says that more/", "is of the split test, and the names of folders do not")
