"""A driver that is attached to a cluster, whose head dies and comes back as another one at the same address."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import killer
import soak

pytestmark = pytest.mark.faults
DRIVER = """
import sys
from orchestrator.execution import loss, session
loss.SILENT_S = 5.0
try:
    with session.open_session(sys.argv[1]):
        print("attached", flush=True)
        while True:
            session.describe_use()
            session.check()
except loss.ClusterLost as lost:
    print(lost)
    sys.exit(lost.status)
"""


def test_questions_about_a_cluster_that_is_gone_end_in_a_line_and_not_in_an_abort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    for name, value in {killer.MARK: mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}.items():
        monkeypatch.setenv(name, value)
    head = soak.Head(tmp_path / "head.log")
    head.tend()
    assert head.process
    try:
        while "ray status" not in head.log.read_text():
            assert head.process.poll() is None, head.log.read_text()
        command = [sys.executable, "-c", DRIVER, head.address]
        driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert driver.stdout and driver.stdout.readline() == "attached\n"
        [gcs] = [process for process in killer.family(mark) if process.kind == "GCS"]
        assert gcs.send(9)
        head.process.wait()
        head.tend()
        output = driver.stdout.read()
        assert driver.wait() == 4 and "has not answered" in output and len(output.splitlines()) == 1, output
    finally:
        for process in killer.family(mark):
            process.send(9)
