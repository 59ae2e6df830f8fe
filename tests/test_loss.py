"""How the end of a part of Ray is noticed, and what becomes of a command that does not come back from a call to it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution import loss
from orchestrator.execution.loss import MARKER, ClusterLost, Watch, describe_death, repeat_where_lost, stop

ROOT = Path(__file__).parent.parent


def sleeper(**environment: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, **environment})


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_what_ended_and_how_is_told() -> None:
    with sleeper() as killed, sleeper() as left:
        assert describe_death("raylet", killed) == ""
        killed.kill()
        killed.wait()
        left.communicate(b"\n")
        assert describe_death("raylet", killed) == f"Ray's raylet (process {killed.pid}) was killed by signal 9"
        assert describe_death("GCS", left) == f"Ray's GCS (process {left.pid}) ended with status 0"


def test_whatever_fails_after_a_part_has_died_is_told_as_its_loss_and_nothing_before() -> None:
    left = threading.Event()
    with sleeper() as part:
        watch = Watch({"raylet": part}, {}, "", left)
        with pytest.raises(KeyError), watch.keep_looking():
            watch.check()
            raise KeyError
        part.kill()
        part.wait()
        with pytest.raises(ClusterLost, match="raylet"), watch.keep_looking():
            left.set()
            raise KeyError


def test_an_address_that_does_not_answer_any_more_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SILENT_S", 0.5)
    left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = Watch({}, {"Ray's GCS": server.getsockname()[:2]}, "", left)
        with watch.keep_looking():
            time.sleep(1)
            watch.check()
            server.close()
            until(watch.explain_loss)
            with pytest.raises(ClusterLost, match=r"Ray's GCS at 127\.0\.0\.1:\d+ has not answered for"):
                watch.check()
            left.set()


def test_ray_s_gcs_is_asked_when_it_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray aborts a process that asks one which does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = Watch({}, {"Ray's GCS": server.getsockname()[:2]}, "", threading.Event())
        watch.wait()
        host, port = server.getsockname()[:2]
    waited = threading.Thread(target=watch.wait)
    waited.start()
    time.sleep(0.5)
    assert waited.is_alive()
    with socket.create_server((host, port)):
        waited.join(timeout=30)
        assert not waited.is_alive()


STARTING = """
import os, signal, sys, threading, time
from orchestrator.execution import loss, session

def gcs():
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                environment = open(f"/proc/{folder}/environ", "rb").read()
                words = open(f"/proc/{folder}/cmdline", "rb").read()
            except OSError:
                continue
            if f"STARTING={os.getpid()}".encode() in environment and b"gcs_server" in words.split(b"\\0")[0]:
                return int(folder)

def kill():
    while not (pid := gcs()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)

os.environ["STARTING"] = str(os.getpid())
threading.Thread(target=kill, daemon=True).start()
try:
    with session.open_session(None):
        print("started")
except loss.ClusterLost as lost:
    print("lost:", lost)
"""


@pytest.mark.faults
def test_a_ray_that_dies_as_it_starts_is_a_loss() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.startswith("lost: Ray did not start (") and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )


HANGING = """
import subprocess, sys, threading, time
from orchestrator import interrupts
from orchestrator.execution import loss
loss.TO_LEAVE_S = 0.5
part = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
watch = loss.Watch({"GCS": part}, {}, "none", threading.Event())
with interrupts.allow_interrupts(at_once=lambda: print("closed", flush=True)), watch.keep_looking():
    part.kill()
    time.sleep(60)  # as a call that waits for Ray's GCS
"""


def test_a_command_that_does_not_come_back_from_a_call_to_a_lost_ray_ends_with_the_reason() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == ClusterLost.status == 4 and done.stdout == "closed\n"
    assert "was killed by signal 9, and a call to it does not return. The same command resumes." in done.stderr


def test_what_is_left_of_a_session_is_ended_and_nothing_else() -> None:
    marker = uuid.uuid4().hex
    with sleeper(**{MARKER: marker}) as own, sleeper(**{MARKER: "another"}) as other:
        stop(marker, patience_s=0.2)
        assert own.wait(timeout=30) == -signal.SIGKILL and other.poll() is None
        other.kill()


def test_a_lost_ray_is_brought_up_again_so_many_times_and_another_ones_never() -> None:
    calls: list[Any] = []
    output: list[str] = []

    def work() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ClusterLost("gone")
        return "done"

    assert repeat_where_lost(work, output.append, may=True, times=2) == "done"
    assert len(output) == 2 and "starts again" in output[0]
    for may, times in ((True, 1), (False, 9)):
        calls.clear()
        with pytest.raises(ClusterLost):
            repeat_where_lost(work, output.append, may=may, times=times)
