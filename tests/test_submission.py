"""Sending a sweep to a cluster: which job it is, and what is refused. Jobs that run: cluster/test_onprem."""

import shlex
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from orchestrator.clusters import submission
from orchestrator.clusters.attaching import check_attachable, describe_environment
from orchestrator.clusters.submission import Job, choose_id, make_command_job
from orchestrator.experiment.load import load
from orchestrator.experiment.records import ExperimentError
from orchestrator.ray_internals import find_clusters
from orchestrator.sweep import main
from workers.config import Mistake


def sent(file: Path, *overrides: str, storage: str = "/shared/runs", flags: Sequence[str] = ()) -> Job:
    return make_command_job(load(file, overrides), file, overrides, storage, flags)


def test_a_job_is_named_by_what_it_makes_and_where(tiny: Path) -> None:
    name = sent(tiny).name
    assert name.startswith("sweep-tiny-")
    assert sent(tiny, storage="/shared/runs/").name == name and sent(tiny, flags=["--fresh"]).name == name
    assert sent(tiny, "training.steps=20").name == name, "the file says so already"
    assert sent(tiny, "training.steps=21").name != name and sent(tiny, storage="s3://bucket/runs").name != name


def test_its_command_is_the_one_that_runs_on_the_head(tiny: Path) -> None:
    words = shlex.split(sent(tiny, "search.space.diffusion.T.grid=[50, 100]", flags=["--fresh"]).command)
    assert words[:5] == ["python", "-m", "orchestrator.sweep", "tiny.yaml", "search.space.diffusion.T.grid=[50, 100]"]
    assert words[5:] == ["--address", "auto", "--storage", "/shared/runs", "--fresh"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({}, ("s-1", True)),
        ({"s-1": "RUNNING"}, ("s-1", False)),
        ({"s-1": "PENDING"}, ("s-1", False)),
        ({"s-1": "FAILED"}, ("s-2", True)),
        ({"s-1": "FAILED", "s-2": "RUNNING"}, ("s-2", False)),
        ({f"s-{n}": "STOPPED" for n in range(1, 11)}, ("s-11", True)),
        ({"s-9": "FAILED", "s-10": "SUCCEEDED"}, ("s-11", True)),
        ({"s-x": "RUNNING", "ss-1": "RUNNING", "raysubmit_s-3": "RUNNING"}, ("s-1", True)),
    ],
)
def test_what_runs_is_joined_and_what_has_ended_gets_another_attempt(
    statuses: dict[str, str], expected: tuple[str, bool]
) -> None:
    assert choose_id("s", statuses) == expected


def test_the_code_that_comes_along_is_this_one() -> None:
    modules = [Path(path) for path in describe_environment()["py_modules"]]
    assert [path.name for path in modules] == ["orchestrator", "workers"]
    assert modules[0] / "clusters/submission.py" == Path(submission.__file__)
    assert "env_vars" not in describe_environment()


def test_all_that_cannot_work_from_here_is_said_at_once_and_no_password_is_repeated(tiny: Path) -> None:
    with pytest.raises(Mistake) as told:
        make_command_job(load(tiny), tiny, ["tracking.uri=http://ann:planted@host:5000"], "runs")
    assert "'runs' is relative" in str(told.value) and "tracking.uri" in str(told.value)
    assert "planted" not in str(told.value)
    with pytest.raises(Mistake, match=r"s3://.*@bucket/runs holds"):
        sent(tiny, storage="s3://KEY:secret@bucket/runs")


@pytest.fixture
def no_ray() -> Iterator[int]:
    """The port of an HTTP server that has never heard of Ray."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_that_is_no_jobs_api_is_a_mistake(
    tiny: Path, no_ray: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        f"http://127.0.0.1:{no_ray}": "is no Jobs API of Ray",
        "http://127.0.0.1:1": "nothing answers there",
        "http://127.0.0.1:99999": "takes the head's Jobs API",
        "127.0.0.1:6379": "takes the head's Jobs API",
        "ray://127.0.0.1:10001": "takes the head's Jobs API",
    }
    for address, expected in cases.items():
        assert main([str(tiny), "--submit", "--storage", "/shared/runs", "--address", address]) == 2
        assert expected in capsys.readouterr().err, address
    assert main([str(tiny), "--submit"]) == 2
    assert "--address http://HEAD:8265" in capsys.readouterr().err
    assert main([str(tiny), "--submit", "--address", "http://127.0.0.1:1", "training.steps=0"]) == 2
    assert "training.steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:8265", "add --submit"),
        ("ray://127.0.0.1:10001", "through Ray's client"),
        ("127.0.0.1:1", "no node of such a cluster"),
        ("nowhere", "no node of such a cluster"),
    ],
)
def test_where_no_driver_can_attach_is_told_before_anything_starts(
    address: str, expected: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Mistake, match=expected):
        check_attachable(address)
    assert main([str(tiny), "--address", address, "--storage", str(tmp_path / "runs")]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({}, "n-2026-03-01"),
        ({"n-2026-03-01": "RUNNING"}, None),
        ({"n-2026-03-01": "FAILED"}, "n-2026-03-01-2"),
        ({"n-2026-03-01": "SUCCEEDED", "n-2026-03-01-2": "PENDING"}, None),
        ({"n-2026-03-01": "FAILED", "n-2026-03-01-2": "STOPPED"}, "n-2026-03-01-3"),
        ({f"n-2026-03-01{n}": "FAILED" for n in ("", "-2", "-3")}, None),
        ({"n-2026-02-28": "RUNNING"}, "n-2026-03-01"),
    ],
)
def test_a_night_is_submitted_again_where_its_job_ended_without_it(
    statuses: dict[str, str], expected: str | None
) -> None:
    assert submission.name_next_attempt("n-2026-03-01", statuses, 3) == expected


def test_a_cluster_is_found_that_comes_after_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two jobs of Slurm share a node: Ray itself keeps what it has found first."""
    there = {"10.0.0.1:10020"}
    monkeypatch.setattr("ray._private.services._find_address_from_flag", lambda flag: set(there))
    assert find_clusters() == there
    there.add("10.0.0.1:10040")
    assert find_clusters() == there
    there.clear()
    assert find_clusters() == set()


def test_of_two_that_submit_the_same_at_once_one_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a client that answers as Ray 2.60's does; one that is real is in cluster/test_onprem."""
    jobs: dict[str, str] = {}

    class Client:
        def list_jobs(self) -> list[object]:
            return []  # both looked before either had submitted

        def submit_job(self, entrypoint: str, submission_id: str, runtime_env: dict[str, object]) -> None:
            if submission_id in jobs:
                raise RuntimeError(f"Request failed with status code 500: Job with submission_id {submission_id} "
                                   "already exists. Please use a different submission_id.")  # fmt: skip
            assert (Path(str(runtime_env["working_dir"])) / "tiny.yaml").read_text() == tiny.read_text()
            jobs[submission_id] = entrypoint

    monkeypatch.setattr(submission, "connect", lambda address: Client())
    send = partial(submission.submit_again, "http://head:8265", "nightly-2026-03-01", tiny, most=3)
    assert send(words=["python", "-m", "a b"]) == "nightly-2026-03-01" and send(words=["python"]) is None
    assert jobs == {"nightly-2026-03-01": "python -m 'a b'"}

    def full(self: Client, **_: object) -> None:
        raise RuntimeError("Request failed with status code 500: No available agent to submit job")

    monkeypatch.setattr(Client, "submit_job", full)
    with pytest.raises(Mistake, match=r"does not take the job nightly-2026-03-01: .*No available agent"):
        send(words=["python"])


@pytest.mark.parametrize(
    "words",
    [
        ["data.source=s3://KEY:planted@bucket/images"],
        ["data.source=https://host/images.parquet?sig=1&X-Amz-Signature=planted"],
        ["search.space.data.source.grid=[digits, 's3://KEY:planted@bucket/images']"],
        ["tracking.uri=https://host/?access_token=planted"],
    ],
)
def test_no_file_and_no_override_may_hold_a_secret(tiny: Path, words: list[str]) -> None:
    with pytest.raises(Mistake) as told:
        sent(tiny, *words)
    assert "holds a secret" in str(told.value) and "planted" not in str(told.value)


@pytest.mark.parametrize("address", ["http://[::1", "http://host:port", "http://host:99999", "http://", "[", "://", ""])
def test_an_address_that_is_none_is_a_mistake(tiny: Path, address: str) -> None:
    with pytest.raises(Mistake, match="--address"):
        submission.connect(address)
    if "[" in address:
        for path in ("tracking.uri", "data.source"):
            with pytest.raises(Mistake, match=f"{path}: .* is neither a path nor a URI"):
                load(tiny, [f"{path}='http://[::1'"])


def test_no_job_that_a_cluster_lists_shows_a_secret_nor_the_file_that_goes_with_it(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + "\n# tracking: {uri: 'http://ann:planted@host'}\n")
    with pytest.raises(Mistake, match=r"tiny.yaml holds") as told:
        sent(tiny)
    assert "planted" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ann:planted@host/db is no server", "postgresql://***@host/db is no server"),
        ("s3://b/a?access_key=planted&region=eu", "s3://b/a?access_key=***&region=eu"),
        ("s3://b/a?region=eu&secret_key=planted", "s3://b/a?region=eu&secret_key=***"),
        ("abfs://b/a?sas_token=planted here", "abfs://b/a?sas_token=*** here"),
        ("s3://b/a?endpoint_override=k:planted@host:9000&scheme=http", "s3://b/a?endpoint_override=***@host:9000&scheme=http"),
        ("to ann@example.org, about https://host/a", "to ann@example.org, about https://host/a"),
    ],
)  # fmt: skip
def test_no_mistake_repeats_what_is_secret_in_a_uri(text: str, shown: str) -> None:
    assert str(Mistake(text)) == shown and str(ExperimentError([text])).endswith(shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ["orchestrator.sweep", "FILE", "--dry-run", "data.source=s3://KEY:planted@bucket/images"],
        ["orchestrator.sweep", "FILE", "--storage", "s3://bucket/a?access_key=planted"],
        ["orchestrator.sweep", "FILE", "--storage", "s3://bucket/a?endpoint_override=k:planted@127.0.0.1:1"],
        ["orchestrator.sweep", "FILE", "tracking.uri=postgresql://ann:planted@host/mlflow"],
        ["orchestrator.sweep", "FILE", "tracking.uri=http://ann:planted@host"],
        ["orchestrator.status", "--storage", "s3://KEY:planted@bucket/a"],
        ["orchestrator.report", "tiny", "--storage", "gs://KEY:planted@bucket/a"],
        ["orchestrator.evaluate", "s3://KEY:planted@bucket/a"],
        ["orchestrator.sample", "s3://KEY:planted@bucket/a"],
        ["orchestrator.compare", "s3://KEY:planted@bucket/a", "s3://bucket/a?token=planted"],
    ],
)
def test_no_command_repeats_a_secret_that_it_was_given(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    words = [str(tiny) if word == "FILE" else word for word in arguments[1:]]
    words += [] if "--storage" in words else ["--storage", str(tmp_path / "runs")]
    assert import_module(arguments[0]).main(words) == 2
    output = "".join(capsys.readouterr())
    assert output and "planted" not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
