"""The processes of a soak, and what ends or stops them."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "SOAK"  # the variable by whose value the processes of one soak are known
SERVES = "SOAK_SERVES"  # a variable of those that outlive the commands: MLflow's server, and the cluster
WAYS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
STOPPED_S = (1.0, 60.0)  # for how long, no longer than a quarter of the soak

# What a process is, by its command line; the first that fits. What fits none is not touched.
KINDS = (
    ("driver", r"orchestrator\.sweep"),
    ("MLflow", r"mlflow|uvicorn"),
    ("GCS", r"gcs_server"),
    ("raylet", r"/raylet/raylet|^raylet"),
    ("agent", r"^ray::(Dashboard|RuntimeEnv)Agent|/ray/.*(agent|monitor|dashboard)\.py"),
    ("trial of one worker", r"^ray::OneWorker"),
    ("trial of two workers", r"^ray::ImplicitFunc"),
    ("worker of two", r"^ray::RayTrainWorker"),
    (
        "actor of Ray Train",
        r"^ray::(TrainController|_QueueActor|PlacementGroupCleaner|SynchronizationActor|\w+Manager)",
    ),
    ("evaluation", r"^ray::make_"),
    ("idle worker", r"^ray::IDLE|default_worker\.py"),
)

SHORT = {"trial of one worker", "evaluation"}
OFTEN = 3  # times as often as others are these hit


@dataclass(frozen=True)
class Process:
    """One that carries the mark. A number may be given again, so it is known by the time of its start as well."""

    pid: int
    started: int
    kind: str
    title: str
    serves: bool  # MLflow's server or the cluster, or started by one of them

    def is_there(self) -> bool:
        return started_at(self.pid) == self.started

    def send(self, number: int) -> bool:
        """Whether it was still there."""
        with suppress(ProcessLookupError):
            if self.is_there():
                os.kill(self.pid, number)
                return True
        return False


def started_at(pid: int) -> int | None:
    """When the process was started, in ticks of the kernel; None where it is gone, or only waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parent_of(pid: int) -> int | None:
    """The process that started it; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(mark: str) -> Iterator[Process]:
    """The processes that carry the mark: those which this soak has started, and all that came of them."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if wanted not in environment:
                continue
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is not ours
        if (started := started_at(int(entry.name))) is not None:
            yield Process(int(entry.name), started, kind_of(title), title, f"{SERVES}=1".encode() in environment)


def kind_of(title: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, title)), "")


@dataclass
class Killer:
    """Ends or stops a process of the soak's every few seconds.

    Kinds come in turn, shuffled, so that rare ones are hit as often as frequent ones, and those whose work is short
    more often; for one that is not there it waits a little. So a driver that begins, and is alone at first, is not hit
    more often than others, and a trial that takes long to start comes to its end.
    """

    mark: str
    random: random.Random
    every_s: float
    longest_stop_s: float
    kinds: list[str]
    say: Callable[[str], None]
    done: list[tuple[float, str, str]] = field(default_factory=list)  # time of day, kind, what was done to it
    stopped: list[tuple[float, Process]] = field(default_factory=list)  # until when
    due_at: float = 0.0
    deck: list[str] = field(default_factory=list)

    def tick(self) -> None:
        now = time.monotonic()
        self.wake(now)
        if now < self.due_at:
            return
        if not self.deck:
            self.deck = [kind for kind in self.kinds for _ in range(OFTEN if kind in SHORT else 1)]
            self.random.shuffle(self.deck)
        still = {process.pid for _, process in self.stopped}
        there = [p for p in family(self.mark) if p.kind == self.deck[-1] and p.pid not in still]
        if not there:
            if now > self.due_at + 2 * self.every_s:
                self.deck.pop()
            return
        self.due_at = now + self.random.uniform(0.4, 1.6) * self.every_s
        self.deck.pop()
        self.hit(self.random.choice(sorted(there, key=lambda process: process.pid)), now)

    def hit(self, victim: Process, now: float) -> None:
        way = self.random.choice(WAYS)
        if not victim.send(way):
            return
        self.done.append((time.time(), victim.kind, way.name))
        text = f"{way.name}  {victim.kind}  {victim.pid}"
        if way == signal.SIGSTOP:
            lasts = self.random.uniform(STOPPED_S[0], self.longest_stop_s)
            self.stopped.append((now + lasts, victim))
            text += f"  for {lasts:.0f} s"
        self.say(f"{text}  {victim.title[-60:]}")

    def wake(self, now: float = float("inf")) -> None:
        """Lets those go on whose time is over; by default all."""
        for until, process in self.stopped:
            if until <= now and process.send(signal.SIGCONT):
                self.say(f"SIGCONT  {process.kind}  {process.pid}")
        self.stopped = [(until, process) for until, process in self.stopped if until > now]
