"""The canaries: exact values derived again, a healthy build passes, and each fault is told by the right ones."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact import exact_bound, sample_variances

from workers.data.built_in import GAUSSIAN_SD
from workers.data.dataset import prepare
from workers.data.pixels import to_model
from workers.diffusion import ledger, likelihood, samplers
from workers.diffusion.bound import decoder_term, diffusion_terms
from workers.diffusion.gaussian import GaussianDenoiser
from workers.diffusion.likelihood import estimate
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Process, fixed_large
from workers.evaluation import features
from workers.evaluation.canaries import (
    CANARIES,
    DENOISER,
    GAUSSIAN,
    PAPER,
    SAMPLED_T,
    SAMPLERS,
    SAMPLES,
    judge,
    measure,
    measure_digits,
    measure_gaussian,
)
from workers.kinds import VARIANCES, VarianceEntry
from workers.noise import make_generator

CANARY = {c.name: c for c in CANARIES}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def healthy(cache) -> dict[str, float]:
    return measure(cache)


@pytest.fixture(scope="module")
def process() -> Process:
    return Process.of(GAUSSIAN.diffusion)


def failed(measured: dict[str, float]) -> set[str]:
    """The canaries that fail, of those that were measured."""
    return {v.canary.name for v in judge(measured) if v.measured is not None and not v.passed}


# ---- Expected values and tolerances ----------------------------------------------------------------------------


def test_the_bound_expected_is_the_exact_one(cache, process):
    exact = exact_bound(process, GAUSSIAN_SD, prepare(GAUSSIAN.data, cache).held_out, 256)
    canary = CANARY["gaussian/nll_bpd"]
    assert canary.expected == pytest.approx(float(exact.mean.sum(1).mean()), abs=1e-10)
    assert canary.tolerance == pytest.approx(4 * exact.standard_error(), rel=0.01)
    assert CANARY["gaussian/nll_bpd_sampled_t"].expected == canary.expected


def test_the_tolerance_with_sampled_timesteps_is_four_standard_errors(cache, process):
    """From 20 estimates with noise of their own, which tell a standard deviation to 1 / sqrt(38), a sixth."""
    denoiser = Denoiser(GaussianDenoiser(DENOISER, process), process, "eps")
    dataset = prepare(GAUSSIAN.data, cache)
    x_0 = to_model(torch.from_numpy(np.array(dataset.held_out)), 256)
    means = [estimate(process, denoiser, x_0, SAMPLED_T, 256, "spread", k).mean for k in range(20)]
    assert CANARY["gaussian/nll_bpd_sampled_t"].tolerance == pytest.approx(4 * np.std(means, ddof=1), rel=0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_variances_expected_are_the_exact_ones(name, process):
    exact = float(sample_variances(process, GAUSSIAN_SD, SAMPLERS[name])[-1])
    canary = CANARY[f"gaussian/{name}_variance"]
    assert canary.expected == pytest.approx(exact, abs=1e-11)
    assert canary.tolerance == pytest.approx(4 * exact * math.sqrt(2 / (SAMPLES * 64)), rel=0.02)


def test_the_end_of_the_schedule_is_a_product_of_fractions():
    start, end, T = Fraction(1, 10_000), Fraction(2, 100), PAPER.T
    product = math.prod((1 - start - (end - start) * Fraction(t, T - 1) for t in range(T)), start=Fraction(1))
    assert CANARY["schedule/log_alpha_bar_T"].expected == pytest.approx(math.log(float(product)), abs=1e-13)


# ---- Judgement -------------------------------------------------------------------------------------------------


def test_a_healthy_build_passes(healthy):
    """All but the one that the driver measures, which takes a Ray."""
    verdicts = judge(healthy)
    assert [v.canary for v in verdicts] == CANARIES
    [through_ray] = [v for v in verdicts if v.measured is None]
    assert through_ray.canary.name == "gaussian/nll_bpd_through_ray" and not through_ray.passed
    here = [v for v in verdicts if v is not through_ray]
    assert all(v.passed and "passed" in str(v) for v in here), "\n".join(map(str, here))


@pytest.mark.parametrize("canary", CANARIES, ids=lambda c: c.name)
def test_the_tolerance_is_the_border(canary):
    for value, passed in [
        (canary.expected, True),
        (canary.expected + 0.99 * canary.tolerance, True),
        (canary.expected - 0.99 * canary.tolerance, True),
        (canary.expected + 1.01 * canary.tolerance, False),
        (canary.expected - 1.01 * canary.tolerance, False),
        (math.nan, False),
        (math.inf, False),
    ]:
        [verdict] = [v for v in judge({canary.name: value}) if v.canary is canary]
        assert verdict.passed is passed
        assert passed or ("FAILED" in str(verdict) and canary.reason in str(verdict))


def test_what_was_not_measured_has_not_passed(healthy):
    name = CANARIES[0].name
    missing = judge({k: v for k, v in healthy.items() if k != name})[0]
    assert missing.canary.name == name and not missing.passed and "not measured" in str(missing)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no canary is called gaussian/nll;.*gaussian/nll_bpd"):
        judge({"gaussian/nll": 1.0})


def test_measured_again_it_is_the_same(cache, healthy):
    """Up to the order of sums, which PyTorch's number of threads may change."""
    assert measure_gaussian(cache) == pytest.approx({k: v for k, v in healthy.items() if k[:8] == "gaussian"}, rel=1e-7)


# ---- Faults ----------------------------------------------------------------------------------------------------

BOUND = {"gaussian/nll_bpd", "gaussian/nll_bpd_sampled_t", "gaussian/nll_bpd_recorded"}


def wide_bins(monkeypatch):
    """The decoder's bins are those of another number of levels."""
    monkeypatch.setattr(
        likelihood, "decoder_term", lambda x, mean, sigma, levels: decoder_term(x, mean, sigma, levels - 10)
    )


def no_spread(monkeypatch):
    """The KL forgets that the two variances differ."""

    def wrong(p, t, error, D):
        return diffusion_terms(p, t, error, D) - diffusion_terms(p, t, torch.zeros_like(error), D)

    monkeypatch.setattr(ledger, "diffusion_terms", wrong)


def unweighted_times(monkeypatch):
    """Sampled timesteps count as if each stood for itself."""
    right = likelihood.draw_stratified_times

    def wrong(*arguments):
        t, weight = right(*arguments)
        return t, np.ones_like(weight)

    monkeypatch.setattr(likelihood, "draw_stratified_times", wrong)


def variance_for_deviation(monkeypatch):
    """Ancestral sampling adds sigma_t^2 z."""
    right = samplers.ancestral

    def wrong(p, config, x_t, x_0_hat, t, *, generator):
        return right(replace(p, variance="squared"), config, x_t, x_0_hat, t, generator=generator)

    monkeypatch.setattr(samplers, "ancestral", wrong)
    monkeypatch.setitem(VARIANCES, "squared", VarianceEntry(function=lambda p: fixed_large(p) ** 2, about="wrong"))


def late_network(monkeypatch):
    """The network is asked about the next t."""
    right = GaussianDenoiser.forward
    monkeypatch.setattr(
        GaussianDenoiser, "forward", lambda self, x, t: right(self, x, (t + 1).clamp(max=self.process.T - 1))
    )


def other_noise(monkeypatch):
    """The generator's stream is another."""
    monkeypatch.setattr(
        likelihood, "make_generator", lambda *where, **device: make_generator("other", *where, **device)
    )


FAULTS = {
    wide_bins: BOUND,
    no_spread: BOUND,
    unweighted_times: {"gaussian/nll_bpd_sampled_t"},
    variance_for_deviation: {"gaussian/ancestral_variance"},
    late_network: {*BOUND, "gaussian/ancestral_variance", "gaussian/ddim_variance"},
    other_noise: {"gaussian/nll_bpd_recorded"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_its_canaries_and_no_other(fault, cache, monkeypatch):
    fault(monkeypatch)
    assert failed(measure_gaussian(cache)) == FAULTS[fault]


def test_another_initialisation_of_the_classifier_is_told(cache, monkeypatch):
    from sklearn.neural_network import MLPClassifier

    monkeypatch.setattr(
        "sklearn.neural_network.MLPClassifier", lambda *a, **k: MLPClassifier(*a, **k | {"random_state": 2})
    )
    assert "digits/fd_classifier_halves" in failed(measure_digits(cache))


def test_rounding_in_the_classifier_is_not_told(cache, monkeypatch):
    """Pixels off by 1e-12, as a library's other order of sums would have them."""
    flat = features._flatten
    monkeypatch.setattr(features, "_flatten", lambda images, levels: flat(images, levels) * (1 + 1e-12))
    assert failed(measure_digits(cache)) == set()
