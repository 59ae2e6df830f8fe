"""The Ray of this machine alone: its processes, brought up for a session or ahead of it.

A command loads for seconds before it opens its session (PyTorch, Ray Tune, MLflow). Where it will need a Ray, this
starts it first: its daemons and the processes of trials then load beside the command, on the other cores.
"""

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import ray

from orchestrator import interrupts
from orchestrator.execution.loss import MARKER, ClusterLost, stop
from orchestrator.ray_internals import find_default_folder, hear_ray, start_few
from workers.config import Mistake
from workers.disk import StorageError, Unwritable, check_writable
from workers.speed import count_cores

log = logging.getLogger(__name__)

# In its temporary folder Ray keeps sockets, whose paths Linux bounds, logs, and what Tune notes of a sweep.
SOCKET, SOCKET_BYTES = "session_2026-11-26_15-21-23_069432_4194304/sockets/plasma_store", 107
ROOM_MB, FULL_MB = 32, 0.1  # to start in, and with so little left it is full
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our journal
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctrl-C reaches us
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # how many may be started is `_Admission`'s to say
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray Train looks at reports once in 2 s by default; on a laptop a validation may come more often.
WORKERS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}

# What each process of a local Ray loads as it starts, and not only when it is given work. None of it is ours, as a
# process learns only with its work where the command's own modules are; Ray Tune is for those of trials alone, and Ray
# starts others beside them. Of many cores it would take gigabytes.
LOADED, MOST_LOADED = "torch", 16
# A process without work is kept so long. Ray keeps it for a second, and then starts another for the next piece of work;
# by default it even ends what it has just started, where the driver takes longer to have work for it.
KEPT_MS = 60_000


@dataclass
class LocalRay:
    marker: str  # in the environment of its processes
    opened: ExitStack  # ends it


_early: list[LocalRay] = []  # what was started ahead of its session
STARTING = threading.RLock()  # a process has one Ray at a time: sweeps of several threads come one after the other


def prepare_environment() -> None:
    """What Ray and its libraries read as they start: they are quiet."""
    os.environ.update({name: value for name, value in (QUIET | WORKERS).items() if name not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it prints a page of, `trials` tells in a line


@contextmanager
def start_early() -> Iterator[None]:
    """Starts the Ray of the session that is opened next, and ends it with the block where none was opened.

    Where it does not start the session starts it again, and tells of it.
    """
    local: LocalRay | None = None
    try:
        with STARTING, interrupts.allow_interrupts(), _load_beside(LOADED):
            if not ray.is_initialized():
                _early.append(local := start(None))
    except ClusterLost as lost:
        log.info("%s; it is started again for the session", lost)
    try:
        with interrupts.do_at_once(lambda: stop(local.marker, 0)) if local else nullcontext():
            yield
    finally:
        with STARTING:
            if local in _early:
                end_early()


@contextmanager
def _load_beside(module: str) -> Iterator[None]:
    """Loads a module while the block waits for other processes. Whoever needs it is told where it cannot be loaded."""

    def load() -> None:
        with suppress(Exception):
            import_module(module)

    loading = threading.Thread(target=load, name=f"load {module}")
    loading.start()
    try:
        yield
    finally:
        loading.join()


def end_early() -> None:
    """Ends what was started ahead of a session that is of another kind, or is not opened."""
    while _early:
        _early.pop().opened.close()


def is_early() -> bool:
    """Whether the Ray that is there waits for its session."""
    return bool(_early)


def take_or_start(cpus: int | None) -> LocalRay:
    """The Ray that was started early, else a new one. Raises ClusterLost where it does not start."""
    if cpus is not None:
        end_early()
    return _early.pop() if _early else start(cpus)


def start(cpus: int | None) -> LocalRay:
    """Brings up a Ray of so many logical cores. Raises ClusterLost where it does not start."""
    prepare_environment()
    # A logical core more than the machine has, so that evaluation blocks run while the others train.
    cores, store_bytes, marker = cpus or count_cores() + 1, 256 * 2**20, uuid.uuid4().hex
    with ExitStack() as opened:
        folder = opened.enter_context(_make_temporary_folder())
        opened.callback(stop, marker)
        opened.callback(ray.shutdown)
        with start_whole(marker):
            try:
                ray.init(
                    "local",
                    num_cpus=cores,
                    include_dashboard=False,
                    object_store_memory=store_bytes,
                    logging_level="ERROR",
                    log_to_driver=False,
                    _temp_dir=folder,
                )
            except Exception as error:  # whatever Ray raises, where a part of it died or hung as it started
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ClusterLost(f"Ray did not start ({reason})") from error
        return LocalRay(marker, opened.pop_all())


def _list_variables(marker: str) -> dict[str, str]:
    """Of the processes of a local Ray; those that the user has set stay."""
    # Ray sets the threads as it hands out work, which is too late for libraries that are loaded.
    chosen = {"OMP_NUM_THREADS": "1", "RAY_idle_worker_killing_time_threshold_ms": str(KEPT_MS)}
    if count_cores() <= MOST_LOADED:
        chosen["RAY_preload_python_modules"] = LOADED
    return {MARKER: marker, **{name: value for name, value in chosen.items() if name not in os.environ}}


@contextmanager
def start_whole(marker: str) -> Iterator[None]:
    """Ray is brought up in the block, whole or not at all; where there is a `marker`, as a Ray of this machine alone.

    The signals stay ours: Ray would end a driver by sys.exit.
    """
    with ExitStack() as opened:
        opened.enter_context(interrupts.defer_interrupts())
        if marker:
            opened.enter_context(start_few(_list_variables(marker)))
        if threading.current_thread() is threading.main_thread():
            opened.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        hear_ray()
        yield


_in_use: list[Path] = []  # the temporary folder of a Ray of this machine, while there is one


@contextmanager
def _make_temporary_folder() -> Iterator[str]:
    """Where a local Ray keeps its files: where it does so by itself, or else in /tmp/ray. Raises Mistake."""
    try:
        tempfile.gettempdir()  # Tune's place
    except FileNotFoundError as error:
        raise Mistake(f"{error.strerror}; set the environment variable TMPDIR to one that can be written") from error
    folder, unfit = find_folder([find_default_folder(), Path("/tmp/ray")])
    if folder is None:
        raise Mistake(
            f"{'; '.join(unfit)}. Set the environment variable RAY_TMPDIR to a short path with {ROOM_MB} MB free"
        )
    if unfit:
        log.warning("%s; Ray uses %s instead", "; ".join(unfit), folder)
    _in_use.append(folder)
    try:
        yield str(folder)
    finally:
        _in_use.remove(folder)


def find_folder(choices: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The first folder that Ray can work in, and why it cannot in those before it."""
    unfit: list[str] = []
    for folder in dict.fromkeys(choices):
        if not (why := _explain_unfit(folder)):
            return folder, unfit
        unfit.append(why)
    return None, unfit


def _explain_unfit(folder: Path) -> str:
    if (excess := len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES) > 0:
        return f"the temporary folder {folder} is a path {excess} bytes too long for the sockets of Ray"
    try:
        check_writable(folder)
        free = shutil.disk_usage(folder).free / 2**20
    except (StorageError, OSError) as error:
        return f"the temporary folder {str(error).partition('. ')[0]}"
    return "" if free >= ROOM_MB else f"the temporary folder {folder} has {free:.1f} MB free, and Ray needs {ROOM_MB}"


def check_room() -> None:
    """Raises Unwritable where the folder of a local Ray is full: its processes then die, or wait for ever."""
    for folder in _in_use:
        try:
            free = shutil.disk_usage(folder).free / 2**20
        except OSError as error:
            raise Unwritable.of(folder, error) from error
        if free < FULL_MB:
            raise Unwritable.of(folder, OSError(errno.ENOSPC, "the disk of Ray's files is full"))
