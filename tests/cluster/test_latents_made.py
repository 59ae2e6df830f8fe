"""Latent diffusion by a sweep: an autoencoder that is made first, and a checkpoint of it that is damaged."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import run, statuses, sweep

from workers.network import manifest

pytestmark = pytest.mark.faults

FILE = """
name: latents
data: {source: digits, encoder: {source: vae}}
model: {channels: 8, multipliers: [1, 2], blocks: 1, attention: [2], dropout: 0.0}
diffusion: {T: 25, schedule: {kind: linear, scale: per_1000}}
training: {steps: 20, batch_size: 32, precision: float32, validate_every: 20, checkpoint_every: 20}
evaluation: {nll: {images: 30, timesteps: 5}, fid: {samples: 100, sampler: {kind: ddim, steps: 3}}}
needs:
  vae:
    model: {kind: autoencoder, channels: 8, multipliers: [1, 2], blocks: 1, latent_channels: 2}
    loss: {objective: elbo}
    training.steps: 30
search: {space: {training.lr: {grid: [1.0e-3]}}}
"""


def test_a_damaged_autoencoder_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    (file := tmp_path / "latents.yaml").write_text(FILE)
    storage = tmp_path / "runs"
    first = sweep(file, "--storage", storage)
    assert first.returncode == 0, first.stdout + first.stderr
    [vae] = [t for t in statuses(storage) if list((storage / f"trials/{t}/checkpoints").glob("*/vae/config.json"))]
    [latent] = statuses(storage).keys() - {vae}
    frame = pd.read_parquet(storage / "sweeps/latents/results.parquet")
    assert list(frame["trial"]) == [latent] and frame["eval/nll_bpd"].notna().all()
    assert 'aria-label="graph"' in (storage / "sweeps/latents/report.html").read_text()
    weights = storage / f"trials/{vae}/checkpoints/{manifest.name_step(30)}/vae/diffusion_pytorch_model.safetensors"
    content, before = (
        weights.read_bytes(),
        {p: p.stat().st_mtime_ns for p in storage.glob("trials/*/checkpoints/*/*/*")},
    )
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = sweep(file, "--storage", storage)  # nothing has to start from it
    assert again.returncode == 0 and "made again" not in again.stdout
    more = sweep(file, "--storage", storage, "search.space.training.lr.grid=[1.0e-3, 2.0e-3]")
    assert more.returncode == 0, more.stdout + more.stderr
    assert f"{vae[:8]}  " in more.stdout and "Others start from it: it is removed, and made again" in more.stdout
    assert weights.read_bytes() == content
    after = {p: p.stat().st_mtime_ns for p in before}
    assert all(after[p] == before[p] for p in before if vae not in str(p)), "nothing of the first is made again"
    shown = run("orchestrator.status", "latents", "--storage", storage).stdout
    assert shown.count(vae[:8]) >= 2
    exported = run("orchestrator.sample", latent, "--storage", storage, "--n", "4")
    assert exported.returncode == 0 and "interpolation" not in exported.stdout, exported.stderr
