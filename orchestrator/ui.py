"""`python -m orchestrator.ui`: MLflow's UI on the database of a local storage, at 127.0.0.1 alone."""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator import cli, interrupts
from orchestrator.tracking.moves import ARTIFACTS
from orchestrator.tracking.server import make_database_uri, ready_database
from workers.config import Mistake

EXAMPLES = ("", "--storage runs --port 5001")
# By default MLflow starts a dozen processes (2 GB); the UI needs one worker and no job runners (0.4 GB).
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def make_server_command(storage: Path, port: int) -> list[str]:
    """The server's command line. Raises Mistake where there is nothing to show or the port is taken."""
    root = storage.absolute()
    if not (root / "mlflow.db").exists():
        raise Mistake(
            f"{root} has no mlflow.db: no sweep has recorded there yet. Give the sweep's storage (--storage DIR), or "
            "run one first. Where the experiment names a tracking.uri, open that address in the browser instead."
        )
    ready_database(root / "mlflow.db")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise Mistake(
                f"Port {port} cannot be used ({error}): is the UI open already at http://127.0.0.1:{port}? "
                f"Otherwise choose another: --port {port + 1}"
            ) from error
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    uri = make_database_uri(root / "mlflow.db")
    command += ["--backend-store-uri", uri, "--registry-store-uri", uri]  # whatever the environment names
    return [*command, "--artifacts-destination", (root / ARTIFACTS).as_uri()]


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("ui", "", EXAMPLES, endings={cli.DONE: "ctrl-C ended it"})
    cli.add_storage(result, "the sweep's storage")
    result.add_argument("--port", type=int, default=5000, help="of 127.0.0.1 (default: 5000)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    if "://" in options.storage:
        raise Mistake(
            f"--storage {options.storage}: of a remote storage, MLflow is a server of its own: open the address that "
            "tracking.uri (--tracking-uri) names. That of cluster.yaml is reached by: ray attach cluster.yaml -p 5000"
        )
    command = make_server_command(Path(options.storage), options.port)
    print(f"http://127.0.0.1:{options.port}/#/experiments?workflowType=machine_learning  (ctrl-C ends it)", flush=True)
    return serve(command)


def serve(command: list[str]) -> int:
    """Runs the server until it ends or ctrl-C; in a session of its own, so that it hears of ctrl-C once, as a wish."""
    interrupts.arm()
    server = subprocess.Popen(command, env={**os.environ, **LIGHT}, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.call("ui", main))
