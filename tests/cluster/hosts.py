"""Several hosts on one machine, for tests of a real cluster. Linux and root only.

A host is a process in namespaces of its own: network (an address on a bridge), PID (`ray stop` kills every Ray process
that it sees, and here it sees one host's), mount, UTS (a host name) and IPC. On top of the machine's files it has

- an overlay over the home folder: what is written there stays with the host and is forgotten with it;
- tmpfs on /tmp (Ray's sessions and sockets), /dev/shm (its object store) and /run; folders to be shared stay in sight;
- an sshd, which knows the key in `Network.key`.

Host names and addresses are those of `Network.hosts`, in order. The bridge lies in the namespace of the first host,
which is thereby the others' neighbour and whose part is that of the user's own machine. Nothing is made outside of
these namespaces, so all of it is gone with the hosts' first processes: a namespace, its devices and its mounts end with
the last process in it, and the death of a PID namespace's first process is the death of all.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter", "setpriv", "bash", "make")
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KINDS = ("net", "pid", "mnt", "uts", "ipc")

# The first process of a host: makes the host of its namespaces, then waits, reaping what orphans its processes leave.
FIRST = r"""
set -eu
hostname "$NAME"
declare -A seen
for path in "$@"; do exec {seen[$path]}<"$path"; done  # /tmp will hide some of them
for path in /tmp /dev/shm /run; do mount -t tmpfs tmpfs "$path"; done
for path in "$@"; do
    mkdir -p "$path"
    mount --no-canonicalize --bind "/proc/self/fd/${seen[$path]}" "$path"
    exec {seen[$path]}<&-
done
mkdir -p /run/sshd /run/home/upper /run/home/work
mount -t overlay overlay -o "lowerdir=$HOME,upperdir=/run/home/upper,workdir=/run/home/work" "$HOME"
ip link set lo up
touch "$READY"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
"$(command -v sshd)" -D -e -f "$SSHD_CONFIG" &
touch "$READY.up"
while :; do sleep 3600 & wait $!; done
"""

SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""


def find_missing_tools() -> str:
    """Why there can be no hosts here, or ""."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts as namespaces need Linux and root"
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server openssh-client rsync iproute2 make)"
    probe = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Host:
    name: str
    address: str
    unshare: subprocess.Popen[bytes]
    first: int  # the host's first process, as seen from here
    namespaces: frozenset[str] = frozenset()

    def start(self, command: Sequence[object], output: Path | int, **env: str) -> "Command":
        """Starts a command on the host, in the project's folder and a login's environment."""
        enter = ["nsenter", f"--target={self.first}", "--all", f"--wd={ROOT}"]
        words = ["env", "-i", *(f"{k}={v}" for k, v in {**login(), **env}.items()), *map(str, command)]
        with output.open("ab") if isinstance(output, Path) else nullcontext(output) as out:
            return Command(subprocess.Popen([*enter, *words], stdout=out, stderr=subprocess.STDOUT, text=True))

    def run(self, command: Sequence[object], timeout_s: float = 300, **env: str) -> str:
        """Runs a command on the host; gives what it printed. Raises AssertionError where it fails."""
        started = self.start(command, subprocess.PIPE, **env)
        try:
            output, _ = started.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            started.signal(signal.SIGKILL)
            output, _ = started.process.communicate()
            raise AssertionError(f"{self.name}: {command} took over {timeout_s:g} s:\n{output}") from None
        assert started.process.returncode == 0, f"{self.name}: {command} failed:\n{output}"
        return str(output)

    def processes(self) -> dict[int, str]:
        """Command lines of the host's processes by their ids here."""
        return {pid: title for pid, title in _titles().items() if _namespace(pid, "pid") in self.namespaces}

    def kill(self) -> None:
        """The host is gone at once, with all its processes."""
        with suppress(ProcessLookupError):  # it is gone already
            os.kill(self.first, signal.SIGKILL)
        self.unshare.wait()


@dataclass
class Command:
    """A command that runs on a host."""

    process: subprocess.Popen[str]

    def signal(self, number: signal.Signals) -> None:
        """Sends the command a signal: it is the child of the nsenter that waits for it."""
        for child in _children(self.process.pid):
            os.kill(child, number)


@dataclass
class Network:
    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """The private key that every host lets in."""
        return self.folder / "key"

    def left(self) -> list[str]:
        """What there still is of the hosts: processes, in whichever of their namespaces, and mounts of this machine."""
        ours = {name for host in self.hosts.values() for name in host.namespaces}
        alive = [f"process {pid}: {title}" for pid, title in _titles().items() if _namespaces(pid) & ours]
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.folder) in line]
        return alive + mounts


@contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names, which share `folder`; all is gone at the end, however it comes."""
    result = Network(folder)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    try:
        for number, name in enumerate(names):
            result.hosts[name] = _start(
                folder, name, f"10.77.0.{number + 1}", [folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
            )
        hosts = list(result.hosts.values())
        switch = hosts[0]
        _ip(switch, "link add lan type bridge")
        _ip(switch, "link set lan up")
        for number, host in enumerate(hosts):
            _ip(switch, f"link add port{number} type veth peer name eth0 netns {host.first}")
            _ip(switch, f"link set port{number} master lan up")
        for host in hosts:
            until((folder / f"{host.name}.ready.up").exists, f"{host.name} to be up")
        yield result
    finally:
        for host in result.hosts.values():
            host.kill()


def _start(folder: Path, name: str, address: str, keep: Sequence[Path]) -> Host:
    ready = folder / f"{name}.ready"
    env = {**login(), "NAME": name, "ADDRESS": address, "SSHD_CONFIG": str(folder / "sshd_config"), "READY": str(ready)}
    seen = [str(path) for path in keep if str(path).startswith(("/tmp/", "/run/"))]
    command = (
        "setpriv --pdeathsig KILL unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc".split()
    )
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*command, "bash", "-c", FIRST, "bash", *seen], env=env, stdout=log, stderr=log)
    try:
        until(lambda: ready.exists() or process.poll() is not None, f"{name} to start")
        assert process.poll() is None, (folder / f"{name}.log").read_text()
        [first] = _children(process.pid)
    except BaseException:
        process.kill()  # and with it its child
        process.wait()
        raise
    return Host(name, address, process, first, frozenset(_namespaces(first)))


def login() -> Mapping[str, str]:
    return {"HOME": str(Path("~root").expanduser()), "PATH": PATH, "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8"}


def until(condition: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


def _ip(host: Host, command: str) -> None:
    subprocess.run(["nsenter", f"--target={host.first}", "--net", "ip", *command.split()], check=True)


def _titles() -> dict[int, str]:
    titles = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
    return titles


def _namespace(pid: int, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _namespaces(pid: int) -> set[str]:
    return {_namespace(pid, kind) for kind in KINDS} - {""}


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
