"""`deploy/slurm.sbatch` on a real Slurm of two nodes made of namespaces: sweeps sent, cut off, requeued and cancelled.

What happened when is told as it goes, and kept in build/slurm.log. Slurm keeps a requeued job back for two minutes:
these tests have it start at once.
"""

import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import statuses, trials_of, undisturbed
from hosts import ROOT, Command, until
from slurm_hosts import Slurm, find_missing_slurm, slurm

from orchestrator.state.events import read_events
from workers.storage import Storage

MISSING = find_missing_slurm()
pytestmark = [pytest.mark.clusters, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
LOG = ROOT / "build/slurm.log"
TINY = """
name: tiny
data: {source: digits}
model: {channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 50, schedule: {kind: linear, scale: per_1000}}
training:
  {steps: 300, batch_size: 32, lr: 2.0e-3, ema: 0.99, precision: float32, validate_every: 150, checkpoint_every: 20,
   gpus: 1}
evaluation: {nll: {images: 30, timesteps: all}, fid: null}
search: {space: {loss.weighting: {grid: [simple, vlb]}}}
"""
BEGAN = time.monotonic()


def say(text: str) -> None:
    line = f"{time.monotonic() - BEGAN:6.1f} s  {text}"
    print(line, flush=True)
    with LOG.open("a") as file:
        file.write(f"{line}\n")


class Site:
    """A Slurm, a folder that all of it sees, and what a user types on its login node."""

    def __init__(self, there: Slurm, folder: Path) -> None:
        self.slurm, self.folder = there, folder
        self.file, self.storage, self.settings = folder / "tiny.yaml", folder / "runs", folder / "settings.env"
        self.file.write_text(TINY)
        self.settings.write_text(f"PYTHON={sys.executable} REQUEUES=3\n")
        self.env = {"SLURM_CONF": str(there.configuration), "ORCHESTRATOR_SETTINGS": str(self.settings)}

    def command(self, options: str, *overrides: str) -> list[object]:
        words = ["-m", "orchestrator.sweep", self.file, *overrides, "--storage", self.storage, "--slurm", options]
        return [sys.executable, *words]

    def start(self, output: Path, options: str, *overrides: str) -> Command:
        return self.slurm.login.start(self.command(options, *overrides), output, **self.env)

    def status(self, sweep: str) -> str:
        words = [sys.executable, "-m", "orchestrator.status", sweep, "--storage", self.storage]
        return self.run(words)

    def run(self, command: Sequence[object]) -> str:
        return self.slurm.login.run(command, timeout_s=300, **self.env)

    def happened(self, sweep: str, event: str) -> list[dict[str, Any]]:
        if not (self.storage / f"sweeps/{sweep}/events.jsonl").exists():
            return []
        return [e for e in read_events(Storage(self.storage), sweep) if e["event"] == event]

    def steps(self, trial: str) -> int:
        """How far a trial was trained, as its checkpoints say."""
        return max([int(p.name[5:]) for p in self.storage.glob(f"trials/{trial}/checkpoints/step-*")], default=0)

    def wait(self, client: Command, output: Path, condition: Callable[[], bool], what: str) -> None:
        until(lambda: condition() or client.process.poll() is not None, what, timeout_s=400)
        assert condition(), output.read_text()

    def ended(self, client: Command, output: Path, status: int = 0) -> str:
        assert client.process.wait(timeout=600) == status, output.read_text()
        text = output.read_text()
        assert "Traceback" not in text, text
        return text

    def start_again(self, job: str) -> None:
        """Waits until the job is in the queue again, and has Slurm start it at once."""
        until(lambda: self.slurm.jobs().get(job) == "PENDING", f"job {job} to be in the queue again", timeout_s=180)
        say(f"job {job} is in the queue again")
        self.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")

    def nothing_left(self) -> None:
        until(lambda: not self.slurm.jobs(), "the queue to be empty", timeout_s=120)
        with suppress(TimeoutError):
            until(lambda: not self.slurm.left(), "the nodes to be empty", timeout_s=60)
        assert self.slurm.left() == []


def job_of(output: Path) -> str:
    """The id of the job that a client has submitted."""
    return output.read_text().partition("slurm       job ")[2].partition(" ")[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    with slurm(folder, ("login", "n1", "n2")) as there:
        found = there("sinfo", "--noheader", "--partition=main", "--format=%D nodes of %c cores and %G")
        say(f"{there('sinfo', '--version')} is up: {found}")
        result = Site(there, folder)
        yield result
        result.nothing_left()
        say("no job, no process and no folder of Ray is left on the nodes")
    assert there.network.left() == []


def test_the_commands_of_the_page_are_taken(site: Site) -> None:
    """But for what these nodes lack: 32 cores and four GPUs."""
    page = (ROOT / "docs/slurm.md").read_text()
    commands = re.findall(r"^sbatch (.*)$", page, re.MULTILINE)
    for command in commands:
        words = re.sub(r"--gpus-per-node=\d+", "--gpus-per-node=2", re.sub(r"--cpus-per-task=\d+", "", command))
        site.run(["sbatch", "--test-only", *shlex.split(words)])
    assert len(commands) == 3


def test_four_trials_on_two_nodes_outlive_their_client_and_a_node(site: Site, tmp_path: Path) -> None:
    output, again, space = tmp_path / "said", tmp_path / "again", "search.space.diffusion.T.grid=[40, 50]"
    options = "--nodes=2 --cpus-per-task=3 --gpus-per-node=2 --time=20"
    client = site.start(output, options, space)

    def running() -> dict[str, str]:
        found = statuses(site.storage).items()
        return {t: s["host"] for t, s in found if s["state"] == "running" and 0 < site.steps(t) < 240}

    site.wait(client, output, lambda: "n2" in running().values(), "a trial on the second node")
    job, there = job_of(output), running()
    say(f"job {job}: trials on {', '.join(sorted(set(there.values())))}")
    status = site.status("tiny")
    assert f"Slurm job {job} is RUNNING, with " in status and " left of its time" in status, status
    client.signal(signal.SIGINT)
    assert f"scancel {job}" in site.ended(client, output, 130)
    site.slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    say("ctrl-C, and node n2 is set down; the same command again:")
    client = site.start(again, options, space)
    text = site.ended(client, again)
    assert f"job {job} is in the queue already" in text
    ended = statuses(site.storage)
    assert [s["state"] for s in ended.values()] == ["finished"] * 4 and "n1" in {s["host"] for s in ended.values()}
    lost = [trial for trial, host in there.items() if host == "n2"]
    assert all(ended[trial]["host"] == "n1" for trial in lost)
    for trial in trials_of(site.file, space).items():
        assert ended[trial[0]]["steps"] == 300
    for line in text.splitlines()[-12:]:
        say(f"    {line}")
    say("the sweep has ended on n1")
    site.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_one_trial_over_two_nodes_gives_way_to_an_urgent_job_and_goes_on(site: Site, tmp_path: Path) -> None:
    output, urgent = tmp_path / "said", site.folder / "urgent.out"
    words = ("name=wide", "training.workers=2", "training.gpus=0", "search.space={}", "seed=1")
    client = site.start(
        output, "--nodes=2 --cpus-per-task=2 --time=20", *words, "--fresh"
    )  # once, and not at each start
    [(trial, _)] = trials_of(site.file, *words).items()
    site.wait(client, output, lambda: 0 < site.steps(trial) < 240, "its first checkpoint")
    job = job_of(output)
    say(f"job {job}: a trial of two workers, one on each node, is at step {site.steps(trial)}")
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--time=1", f"--output={urgent}")
    site.slurm("sbatch", *options, "--wrap=echo urgent")
    site.start_again(job)
    [paused] = site.happened("wide", "paused")
    say(f"the trial paused at step {paused['step']}, and the urgent job had the nodes")
    assert 0 < paused["step"] < 300
    text = site.ended(client, output)
    assert f"paused at step {paused['step']} of 300: resumes" in text and urgent.read_text() == "urgent\n"
    assert statuses(site.storage)[trial]["state"] == "finished"
    say("it has ended")


def test_a_job_at_its_time_limit_goes_on_in_the_next_and_ends_in_the_same_bits(site: Site, tmp_path: Path) -> None:
    rates = [status["images_per_s"] for status in statuses(site.storage).values()]
    steps = 100 * round(70 * max(rates) / 32 / 100)  # so that it trains for longer than Slurm takes to look at limits
    output, words = tmp_path / "said", (
        "name=long", "search.space={}", "seed=2", f"training.steps={steps}", f"training.checkpoint_every={steps}",
        f"training.validate_every={steps // 2}",
    )  # fmt: skip
    client = site.start(output, "--nodes=1 --cpus-per-task=3 --gpus-per-node=1 --time=20", *words)
    [(digest, trial)] = trials_of(site.file, *words).items()
    site.wait(client, output, lambda: bool(site.happened("long", "began")), "the trial to train")
    job = job_of(output)
    minutes = 2 + int(site.slurm.field(job, "RunTime").split(":")[-2])  # less than two are left
    site.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    say(f"job {job}: a trial of {steps} steps trains; the job's time is set to {minutes} min")
    site.start_again(job)
    [paused] = site.happened("long", "paused")
    say(f"the trial paused at step {paused['step']} of {steps}")
    assert 0 < paused["step"] < steps
    site.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    expected = undisturbed(trial, tmp_path / "plain")
    site.ended(client, output)
    assert site.slurm.field(job, "Restarts") == "1"
    assert statuses(site.storage)[digest]["checkpoint"] == expected
    say(f"it has ended in the bits of an undisturbed one, checkpoint {expected}")


def test_an_array_on_one_node_shares_its_trials_and_takes_over_those_of_a_task_that_is_cancelled(site: Site) -> None:
    overrides = ("name=shared", "seed=3", "training.checkpoint_every=10")
    options = "--array=0-1 --nodes=1 --nodelist=n1 --cpus-per-task=2 --gpus-per-node=1 --time=20"
    text = site.run(site.command(options, *overrides))
    array = text.partition("slurm       job ")[2].partition(" ")[0]
    assert array, text

    def trained_by(sweep: str) -> set[str]:
        """The trials that a sweep holds; in the moment that both begin one, the second finds it held, and waits."""
        began, waits = ({event["trial"] for event in site.happened(sweep, name)} for name in ("began", "waits"))
        return {trial for trial in began - waits if site.steps(trial)}

    def both_train() -> bool:
        one, other = trained_by("shared"), trained_by("shared-1")
        return bool(one and other and not one & other)

    until(both_train, "both to train trials of their own", timeout_s=300)
    one, other = trained_by("shared"), trained_by("shared-1")
    outputs = sorted((site.storage / "slurm").glob("sweep-shared-*.out"))
    heads = [path.read_text().partition("Ray's head is at ")[2].partition("\n")[0] for path in outputs]
    say(f"job {array}: two tasks on n1, with Ray at {' and '.join(heads)}, train {len(one)} and {len(other)} trials")
    assert len(set(heads)) == 2
    site.slurm("scancel", f"{array}_1")
    until(lambda: f"{array}_1" not in site.slurm.jobs(), "the task to be gone", timeout_s=120)
    say(f"task {array}_1 is cancelled")
    until(lambda: not site.slurm.jobs(), "the other to end", timeout_s=400)
    command = [sys.executable, "-m", "orchestrator.status", "shared", "--json", "--storage", site.storage]
    results = json.loads(site.run(command))
    assert [trial["state"] for trial in results["sweeps"][0]["trials"]] == ["done", "done"], outputs[0].read_text()
    states = site.slurm("scontrol", "--oneliner", "show", "job", array)
    assert "JobState=CANCELLED" in states and "JobState=COMPLETED" in states and "Restarts=0" in states
    say("the other one has trained what was left of both")
