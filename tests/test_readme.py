"""The README is true: its commands are there and run, its files exist."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, sweep
from PIL import Image

from orchestrator import nightly, subjects
from orchestrator.experiment import assignment
from orchestrator.nights import suite

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```sh\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
SWEEPS = [c for c in COMMANDS if "orchestrator.sweep" in c]


def test_every_command_is_of_a_kind_that_a_test_runs() -> None:
    verbs = ("sweep ", "evaluate ", "compare ", "sample ", "canary", "nightly ", "status", "report ", "ui")
    kinds = ("make ", "ray up ", "ray down ", *(f"python -m orchestrator.{verb}" for verb in verbs))
    assert COMMANDS and SWEEPS
    assert all(command.startswith(kinds) for command in COMMANDS), COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    result = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", SWEEPS)
def test_sweep_commands_are_valid(command: str, tmp_path: Path) -> None:
    """Each is resolved in full; a path that stands for the reader's own is given a real file."""
    for i in range(40):
        file = tmp_path / "images" / str(i % 2) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(file)
    words = [word.replace("PATH", str(tmp_path / "images")) for word in shlex.split(command)[3:]]
    result = sweep(*words, *["--dry-run"][: "--dry-run" not in words], "--storage", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.search(r"orchestrator\.(evaluate|compare|sample|canary|status|report)", c)]
)
def test_commands_of_measuring_are_understood(command: str) -> None:
    """They need a trained storage: tests/cluster/test_evaluate.py runs such, here their words are checked."""
    _, _, module, *words = shlex.split(command)
    importlib.import_module(module).parser().parse_intermixed_args(words)
    for text in (word for word in words if "=" in word):
        path, _ = assignment(text)
        assert path in subjects.SETTINGS


@pytest.mark.parametrize("command", [c for c in COMMANDS if "orchestrator.nightly" in c])
def test_nightly_commands_are_understood(command: str) -> None:
    """Their words and their suite; tests/cluster/test_nightly.py runs such."""
    options = nightly.parser().parse_intermixed_args(shlex.split(command.partition(">")[0])[3:])
    suite.load(ROOT / options.file, options.overrides)


def test_the_main_command_runs_to_its_end(tmp_path: Path) -> None:
    words = shlex.split(SWEEPS[0])[3:]
    small = [
        "training.steps=4", "training.batch_size=16", "training.warmup=2", "training.validate_every=4",
        "evaluation.nll.images=10", "evaluation.fid.samples=100", "evaluation.fid.sampler.steps=2", "model.channels=8",
        "search.space.diffusion.schedule.beta_end=null",
    ]  # fmt: skip
    result = sweep(*words, *small, "--storage", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" done") >= 4


def test_the_ui_says_what_to_do_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.ui", "--storage", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(""), capture_output=True, text=True)
    assert result.returncode == 2 and "run one first" in result.stderr


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_to_files(path: str) -> None:
    assert (ROOT / path).exists()
