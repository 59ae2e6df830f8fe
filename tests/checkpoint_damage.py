"""Checkpoints that fuzzing.py damages: any of their files, claims in JSON and in headers, sums."""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import damage
from outcome import Outcome, Prepared, drawn, listened


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
