"""Signals to this process: put off while something must not be cut, or sent by one of its threads to another."""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def put_off_signals() -> Iterator[None]:
    """Python's handlers of SIGINT, SIGTERM and SIGHUP are called at the end of the block.

    A stream that an exception closes in the middle would put what it has until then. In other threads than the main
    one no handler runs.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        before = {number: handler for number, handler in found.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def allow_interrupt() -> Iterator[Callable[[], object]]:
    """What another thread calls to interrupt this one as ctrl-C does, however the process inherited SIGINT.

    A shell has what a script starts in the background ignore it. In another thread than the main one KeyboardInterrupt
    is raised as soon as Python code runs there.
    """
    own = threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(own), ctypes.py_object(KeyboardInterrupt)
        )
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield lambda: signal.pthread_kill(own, signal.SIGINT)
    finally:
        if not callable(before):
            signal.signal(signal.SIGINT, before)
