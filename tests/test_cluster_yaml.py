"""cluster.yaml and what it calls: Ray's own checks, a launch on a mock of AWS, and the scripts of the head, run."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aws
import pytest
import yaml
from conftest import environment_of, processes
from mlflow import MlflowClient
from ray.autoscaler import tags
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.clusters.cluster import read_cluster
from workers.storage import Storage

ROOT = Path(__file__).parent.parent
REGION = "us-west-2"
SCRIPTS = sorted((ROOT / "deploy/aws").glob("*.sh"))


def cluster_file() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


# ---- The file --------------------------------------------------------------------------------------------------


def commands(config: dict[str, Any]) -> list[str]:
    return [text for key, value in config.items() if key.endswith("_commands") for text in value]


def test_ray_accepts_the_file() -> None:
    validate_config(prepare_config(cluster_file()))


def test_the_planner_knows_its_machines_and_what_they_cost() -> None:
    cluster = read_cluster(ROOT / "cluster.yaml")
    assert len(cluster.nodes()) == 1 + cluster.most and max(node.gpus for node in cluster.nodes()) == 8
    prices = yaml.safe_load((ROOT / "prices.yaml").read_text())["hourly"]
    assert {kind.instance for kind in cluster.types} <= set(prices)
    assert [kind.spot for kind in cluster.types] == [False, True, True, True]


@pytest.mark.parametrize(
    ("path", "value"),
    [(["idle_timeout"], 10), (["available_node_types", "gpu_1", "max_wokers"], 3), (["max_workers"], "many")],
)
def test_ray_refuses_what_is_misspelt_in_it(path: list[str], value: object) -> None:
    """So that the test above means something."""
    config = cluster_file()
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(Exception, match=f"{path[-1]}|{value}"):
        validate_config(prepare_config(config))


def test_what_it_copies_is_there_and_what_it_runs_is_copied() -> None:
    config = cluster_file()
    mounts = config["file_mounts"]
    assert all((ROOT / source).exists() for source in mounts.values() if not source.startswith("~"))
    for command in commands(config):
        for script in re.findall(r"~/diffusion-orchestrator/(\S+)", command):
            assert (ROOT / script).is_file() and f"~/diffusion-orchestrator/{script.partition('/')[0]}" in mounts
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert {f"~/diffusion-orchestrator/{name}" for name in packages} <= set(mounts)
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_its_shell_is_shell(tmp_path: Path) -> None:
    fragments = commands(cluster_file()) + [path.read_text() for path in SCRIPTS]
    for text in fragments:
        result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert result.returncode == 0, f"{text}\n{result.stderr}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="Debian's shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    result = subprocess.run(["shellcheck", "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    for text in commands(cluster_file()):
        script = f'#!/bin/bash\n: "${{RAY_HEAD_IP:=}}"\n{text}\n'
        result = subprocess.run(["shellcheck", "-e", "SC2086", "-"], input=script, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_everything_answers_on_loopback_alone_and_asks_for_the_token() -> None:
    starts = [text for text in commands(cluster_file()) if "ray start --head" in text]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0]
    assert "--host 127.0.0.1" in (ROOT / "deploy/aws/mlflow.sh").read_text()
    shown = subprocess.run(
        ["bash", "-c", ". deploy/aws/env.sh; env"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert "RAY_AUTH_MODE=token" in shown.splitlines()


# ---- A launch on a mock of AWS ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def account() -> Iterator[str]:
    """An account with what deploy/aws/account.yaml makes."""
    with aws.moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        aws.client("cloudformation", endpoint, REGION).create_stack(
            StackName="diffusion-orchestrator",
            TemplateBody=(ROOT / "deploy/aws/account.yaml").read_text(),
            Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "my-bucket"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        yield endpoint


def test_roles_reach_the_bucket_and_no_further(account: str) -> None:
    iam = aws.client("iam", account, REGION)
    stack = aws.client("cloudformation", account, REGION).describe_stacks()["Stacks"][0]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    assert [b["Name"] for b in aws.client("s3", account, REGION).list_buckets()["Buckets"]] == ["my-bucket"]
    allowed: dict[str, list[Any]] = {}
    for role in ("head", "worker"):
        name = f"diffusion-orchestrator-{role}"
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [r["RoleName"] for r in profile["Roles"]] == [name]
        policies = iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        documents = [iam.get_policy_version(PolicyArn=p["PolicyArn"], VersionId="v1") for p in policies]
        allowed[role] = [s for d in documents for s in d["PolicyVersion"]["Document"]["Statement"]]
    on_s3 = [s for s in allowed["worker"] if "s3:" in json.dumps(s["Action"])]
    assert on_s3 == allowed["worker"] and all(s["Resource"].startswith("arn:aws:s3:::my-bucket") for s in on_s3)
    [passing] = [s for s in allowed["head"] if s["Action"] == "iam:PassRole"]
    assert passing["Resource"] == iam.get_role(RoleName="diffusion-orchestrator-worker")["Role"]["Arn"]
    ending = next(s for s in allowed["head"] if "ec2:TerminateInstances" in s["Action"])
    assert ending["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"] == cluster_file()["cluster_name"]


def test_cloudformation_reads_the_template() -> None:
    """It knows no aliases, which PyYAML and moto would take."""
    events = yaml.parse((ROOT / "deploy/aws/account.yaml").read_text(), yaml.SafeLoader)
    assert not [event for event in events if isinstance(event, yaml.AliasEvent)]


@pytest.fixture
def instances(account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One machine of each node type, launched as `ray up` and the autoscaler do; by node type."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the private key there
    config = AWSNodeProvider.bootstrap_config(prepare_config(cluster_file()))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        labels = {
            tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_HEAD if name == config["head_node_type"] else tags.NODE_KIND_WORKER,
            tags.TAG_RAY_USER_NODE_TYPE: name,
            tags.TAG_RAY_LAUNCH_CONFIG: name,
        }
        provider.create_node(kind["node_config"], labels, 1)
    found = aws.client("ec2", account, REGION).describe_instances()["Reservations"]
    machines = [machine for reservation in found for machine in reservation["Instances"]]
    return {next(t["Value"] for t in m["Tags"] if t["Key"] == tags.TAG_RAY_USER_NODE_TYPE): m for m in machines}


def test_machines_are_launched_as_the_file_says(account: str, instances: dict[str, Any], tmp_path: Path) -> None:
    assert set(instances) == set(cluster_file()["available_node_types"])
    workers = {name: m for name, m in instances.items() if name != "head"}
    assert len({m["InstanceType"] for m in workers.values()}) == len(workers) >= 2
    assert "InstanceLifecycle" not in instances["head"]
    assert {m["InstanceLifecycle"] for m in workers.values()} == {"spot"}
    for name, machine in instances.items():
        assert machine["MetadataOptions"]["HttpTokens"] == "required", name
        role = "head" if name == "head" else "worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/diffusion-orchestrator-{role}")
        [disk] = [d for d in machine["BlockDeviceMappings"] if d["DeviceName"] == "/dev/sda1"]
        [volume] = aws.client("ec2", account, REGION).describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
        assert volume["Encrypted"] and volume["Size"] == 200
    [key] = (tmp_path / ".ssh").glob("ray-autoscaler_*.pem")
    assert key.stat().st_mode & 0o077 == 0


def test_the_world_reaches_ssh_and_nothing_else(account: str, instances: dict[str, Any]) -> None:
    groups = {g["GroupId"] for m in instances.values() for g in m["SecurityGroups"]}
    assert len(groups) == 1
    [group] = aws.client("ec2", account, REGION).describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    assert group["GroupName"] == "diffusion-orchestrator"
    open_to_all = [p for p in group["IpPermissions"] if p["IpRanges"] or p.get("Ipv6Ranges") or p.get("PrefixListIds")]
    assert [(p["IpProtocol"], p["FromPort"], p["ToPort"]) for p in open_to_all] == [("tcp", 22, 22)]
    among = [p for p in group["IpPermissions"] if p["UserIdGroupPairs"]]
    assert all({pair["GroupId"] for pair in p["UserIdGroupPairs"]} == groups for p in among)


# ---- The head's scripts, run -----------------------------------------------------------------------------------

CRONTAB = """#!/bin/bash
# Keeps the table in a file of the test's, as Debian's keeps it in /var/spool/cron.
set -e
if [ "$1" = -l ]; then cat "$HOME/table"; else cp "$1" "$HOME/table"; fi
"""


@pytest.fixture
def head(account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """(home, MLflow's address) of a head: deploy/ as it is mounted there, with a bucket and a free port."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "deploy", home / "diffusion-orchestrator/deploy")
    shutil.copytree(ROOT / "experiments", home / "diffusion-orchestrator/experiments")
    settings = home / "diffusion-orchestrator/deploy/aws/settings.env"
    settings.write_text(settings.read_text().replace("BUCKET=", "BUCKET=my-bucket"))
    address = f"http://127.0.0.1:{aws.free_port()}"
    script = home / "diffusion-orchestrator/deploy/aws/env.sh"
    script.write_text(script.read_text().replace("http://127.0.0.1:5000", address))
    (home / "venv").symlink_to(sys.prefix)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield home, address
    stop_mlflow(home)


def stop_mlflow(home: Path) -> None:
    """Ends MLflow's processes, which sit in several sessions: those that hold its lock, or were started in its home."""
    lock = home / "mlflow/lock"
    while holders := [pid for pid in processes() if holds(pid, lock) or str(home) in environment_of(pid)]:
        for pid in holders:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def holds(pid: int, file: Path) -> bool:
    with suppress(FileNotFoundError, PermissionError):
        return any(descriptor.readlink() == file for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    return False


def as_cron(home: Path, command: str) -> subprocess.Popen[str]:
    """Runs a command of the crontab with what cron gives it, and the way to the mock."""
    passed = {name: os.environ[name] for name in (*aws.environment(""), "PYTHONPATH")}
    environment = {"HOME": str(home), "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", **passed}
    return subprocess.Popen(["/bin/sh", "-c", command], env=environment, cwd=home, start_new_session=True, text=True)


@pytest.mark.faults
def test_mlflow_is_kept_running_and_its_database_in_the_bucket(account: str, head: tuple[Path, str]) -> None:
    home, address = head
    keep, database = f"bash {home}/diffusion-orchestrator/deploy/aws/mlflow.sh", home / "mlflow/mlflow.db"
    server = as_cron(home, keep)
    aws.wait_for(f"{address}/health", server, timeout_s=180)
    assert as_cron(home, keep).wait(timeout=60) == 0 and server.poll() is None  # the next minute
    client = MlflowClient(address)
    run = client.create_run(client.create_experiment("kept"))
    client.log_text(run.info.run_id, "text", "a.txt")
    keys = [k["Key"] for k in aws.client("s3", account, REGION).list_objects_v2(Bucket="my-bucket")["Contents"]]
    assert any(key.startswith("mlflow/") and key.endswith("a.txt") for key in keys)
    assert as_cron(home, f"{keep} save").wait(timeout=60) == 0

    stop_mlflow(home)
    database.unlink()  # another head, another disk
    server = as_cron(home, keep)
    aws.wait_for(f"{address}/health", server, timeout_s=180)
    assert MlflowClient(address).get_experiment_by_name("kept")
    with closing(sqlite3.connect(database)) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert Storage("s3://my-bucket").list("mlflow-copy") == ["mlflow.db"]


@pytest.fixture
def postgres(head: tuple[Path, str]) -> Iterator[str]:
    """The URI of a database of a Postgres server on the loopback, its password in the head's ~/.pgpass."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or os.getuid():
        pytest.skip("needs Debian's postgresql, and root to run it as its user")
    as_user = ["runuser", "-u", "postgres", "--"]
    with tempfile.TemporaryDirectory() as folder:
        data, secret, port = Path(folder, "data"), Path(folder, "password"), aws.free_port()
        secret.write_text("of a test\n")
        for path in (Path(folder), secret):
            shutil.chown(path, "postgres")
        options = ["-A", "scram-sha-256", "-U", "mlflow", f"--pwfile={secret}", "-D", str(data)]
        subprocess.run([*as_user, str(programs[-1] / "initdb"), *options], check=True, capture_output=True, cwd=folder)
        listen = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
        control = [*as_user, str(programs[-1] / "pg_ctl"), "-D", str(data), "-w"]
        log = Path(folder, "log")
        subprocess.run([*control, "-o", listen, "-l", str(log), "start"], check=True, capture_output=True, cwd=folder)
        pgpass = head[0] / ".pgpass"
        pgpass.write_text(f"127.0.0.1:{port}:*:mlflow:of a test\n")
        pgpass.chmod(0o600)
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=folder)


@pytest.mark.faults
def test_mlflow_keeps_its_runs_in_postgres_where_the_settings_say_so(head: tuple[Path, str], postgres: str) -> None:
    home, address = head
    Storage("s3://my-bucket").delete("mlflow-copy")  # of another test: the mock of AWS is one for this module
    settings = home / "diffusion-orchestrator/deploy/aws/settings.env"
    [line] = [line for line in settings.read_text().splitlines() if line.startswith("MLFLOW_BACKEND=")]
    settings.write_text(settings.read_text().replace(line, f"MLFLOW_BACKEND={postgres}"))
    keep = f"bash {home}/diffusion-orchestrator/deploy/aws/mlflow.sh"
    aws.wait_for(f"{address}/health", as_cron(home, keep), timeout_s=180)
    MlflowClient(address).create_experiment("kept")
    assert as_cron(home, f"{keep} save").wait(timeout=60) == 0  # nothing to do: the server keeps copies of its own
    stop_mlflow(home)
    aws.wait_for(f"{address}/health", as_cron(home, keep), timeout_s=180)
    assert MlflowClient(address).get_experiment_by_name("kept")
    assert sorted(path.name for path in (home / "mlflow").iterdir()) == ["lock", "server.log"]
    assert Storage("s3://my-bucket").list("mlflow-copy") == []


def test_the_head_is_set_up_once(head: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a crontab of its own: the machine's is not touched."""
    home, address = head
    program, table = home / "bin/crontab", home / "table"
    program.parent.mkdir()
    program.write_text(CRONTAB)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    table.write_text("0 1 * * * somebody elses\n")
    command = ["bash", str(home / "diffusion-orchestrator/deploy/aws/head.sh")]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = table.read_text().splitlines()
        for part in ("somebody elses", "deploy/aws/mlflow.sh", "deploy/aws/mlflow.sh save", "orchestrator.nightly"):
            assert sum(line.endswith(part) or part in line for line in lines) == (
                2 if part.endswith("mlflow.sh") else 1
            )
    assert "--storage s3://my-bucket/runs" in table.read_text() and f"--tracking-uri {address}" in table.read_text()


def test_a_head_without_a_bucket_says_so(head: tuple[Path, str]) -> None:
    home, _ = head
    settings = home / "diffusion-orchestrator/deploy/aws/settings.env"
    settings.write_text(settings.read_text().replace("BUCKET=my-bucket", "BUCKET="))
    result = subprocess.run(
        ["bash", home / "diffusion-orchestrator/deploy/aws/head.sh"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "names no bucket" in result.stderr
