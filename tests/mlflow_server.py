"""A real MLflow server for tests."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from orchestrator import ui
from orchestrator.tracking.server import make_database
from workers.data import default_cache


class Server:
    """A real `mlflow server` on a port of its own that can be stopped and started again.

    By default its clients' files go through it; with `direct` they write and read them where it says.
    """

    def __init__(self, folder: Path, direct: bool = False) -> None:
        self.folder, self.direct = folder, direct
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        make_database(self.folder / "mlflow.db", default_cache())
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        artifacts = str(self.folder / "artifacts")
        command += (
            ["--no-serve-artifacts", "--default-artifact-root", artifacts]
            if self.direct
            else ["--serve-artifacts", "--artifacts-destination", artifacts]
        )
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **ui.LIGHT}, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                self.process.poll()

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
