"""The command that shows a storage in MLflow's pages."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tracked_sweep

from orchestrator import ui
from workers.storage import Storage

storage = tracked_sweep.storage
done = tracked_sweep.done


def test_the_ui_says_what_is_wrong(tmp_path: Path, storage: Storage, done: Any, capsys: Any) -> None:
    assert ui.main(["--storage", str(tmp_path)]) == 2
    assert "has no mlflow.db" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.main(["--storage", storage.root, "--port", str(port)]) == 2
        assert f"--port {port + 1}" in capsys.readouterr().err


def test_the_ui_shows_the_storage_and_ends_on_ctrl_c(storage: Storage, done: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.ui", "--storage", storage.root, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout and f"http://127.0.0.1:{port}/#/" in process.stdout.readline()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 100}',
            headers={"Content-Type": "application/json"},
        )
        reply: dict[str, Any] = {}
        while not reply:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    reply = json.load(answer)
            except urllib.error.HTTPError:
                raise
            except OSError:
                continue
        assert "done" in {experiment["name"] for experiment in reply["experiments"]}
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(request, timeout=5)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
