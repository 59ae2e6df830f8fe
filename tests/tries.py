"""What fuzzing.py tries: each kind does something to a file or the words of a command, and says what."""

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_damage import checkpoint_folder
from damage import ODD, damage, edited
from outcome import TINY, Outcome, Prepared, _command, listened, pictured
from readers import READERS

ROOT = Path(__file__).parent.parent
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
