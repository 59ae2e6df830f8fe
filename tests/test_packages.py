"""An installed package of kinds that cannot be used: each command says so in a line, however it was started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BROKEN = {  # the module of its entries, and what is said of it
    "import a_module_that_nobody_has": "ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    "def (": "SyntaxError: ",
    "raise SystemExit('at its import')": "SystemExit: at its import",
    "raise RuntimeError('in\\ntwo lines')": "RuntimeError: in two lines",
    "from workers.kinds import SAMPLERS\nSAMPLERS['ddim'] = SAMPLERS['ddim']": "two kinds are called 'ddim'",
}
CLASHING = """from dataclasses import replace
from workers.kinds import SAMPLERS
SAMPLERS["other"] = replace(SAMPLERS["ddim"], function="theirs:other", {})
"""
COMMANDS = (
    "-m orchestrator.status --storage {}",
    "-m orchestrator.sweep experiments/digits.yaml --dry-run",
    "-m orchestrator status --storage {}",
    "{script} status --storage {}",
)


def install(folder: Path, content: str) -> None:
    info = folder / "theirs-2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text("[diffusion_orchestrator.kinds]\nmine = theirs\n")
    (folder / "theirs.py").write_text(content)


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("content", BROKEN)
def test_a_package_whose_import_fails_is_named_in_a_line(content: str, tmp_path: Path) -> None:
    install(tmp_path, content)
    done = python(tmp_path, "-m", "orchestrator.status", "--storage", str(tmp_path / "runs"))
    assert done.returncode == 2 and done.stdout == "", done
    [line] = done.stderr.splitlines()
    assert line.startswith("the installed package theirs brings kinds by theirs, which cannot be imported")
    assert BROKEN[content] in line and line.endswith("mend or uninstall it")


@pytest.mark.parametrize("command", COMMANDS)
def test_so_it_is_by_each_way_to_a_command(command: str, tmp_path: Path) -> None:
    install(tmp_path, "import a_module_that_nobody_has")
    script = tmp_path / "diffusion-orchestrator"  # as pip writes it
    script.write_text("import sys\nfrom orchestrator.__main__ import main\nsys.exit(main())\n")
    done = python(tmp_path, *command.format(tmp_path / "runs", script=script).split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("settings={'steps': (int, 3)}", "theirs:other: SamplerConfig has a setting 'steps' already; rename it"),
        ("reads=('colour',)", "theirs:other (other) reads ['colour'], which SamplerConfig lacks; mend or uninstall"),
    ],
)
def test_settings_that_cannot_be_added_are_told_too(more: str, message: str, tmp_path: Path) -> None:
    install(tmp_path, CLASHING.format(more))
    done = python(tmp_path, "-m", "orchestrator.schema")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done


def test_python_can_catch_it(tmp_path: Path) -> None:
    install(tmp_path, "raise ValueError('no')")
    program = "try:\n    from orchestrator import run_sweep\nexcept ValueError as error:\n    print(error)"
    done = python(tmp_path, "-c", program)
    assert done.returncode == 0 and "theirs" in done.stdout, done
