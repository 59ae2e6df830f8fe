"""Feeds the program damaged and foreign files and overrides, and looks at how it ends.

    python tests/fuzzing.py --seconds 600 --seed 7           # prints what it found; status 1 where it found anything
    python tests/fuzzing.py --seed 7 --only 123              # one try again, with all that was said
    python tests/fuzzing.py --seconds 600 --reruns 5         # besides, sweeps on a damaged storage, with Ray

A try is a function of (seed, number). It must end with status 0, 1 or 2 and a line, within SECONDS and MEMORY, without
a traceback; and where it ends well its numbers are those of an undisturbed one, unless it names the file that is
damaged. Tries run in a child process, which is replaced where one hangs or dies of memory.
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from outcome import TINY, Outcome, Prepared
from preparation import prepare_all
from readers import loaded
from tries import KINDS, stored

ROOT = Path(__file__).parent.parent
SECONDS, MEMORY = 60.0, 6 * 2**30  # that a try may take: a damaged claim must not be believed


def one(seed: int, number: int, prepared: Prepared, kind: str = "", aloud: bool = False) -> tuple[str, str]:
    """What was tried, of one `kind` or any, and what is wrong with how it ended; empty where nothing is."""
    rng = random.Random(f"{seed}-{number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        what, ran = rng.choice([k for k in KINDS if kind in k.__name__])(rng, Path(folder), prepared)
        if aloud:
            print(what, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
        here = Path.cwd()
        os.chdir(folder)
        try:
            outcome = ran()
        except BaseException as error:  # noqa: BLE001 that is what is looked for
            trace = "".join(traceback.format_exception(error)) if aloud else ""
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if str(ROOT) in f.filename and Path(f.filename).parent != ROOT / "tests"
            ]
            at = (
                f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
                if ours
                else f"{Path(last.filename).name}:{last.lineno}"
            )
            return what, f"{type(error).__name__} at {at}: {str(error)[:200]}\n{trace}".strip()
        finally:
            os.chdir(here)
    if aloud:
        print(outcome)
    return what, wrong(outcome, prepared.numbers, what)


def wrong(outcome: Outcome, numbers: dict[str, Any], what: str) -> str:
    if outcome.status not in (0, 1, 2):
        return f"status {outcome.status}"
    if "Traceback (most recent call last)" in outcome.output:
        return f"a traceback is told: {outcome.output[-300:]}"
    if outcome.status and not outcome.output.strip():
        return f"status {outcome.status} without a word"
    expected = numbers.get(what.split(" after ")[0]) if " after " in what else numbers.get(_subject(what))
    if isinstance(outcome.numbers, dict) and isinstance(expected, dict):
        same = all(
            expected.get(key) == value for key, value in outcome.numbers.items()
        )  # a trial that isn't there, or isn't done, says so
    else:
        same = outcome.numbers is None or outcome.numbers == expected
    if not same and not any(name in outcome.output for name in outcome.names):
        return f"other numbers without a word: {str(outcome.numbers)[:300]} for {str(expected)[:300]}"
    return ""


def _subject(what: str) -> str:
    first, _, rest = what.partition(" ")
    name = rest.partition(":")[0].removesuffix(" decoded")
    return f"data-{name}" if first == "data" else name


def _work(prepared: Prepared, seed: int, kind: str, numbers: Sequence[int], link: Connection) -> None:
    """The child: tells of each try before and after it."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY, _size() + MEMORY))
    os.environ["HOME"] = str(prepared.folder / "home")
    for number in numbers:
        link.send((number, None, None))
        link.send((number, *one(seed, number, prepared, kind)))


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Finding:
    number: int
    what: str
    why: str


def fuzz(prepared: Prepared, seed: int, seconds: float, kind: str = "") -> tuple[int, list[Finding]]:
    """How many tries there were in that time, and what was found."""
    deadline, number, found, most = time.monotonic() + seconds, 0, list[Finding](), 10**9
    context = multiprocessing.get_context("fork")
    for name in (
        "canary",
        "compare",
        "evaluate",
        "nightly",
        "report",
        "sample",
        "status",
        "measuring.subjects",
        "sweep",
    ):
        __import__(f"orchestrator.{name}")  # a child would do it again
    while time.monotonic() < deadline:
        ours, theirs = context.Pipe()
        child = context.Process(target=_work, args=(prepared, seed, kind, range(number, most), theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            while time.monotonic() < deadline:
                if not ours.poll(SECONDS):
                    found.append(Finding(number, "?", f"hangs for {SECONDS:g} s"))
                    number += 1
                    break
                tried, what, why = ours.recv()
                number = tried + (what is not None)
                if why:
                    found.append(Finding(tried, what, why))
        except EOFError:
            child.join()
            found.append(Finding(number, "?", f"the process died (exit code {child.exitcode})"))
            number += 1
        child.kill()
        child.join()
    return number, found


def rerun(prepared: Prepared, seed: int, number: int) -> tuple[str, str]:
    """The sweep itself, with Ray, on a storage in which something is damaged; with what is wrong with its end."""
    rng = random.Random(f"{seed}-rerun-{number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        what, _ = stored(rng, Path(folder), prepared, linked=False)
        what, storage = what.partition(" after ")[2], Path(folder, "runs")
        (file := Path(folder, "tiny.yaml")).write_text(TINY)
        command = [sys.executable, "-m", "orchestrator.sweep", str(file), "--storage", str(storage)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
        output = done.stdout + done.stderr
        outcome = Outcome(done.returncode, output, loaded(storage).numbers, [what.partition(":")[0].rpartition("/")[2]])
    return what, wrong(outcome, {"loaded": prepared.numbers["loaded"]}, f"loaded after {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python tests/fuzzing.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", type=int, help="the number of one try, to be made again")
    parser.add_argument("--kind", default="", help=f"of what is tried: {', '.join(k.__name__ for k in KINDS[:-1])}")
    parser.add_argument("--reruns", type=int, default=0, help="sweeps on a damaged storage, with Ray: a minute each")
    parser.add_argument(
        "--storage", type=Path, default=ROOT / "build/fuzz", help="of the finished sweep, made if need be"
    )
    options = parser.parse_args(arguments)
    options.storage.parent.mkdir(parents=True, exist_ok=True)
    if not (options.storage / "sweeps/tiny/results.parquet").exists():
        (file := options.storage.parent / "tiny.yaml").write_text(TINY)
        command = [sys.executable, "-m", "orchestrator.sweep", str(file), "--storage", str(options.storage)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        prepared = prepare_all(options.storage, Path(folder))
        if options.only is not None:
            print(*one(options.seed, options.only, prepared, options.kind, aloud=True), sep="\n")
            return 0
        tries, found = fuzz(prepared, options.seed, options.seconds, options.kind)
        for finding in found:
            print(f"{finding.number}  {finding.what}\n    {finding.why}")
        counted = Counter(finding.why.partition(": ")[0] for finding in found)
        print(f"{tries} tries with seed {options.seed}, {len(found)} findings of {len(counted)} kinds:")
        for why, count in counted.most_common():
            print(f"  {count:4}  {why}")
        for number in range(options.reruns):
            what, why = rerun(prepared, options.seed, number)
            print(f"rerun {number}  {what}\n    {why or 'fine'}")
            found += [Finding(number, what, why)] if why else []
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
