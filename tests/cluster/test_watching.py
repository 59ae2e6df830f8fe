"""A sweep in a real terminal, looked at from another one while it runs."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, run

pytestmark = pytest.mark.faults


class Terminal:
    """A command in a pseudo-terminal of 110 x 30; `text` is all that it has written."""

    def __init__(self, *words: object) -> None:
        self.master, slave = pty.openpty()
        size = {"COLUMNS": "110", "LINES": "30", "TERM": "xterm-256color"}
        command = [sys.executable, "-m", *map(str, words)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(""), **size}, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.text = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 65536):
                self.text += data.decode(errors="replace")
        except OSError:  # Linux says so where the other end of a pseudo-terminal is closed
            return


def looked(storage: Path) -> dict[str, Any]:
    result = run("orchestrator.status", "tiny", "--json", "--storage", storage)
    return dict(json.loads(result.stdout)["sweeps"][0]) if result.returncode == 0 else {}


def test_a_sweep_is_seen_from_another_terminal_while_it_runs(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    terminal = Terminal("orchestrator.sweep", tiny, "training.steps=200", "--storage", storage)
    seen, made = [], ""
    deadline = time.monotonic() + 900
    while terminal.process.poll() is None and time.monotonic() < deadline:
        seen.append(looked(storage))
        time.sleep(1)  # looking takes from the cores that train
        if not made and any(t["state"] == "training" and t["step"] for t in seen[-1].get("trials", ())):
            page = run("orchestrator.report", "tiny", "--output", tmp_path / "during.html", "--storage", storage)
            assert page.returncode == 0, page.stderr
            made = (tmp_path / "during.html").read_text()
    assert terminal.process.wait(1) == 0, terminal.text
    terminal.reader.join(10)
    running = [one for one in seen if one and one["driver"]["state"] == "running"]
    states = {t["state"] for one in running for t in one["trials"]}
    assert running and running[0]["driver"]["pid"] == terminal.process.pid
    assert "training" in states and states <= {"waiting", "training", "trained", "evaluating", "done"}
    assert "still running" in made and "0 / 2" in made
    after = looked(storage)
    assert after["driver"]["state"] == "ended" and [t["state"] for t in after["trials"]] == ["done", "done"]
    assert "ended" in (storage / "sweeps/tiny/report.html").read_text()

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text)
    for output in ("validation", "images/s", "CPUs busy", "2 training", "train       new", "report  "):
        assert output in text, text
    for noise in ("Warning", "warning:", "(raylet)", "(pid=", "Traceback", "W0000", "I0000"):
        assert noise not in text, text
