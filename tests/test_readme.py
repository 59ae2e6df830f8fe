"""The README and the pages of docs/ are true: their commands are there and run, their links lead somewhere."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import ROOT, environment, sweep
from PIL import Image
from ray.scripts.scripts import cli as ray_cli

from orchestrator import completion, nightly, schema, ui
from orchestrator import sweep as sweep_command
from orchestrator.clusters import slurm
from orchestrator.experiment.load import parse_assignment
from orchestrator.experiment.settings import read_yaml
from orchestrator.measuring import subjects
from orchestrator.nights import suite

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The commands of a page: those of its blocks for a shell, and those of a verb or of make inside its text."""
    text = page.read_text()
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    found = [re.split(r" +#", line)[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return found + re.findall(r"`((?:make|ray up|python -m orchestrator\.\w+) [^`]+)`", text)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
SWEEPS = [c for c in COMMANDS if "orchestrator.sweep" in c]
VERBS = (
    "sweep ",
    "evaluate ",
    "compare ",
    "sample ",
    "canary",
    "nightly ",
    "status",
    "report ",
    "ui",
    "schema",
    "completion",
)
RAY = [c for c in COMMANDS if c.startswith("ray ")]
BENCHMARKS = [c for c in COMMANDS if c.startswith("python benchmarks/")]
SBATCH = [c for c in COMMANDS if c.startswith("sbatch ")]
OF_FILES = [c for c in COMMANDS if c.startswith(("kubectl ", ".venv/bin/python -m pytest "))]


def test_every_command_is_of_a_kind_that_a_test_runs() -> None:
    kinds = ("make ", *(f"python -m orchestrator.{verb}" for verb in VERBS))
    assert COMMANDS and SWEEPS
    assert [c for c in COMMANDS if not c.startswith(kinds) and c not in [*RAY, *OF_FILES, *BENCHMARKS, *SBATCH]] == []


@pytest.mark.parametrize("command", SBATCH)
def test_jobs_are_of_our_script_and_our_words(command: str) -> None:
    """Their options are asked of a real Slurm by cluster/test_slurm_cluster."""
    words = shlex.split(command)
    at = words.index("deploy/slurm.sbatch")
    slurm.read_wish(shlex.join(word for word in words[1:at] if not word.startswith("--job-name")))
    verb, arguments = (nightly, words[at + 2 :]) if words[at + 1] == "nightly" else (sweep_command, words[at + 1 :])
    assert (ROOT / verb.make_parser().parse_intermixed_args(arguments).file).exists()


@pytest.mark.parametrize("command", RAY)
def test_commands_of_ray_are_understood(command: str) -> None:
    """By Ray's own parser; nothing is started."""
    _, verb, *words = shlex.split(command)
    understood = ray_cli.commands[verb]
    understood.make_context(verb, list(words), parent=click.Context(ray_cli))
    assert [word for word in words if word.endswith(".yaml") and (ROOT / word).exists()]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_know_their_options(command: str) -> None:
    _, file, *words = shlex.split(command)
    output = subprocess.run([sys.executable, file, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(word in output.stdout for word in words if word.startswith("--"))


@pytest.mark.parametrize("command", OF_FILES)
def test_commands_name_files_that_are_there(command: str) -> None:
    assert all((ROOT / word).exists() for word in shlex.split(command) if word.endswith((".yaml", ".py")))


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
    importlib.import_module(module).make_parser().parse_intermixed_args(words)
    for text in (word for word in words if "=" in word):
        path, _ = parse_assignment(text)
        assert path in subjects.SETTINGS


@pytest.mark.parametrize("command", [c for c in COMMANDS if "orchestrator.nightly" in c])
def test_nightly_commands_are_understood(command: str) -> None:
    """Their words and their suite; tests/cluster/test_nightly.py runs such."""
    options = nightly.make_parser().parse_intermixed_args(shlex.split(command.partition(">")[0])[3:])
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


OTHERS = {"ui": ui, "schema": schema, "completion": completion}


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(rf"orchestrator\.({'|'.join(OTHERS)})", c)])
def test_other_commands_are_understood(command: str) -> None:
    _, _, module, *words = shlex.split(command.partition(">")[0])
    OTHERS[module.rpartition(".")[2]].make_parser().parse_args(words)


def anchors(page: Path) -> set[str]:
    """What a link may name behind #: the page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    for path, anchor in links:
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_is_one_page_and_leads_to_all_others() -> None:
    text = README.read_text()
    assert text.count("\n") <= 120
    assert all(f"(docs/{page.name})" in text for page in PAGES[1:])


def test_the_readme_shows_the_experiment_file() -> None:
    [block] = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    file, _ = read_yaml((ROOT / "experiments" / "beta_schedule.yaml").read_text())
    del file["smoke"]
    assert read_yaml(block)[0] == file
