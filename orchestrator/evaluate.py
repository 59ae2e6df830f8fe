"""`python -m orchestrator.evaluate TARGET`: measure checkpoints, with error bars, passports and a hash.

Only blocks that are not there are computed. Exit status: 0 all measured, 1 something failed, 2 the user's mistake.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence

from orchestrator.profiles import PROFILES
from workers.config import Mistake

EPILOG = """examples:
  python -m orchestrator.evaluate beta_schedule
  python -m orchestrator.evaluate 53964d91 evaluation.fid.samples=5000
  python -m orchestrator.evaluate runs/trials/53964d91.../checkpoints/step-00000300 --json
  python -m orchestrator.evaluate ddpm-cifar10-32 data.source=cifar10.parquet --profile ddpm-2020

A folder of diffusers needs data.source=..., the images that it was trained on."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.evaluate",
        description="Measure a checkpoint, a trial or all trials of a sweep.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("target", help="a sweep, a trial's address, or a folder with a checkpoint, ours or diffusers'")
    result.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings of evaluation, data, seed")
    result.add_argument("--profile", help=f"measure as a paper did: {', '.join(PROFILES)}")
    result.add_argument("--json", action="store_true", help="print the summaries as JSON")
    result.add_argument("--tasks", type=int, help="blocks at once on this machine (default: one a core, and one)")
    result.add_argument("--address", help="a Ray cluster to attach to; default: this machine alone")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    result.add_argument("--tracking-uri", help="an MLflow server; default: that of the trial's sweep, or the storage's")
    result.add_argument("-q", "--quiet", action="store_true", help="print the result only")
    result.add_argument("-v", "--verbose", action="store_true", help="also libraries' warnings")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.tasks is not None and options.tasks < 1:
        print(f"--tasks {options.tasks}: at least 1", file=sys.stderr)
        return 2
    try:
        return run(options)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this one stopped.", file=sys.stderr)
        return 128 + signal.SIGINT


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    from rich.console import Console  # these take a second: --help and the user's slips do without

    from orchestrator import subjects
    from orchestrator.measuring import measure
    from orchestrator.reports import results
    from orchestrator.terminal import Display, listening
    from orchestrator.tracking.record import record_measurement
    from workers.storage import Storage

    storage = Storage(options.storage)
    found = subjects.find(options.target, storage, options.overrides, options.profile)
    sources, warnings = subjects.check(found)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    console = Console(width=None if Console().is_terminal else 200, stderr=options.json)
    display = Display({}, console, options.quiet, options.verbose)
    with listening(console, options.quiet, options.verbose):
        measured = measure(found, sources, storage, display, options.address, options.tasks)
        left = record_measurement(storage, options.tracking_uri, measured, sources)
    if options.json:
        print(json.dumps([results.as_json(m) for m in measured], indent=2))
    else:
        for m in measured:
            console.print(results.evaluation_text(m), markup=False, highlight=False, soft_wrap=True)
    if left:
        console.print(left, markup=False, highlight=False, soft_wrap=True)
    return 1 if any(m.failed for m in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
