"""The tour, docs/tour.ipynb, runs as it is stored: no cell fails, and each shows what it shows there.

`python tests/cluster/test_tour.py` runs it and stores it with its outputs (`make tour`).
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode

TOUR = ROOT / "docs" / "tour.ipynb"
MOST_BYTES = 400_000


def execute(folder: Path) -> NotebookNode:
    """The tour with the outputs of a run in that folder. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(TOUR, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=540, record_timing=False, resources=resources).execute(env=environment)
    return notebook


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """What each cell of code shows: the kinds of its outputs, each by the richest type that it has."""

    def kind(output: NotebookNode) -> str:
        if output.output_type not in ("display_data", "execute_result"):
            return str(output.get("name", output.output_type))
        return next(name for name in ("image/png", "text/html", "text/plain") if name in output.data)

    return [{kind(output) for output in cell.outputs} for cell in notebook.cells if cell.cell_type == "code"]


def is_picture(output: NotebookNode) -> bool:
    return "image/png" in output.get("data", {})


def test_the_tour_is_stored_with_its_outputs_and_names_no_machine() -> None:
    stored = nbformat.read(TOUR, as_version=4)
    nbformat.validate(stored)
    shown = [kind for cell in kinds(stored) for kind in cell]
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    assert shown.count("image/png") >= 3 and shown.count("text/html") >= 3 and "stderr" not in shown
    assert TOUR.stat().st_size < MOST_BYTES
    texts = "".join(str(output.get("text", output.get("data", ""))) for output in outputs if not is_picture(output))
    assert not re.findall(r"/(?:home|tmp|root|private|Users|var)/", texts)


@pytest.mark.faults
def test_the_tour_runs(tmp_path: Path) -> None:
    """A warning of a busy machine may come on top of what is stored."""
    shown = kinds(execute(tmp_path))
    assert all(stored <= now for stored, now in zip(kinds(nbformat.read(TOUR, as_version=4)), shown, strict=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = nbformat.writes(execute(Path(folder)))
    TOUR.write_text(written.replace(f"{folder}/", "") + "\n")  # as seen from where the notebook runs
