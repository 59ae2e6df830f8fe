"""What ctrl-C does before, in and after the work of a command."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
COMMAND = """
import signal, sys, time
from orchestrator import interrupts
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.arm()
PATIENCE = interrupts.PATIENCE_S = float(sys.argv[2])
try:
    with interrupts.allow_interrupts(at_once=lambda: print("at once", flush=True)):
        try:
            print("works", flush=True)
            time.sleep(60)
        finally:
            print("ends", flush=True)
            for _ in range(30):
                time.sleep(0.1)
except KeyboardInterrupt:
    print("ended", flush=True)
    sys.exit(130)
"""


def command(*arguments: object, code: str = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("inherited", ["ignored", "as usual"])
def test_the_first_ends_the_work_in_order_and_each_other_is_a_line(name: str, inherited: str) -> None:
    with command(inherited, 60) as process:
        assert process.stdout.readline() == "works\n"
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == "ends\n"
        for other in SIGNALS:
            process.send_signal(getattr(signal, other))
            time.sleep(0.1)
        out, err = process.communicate()
    assert out == "ended\n" and process.returncode == 130
    assert err.splitlines() == ["It is ending: Ray's processes stop, and MLflow's runs are closed."] * 3


def test_one_that_comes_late_ends_the_process_at_once_after_what_has_to_be_done() -> None:
    with command("as usual", 0) as process:
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ends\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert out == "at once\n" and process.returncode == 130
    assert err == "It ends at once. The same command resumes.\n"


def test_a_request_to_pause_that_comes_again_changes_nothing() -> None:
    with command("as usual", 0) as process:
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.readline() == "ends\n"
        for _ in range(3):
            process.send_signal(signal.SIGUSR2)
            time.sleep(0.1)
        out, err = process.communicate()
    assert (out, err) == ("ended\n", "") and process.returncode == 130


def test_what_is_deferred_is_raised_at_the_end_of_the_block() -> None:
    code = """
import signal
from orchestrator import interrupts
interrupts.arm()
try:
    with interrupts.defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        print("whole")
    print("not here")
except KeyboardInterrupt:
    print("after it")
"""
    with command(code=code) as process:
        out, err = process.communicate()
    assert out == "whole\nafter it\n" and err == ""


def test_an_interrupt_in_the_middle_of_an_import_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import signal\ntry:\n  signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n  pass"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from orchestrator import interrupts
interrupts.arm()
import slow
print("not here")
"""
    with command(code=code) as process:
        out, err = process.communicate()
    assert (out, err, process.returncode) == ("", "\nInterrupted.\n", 130)


def test_an_interrupt_that_an_import_within_the_work_would_swallow_comes_after_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    code = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from orchestrator import interrupts
interrupts.arm()
try:
    with interrupts.allow_interrupts():
        import slow
        print("imported")
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    with command(code=code) as process:
        out, err = process.communicate()
    assert (out, err) == ("imported\ninterrupted\n", "")


def test_a_hangup_that_is_ignored_stays_so() -> None:
    code = """
import signal
from orchestrator import interrupts
signal.signal(signal.SIGHUP, signal.SIG_IGN)
interrupts.arm()
signal.raise_signal(signal.SIGHUP)
print("goes on")
"""
    with command(code=code) as process:
        assert process.communicate()[0] == "goes on\n"


def test_a_request_to_pause_that_was_heard_is_no_interrupt_of_what_comes_after_the_work() -> None:
    """Nor does it end the process where Python itself ends, and takes no signals any more."""
    code = """
import atexit, signal
from orchestrator import interrupts
interrupts.arm()
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGUSR2)
        print("whole")
late = Late()
atexit.register(print, "at the end")
with interrupts.allow_interrupts():
    with interrupts.pausable():
        signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR2)
    print("paused", interrupts.is_asked_to_pause())
"""
    with command(code=code) as process:
        out, err = process.communicate()
    assert (out, err) == ("paused True\nat the end\nwhole\n", "") and process.returncode == 0


@pytest.mark.parametrize("pauses", [True, False])
def test_a_request_to_pause_is_left_to_work_that_can_and_interrupts_all_other(pauses: bool) -> None:
    code = f"""
import contextlib, signal
from orchestrator import interrupts
interrupts.arm()
try:
    with interrupts.allow_interrupts(), interrupts.pausable() if {pauses} else contextlib.nullcontext():
        signal.raise_signal(signal.SIGUSR2)
        print("goes on", interrupts.is_asked_to_pause())
except KeyboardInterrupt:
    print("interrupted", interrupts.is_asked_to_pause())
"""
    with command(code=code) as process:
        assert process.communicate()[0] == ("goes on True\n" if pauses else "interrupted False\n")
