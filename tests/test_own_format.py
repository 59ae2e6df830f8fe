"""A format of data from outside: what it finds is data as ours are, its code is in the id, its mistakes are told."""

import shutil
from pathlib import Path

import image_files
import numpy as np
import pytest
from conftest import ROOT
from image_files import pairs

from orchestrator.experiment.load import load
from orchestrator.experiment.records import Experiment, ExperimentError
from workers.config import DataConfig
from workers.data.dataset import prepare
from workers.data.sources import describe, describe_source
from workers.data.splits import DataError

cache = image_files.cache

WRONG = """
from workers.data.decoding import Item
from workers.data.tree import Files, Split
from workers.kinds import FormatEntry, WeightingEntry
import numpy as np

def fails(tree):
    return tree.nothing

def read_text():
    yield "text"

def read_item():
    yield Item("a", np.zeros((4, 4, 1), np.uint8))
    raise KeyError("lost")

LIKE = np.zeros((4, 4, 1), np.uint8)

def of(read):
    return lambda tree: Files([(n, tree.get_path(n)) for n in tree.names], Split(2, False, read), like=LIKE)

FAILS = FormatEntry(function=fails, about="a")
TEXT = FormatEntry(function=lambda tree: "text", about="b")
NONE = FormatEntry(function=lambda tree: None, about="c")
ITEMS = FormatEntry(function=of(read_text), about="d")
LOST = FormatEntry(function=of(read_item), about="e")
NAMELESS = FormatEntry(function=lambda tree: Files([], Split(2, False, read_item), like=LIKE), about="f")
OTHER = WeightingEntry(function=fails, about="g")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example, with 40 images of its data, and a module of mistakes."""
    folder = shutil.copytree(ROOT / "examples/format", tmp_path / "format", ignore=shutil.ignore_patterns("digits"))
    (folder / "digits").mkdir()
    images = np.arange(40 * 20, dtype=np.uint8).reshape(40, 5, 4) % 17
    rows = ["file,label,split"]
    for row, image in enumerate(images):
        (folder / f"digits/{row}.pgm").write_bytes(b"P5\n4 5\n16\n" + image.tobytes())
        rows.append(f"{row}.pgm,{row % 3},{'test' if row < 10 else 'train'}")
    (folder / "digits/labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "wrong.py").write_text(WRONG)
    return folder


def open_with(folder: Path, name: str = "my_formats:PGM") -> Experiment:
    return load(folder / "experiment.yaml", [f"data.source={folder / 'digits'}", f"data.format={name}"])


def test_what_it_finds_is_data_as_ours_are(folder: Path) -> None:
    data, source = prepare(open_with(folder).data), describe(open_with(folder).data)
    assert (data.shape, data.levels, len(data.train), len(data.held_out)) == ((5, 4, 1), 17, 30, 10)
    images = np.arange(40 * 20, dtype=np.uint8).reshape(40, 5, 4, 1) % 17
    assert pairs(data.held_out, data.held_out_labels) == pairs(images[:10], np.arange(10) % 3)
    assert "digits: my_formats:PGM, 30 to train on" in describe_source(source) and not source.warnings


def test_its_code_is_in_the_id_of_the_data(folder: Path) -> None:
    before, path = describe(open_with(folder).data).digest, folder / "my_formats.py"
    path.write_text(path.read_text().replace('"""A format', '"""Some format'))
    assert describe(open_with(folder).data).digest == before
    path.write_text(path.read_text().replace("return values", "return largest - values"))
    config = open_with(folder).data
    assert describe(config).digest != before
    assert prepare(config).held_out.max() == 16 and config.format and config.format.startswith("my_formats:PGM@")
    (folder / "digits/0.pgm").write_bytes(b"P5\n4 5\n16\n" + bytes(20))
    assert describe(config).digest != describe(config.model_copy(update={"resolution": 4})).digest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FAILS", ["wrong.py:8: AttributeError", "'nothing'"]),
        ("TEXT", ["wrong:TEXT returns str, where Files or None belong"]),
        ("NONE", ["wrong:NONE finds nothing of its own there"]),
        ("ITEMS", ["wrong:ITEMS reads str, where an Item belongs"]),
        ("LOST", ["wrong.py:15: KeyError: 'lost'"]),
        ("NAMELESS", ["wrong:NAMELESS lists no files in `paths`"]),
    ],
)
def test_its_mistakes_are_told_with_file_and_line(folder: Path, name: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        describe(open_with(folder, f"wrong:{name}").data)
    assert all(word in str(caught.value) for word in ["data.source = ", "data.format: ", *words]), caught.value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong:OTHER", ["data.format", "of the type WeightingEntry, and a FormatEntry belongs here"]),
        ("my_formats:PGN", ["has no PGN; did you mean 'PGM'?"]),
        ("gone:PGM", ["there is no module gone"]),
        ("parqet", ["data.format", "'parquet'"]),
    ],
)
def test_a_name_that_names_none_is_told_before_anything_is_read(folder: Path, name: str, words: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        open_with(folder, name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_one_of_ours_can_be_named(tmp_path: Path) -> None:
    image_files.write_images(tmp_path / "d", image_files.COLOUR)
    np.save(tmp_path / "d/images.npy", image_files.GREY)
    assert describe(DataConfig(source=str(tmp_path / "d"))).format == "images"
    assert describe(DataConfig(source=str(tmp_path / "d"), format="arrays")).shape == (4, 4, 1)
    with pytest.raises(DataError, match=r"data\.format: idx finds nothing .*; it is in the format images"):
        describe(DataConfig(source=str(tmp_path / "d"), format="idx"))
    with pytest.raises(DataError, match=r"data\.format: idx is of files, and digits has none"):
        describe(DataConfig(source="digits", format="idx"))
