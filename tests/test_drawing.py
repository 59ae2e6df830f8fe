"""`DiffusionModel.sample`: any number of images in the memory of a few, and no more than memory holds."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_evaluation import checkpoint_in

from orchestrator import api
from orchestrator.api import DiffusionModel, open_model
from workers.config import Mistake
from workers.storage import Storage


@pytest.fixture
def model(tmp_path: Path) -> DiffusionModel:
    return open_model(checkpoint_in(Storage(tmp_path)).url)


def test_many_are_drawn_a_few_at_a_time(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "DRAWN_AT_ONCE", 4)
    batches: list[int] = []

    def network(x_t, t):  # type: ignore[no-untyped-def]
        batches.append(len(x_t))
        return model.network(x_t, t)

    network.told = network.classes = None  # type: ignore[attr-defined]
    counted = dataclasses.replace(model, network=network)
    images = counted.sample(10, steps=2)
    assert images.shape == (10, 4, 4, 1) and images.dtype == np.uint8 and set(batches) == {4, 2}
    assert np.array_equal(counted.sample(4, steps=2), images[:4])
    assert np.array_equal(counted.sample(10, steps=2), images)
    assert len(np.unique(images, axis=0)) == 10  # each batch has noise of its own


@pytest.mark.parametrize("n", [10**12, 10**30])
def test_more_than_memory_holds_is_refused_before_it_is_asked_for(n: int, model: DiffusionModel) -> None:
    with pytest.raises(Mistake, match="GB that are taken here at once; ask for fewer"):
        model.sample(n)
