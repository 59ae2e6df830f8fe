"""What must run, as pure functions of what is there."""

import pytest

from orchestrator.plan import Found, concurrency, decide, scheduler_key
from workers.config import TrainingConfig

NONE, ASHA = scheduler_key({"kind": "none"}), scheduler_key({"kind": "asha", "grace": 10})
FINISHED = {"state": "finished", "step": 10, "steps": 10, "checkpoint": "abc"}
RUNNING = {"state": "running", "step": 5, "steps": 10, "checkpoint": "abc"}
PRUNED = {"state": "pruned", "step": 5, "steps": 10, "scheduler": ASHA}
DIVERGED = {"state": "diverged", "step": 5, "steps": 10, "detail": "diverged by step 5: loss nan"}


@pytest.mark.parametrize(
    ("found", "scheduler", "action"),
    [
        (Found(), NONE, "train"),
        (Found(RUNNING), NONE, "train"),
        (Found(RUNNING, "abc"), NONE, "train"),
        (Found({**RUNNING, "state": "failed"}, "abc"), NONE, "train"),
        (Found(FINISHED, "abc"), NONE, "evaluate"),
        (Found(FINISHED, "abc", {"metrics": {}}), NONE, "nothing"),
        (Found(FINISHED, None), NONE, "train"),
        (Found(FINISHED, "another", {"metrics": {}}), NONE, "train"),
        (Found(DIVERGED), NONE, "nothing"),
        (Found(PRUNED, "abc"), ASHA, "nothing"),
        (Found(PRUNED, "abc"), NONE, "train"),
    ],
)
def test_makes_what_is_missing_and_nothing_else(found: Found, scheduler: str, action: str) -> None:
    decision = decide(found, scheduler)
    assert decision.action == action
    assert decision.why


def test_concurrency_leaves_a_core_to_evaluation_where_it_can() -> None:
    one, two = TrainingConfig(steps=1), TrainingConfig(steps=1, workers=2)
    assert concurrency(one, 0, 3, 0) == 2
    assert concurrency(one, 0, 1, 0) == 1
    assert concurrency(two, 0, 3, 0) == 1
    assert concurrency(two, 0, 2, 0) == 1
    assert concurrency(two, 0, 1, 0) == 0
    assert concurrency(one, 1, 64, 8) == 8
    assert concurrency(two, 1, 64, 8) == 4
    assert concurrency(two, 1, 64, 1) == 0
