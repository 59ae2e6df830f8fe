"""What must run, as pure functions of what is there."""

from random import Random

import pytest

from orchestrator.plan import Found, Node, Size, admit, at_once, can_hold, decide, in_one_node, scheduler_key

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


# ---- Placement -------------------------------------------------------------------------------------------------

CORE, GPU = Size(1, 1, 0), Size(1, 1, 1)  # what is kept for evaluation
ONE, TWO, FOUR, EIGHT = (Size(n, 1, 1) for n in (1, 2, 4, 8))
MACHINE = Node(64, 8)


@pytest.mark.parametrize(
    ("size", "nodes", "fit"),
    [
        (Size(1, 1), [Node(3, 0)], 2),  # a core is left to evaluation
        (Size(1, 1), [Node(1, 0)], 1),  # unless there is only one
        (Size(2, 1), [Node(3, 0)], 1),
        (Size(1, 1, 1), [MACHINE], 8),
        (Size(2, 1, 1), [MACHINE], 4),
        (Size(8, 1, 1), [MACHINE] * 3, 3),
        (Size(5, 1, 1), [MACHINE] * 3, 3),  # 3 GPUs of each are of no use to it
        (Size(16, 1, 1), [MACHINE] * 3, 1),  # over two nodes; a third alone does not hold it
        (Size(1, 32, 1), [MACHINE], 1),  # cores run out first
    ],
)
def test_as_many_trials_run_at_once_as_fit(size: Size, nodes: list[Node], fit: int) -> None:
    assert len(at_once([size] * 20, nodes)) == fit
    assert len(at_once([size] * 20, nodes, most=1)) == 1


def test_a_trial_that_never_fits_is_known() -> None:
    assert can_hold(Size(16, 1, 1), [MACHINE] * 2) and not can_hold(Size(17, 1, 1), [MACHINE] * 2)
    assert in_one_node(EIGHT, [MACHINE]) and not in_one_node(Size(9, 1, 1), [MACHINE] * 2)
    assert not can_hold(Size(2, 1), [Node(2, 0)])  # its driver takes a little, too
    assert can_hold(Size(2, 1), [Node(1, 0)] * 3) and not can_hold(Size(2, 1), [Node(1, 0)] * 2)  # or on a third
    assert not can_hold(GPU, [Node(64, 0)])


def test_the_biggest_that_fits_starts_first_and_smaller_ones_fill_the_gaps() -> None:
    waiting = [ONE, EIGHT, TWO, EIGHT, ONE]
    assert admit(waiting, [FOUR], [MACHINE] * 2) == 1
    assert admit(waiting, [FOUR, EIGHT], [MACHINE] * 2) == 2
    assert admit(waiting, [FOUR, EIGHT, TWO, TWO], [MACHINE] * 2) is None
    assert admit([], [], [MACHINE]) is None


def test_where_nothing_runs_something_starts_and_a_cluster_that_grows_sees_what_it_needs() -> None:
    assert admit([ONE, FOUR], [], []) == 1
    assert admit([ONE, FOUR], [ONE], []) is None


def test_evaluation_has_its_room_while_there_is_something_to_evaluate() -> None:
    assert admit([ONE], [FOUR, TWO, ONE], [MACHINE], spare=CORE) == 0
    assert admit([ONE], [FOUR, TWO, ONE], [MACHINE], spare=GPU) is None


def test_nothing_smaller_starts_before_a_trial_without_a_place() -> None:
    """Its node was lost, and smaller ones lie on all others: when they end it must be its turn."""
    running = [EIGHT, ONE, ONE]
    assert admit([TWO], running, [MACHINE] * 2) == 0
    assert admit([TWO], running, [MACHINE] * 2, stuck=EIGHT) is None
    assert admit([TWO, EIGHT], running, [MACHINE] * 3, stuck=EIGHT) == 1


def test_a_lost_node_holds_back_what_waits() -> None:
    assert admit([ONE], [EIGHT, EIGHT], [MACHINE]) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_simulated_sweep_ends_without_a_deadlock_and_never_asks_for_more_than_there_is(seed: int) -> None:
    """Trials of random sizes and lengths: each starts once, GPUs in use never exceed those there are, and while
    trials wait that would fit into what is free none of it lies idle."""
    random = Random(seed)
    nodes = [MACHINE] * random.randint(1, 6)
    most = 8 * len(nodes)
    waiting = [Size(random.choice([1, 2, 3, 4, 5, 8, 12]), 1, 1) for _ in range(60)]
    waiting = [size for size in waiting if can_hold(size, nodes)]
    left, running, now, started = list(waiting), list[tuple[float, Size]](), 0.0, 0
    while left or running:
        while (i := admit(left, [size for _, size in running], nodes)) is not None:
            running.append((now + random.uniform(1, 9), left.pop(i)))
            started += 1
        used = sum(size.workers for _, size in running)
        assert running and used <= most
        if any(size.workers == 1 for size in left):
            assert used == most
        running.sort(key=lambda ends: ends[0])
        now, _ = running.pop(0)
    assert started == len(waiting)
