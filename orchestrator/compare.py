"""`python -m orchestrator.compare A B`: the difference of two measured checkpoints, where they may be compared.

Exit status: 0 compared, 1 measured by different protocols, 2 the user's mistake.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.comparing import paired, protocol_differences
from orchestrator.reports.results import is_distance
from workers.config import Mistake

EPILOG = """example:
  python -m orchestrator.compare 53964d91 10a7fd6d

Both must have been measured, by a sweep or by python -m orchestrator.evaluate. The same overrides name the same
measurement: python -m orchestrator.compare A B evaluation.fid.samples=5000"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.compare",
        description="The difference of two measured checkpoints with its confidence interval.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("a", help="a trial's address, or a folder with a checkpoint")
    result.add_argument("b", help="the one to compare it with")
    result.add_argument("overrides", nargs="*", metavar="c.d=value", help="settings of evaluation, data, seed")
    result.add_argument("--profile", help="measured as a paper did")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        first, second = (_summary(target, options) for target in (options.a, options.b))
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    lines, differing = comparison(first, second)
    print("\n".join(lines))
    return 1 if differing else 0


def _summary(target: str, options: argparse.Namespace) -> Mapping[str, Any]:
    """What was measured of a target. Raises Mistake where it was not."""
    from orchestrator import subjects
    from workers.blocks import Images, summary_path
    from workers.storage import Storage

    storage = Storage(options.storage)
    found = subjects.find(target, storage, options.overrides, options.profile)
    if len(found) > 1:
        names = ", ".join(str(s.trial)[:8] for s in found)
        raise Mistake(f"{target} is a sweep of {len(found)} trials; give two of them: {names}")
    sources, _ = subjects.check(found)
    [subject] = found
    path = summary_path(subject.m, subject.checkpoint.digest, Images.of(sources[subject.m.data]))
    summary = storage.read_sealed(path)
    if summary is None:
        words = " ".join(["python -m orchestrator.evaluate", target, *options.overrides])
        raise Mistake(f"{target} has not been measured in this way; run {words} --storage {options.storage}")
    return dict(summary)


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What to print of two summaries, and how their protocols differ."""
    lines, differing = [], []
    for kind in sorted(first["passports"].keys() | second["passports"].keys()):
        ours = protocol_differences(first, second, kind)
        differing += ours
        lines += [f"not compared: {text}" for text in ours]
        if kind == "nll" and not ours and len(first["nll_per_image"]) < 2:
            lines.append("not compared: the nll of a single image has no error")
        elif kind == "nll" and not ours:
            d = paired(first, second)
            verdict = ("B is better" if d.mean > 0 else "A is better") if d.clear else "not distinguishable"
            lines.append(f"nll_bpd          A - B = {d}  95 % of {d.n} pairs of images: {verdict}")
        if kind == "samples" and not ours:
            shared = [name for name in first["metrics"] if is_distance(name) and name in second["metrics"]]
            lines += [_unpaired(name, first["metrics"], second["metrics"]) for name in shared]
    return lines, differing


def _unpaired(name: str, first: Mapping[str, float], second: Mapping[str, float]) -> str:
    """As if the samples were independent: they share seeds, so the true error may be smaller."""
    text = f"{name.removeprefix('eval/'):<16} A - B = {first[name] - second[name]:+.4f}"
    errors = [metrics.get(f"{name}_se") for metrics in (first, second)]
    if None in errors:
        return f"{text}, without an error: too few samples"
    return f"{text} ± {sum(e**2 for e in errors if e is not None) ** 0.5:.4f} (standard error)"


if __name__ == "__main__":
    sys.exit(main())
