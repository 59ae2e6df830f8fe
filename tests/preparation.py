"""What fuzzing.py begins with, made once and read undisturbed."""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from outcome import Prepared, drawn, pictured
from readers import READERS

from workers.network.checkpoint import Snapshot


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
