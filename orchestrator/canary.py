"""`python -m orchestrator.canary`: measure what is known beforehand, before any other number is believed.

Exit status: 0 all as expected, 3 some number is another.
"""

import argparse
import sys
from collections.abc import Sequence

from workers.config import Measurement, Mistake


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

    from orchestrator.measuring import measure
    from orchestrator.subjects import Subject
    from orchestrator.terminal import Display
    from workers import canaries
    from workers import checkpoint as checkpoints
    from workers.data import describe
    from workers.diffusion.process import Process
    from workers.storage import Storage

    storage, m = Storage(storage_root), Measurement.of(canaries.GAUSSIAN)
    process, display = Process.of(canaries.GAUSSIAN.diffusion), Display({}, Console(stderr=True), quiet=True)
    with storage.lock("canaries/lock"):
        checkpoint = checkpoints.save(storage, "canaries/gaussian", 0, canaries.DENOISER, process, {}, {}, {})
        # Measured anew each time: what a block cached says nothing of today's libraries.
        storage.delete(f"evaluations/{checkpoint.digest}")
        subject = Subject("gaussian", m, checkpoint)
        [through_ray] = measure([subject], {m.data: describe(m.data)}, storage, display, address, None)
    if through_ray.summary is None:
        raise Mistake(f"the canaries could not be measured through Ray: {through_ray.failed}")
    measured = {**canaries.measure(), "gaussian/nll_bpd_through_ray": through_ray.summary["metrics"]["eval/nll_bpd"]}
    verdicts = canaries.judge(measured)
    print("\n".join(map(str, verdicts)))
    return 0 if all(verdict.passed for verdict in verdicts) else 3


if __name__ == "__main__":
    sys.exit(main())
