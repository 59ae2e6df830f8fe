"""Data that are not discrete: how they are read, and the densities that stand in the place of probabilities."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gaussian_pixels
import numpy as np
import pyarrow as pa
import pytest
import small_evaluation as small
import torch
from experiment_files import content
from gaussian_pixels import network, short, with_head
from image_files import fails, warnings_of
from PIL import Image
from small_process import measure_all_times

from orchestrator.compare import compare_summaries
from orchestrator.experiment.load import parse
from orchestrator.experiment.preflight import check_trial
from orchestrator.nights.decisions import ModelNumbers, compare
from orchestrator.nights.suite import Rule
from workers.config import DataConfig, ODENLLConfig
from workers.data.dataset import Dataset, prepare
from workers.data.pixels import draw_grid, to_data, to_model, to_picture
from workers.data.ranges import compute_unit_bits, list_ranges, scale_from_unit, show_span
from workers.data.sources import describe, describe_source
from workers.diffusion.bound import decoder_term, model_terms
from workers.diffusion.flow import integrate_log_density
from workers.diffusion.ledger import Ledger, compute_bound
from workers.diffusion.likelihood import compute_squared_norms
from workers.diffusion.predictions import from_eps
from workers.diffusion.process import FIXED, Process
from workers.evaluation.blocks import list_ode_nll_blocks
from workers.evaluation.features import Classifier
from workers.evaluation.inception import to_bytes
from workers.evaluation.make import make, read_block
from workers.evaluation.summary import summarise
from workers.journal import read_points
from workers.kinds import VARIANCES, VarianceEntry
from workers.noise import make_generator
from workers.storage import Storage
from workers.training import train

F64 = torch.float64
REAL = np.random.RandomState(3).randn(40, 6, 4, 2)
one_thread = gaussian_pixels.one_thread


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def save(path: Path, images: np.ndarray) -> DataConfig:
    np.save(path, images)
    return DataConfig(source=str(path))


# ---- Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_the_values_to_train_on_become_the_model_s_range(tmp_path: Path, dtype: str) -> None:
    values = (100 + 7 * REAL).astype(dtype)
    data = prepare(save(tmp_path / "a.npy", values))
    assert data.levels is None and data.train.dtype == data.held_out.dtype == np.float32
    assert (data.train.min(), data.train.max(), data.shape) == (-1, 1, (6, 4, 2))
    assert data.span
    found = scale_from_unit(np.concatenate([data.held_out, data.train]), data.span)
    assert np.allclose(np.sort(found.ravel()), np.sort(values.ravel().astype(np.float64)), rtol=1e-6)
    source = describe(DataConfig(source=str(tmp_path / "a.npy")))
    assert source.span and f"in real numbers, {show_span(source.span, 6)} to train on" in describe_source(source)


def test_each_channel_can_have_a_range_of_its_own(tmp_path: Path) -> None:
    """Two channels of other units are alike then, and the bits of a density add up to their own."""
    values = np.concatenate([REAL[..., :1], 1000 + 50 * REAL[..., 1:2]], axis=3)
    save(tmp_path / "a.npy", values)
    config = DataConfig(source=str(tmp_path / "a.npy"), ranges="channel")
    data, source = prepare(config), describe(config)
    assert data.train.min(axis=(0, 1, 2)).tolist() == [-1, -1] and data.train.max(axis=(0, 1, 2)).tolist() == [1, 1]
    assert data.span and prepare(config).span == data.span == source.span, "from the cache"
    found = scale_from_unit(np.concatenate([data.held_out, data.train]), data.span)
    for channel in range(2):
        expected = np.sort(values[..., channel].ravel())
        assert np.allclose(np.sort(found[..., channel].ravel()), expected, rtol=1e-5, atol=1e-5)
    (low, high), (least, most) = list_ranges(data.span)
    assert compute_unit_bits(data.span) == pytest.approx((math.log2(high - low) + math.log2(most - least)) / 2 - 1)
    assert f"in real numbers, {low:.6g} to {high:.6g}, {least:.6g} to {most:.6g} to train on" in describe_source(source)
    assert source.digest != describe(DataConfig(source=str(tmp_path / "a.npy"))).digest
    save(tmp_path / "same.npy", np.concatenate([REAL[..., :1], REAL[..., 1:2] * 0 + 3], axis=3))
    fails(tmp_path / "same.npy", "the values to train on in channel 1 are all 3", ranges="channel")
    save(tmp_path / "bytes.npy", (REAL * 10).clip(0, 255).astype(np.uint8))
    told = warnings_of(tmp_path / "bytes.npy", ranges="channel")
    assert "data.ranges is without effect: the values are discrete" in told


def test_held_out_values_beyond_the_range_are_kept_and_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=REAL[:30].clip(-1, 3), test_images=REAL[30:] * 0 + np.linspace(-2, 7, 2))
    data = prepare(DataConfig(source=str(tmp_path / "a.npz")))
    assert data.span == (-1, min(3, REAL[:30].max())) and data.held_out.max() > 1 and data.held_out.min() < -1
    assert "held-out values go from -2 to 7, beyond the -1 to" in warnings_of(tmp_path / "a.npz")
    assert "values are" not in warnings_of(tmp_path / "a.npz")


def test_tiff_in_floats_is_read_and_resized_within_its_range(tmp_path: Path) -> None:
    for row, image in enumerate(REAL[:12, :, :, 0]):
        Image.fromarray(image.astype(np.float32)).save(tmp_path / f"{row:03}.tif")
    data, small_ = prepare(DataConfig(source=str(tmp_path))), prepare(DataConfig(source=str(tmp_path), resolution=3))
    assert (data.levels, data.shape, small_.shape) == (None, (6, 4, 1), (3, 3, 1))
    assert data.span and list_ranges(data.span)[0][1] <= REAL[:12, ..., 0].max() * (1 + 1e-6)
    assert (small_.train.min(), small_.train.max()) == (-1, 1) and small_.digest != data.digest
    Image.fromarray((REAL[0, :, :, 0] * 10).astype(np.uint8)).save(tmp_path / "999.tif")
    fails(tmp_path, "000.tif has floats a channel and 999.tif has 8 bits a channel")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_none_is_refused_with_its_place(tmp_path: Path, bad: float) -> None:
    values = REAL.copy()
    values[17, 4, 1, 0] = bad
    save(tmp_path / "a.npy", values)
    fails(tmp_path / "a.npy", f"a.npy, row 17 has {bad} at row 4, column 1, channel 0; every value must be finite")


def test_values_that_say_nothing_are_refused_or_told(tmp_path: Path) -> None:
    save(tmp_path / "same.npy", REAL * 0 + 3)
    fails(tmp_path / "same.npy", "the values to train on are all 3")
    save(tmp_path / "wide.npy", np.sign(REAL) * 1.7e308)
    fails(tmp_path / "wide.npy", "too far apart")
    save(tmp_path / "bytes.npy", np.rint(REAL * 10) / 10)
    assert "different ones, so that they are discrete" in warnings_of(tmp_path / "bytes.npy")


def test_pictures_samples_and_inception_see_them_clipped() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    images = to_data(x, None)
    assert images.dtype == torch.float32 and images.flatten().tolist() == [-1, -1, 0, 1, 1]
    assert torch.equal(to_model(images, None), x.clamp(-1, 1))
    assert to_picture(to_model(x, None).permute(0, 2, 3, 1), None).flatten().tolist() == [0, 0, 127.5, 255, 255]
    assert draw_grid(images, None)[:4] == b"\x89PNG"
    shown = to_bytes(np.array([-2, -1, 0.2, 1, 3], np.float32).reshape(1, 1, 5, 1), None)
    assert shown[0, 0, :, 0].tolist() == [0, 0, 153, 255, 255]


# ---- The density -------------------------------------------------------------------------------------------------


def test_the_decoder_is_a_density_and_the_limit_of_levels() -> None:
    """Its integral is 1, and a bin of many levels has as much of it as the bin is wide."""
    mean, sigma = torch.tensor([[0.3]], dtype=F64), 0.05
    x = torch.linspace(-0.7, 1.3, 4001, dtype=F64)[:, None]
    assert float((-decoder_term(x, mean.expand_as(x), sigma, None)).exp().sum() * (2.0 / 4000)) == pytest.approx(1)
    levels = 2**16
    x_0 = 2 * torch.tensor([[30_000.0, 40_000.0, 45_000.0]], dtype=F64) / (levels - 1) - 1
    whole = decoder_term(x_0, mean.expand_as(x_0), sigma, levels)
    density = decoder_term(x_0, mean.expand_as(x_0), sigma, None)
    assert float(whole) == pytest.approx(float(density) - 3 * math.log(2 / (levels - 1)), rel=1e-6)


def compute_least_errors(p: Process, s: float) -> torch.Tensor:
    """Var[x_0 | x_t] of a pixel from N(0, s^2)."""
    return s**2 * (1 - p.alpha_bar) / (p.alpha_bar * s**2 + 1 - p.alpha_bar)


def compute_exact_terms(p: Process, s: float) -> torch.Tensor:
    """E L_0, ..., E L_T of a pixel from N(0, s^2) in nats, under its best denoiser: over the data and the noise."""
    least, sigma_squared = compute_least_errors(p, s), p.sigma_squared
    before = torch.cat([torch.ones(1, dtype=F64), p.alpha_bar[:-1]])
    true = (1 - before) / (1 - p.alpha_bar) * p.beta
    weight = before * p.beta**2 / (1 - p.alpha_bar) ** 2  # of x_0 in mu_tilde_t, squared: eq. (7)
    later = 0.5 * ((sigma_squared / true).log() + (true + weight * least) / sigma_squared - 1)
    first = 0.5 * (2 * math.pi * sigma_squared[0]).log() + least[0] / (2 * sigma_squared[0])
    last = 0.5 * (p.alpha_bar[-1] * (s**2 - 1) - torch.log1p(-p.alpha_bar[-1]))
    return torch.cat([first[None], later[1:], last[None]])


def measure(p: Process, s: float, n: int) -> tuple[Ledger, np.ndarray]:
    """The ledger, and the bound of each of n images of N(0, s^2) in bits/dim."""
    x_0 = s * torch.randn(n, 1, 8, 8, generator=make_generator("densities"))
    model = from_eps(p, network(p, s))
    ledger = measure_all_times(p, model, x_0, make_generator("noise"), levels=None, clip=False)
    return ledger, compute_bound(p, ledger, compute_squared_norms(x_0), 64).total


@pytest.mark.parametrize("variance", [*FIXED, "best"])
@pytest.mark.parametrize(("T", "s"), [(1, 0.3), (8, 0.02), (20, 0.3)])
def test_the_bound_of_gaussian_data_is_the_closed_form(
    monkeypatch: pytest.MonkeyPatch, T: int, s: float, variance: str
) -> None:
    """Within 4 standard errors of its mean over data and noise, at which it may be below 0.

    With sigma_t^2 = Var[x_{t-1} | x_t] every step is the true one, so that nothing is lost but in the prior: the bound
    is then the entropy of the data, 0.5 log(2 pi e s^2), and KL(q(x_T) || N(0, I)).
    """

    def best(p: Process) -> torch.Tensor:
        return p.beta_tilde + p.posterior_x_0.square() * compute_least_errors(p, s)

    monkeypatch.setitem(VARIANCES, "best", VarianceEntry(function=best, about="the true one"))
    p = short(T)
    p = replace(p, variance=variance)
    if variance == "best":  # at t = 1, too
        monkeypatch.setattr("workers.diffusion.process._for_decoder", lambda process, variance: variance)
        monkeypatch.setattr(Process, "decoder_sigma_squared", property(lambda q: q.sigma_squared[0]))
    _, bound = measure(p, s, 200)
    exact = float(compute_exact_terms(p, s).sum()) / math.log(2)
    assert abs(bound.mean() - exact) < 4 * bound.std(ddof=1) / 200**0.5
    assert bound.std(ddof=1) < 3
    if variance == "best":
        v = float(p.alpha_bar[-1] * s**2 + 1 - p.alpha_bar[-1])  # Var(x_T)
        ideal = 0.5 * math.log(2 * math.pi * math.e * s**2) + 0.5 * (v - 1 - math.log(v))
        assert exact == pytest.approx(ideal / math.log(2), abs=1e-9) and (s > 0.1 or exact < 0)


def test_a_learned_variance_has_a_density_too() -> None:
    """At t = 1 it is that of the normal law with the variance that the head says."""
    p = replace(short(8), variance="learned_range")
    x_0, t = 0.2 * torch.randn(5, 1, 8, 8, generator=make_generator("x")).double(), torch.ones(5, dtype=torch.int64)
    prediction = with_head(p, 0.4)(p.q_sample(x_0, t, torch.zeros_like(x_0)), t)
    sigma = p.sigma(prediction, t)
    law = torch.distributions.Normal(prediction.x_0, sigma)
    found = model_terms(p, prediction, x_0, t, None)
    torch.testing.assert_close(found, -law.log_prob(x_0).flatten(1).sum(1))


# ---- Measuring ---------------------------------------------------------------------------------------------------

VALUES = np.clip(np.random.RandomState(0).randn(50, 4, 4, 1) * 0.4, -1, 1).astype(np.float32)
DATASET = Dataset("d2", "real", None, (4, 4, 1), VALUES[10:], VALUES[:10], None, None, span=(-3.0, 5.0))


def evaluate(root: Path, monkeypatch: pytest.MonkeyPatch, **fid: Any) -> tuple[dict[str, Any], Any]:
    small.small_blocks(monkeypatch)
    monkeypatch.setattr(small, "DATASET", DATASET)
    monkeypatch.setattr(small, "IMAGES", small.IMAGES._replace(digest="d2", levels=None))
    space = replace(small.SPACE, levels=None)
    monkeypatch.setattr(small, "SPACE", space)
    bench = small.bench(root, small.measurement(**fid))
    bench.__dict__["space"] = space
    for block in small.blocks_of(bench):
        make(bench, block)
    digest = bench.checkpoint.digest
    return summarise(bench.storage, bench.m, DATASET, small.PROCESS, digest, space=space), bench


def test_what_is_measured_has_names_and_passports_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, bench = evaluate(tmp_path, monkeypatch, ode_nll=ODENLLConfig(images=4, probes=2))
    metrics, passports = summary["metrics"], summary["passports"]
    assert not [name for name in (*metrics, *summary) if "nll_bpd" in name or name.startswith("nll_per_image")]
    parts = [metrics[f"eval/density_{part}_bpd"] for part in ("prior", "diffusion", "decoder")]
    assert metrics["eval/density_bpd"] == pytest.approx(sum(parts))
    assert metrics["eval/density_optimal_variance_bpd"] <= metrics["eval/density_bpd"]
    assert len(summary["density_per_image"]) == 10 and len(summary["ode_density_per_image"]) == 4
    protocol = passports["nll"]["protocol"]
    assert protocol["decoder"].startswith("Gaussian density") and "levels" not in protocol
    assert "-3 to 5 is [-1, 1]" in protocol["values"] and "add 2 bits/dim" in protocol["units"]  # log2 of 8 / 2
    assert "not, as the data are not discrete" in passports["ode_nll"]["protocol"]["dequantised"]
    assert "not, as the data are not discrete; samples clip" in passports["samples"]["protocol"]["quantised"]

    [block] = list_ode_nll_blocks(bench.m, bench.checkpoint.digest, small.IMAGES)[:1]
    x = to_model(torch.from_numpy(VALUES[:4]), None).double()
    ode, noise = bench.m.evaluation.ode_nll, make_generator(bench.m.seed, "ode_nll", 0, "probes")
    assert ode
    probes = 2 * torch.randint(0, 2, (2, *x.shape), generator=noise) - 1
    expected = integrate_log_density(small.PROCESS, bench.model.predict, x, probes, ode.tolerance)
    np.testing.assert_allclose(read_block(bench.storage, block)["nats"].to_numpy(), -expected.log_p.numpy(), rtol=1e-9)


def test_samples_and_features_are_of_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bench = evaluate(tmp_path, monkeypatch)
    [samples, *_] = [b for b in small.blocks_of(bench) if b.kind == "samples"]
    images = [np.frombuffer(image, np.float32) for image in read_block(bench.storage, samples)["image"].to_pylist()]
    drawn = np.stack(images).reshape(-1, 4, 4, 1)
    assert np.abs(drawn).max() <= 1 and np.abs(drawn * 8 - np.rint(drawn * 8)).max() > 0.01, "in no levels"
    [features, *_] = [b for b in small.blocks_of(bench) if b.kind == "features"]
    found = pa.concat_arrays(read_block(bench.storage, features)["features"].chunks)
    expected = bench.space.compute_features(drawn)
    np.testing.assert_allclose(found.flatten().to_numpy().reshape(len(drawn), -1), expected)
    again = Classifier.from_bytes(bench.space.to_bytes())
    assert again.levels is None and again.digest == bench.space.digest


def test_a_density_stands_beside_no_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ours, _ = evaluate(tmp_path / "real", patch)
    small.small_blocks(monkeypatch)
    theirs = small.evaluated(tmp_path / "levels", small.measurement())
    lines, differing = compare_summaries(ours, theirs)
    assert any("decoder: Gaussian density" in line for line in differing)
    assert not [line for line in lines if "A - B" in line]
    lines, differing = compare_summaries(ours, ours)
    assert not differing and lines[0].startswith("density_bpd      A - B = +0.0000")

    def numbers(checkpoint: str, summary: dict[str, Any]) -> ModelNumbers:
        kept: dict[str, Any] = {key: summary[key] for key in ("hash", "metrics", "passports")}
        kept["density_per_image"] = tuple(summary["density_per_image"])
        return ModelNumbers(name="a", checkpoint=checkpoint, **kept)

    rules = [Rule(metric=f"eval/{name}_bpd", standard_errors=3) for name in ("nll", "density")]
    before: Any = {"a": (type("Night", (), {"day": "before"}), numbers("x", ours))}
    [found] = compare(rules, [numbers("y", ours)], before)
    assert (found.metric, found.difference) == ("eval/density_bpd", 0.0)


# ---- A trial -----------------------------------------------------------------------------------------------------


def find_findings(source: DataConfig, **sections: Any) -> str:
    experiment = parse(content(data=source.model_dump(mode="json"), **sections))
    return "\n".join(f.text for f in check_trial(experiment, experiment.trial, describe(source)) if f.refused)


def test_ranking_takes_the_likelihood_that_the_data_have(tmp_path: Path) -> None:
    real = save(tmp_path / "a.npy", np.random.RandomState(0).randn(40, 8, 8))
    text = find_findings(real, search={"also": ["valid/nll_bpd"]})
    assert "search.metric: eval/nll_bpd is of data in levels, and those of a are not discrete; take eval/" in text
    assert "search.also: valid/nll_bpd is of data in levels" in text and "take valid/density_bpd" in text
    assert "search." not in find_findings(real, search={"metric": "eval/density_bpd"})
    text = find_findings(DataConfig(source="digits"), search={"metric": "eval/ode_density_bpd"})
    assert "of data that are not discrete, and those of digits are in 17 levels; take eval/ode_nll_bpd" in text
    truncated = {"fid": {"samples": 100, "quantise": "truncate", "features": "inception"}}
    assert "evaluation.fid.quantise: truncate is of levels" in find_findings(real, evaluation=truncated)


def test_a_trial_is_trained_and_validated_by_its_density(tmp_path: Path) -> None:
    values = 3 + 0.5 * np.random.RandomState(0).randn(200, 8, 8, 1).clip(-3, 3)
    source = save(tmp_path / "a.npy", values).model_dump(mode="json")
    training = {"steps": 40, "batch_size": 16, "lr": 4e-3, "ema": 0.9, "validate_every": 20, "precision": "float32"}
    model = {"channels": 8, "multipliers": [1], "blocks": 1, "attention": []}
    diffusion = {"T": 30, "schedule": {"scale": "per_1000"}, "variance": "learned_range"}
    learned = {"diffusion": diffusion, "loss": {"objective": "hybrid"}, "search": {"metric": "eval/density_bpd"}}
    experiment = parse(content(data=source, model=model, training=training, **learned))
    storage, trial = Storage(tmp_path / "runs"), experiment.trial
    progress = list(train(trial, prepare(trial.data), storage, "trials/a"))
    names = {"valid/density_bpd", "valid/density_bpd_se"}
    assert [p.step for p in progress] == [0, 20, 40] and all(p.metrics.keys() == names for p in progress)
    assert progress[-1].metrics["valid/density_bpd"] < progress[0].metrics["valid/density_bpd"]
    status = storage.read_sealed("trials/a/status.json")
    assert status and status["valid_density_bpd"] == progress[-1].metrics["valid/density_bpd"]
    assert "valid_nll_bpd" not in status
    assert not [p for p in read_points(storage, "trials/a") if "valid/nll_bpd" in p.get("metrics", {})]
