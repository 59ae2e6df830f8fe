"""What several tests share: a storage, a tiny trial on the digits, and the program run as a user runs it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.experiment.expand import expand, group_by_row
from orchestrator.experiment.load import load
from workers.config import Trial
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.kinds import DENOISER
from workers.layout import name_checkpoints_folder
from workers.network import manifest
from workers.storage import Storage
from workers.training import train

ROOT = Path(__file__).parent.parent

# However the tests themselves were started (a shell has what it starts in the background ignore SIGINT), ctrl-C is
# ctrl-C to them and to the commands that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest begin first: of two processes none waits minutes for the other's last file. Those in
# tests/cluster are before all others by their place.
LONG = ("test_training", "test_readme", "test_cli", "test_browser", "test_sizes", "test_starts", "test_posthoc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.path.parent.name != "cluster", item.path.stem not in LONG))


# Trains in seconds; everything of a real experiment is there.
TINY = """
name: tiny
data: {source: digits}
model: {channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 50, schedule: {kind: linear, scale: per_1000}}
training:
  {steps: 20, batch_size: 32, lr: 2.0e-3, ema: 0.99, precision: float32, validate_every: 10, checkpoint_every: 5}
evaluation:
  nll: {images: 30, timesteps: all}
  fid: {samples: 100, sampler: {kind: ddim, steps: 5}}
search:
  space:
    loss.weighting: {grid: [simple, vlb]}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A file with the tiny experiment."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which root may")


def on_small_disk(place: Path, size: str, *command: object) -> list[str]:
    """The command as one that sees a disk of that size at `place`, which nobody else does and ends with it."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mounted, "sh", size, str(place), *map(str, command)]


def sent(thing: Any) -> Any:
    """The thing as another process receives it."""
    there, here = Pipe()
    there.send(thing)
    return here.recv()


def environment(marker: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), **os.environ, "ORCHESTRATOR_TEST": marker}


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m orchestrator.sweep` with the arguments, in a process of its own."""
    return run("orchestrator.sweep", *arguments)


def run(module: str, *arguments: object, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(""), timeout=timeout_s, cwd=ROOT)


class Started:
    """The sweep command in the background. `kill` ends its driver alone, as a reclaimed machine would."""

    def __init__(
        self,
        *arguments: object,
        module: str = "orchestrator.sweep",
        in_child: Callable[[], object] | None = None,
    ) -> None:
        """`in_child` is called in the new process before the command."""
        self.marker = uuid.uuid4().hex
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 a pipe that nobody reads would fill and stop it
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            env=environment(self.marker),
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=in_child,
        )

    def read_output(self) -> str:
        """All that it has written until now."""
        self.output.seek(0)
        return self.output.read()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended or hung before the condition held:\n{self.read_output()}")
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def family(self) -> list[int]:
        """The processes that the command started and that still run, by the marker in their environment."""
        return [pid for pid in processes() if pid != os.getpid() and self.marker in environment_of(pid)]

    def end(self) -> None:
        """Ends the command and all that it started, by their ids."""
        self.kill()
        for pid in self.family():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself


def processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(experiment file, storage, output) of a sweep that ran undisturbed. Tests leave it as it is: see `own`.

    The test processes of one run share it: the first to ask runs the sweep, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    file, storage, output = folder / "tiny.yaml", folder / "runs", folder / "output"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            file.write_text(TINY)
            result = sweep(file, "--storage", storage)
            assert result.returncode == 0, result.stdout + result.stderr
            output.write_text(result.stdout)
    return file, storage, output.read_text()


@pytest.fixture
def own(finished: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """(experiment file, storage) of a finished sweep that a test may change."""
    shutil.copytree(finished[1], tmp_path / "own")
    return finished[0], tmp_path / "own"


def commit(storage: Storage, trial: str, step: int) -> str:
    """Commits a checkpoint without files, as far as those see it who read manifests alone. Returns its digest."""
    path = f"{name_checkpoints_folder(trial)}/{manifest.name_step(step)}"
    names = (manifest.INDEX, *manifest.EVALUATED[DENOISER], manifest.STATE, manifest.PROGRESS)
    manifest.write_manifest(storage, path, step, {name: f"{trial} {step} {name}" for name in names}, kept=True)
    return manifest.open_committed(storage, path).digest


def statuses(storage: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in storage.glob("trials/*/status.json")}


def state_of(storage: Path) -> dict[str, tuple[str, int]]:
    return {digest: (status["state"], status["step"]) for digest, status in statuses(storage).items()}


def runs(storage: Path, name: str = "tiny") -> tuple[Run, list[Run]]:
    """The sweep's run and its trials', from MLflow."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name(name)
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parent, [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def maps(pid: int) -> str:
    """What a process has loaded."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""


def trials_of(file: Path, *overrides: object) -> dict[str, Trial]:
    """The trials of an experiment by their address."""
    variants = expand(load(file, [str(text) for text in overrides]))
    digests = {v.trial.data: describe(v.trial.data).digest for v in variants}
    return {address: variant.trial for address, variant in group_by_row(variants, digests)[0].items()}


def undisturbed(trial: Trial, folder: Path) -> str:
    """The digest of the final weights where plain Python hosts the loop and nothing happens to it."""
    torch.set_num_threads(trial.training.cpus)
    storage = Storage(folder)
    for _ in train(trial, prepare(trial.data), storage, trial.loss.weighting):
        pass
    newest = manifest.find_newest(storage, f"{trial.loss.weighting}/checkpoints")
    assert newest and newest.step == trial.training.steps
    return newest.digest
