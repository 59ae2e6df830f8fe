"""What ctrl-C, SIGTERM and SIGHUP do: the first ends a command in good order, each further one is answered by a line.

A command (`python -m orchestrator.X`) takes them from its first import on, however it inherited SIGINT: a shell has
what a script starts in the background ignore it. A SIGHUP that is ignored (nohup) stays so.

SIGUSR2 says that the time of the command is over soon (SIGUSR1 is Ray Tune's). Work that can pause does so in its own
time (see `pausable`); whatever else is under way ends as by ctrl-C.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # the exit status
PATIENCE_S = 10.0  # so long after the first, another one ends the process at once
AGAIN_S = 0.2  # an interrupt within an import comes again so much later: few libraries bear one there
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2") if hasattr(signal, name))
SIGUSR2 = getattr(signal, "SIGUSR2", None)


class _State:  # no dataclass: a command imports this before it is safe from interrupts, so little is imported here
    came_at: float | None = None  # when the first one came, on the monotonic clock
    ending = False  # it was heard, and the command is on its way out
    put_off = 0  # blocks of `defer_interrupts` under way
    work = 0  # blocks of `allow_interrupts` under way
    pausable = 0  # blocks of `pausable` under way
    asked_to_pause = False

    def __init__(self) -> None:
        self.at_once: list[Callable[[], object]] = []  # what even an end at once has to do


_state = _State()


def arm() -> None:
    """Takes the signals for the rest of this process. What ends an import, an interrupt or a package, is a line."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if not (number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, _handle)
    sys.excepthook = _tell


@contextmanager
def do_at_once(call: Callable[[], object]) -> Iterator[None]:
    """`call` is called where the process ends in the middle of the block, at once and without anything else."""
    _state.at_once.append(call)
    try:
        yield
    finally:
        _state.at_once.remove(call)


@contextmanager
def allow_interrupts(at_once: Callable[[], object] | None = None) -> Iterator[None]:
    """Work that an interrupt ends by KeyboardInterrupt; `at_once` is called where the process ends in the middle of it.

    Outside of a command the signals are taken for the length of the block, in the main thread alone.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not _handle:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        excepthook = sys.excepthook
        arm()
        sys.excepthook = excepthook
        _state.came_at, _state.ending, _state.asked_to_pause = None, False, False
    _state.work += 1
    try:
        with do_at_once(at_once) if at_once else nullcontext():
            yield
    finally:
        _state.work -= 1
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def pausable() -> Iterator[None]:
    """Work that looks at `is_asked_to_pause`, and pauses by itself on SIGUSR2."""
    _state.pausable += 1
    try:
        yield
    finally:
        _state.pausable -= 1


def is_asked_to_pause() -> bool:
    return _state.asked_to_pause


def pause() -> None:
    """What is under way pauses by itself, as nothing more fits into its time."""
    _state.asked_to_pause = True


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """What must not be cut off in the middle: an interrupt is raised at the end of the block."""
    _state.put_off += 1
    try:
        yield
    finally:
        _state.put_off -= 1
    check()


def check() -> None:
    """Raises KeyboardInterrupt where an interrupt has come that was put off, or that a library has swallowed."""
    main = threading.current_thread() is threading.main_thread()
    if main and _state.came_at is not None and not (_state.ending or _state.put_off):
        raise KeyboardInterrupt


def begin_ending() -> None:
    """The interrupt was heard, or the work pauses: from here on further ones are answered by a line."""
    _state.ending = True
    if _state.came_at is None:
        _state.came_at = time.monotonic()


def end_at_once(line: str, status: int) -> None:
    """Ends the process from whatever thread, after what has to be done even then."""
    import logging

    write(line)
    for call in reversed(_state.at_once):
        try:
            call()
        except Exception:  # the process ends here, and the others have their turn
            logging.getLogger(__name__).exception("at the end")
    os._exit(status)


def write(line: str) -> None:
    """A line on stderr, from a signal's handler too: print may be in the middle of another one."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:  # the terminal is gone, and with it whoever could read it
        return


def _handle(number: int, frame: FrameType | None) -> None:
    if number == SIGUSR2 and (_state.pausable or _state.came_at is not None):
        _state.asked_to_pause = True
        signal.signal(number, signal.SIG_IGN)  # it comes again and again, up to the end of the process
        return
    if _state.came_at is None and _is_importing(frame):
        if not _state.work:  # there is nothing yet that would have to be put in order
            end_at_once("\nInterrupted.", INTERRUPTED)
        main = threading.main_thread().ident or 0
        threading.Timer(AGAIN_S, signal.pthread_kill, (main, number)).start()
        return
    if number == SIGUSR2:
        signal.signal(number, signal.SIG_IGN)
    now = time.monotonic()
    if _state.came_at is None:
        _state.came_at = now
        if not _state.put_off:
            raise KeyboardInterrupt
    elif now - _state.came_at < PATIENCE_S:
        write("It is ending: Ray's processes stop, and MLflow's runs are closed.")
    else:
        end_at_once("It ends at once. The same command resumes.", INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        write("\nInterrupted.")
    elif status := getattr(error, "import_status", None):  # `workers.entries.BrokenPackage`: nothing has begun
        write(str(error))
        os._exit(status)
    else:
        sys.__excepthook__(kind, error, trace)
