"""Processes that hang are found by their silence and ended; what heals after a death then goes on as after any other.

Tune starts the trial of a dead process again from its last checkpoint, Ray Train its group of workers, Ray a task.
"""

import json
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.pulse import is_stopped, send
from workers.signs import forget_pulse, read_pulses, send_signal

log = logging.getLogger(__name__)

HANG_S = 60.0  # where no setting says it
LOOK_S = 2.0
PATIENCE = 10  # times the limit, and times its slowest step: what a process that is heard may take for a step
TO_ANSWER_S = 30.0  # for a node that is asked for a process


@dataclass
class Heard:
    """What was heard of a process last, and for how long it has been silent, or made no step."""

    told: Mapping[str, Any]
    silent_s: float = 0.0
    still_s: float = 0.0
    noticed: bool = False

    def hear(self, told: Mapping[str, Any], passed_s: float) -> None:
        """Takes what stands there after so many seconds more."""
        self.silent_s = self.silent_s + passed_s if told["beat"] == self.told["beat"] else 0.0
        stepping = told["what"] and not told["between"]
        self.still_s = self.still_s + passed_s if stepping and told["steps"] == self.told["steps"] else 0.0
        self.told = told

    def explain_hang(self, limit_s: float) -> str:
        """Why it is taken to hang, in words; empty where it is not."""
        if self.silent_s >= limit_s:
            return f"has not been heard for {self.silent_s:.0f} s"
        if self.still_s >= PATIENCE * max(limit_s, self.told["slowest_s"]):
            return f"has made no step for {self.still_s:.0f} s"
        return ""


@dataclass
class Watchdog:
    """Ends processes of this session that hang, on a thread of its own, as nothing here may wait for them."""

    limit_s: float
    lost: Callable[[], bool]  # whether Ray is gone: nobody may ask it then
    silent: dict[str, float] = field(default_factory=dict)  # seconds, by trial; those that are near the limit
    _heard: dict[bytes, Heard] = field(default_factory=dict)
    _said: deque[tuple[str, str]] = field(default_factory=deque)
    _stopped: dict[int, float] = field(default_factory=dict)  # seconds by process
    _looked: float = field(default_factory=time.monotonic)

    def take(self) -> list[tuple[str, str]]:
        """(trial or "", what happened) since the last call."""
        return [self._said.popleft() for _ in range(len(self._said))]

    @contextmanager
    def keep_looking(self) -> Iterator[None]:
        closing = threading.Event()
        thread = threading.Thread(target=self._run, args=(closing,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            thread.join(LOOK_S if self.lost() else TO_ANSWER_S + LOOK_S)  # it may be asking Ray, which ends next

    def look_for_stopped(self, processes: Callable[[], Iterable[int]]) -> None:
        """Ends those of the `processes` of this machine that are stopped for the limit, and have not been heard ever.

        So a process is found too that was stopped before its first work, or is Ray's own. Ray is not asked.
        """
        if (passed_s := time.monotonic() - self._looked) < LOOK_S:
            return
        self._looked = time.monotonic()
        heard = {heard.told["pid"] for heard in list(self._heard.values())}
        stopped = [pid for pid in processes() if pid not in heard and is_stopped(pid)]
        self._stopped = {pid: self._stopped.get(pid, 0.0) + min(passed_s, 2 * LOOK_S) for pid in stopped}
        for pid, stopped_s in self._stopped.items():
            before_s = stopped_s - min(passed_s, 2 * LOOK_S)
            text = f"{_read_title(pid)} (process {pid}) has been stopped for {stopped_s:.0f} s"
            if stopped_s >= self.limit_s:
                self._said.append(("", f"{text}: it is ended"))
                os.kill(pid, signal.SIGKILL)
            elif before_s < self.limit_s / 2 <= stopped_s:
                self._said.append(("", f"{text}; at {self.limit_s:.0f} s it is ended"))

    def _run(self, closing: threading.Event) -> None:
        looked, pause_s = time.monotonic(), LOOK_S
        while not closing.wait(pause_s):
            # A driver that was stopped itself has missed what others told: its own pauses do not count.
            passed_s, looked = min(time.monotonic() - looked, 2 * pause_s), time.monotonic()
            try:
                if not self.lost():
                    self._look(passed_s)
            except Exception:  # whatever Ray raises where it is under way to its end
                log.debug("no signs of life could be read", exc_info=True)
            pause_s = LOOK_S + 5 * (time.monotonic() - looked)  # of thousands of processes it takes long

    def _look(self, passed_s: float) -> None:
        now = read_pulses()
        for key in [key for key in self._heard if key not in now]:
            del self._heard[key]
        for key, told in now.items():
            if key not in self._heard:
                self._heard[key] = Heard(told)
                continue
            heard = self._heard[key]
            heard.hear(told, passed_s)
            why = heard.explain_hang(self.limit_s)
            if heard.silent_s < self.limit_s / 2 and not why:
                heard.noticed = False
            elif heard.noticed and not why:
                continue
            elif not _send_signal(told, 0):
                forget_pulse(key)  # it has ended, and was not waited for
            elif why:
                self._say(told, f"{why}: it is ended")
                _send_signal(told, signal.SIGKILL)
                forget_pulse(key)
            else:
                heard.noticed = True
                self._say(told, f"has not been heard for {heard.silent_s:.0f} s; at {self.limit_s:.0f} s it is ended")
        self.silent = {
            str(heard.told["trial"]): heard.silent_s for heard in self._heard.values() if heard.noticed
        }  # fmt: skip

    def _say(self, told: Mapping[str, Any], text: str) -> None:
        self._said.append((str(told["trial"]), f"{told['what'] or 'an idle one'} (process {told['pid']}) {text}"))


def _read_title(pid: int) -> str:
    """What a process of this machine calls itself."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace").rpartition("/")[2]


def _send_signal(told: Mapping[str, Any], number: int) -> bool:
    """Sends a signal to a process of the cluster; whether it was there."""
    if told["node"] == ray.get_runtime_context().get_node_id():
        return send(told["pid"], told["born"], number)
    there = NodeAffinitySchedulingStrategy(told["node"], soft=False)
    asked = send_signal.options(scheduling_strategy=there).remote(told["pid"], told["born"], number)
    try:
        return bool(ray.get(asked, timeout=TO_ANSWER_S))
    except (ray.exceptions.RayError, TimeoutError) as error:  # its machine is gone, which Ray deals with
        log.info("process %s of node %s was not reached: %s", told["pid"], told["node"], json.dumps(str(error)))
        return False
