"""A Slurm on one machine, for tests: Debian's slurmctld, slurmd and munge on hosts made of namespaces (see `hosts`).

The first host is the login node and has the controller, each other one is a node. They share the folder of the network.
Each node has four cores and two GPUs, as Slurm counts them: the latter are /dev/null by other names. What is running is
found by parentage (proctrack/linuxproc) and bound to nothing (task/none): namespaces here have no cgroups to give away.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosts import PATH, Host, Network, find_missing_tools, network, until

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged", "munge")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={login.name}({login.address})
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/controller.pid
SlurmdPidFile=/run/slurm/node.pid
SlurmdTimeout=300
KillWait=20
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=01:00:00 DefaultTime=00:30:00 PriorityTier=1 GraceTime=100
PartitionName=urgent Nodes={names} MaxTime=01:00:00 PriorityTier=10 PreemptMode=OFF
"""
START = """
mkdir -p /run/munge /run/slurm/state /run/slurm/spool
munged --force --key-file="$1" --pid-file=/run/munge/pid --log-file=/run/munge/log --seed-file=/run/munge/seed
"""


def find_missing_slurm() -> str:
    """Why there can be no Slurm here, or ""."""
    if absent := [name for name in NEEDED if shutil.which(name, path=PATH) is None]:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return find_missing_tools()


@dataclass
class Slurm:
    network: Network
    configuration: Path

    @property
    def login(self) -> Host:
        return next(iter(self.network.hosts.values()))

    @property
    def nodes(self) -> list[Host]:
        return list(self.network.hosts.values())[1:]

    def __call__(self, *command: object) -> str:
        """What a command of Slurm's says on the login node."""
        return self.login.run(list(command), SLURM_CONF=str(self.configuration)).strip()

    def jobs(self) -> dict[str, str]:
        """The states of the jobs in the queue; COMPLETING are those that are ending."""
        lines = self("squeue", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        words = self("scontrol", "--oneliner", "show", "job", job).split(" ")
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def left(self) -> list[str]:
        """What jobs have left on the nodes: processes, but Slurm's own and munge's, and folders."""
        found = []
        for node in self.nodes:
            own = ("slurmd ", "munged ", "bash -c", "sleep 3600", "sshd")
            titles = [t for t in node.processes().values() if t.strip() and not any(name in t for name in own)]
            found += [f"{node.name}: {title}" for title in titles]
            found += [f"{node.name}: {path}" for path in node.run(["ls", "/tmp", "/dev/shm"]).split() if "ray" in path]
        return found


@contextmanager
def slurm(folder: Path, names: Sequence[str]) -> Iterator[Slurm]:
    """A Slurm of a login node and of nodes of these names; all is gone at the end."""
    with network(folder, names) as hosts:
        login, *nodes = hosts.hosts.values()
        for number in range(2):
            os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        lines = [f"NodeName={n.name} NodeAddr={n.address} CPUs=4 RealMemory=8000 Gres=gpu:2" for n in nodes]
        configuration, key = folder / "slurm.conf", folder / "munge.key"
        text = CONFIGURATION.format(login=login, nodes="\n".join(lines), names=",".join(node.name for node in nodes))
        configuration.write_text(text)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        env = {"SLURM_CONF": str(configuration)}
        for host in (login, *nodes):
            host.run(["bash", "-c", START, "bash", key])
        login.start(["slurmctld", "-D"], folder / "slurmctld.log", **env)
        for node in nodes:
            node.start(["slurmd", "-D", "-N", node.name], folder / f"slurmd-{node.name}.log", **env)
        result = Slurm(hosts, configuration)
        until(lambda: _is_up(result), "Slurm to be up", timeout_s=60)
        yield result


def _is_up(there: Slurm) -> bool:
    try:
        states = there("sinfo", "--noheader", "--Node", "--format=%T").split()
    except AssertionError:  # the controller does not answer yet
        return False
    return set(states) == {"idle"}
