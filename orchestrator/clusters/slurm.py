"""Slurm: a sweep sent to it as a job, followed and joined again, and how its jobs stand.

All that is asked of Slurm is asked by its own commands. What follows from their answers are pure functions of text.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import cli
from orchestrator.clusters.allocation import LEAD, LEAD_S
from orchestrator.clusters.sending import find_secrets, list_code, name_job, write_code
from orchestrator.experiment.expand import expand
from orchestrator.experiment.records import Experiment
from orchestrator.planning.deadline import TO_BEGIN_S
from workers.config import Mistake
from workers.layout import name_sweep_folder
from workers.storage import Storage

PROJECT = Path(__file__).parent.parent.parent
SCRIPT = PROJECT / "deploy/slurm.sbatch"
START_S = 60.0  # until its Ray is up and the first trial trains, at the least
LOOK_S, ASK_S = 1.0, 5.0  # at the job's output, and after its state
TO_ANSWER_S = 30.0  # for a command of Slurm's
FIELDS = "%i|%T|%L|%r|%j|%k"  # of a job in the queue; a comment may hold anything, so it comes last
ENDED = {  # states of a job that has ended, and the exit status of a command that follows it; of FAILED it is the job's
    "COMPLETED": cli.DONE, "CANCELLED": cli.INTERRUPTED, "TIMEOUT": cli.INTERRUPTED, "PREEMPTED": cli.INTERRUPTED,
    "DEADLINE": cli.INTERRUPTED, "FAILED": cli.SOME_FAILED, "NODE_FAIL": cli.CLUSTER_LOST,
    "BOOT_FAIL": cli.CLUSTER_LOST, "OUT_OF_MEMORY": cli.SOME_FAILED,
}  # fmt: skip
OURS = {  # options that are not the user's to give, and why
    **dict.fromkeys(("--output", "-o", "--error", "-e", "--open-mode"), "the job's output is followed here"),
    **dict.fromkeys(("--job-name", "-J", "--comment"), "the same command finds the job by it"),
    **dict.fromkeys(("--wrap", "--parsable", "--test-only", "--wait", "-W"), "the job is submitted and followed here"),
    "--export": "the job has this command's environment",
    **dict.fromkeys(("--clusters", "-M"), "the job is followed where it was submitted"),
}
SHORT = {"-p": "--partition", "-t": "--time", "-a": "--array"}
# Folders of file systems that a machine never shares with another one.
OWN_FILES = ("tmpfs", "ramfs", "devtmpfs", "proc", "sysfs")


# ---- What is asked for, and what there is ----------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What options of sbatch ask for, as far as it is checked beforehand."""

    words: tuple[str, ...]
    partition: str | None = None
    gpus: int = 0  # on each node
    time_s: float | None = None
    lead_s: float = LEAD_S  # so long before its end the job pauses
    is_array: bool = False


@dataclass(frozen=True)
class Partition:
    name: str
    gpus: int  # of the node that has most
    limit_s: float | None  # None: none
    default_s: float | None  # the time of a job that asks for none


def read_wish(text: str) -> Wish:
    """What `--slurm "OPTIONS"` asks for. Raises Mistake."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Mistake(f"--slurm {text!r}: {error}") from None
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        if not word.startswith("-") or word in ("-", "--"):
            raise Mistake(f"--slurm {text!r}: {word!r} is no option of sbatch; write --nodes=2 --time=08:00:00, say")
        if name in OURS:
            raise Mistake(f"--slurm {text!r}: {name} is not yours to give; {OURS[name]}")
        if not has_value and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        found[SHORT.get(name, name)] = value
    given = found.get("--time")
    time_s = None if given is None else math.inf if given.upper() in UNLIMITED else parse_seconds(given)
    if given is not None and time_s is None:
        raise Mistake(f"--slurm {text!r}: {given!r} is no time; write minutes, HH:MM:SS or D-HH:MM:SS")
    signal = found.get("--signal", f"B:USR1@{LEAD_S:g}")
    if not re.fullmatch(r"B:USR1@\d+", signal):
        raise Mistake(f"--slurm {text!r}: the job pauses by --signal=B:USR1@SECONDS, and by no other")
    return Wish(
        tuple(words),
        found.get("--partition"),
        max(count_gpus(f"gpu:{found.get('--gpus-per-node', '0')}"), count_gpus(found.get("--gres", ""))),
        time_s,
        float(signal.partition("@")[2]),
        "--array" in found,
    )


UNLIMITED = ("UNLIMITED", "INFINITE", "0")  # how a user asks for a job without a limit


def parse_seconds(text: str) -> float | None:
    """A time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None where it is none, or has no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        return None
    days, *parts = (None if part is None else int(part) for part in found.groups())
    numbers = [part for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1, 0)
    return float((days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False)))


def count_gpus(gres: str) -> int:
    """The GPUs among the generic resources of a node or of a job, such as gpu:a100:4(S:0-1),lscratch:200."""
    total = 0
    for each in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = each.split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def read_partitions(lines: Iterable[str]) -> dict[str, Partition]:
    """From `sinfo --format=%R|%G|%l|%L`, a line for each kind of node in a partition."""
    found: dict[str, Partition] = {}
    for line in lines:
        name, gres, limit, default = line.strip().split("|")
        gpus = max(count_gpus(gres), found[name].gpus if name in found else 0)
        found[name] = Partition(name, gpus, parse_seconds(limit), parse_seconds(default))
    return found


def list_mistakes(wish: Wish, partitions: dict[str, Partition], default: str | None, unit_s: float | None) -> list[str]:
    """What of the wish this Slurm cannot give. `default` is the partition of jobs that name none, `unit_s` how long the
    longest way from a checkpoint to the next takes, where that is known."""
    names = (wish.partition or default or "").split(",")
    if unknown := [name for name in names if name and name not in partitions]:
        return [f"partition {', '.join(unknown)}: there is none of that name; there are {', '.join(partitions)}"]
    chosen = [partitions[name] for name in names if name] or list(partitions.values())
    mistakes = []
    if wish.gpus > (most := max((p.gpus for p in chosen), default=0)):
        where = f"of partition {', '.join(p.name for p in chosen)}"
        others = "".join(f"; one of {p.name} has {p.gpus}" for p in partitions.values() if p.gpus >= wish.gpus)
        mistakes.append(f"{wish.gpus} GPUs on a node: no node {where} has more than {most}{others}")
    time_s = wish.time_s if wish.time_s is not None else next((p.default_s or p.limit_s for p in chosen), None)
    if time_s is None:
        return mistakes
    use_s = time_s - wish.lead_s
    if use_s < START_S + TO_BEGIN_S:
        mistakes.append(
            f"a time of {time_s:g} s: the job takes about {START_S:g} s to start, begins no trial {TO_BEGIN_S:g} s "
            f"before the pause, and pauses {wish.lead_s:g} s before its end, so nothing would be done; ask for 10 "
            "minutes or more (--time)"
        )
    elif unit_s is not None and use_s < unit_s:
        mistakes.append(
            f"a time of {time_s / 60:.0f} min: from one checkpoint to the next takes {unit_s / 60:.0f} min, at the "
            "speed that was measured; ask for more time, or lower training.checkpoint_every"
        )
    return mistakes


# ---- Jobs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue."""

    id: str
    state: str  # PENDING, RUNNING, ...
    left: str  # of its time, as Slurm writes it
    why: str  # it does not run
    name: str
    of: str  # what its comment says it makes: the folder of a sweep

    def __str__(self) -> str:
        if self.state == "RUNNING":
            return f"Slurm job {self.id} is RUNNING, with {self.left} left of its time"
        return f"Slurm job {self.id} is {self.state}" + (f" ({self.why})" if self.why != "None" else "")


def read_queue(lines: Iterable[str]) -> list[QueuedJob]:
    """From `squeue` by these FIELDS."""
    return [QueuedJob(*line.rstrip("\n").split("|", 5)) for line in lines if line.count("|") >= 5]


def list_jobs() -> list[QueuedJob]:
    """This user's jobs in the queue; none where there is no Slurm, or it does not answer."""
    if not shutil.which("squeue"):
        return []
    try:
        answer = _ask("squeue", "--me", "--noheader", f"--format={FIELDS}")
    except Mistake:
        return []
    return read_queue(answer.splitlines())


@dataclass(frozen=True)
class JobState:
    state: str
    exit_status: int
    why: str

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


def read_state(text: str) -> JobState:
    """From `scontrol --oneliner show job`."""
    fields = dict(word.partition("=")[::2] for word in text.split(" ") if "=" in word)
    status, _, number = fields.get("ExitCode", "0:0").partition(":")
    return JobState(fields["JobState"], int(status) or (128 + int(number) if int(number) else 0), fields["Reason"])


# ---- Sending ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SentBatch:
    """A sweep to be sent to Slurm. Its name says which one it is."""

    name: str
    sweep: str
    root: str  # of the storage
    of: str  # the folder of the sweep in it
    words: tuple[str, ...]  # of the command, its file apart
    file: Path
    folder: Path  # for the job's output and its copy of the file, seen by all nodes
    code: Mapping[str, str] = field(default_factory=dict)  # texts of modules from outside, by their place

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.out"


def make_batch(
    experiment: Experiment, file: Path, overrides: Sequence[str], storage: str, flags: Sequence[str]
) -> SentBatch:
    """Raises Mistake for what would not work in a job, or show a secret: all users of a Slurm see its commands."""
    mistakes = find_secrets(file, [*overrides, storage])
    where = Storage(storage)
    root = where.root
    if where.is_local and (kind := find_file_system(Path(root))) in OWN_FILES:
        mistakes.append(
            f"--storage {storage}: {root} lies on a {kind} of this machine, which no node sees; give a folder on the "
            "file system that all nodes share, or a URI such as s3://bucket/path"
        )
    if mistakes:
        raise Mistake("\n".join(mistakes))
    folder = (Path(root) if where.is_local else Path.cwd()) / "slurm"
    name, code = name_job(experiment, root), list_code(variant.trial for variant in expand(experiment))
    words = (*overrides, *([f"code=[{name}-code]"] if code else []), "--storage", root, *flags)
    of = where.find_url(name_sweep_folder(experiment.name))
    return SentBatch(name, experiment.name, root, of, words, file, folder, code)


def find_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that the path lies on; empty where the system does not say."""
    if not mounts.exists():
        return ""
    found = ("", "")
    for line in mounts.read_text().splitlines():
        place, kind = line.split(" ")[1:3]
        if path.is_relative_to(place) and len(place) >= len(found[0]):
            found = place, kind
    return found[1]


def submit(sent: SentBatch, wish: Wish, unit_s: float | None) -> int:
    """Submits the sweep, or joins it where it is in the queue, and follows it to its end. Returns its exit status.

    Raises Mistake where this is no machine of a Slurm, or it does not take the job.
    """
    if not shutil.which("sbatch"):
        raise Mistake("--slurm: there is no sbatch here; run this on a login node of the cluster")
    if not SCRIPT.exists():
        raise Mistake(f"--slurm: {SCRIPT} is not there; run it from a checkout of the project")
    there = next((job for job in list_jobs() if job.name == sent.name), None)
    if there and wish.is_array:
        print(f"slurm       job {there.id} is in the queue already; its output: {_name_output(sent, wish)}", flush=True)
        return cli.DONE
    if there:
        print(f"slurm       job {there.id} is in the queue already: its output from the start", flush=True)
        return follow(there.id, sent)
    answer = _ask("sinfo", "--all", "--noheader", "--format=%R|%G|%l|%L|%P").splitlines()
    default = next((line.split("|")[0] for line in answer if line.rstrip().endswith("*")), None)
    partitions = read_partitions(line.rpartition("|")[0] for line in answer)
    if mistakes := list_mistakes(wish, partitions, default, unit_s):
        raise Mistake("\n".join(f"--slurm: {text}" for text in mistakes))
    sent.folder.mkdir(parents=True, exist_ok=True)
    copy = sent.folder / f"{sent.name}.yaml"
    copy.write_bytes(sent.file.read_bytes())
    write_code(sent.code, sent.folder / f"{sent.name}-code")
    output = _name_output(sent, wish)
    words = [
        *wish.words, f"--job-name={sent.name}", f"--output={output}", f"--comment={sent.of}", f"--chdir={Path.cwd()}",
        "--export=ALL", str(SCRIPT), str(copy), *sent.words,
    ]  # fmt: skip
    environment = {**os.environ, "ORCHESTRATOR_PROJECT": str(PROJECT), LEAD: f"{wish.lead_s:g}"}
    _ask("sbatch", "--test-only", *words, environment=environment)
    if not wish.is_array:
        sent.output.write_bytes(b"")
    job = _ask("sbatch", "--parsable", *words, environment=environment).strip().partition(";")[0]
    print(f"slurm       job {job} is submitted; its output: {output}", flush=True)
    return cli.DONE if wish.is_array else follow(job, sent)


def _name_output(sent: SentBatch, wish: Wish) -> str:
    """The file of the job's output as sbatch takes it: a task of an array has its own, by its number."""
    output = str(sent.output).replace("%", "%%")
    return output.removesuffix(".out") + "-%a.out" if wish.is_array else output


def _ask(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command of Slurm's answers. Raises Mistake with what it says where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TO_ANSWER_S)
    except subprocess.TimeoutExpired:
        raise Mistake(f"--slurm: {command[0]} has not answered for {TO_ANSWER_S:g} s; try again later") from None
    if done.returncode:
        answer = " ".join(line.removeprefix(f"{command[0]}: error: ") for line in done.stderr.strip().splitlines())
        raise Mistake(f"--slurm: {command[0]} says: {answer}")
    return done.stdout


def follow(job: str, sent: SentBatch) -> int:
    """Prints the job's output, from its start, until it has ended; ctrl-C leaves it. Returns its exit status."""
    state, at, asked = JobState("", 0, ""), 0, 0.0
    try:
        while True:
            if time.monotonic() - asked > ASK_S:
                state, asked = _ask_state(job, state), time.monotonic()
            at = _print_from(sent.output, at, is_whole=state.is_over)
            if state.is_over:
                break
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        print(
            f"\nLeft; the job goes on. The same command joins it again; how it stands:\n"
            f"  python -m orchestrator.status {sent.sweep} --storage {shlex.quote(sent.root)}\n"
            f"To stop it:\n  scancel {job}",
            file=sys.stderr,
        )
        return cli.INTERRUPTED
    if state.state == "FAILED" and not at:
        print(
            f"slurm       it printed nothing: does its first node see {sent.folder}? A storage has to be on the file "
            "system that all nodes share",
            file=sys.stderr,
        )
    return state.exit_status or ENDED[state.state]


def _ask_state(job: str, before: JobState) -> JobState:
    """How the job stands; what is new of it is told. Where Slurm does not answer it is as it was."""
    try:
        state = read_state(_ask("scontrol", "--oneliner", "show", "job", job))
    except Mistake as mistake:
        if "Invalid job id" in str(mistake):
            raise Mistake(f"slurm: job {job} is no longer known to Slurm; the same command resumes its sweep") from None
        return before
    if (state.state, state.why) != (before.state, before.why) and state.state != "COMPLETING":
        why = f" ({state.why})" if state.why != "None" else ""
        print(f"slurm       job {job} is {state.state}{why}", file=sys.stderr, flush=True)
    return state


def _print_from(output: Path, at: int, is_whole: bool) -> int:
    """Prints the lines that the file has from that byte on, the last only where it `is_whole`; returns their end."""
    if not output.exists():
        return at
    with output.open("rb") as file:
        file.seek(at)
        content = file.read()
    if not is_whole:
        content = content[: content.rfind(b"\n") + 1]
    print(content.decode(errors="replace"), end="", flush=True)
    return at + len(content)
