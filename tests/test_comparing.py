"""Differences of summaries: the interval of a paired difference, and when there is none to give."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from orchestrator.measuring.differences import compare_paired, compare_with_best, list_protocol_differences


def summary(per_image: list[float] | np.ndarray, **protocol: object) -> dict:
    return {
        "metrics": {"eval/nll_bpd": float(np.mean(per_image))},
        "passports": {"nll": {"protocol": protocol}},
        "nll_per_image": list(per_image),
    }


def test_the_interval_is_student_s_of_the_differences() -> None:
    random = np.random.RandomState(0)
    hard = 3 * random.randn(40)  # what an image costs under any model
    a, b = hard + 0.02 + 0.05 * random.randn(40), hard
    found = compare_paired(summary(a), summary(b))
    interval = ttest_1samp(a - b, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.high - found.low < 0.1 < np.std(a) / 40**0.5  # far below the error of either


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.RandomState(1)
    draws = [compare_paired(summary(0.3 + random.randn(12)), summary(np.zeros(12))) for _ in range(2000)]
    share = np.mean([d.low <= 0.3 <= d.high for d in draws])
    assert abs(share - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def test_a_difference_of_protocols_is_told_and_nothing_else() -> None:
    a, b = summary([1.0], images=300, split="held_out"), summary([1.0], images=100, split="held_out")
    assert list_protocol_differences(a, a, "nll") == []
    assert list_protocol_differences(a, b, "nll") == ["nll images: 300 against 100"]
    assert list_protocol_differences(a, b, "samples") == ["samples: not measured of both"]


def test_a_single_image_has_no_error() -> None:
    with pytest.raises(ValueError, match="two images"):
        compare_paired(summary([1.0]), summary([2.0]))


def test_only_equal_protocols_are_held_against_the_best() -> None:
    best, others = compare_with_best(
        {"a": summary([1.0, 2.0], images=2), "b": summary([1.5, 2.5], images=2), "c": summary([9.0, 9.0], images=3)}
    )
    assert best == "a" and set(others) == {"b"}
    assert compare_with_best({}) == (None, {})
