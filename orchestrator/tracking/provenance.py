"""What ran where: code, versions, hardware, user and command, as tags of a run."""

import getpass
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from workers.config import hide_secrets


def collect_provenance() -> dict[str, str]:
    """Tags that say what ran where: code, versions, the driver's hardware, user and command."""
    here = Path(__file__)
    tags = {
        "mlflow.source.name": next((word for word in sys.orig_argv[1:] if not word.startswith("-")), "python"),
        "command": hide_secrets(" ".join(sys.orig_argv[1:])),
        "mlflow.source.type": "LOCAL",
        "host": socket.gethostname(),
        "hardware.platform": platform.platform(),
        "hardware.cpu": _find_cpu_model(),
        "hardware.cores": str(os.cpu_count()),
        "version.python": platform.python_version(),
    }
    if hasattr(os, "sysconf"):
        tags["hardware.memory_gb"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}"
    for package in ("torch", "ray", "mlflow", "diffusion-orchestrator"):
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            tags[f"version.{package}"] = "not installed"
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        tags["mlflow.user"] = str(os.getuid())
    if gpus := _read_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        tags["hardware.gpus"] = ", ".join(gpus.splitlines())
    git = ("git", "-C", str(here.parent))
    # An installed copy may lie inside somebody else's repository: only one that tracks this file counts.
    if _read_output(*git, "ls-files", "--error-unmatch", here.name):
        tags["mlflow.source.git.commit"] = _read_output(*git, "rev-parse", "HEAD")
        tags["git.dirty"] = str(bool(_read_output(*git, "status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _read_output(*command: str) -> str:
    """What a command prints, stripped; empty where it is missing or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _find_cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
