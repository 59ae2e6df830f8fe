"""A sweep under a killer: a random process of it is ended or stopped every few seconds, and nothing may be lost by it.

    python benchmarks/soak.py [--seconds 600] [--every 6] [--seed 0] [--trials 20] [--steps N] [--spare KIND ...]
                              [--storage FOLDER] [--json]

The same experiment is swept twice: undisturbed, and with an MLflow server and a cluster of Ray under a killer. That one
takes the driver, Ray's daemons and agents, workers, actors, evaluation tasks and MLflow's server alike, and ends them
by SIGKILL or SIGTERM or stops them for up to a minute. A driver that has ended is started again by the same command,
which in turn has a Ray of its own and is attached to the cluster; the cluster and MLflow's server are started again at
the same address. After `seconds` the command goes on alone, and again as often as it says that something is missing.
Then all that was made must equal what was made undisturbed, each point must be in MLflow once, the cluster must be
free, and neither a process nor a temporary file may be left.

Only processes with this soak's mark in their environment are ever touched. Status 0: nothing was lost; 1: the verdict
says what was.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import NAME, compare, progress, statuses, went_on_after
from killer import KINDS, MARK, SERVES, STOPPED_S, Killer, family, parent_of

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TWO_WORKERS = 10  # one trial in so many trains with two workers
TO_END_S = 240.0  # without a word from a command that is left alone: it hangs
LEFT_S = 60.0  # until the processes of a command that has ended must be gone
CPUS = 3  # of Ray's cluster: a core more than the smallest machine has, as a sweep's own Ray
CACHES = ("torchinductor_",)  # that libraries keep among the temporary files
MOST_AGAIN = 8  # commands at the end that are left alone

EXPERIMENT = """
name: {name}
data: {{source: digits}}
model: {{channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}}
diffusion: {{T: 50, schedule: {{kind: linear, scale: per_1000}}}}
training:
  {{steps: {steps}, batch_size: 32, lr: 2.0e-3, ema: 0.99, precision: float32, validate_every: {validate_every},
    checkpoint_every: {checkpoint_every}}}
evaluation:
  nll: {{images: 30, timesteps: all}}
  fid: {{samples: 100, sampler: {{kind: ddim, steps: 5}}}}
search:
  space:
    training: {{grid: {trials}}}
"""


def experiment(trials: int, steps: int) -> str:
    """Trials that differ in their learning rate. A kill loses at most the steps since the last checkpoint."""
    sizes = [{"workers": 2} if i % TWO_WORKERS == 3 else {} for i in range(trials)]
    each = [{"lr": round(0.001 + 0.0002 * i, 6), **size} for i, size in enumerate(sizes)]
    return EXPERIMENT.format(
        name=NAME, steps=steps, validate_every=steps, checkpoint_every=max(1, steps // 10),
        trials=json.dumps(each),
    )  # fmt: skip


# ---- The sweep under it ----------------------------------------------------------------------------------------


@dataclass
class Command:
    """`python -m orchestrator.sweep`, started again as often as it must be, at one address of Ray after the other."""

    arguments: list[str]
    addresses: list[str | None]  # of Ray; None: one of its own
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    ended: list[int] = field(default_factory=list)  # the status of each
    started_at: float = 0.0  # of the last
    took_s: float = 0.0

    def start(self) -> None:
        with self.log.open("ab") as output:
            output.write(f"\n==== command {len(self.ended) + 1}\n".encode())
            output.flush()
            address = self.addresses[len(self.ended) % len(self.addresses)]
            at = ["--address", address] if address else []
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.sweep", *self.arguments, *at], cwd=ROOT, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started_at = time.monotonic()

    def status(self) -> int | None:
        """How it has ended, told once; None as long as it runs."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process, self.took_s = None, time.monotonic() - self.started_at
        self.ended.append(status)
        return status

    def end(self) -> str:
        """How the last command ended, and its last line."""
        lines = self.log.read_text(errors="replace").rpartition("==== command ")[2].splitlines()[1:]
        return f"command {len(self.ended)} ended with {self.ended[-1]}: {lines[-1][:150] if lines else ''}"

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.status()


class Head:
    """A cluster of Ray with one node, which is started again where any of its daemons ends, as a machine's would be."""

    def __init__(self, log: Path) -> None:
        self.log, self.started = log, 0
        self.port, client = free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        command = f"start --head --block --node-ip-address=127.0.0.1 --port={self.port} --num-cpus={CPUS}"
        command += f" --ray-client-server-port={client} --include-dashboard=false --disable-usage-stats"
        self.command = [str(Path(sys.executable).with_name("ray")), *command.split()]
        self.process: subprocess.Popen[bytes] | None = None

    def tend(self) -> None:
        """Starts it where it does not run."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as output:
                self.process = subprocess.Popen(
                    [*self.command, f"--object-store-memory={256 * 2**20}"], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, start_new_session=True,
                )  # fmt: skip
            self.started += 1

    def taken(self) -> dict[str, Any]:
        """What is in use of it, by its own account."""
        code = (
            "import json, ray, sys; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); "
            "from ray.util import placement_group_table; "
            "total, free = ray.cluster_resources(), ray.available_resources(); "
            "groups = [g for g in placement_group_table().values() if g['state'] != 'REMOVED']; "
            "print(json.dumps({'CPU': total['CPU'] - free.get('CPU', 0), 'placement groups': len(groups)}))"
        )
        command = [sys.executable, "-c", code, self.address]
        return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]))


def free_ports(n: int) -> list[int]:
    with ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Soak:
    def __init__(self, options: argparse.Namespace, folder: Path, temporary: Path) -> None:
        self.options, self.folder, self.temporary = options, folder, temporary
        self.mark, self.began = uuid.uuid4().hex, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "disturbed",
            "mlflow",
        ):  # of a soak before; what it swept undisturbed is taken where it is the same
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("ray", "tmp"):
            (temporary / name).mkdir()
        # The server inherits them from this process, in whose own /proc/.../environ they do not show.
        os.environ.update(
            {MARK: self.mark, SERVES: "1", "TMPDIR": str(temporary / "tmp"), "RAY_TMPDIR": str(temporary / "ray"),
             "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        )  # fmt: skip
        self.file = folder / "soak.yaml"
        self.file.write_text(experiment(options.trials, options.steps))
        self.problems: list[str] = []
        self.figures: dict[str, Any] = {}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def command(self, name: str, addresses: list[str | None], *more: str) -> Command:
        arguments = [str(self.file), "--storage", str(self.folder / name), *more]
        environment = {variable: value for variable, value in os.environ.items() if variable != SERVES}
        return Command(arguments, addresses, environment, self.folder / f"{name}.log")

    def undisturbed(self) -> None:
        self.say("the sweep undisturbed")
        command = self.command("undisturbed", [None])
        self.finish(command, lambda: None, again=0)
        self.figures["undisturbed_s"] = command.took_s
        if command.ended != [0]:
            raise SystemExit(f"the undisturbed sweep ended with {command.ended}; see {command.log}")

    def disturbed(self) -> None:
        from mlflow_server import Server

        server, head = Server(self.folder / "mlflow"), Head(self.folder / "head.log")
        command = self.command("disturbed", [None, head.address], "--tracking-uri", server.uri)
        killer = Killer(
            self.mark, random.Random(self.options.seed), self.options.every,
            min(STOPPED_S[1], self.options.seconds / 4), [k for k, _ in KINDS if k not in self.options.spare], self.say,
        )  # fmt: skip
        servers = 0

        def tend() -> None:
            nonlocal servers
            head.tend()
            if server.process is None or server.process.poll() is not None:
                server.start()
                servers += 1

        try:
            self.say("the sweep disturbed")
            tend()
            began = time.monotonic()
            command.start()
            while time.monotonic() - began < self.options.seconds:
                killer.tick()
                tend()
                if (status := command.status()) is not None:
                    self.say(command.end())
                    if status == 0:
                        break
                    command.start()
                time.sleep(0.1)
            killer.wake()
            self.figures["disturbed_s"] = time.monotonic() - began
            self.say("left alone")
            command.addresses = [head.address]
            if not command.ended or command.ended[-1] != 0:
                self.finish(command, tend, MOST_AGAIN)
            self.figures["to_the_end_s"] = time.monotonic() - began - self.figures["disturbed_s"]
            self.check_taken(head)
            self.check_processes()
        finally:
            killer.wake()
            self.end_all()
        self.figures |= {
            "faults": len(killer.done),
            "faults_by_kind": dict(sorted(Counter(f"{kind}, {way}" for _, kind, way in killer.done).items())),
            "went_on_after_s": went_on_after(killer.done, progress(self.folder / "disturbed")),
            "commands": len(command.ended),
            "commands_by_status": dict(Counter(map(str, command.ended))),
            "heads_of_ray": head.started,
            "servers_of_mlflow": servers,
            "tracebacks": command.log.read_text(errors="replace").count("Traceback (most recent call last)"),
        }
        if command.ended[-1] != 0:
            self.problems.append(f"the last command ended with {command.ended[-1]}; see {command.log}")

    def check_taken(self, head: Head) -> None:
        """Of the cluster that is left, nothing may be in use after a while."""
        deadline = time.monotonic() + LEFT_S
        while any((taken := head.taken()).values()) and time.monotonic() < deadline:
            time.sleep(2)
        self.figures["taken_of_ray"] = taken
        if any(taken.values()):
            self.problems.append(f"Ray's resources are not free: {taken}")

    def finish(self, command: Command, tend: Callable[[], None], again: int) -> None:
        """Lets the command go on until nothing is missing, or it was started `again` so often, or hangs."""
        if command.process is None:
            command.start()
        size, quiet_since = -1, time.monotonic()
        while True:
            tend()
            if (status := command.status()) is not None:
                self.say(command.end())
                if status == 0 or not again:
                    return
                again -= 1
                command.start()
            if (now := command.log.stat().st_size) != size:
                size, quiet_since = now, time.monotonic()
            if time.monotonic() - quiet_since > TO_END_S:
                self.problems.append(f"the command said nothing for {TO_END_S:.0f} s; see {command.log}")
                for process in family(self.mark):
                    self.say(f"there: {process.pid}  {process.title[:100]}")
                command.kill()
                return
            time.sleep(0.2)

    # What must hold at the end.

    def check(self) -> None:
        """Holds what was made against what was made undisturbed."""
        ours = self.folder / "disturbed"
        self.figures["equal"], different = compare(self.folder)
        self.problems += different
        states = {name: status[0] for name, status in statuses(ours).items()}
        if len(states) != self.options.trials or set(states.values()) != {"finished"}:
            self.problems.append(f"not all of {self.options.trials} trials finished: {states}")
        left = [path for path in ours.rglob("*") if ".tmp" in path.name]
        left += [path for path in (self.temporary / "tmp").iterdir() if not path.name.startswith(CACHES)]
        if left:
            self.problems.append(f"{len(left)} temporary files are left: {', '.join(map(str, left[:5]))}")
        self.figures["temporary_files_left"] = len(left)

    def check_processes(self) -> None:
        """None may be left of the commands a while after the cluster and MLflow's server were ended."""
        there = [(process, parent_of(process.pid)) for process in family(self.mark)]
        serving = {process.pid for process, _ in there if process.serves}
        for process, parent in there:
            if process.serves or parent in serving:  # Ray's agents do not always keep their environment
                process.send(signal.SIGKILL)
        deadline = time.monotonic() + LEFT_S
        while (left := list(family(self.mark))) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.figures["processes_left"] = len(left)
        if left:
            titles = ", ".join(f"{process.pid} {process.title[:60]}" for process in left[:5])
            self.problems.append(f"{len(left)} processes are left: {titles}")

    def end_all(self) -> None:
        """Ends what is left, until nothing starts anything any more."""
        while there := list(family(self.mark)):
            for process in there:
                process.send(signal.SIGKILL)
            time.sleep(0.2)


# ---- What was made, as plain values that can be compared --------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="A sweep under a killer, held against the same sweep undisturbed.")
    parser.add_argument("--seconds", type=float, default=600, help="of disturbance")
    parser.add_argument("--every", type=float, default=6, help="seconds from one kill to the next, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the killer's choices")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of a trial; default: as many as the killer will not let end at once")
    parser.add_argument("--spare", action="append", default=[], choices=[kind for kind, _ in KINDS])
    parser.add_argument("--storage", type=Path, help="where all of it is kept; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.steps = options.steps or max(60, int(options.seconds) // 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended then, too
    temporary = Path(tempfile.mkdtemp(prefix="soak-"))  # of a short path: sockets of Ray lie in it
    soak = Soak(options, options.storage.absolute() if options.storage else temporary / "storage", temporary)
    try:
        soak.undisturbed()
        soak.disturbed()
        soak.check()
    finally:
        soak.end_all()
        if options.storage:
            shutil.rmtree(temporary)
    if not options.storage:
        print(f"all of it is in {temporary}", file=sys.stderr)
    verdict = {**soak.figures, "problems": soak.problems}
    if options.json:
        print(json.dumps(verdict))
    else:
        for name, value in verdict.items():
            print(f"{name:<24} {value:.0f}" if isinstance(value, float) else f"{name:<24} {value}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
