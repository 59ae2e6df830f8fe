"""When a process is taken to hang, and how a process tells that it does not."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.execution import hangs
from orchestrator.execution.hangs import PATIENCE, Heard, Watchdog
from workers import pulse
from workers.pulse import Pulse, read_birth, send

LIMIT_S = 60.0


def told(beat: int = 0, steps: int = 0, slowest_s: float = 0.0, between: bool = False, what: str = "its worker"):
    return {"what": what, "beat": beat, "steps": steps, "slowest_s": slowest_s, "between": between}


def after(first, later, passed_s: float) -> Heard:
    heard = Heard(first)
    heard.hear(later, passed_s)
    return heard


def test_a_process_that_says_nothing_hangs_after_the_limit() -> None:
    assert after(told(), told(), LIMIT_S - 1).explain_hang(LIMIT_S) == ""
    assert "has not been heard for 60 s" in after(told(), told(), LIMIT_S).explain_hang(LIMIT_S)
    heard = after(told(), told(), LIMIT_S - 1)
    heard.hear(told(beat=1, steps=1), 2)
    assert heard.silent_s == 0 and not heard.explain_hang(LIMIT_S)


def test_a_loop_that_is_heard_and_makes_no_step_hangs_after_ten_times_that() -> None:
    whole = PATIENCE * LIMIT_S
    assert after(told(0, 5), told(1, 5), whole - 1).explain_hang(LIMIT_S) == ""
    assert "has made no step" in after(told(0, 5), told(1, 5), whole).explain_hang(LIMIT_S)
    assert after(told(0, 5), told(1, 6), whole).explain_hang(LIMIT_S) == ""


def test_slow_steps_have_ten_times_the_slowest() -> None:
    slow: dict[str, Any] = {"slowest_s": 100.0}
    assert after(told(0, 5, **slow), told(1, 5, **slow), 999).explain_hang(LIMIT_S) == ""
    assert after(told(0, 5, **slow), told(1, 5, **slow), 1000).explain_hang(LIMIT_S)


@pytest.mark.parametrize("idle", [{"between": True}, {"what": ""}])
def test_a_first_step_a_validation_and_an_idle_process_may_take_any_time(idle) -> None:
    assert after(told(0, 5, **idle), told(1, 5, **idle), 1e6).explain_hang(LIMIT_S) == ""


def test_an_idle_process_that_says_nothing_hangs_too_as_work_may_be_given_to_it() -> None:
    assert after(told(what=""), told(what=""), LIMIT_S).explain_hang(LIMIT_S)


def test_a_pulse_counts_steps_and_the_slowest_but_not_what_lies_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    p = Pulse(_began=0)
    for at, act in (
        (90, p.begin_step),
        (91, p.begin_step),
        (94, p.begin_step),
        (95, p.rest),
        (300, p.begin_step),
        (301, p.begin_step),
    ):
        clock[0] = at
        act()
    assert p.steps == 5 and p.slowest_s == 3 and not p.between


def test_a_signal_reaches_that_process_and_none_that_came_after_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        birth = read_birth(process.pid)
        assert birth
        assert send(process.pid, birth, 0) and not send(process.pid, birth - 1, signal.SIGKILL)
        assert process.poll() is None
        assert send(process.pid, birth, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet taken: a zombie
        assert read_birth(process.pid) is None and not send(process.pid, birth, 0)


def test_a_stopped_process_that_was_never_heard_is_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(hangs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        watchdog, output = Watchdog(LIMIT_S, lambda: False, _looked=0), list[str]()

        def look(times: int, passed_s: float = 4.0) -> None:
            for _ in range(times):
                clock[0] += passed_s
                watchdog.look_for_stopped(lambda: [process.pid])
                output.extend(text for _, text in watchdog.take())

        def stop() -> None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)

        stop()
        look(13)
        look(1, 1e6)  # in which the driver was stopped itself
        assert process.poll() is None
        [notice] = output
        assert notice.endswith(f"(process {process.pid}) has been stopped for 32 s; at 60 s it is ended")
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        look(1)
        stop()
        look(14)
        assert process.poll() is None, "it begins anew after it went on"
        look(1)
        assert process.wait(timeout=30) == -signal.SIGKILL
        assert output[-1].endswith("has been stopped for 60 s: it is ended")
