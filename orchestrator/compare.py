"""`python -m orchestrator.compare A B`: the difference of two measured checkpoints, where they may be compared."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import cli
from orchestrator.experiment.metrics import DENSITY, NLL
from orchestrator.experiment.profiles import PROFILES
from orchestrator.measuring.differences import (
    BY_IMAGE,
    compare_paired,
    list_differences_of_kind,
    list_protocol_differences,
)
from orchestrator.state.rows import is_distance
from workers.config import Mistake

EXAMPLES = ("aca8d9a9 7fa67567", "aca8d9a9 7fa67567 evaluation.fid.samples=5000")
MORE = """Both must have been measured, by a sweep or by python -m orchestrator.evaluate. The same overrides name
the same measurement."""


def make_parser() -> argparse.ArgumentParser:
    endings = {cli.DONE: "they are compared", cli.SOME_FAILED: "they were measured by different protocols"}
    result = cli.make_parser("compare", "A B [a.b=value ...]", EXAMPLES, more=MORE, endings=endings)
    result.add_argument("a", metavar="A", help="a trial's id, or a folder with a checkpoint")
    result.add_argument("b", metavar="B", help="the one to compare it with")
    cli.add_overrides(result)
    cli.add_profile(result, PROFILES)
    cli.add_storage(result)
    cli.add_code(result)
    cli.add_trust(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments)


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    lines, differing = compare_summaries(*_read_summaries(options))
    print("\n".join(lines))
    return cli.SOME_FAILED if differing else cli.DONE


def _read_summaries(options: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What was measured of both targets. Raises Mistake where one of them was not."""
    from orchestrator.experiment.load import list_values, open_folders
    from orchestrator.experiment.preflight import describe_data
    from orchestrator.measuring import subjects  # torch loads here: --help does without
    from workers.evaluation.blocks import Images, name_summary
    from workers.storage import Storage

    open_folders(options.code, list_values(options.overrides))
    storage = Storage(options.storage)

    def find(target: str) -> subjects.Subject:
        found = subjects.find(target, storage, options.overrides, options.profile)
        if len(found) > 1:
            names = ", ".join(str(s.trial)[:8] for s in found)
            raise Mistake(f"{target} is a sweep of {len(found)} trials; give two of them: {names}")
        return found[0]

    both = {target: find(target) for target in (options.a, options.b)}
    sources, warnings = subjects.check(list(both.values()))
    cli.tell(describe_data(sources.values()), warnings)

    def read(target: str) -> Mapping[str, Any]:
        subject = both[target]
        path = name_summary(subject.m, subject.checkpoint.digest, Images.of(sources[subject.m.data]))
        summary = storage.read_sealed(path)
        if summary is None:
            words = " ".join(["python -m orchestrator.evaluate", target, *options.overrides])
            raise Mistake(f"{target} has not been measured in this way; run {words} --storage {options.storage}")
        return dict(summary)

    return read(options.a), read(options.b)


def compare_summaries(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What to print of two summaries, and how their protocols differ."""
    lines, differing = [], []
    for kind in sorted(first["passports"].keys() | second["passports"].keys()):
        ours = list_protocol_differences(first, second, kind)
        differing += ours
        lines += [f"not compared: {text}" for text in ours]
        lines += [f"not of one kind: {text}" for text in list_differences_of_kind(first, second, kind)]
        if kind == "nll" and not ours:
            lines.append(_describe_paired(NLL if NLL in first["metrics"] else DENSITY, first, second))
        if kind in ("samples", "reconstructions") and not ours:
            shared = [
                name
                for name in first["metrics"]
                if is_distance(name) and name in second["metrics"] and ("reconstruction" in name) == (kind != "samples")
            ]
            lines += [_describe_unpaired(name, first["metrics"], second["metrics"]) for name in shared]
    return lines, differing


def _describe_paired(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    by_image, _ = BY_IMAGE[name]
    if len(first[by_image]) < 2:
        return "not compared: the nll of a single image has no error"
    d = compare_paired(first, second, name)
    verdict = ("B is better" if d.mean > 0 else "A is better") if d.clear else "not distinguishable"
    return f"{name.removeprefix('eval/'):<16} A - B = {d}  95 % of {d.n} pairs of images: {verdict}"


def _describe_unpaired(name: str, first: Mapping[str, float], second: Mapping[str, float]) -> str:
    """As if the samples were independent: they share seeds, so the true error may be smaller."""
    text = f"{name.removeprefix('eval/'):<16} A - B = {first[name] - second[name]:+.4f}"
    errors = [metrics.get(f"{name}_se") for metrics in (first, second)]
    if None in errors:
        return f"{text}, without an error: too few samples"
    return f"{text} ± {sum(e**2 for e in errors if e is not None) ** 0.5:.4f} (standard error)"


if __name__ == "__main__":
    sys.exit(cli.call("compare", main))
