"""The Fréchet distance against closed forms and SciPy, moments in pieces, and the distance at infinite n."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from workers.evaluation.frechet import (
    Moments,
    compute_distance,
    estimate_sampling_error,
    extrapolate_distance,
    merge_moments,
)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(101, np.asarray(mean, float), np.asarray(covariance, float) * 100)


def random_covariance(d: int, seed: int, rank: int | None = None) -> np.ndarray:
    a = np.random.RandomState(seed).randn(d, rank or 2 * d)
    return a @ a.T / a.shape[1]


def test_of_a_set_and_itself_it_is_zero():
    m = gaussian(np.arange(5), random_covariance(5, 0))
    assert compute_distance(m, m) == pytest.approx(0, abs=1e-12)


def test_equal_covariances_leave_the_distance_of_the_means():
    covariance = random_covariance(8, 0)
    mean = np.random.RandomState(1).randn(8)
    distance = compute_distance(gaussian(mean, covariance), gaussian(np.zeros(8), covariance))
    assert distance == pytest.approx(np.square(mean).sum(), rel=1e-12)


def test_diagonal_covariances_have_a_closed_form():
    """|mu_1 - mu_2|^2 + sum (s_1 - s_2)^2 of the standard deviations."""
    s1, s2, mean = np.array([1.0, 0.2, 0]), np.array([0.5, 3, 0.7]), np.array([1.0, -2, 0.5])
    distance = compute_distance(gaussian(mean, np.diag(s1**2)), gaussian(np.zeros(3), np.diag(s2**2)))
    assert distance == pytest.approx(np.square(mean).sum() + np.square(s1 - s2).sum(), rel=1e-9)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_it_is_scipy_s_matrix_root(d):
    """tr (S_1 S_2)^{1/2}, a root of a product that is not symmetric; and the distance is symmetric."""
    s1, s2 = random_covariance(d, 1), random_covariance(d, 2)
    a, b = gaussian(np.ones(d), s1), gaussian(np.zeros(d), s2)
    expected = d + np.trace(s1 + s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    assert compute_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert compute_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions():
    """Singular covariances: finite, zero to itself, and exact where the two live on axes of their own."""
    features = np.random.RandomState(0).randn(5, 30)
    m = Moments.of(features)
    assert np.linalg.matrix_rank(m.covariance) == 4
    assert compute_distance(m, m) == pytest.approx(0, abs=1e-5)
    first, second = np.diag([4.0, 0, 0]), np.diag([0, 9.0, 0])
    assert compute_distance(gaussian(np.zeros(3), first), gaussian(np.zeros(3), second)) == pytest.approx(13)


@pytest.mark.parametrize("cuts", [[], [1], [50], [3, 4, 90], list(range(1, 100))])
def test_moments_merge_to_those_of_the_whole(cuts):
    features = np.random.RandomState(0).randn(100, 6) * [1, 10, 0.1, 1, 1, 1] + 1000
    whole, pieces = Moments.of(features), merge_moments(np.split(features, cuts))
    assert pieces.n == 100
    np.testing.assert_allclose(pieces.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pieces.covariance, np.cov(features.T), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T), rtol=1e-8, atol=1e-10)


def test_torch_fidelity_agrees():
    """Version 0.4.0, on features made here."""
    random = np.random.RandomState(0)
    a, b = random.randn(300, 20), random.randn(250, 20) * 1.1 + 0.2
    assert compute_distance(Moments.of(a), Moments.of(b)) == pytest.approx(2.074685344083683, rel=1e-10)


@pytest.mark.parametrize(("n", "singular"), [(29, True), (30, True), (31, False)])
def test_n_features_span_n_minus_one_dimensions(n, singular):
    m = Moments.of(np.random.RandomState(0).randn(n, 30))
    assert m.singular is singular
    assert (np.linalg.matrix_rank(m.covariance) < 30) == singular


# ---- The distance and n ----------------------------------------------------------------------------------------

# N(mean, diag(scale^2)) against N(0, I): |mean|^2 + sum (scale - 1)^2.
SCALE, MEAN = np.linspace(0.3, 1.5, 16), np.eye(16)[0]
STANDARD = gaussian(np.zeros(16), np.eye(16))
EXACT = 1 + np.square(SCALE - 1).sum()


def draw(n: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randn(n, 16) * SCALE + MEAN


@pytest.fixture(scope="module")
def draws() -> list[np.ndarray]:
    return [draw(192, seed) for seed in range(100)]


def test_extrapolation_takes_the_bias_of_small_n_away(draws):
    plain = np.array([compute_distance(STANDARD, Moments.of(features)) for features in draws]) - EXACT
    extrapolated = np.array([extrapolate_distance(features, STANDARD).distance for features in draws]) - EXACT
    assert plain.mean() > 0.3
    assert abs(extrapolated.mean()) < 0.06
    assert np.square(extrapolated).mean() < np.square(plain).mean() / 4


def test_standard_errors_are_the_spread_over_draws(draws):
    plain = np.std([compute_distance(STANDARD, Moments.of(features)) for features in draws])
    stated = np.mean([estimate_sampling_error(features, STANDARD) for features in draws])
    assert stated == pytest.approx(plain, rel=0.25)
    found = [extrapolate_distance(features, STANDARD) for features in draws]
    spread = np.std([each.distance for each in found])
    assert np.mean([each.standard_error for each in found]) == pytest.approx(spread, rel=0.25)


def test_the_extrapolation_is_the_line_through_its_points():
    found = extrapolate_distance(draw(400, 0), STANDARD)
    assert found.sizes == (400, 200, pytest.approx(400 / 3), 100, 80)
    assert found.distances[0] == pytest.approx(compute_distance(Moments.of(draw(400, 0)), STANDARD), rel=1e-9)
    slope, intercept = np.polyfit(1 / np.array(found.sizes), found.distances, 1)
    assert (found.distance, found.slope) == pytest.approx((intercept, slope))
    assert found == extrapolate_distance(draw(400, 0), STANDARD)
    assert found.slope > 0 and 0 < found.distance < found.distances[0]


def test_a_small_n_has_fewer_points_or_none():
    """No size is below 1.5 d: 16 dimensions take 72 features for the three points of a line with a residual."""
    assert len(extrapolate_distance(draw(72, 0), STANDARD).sizes) == 3
    with pytest.raises(ValueError, match="takes 72 features or more, but there are 71"):
        extrapolate_distance(draw(71, 0), STANDARD)
    with pytest.raises(ValueError, match="more features than 16"):
        estimate_sampling_error(draw(16, 0), STANDARD)


def test_a_feature_that_never_fires_has_no_part_in_the_error():
    """As classifiers have them: without variance here or in the reference, the others' error stays."""
    features = draw(192, 0)
    dead = np.concatenate([features, np.zeros((192, 1))], axis=1)
    reference = gaussian(np.zeros(17), np.diag([1.0] * 16 + [0.0]))
    assert estimate_sampling_error(dead, reference) == pytest.approx(
        estimate_sampling_error(features, STANDARD), rel=1e-9
    )
