"""`python -m orchestrator.canary`: measure what is known beforehand, before any other number is believed.

Exit status: 0 all as expected, 3 some number is another.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.config import Measurement, Mistake

if TYPE_CHECKING:  # these take seconds: --help does without
    from orchestrator.terminal import Display
    from workers import canaries
    from workers.storage import Storage

THROUGH_RAY = "gaussian/nll_bpd_through_ray"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.canary",
        description="Measure a Gaussian data set whose bound and samples are known exactly, and recorded numbers that "
        "an update of a library would change; in this process, and once more through Ray.",
        epilog="example:\n  python -m orchestrator.canary",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--address", help="a Ray cluster to attach to; default: this machine alone")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options.storage, options.address)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2


def run(storage_root: str, address: str | None) -> int:
    """Raises Mistake where storage or cluster cannot be reached."""
    from rich.console import Console

    from orchestrator.terminal import Display
    from workers.storage import Storage

    found = verdicts(Storage(storage_root), Display({}, Console(stderr=True), quiet=True), address)
    print("\n".join(map(str, found)))
    return 0 if all(verdict.passed for verdict in found) else 3


def verdicts(
    storage: "Storage", display: "Display", address: str | None, through_ray: bool = True
) -> list["canaries.Verdict"]:
    """What the canaries say today; all of them `through_ray`, else those that this process measures by itself.

    Raises Mistake where storage or cluster cannot be reached.
    """
    from workers import canaries

    measured = canaries.measure()
    if through_ray:
        measured[THROUGH_RAY] = _nll_through_ray(storage, display, address)
    return [v for v in canaries.judge(measured) if through_ray or v.canary.name != THROUGH_RAY]


def _nll_through_ray(storage: "Storage", display: "Display", address: str | None) -> float:
    """The bound of the Gaussian pixels in bits/dim, by the blocks of an evaluation."""
    from orchestrator.measuring import measure
    from orchestrator.subjects import Subject
    from workers import canaries
    from workers import checkpoint as checkpoints
    from workers.data import describe
    from workers.diffusion.process import Process

    m, process = Measurement.of(canaries.GAUSSIAN), Process.of(canaries.GAUSSIAN.diffusion)
    with storage.lock("canaries/lock"):
        checkpoint = checkpoints.save(storage, "canaries/gaussian", 0, canaries.DENOISER, process, {}, {}, {})
        # Measured anew each time: what a block cached says nothing of today's libraries.
        storage.delete(f"evaluations/{checkpoint.digest}")
        subject = Subject("gaussian", m, checkpoint)
        [found] = measure([subject], {m.data: describe(m.data)}, storage, display, address, None)
    if found.summary is None:
        raise Mistake(f"the canaries could not be measured through Ray: {found.failed}")
    return float(found.summary["metrics"]["eval/nll_bpd"])


if __name__ == "__main__":
    sys.exit(main())
