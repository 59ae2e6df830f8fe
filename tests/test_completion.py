"""What TAB offers: by itself, and in real shells that have read the script."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

from orchestrator import cli
from orchestrator.completion import complete, split
from orchestrator.experiment.load import load
from orchestrator.state.saved import keep_sweep
from orchestrator.sweep import list_trials
from workers.storage import Storage

PATIENCE_S = 60.0  # for a shell on a machine that is busy with other tests


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the tiny experiment, and in its `runs` the sweep and a trial's folder."""
    experiment = load(tiny)
    trials, sources, _ = list_trials(experiment)
    storage = Storage(tmp_path / "runs")
    keep_sweep(storage, experiment, trials, sources)
    storage.write(f"trials/{next(iter(trials))}/trial.yaml", b"")
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_a_line_is_split_as_a_shell_splits_it() -> None:
    assert split("x sweep 'a b' c") == ["x", "sweep", "a b", "c"] and split("x sweep ") == ["x", "sweep", ""]
    assert split("x 'search.sp") == ["x", "search.sp"] and split('x "a ') == ["x", "a "] and split("") == []


def test_verbs_and_options() -> None:
    assert complete("x ") == list(cli.VERBS) and complete("x s") == ["sweep", "status", "sample", "schema"]
    assert complete("x sweep --s") == ["--smoke", "--submit", "--slurm", "--storage"]
    assert complete("x schema ") == ["experiment", "nightly"] and complete("x completion z") == ["zsh"]
    assert complete("x evaluate t --profile a") == ["adm"]
    assert complete("x nothing ") == complete("x") == complete("") == complete("x ui ") == []


def test_settings_come_section_by_section() -> None:
    assert complete("x sweep f.yaml train") == ["training."]
    assert complete("x sweep f.yaml training.ste") == ["training.steps="]
    assert "training.lr=" in complete("x sweep f.yaml training.") and "seed=" in complete("x sweep f.yaml ")
    assert complete("x sweep f.yaml a.b=1 --storage s loss.obj") == ["loss.objective="], "after an option too"
    assert complete("x sweep f.yaml 'search.space.diffusion.T.g") == ["search.space.diffusion.T.grid="]
    assert complete("x evaluate t evaluation.nll.i") == ["evaluation.nll.images="]
    assert complete("x evaluate t training.s") == [], "which an evaluation cannot set"
    assert complete("x nightly f.yaml schedule.a") == ["schedule.at="]
    assert complete("x sweep f.yaml training.steps=1") == []


def test_sweeps_trials_and_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    [trial] = (folder.name for folder in Path("runs/trials").iterdir())
    assert complete("x status ") == complete("x report t") == ["tiny"]
    assert complete("x evaluate ") == ["tiny", trial] and complete("x compare ") == [trial]
    assert complete(f"x sample {trial[:4]}") == complete(f"x compare {trial} {trial[:4]}") == [trial]
    assert complete("x sweep ") == ["runs/", "tiny.yaml"] and complete(f"x sweep {place}/ti") == [f"{place}/tiny.yaml"]
    assert complete("x sample t --between 3 ") == complete("x sample t --storage ") == []
    monkeypatch.chdir("/")
    assert complete(f"x status --storage {place}/runs ") == complete(f"x status --storage={place}/runs ") == ["tiny"]
    assert complete("x status ") == [] and not Path("/runs").exists()


def test_it_loads_neither_torch_nor_ray(place: Path) -> None:
    code = (
        "import sys; from orchestrator.completion import complete\n"
        "for line in ('x status ', 'x evaluate ', 'x sweep f.yaml search.space.', 'x nightly f.yaml ', 'x ui --p'):\n"
        "    assert complete(line), line\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(""), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


class Shell:
    """A shell at a terminal, as somebody types into it."""

    def __init__(self, folder: Path, *command: str) -> None:
        master, terminal = pty.openpty()
        env = {**environment(""), "PS1": "", "TERM": "dumb", "HOME": str(folder), "HISTFILE": ""}
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        )
        os.close(terminal)
        self.terminal, self.shown = master, ""

    def type(self, text: str, wanted: str) -> None:
        """Types, and waits until the terminal shows what is wanted, beyond what it has shown before."""
        os.write(self.terminal, text.encode())
        seen, until = len(self.shown), time.monotonic() + PATIENCE_S
        while wanted not in self.shown[seen:]:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{wanted!r} is not in {self.shown[seen:]!r}"
            self.shown += os.read(self.terminal, 65536).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


SHELLS = {
    "bash": ("bash", ["--norc", "--noprofile", "-i"], "source"),
    "zsh": ("zsh", ["-f", "-i"], "autoload -U compinit && compinit -u -D && zstyle ':completion:*' menu no && source"),
}


@pytest.mark.parametrize("name", SHELLS)
def test_a_real_shell_completes(name: str, place: Path) -> None:
    program, options, read = SHELLS[name]
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program} here")
    script = place / "script"
    printed = subprocess.run(
        [sys.executable, "-m", "orchestrator", "completion", name],
        cwd=ROOT, env=environment(""), capture_output=True, text=True, check=True,
    )  # fmt: skip
    script.write_text(printed.stdout)
    [trial] = (folder.name for folder in (place / "runs/trials").iterdir())
    shell = Shell(place, found, *options)
    try:
        shell.type(f"{read} {script}; diffusion-orchestrator() {{ echo \"ran $*\"; }}; echo re''ady\n", "ready\r\n")
        for typed, wanted in (
            ("stat", "status +"),
            ("status ti", "status tiny +"),
            (f"evaluate {trial[:6]}", f"evaluate {trial} +"),
            ("sweep ti", "sweep tiny.yaml +"),
            ("sweep tiny.yaml train", "sweep tiny.yaml training.+"),
            ("sweep tiny.yaml --quiet training.ste", "sweep tiny.yaml --quiet training.steps=+"),
            ("sweep tiny.yaml --tracking", "sweep tiny.yaml --tracking-uri +"),
            ("ui --storage no", "ui --storage notes.txt +"),  # by the shell itself
        ):
            shell.type(f"diffusion-orchestrator {typed}\t+\n", f"ran {wanted}\r\n")
    finally:
        shell.close()
