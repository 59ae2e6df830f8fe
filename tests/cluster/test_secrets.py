"""A sweep tells nobody the secrets of its environment, and nobody on another machine can speak to its processes."""

import ipaddress
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Started, state_of, title

MARK = "planted"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAplanted",
    "AWS_SECRET_ACCESS_KEY": "planted/secret",
    "AWS_SESSION_TOKEN": "planted-session",
    "AWS_SECURITY_TOKEN": "planted-security",
    "AWS_ENDPOINT_URL": "http://user:planted@127.0.0.1:1",
    "AWS_ENDPOINT_URL_S3": "http://user:planted@127.0.0.1:1",
    "GITHUB_TOKEN": "ghp_planted",
    "HF_TOKEN": "hf_planted",
    "MLFLOW_TRACKING_USERNAME": "planted-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-password",
    "MLFLOW_TRACKING_TOKEN": "planted-token",
    "MLFLOW_BACKEND_STORE_URI": "postgresql://user:planted@127.0.0.1/mlflow",
    "NIGHTLY_WEBHOOK": "https://hooks.example/services/planted",
    "RAY_AUTH_TOKEN": "planted" * 6,
}


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray logs: a folder of this test, whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="logs-"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_secrets_are_told_nobody_and_only_this_machine_is_listened_to(
    tiny: Path, tmp_path: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trial of one worker and one of two: files, MLflow, Ray's logs, the output, command lines; and addresses."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    storage, addresses, commands = tmp_path / "runs", set[tuple[str, str]](), set[str]()
    started = Started(
        tiny, "--verbose", "--storage", storage, "search.space.loss.weighting=null",
        "search.space.training.grid=[{workers: 1}, {lr: 1.0e-3, workers: 2}]", "training.steps=4",
        "training.validate_every=1", "evaluation={nll: {images: 5, timesteps: 2}, fid: null}",
    )  # fmt: skip
    try:
        while started.process.poll() is None:
            ours = {pid: title(pid) for pid in [*started.family(), started.process.pid]}
            commands |= set(ours.values())
            addresses |= {(address, title) for pid, title in ours.items() for address in listening(pid)}
            time.sleep(1)  # to look at all processes takes a core
        assert started.process.returncode == 0, started.read_output()
        assert MARK not in started.read_output()
    finally:
        started.end()
    assert [state for state, _ in state_of(storage).values()] == ["finished", "finished"]
    assert any("OneWorker" in command for command in commands) and any("RayTrainWorker" in c for c in commands)
    assert not [command for command in commands if MARK in command]
    written = [path for folder in (storage, ray_folder) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in written) and any(p.suffix == ".db" for p in written)
    assert [str(path) for path in written if MARK.encode() in path.read_bytes()] == []
    assert len(addresses) > 5
    assert [pair for pair in sorted(addresses) if not loopback(pair[0])] == []


def loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def listening(pid: int) -> Iterator[str]:
    """The addresses at which a process takes TCP connections, from /proc; none of one that has ended."""
    try:
        links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    except OSError:  # it ends just now
        return
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    for line in (line for table in tables for line in table.splitlines()[1:]):
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and inode in sockets:
            words = bytes.fromhex(local.partition(":")[0])
            packed = b"".join(
                struct.pack(">I", *struct.unpack("<I", words[i : i + 4])) for i in range(0, len(words), 4)
            )
            yield str(ipaddress.ip_address(packed))
