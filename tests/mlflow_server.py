"""A real MLflow server for tests."""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.client import parse_headers
from pathlib import Path

from orchestrator import ui
from orchestrator.tracking.server import make_database
from workers.data.cache import find_default_cache


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
        self.stop()  # where a test before this one failed
        make_database(self.folder / "mlflow.db", find_default_cache())
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
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def answer(status: str, body: str, kind: str = "text/html") -> bytes:
    """What a server sends, whole."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()


class Between:
    """Stands before a server: answers the first connections by `first` (b"": drops it), passes the others on."""

    def __init__(self, first: Sequence[bytes], server: Server | None = None) -> None:
        self.left, self._server = list(first), server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "Between":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:  # closed
                return
            if self.left or self._server is None:
                canned = self.left.pop(0) if self._server else self.left[0]
                with near, near.makefile("rb") as request:
                    request.readline()  # all of it is read: a socket closed with some unread resets its connection
                    request.read(int(parse_headers(request).get("Content-Length", 0)))
                    near.sendall(canned)
                continue
            far = socket.create_connection(("127.0.0.1", self._server.port))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        try:
            while content := source.recv(65536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # the other side has closed it
            source.close()
