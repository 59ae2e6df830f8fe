"""What Tune hears from our admission: a trial when one fits, and otherwise that there is none for now."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from orchestrator.clusters.cluster import Cluster, NodeType
from orchestrator.execution import session, training
from orchestrator.execution.training import HOSTS, _Admission
from orchestrator.experiment import SearchConfig
from orchestrator.plan import Node, Size
from workers.config import DataConfig, TrainingConfig, Trial

MACHINE = NodeType("machine", Node(64, 8), most=1)
TWO_MACHINES = Cluster((MACHINE,), most=1)  # the head is one as well


class Listener:
    """`training.Events`, as far as admission speaks to it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.open = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def evaluating(self) -> bool:
        return self.open


def admission(*workers: int, listener: Listener | None = None, **search: Any) -> _Admission:
    jobs, sizes = [], {}
    for i, n in enumerate(workers):
        training = TrainingConfig(steps=1, workers=n)
        trial = Trial(data=DataConfig(source="digits"), training=training)
        jobs.append({"storage": "", "digest": f"{i:016}", "trial": trial.model_dump_json(), "gpus": 1})
        sizes[f"{i:016}"] = Size.of(training, 1)
    for name, host in HOSTS.items():
        tune.register_trainable(name, host)
    events: Any = listener or Listener()
    result = _Admission(jobs, sizes, SearchConfig(**search), events, TWO_MACHINES, "scratch")
    result.add_configurations([SimpleNamespace(spec={"storage": None})])
    return result


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """What there is now: two machines, of which a test may take one."""
    there = TWO_MACHINES.nodes()
    for module in (session, training):
        monkeypatch.setattr(module, "nodes_now", lambda: there)
    monkeypatch.setattr(training, "LOOK_AGAIN_S", 1e9)  # there is no Ray to ask for placement groups
    return there


def started(a: _Admission) -> list[Any]:
    trials = []
    while trial := a.next_trial():
        trials.append(trial)
    return trials


def test_drivers_exist_only_of_trials_that_fit() -> None:
    a = admission(1, 8, 4, 2, 8, 1)
    first = started(a)
    assert [t.trainable_name for t in first] == ["data_parallel"] * 2
    assert {t.config["strategy"] for t in first} == {"STRICT_PACK"}
    assert a.is_finished() and a.total_samples == 6  # for now: Tune gives back the actors that it keeps
    a.on_trial_complete(first[0].trial_id, {})
    assert not a.is_finished()
    assert [t.trainable_name for t in started(a)] == ["data_parallel", "data_parallel", "one_worker", "one_worker"]
    assert a.is_finished() and a.next_trial() is None


def test_no_driver_of_a_data_parallel_trial_is_handed_to_another() -> None:
    """Tune hands an actor over where the resources that it holds equal those that a trial asks for."""
    trials = started(admission(8, 4, 1, 1))
    for trial in trials:
        trial.create_placement_group_factory()
    one, other, small, same = (trial.placement_group_factory for trial in trials)
    assert one != other and one.bundles == other.bundles == [{"CPU": 0.01}]
    assert small == same


def test_a_trial_bigger_than_a_machine_is_packed_over_several() -> None:
    [trial] = started(admission(16))
    assert trial.config["strategy"] == "PACK"


def test_max_concurrent_counts_all_sizes() -> None:
    a = admission(1, 1, 2, max_concurrent=2)
    assert len(started(a)) == 2 and a.is_finished()


def test_an_evaluation_gets_a_gpu_when_a_trial_ends() -> None:
    listener = Listener()
    a = admission(8, 4, 4, 4, 1, listener=listener)
    first = started(a)
    assert len(first) == 3  # on all 16 GPUs
    listener.open = True
    a.on_trial_complete(first[-1].trial_id, {})
    assert [t.trainable_name for t in started(a)] == ["one_worker"]  # 3 of its 4 GPUs are left to trials


def test_what_waits_for_a_node_is_said(nodes: list[Node]) -> None:
    nodes.clear()
    listener = Listener()
    assert started(admission(8, listener=listener))
    assert "waits for a node that holds 8 workers of 1 CPU and 1 GPU" in listener.said[0]


def test_a_trial_that_tune_gave_up_comes_again_until_it_has_failed_too_often() -> None:
    a = admission(1, max_failures=2)
    again = []
    for _ in range(3):
        [trial] = started(a)
        a.on_trial_complete(trial.trial_id, error=True)
        again.append(a.again(trial))
    assert again == [True, True, False] and a.is_finished()
    b = admission(1, max_failures=2)
    [trial] = started(b)
    trial.run_metadata.num_failures = 3
    assert not b.again(trial)
