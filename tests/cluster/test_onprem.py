"""`deploy/onprem.yaml` for real: hosts on a network, `ray up`, a sweep sent as a job, a host that dies, `ray down`."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import statuses
from hosts import ROOT, Host, Network, find_missing_tools, network, until

from workers.evaluation.make import HOST

MISSING = find_missing_tools()
pytestmark = [pytest.mark.clusters, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

FILE = ROOT / "experiments/beta_schedule.yaml"
LOG = ROOT / "build/onprem.log"
# Four trials, one a machine: hosts of one core share this machine's. The last trial has so many blocks that the host
# that trained it takes part in making them.
TINY = (
    "search.space.diffusion.T=null", "training.batch_size=64",
    "training.steps=90", "training.validate_every=30", "training.checkpoint_every=30",
    "evaluation.nll.images=50", "evaluation.nll.timesteps=10",
    "evaluation.fid.samples=1500", "evaluation.fid.sampler.steps=5",
)  # fmt: skip


class Story:
    """What happened when, for people: in `build/onprem.log` and in the test's output."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text("")

    def __call__(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:6.1f} s  {text}"
        print(line, flush=True)
        with LOG.open("a") as file:
            file.write(f"{line}\n")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Network]:
    """The user's laptop and three machines, of which nothing is left in the end."""
    with network(tmp_path, ("laptop", "head", "worker-1", "worker-2")) as result:
        yield result
    assert result.left() == []


def test_nothing_is_left_of_hosts_where_a_test_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), network(tmp_path, ("a", "b")) as result:
        a, b = result.hosts.values()
        assert a.run(["hostname"]) == "a\n" and a.run(["ip", "-br", "addr", "show", "eth0"]).count("10.77.0.1/24") == 1
        ssh = ["ssh", "-i", result.key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        assert "\nb\n" in a.run(
            [*ssh, f"root@{b.address}", "hostname; touch ~/only-here; (sleep 600 &) >/dev/null 2>&1"]
        )
        assert any("sleep 600" in title for title in b.processes().values())
        assert not any("sleep 600" in title for title in a.processes().values())
        assert not Path("~root/only-here").expanduser().exists()
        1 / 0  # noqa: B018
    assert result.left() == []


def test_a_sweep_on_three_machines_outlives_its_client_and_one_of_them(hosts: Network, tmp_path: Path) -> None:
    say, storage = Story(), tmp_path / "runs"
    laptop, head, *workers = hosts.hosts.values()
    config = cluster_file(hosts, tmp_path)
    laptop.run(["ray", "get-auth-token", "--generate"])
    for host in (head, *workers):
        host.run(["bash", "-c", INSTALLED, "bash", sys.prefix])
    laptop.run(["ray", "up", "--yes", config])
    say("`ray up` is done")
    for ports in ([], ["--port", 5000, "--remote-port", 5000]):
        laptop.start(["ray", "dashboard", config, *ports], tmp_path / "tunnels.log")
    until(lambda: nodes(laptop) == 3, "three nodes")
    say("three nodes have joined")
    sweep = [
        "python", "-m", "orchestrator.sweep", FILE, *TINY, "--submit", "--address", "http://127.0.0.1:8265",
        "--storage", storage, "--tracking-uri", "http://127.0.0.1:5000",
    ]  # fmt: skip
    refused = laptop.start(sweep, tmp_path / "refused.log", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="x" * 64)
    assert refused.process.wait(timeout=60) == 2
    assert "does not know this token" in (tmp_path / "refused.log").read_text()
    unseen = [Path("~root/runs").expanduser() if word == storage else word for word in sweep]
    blind = laptop.start(unseen, tmp_path / "unseen.log", RAY_AUTH_MODE="token")
    assert blind.process.wait(timeout=180) == 2, (tmp_path / "unseen.log").read_text()
    told = (tmp_path / "unseen.log").read_text()
    assert all(worker.address in told for worker in workers) and "folder that all nodes share" in told, told
    say("a storage that the workers do not see is refused")
    log = tmp_path / "said.log"
    client = laptop.start(sweep, log, RAY_AUTH_MODE="token")

    def victims() -> list[tuple[str, int, Host]]:
        """Trials under way on a worker, with a checkpoint to go on from."""
        return [
            (digest, status["step"], hosts.hosts[status["host"]])
            for digest, status in statuses(storage).items()
            if status["state"] == "running" and 30 <= status["step"] <= 60 and status["host"] != "head"
        ]

    found: list[tuple[str, int, Host]] = []
    until(lambda: bool(found.extend(victims()) or found) or client.process.poll() is not None, "a trial on a worker")
    assert found, log.read_text()
    digest, step, victim = found[0]
    victim.kill()
    say(f"{victim.name} is dead; trial {digest} was at step {step} there")
    client.signal(signal.SIGINT)
    assert client.process.wait(timeout=60) == 130, log.read_text()
    assert "the job goes on" in log.read_text() and "Traceback" not in log.read_text()
    status = laptop.run(["python", "-m", "orchestrator.status", "beta_schedule", "--storage", storage])
    assert digest[:8] in status
    say("ctrl-C on the laptop; the same command again:")
    again = laptop.run(sweep, timeout_s=900, RAY_AUTH_MODE="token")
    for line in again.splitlines():
        say(f"    {line}")
    say("the sweep has ended")
    assert "runs already" in again
    ended = statuses(storage)
    assert [status["state"] for status in ended.values()] == ["finished"] * 4
    trained = {host: [d for d, status in ended.items() if status["host"] == host] for host in hosts.hosts}
    assert ended[digest]["host"] != victim.name, "it began on another host than it ended on"
    made = {host: [p for p in storage.glob("evaluations/*/*/*.parquet") if made_by(p) == host] for host in hosts.hosts}
    for name in hosts.hosts:
        say(f"{name}: {len(trained[name])} trials ended there, {len(made[name])} blocks were made there")
    assert sum(map(bool, made.values())) > 1
    assert mlflow_statuses(laptop) == ["FINISHED"] * 5
    laptop.run(["ray", "down", "--yes", config])
    say("`ray down` is done")
    assert ray_processes(head) == []
    [left] = [worker for worker in workers if worker is not victim]
    left.run(["ray", "stop"])  # by itself it would leave two minutes after the head
    assert ray_processes(left) == []
    say("no process of Ray is left on any host")


# What `make .venv/run.stamp` would install on a machine, if it were not this one: the packages that the test runs with.
INSTALLED = """
mkdir -p ~/diffusion-orchestrator/.venv && cd ~/diffusion-orchestrator/.venv
for name in bin lib include pyvenv.cfg; do ln -s "$1/$name" "$name"; done
touch run.stamp
"""


def cluster_file(hosts: Network, folder: Path) -> Path:
    """deploy/onprem.yaml with the addresses and the key of these hosts, and one core for each."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy/onprem.yaml").read_text())
    _, head, *workers = (host.address for host in hosts.hosts.values())
    content["provider"] |= {"head_ip": head, "worker_ips": workers}
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    small = " --num-cpus=1 --object-store-memory=100000000"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        *before, start = content[commands]
        assert "ray start" in start
        content[commands] = [*before, start + small]
    file = folder / "onprem.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


ASK = """
import pathlib, sys, urllib.request
url, content = sys.argv[1:]
token = pathlib.Path("~/.ray/auth_token").expanduser().read_text()
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
request = urllib.request.Request(url, content.encode() or None, headers)
print(urllib.request.urlopen(request).read().decode())
"""


def ask(laptop: Host, url: str, **content: Any) -> Any:
    """What the head answers through the laptop's tunnels."""
    return json.loads(laptop.run(["python", "-c", ASK, url, json.dumps(content) if content else ""]))


def nodes(laptop: Host) -> int:
    """Nodes of the cluster that are alive; 0 where the tunnel is not open yet."""
    try:
        found = ask(laptop, "http://127.0.0.1:8265/api/v0/nodes")["data"]["result"]["result"]
    except AssertionError:
        return 0
    return sum(node["state"] == "ALIVE" for node in found)


def made_by(block: Path) -> str:
    return str(pq.read_schema(block).metadata[HOST].decode())


def mlflow_statuses(laptop: Host) -> list[str]:
    api = "http://127.0.0.1:5000/api/2.0/mlflow"
    [found] = ask(laptop, f"{api}/experiments/search", max_results=9, filter="name = 'beta_schedule'")["experiments"]
    runs = ask(laptop, f"{api}/runs/search", experiment_ids=[found["experiment_id"]])["runs"]
    return [run["info"]["status"] for run in runs]


def ray_processes(host: Host) -> list[str]:
    return [
        title for title in host.processes().values() if "raylet" in title or "gcs_server" in title or "ray::" in title
    ]
