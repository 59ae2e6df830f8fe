"""Feeds the program damaged and foreign files and overrides, and looks at how it ends.

    python tests/fuzzing.py --seconds 600 --seed 7           # prints what it found; status 1 where it found anything
    python tests/fuzzing.py --seed 7 --only 123              # one try again, with all that was said
    python tests/fuzzing.py --seconds 600 --reruns 5         # besides, sweeps on a damaged storage, with Ray

A try is a function of (seed, number). It must end with status 0, 1 or 2 and a line, within SECONDS and MEMORY, without
a traceback; and where it ends well its numbers are those of an undisturbed one, unless it names the file that is
damaged. Tries run in a child process, which is replaced where one hangs or dies of memory.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from workers.network.checkpoint import Snapshot

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SECONDS, MEMORY = 60.0, 6 * 2**30  # that a try may take: a damaged claim must not be believed
TINY = """
name: tiny
seed: 0
data: {source: digits}
model: {channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}
diffusion: {T: 50, schedule: {kind: linear, scale: per_1000}, prediction: eps, variance: fixed_large}
loss: {objective: mse, weighting: simple}
training:
  {steps: 20, batch_size: 32, lr: 2.0e-3, ema: 0.99, precision: float32, validate_every: 10, checkpoint_every: 5}
evaluation:
  nll: {images: 30, timesteps: all}
  fid: {samples: 100, sampler: {kind: ddim, steps: 5}}
search:
  space:
    loss.weighting: {grid: [simple, vlb]}
smoke: {training.steps: 4}
"""
NIGHTLY = """
name: nightly
models: ["*@champion", "*@candidate", tiny]
seed: 0
evaluation: {nll: {images: 30, timesteps: all}, fid: {samples: 100, sampler: {kind: ddim, steps: 5}}}
schedule: {at: "02:30", zone: UTC}
regression:
  against: [last_night, champion]
  rules: [{metric: eval/nll_bpd, standard_errors: 3, relative: 0.002}]
hooks: {webhook: null, command: null, mail: null}
promote: false
"""
ODD = [
    "", " ", "''", "null", "~", "true", "0", "-1", "1", "2", "0.5", "-0.0", "1e-400", "1e400", ".inf", "-.inf",
    ".nan", "NaN",
    "1000000000", "10000000000", "9223372036854775808", "1" + "0" * 400, "-1" + "0" * 40, "1e308", "5e-324", "0x10",
    "[]",
    "[[]]", "{}", "{a: b}", "[1, 2, 3]", "[null]", "[.nan]", "[1e999]", "all", "auto", "../..", "/dev/zero",
    "/etc/passwd",
    "a/b", "..", ".", "*", "'\\0'", "\"\\ud800\"", "\u202e\u0000",
    "é" * 200, "x" * 5000, "!!python/object:os.system", "&a [*a]",
    "*b", "? a", "<<: 1", "{<<: [1]}", "- a\n- b", "%", "@", "`", "|", ">", "#", "{grid: [1, 2]}", "{grid: []}",
    "{choice: [1]}",
    "{uniform: [0, 1]}", "{int_uniform: [0, " + "9" * 400 + "]}", "{loguniform: [1e-308, 1e308]}", "2026-02-30",
    "1:30", "0o17",
    "s3://", "s3://[", "http://[::1", "file:///", "hf://a/b", "://", "?", "https://127.0.0.1:1/x",
]  # fmt: skip
FOREIGN = [
    b"", b"\n", b"\0" * 64, b"null", b"[]", b"{}", b"0", b'"text"', b"{", b"[" * 100_000, b"NaN", b'{"a": 1e999}',
    b"\xff\xfe\x00",
    b"<html><body>502 Bad Gateway</body></html>", b"PK\x03\x04 a zip", b"PAR1" * 9, b"\x89PNG\r\n\x1a\n",
    b"SQLite format 3\0",
    b"%!PS-Adobe-3.0\n(x) show", b"\x1f\x8b\x08\0", b"\x93NUMPY\x01\x00v\x00{'descr'", b"a: &a [*a]\n", b"x\n" * 1000,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b'{"name": "other", "trials": {}}',
    b"version https://git-lfs.github.com/spec/v1\noid",
]  # fmt: skip


# ---- Damage ----------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """What was done to the content of a file, and the new one; None where the file is deleted."""
    at = rng.randrange(len(content)) if content else 0
    match rng.choice(
        ["bit", "bit", "bits", "cut", "cut", "empty", "foreign", "deleted", "zeros", "line", "number", "tail"]
    ):
        case "bit" if content:
            flipped = bytearray(content)
            flipped[at] ^= 1 << (bit := rng.randrange(8))
            return f"bit {bit} of byte {at} flipped", bytes(flipped)
        case "bits" if content:
            flipped = bytearray(content)
            for place in (rng.randrange(len(content)) for _ in range(rng.randrange(2, 40))):
                flipped[place] = rng.randrange(256)
            return "random bytes", bytes(flipped)
        case "cut" if content:
            return f"cut to {at} of {len(content)} bytes", content[:at]
        case "zeros" if content:
            return f"zeros from {at}", content[:at] + b"\0" * min(4096, len(content) - at) + content[at + 4096 :]
        case "line" if content.count(b"\n") > 1:
            lines = content.splitlines(keepends=True)
            k = rng.randrange(len(lines))
            new = rng.choice([[], [lines[k]] * 2, [rng.choice(lines)], [rng.choice(FOREIGN)[:200] + b"\n"]])
            return f"line {k} replaced by {len(new)} of others", b"".join([*lines[:k], *new, *lines[k + 1 :]])
        case "number" if places := [i for i, byte in enumerate(content[:100_000]) if 48 <= byte < 58]:
            k = rng.choice(places)
            digit = rng.choice([b"9", b"0", b"-1", b"1e9", b"99999999999", b"null", b"x", b'"1"', b"1.5", b"1e999"])
            return f"a digit at {k} is {digit!r}", content[:k] + digit + content[k + 1 :]
        case "tail":
            return "goes on", content + rng.choice(FOREIGN)[:5000]
        case "deleted":
            return "deleted", None
        case "foreign":
            return "foreign", rng.choice(FOREIGN)
    return "empty", b""


def damage(path: Path, rng: random.Random, others: Sequence[Path] = ()) -> str:
    """Does something to a file, and says what; `others` are what may lie in its place."""
    if rng.random() < 0.2:
        return f"{path.name}: {_replaced(path, rng, [o for o in others if o.suffix == path.suffix and o != path])}"
    how, content = damaged(path.read_bytes(), rng)
    path.unlink()  # it may be a link to the undisturbed one
    if content is not None:
        path.write_bytes(content)
    return f"{path.name}: {how}"


def _replaced(path: Path, rng: random.Random, others: Sequence[Path]) -> str:
    content = rng.choice(others).read_bytes() if others else b"{}"
    path.unlink()
    match rng.choice(["folder", "dangling", "loop", "other", "other", "other"]):
        case "folder":
            path.mkdir()
            return "a folder"
        case "dangling":
            path.symlink_to("nowhere")
            return "a link to nowhere"
        case "loop":
            path.symlink_to(path.name)
            return "a link to itself"
    path.write_bytes(content)
    return "another file of its kind"


def edited(text: str, rng: random.Random) -> tuple[str, bytes]:
    """A YAML text with some of its values replaced, or damaged as any file."""
    if rng.random() < 0.4:
        how, content = damaged(text.encode(), rng)
        return how, content or b""
    words, done = text, []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [i for i, c in enumerate(words) if c == ":" and words[i + 1 : i + 2] == " "]
        i = rng.choice(places)
        end = min((k for k in (words.find(c, i + 2) for c in ",}\n]") if k > 0), default=len(words))
        new = rng.choice(ODD)
        done.append(f"{words[max(0, i - 12) : i].strip()!r} = {new[:60]!r}")
        words = f"{words[: i + 2]}{new}{words[end:]}"
    return "; ".join(done), words.encode(errors="surrogatepass")


# ---- What is tried ---------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    status: int
    output: str = ""
    numbers: Any = None  # what must not change without a word; None where nothing is compared
    names: list[str] = field(
        default_factory=list
    )  # of the damaged file, one of which stands in `said` where they differ


@dataclass(frozen=True)
class Prepared:
    """What tries begin with, made once: a finished sweep, and checkpoints and data of each kind."""

    storage: Path
    folder: Path  # with checkpoints/ and data/
    numbers: dict[str, Any]


def called(main: Callable[[Sequence[str]], int], *words: object) -> tuple[int, str, str]:
    """Status, output, and all that was said besides, of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), listened(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit:  # argparse's
            status = exit.code if isinstance(exit.code, int) else 2
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def listened(into: io.StringIO) -> Iterator[None]:
    handler = logging.StreamHandler(into)
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def experiment_file(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    how, content = edited(TINY, rng)
    (file := here / "tiny.yaml").write_bytes(content)
    words = [file, "--dry-run", "--storage", prepared.storage, *["--smoke"][: rng.randrange(2)]]
    return f"experiment: {how}", lambda: _command("orchestrator.sweep", *words)


def override(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    from orchestrator.experiment.check import TRIAL_SETTINGS
    from orchestrator.experiment.load import SETTINGS

    (file := here / "tiny.yaml").write_text(TINY)
    paths = [*SETTINGS, *(f"search.space.{p}{kind}" for p in TRIAL_SETTINGS for kind in ("", ".grid", ".int_uniform"))]
    words = [f"{rng.choice(paths)}={rng.choice(ODD)}" for _ in range(rng.choice([1, 1, 2, 4]))]
    words = [word.replace("\0", "") for word in words] if rng.random() < 0.9 else words
    command = [file, "--dry-run", "--storage", prepared.storage, *words]
    return f"overrides: {[word[:90] for word in words]}", lambda: _command("orchestrator.sweep", *command)


def nightly_file(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    how, content = edited(NIGHTLY, rng)
    (file := here / "nightly.yaml").write_bytes(content)
    words = rng.choice([["--install-cron"], ["--date", rng.choice(ODD)], ["--date", "9999-12-31"]])
    words += [f"{rng.choice(['seed', 'models', 'evaluation.fid.samples', 'schedule.zone'])}={rng.choice(ODD)}"]
    return f"nightly: {how} {words}"[:300], lambda: _command(
        "orchestrator.nightly", file, "--storage", here / "n", *words
    )


def prices_and_cluster(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    texts = {name: (ROOT / name).read_text() for name in ("cluster.yaml", "prices.yaml")}
    name = rng.choice(list(texts))
    how, content = edited(texts[name], rng)
    (here / "tiny.yaml").write_text(TINY)
    for other, text in texts.items():
        (here / other).write_bytes(content if other == name else text.encode())
    words = [here / "tiny.yaml", "--dry-run", "--storage", prepared.storage, "--cluster", here / "cluster.yaml"]
    return f"{name}: {how}", lambda: _command("orchestrator.sweep", *words)


def arguments(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    """Names and numbers on the command line."""
    (here / "tiny.yaml").write_text(TINY)
    odd = rng.choice(ODD).replace("\n", "") if rng.random() < 0.8 else rng.choice(ODD)
    command, words = rng.choice(
        [
            ("status", [odd]), ("status", ["--storage", odd]), ("report", [odd]), ("report", ["tiny", "--storage",
            odd]),
            ("compare", [odd, "tiny"]), ("compare", ["--profile", odd, "a", "b"]), ("evaluate", [odd]), ("sample",
            [odd]),
            ("sample", ["tiny", "--n", odd]), ("sweep", [odd, "--dry-run"]), ("sweep", ["FILE", "--dry-run", odd]),
            ("sweep", ["FILE", "--dry-run", "--cluster", odd]), ("sweep", ["FILE", "--dry-run", "--prices", odd]),
            ("sweep", ["FILE", "--submit", "--address", odd]), ("nightly", [odd]), ("canary", [odd]),
            ("sweep", ["FILE", "--dry-run", "--storage", odd]),
        ]
    )  # fmt: skip
    words = [str(here / "tiny.yaml") if word == "FILE" else word for word in words]
    if "--storage" not in words and command != "canary":
        words += ["--storage", str(prepared.storage)]
    return f"{command} {[word[:80] for word in words]}", lambda: _command(f"orchestrator.{command}", *words)


def checkpoint_folder(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    kind = rng.choice(sorted(path.name for path in (prepared.folder / "checkpoints").iterdir()))
    folder = here / "step-00000020"
    shutil.copytree(prepared.folder / "checkpoints" / kind, folder)
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix == ".json" and rng.random() < 0.7:
        how = _in_json(path, rng)
    elif path.suffix == ".safetensors" and rng.random() < 0.4:
        how = _in_header(path, rng)
    else:
        how = damage(path, rng, sorted(path for path in folder.rglob("*") if path.is_file()))

    def ran() -> Outcome:
        from workers.config import Mistake

        output = io.StringIO()
        with listened(output):
            try:
                numbers: dict[str, Any] | None = drawn(folder)
            except Mistake as mistake:
                return Outcome(2, str(mistake) + output.getvalue())
        if kind == "diffusers" or numbers["digest"] != prepared.numbers[kind]["digest"]:
            numbers = None  # what has another address may be another model
        return Outcome(0, output.getvalue() + "drawn", numbers, [path.name])

    return f"checkpoint {kind}: {path.relative_to(folder)}: {how}", ran


def _in_json(path: Path, rng: random.Random) -> str:
    """Other values somewhere in a JSON file; sums of a manifest are kept in order, so that the change is met."""
    content = json.loads(path.read_bytes())
    at, steps = content, []
    while isinstance(at, dict | list) and at:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        steps.append(key)
        if not isinstance(at[key], dict | list) or rng.random() < 0.3:
            break
        at = at[key]
    odd = [
        None,
        True,
        0,
        -1,
        1,
        3,
        65536,
        10**9,
        10**30,
        1e308,
        math_nan,
        "",
        "x",
        "../../x",
        "/etc/passwd",
        [],
        [1],
        {},
        {"a": 1},
    ]
    new = rng.choice(odd)
    if isinstance(at, dict) and rng.random() < 0.3:
        if rng.random() < 0.5:
            del at[steps[-1]]
            new = "(deleted)"
        else:
            at[
                str(
                    rng.choice(
                        [
                            "../../../x",
                            "/etc/passwd",
                            "averages/../x.safetensors",
                            "averages/x",
                            "",
                            "averages/.safetensors",
                        ]
                    )
                )
            ] = new
    elif at:
        at[steps[-1]] = new
    path.write_text(json.dumps(content))
    _resum(path)
    return f"{steps} = {new!r}"


math_nan = float("nan")


def _in_header(path: Path, rng: random.Random) -> str:
    """Other claims in the header of safetensors: shapes, types, places, sizes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    old, new = rng.choice(
        [
            ('"F32"', '"F64"'), ('"F32"', '"I32"'), ('"F32"', '"F8_E4M3"'), ('"F32"', '"BF16"'), ('"F32"', '"XX"'),
            ("[8,", "[99999999999,"),
            ("[8]", "[4,2]"), ("[8]", "[-8]"), ('"data_offsets":[0', '"data_offsets":[4'), ('"shape":[',
            '"shape":[1,'), ("conv_in", "conv_out"),
            ("weight", "wait"), ("{", "["),
        ]
    )  # fmt: skip
    changed = header.replace(old, new, rng.choice([1, -1]))
    claimed = rng.choice([len(changed), len(changed), len(changed), 2**62, 2**31, 0])
    values = content[8 + length :]
    if rng.random() < 0.2:
        values = rng.choice([b"\xff" * len(values), b"\x00\x00\xc0\x7f" * (len(values) // 4)])  # NaN
    path.write_bytes(claimed.to_bytes(8, "little") + changed.encode() + values)
    _resum(path)
    return f"header: {old} is {new}, {claimed} bytes long"


def _resum(path: Path) -> None:
    """Brings the manifest in order with a file that was changed: so its content is met, and not its sum."""
    from workers import seals

    for folder in path.parents:
        manifest = folder / "manifest.json"
        if manifest.exists():
            content = json.loads(manifest.read_bytes())
            if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
                return
            content.pop(seals.SEAL, None)
            if manifest != path:
                content["sha256"][path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.write_text(json.dumps(seals.seal_json(content, manifest.name)))
            return


def data_file(rng: random.Random, here: Path, prepared: Prepared) -> tuple[str, Callable[[], Outcome]]:
    kind = rng.choice(sorted(path.name for path in (prepared.folder / "data").iterdir()))
    source = here / "data"
    shutil.copytree(prepared.folder / "data" / kind, source)
    cache, decoded = here / "cache", rng.random() < 0.3
    shutil.copytree(prepared.folder / "caches" / kind, cache)
    paths = sorted(
        path for path in (cache if decoded else source).rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    path = rng.choice(paths)
    how = damage(path, rng, paths)

    def ran() -> Outcome:
        from workers.config import Mistake

        output = io.StringIO()
        with listened(output):
            try:
                numbers: dict[str, Any] | None = pictured(source, cache)
            except Mistake as mistake:
                return Outcome(2, str(mistake) + output.getvalue())
        if numbers["digest"] != prepared.numbers[f"data-{kind}"]["digest"]:
            numbers = None  # other data under another address
        return Outcome(0, output.getvalue() + "read", numbers, [path.name, path.parent.name])

    return f"data {kind}{' decoded' * decoded}: {path.relative_to(here)}: {how}", ran


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


def stored(
    rng: random.Random, here: Path, prepared: Prepared, linked: bool = True
) -> tuple[str, Callable[[], Outcome]]:
    """Anything under the storage root."""
    storage = here / "runs"
    shutil.copytree(prepared.storage, storage, copy_function=os.link if linked else shutil.copy2)
    paths = sorted(path for path in storage.rglob("*") if path.is_file() and path.suffix not in (".png", ".html"))
    groups = sorted({_group(path, storage) for path in paths})
    group = rng.choice(groups)  # so that one of many blocks is not taken before all else
    path = rng.choice([path for path in paths if _group(path, storage) == group])
    how = damage(path, rng, paths)
    name, read = rng.choice(sorted(READERS.items()))

    def ran() -> Outcome:
        outcome = read(storage)
        return Outcome(outcome.status, outcome.output, outcome.numbers, [path.name])

    return f"{name} after {path.relative_to(storage)}: {how}", ran


def _group(path: Path, storage: Path) -> str:
    """What kind of file it is: its name, or of blocks that of their folder."""
    parts = path.relative_to(storage).parts
    if parts[0] == "mlartifacts":
        return parts[0]
    block = path.suffix == ".parquet" and parts[0] != "sweeps"
    return f"{parts[0]}/{path.parent.name.partition('-')[0] if block else path.name}"


KINDS: tuple[Callable[[random.Random, Path, Prepared], tuple[str, Callable[[], Outcome]]], ...] = (
    experiment_file, override, nightly_file, prices_and_cluster, arguments, checkpoint_folder, data_file, stored,
    stored,
)  # fmt: skip


def _main(module: str) -> Callable[[Sequence[str]], int]:
    return getattr(__import__(module, fromlist=["main"]), "main")  # noqa: B009 a module by its name


def _command(module: str, *words: object) -> Outcome:
    code, out, err = called(_main(module), *words)
    return Outcome(code, out + err)


def drawn(folder: Path) -> dict[str, str]:
    """What comes of a checkpoint's folder."""
    from orchestrator import open_model

    opened = open_model(folder)
    images = opened.sample(1, seed=0, steps=min(2, opened.process.T))
    return {"digest": opened.checkpoint.digest, "images": hashlib.sha256(images.tobytes()).hexdigest()}


def pictured(source: Path, cache: Path) -> dict[str, Any]:
    """What comes of a folder of images, with this cache."""
    from workers.config import DataConfig
    from workers.data.dataset import prepare
    from workers.data.sources import describe

    config = DataConfig(source=str(source))
    described, opened = describe(config, cache), prepare(config, cache)
    parts = (opened.train, opened.held_out, opened.train_labels, opened.held_out_labels)
    content = hashlib.sha256(b"".join(b"" if part is None else part.tobytes() for part in parts)).hexdigest()
    return {"digest": described.digest, "shape": described.shape, "content": content}


# ---- Preparing -------------------------------------------------------------------------------------------------


def prepare_all(storage: Path, folder: Path) -> Prepared:
    """Checkpoints and data of each kind, and what the undisturbed ones give. `storage` holds the finished sweep."""
    import numpy as np
    from PIL import Image

    from workers.diffusion.process import Process
    from workers.evaluation.canaries import DENOISER, GAUSSIAN
    from workers.network.checkpoint import export, save
    from workers.network.manifest import find_newest, open_committed
    from workers.storage import Storage

    place, numbers = Storage(storage), dict[str, Any]()
    trial = sorted(path.name for path in (storage / "trials").iterdir())[0]
    found = find_newest(place, f"trials/{trial}/checkpoints")
    assert found
    shutil.copytree(storage / found.path, folder / "checkpoints/ours")
    export(found, folder / "checkpoints/diffusers")
    gaussian = Storage(folder / "gaussian")
    process = Process.of(GAUSSIAN.diffusion)
    made = save(gaussian, "a", Snapshot(step=20, unet_config=DENOISER, process=process, ema={}))
    assert open_committed(gaussian, made.path)
    shutil.copytree(folder / "gaussian" / made.path, folder / "checkpoints/gaussian")
    random_images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    for i, pixels in enumerate(random_images):
        image = folder / f"data/images/{'train' if i < 16 else 'test'}/{i % 2}/{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
    _write_parquet(folder / "data/parquet", random_images)
    _write_idx(folder / "data/idx", random_images[..., 0])
    for name in ("images", "parquet", "idx"):
        numbers[f"data-{name}"] = pictured(_moved(folder, name), folder / "caches" / name)
    for name in ("ours", "diffusers", "gaussian"):
        numbers[name] = drawn(folder / "checkpoints" / name)
    for name, read in READERS.items():
        with tempfile.TemporaryDirectory() as here:
            shutil.copytree(storage, Path(here, "runs"))
            numbers[name] = read(Path(here, "runs")).numbers
    return Prepared(storage, folder, numbers)


def _moved(folder: Path, name: str) -> Path:
    return folder / "data" / name


def _write_parquet(folder: Path, images: Any) -> None:
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for split, part in (("train", images[:16]), ("test", images[16:])):
        rows = []
        for pixels in part:
            Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {"img": pa.array(rows, kind), "label": pa.array([i % 2 for i in range(len(part))], pa.int64())}
        )
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def _write_idx(folder: Path, images: Any) -> None:
    import struct

    folder.mkdir(parents=True)
    for split, part in (("train", images[:16]), ("t10k", images[16:])):
        head = struct.pack(">4B3I", 0, 0, 8, 3, *part.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        labels = bytes(i % 2 for i in range(len(part)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(part)) + labels)


# ---- Trying ----------------------------------------------------------------------------------------------------


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
                if str(ROOT) in f.filename and "fuzzing" not in f.filename
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
