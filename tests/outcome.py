"""What a try of fuzzing.py begins with, and how it ends: with which status, words and numbers."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def _main(module: str) -> Callable[[Sequence[str]], int]:
    return getattr(__import__(module, fromlist=["main"]), "main")  # noqa: B009 a module by its name


def _command(module: str, *words: object) -> Outcome:
    code, out, err = called(_main(module), *words)
    return Outcome(code, out + err)


def drawn(folder: Path) -> dict[str, str]:
    """What comes of a checkpoint's folder."""
    from orchestrator import open_model

    opened = open_model(folder)
    images = opened.sample(1, seed=0, steps=min(2, opened.process.T or 2))
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
