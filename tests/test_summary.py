"""What blocks add up to: metrics by definition."""

from dataclasses import replace

import numpy as np
import pytest
import small_evaluation
import torch
from small_evaluation import (
    CONFIG,
    CPU,
    DATASET,
    IMAGES,
    LEVELS,
    PROCESS,
    SIDE,
    SPACE,
    D,
    T,
    bench,
    blocks_of,
    evaluated,
    make_all,
    measurement,
    small_blocks,
    summary_of,
)

from orchestrator.measuring.differences import compare_with_best, list_protocol_differences
from workers.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FIDConfig,
    Measurement,
    NLLConfig,
    ODENLLConfig,
    SamplerConfig,
)
from workers.data.pixels import to_model
from workers.diffusion.formulations import Continuous
from workers.diffusion.ledger import OPTIMAL, Ledger, compute_bound, list_shorter_chains
from workers.diffusion.likelihood import compute_squared_norms
from workers.diffusion.process import FIXED
from workers.evaluation import summary as summaries
from workers.evaluation.blocks import list_feature_blocks, list_nll_blocks, list_ode_nll_blocks
from workers.evaluation.fidelity import (
    compute_inception_score,
    compute_kid,
    compute_precision_recall,
    estimate_kid_error,
)
from workers.evaluation.frechet import Moments, compute_distance, estimate_sampling_error, extrapolate_distance
from workers.evaluation.make import Bench, read_block
from workers.evaluation.summary import summarise
from workers.network import checkpoint as checkpoints
from workers.network.unet import UNet
from workers.noise import make_generator
from workers.storage import Storage

few_rows_a_block = pytest.fixture(autouse=True)(small_blocks)
root = small_evaluation.root


def features_of(b: Bench) -> np.ndarray:
    """Of the samples asked for, float64 (n, D)."""
    tables = [read_block(b.storage, block) for block in list_feature_blocks(b.m, b.checkpoint.digest, IMAGES)]
    assert b.m.evaluation.fid
    return np.array([row for table in tables for row in table["features"].to_pylist()])[: b.m.evaluation.fid.samples]


# ---- Likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 7, "all"])
def test_the_bound_is_that_of_the_images_asked_for(root, images):
    """Of a block with more images than that, the rest is cut."""
    b = bench(root, measurement(images=images))
    summary = evaluated(root, b.m)
    n = 10 if images == "all" else images
    parts = [Ledger.from_table(read_block(b.storage, k)) for k in list_nll_blocks(b.m, b.checkpoint.digest, IMAGES)]
    ledger = Ledger.join(parts)
    assert ledger.image.max() == {1: 3, 7: 7, 10: 9}[n]
    norms = compute_squared_norms(to_model(torch.from_numpy(DATASET.held_out), LEVELS))
    result = compute_bound(PROCESS, ledger.take_first(n), norms[:n], SIDE * SIDE)
    metrics = summary["metrics"]
    assert (metrics["eval/nll_bpd"], metrics.get("eval/nll_bpd_se")) == (result.mean, result.standard_error)
    assert summary["nll_per_image"] == result.total.tolist() and len(summary["nll_per_image"]) == n
    assert summary["passports"]["nll"]["protocol"]["images"] == n


def test_the_parts_the_terms_by_t_and_the_images_all_give_the_bound(root):
    summary = evaluated(root, measurement())
    metrics, terms = summary["metrics"], summary["nll_by_t"]
    nll = pytest.approx(metrics["eval/nll_bpd"], rel=1e-12)
    parts = [metrics[f"eval/nll_{part}_bpd"] for part in ("prior", "diffusion", "decoder")]
    assert [sum(parts), sum(terms), np.mean(summary["nll_per_image"])] == [nll] * 3
    assert len(terms) == T + 1  # L_0, ..., L_T
    assert (terms[0], terms[-1]) == pytest.approx((parts[2], parts[0]), rel=1e-12)
    curve = summary["rate_distortion"]
    assert len(curve["rate_bpd"]) == len(curve["rmse_255"]) == T and curve["rate_bpd"][-1] + terms[0] == nll
    assert curve["rmse_255"][0] > curve["rmse_255"][-1] > 0


def test_the_ledger_has_every_variance_and_chain(root):
    summary = evaluated(root, measurement())
    ledger, metrics = summary["ledger"], summary["metrics"]
    assert set(ledger) == {*FIXED, OPTIMAL}
    for rows in ledger.values():
        assert [row["steps"] for row in rows] == list_shorter_chains(T)
    own = ledger[PROCESS.variance][0]
    assert own["bpd"] == pytest.approx(metrics["eval/nll_bpd"], rel=1e-12)
    assert own["bpd_se"] == pytest.approx(metrics["eval/nll_bpd_se"], rel=1e-9)
    for k, best in enumerate(ledger[OPTIMAL]):
        assert all(best["bpd"] <= ledger[variance][k]["bpd"] for variance in FIXED)
    assert metrics["eval/nll_optimal_variance_bpd"] == ledger[OPTIMAL][0]["bpd"]
    assert metrics["eval/nll_optimal_variance_bpd_se"] == ledger[OPTIMAL][0]["bpd_se"]


@pytest.mark.parametrize("head", [-1.0, 0.4])
def test_a_learned_variance_is_measured_by_its_own_terms(root, head):
    """A second head that always says -1 means the fixed small variance: the bound by the pairs' own terms is then the
    one by their squared errors. What follows for other variances takes no account of it."""
    process = replace(PROCESS, variance="learned_range")
    unet = UNet({**CONFIG, "out_channels": 2}, make_generator("unet"))
    torch.nn.init.normal_(unet.conv_out.weight[:1], std=0.1, generator=make_generator("conv_out", "a"))
    torch.nn.init.constant_(unet.conv_out.bias[1:], head)
    storage = Storage(root)
    m = measurement().model_copy(update={"evaluation": EvaluationConfig(fid=None)})
    saved = checkpoints.save(
        storage,
        "trials/learned/checkpoints",
        checkpoints.Snapshot(step=1, unet_config=unet.config, process=process, ema=unet.state_dict()),
    )
    b = Bench(storage, m, DATASET, saved, CPU)
    make_all(b, blocks_of(b))
    summary = summarise(storage, b.m, DATASET, process, saved.digest, space=None)
    bpd, ledger = summary["metrics"]["eval/nll_bpd"], summary["ledger"]
    assert [(row["steps"], row["bpd"]) for row in ledger["learned_range"]] == [(T, bpd)]
    assert sum(summary["nll_by_t"]) == pytest.approx(bpd)
    assert summary["passports"]["nll"]["subject"]["variance"] == "learned_range"
    assert (bpd == pytest.approx(ledger["fixed_small"][0]["bpd"], rel=1e-6)) == (head == -1)
    plain = evaluated(root, measurement())["ledger"]  # the same weights of the mean
    for variance in FIXED:
        assert ledger[variance][0]["bpd"] == pytest.approx(plain[variance][0]["bpd"], rel=1e-5)


def test_sampled_timesteps_give_an_estimate_and_nothing_that_takes_every_t(root):
    summary, exact = evaluated(root, measurement(timesteps=8)), evaluated(root, measurement())
    found, expected = summary["metrics"], exact["metrics"]
    assert found["eval/nll_prior_bpd"] == expected["eval/nll_prior_bpd"]
    assert found["eval/nll_decoder_bpd"] == pytest.approx(expected["eval/nll_decoder_bpd"], rel=0.2)
    error = np.hypot(found["eval/nll_bpd_se"], expected["eval/nll_bpd_se"])
    assert abs(found["eval/nll_bpd"] - expected["eval/nll_bpd"]) < 4 * error
    assert "eval/nll_optimal_variance_bpd" not in found
    assert not {"nll_by_t", "ledger", "rate_distortion"} & set(summary)
    assert summary["passports"]["nll"]["protocol"]["timesteps"] == "8, log_uniform"


# ---- Samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fid", "name", "real"),
    [
        ({}, "fd_classifier", DATASET.train),
        ({"samples": 13}, "fd_classifier", DATASET.train),
        ({"reference_images": 20}, "fd_classifier", DATASET.train[:20]),
        ({"reference": "held_out"}, "fd_classifier_held_out", DATASET.held_out),
        ({"reference": "held_out", "reference_images": 8}, "fd_classifier_held_out", DATASET.held_out[:8]),
    ],
)
def test_distances_are_of_the_samples_asked_for_to_the_images_named(root, fid, name, real):
    """Fréchet, KID, precision and recall, each by its own function of the features; a split does not change the name
    of another's metric."""
    b = bench(root, measurement(**fid))
    summary = evaluated(root, b.m)
    samples, reference = features_of(b), SPACE.compute_features(real)
    distance = compute_distance(Moments.of(samples), Moments.of(reference))
    neighbours = compute_precision_recall(samples, reference)
    suffix = name.removeprefix("fd")
    expected = {
        f"eval/{name}": distance,
        f"eval/{name}_se": estimate_sampling_error(samples, Moments.of(reference)),
        f"eval/kid{suffix}": compute_kid(samples, reference).mean,
        **({f"eval/kid{suffix}_se": error} if (error := estimate_kid_error(samples, reference)) else {}),
        f"eval/precision{suffix}": neighbours.precision,
        f"eval/recall{suffix}": neighbours.recall,
        "eval/network_evaluations": 3,
    }
    found = {key: value for key, value in summary["metrics"].items() if "nll" not in key}
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)
    protocol = summary["passports"]["samples"]["protocol"]
    assert (protocol["samples"], protocol["reference_images"]) == (len(samples), len(real))
    assert protocol["reference"] == f"d1 {b.m.evaluation.fid.reference}"


def test_only_what_was_asked_for_is_there(root):
    m = measurement(also=("kid",))
    assert {"eval/kid_classifier", "eval/fd_classifier"} < set(evaluated(root, m)["metrics"])
    assert "eval/precision_classifier" not in evaluated(root, m)["metrics"]
    for part in ("nll", "fid"):
        without = m.model_copy(update={"evaluation": m.evaluation.model_copy(update={part: None})})
        summary = evaluated(root, without)
        assert set(summary["passports"]) == ({"samples"} if part == "nll" else {"nll"})
        assert all(("nll" in name) == (part == "fid") for name in summary["metrics"])
    nothing = evaluated(root, m.model_copy(update={"evaluation": EvaluationConfig(nll=None, fid=None)}))
    assert nothing == {"metrics": {}, "passports": {}}  # and no hash: a measurement of nothing is none


def test_fewer_images_of_the_same_blocks_have_another_hash(root):
    """The blocks are the same files; the numbers that are made of them are not."""
    few = [evaluated(root, measurement(images=n)) for n in (10, 5, 10)]
    assert few[0]["metrics"]["eval/nll_bpd"] != few[1]["metrics"]["eval/nll_bpd"]
    assert few[0]["hash"] == few[2]["hash"] != few[1]["hash"]


@pytest.mark.parametrize(
    ("fid", "warned"),
    [
        ({"samples": D}, ["6 samples"]),
        ({"samples": D + 1}, []),
        ({"reference_images": D}, ["6 reference images"]),
        ({"samples": 4, "reference_images": 5}, ["4 samples", "5 reference images"]),
    ],
)
def test_a_singular_covariance_is_told_and_has_no_standard_error(root, fid, warned):
    summary = evaluated(root, measurement(**fid))
    warnings = summary["passports"]["samples"]["warnings"]
    assert [warning.split(" are not")[0] for warning in warnings] == warned
    assert all("6 dimensions of classifier" in warning and "singular" in warning for warning in warnings)
    assert ("eval/fd_classifier_se" in summary["metrics"]) == (not any("samples" in w for w in warned))
    assert np.isfinite(summary["metrics"]["eval/fd_classifier"])


def test_enough_samples_are_extrapolated(root):
    b = bench(root, measurement(samples=31))
    summary = evaluated(root, b.m)
    expected = extrapolate_distance(features_of(b), Moments.of(SPACE.compute_features(DATASET.train)))
    metrics, curve = summary["metrics"], summary["curve"]
    assert metrics["eval/fd_classifier_infinity"] == pytest.approx(expected.distance, rel=1e-8) == curve["distance"]
    assert metrics["eval/fd_classifier_infinity_se"] == pytest.approx(expected.standard_error, rel=1e-8)
    assert curve["sizes"] == expected.sizes and len(curve["distances"]) == 3
    few = evaluated(root, measurement(samples=26))  # 4.5 for each dimension is 27
    assert "curve" not in few and "eval/fd_classifier_infinity" not in few["metrics"]


class FakeInception:
    """A space with logits, which the network that FID is defined by would have."""

    digest = "fake"
    compute_features = staticmethod(SPACE.compute_features)

    @staticmethod
    def compute_logits(features: np.ndarray) -> np.ndarray:
        return features[:, :3] / 10


@pytest.mark.parametrize(
    ("fid", "distance", "suffix"),
    [({}, "fid", ""), ({"reference_images": 20}, "fd_inception", "_inception")],
)
def test_in_inception_s_space_against_all_of_train_names_are_plain(tmp_path, monkeypatch, fid, distance, suffix):
    """The Inception score's always is: it needs no reference."""
    monkeypatch.setattr(summaries, "Inception", FakeInception)
    b = bench(tmp_path, measurement(features="inception", also=("kid", "precision_recall", "inception_score"), **fid))
    vars(b)["space"] = FakeInception()
    make_all(b, blocks_of(b))
    metrics = summary_of(b)["metrics"]
    names = {f"eval/{distance}", f"eval/{distance}_se", f"eval/kid{suffix}"}
    names |= {f"eval/precision{suffix}", f"eval/recall{suffix}", "eval/inception_score", "eval/network_evaluations"}
    assert {name for name in metrics if "nll" not in name and name != f"eval/kid{suffix}_se"} == names
    expected = compute_inception_score(FakeInception.compute_logits(features_of(b)))
    assert metrics["eval/inception_score"] == expected.mean
    assert f"{expected.std:.4f}" in summary_of(b)["passports"]["samples"]["also"]["inception_score"]


# ---- Samplers, the ODE's likelihood, variances -----------------------------------------------------------------


def test_the_ode_s_likelihood_is_the_mean_of_its_blocks_over_the_images_asked_for(tmp_path):
    b = bench(tmp_path, measurement(ode_nll=ODENLLConfig(images=7, probes=2, tolerance=1e-2)))
    make_all(b, blocks_of(b))
    summary = summary_of(b)
    rows = [read_block(b.storage, block) for block in list_ode_nll_blocks(b.m, b.checkpoint.digest, IMAGES)]
    assert len(rows) == 2
    bits = np.concatenate([r["nats"].to_numpy() for r in rows])[:7] / (SIDE * SIDE * np.log(2))
    assert summary["metrics"]["eval/ode_nll_bpd"] == pytest.approx(bits.mean(), rel=1e-12)
    assert summary["metrics"]["eval/ode_nll_bpd_se"] == pytest.approx(bits.std(ddof=1) / 7**0.5, rel=1e-12)
    passport = summary["passports"]["ode_nll"]
    assert passport["protocol"]["images"] == 7 and "uniformly" in passport["protocol"]["dequantised"]
    assert "2 of +-1" in passport["protocol"]["trace"] and passport["subject"]["network_evaluations"] > 10
    more = evaluated(tmp_path, measurement(ode_nll=ODENLLConfig(images="all", probes=2, tolerance=1e-2)))
    assert more["ode_nll_per_image"][:7] == summary["ode_nll_per_image"]


def test_another_variance_is_measured_from_the_same_blocks_of_the_bound(tmp_path):
    """And other samples, where the sampler adds noise of that variance."""
    own, other = (measurement(variance=v, sampler=SamplerConfig(steps=4)) for v in (None, "fixed_small"))
    first, second = evaluated(tmp_path, own), evaluated(tmp_path, other)
    assert (PROCESS.variance, second["passports"]["nll"]["subject"]["variance"]) == ("fixed_large", "fixed_small")
    [expected] = [c for c in first["ledger"]["fixed_small"] if c["steps"] == T]
    assert second["metrics"]["eval/nll_bpd"] == pytest.approx(expected["bpd"], rel=1e-12)
    assert first["metrics"]["eval/nll_bpd"] != second["metrics"]["eval/nll_bpd"]
    assert first["metrics"]["eval/fd_classifier"] != second["metrics"]["eval/fd_classifier"]


# ---- Continuous time


def test_a_bound_in_continuous_time_has_its_own_name_and_protocol(tmp_path):
    """It does not depend on the blocks that it is made of, and stands beside no bound of a chain."""
    process = Continuous.of(DiffusionConfig(formulation="edm", sigma_max=20.0))
    ode, nll = ODENLLConfig(images=5, tolerance=1e-2), NLLConfig(images=7, timesteps=9)
    fid = FIDConfig(samples=15, sampler=SamplerConfig(kind="euler", steps=3))
    evaluation = EvaluationConfig(nll=nll, fid=fid, ode_nll=ode)
    m = Measurement(data=DataConfig(source="digits"), T=None, evaluation=evaluation)
    unet = UNet(CONFIG, make_generator("unet"))
    snapshot = checkpoints.Snapshot(step=1, unet_config=CONFIG, process=process, ema=unet.state_dict())
    b = bench(tmp_path, m)
    b = replace(b, checkpoint=checkpoints.save(b.storage, "trials/c/checkpoints", snapshot))
    make_all(b, reversed(blocks_of(b)))
    found = summarise(b.storage, m, DATASET, process, b.checkpoint.digest, space=b.space)
    metrics, passport = found["metrics"], found["passports"]["nll"]
    assert "eval/nll_bpd" not in metrics and "nll_by_t" not in found and len(found["nll_per_image"]) == 7
    assert metrics["eval/continuous_nll_bpd"] == pytest.approx(np.mean(found["nll_per_image"]))
    parts = [metrics[f"eval/continuous_nll_{part}_bpd"] for part in ("prior", "diffusion", "decoder")]
    assert sum(parts) == pytest.approx(metrics["eval/continuous_nll_bpd"]) and min(parts) > 0
    assert passport["protocol"]["time"] == "continuous, sigma from 0.0375 to 20"
    assert passport["protocol"]["timesteps"] == "9, log_uniform" and "T" not in passport["subject"]
    assert passport["subject"]["formulation"] == "edm" and passport["subject"]["sigma_max"] == 20
    samples = found["passports"]["samples"]
    assert samples["protocol"]["times"] == "real t, as trained" and samples["subject"]["network_evaluations"] == 3
    chain = evaluated(tmp_path, measurement(images=7, timesteps=9, ode_nll=ode))
    assert any("time" in text for text in list_protocol_differences(found, chain, "nll"))
    assert list_protocol_differences(found, chain, "ode_nll") == []
    assert compare_with_best({"a": found, "b": chain}, "eval/nll_bpd") == ("b", {})
