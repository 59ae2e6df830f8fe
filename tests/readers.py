"""What reads a storage that fuzzing.py has damaged: commands and functions of the API."""

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from outcome import TINY, Outcome, _main, called, listened

READERS: dict[str, Callable[[Path], Outcome]] = {}


def reader(function: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
    READERS[function.__name__] = function
    return function


@reader
def status(storage: Path) -> Outcome:
    code, out, err = called(_main("orchestrator.status"), "--json", "--storage", storage)
    sweeps = json.loads(out)["sweeps"] if code == 0 else []
    trials = [row for sweep in sweeps for row in sweep["trials"] if row["state"] == "done"]
    rows = {row["trial"]: (row["step"], row["metrics"]) for row in trials}
    return Outcome(code, out + err, rows if code == 0 else None)


@reader
def status_of_one(storage: Path) -> Outcome:
    code, out, err = called(_main("orchestrator.status"), "tiny", "--storage", storage)
    return Outcome(code, out + err)


@reader
def report(storage: Path) -> Outcome:
    code, out, err = called(_main("orchestrator.report"), "tiny", "--markdown", "--storage", storage)
    rows = {line.split(" | ")[0]: line for line in out.splitlines() if line.endswith("| done |")}
    return Outcome(code, out + err, rows if code == 0 else None)


@reader
def page(storage: Path) -> Outcome:
    code, out, err = called(_main("orchestrator.report"), "tiny", "--storage", storage)
    return Outcome(code, out + err)


@reader
def compare(storage: Path) -> Outcome:
    trials = sorted(path.name for path in (storage / "trials").iterdir())
    code, out, err = called(_main("orchestrator.compare"), *trials, "--storage", storage)
    return Outcome(code, out + err, out if code == 0 else None)


@reader
def loaded(storage: Path) -> Outcome:
    from orchestrator import load_results
    from workers.config import Mistake

    output = io.StringIO()
    with listened(output):
        try:
            frame = load_results("tiny", storage=storage)
        except Mistake as mistake:
            return Outcome(2, str(mistake) + output.getvalue())
    metrics = [name for name in frame.columns if name.startswith(("eval/", "valid/"))]
    done = [row for row in frame.to_dict("records") if row["state"] == "done"]
    rows = {row["trial"]: {name: row[name] for name in metrics if row[name] == row[name]} for row in done}  # no NaN
    return Outcome(0, output.getvalue() + "loaded", rows)


@reader
def model(storage: Path) -> Outcome:
    from orchestrator import open_model
    from workers.config import Mistake

    output = io.StringIO()
    with listened(output), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        try:
            images = open_model("tiny", storage=storage).sample(1, seed=0, steps=2)
        except Mistake as mistake:
            return Outcome(2, str(mistake) + output.getvalue())
    output.writelines(str(warning.message) for warning in warned if "best of the others" in str(warning.message))
    return Outcome(0, output.getvalue() + "drawn", hashlib.sha256(images.tobytes()).hexdigest())


@reader
def dry_run(storage: Path) -> Outcome:
    (file := storage.parent / "tiny.yaml").write_text(TINY)
    code, out, err = called(_main("orchestrator.sweep"), file, "--dry-run", "--storage", storage)
    return Outcome(code, out + err, out if code == 0 else None)
