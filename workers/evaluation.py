"""Evaluation in blocks: fixed pieces with addresses, each run by anyone, anywhere, in any order, once.

    evaluations/<checkpoint>/<suite>/block-00007.parquet

A block's content is a function of (checkpoint, suite, number) alone: its shape is fixed and its noise is addressed,
so the number of tasks, their order and a retry change nothing. A suite is what is measured without how much of it:
asking for more images or samples computes the missing blocks. What is asked of a partly used block is cut afterwards.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from workers.config import Trial, digest
from workers.data import Dataset
from workers.diffusion.bound import diffusion_terms
from workers.diffusion.process import Process
from workers.diffusion.samplers import sample
from workers.frechet import Reference, frechet_distance, merged
from workers.likelihood import Ledger, all_times, bound, pair_errors, squared_norms, stratified_times
from workers.noise import generator
from workers.pixels import to_levels, to_model
from workers.storage import Storage

VERSION = 1  # of what blocks hold: raise it when the same checkpoint would give other numbers
IMAGES, TIMES = 25, 100  # an NLL block: so many images times so many timesteps
SAMPLES = 100  # a block of samples


@dataclass(frozen=True)
class Block:
    kind: str  # a name in KINDS
    suite: str
    number: int

    def path(self, checkpoint_digest: str) -> str:
        return f"evaluations/{checkpoint_digest}/{self.suite}/block-{self.number:05}.parquet"


def images_asked(trial: Trial, held_out: int) -> int:
    asked = trial.evaluation.nll.images if trial.evaluation.nll else 0
    return held_out if asked == "all" else min(asked, held_out)


def strata(trial: Trial) -> int | None:
    """Timesteps sampled an image, besides t = 1; None where every t is measured."""
    assert trial.evaluation.nll
    asked = trial.evaluation.nll.timesteps
    return None if asked == "all" or asked >= trial.diffusion.T else max(1, asked - 1)


def nll_blocks(trial: Trial, data_digest: str, held_out: int) -> list[Block]:
    """The blocks that hold the first `nll.images` of the held-out split; numbers grow by image, then by t."""
    if trial.evaluation.nll is None:
        return []
    suite = f"nll-{digest([VERSION, data_digest, trial.seed, strata(trial)])}"
    rows = math.ceil(images_asked(trial, held_out) / IMAGES)
    return [Block("nll", suite, k) for k in range(rows * _time_blocks(trial))]


def sample_blocks(trial: Trial, data_digest: str) -> list[Block]:
    fid = trial.evaluation.fid
    if fid is None:
        return []
    sampler = fid.sampler.model_dump(mode="json")
    suite = f"samples-{digest([VERSION, data_digest, trial.seed, sampler, fid.features])}"
    return [Block("samples", suite, k) for k in range(math.ceil(fid.samples / SAMPLES))]


def summary_path(trial: Trial, data_digest: str, checkpoint_digest: str) -> str:
    key = digest([VERSION, data_digest, trial.seed, trial.evaluation.model_dump(mode="json")])
    return f"evaluations/{checkpoint_digest}/summary-{key}.json"


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint on its device."""

    unet: nn.Module  # eps_theta(x_t, t - 1)
    process: Process
    device: torch.device

    def eps_theta(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.unet(x_t, t - 1))


def nll_block(trial: Trial, dataset: Dataset, model: Model, reference: Reference | None, number: int) -> pa.Table:
    """|x_0 - x_0_hat|^2 and decoder terms of IMAGES x TIMES pairs: a row a pair."""
    i, j = divmod(number, _time_blocks(trial))
    image = np.arange(i * IMAGES, min((i + 1) * IMAGES, len(dataset.held_out)))
    where = (trial.seed, "nll", i, j)
    m = strata(trial)
    if m is None:
        t, weight = (a[:, j * TIMES : (j + 1) * TIMES] for a in all_times(model.process.T, len(image)))
    else:
        t, weight = stratified_times(model.process.T, m, len(image), generator(*where, "t"))
    pairs = np.repeat(image, t.shape[1])
    x_0 = to_model(torch.from_numpy(dataset.held_out[pairs]), dataset.levels).to(model.device)
    noise = generator(*where, "eps", device=model.device)
    rows = pairs, t.reshape(-1), weight.reshape(-1)
    ledger = pair_errors(model.process, model.eps_theta, x_0, *rows, noise, dataset.levels)
    return pa.table(vars(ledger))


def sample_block(trial: Trial, dataset: Dataset, model: Model, reference: Reference | None, number: int) -> pa.Table:
    """SAMPLES samples, quantised to the data's levels, with their features: a row a sample."""
    fid = trial.evaluation.fid
    assert fid and reference
    height, width, channels = dataset.shape
    noise = generator(trial.seed, "samples", number, device=model.device)
    x = sample(model.process, model.eps_theta, fid.sampler, (SAMPLES, channels, height, width), noise)
    images = to_levels(x, dataset.levels).cpu().numpy()
    return pa.table(
        {
            "sample": np.arange(number * SAMPLES, (number + 1) * SAMPLES),
            "image": [row.tobytes() for row in images],
            "features": list(reference.features(images)),
        }
    )


KINDS: dict[str, Callable[[Trial, Dataset, Model, Reference | None, int], pa.Table]] = {
    "nll": nll_block,
    "samples": sample_block,
}


@torch.no_grad()
def run_block(
    storage: Storage,
    trial: Trial,
    dataset: Dataset,
    model: Model,
    reference: Reference | None,
    checkpoint_digest: str,
    block: Block,
) -> None:
    """Makes a block and writes it; does nothing where it is there."""
    path = block.path(checkpoint_digest)
    if storage.exists(path):
        return
    table = KINDS[block.kind](trial, dataset, model, reference, block.number)
    stream = io.BytesIO()
    pq.write_table(table, stream)
    storage.write(path, stream.getvalue())


def summarise(
    storage: Storage, trial: Trial, dataset: Dataset, process: Process, reference: Reference | None, checkpoint: str
) -> dict[str, Any]:
    """The metrics of a checkpoint from its blocks, all of which must be there.

    `metrics` maps MLflow's names to numbers; `nll_by_t` lists L_0, L_1, ..., L_T in bits/dim where every t was
    measured; `passport` says what the numbers are.
    """
    metrics: dict[str, float] = {}
    passport: dict[str, Any] = {
        "checkpoint": checkpoint, "ema": trial.training.ema, "data": dataset.digest, "seed": trial.seed,
    }  # fmt: skip
    by_t: list[float] | None = None
    nll = nll_blocks(trial, dataset.digest, len(dataset.held_out))
    if nll:
        n = images_asked(trial, len(dataset.held_out))
        ledger = Ledger.join([_ledger(storage.read(b.path(checkpoint))) for b in nll])
        ledger = Ledger(*(column[ledger.image < n] for column in vars(ledger).values()))
        x_0 = to_model(torch.from_numpy(np.array(dataset.held_out[:n])), dataset.levels)
        result = bound(process, ledger, squared_norms(x_0), x_0[0].numel())
        metrics["eval/nll_bpd"], metrics["eval/nll_bpd_se"] = result.mean, result.standard_error
        metrics["eval/nll_prior_bpd"] = float(result.prior.mean())
        metrics["eval/nll_diffusion_bpd"] = float(result.diffusion.mean())
        metrics["eval/nll_decoder_bpd"] = float(result.decoder.mean())
        passport["nll"] = {
            "split": "held_out", "images": n, "timesteps": (strata(trial) or process.T - 1) + 1, "T": process.T,
            "variance": process.variance, "x_0_clipped": True, "levels": dataset.levels, "dropped": 0,
        }  # fmt: skip
        if strata(trial) is None:
            by_t = [*_bits_by_t(process, ledger, x_0[0].numel()), float(result.prior.mean())]
    samples = sample_blocks(trial, dataset.digest)
    if samples:
        fid = trial.evaluation.fid
        assert fid and reference
        blocks = [_features(storage.read(b.path(checkpoint))) for b in samples]
        blocks[-1] = blocks[-1][: fid.samples - (len(blocks) - 1) * SAMPLES]
        metrics[f"eval/fd_{fid.features}"] = frechet_distance(merged(blocks), reference.moments)
        passport["fd"] = {
            "features": fid.features, "features_digest": reference.digest, "dimensions": len(reference.moments.mean),
            "reference": "train", "reference_images": reference.moments.n, "samples": fid.samples,
            "sampler": fid.sampler.model_dump(mode="json"), "quantised": True, "dropped": 0,
        }  # fmt: skip
    return {"metrics": metrics, "passport": passport, "nll_by_t": by_t}


def _bits_by_t(process: Process, ledger: Ledger, dimensions: int) -> list[float]:
    """L_0, L_1, ..., L_{T-1} in bits/dim, each the mean over the images."""
    later = ledger.t > 1
    nats = ledger.decoder_nats.copy()
    t, error = torch.from_numpy(ledger.t[later]), torch.from_numpy(ledger.squared_error[later])
    nats[later] = diffusion_terms(process, t, error, dimensions).numpy()
    images = np.count_nonzero(ledger.t == 1)
    totals = np.bincount(ledger.t - 1, weights=nats, minlength=process.T)
    return list((totals / (images * dimensions * math.log(2))).tolist())


def _time_blocks(trial: Trial) -> int:
    return 1 if strata(trial) is not None else math.ceil(trial.diffusion.T / TIMES)


def _ledger(content: bytes) -> Ledger:
    table = pq.read_table(io.BytesIO(content))
    return Ledger(*(table[name].to_numpy() for name in Ledger.__annotations__))


def _features(content: bytes) -> np.ndarray:
    return np.stack(pq.read_table(io.BytesIO(content), columns=["features"])["features"].to_numpy())
