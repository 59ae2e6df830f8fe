"""Signs of life: each process that works says so every few seconds, and what it is at.

The driver hears them in Ray's store of keys (`orchestrator.execution.hangs`). There a process also hears that it is to
pause, as the time of the driver's job is over soon.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from workers.pulse import Pulse, read_birth, send
from workers.ray_private import delete_key, put_key, read_keys

log = logging.getLogger(__name__)

BEAT_S = 5.0  # so often a process that works says that it runs
PULSES = b"orchestrator-pulses"  # the namespace in Ray's own store of keys, which ends with the cluster
PAUSES = b"orchestrator-pauses"  # that of the jobs whose processes are to pause
PULSE = Pulse()  # this process's own
_self: dict[str, Any] = {}  # which process it is
AT_WORK: dict[str, str] = {}  # what it works at, and for which trial
_telling_it = threading.Lock()


def begin_telling(what: str, trial: str = "") -> Pulse:
    """From here on this process says that it runs, and that it is at `what`; at nothing where that is empty."""
    AT_WORK.update(what=what, trial=trial)
    PULSE.rest()
    if not _self:
        context, pid = ray.get_runtime_context(), os.getpid()
        _self.update(job=context.get_job_id(), node=context.get_node_id(), pid=pid, born=read_birth(pid))
        threading.Thread(target=_beat, name="pulse", daemon=True).start()
    if what:
        _tell()
    return PULSE


def _beat() -> None:
    while True:
        time.sleep(BEAT_S)
        try:
            _tell()
        except Exception:  # whatever Ray raises where its head is gone or slow: the next beat may come through
            log.debug("no beat", exc_info=True)


def _tell() -> None:
    with _telling_it:
        steps = {"steps": PULSE.steps, "slowest_s": PULSE.slowest_s, "between": PULSE.between}
        told = json.dumps({**_self, **AT_WORK, **steps, "beat": time.monotonic_ns()})
        put_key("{job}:{node}:{pid}".format(**_self), told, PULSES)
        PULSE.is_asked_to_pause = bool(read_keys(f"{_self['job']}:", PAUSES))


def ask_to_pause() -> None:
    """All processes of this driver's job are to pause; they hear of it within a beat."""
    put_key(f"{ray.get_runtime_context().get_job_id()}:", "now", PAUSES)


def read_pulses() -> dict[bytes, dict[str, Any]]:
    """What the processes of this driver's job have told last, by its key."""
    told = read_keys(f"{ray.get_runtime_context().get_job_id()}:", PULSES)
    return {key: json.loads(text) for key, text in told.items()}


def forget_pulse(key: bytes) -> None:
    delete_key(key, PULSES)


@ray.remote(num_cpus=0, max_retries=0)
def send_signal(pid: int, its_birth: int, number: int) -> bool:
    """Sends a signal to a process of the node that runs this; whether it was there."""
    return send(pid, its_birth, number)


@contextmanager
def tell_within(what: str) -> Iterator[Pulse]:
    """This process is at `what` within the block, and at nothing after it."""
    pulse = begin_telling(what)
    try:
        yield pulse
    finally:
        begin_telling("")
