"""Addresses of noise: what they depend on, and that they stay."""

import pytest
import torch

from workers.noise import compute_address, make_generator


def test_addresses_differ_by_value_type_order_and_length():
    words: list[tuple[int | str, ...]] = [
        (),
        (0,),
        (1,),
        ("1",),
        (1, 2),
        (2, 1),
        (12,),
        ("12",),
        ("1", 2),
        (1, "2"),
        ("",),
        ("", ""),
        (0, "valid"),
    ]
    assert len({compute_address(*w) for w in words}) == len(words)
    assert len({compute_address(seed, "train", step) for seed in range(20) for step in range(500)}) == 10_000


def test_an_address_is_a_seed_for_any_generator():
    assert all(0 <= compute_address(k, "train") < 2**63 for k in range(100))


def test_addresses_are_the_same_for_ever():
    """A change here would give every trial other weights and every evaluation other noise."""
    assert compute_address(0, "valid", "eps") == 1485198914614106576
    assert torch.randint(1000, (5,), generator=make_generator(0, "train", 3, 1)).tolist() == [383, 290, 931, 98, 898]


def test_a_generator_repeats_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (torch.randn(1000, generator=make_generator(7, "samples", 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [(8, "samples", 3), (7, "samples", 4), (7, "nll", 3), ("7", "samples", 3)])
def test_noise_at_two_addresses_is_not_correlated(other):
    n = 100_000
    a, b = torch.randn(n, generator=make_generator(7, "samples", 3)), torch.randn(n, generator=make_generator(*other))
    assert abs(float((a * b).mean())) < 4 / n**0.5
