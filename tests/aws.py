"""Amazon on loopback: moto's server as a process of its own, over real HTTP, and a way to it that drops connections."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.request import urlopen

import boto3

REGION = "eu-central-1"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(endpoint: str) -> dict[str, str]:
    """What a program finds in its environment to talk to the mock and to nobody else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def moto() -> Iterator[str]:
    """A mock of AWS; gives its URL. This process's environment leads to it as long as it runs."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(endpoint + "/moto-api/", server)
        os.environ.update(environment(endpoint))
        yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait()


def wait_for(url: str, server: subprocess.Popen[Any], timeout_s: float = 60) -> None:
    """Until somebody answers at `url`."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(OSError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"{server.args!r} does not answer at {url}")
        time.sleep(0.1)


def end(server: subprocess.Popen[Any]) -> None:
    """Asks a server that has a session of its own, and MLflow's workers theirs, to end, and waits for it."""
    server.terminate()
    try:
        server.wait(timeout=30)
    finally:
        server.kill()
        server.wait()


def client(service: str, endpoint: str, region: str = REGION) -> Any:
    return boto3.client(service, endpoint_url=endpoint, region_name=region)


class Proxy:
    """Passes connections to `port` on, save the next `to_drop` answers, which it cuts off after `after` bytes."""

    def __init__(self, port: int) -> None:
        self._target, self._socket = port, socket.create_server(("127.0.0.1", 0))
        self.port, self.to_drop, self.after, self.dropped = self._socket.getsockname()[1], 0, 0, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._socket.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answer: bool) -> None:
        left = None
        with suppress(OSError):  # the other direction has ended it
            while piece := source.recv(65536):
                if answer and left is None and self.to_drop > 0:
                    self.to_drop -= 1
                    self.dropped += 1
                    left = self.after
                if left is not None:
                    target.sendall(piece[:left])
                    left -= len(piece)
                    if left <= 0:
                        break
                    continue
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._socket.close()
