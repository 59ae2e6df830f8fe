"""Sending a sweep to a cluster as a job.

It is sent over HTTP to the Jobs API of the head, where the driver then runs; whoever sent it may follow its output,
leave, and come back. The code comes along, so that the nodes need nothing installed but the libraries.
"""

import asyncio
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from orchestrator import cli
from orchestrator.clusters.attaching import TOKEN, describe_environment
from orchestrator.clusters.sending import find_secrets, list_code, name_job, write_code
from orchestrator.experiment.expand import expand
from orchestrator.experiment.records import Experiment
from workers.config import Mistake

CODE = "code"  # the folder of modules from outside, in that of a job
ANSWER_S = 5.0  # for a connection to be made
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
OVERRULES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray's client takes them before the address that it is given


def _reach(host: str, port: int, ray_address: str) -> None:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise Mistake(
            f"--address {ray_address}: nothing answers there ({error}). Is the cluster up, and the port open or "
            "tunnelled (`ray dashboard CLUSTER.yaml` tunnels 8265)?"
        ) from error


@dataclass(frozen=True)
class Job:
    """A sweep to be sent. Its name says which one it is: jobs of one name differ by their attempt alone."""

    name: str
    sweep: str
    storage: str
    file: Path
    command: str  # what the head runs
    code: Mapping[str, str] = field(default_factory=dict)  # texts of modules from outside, by their place in CODE


def make_command_job(
    experiment: Experiment, file: Path, overrides: Sequence[str], storage: str, flags: Sequence[str] = ()
) -> Job:
    """Raises Mistake for what could not work from another machine, or would show a secret there."""
    mistakes = []
    if "://" not in storage and not Path(storage).is_absolute():
        mistakes.append(
            f"--storage {storage!r} is relative to this machine: give a folder that every node of the cluster sees, by "
            "its absolute path, or a URI such as s3://bucket/path"
        )
    mistakes += find_secrets(file, [*overrides, storage])
    if mistakes:
        raise Mistake("\n".join(mistakes))
    code = list_code(variant.trial for variant in expand(experiment))
    words = ["python", "-m", "orchestrator.sweep", file.name, *overrides, *([f"code=[{CODE}]"] if code else [])]
    words += ["--address", "auto", "--storage", storage, *flags]
    return Job(name_job(experiment, storage), experiment.name, storage, file, shlex.join(words), code)


def choose_id(name: str, statuses: Mapping[str, str]) -> tuple[str, bool]:
    """The submission id of a job, and whether it is new: one that has not ended is joined, else comes an attempt more.

    `statuses` are those of the cluster's jobs by their submission id.
    """
    attempts = {int(n): i for i in statuses if (n := i.removeprefix(f"{name}-")) != i and n.isdigit()}
    last = max(attempts, default=0)
    if last and statuses[attempts[last]] not in ENDED:
        return attempts[last], False
    return f"{name}-{last + 1}", True


def name_next_attempt(name: str, statuses: Mapping[str, str], most: int) -> str | None:
    """The submission id of a command that has not done its work: `name`, then name-2, ...; None where one of them has
    not ended, or `most` have."""
    ids = [name, *(f"{name}-{n}" for n in range(2, most + 1))]
    there = [i for i in ids if i in statuses]
    if any(statuses[i] not in ENDED for i in there):
        return None
    return next((i for i in ids if i not in statuses), None)


def submit(ray_address: str, job: Job) -> int:
    """Sends the job, or joins it where it runs already, and follows it to its end. Returns its exit status.

    Raises Mistake where `ray_address` cannot be used.
    """
    client = connect(ray_address)
    submission_id, new = choose_id(job.name, {j.submission_id: j.status for j in client.list_jobs() if j.submission_id})
    new = new and _send(client, ray_address, submission_id, job)
    print(f"job  {submission_id}  {'submitted' if new else 'runs already: its output from the start'}", flush=True)
    try:
        asyncio.run(_print_output(client, submission_id))
        return _await_end(client, submission_id)
    except KeyboardInterrupt:
        why = "Left"
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        why = f"Lost the connection ({error})"
    print(
        f"\n{why}; the job goes on. The same command joins it again; how it stands:\n"
        f"  python -m orchestrator.status {job.sweep} --storage {shlex.quote(job.storage)}\n"
        f"To stop it:\n  ray job stop --address {ray_address} {submission_id}",
        file=sys.stderr,
    )
    return cli.INTERRUPTED


def submit_again(
    ray_address: str, name: str, file: Path, words: Sequence[str], most: int, *, code: Mapping[str, str] | None = None
) -> str | None:
    """Sends a command with its file and code as its next attempt (`name_next_attempt`), and does not follow it.

    Returns the submission id; None where there is no attempt to make now, or another process made it in the same
    moment: Ray refuses an id that it knows. Raises Mistake where `ray_address` cannot be used.
    """
    if mistakes := find_secrets(file, words):
        raise Mistake("\n".join(mistakes))
    client = connect(ray_address)
    submission_id = name_next_attempt(
        name, {j.submission_id: j.status for j in client.list_jobs() if j.submission_id}, most
    )
    if submission_id is None:
        return None
    job = Job(name, "", "", file, shlex.join(words), code or {})
    return submission_id if _send(client, ray_address, submission_id, job) else None


def _send(client: JobSubmissionClient, ray_address: str, submission_id: str, job: Job) -> bool:
    """Submits the command with its file and code; False where the cluster knows a job of this id. Raises Mistake."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        shutil.copy(job.file, folder)
        write_code(job.code, Path(folder, CODE))
        environment = {"working_dir": folder, **describe_environment()}
        try:  # no resources are asked for: so it runs on the head, and not on a machine that may be reclaimed
            client.submit_job(entrypoint=job.command, submission_id=submission_id, runtime_env=environment)
        except RuntimeError as error:
            if f"{submission_id} already exists" in str(error):
                return False
            raise Mistake(
                f"--address {ray_address}: the cluster does not take the job {submission_id}: {error}"
            ) from error
    return True


def connect(ray_address: str) -> JobSubmissionClient:
    """The Jobs API at `ray_address`. Raises Mistake where there is none, or none that lets us in."""
    try:
        parts = urlsplit(ray_address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # brackets that do not close, a port that is none
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise Mistake(f"--address {ray_address!r}: --submit takes the head's Jobs API, such as http://127.0.0.1:8265")
    _reach(parts.hostname, port, ray_address)
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of packages and web sockets
    for name in OVERRULES:
        os.environ.pop(name, None)
    try:
        return JobSubmissionClient(ray_address)
    except AuthenticationError as error:
        raise Mistake(f"--address {ray_address}: the cluster does not know this token; {TOKEN}") from error
    except (OSError, RuntimeError, KeyError) as error:
        raise Mistake(f"--address {ray_address}: what answers there is no Jobs API of Ray ({error})") from error


async def _print_output(client: JobSubmissionClient, submission_id: str) -> None:
    """Prints the job's output, from its start, until it has ended."""
    async for text in client.tail_job_logs(submission_id):
        print(text, end="", flush=True)


def _await_end(client: JobSubmissionClient, submission_id: str) -> int:
    """Waits for the end that the job's output has announced. Returns its exit status, and prints the reason if any."""
    while (info := client.get_job_info(submission_id)).status not in ENDED:
        time.sleep(0.5)
    if info.status == "SUCCEEDED":
        return cli.DONE
    if info.status == "STOPPED":
        print(f"{submission_id} was stopped; the same command resumes.", file=sys.stderr)
        return cli.INTERRUPTED
    if info.driver_exit_code is None:
        print(f"{submission_id} failed: {info.message}", file=sys.stderr)
        return cli.SOME_FAILED
    return int(info.driver_exit_code)
