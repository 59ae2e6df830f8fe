"""`python -m orchestrator.evaluate TARGET`: measure checkpoints, with error bars, passports and a hash.

Only blocks that are not there are computed: after a full disk, a lost Ray or an interrupt the same command goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from orchestrator import cli
from orchestrator.experiment.profiles import PROFILES
from workers.config import Mistake

EXAMPLES = (
    "beta_schedule",
    "aca8d9a9 evaluation.fid.samples=5000 --json",
    "ddpm-cifar10-32 data.source=cifar10.parquet --profile ddpm-2020",
)
MORE = """A folder of diffusers needs data.source=..., the images that it was trained on. Only what is not measured
yet is computed: the same command goes on where one was cut off."""
MOST_TASKS = 256


def make_parser() -> argparse.ArgumentParser:
    endings = {cli.DONE: "all is measured", cli.SOME_FAILED: "", cli.CLUSTER_LOST: "", cli.INTERRUPTED: ""}
    result = cli.make_parser("evaluate", "TARGET [a.b=value ...]", EXAMPLES, more=MORE, endings=endings)
    result.add_argument(
        "target", metavar="TARGET", help="a sweep, a trial's id, or a folder with a checkpoint, ours or diffusers'"
    )
    cli.add_overrides(result)
    cli.add_profile(result, PROFILES)
    result.add_argument("--json", action="store_true", help="print the summaries as JSON")
    result.add_argument("--tasks", type=int, help="blocks at once on this machine (default: one per core, and one)")
    cli.add_ray_address(result)
    cli.add_storage(result)
    cli.add_code(result)
    cli.add_trust(result)
    cli.add_tracking_uri(result, "that of the trial's sweep, or the storage's")
    cli.add_verbosity(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="The same command goes on where this one stopped.")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    if options.tasks is not None and not 1 <= options.tasks <= MOST_TASKS:
        raise Mistake(f"--tasks {options.tasks}: 1 to {MOST_TASKS}, each a process")
    from orchestrator.experiment.load import list_values, open_folders
    from orchestrator.experiment.preflight import describe_data
    from orchestrator.measuring import subjects  # with torch, which --help does without
    from workers.storage import Storage

    open_folders(options.code, list_values(options.overrides))
    storage = Storage(options.storage)
    found = subjects.find(options.target, storage, options.overrides, options.profile)
    sources, warnings = subjects.check(found)
    cli.tell(describe_data(sources.values()), warnings, quiet=options.quiet)
    storage.check_writable()
    from rich.console import Console  # Ray loads here: the user's slips do without

    from orchestrator.execution.measurements import describe_measured, format_measured, measure
    from orchestrator.output.terminal import Display, show_messages
    from orchestrator.tracking.outside import record_measurement

    console = Console(width=None if Console().is_terminal else 200, stderr=options.json)
    display = Display({}, console, options.quiet, options.verbose)
    with show_messages(console, options.quiet, options.verbose):
        measured = measure(
            found, sources, storage, display=display, ray_address=options.ray_address, at_once=options.tasks
        )
        left = record_measurement(storage, options.tracking_uri, measured, sources)
    if options.json:
        print(json.dumps([describe_measured(m) for m in measured], indent=2))
    else:
        for m in measured:
            console.print(format_measured(m), markup=False, highlight=False, soft_wrap=True)
    if left:
        console.print(left, markup=False, highlight=False, soft_wrap=True)
    return cli.SOME_FAILED if any(m.failed for m in measured) else cli.DONE


if __name__ == "__main__":
    sys.exit(cli.call("evaluate", main))
