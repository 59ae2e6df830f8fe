"""What must run, as pure functions of what is there."""

from random import Random
from typing import Any

import pytest

from orchestrator.experiment.records import SchedulerConfig
from orchestrator.planning.decide import Decision, decide, decide_turn, make_scheduler_key
from orchestrator.planning.place import Node, Queue, Size, admit, admit_at_once, can_hold, fits_one_node
from orchestrator.state.rows import Found
from workers.sharing import round_as_ray

NONE, ASHA = (make_scheduler_key(SchedulerConfig(kind=kind)) for kind in ("none", "asha"))
FINISHED = {"state": "finished", "step": 10, "steps": 10}
RUNNING = {"state": "running", "step": 5, "steps": 10}
PRUNED = {"state": "pruned", "step": 5, "steps": 10, "scheduler": ASHA}
DIVERGED = {"state": "diverged", "step": 5, "steps": 10, "detail": "diverged by step 5: loss nan"}
SUMMARY: dict[str, Any] = {"metrics": {}}


@pytest.mark.parametrize(
    ("status", "checkpoint", "summary", "steps", "scheduler", "action", "why"),
    [
        (None, None, None, 10, NONE, "train", "new"),
        (RUNNING, None, None, 10, NONE, "train", "cut off at step 5 of 10: resumes"),
        ({**RUNNING, "state": "failed"}, None, None, 10, NONE, "train", "failed at step 5 of 10: resumes"),
        (FINISHED, "abc", None, 10, NONE, "evaluate", "trained, not evaluated"),
        (FINISHED, "abc", SUMMARY, 10, NONE, "nothing", "done"),
        (FINISHED, None, None, 10, NONE, "train", "its checkpoint of step 10 is not there: it is made again"),
        (FINISHED, None, None, 20, NONE, "train", "goes on from step 10 to 20"),
        (FINISHED, None, None, 4, NONE, "train", "its checkpoint of step 4 is not there: it is made again"),
        (FINISHED, "abc", SUMMARY, 4, NONE, "nothing", "done"),
        (RUNNING, "abc", None, 4, NONE, "evaluate", "trained, not evaluated"),  # its trial goes on for another row
        (None, "abc", SUMMARY, 10, NONE, "train", "its status.json is gone: its last step is looked at again"),
        (DIVERGED, None, None, 10, NONE, "nothing", "diverged by step 5: loss nan"),
        (DIVERGED, None, None, 4, NONE, "train", "its checkpoint of step 4 is not there: it is made again"),
        (DIVERGED, "abc", None, 4, NONE, "evaluate", "trained, not evaluated"),
        (PRUNED, None, None, 10, ASHA, "nothing", "pruned at step 5"),
        (PRUNED, None, None, 10, NONE, "train", "pruned at step 5 of 10: resumes"),
    ],
)
def test_makes_what_is_missing_and_nothing_else(
    status: Any, checkpoint: str | None, summary: Any, steps: int, scheduler: str, action: str, why: str
) -> None:
    found = Found(status, checkpoint, summary, steps=steps)
    assert decide(found, scheduler) == Decision(action, why)  # type: ignore[arg-type]


def test_what_is_damaged_is_told_and_what_lacks_its_journal_s_end_is_validated_again() -> None:
    assert decide(Found(FINISHED, unread="manifest.json is damaged", steps=10), NONE) == Decision(
        "nothing", "manifest.json is damaged"
    )
    assert decide(Found(FINISHED, "abc", SUMMARY, unfinished=True, steps=10), NONE).action == "train"
    assert "resumes from its last checkpoint" in decide(Found(resumes_at=5, steps=10), NONE).why


def test_what_was_cut_off_between_two_validations_goes_on_from_its_checkpoint() -> None:
    """The status says how far the last validation was, and files tell how far the trial came."""
    found = Found(RUNNING, steps=10, resumes_at=8)
    assert found.step == 8
    assert decide(found, NONE).why == "cut off at step 8 of 10: resumes from its checkpoint of step 8"
    assert Found(RUNNING, steps=10, resumes_at=3).step == 5


@pytest.mark.parametrize(
    ("is_missing", "holder", "expected"),
    [(True, "", "train"), (True, "process 1", "wait"), (False, "", "take"), (False, "process 1", "take")],
)
def test_a_shared_trial_is_trained_by_who_holds_it(is_missing: bool, holder: str, expected: str) -> None:
    assert decide_turn(is_missing, holder) == expected


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
        (Size(1, 1, 0.4), [Node(64, 1)], 2),
        (Size(1, 1, 0.4), [Node(64, 3)], 6),  # and not 7, as 3 / 0.4 suggests: each lies on one GPU
        (Size(1, 1, 0.5), [Node(64, 1)] * 2, 4),
        (Size(1, 1, 0.3), [Node(64, 1)], 3),
        (Size(1, 1, 0.25), [Node(64, 1)], 3),  # room is left for a block of evaluation
        (Size(1, 1, 0.25), [Node(64, 2)], 7),  # of one
        (Size(1, 1, 0.1), [Node(64, 1)], 7),
        (Size(1, 1, 0.6), [Node(2, 1)], 1),
    ],
)
def test_as_many_trials_run_at_once_as_fit(size: Size, nodes: list[Node], fit: int) -> None:
    assert len(admit_at_once([size] * 20, nodes)) == fit
    assert len(admit_at_once([size] * 20, nodes, most=1)) == 1


def test_a_trial_that_never_fits_is_known() -> None:
    assert can_hold(Size(16, 1, 1), [MACHINE] * 2) and not can_hold(Size(17, 1, 1), [MACHINE] * 2)
    assert fits_one_node(EIGHT, [MACHINE]) and not fits_one_node(Size(9, 1, 1), [MACHINE] * 2)
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


@pytest.mark.parametrize(
    ("part", "times"),
    [(0.1, 10), (0.2, 5), (0.25, 4), (0.3, 3), (1 / 3, 3), (1 / 6, 6), (1 / 7, 7), (0.4, 2), (0.7, 1)],
)
def test_parts_of_a_gpu_are_counted_per_gpu(part: float, times: int) -> None:
    """So many trials of it fit on each GPU, as Ray counts, which rounds to the fourth digit."""
    size = Size(1, 0.01, round_as_ray(part))
    assert round(size.gpus, 4) == size.gpus and times * size.gpus <= 1
    running: list[Size] = []
    while len(running) < 100 and admit([size], running, [Node(64, 2)]) is not None:
        running.append(size)
    assert len(running) == 2 * times


def test_different_parts_of_a_gpu_fill_the_fullest_gpu_first() -> None:
    half, third, most = (Size(1, 1, part) for part in (0.5, 0.3333, 0.75))
    assert admit([GPU], [half, third], [Node(64, 2)]) == 0  # both on one GPU
    assert admit([GPU], [half, most], [Node(64, 2)]) is None
    assert admit([half, third], [half, most], [Node(64, 2)]) == 0 and admit([most], [half, most], [Node(64, 2)]) is None
    assert not can_hold(half, [Node(64, 0)]) and can_hold(half, [Node(64, 1)])


@pytest.mark.parametrize("size", [GPU, Size(1, 1, 0.25), Size(1, 1, 0.5)])
def test_on_one_gpu_evaluation_has_its_turn_before_the_next_trial(size: Size) -> None:
    one = [Node(8, 1)]
    assert admit([size], [], one, spare=CORE) == 0
    assert admit([size], [], one, spare=GPU) is None  # though nothing runs
    assert admit([size], [], [Node(8, 2)], spare=GPU) == 0
    assert admit([CORE], [], one, spare=GPU) == 0  # without a GPU it is in nobody's way


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


@pytest.mark.parametrize("seed", range(10))
def test_a_queue_by_size_chooses_what_a_list_would(seed: int) -> None:
    random = Random(seed)
    nodes = [MACHINE] * random.randint(1, 3)
    sizes = [Size(random.choice([1, 2, 4, 8]), random.choice([1, 2]), 1) for _ in range(40)]
    listed, queue = list(enumerate(sizes)), Queue((size, (i, size)) for i, size in enumerate(sizes))
    running: list[Size] = []
    while listed:
        i = admit([size for _, size in listed], running, nodes)
        chosen = admit(kinds := queue.sizes, running, nodes)
        assert (i is None) == (chosen is None)
        if i is None or chosen is None:
            running.pop(random.randrange(len(running)))
            continue
        expected = listed.pop(i)
        assert queue.take(kinds[chosen]) == expected
        running.append(expected[1])
    assert not queue
