"""deploy/kuberay*.yaml against the published schemas of KubeRay 1.7.0; MLflow's command, run with its password.

tests/kuberay_schemas.json.gz holds the schemas; its field `about` says where they come from. The operator's rules in
CEL (x-kubernetes-validations) are not evaluated here.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aws
import jsonschema
import pytest
import yaml

from orchestrator import sweep
from orchestrator.experiment.load import load

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "deploy").glob("kuberay*.yaml"))
IMAGE = "diffusion-orchestrator:0.1.0"


def objects(*files: Path) -> list[dict[str, Any]]:
    return [found for file in files or FILES for found in yaml.safe_load_all(file.read_text())]


def one(kind: str) -> dict[str, Any]:
    [found] = [o for o in objects() if o["kind"] == kind]
    return found


def strict(schema: Any) -> Any:
    """A schema that knows no other fields than it names, as `kubectl --validate=strict` reads it."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


SCHEMAS: dict[str, Any] = strict(
    json.loads(gzip.decompress((ROOT / "tests/kuberay_schemas.json.gz").read_bytes()))["schemas"]
)
POD_TEMPLATE = SCHEMAS["RayJob"]["properties"]["spec"]["properties"]["submitterPodTemplate"]


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def containers() -> list[dict[str, Any]]:
    return [container for template in pod_templates(objects()) for container in template["spec"]["containers"]]


# ---- The schemas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEMAS)
def test_kuberay_accepts_what_is_asked_of_it(kind: str) -> None:
    found = [o for o in objects() if o["kind"] == kind]
    assert found
    for o in found:
        assert o["apiVersion"] == "ray.io/v1"
        jsonschema.validate(o, SCHEMAS[kind])


def test_pods_of_other_kinds_are_pods() -> None:
    found = list(pod_templates([o for o in objects() if o["kind"] in ("Deployment", "CronJob")]))
    assert len(found) == 2
    for template in found:
        jsonschema.validate(template, POD_TEMPLATE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "authOption"], {"mode": "token"}),
        (["spec", "authOptions", "mode"], "tokens"),
        (["spec", "workerGroupSpecs", 0, "minReplicas"], "1"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"], []),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
    ],
)
def test_a_slip_is_refused(path: list[Any], value: object) -> None:
    """So that the tests above mean something."""
    cluster = one("RayCluster")
    inner = cluster
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, SCHEMAS["RayCluster"])


# ---- What hangs together ---------------------------------------------------------------------------------------


def test_everything_runs_one_pinned_image_of_the_ray_that_is_locked() -> None:
    assert {container["image"] for container in containers()} == {IMAGE}
    dockerfile, version = (ROOT / "deploy/Dockerfile").read_text(), metadata.version("ray")
    assert f"FROM rayproject/ray:{version}-" in dockerfile and IMAGE in dockerfile
    assert one("RayCluster")["spec"]["rayVersion"] == version
    assert f"ray=={version}" in (ROOT / "requirements.lock").read_text()
    copied = re.findall(r"COPY --chown=ray (.+) \S+\n", dockerfile)
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages <= {name for line in copied for name in line.split()}


def test_no_secret_is_in_the_files_and_each_that_is_named_is_made() -> None:
    named = {(e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"])
             for c in containers() for e in c.get("env", []) if "valueFrom" in e}  # fmt: skip
    text = (ROOT / "deploy/kuberay.yaml").read_text()
    made = {("mlflow", key) for key in re.findall(r"--from-literal=(\w+)=", text)}
    cluster = one("RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert named == made | {(cluster["metadata"]["name"], "auth_token")}  # that of the operator
    plain = [e for c in containers() for e in c.get("env", []) if "value" in e]
    assert not [e for e in plain if re.search("TOKEN|PASSWORD|SECRET|KEY", e["name"])]


def test_services_are_inside_the_cluster_and_what_calls_them_finds_them() -> None:
    service, deployment, name = one("Service"), one("Deployment"), one("RayCluster")["metadata"]["name"]
    assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert f"{service['metadata']['name']}:5000" in " ".join(containers_of(deployment)[0]["args"])
    for o in (one("RayJob"), one("RayCronJob")["spec"]["jobTemplate"]):
        assert f"--tracking-uri {address} " in (o.get("spec", o)["entrypoint"] + " ")
        assert o.get("spec", o)["clusterSelector"] == {"ray.io/cluster": name}
    arguments = containers_of(one("CronJob"))[0]["args"]
    assert f"--tracking-uri={address}" in arguments and f"--submit=http://{name}-head-svc:8265" in arguments


def containers_of(o: dict[str, Any]) -> list[dict[str, Any]]:
    [template] = pod_templates(o)
    return list(template["spec"]["containers"])


def test_the_sweep_is_a_command_of_ours() -> None:
    python, flag, module, *arguments = one("RayJob")["spec"]["entrypoint"].split()
    assert (python, flag, module) == ("python", "-m", "orchestrator.sweep")
    options = sweep.make_parser().parse_intermixed_args(arguments)
    workdir = re.search(r"WORKDIR (\S+)", (ROOT / "deploy/Dockerfile").read_text())
    assert workdir and load(ROOT / options.file.relative_to(workdir[1]))
    assert options.storage.startswith("s3://") and options.ray_address == "auto"


@pytest.mark.skipif(find_spec("orchestrator.nightly") is None, reason="there is no nightly yet")
def test_the_nightly_is_a_command_of_ours() -> None:
    from orchestrator import nightly

    container = containers_of(one("CronJob"))[0]
    commands = [
        container["command"] + container["args"],
        one("RayCronJob")["spec"]["jobTemplate"]["entrypoint"].split(),
    ]
    for command in commands:
        assert command[:3] == ["python", "-m", "orchestrator.nightly"]
        options = nightly.make_parser().parse_intermixed_args(command[3:])
        assert options.storage == "s3://my-bucket/runs" and options.tracking_uri == "http://mlflow:5000"


# ---- MLflow with its password ----------------------------------------------------------------------------------


@pytest.mark.faults
def test_mlflow_asks_for_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command as the Deployment has it, at another port and folder, on loopback."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    container, port = containers_of(one("Deployment"))[0], aws.free_port()
    place = {"0.0.0.0": "127.0.0.1", "5000": str(port), "s3://my-bucket": tmp_path.as_uri()}
    command = container["command"] + [
        a.replace("/mlflow/mlflow.db", f"{tmp_path}/mlflow.db") for a in container["args"]
    ]
    command = [place.get(word, word.replace("s3://my-bucket", place["s3://my-bucket"])) for word in command]
    command = [word.replace("127.0.0.1:5000", f"127.0.0.1:{port}") for word in command]
    secret = {"username": "admin", "password": "correct-horse-battery", "flask_key": "k" * 32}
    env = {
        e["name"]: e["value"] if "value" in e else secret[e["valueFrom"]["secretKeyRef"]["key"]]
        for e in container["env"]
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            env=os.environ | env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        aws.wait_for(f"http://127.0.0.1:{port}/health", server, timeout_s=180)
        search = Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", b'{"max_results": 1}')
        search.add_header("Content-Type", "application/json")
        with pytest.raises(HTTPError, match="401"):
            urlopen(search)
        search.add_header("Authorization", "Basic " + b64encode(b"admin:wrong").decode())
        with pytest.raises(HTTPError, match="401"):
            urlopen(search)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", secret["username"])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret["password"])
        assert MlflowClient(f"http://127.0.0.1:{port}").create_experiment("ours")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(MlflowException):
            MlflowClient(f"http://127.0.0.1:{port}").create_experiment("theirs")
    finally:
        aws.end(server)
