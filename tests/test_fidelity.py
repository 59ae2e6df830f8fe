"""KID, precision and recall, and the Inception score: laws, closed forms, and torch-fidelity's numbers."""

import numpy as np
import pytest

from workers.evaluation.fidelity import (
    KID,
    PrecisionRecall,
    compute_inception_score,
    compute_kid,
    compute_mmd2,
    compute_precision_recall,
    estimate_kid_error,
)


def normal(n: int, d: int, seed: int, mean: float = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(n, d) + mean


# The features and logits whose numbers torch-fidelity 0.4.0 gave, in this order from one generator.
_random = np.random.RandomState(0)
A, B = _random.randn(300, 20), _random.randn(250, 20) * 1.1 + 0.2
LOGITS = _random.randn(95, 12) * 2


def test_torch_fidelity_agrees():
    """Version 0.4.0, its default seed 2020; KID with 20 subsets of 100, the score with 10 splits and with 1."""
    distance = compute_kid(A, B, subsets=20, subset_size=100)
    assert (distance.mean, distance.subset_std) == pytest.approx((0.15653957311734706, 0.03302788851054129), rel=1e-10)
    found = compute_precision_recall(A, B)
    assert (found.precision, found.recall) == pytest.approx((0.89, 0.556), abs=1e-6)
    score = compute_inception_score(LOGITS)
    assert (score.mean, score.std) == pytest.approx((2.4578696306407073, 0.22654648165537725), rel=1e-10)
    assert compute_inception_score(LOGITS, splits=1).mean == pytest.approx(2.8387991918828472, rel=1e-10)


# ---- KID -------------------------------------------------------------------------------------------------------


def test_mmd_is_the_double_sum():
    a, b = normal(7, 3, 0), normal(9, 3, 1, mean=0.5)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 3 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_b = sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    between = sum(k(x, y) for x in a for y in b) / (7 * 9)
    assert compute_mmd2(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kid_of_equal_distributions_is_zero_on_average_and_negative_half_the_time():
    draws = np.array([compute_mmd2(normal(30, 4, 2 * seed), normal(30, 4, 2 * seed + 1)) for seed in range(300)])
    assert abs(draws.mean()) < 4 * draws.std() / np.sqrt(len(draws))
    assert (draws < 0).mean() > 0.3


def test_kid_has_the_expectation_of_its_kernel():
    """Between point masses at 0 and at 1 (d = 1) it is k(0,0) + k(1,1) - 2 k(0,1) = 1 + 8 - 2, at any n."""
    for n in (2, 5, 50):
        assert compute_mmd2(np.zeros((n, 1)), np.ones((n + 1, 1))) == pytest.approx(7)


def test_kid_does_not_grow_with_small_subsets():
    """Unbiased: the mean is that of large subsets, up to noise."""
    a, b = normal(400, 5, 0), normal(400, 5, 1, mean=0.4)
    small, whole = compute_kid(a, b, subsets=400, subset_size=20), compute_kid(a, b)
    assert whole.subsets == 1 and whole.subset_size == 400 and whole.subset_std == 0
    assert abs(small.mean - whole.mean) < 5 * small.subset_std / np.sqrt(400)


def test_kid_repeats_and_takes_float32():
    a, b = normal(60, 5, 0).astype(np.float32), normal(50, 5, 1).astype(np.float32)
    first = compute_kid(a, b, subsets=3)
    assert first == compute_kid(a, b, subsets=3) == compute_kid(a.astype(np.float64), b.astype(np.float64), subsets=3)
    assert isinstance(first, KID) and first.subset_size == 50
    assert first.mean != compute_kid(a, b, subsets=3, seed=1).mean
    with pytest.raises(ValueError, match="2 features or more"):
        compute_kid(a[:1], b)


# ---- Precision and recall --------------------------------------------------------------------------------------


def test_identical_sets_cover_each_other_and_disjoint_ones_do_not():
    a = normal(100, 8, 0)
    assert compute_precision_recall(a, a[::-1]) == PrecisionRecall(1.0, 1.0)
    assert compute_precision_recall(a, a + 1000) == PrecisionRecall(0.0, 0.0)


def test_samples_of_one_mode_are_precise_and_recall_half():
    data = np.concatenate([normal(100, 2, 0), normal(100, 2, 1, mean=100)])
    found = compute_precision_recall(data[:100], data)
    assert found.precision == 1.0 and found.recall == 0.5


def test_a_radius_reaches_the_kth_neighbour_and_its_rim_counts():
    """On a line at 0, 1, 3, 7 with k = 2 the radii are 3, 2, 3, 6, so the balls cover -3..13 with rims."""
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    points = np.array([[-3.0], [-3.1], [13.0], [13.1], [0.5]])
    assert compute_precision_recall(points, line, k=2).precision == pytest.approx(3 / 5)


@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_blocks_change_nothing(rows):
    """Bit for bit, ties and all: the points lie on a lattice, so that many distances are equal."""
    random = np.random.RandomState(0)
    a, b = random.randint(0, 4, (150, 3)) / 3, random.randint(0, 5, (130, 3)) / 3
    assert compute_precision_recall(a, b, rows=rows) == compute_precision_recall(a, b, rows=1000)
    order = random.permutation(150)
    assert compute_precision_recall(a[order], b, rows=rows) == compute_precision_recall(a, b, rows=1000)


def test_it_is_the_slow_definition():
    a, b = normal(40, 6, 0), normal(50, 6, 1, mean=0.5)

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - y, axis=1))[3] for y in manifold]
        hits = [any(np.linalg.norm(x - y) <= r for y, r in zip(manifold, radii, strict=True)) for x in points]
        return float(np.mean(hits))

    assert compute_precision_recall(a, b) == PrecisionRecall(covered(a, b), covered(b, a))


def test_too_few_for_k():
    with pytest.raises(ValueError, match="more than 3 features"):
        compute_precision_recall(normal(3, 2, 0), normal(10, 2, 0))


# ---- The Inception score ---------------------------------------------------------------------------------------


def test_sure_and_even_logits_score_the_number_of_classes():
    assert compute_inception_score(np.eye(10)[np.arange(1000) % 10] * 1000, splits=1).mean == pytest.approx(
        10, rel=1e-12
    )


def test_equal_logits_score_one():
    found = compute_inception_score(np.tile(np.random.RandomState(0).randn(7) * 50, (100, 1)))
    assert found.mean == pytest.approx(1, rel=1e-12) and found.std == pytest.approx(0, abs=1e-12)


def test_a_constant_added_to_an_image_s_logits_changes_nothing():
    shifted = LOGITS + np.random.RandomState(1).randn(95, 1) * 1000
    assert compute_inception_score(shifted).mean == pytest.approx(compute_inception_score(LOGITS).mean, rel=1e-9)


@pytest.mark.parametrize("splits", [0, 96])
def test_splits_need_images(splits):
    with pytest.raises(ValueError, match="1 to 95 splits"):
        compute_inception_score(LOGITS, splits=splits)


def test_the_error_of_kid_is_no_less_than_that_of_repeated_draws():
    """Parts are smaller than the whole, so their error is larger; of independent draws it must not fall below."""
    random = np.random.RandomState(3)
    draws = [(random.randn(400, 4), 0.2 + random.randn(400, 4)) for _ in range(60)]
    spread = np.std([compute_mmd2(a, b) for a, b in draws], ddof=1)
    errors = [error for a, b in draws if (error := estimate_kid_error(a, b)) is not None]
    assert len(errors) == len(draws)
    assert spread * 0.8 < np.mean(errors) < spread * 3
    assert estimate_kid_error(draws[0][0][:19], draws[0][1]) is None
