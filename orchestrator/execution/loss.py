"""Whether Ray is still there: a local one by its processes, another one by the addresses that have to answer.

Ray does not say so itself: without its raylet a driver waits for ever, and without its GCS it is aborted after 60 s.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from orchestrator import cli, interrupts
from workers.config import Mistake

LOOK_S = 0.25
SILENT_S = 30.0  # an address that does not answer for so long is lost
TO_LEAVE_S = 30.0  # for the command to have left a lost Ray: nothing cuts off a call that waits for Ray's GCS
TO_STOP_S = 5.0  # for the processes of a local Ray to end by themselves
MARKER = "ORCHESTRATOR_RAY"  # in the environment of a local Ray's processes


class ClusterLost(Mistake):
    """Ray is gone, or a part of it without which it can do nothing. The same command resumes."""

    status = cli.CLUSTER_LOST


class Watch:
    """Looks after the `parts`, processes by their names, and the `addresses`, (host, port) by what answers there."""

    def __init__(
        self,
        parts: Mapping[str, subprocess.Popen[bytes]],
        addresses: Mapping[str, tuple[str, int]],
        marker: str,
        left: threading.Event,
        *,
        also: Callable[[], object] = lambda: None,
    ) -> None:
        """`also` is called again and again, from the thread that watches."""
        self._parts, self._addresses = parts, addresses
        self._marker, self._left, self._also = marker, left, also
        self._answered = dict.fromkeys(addresses, time.monotonic())
        self._silent, self._understood = "", time.monotonic()

    def explain_loss(self) -> str:
        """What is lost, in words; empty where all is there."""
        return next((text for name, part in self._parts.items() if (text := describe_death(name, part))), self._silent)

    @contextmanager
    def keep_looking(self) -> Iterator[None]:
        """Watches for the length of the block. Where Ray is lost meanwhile, ClusterLost comes out of it.

        Where the command has not `left` Ray soon after, as a call to it does not return, the process ends with the
        status of ClusterLost.
        """
        closing = threading.Event()
        threading.Thread(target=self._look, args=(closing,), name="ray is there", daemon=True).start()
        try:
            yield
        except Exception as error:
            if (lost := self.explain_loss()) and not isinstance(error, ClusterLost):
                raise ClusterLost(lost) from error
            raise
        finally:
            closing.set()

    def check(self) -> None:
        """Raises ClusterLost."""
        if lost := self.explain_loss():
            raise ClusterLost(lost)

    def wait(self, unanswered: str = "") -> None:
        """Returns when all addresses answer. Raises ClusterLost where one does not for too long.

        To be called before Ray's GCS is asked: Ray aborts a process that asks one which does not answer, or another one
        that came to its address. `unanswered` says why a question just asked has no answer, and is empty for a new one.
        """
        self.check()
        if not unanswered:
            self._understood = time.monotonic()
        elif (silent_s := time.monotonic() - self._understood) > SILENT_S:
            raise ClusterLost(f"Ray's GCS has not answered a question for {silent_s:.0f} s ({unanswered})")
        else:
            time.sleep(LOOK_S)
        for host, port in self._addresses.values():
            while not _is_answering(host, port):
                self.check()
                time.sleep(LOOK_S)

    def _look(self, closing: threading.Event) -> None:
        while not closing.wait(LOOK_S):
            self._also()
            for name, address in self._addresses.items():
                self._ask(name, address)
            if lost := self.explain_loss():
                if not self._left.wait(TO_LEAVE_S):
                    stop(self._marker, 0)
                    line = f"{lost}, and a call to it does not return. The same command resumes."
                    interrupts.end_at_once(line, ClusterLost.status)
                return

    def _ask(self, name: str, address: tuple[str, int]) -> None:
        try:
            socket.create_connection(address, timeout=LOOK_S * 20).close()
            self._answered[name] = time.monotonic()
        except OSError as error:
            silent_s = time.monotonic() - self._answered[name]
            if silent_s > SILENT_S:
                self._silent = f"{name} at {address[0]}:{address[1]} has not answered for {silent_s:.0f} s ({error})"


def _is_answering(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=LOOK_S * 20).close()
    except OSError:
        return False
    return True


def describe_death(name: str, process: subprocess.Popen[bytes]) -> str:
    """How a process ended, in words; empty where it runs."""
    status = process.poll()
    if status is None:
        return ""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"Ray's {name} (process {process.pid}) {how}"


def stop(marker: str, patience_s: float = TO_STOP_S) -> None:
    """Waits until no process has the marker in its environment; ends those that remain, and sees them gone."""
    deadline = time.monotonic() + patience_s
    while (left := find_marked(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + TO_STOP_S  # a killed process takes its time to end, and may have started another one
    while left and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = find_marked(marker)


def find_marked(marker: str) -> list[int]:
    """The processes of this machine that were started with the marker; none where the system has no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARKER}={marker}".encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


T = TypeVar("T")


def repeat_where_lost(work: Callable[[], T], say: Callable[[str], None], may: bool, times: int = 3) -> T:
    """Calls `work`, and where it loses a Ray that it may bring up again, once more, up to so many times."""
    while True:
        try:
            return work()
        except ClusterLost as lost:
            if not may or not times:
                raise
            times -= 1
            say(f"{lost}: Ray starts again, and each trial and each evaluation goes on from what is kept of it")
