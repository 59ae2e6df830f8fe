"""`python -m orchestrator.report SWEEP`: one self-contained page that says how a sweep went, and all it rests on.

The page needs no network and no server; it is written when a sweep ends, and by this command at any time, also while
the sweep runs. Everything comes from the storage's files: no Ray, no torch. Exit status: 0, or 2 for the user's
mistake.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.reports.page import gather, markdown, page, path
from workers.config import Mistake
from workers.storage import Storage

EPILOG = """examples:
  python -m orchestrator.report beta_schedule
  python -m orchestrator.report beta_schedule --markdown > comment.md
  python -m orchestrator.report beta_schedule --output page.html --storage s3://bucket/runs

The page goes to sweeps/<name>/report.html in the storage, or to --output."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.report",
        description="Write the report of a sweep, while it runs or after: one page without network access.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("sweep", help="the sweep's name")
    result.add_argument("--markdown", action="store_true", help="print Markdown for a pull request instead")
    result.add_argument("--output", type=Path, help="write the page there instead of the storage")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        storage = Storage(options.storage)
        report = gather(storage, options.sweep)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    if options.markdown:
        print(markdown(report), end="")
        return 0
    content = page(report).encode()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(content)
    else:
        storage.write(path(options.sweep), content)
    print(options.output or storage.url(path(options.sweep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
