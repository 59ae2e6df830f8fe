"""`python -m orchestrator.report SWEEP`: one self-contained page that says how a sweep went, and all it rests on.

The page needs no network and no server; it is written when a sweep ends, and by this command at any time, also while
the sweep runs. Everything comes from the storage's files: no Ray, no torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator import cli
from orchestrator.output.findings import gather
from orchestrator.output.markdown import write_markdown
from orchestrator.output.page import render_report
from orchestrator.state.saved import keep_report
from workers.layout import name_report_file
from workers.storage import Storage

EXAMPLES = ("beta_schedule --output page.html --storage s3://bucket/runs", "beta_schedule --markdown > comment.md")
MORE = "The page goes to sweeps/<name>/report.html in the storage, or to --output."


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("report", "SWEEP", EXAMPLES, more=MORE)
    result.add_argument("sweep", metavar="SWEEP", help="the sweep's name")
    result.add_argument("--markdown", action="store_true", help="print Markdown for a pull request instead")
    result.add_argument(
        "--rows", action="store_true", help="show every row, also of those that differ in the seed alone"
    )
    result.add_argument("--output", type=Path, help="write the page there instead of the storage")
    cli.add_storage(result)
    cli.add_trust(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments)


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    storage = Storage(options.storage)
    report = gather(storage, options.sweep, options.rows)
    if options.markdown:
        print(write_markdown(report), end="")
        return cli.DONE
    content = render_report(report).encode()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(content)
    else:
        keep_report(storage, options.sweep, content)
    print(options.output or storage.find_url(name_report_file(options.sweep)))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(cli.call("report", main))
