"""What a sweep is asked for beside its experiment; light, as a dry run imports it."""

from dataclasses import dataclass

from orchestrator.clusters.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command works, by what means, and how much it prints meanwhile."""

    storage: str
    ray_address: str | None = None  # None: a Ray of this machine alone
    cluster: Cluster | None = None  # how far that at the address can grow, where its file is given
    fresh: bool = False
    quiet: bool = False
    verbose: bool = False
