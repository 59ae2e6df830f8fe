"""Latents to train on: the training images are encoded once a machine, by blocks, and kept beside the decoded images.

    latents/<digest>/   posteriors.npy, and meta.json, which is written last and holds its sha256

What is kept is q(z | x), its means and log variances, and not one draw of it: a step draws z anew from noise of its own
address, as the objective is an expectation over q, and a few images whose one draw is kept can be learned by heart. The
digest is of the decoded images and of the autoencoder's bytes. Neither blocks nor threads change more than rounding.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float32
from torch import Tensor

from workers import memos
from workers.config import Trial
from workers.data.cache import find_default_cache, lock_cache, reserve_file
from workers.data.dataset import Dataset
from workers.data.pixels import to_model
from workers.data.proofs import is_whole, note_whole
from workers.first_weights import load_first_weights
from workers.identity import compute_digest
from workers.network.autoencoder import FirstStage, Posterior
from workers.network.checkpoint import load_autoencoder
from workers.network.latent_space import LatentSpace
from workers.network.manifest import open_committed
from workers.shapes import NCHW
from workers.storage import Storage
from workers.warm_start import ENCODER

VERSION = 1  # of what is kept
AT_ONCE = 250  # images of a block
log = logging.getLogger(__name__)

Kept = Float32[np.ndarray, "n h w twice"]  # means, and after them log variances, mapped from disk


@dataclass(frozen=True)
class TrainingLatents:
    """The posteriors of the training images, in their order, and the space that they are in, which scales them to unit
    variance."""

    kept: Kept
    space: LatentSpace

    def draw(self, posteriors: Tensor, noise: NCHW) -> NCHW:
        """x_0 of some of what is kept."""
        mean, log_variance = posteriors.permute(0, 3, 1, 2).chunk(2, dim=1)
        return self.space.scale * Posterior(mean, log_variance).sample(noise)


def open_latents(
    trial: Trial, dataset: Dataset, storage: Storage, starts: Mapping[str, str], device: torch.device
) -> TrainingLatents | None:
    """The latents of a trial, by the checkpoint of the autoencoder in the folder that `starts` has for its slot; None
    where the trial diffuses pixels. Raises CheckpointError where bytes are damaged."""
    if (encoder := trial.data.encoder) is None:
        return None
    checkpoint = open_committed(storage, starts[ENCODER])
    stage, weights = load_autoencoder(checkpoint), load_first_weights(checkpoint, encoder.weights)
    stage.load_state_dict(weights)
    content = safetensors.torch.save({name: weights[name] for name in sorted(weights)})
    digest = compute_digest([stage.config, hashlib.sha256(content).hexdigest()])
    return prepare_latents(dataset, stage.to(device), digest)


def prepare_latents(dataset: Dataset, stage: FirstStage, digest: str, cache: Path | None = None) -> TrainingLatents:
    """Opens the latents of a data set by an autoencoder whose bytes have that digest; they are made first where they
    are not there, or not whole.

    Safe to call from any number of processes: one encodes, the others wait for it.
    """
    cache = cache or find_default_cache()
    folder = cache / "latents" / compute_digest([VERSION, dataset.digest, digest])
    if not is_whole(folder, tell=False):
        with lock_cache(folder.with_name(f"{folder.name}.lock")):
            if not is_whole(folder):
                _build(dataset, stage, folder)
    meta = memos.recall(folder / "meta.json")
    kept = np.load(folder / "posteriors.npy", mmap_mode="r")
    return TrainingLatents(kept, LatentSpace(stage, meta["scale"]))


def _build(dataset: Dataset, stage: FirstStage, folder: Path) -> None:
    """Encodes into a temporary folder, a block at a time, and renames it. Called under the lock of `folder`."""
    log.info("encoding %s into %s", dataset.name, folder)
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        scale = _encode_all(dataset, stage, temporary / "posteriors.npy")
        sums = {path.name: memos.hash_file(path) for path in temporary.iterdir()}
        states = {name: memos.read_state(temporary / name) for name in sums}
        memos.write(temporary / "meta.json", {"digest": folder.name, "scale": scale, "files": sums})
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note_whole(folder, states, sums)


def _encode_all(dataset: Dataset, stage: FirstStage, path: Path) -> float:
    """Writes the posteriors of all training images. Returns what makes z of unit variance: that of z is the variance
    of the means and the mean of the variances."""
    space = LatentSpace(stage, scale=1.0)
    n, (height, width, channels) = len(dataset.train), space.find_shape(dataset.shape)
    kept = reserve_file(path, (n, height, width, 2 * channels), np.float32)
    device, total, squares, spread = next(stage.parameters()).device, 0.0, 0.0, 0.0
    for first in range(0, n, AT_ONCE):
        images = torch.from_numpy(np.array(dataset.train[first : first + AT_ONCE])).to(device)
        posterior = space.find_posterior(to_model(images, dataset.levels))
        mean, log_variance = posterior.mean.double().cpu(), posterior.log_variance.double().cpu()
        kept[first : first + len(mean)] = torch.cat([mean, log_variance], 1).permute(0, 2, 3, 1).float().numpy()
        total, squares = total + float(mean.sum()), squares + float(mean.square().sum())
        spread += float(log_variance.exp().sum())
    kept.flush()
    count = n * height * width * channels
    return float(f"{1 / math.sqrt(squares / count - (total / count) ** 2 + spread / count):.6g}")
