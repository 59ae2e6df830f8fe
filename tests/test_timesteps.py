"""How t is drawn: each way unbiased, stratified and antithetic ones with their structure, importance by its history."""

import pytest
import torch

from workers.diffusion.timesteps import KEPT, UNIFORM, History, Part
from workers.kinds import TIMESTEPS
from workers.noise import make_generator


def drawn(kind: str, T: int, batch: int, step: int, parts: int = 8, probability: torch.Tensor | None = None):
    """t of a global batch, by its sub-batches in order."""
    p = torch.full((T,), 1 / T, dtype=torch.float64) if probability is None else probability
    cut = [Part(batch // parts, j, parts) for j in range(parts)]
    return torch.cat(
        [TIMESTEPS[kind].load()(T, part, make_generator("timesteps", kind, step, part.index), p) for part in cut]
    )


def uneven(T: int) -> torch.Tensor:
    p = 1 / torch.arange(1, T + 1, dtype=torch.float64)
    return p / p.sum()


@pytest.mark.parametrize("kind", TIMESTEPS)
def test_a_weighted_mean_over_the_draws_is_the_mean_over_t(kind):
    """For any loss of t: within 4 standard errors over 600 batches."""
    T, batch = 23, 16
    p = uneven(T) if kind == "importance" else torch.full((T,), 1 / T, dtype=torch.float64)
    loss = torch.sin(torch.arange(1, T + 1, dtype=torch.float64)) + 3 / torch.arange(1, T + 1)
    means = []
    for step in range(600):
        t = drawn(kind, T, batch, step, probability=p)
        assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= T and t.shape == (batch,)
        means.append((loss[t - 1] / (T * p[t - 1])).mean())
    found = torch.stack(means)
    assert abs(found.mean() - loss.mean()) < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("kind", TIMESTEPS)
def test_every_t_comes_as_often_as_it_should(kind):
    T, batch, steps = 7, 24, 800
    p = uneven(T) if kind == "importance" else torch.full((T,), 1 / T, dtype=torch.float64)
    t = torch.cat([drawn(kind, T, batch, step, probability=p) for step in range(steps)])
    share = torch.bincount(t - 1, minlength=T).double() / len(t)
    assert ((share - p).abs() < 5 * (p / len(t)).sqrt()).all()


@pytest.mark.parametrize(("T", "batch"), [(1000, 128), (10, 128), (128, 128)])
def test_strata_cover_1_to_T_evenly(T, batch):
    """Each image's t lies in the image's own part of 1..T."""
    for step in range(5):
        t = drawn("stratified", T, batch, step)
        place = torch.arange(batch)
        assert (t >= torch.floor(place * T / batch) + 1).all() and (t <= torch.ceil((place + 1) * T / batch)).all()


def test_antithetic_draws_are_pairs_with_the_sum_T_plus_1():
    for n in (1, 2, 5, 16):
        t = TIMESTEPS["antithetic"].load()(100, Part(n, 0, 1), make_generator("pairs", n), uneven(100))
        half = (n + 1) // 2
        assert len(t) == n and (t[half:] + t[: n - half] == 101).all()


def test_variance_is_least_where_it_should_be():
    """Of a convex loss: strata beat pairs, pairs beat single draws; of a loss like 1/t, importance beats these."""
    T, t_all = 100, torch.arange(1, 101, dtype=torch.float64)

    def deviation(kind: str, loss: torch.Tensor, p: torch.Tensor) -> float:
        means = []
        for step in range(200):
            t = drawn(kind, T, 32, step, probability=p)
            means.append((loss[t - 1] / (T * p[t - 1])).mean())
        return float(torch.stack(means).std())

    even = torch.full((T,), 1 / T, dtype=torch.float64)
    rising = [deviation(kind, t_all**2, even) for kind in ("stratified", "antithetic", "uniform")]
    assert rising[0] < rising[1] < rising[2]
    assert deviation("antithetic", t_all, even) < 1e-9  # of a straight one a pair is the mean
    assert deviation("importance", 1 / t_all, uneven(T)) < deviation("uniform", 1 / t_all, even) / 10


def test_the_history_holds_the_last_losses_and_is_even_until_it_is_full():
    history, T = History.empty(3), 3
    even = torch.full((T,), 1 / T, dtype=torch.float64)
    for k in range(KEPT):
        assert torch.equal(history.probability(), even)
        history.add(torch.tensor([1, 2, 3, 1]), torch.tensor([1.0, 2.0, 3.0, 10.0 + k]))
    # t = 1 was seen twice a round: its last KEPT losses are those of the last KEPT / 2 rounds.
    last = torch.tensor([x for k in range(KEPT // 2, KEPT) for x in (1.0, 10.0 + k)])
    moment = torch.stack([last.square().mean().sqrt(), torch.tensor(2.0), torch.tensor(3.0)]).double()
    expected = (1 - UNIFORM) * moment / moment.sum() + UNIFORM / T
    torch.testing.assert_close(history.probability(), expected, rtol=1e-6, atol=0)
    assert float(history.probability().sum()) == pytest.approx(1)


def test_losses_that_are_all_zero_leave_it_even():
    history = History.empty(2)
    history.add(torch.tensor([1, 2] * KEPT), torch.zeros(2 * KEPT))
    assert torch.equal(history.probability(), torch.full((2,), 0.5, dtype=torch.float64))
