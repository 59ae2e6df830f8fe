"""What Tune hears from our admission: a trial when one fits, and otherwise that there is none for now."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from orchestrator.clusters.cluster import Cluster, NodeType
from orchestrator.execution import admission as admissions
from orchestrator.execution import session
from orchestrator.execution.admission import Admission
from orchestrator.execution.trials import choose_hosts
from orchestrator.experiment.records import SearchConfig
from orchestrator.planning.decide import Turn
from orchestrator.planning.place import Node, Size
from workers.config import DataConfig, Mistake, TrainingConfig, Trial
from workers.sharing import note_share
from workers.storage import Storage

MACHINE = NodeType("machine", Node(64, 8), most=1)
TWO_MACHINES = Cluster((MACHINE,), most=1)  # the head is one as well


class Listener:
    """`admission.Events`, as far as admission speaks to it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.open = self.near_the_end = False
        self.turns: dict[str, Turn] = {}

    def say(self, text: str) -> None:
        self.messages.append(text)

    def is_evaluating(self) -> bool:
        return self.open

    def is_halting(self) -> bool:
        return self.near_the_end

    def decide_turn(self, digest: str) -> Turn:
        return self.turns.get(digest, "train")


def admission(*workers: int, cpus: int = 1, listener: Listener | None = None, **search: Any) -> Admission:
    jobs, sizes = [], {}
    for i, n in enumerate(workers):
        training = TrainingConfig(steps=1, workers=n, cpus=cpus)
        trial = Trial(data=DataConfig(source="digits"), training=training)
        jobs.append(
            {
                "storage": "runs",
                "digest": f"{i:016}",
                "trial": trial.model_dump_json(),
                "gpus": 1,
                "owner": "",
                "share": "",
            }
        )
        sizes[f"{i:016}"] = Size.of(training, 1)
    for name, host in choose_hosts([Size(2, 1, 0)]).items():
        tune.register_trainable(name, host)
    events: Any = listener or Listener()
    result = Admission(jobs, sizes, SearchConfig(**search), events, cluster=TWO_MACHINES, scratch="scratch")
    result.add_configurations([SimpleNamespace(spec={"storage": None})])
    return result


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """What there is now: two machines, of which a test may take one."""
    there = TWO_MACHINES.nodes()
    for module in (session, admissions):
        monkeypatch.setattr(module, "list_nodes_now", lambda: there)
    monkeypatch.setattr(admissions, "LOOK_AGAIN_S", 1e9)  # there is no Ray to ask for placement groups
    monkeypatch.setattr(admissions, "list_gpu_types", set)
    monkeypatch.setattr(admissions, "is_on_this_machine", lambda: True)  # nor where it is
    return there


def started(a: Admission) -> list[Any]:
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


def test_near_the_end_of_the_time_nothing_begins_and_what_runs_goes_on() -> None:
    listener = Listener()
    a = admission(8, 8, 8, listener=listener)
    assert len(started(a)) == 2
    a.on_trial_complete("", {})
    listener.near_the_end = True
    assert a.next_trial() is None and a.is_finished() and a.waits


def test_workers_are_handed_to_trials_of_their_size_alone() -> None:
    """Tune hands an actor over where the resources that it holds equal those that a trial asks for."""
    trials = started(admission(4, 2, 2, 1, 1))
    for trial in trials:
        trial.create_placement_group_factory()
    four, two, same, one, other = (trial.placement_group_factory for trial in trials)
    assert four != two == same and hash(two) == hash(same) and four != one == other
    assert four.bundles == two.bundles == [{"CPU": 0.01}]


def test_a_trial_bigger_than_a_machine_is_packed_over_several() -> None:
    [trial] = started(admission(8, cpus=9))  # 72 cores, of which a machine has 64
    assert trial.config["strategy"] == "PACK"


@pytest.mark.parametrize(("asked", "there", "taken"), [("auto", 1, 1), ("auto", 0, 0), (0.3, 8, 0.3), (0, 8, 0)])
def test_what_a_trial_asks_of_a_gpu_is_taken_where_there_is_one(asked: Any, there: int, taken: float) -> None:
    assert session.count_gpus_a_worker(TrainingConfig(steps=1, gpus=asked), [Node(8, there)]) == taken


@pytest.mark.parametrize("asked", [1, 0.25])
def test_a_gpu_that_no_node_has_is_refused_with_what_to_do(asked: Any) -> None:
    with pytest.raises(Mistake, match=f"training.gpus: {asked}, but no node of the cluster has a GPU; set it to 0 or"):
        session.count_gpus_a_worker(TrainingConfig(steps=1, gpus=asked), [Node(8, 0)])


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


def on_auto(trials: int, root: Path, **search: Any) -> Admission:
    """Of trials of one kind, whose part of a GPU is measured."""
    a = admission(*[1] * trials, **search)
    jobs = [{**job, "storage": str(root), "share": "shares/kind.json"} for job in a._jobs.values()]
    sizes = {job["digest"]: Size(1, 1, 1) for job in jobs}
    a = Admission(jobs, sizes, SearchConfig(**search), a._events, cluster=TWO_MACHINES, scratch="scratch")
    a.add_configurations([SimpleNamespace(spec={"storage": None})])
    return a


def parts(trials: list[Any]) -> list[float]:
    return [trial.config["job"]["gpus"] for trial in trials]


def test_of_trials_on_auto_the_first_is_measured_and_the_others_start_as_soon_as_that_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = on_auto(6, tmp_path)
    [first] = started(a)
    job = first.config["job"]
    assert (job["gpus"], job["measures"], job["makes_room"]) == (1, True, True)
    assert a.is_finished() and a.waits  # for now
    monkeypatch.setattr(admissions, "LOOK_AGAIN_S", -1)
    monkeypatch.setattr(a, "_find_without_place", lambda: None)
    assert a.is_finished()
    note_share(Storage(tmp_path), "shares/kind.json", "a GPU", 0.25)
    assert not a.is_finished() and parts(started(a)) == [0.25] * 5 and not a.waits
    a.on_trial_complete(first.trial_id)
    a.resize(first, 0.25)  # as its host tells
    [again] = started(a)
    assert parts([again]) == [0.25] and not again.config["job"]["measures"]
    monkeypatch.setattr(admissions, "LOOK_AGAIN_S", 1e9)
    assert parts(started(on_auto(3, tmp_path))) == [0.25] * 3, "the next sweep knows it"


def test_what_ended_before_it_was_measured_holds_nobody_back(tmp_path: Path) -> None:
    a = on_auto(4, tmp_path)
    [first] = started(a)
    a.on_trial_complete(first.trial_id)
    others = started(a)
    assert parts(others) == [1] * 3 and all(trial.config["job"]["measures"] for trial in others)
    assert not any(trial.config["job"]["makes_room"] for trial in others)


def test_a_trial_that_is_put_aside_leaves_the_measuring_to_another(tmp_path: Path) -> None:
    a = on_auto(3, tmp_path)
    listener: Any = a._events
    listener.turns = {f"{0:016}": "wait"}
    [first] = started(a)
    assert first.config["job"]["digest"] == f"{1:016}" and first.config["job"]["measures"] and len(a.aside) == 1


def test_what_ran_out_of_memory_comes_again_with_more_and_so_do_others_of_its_kind(tmp_path: Path) -> None:
    note_share(Storage(tmp_path), "shares/kind.json", "a GPU", 0.125)
    a = on_auto(6, tmp_path, max_concurrent=2)
    first, second = started(a)
    a.on_trial_complete(first.trial_id)
    a.resize(first, 0.25)
    [third] = started(a)
    assert parts([first, second, third]) == [0.25, 0.125, 0.25]


def test_on_one_gpu_the_next_trial_waits_for_the_evaluation_of_the_last(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    monkeypatch.setattr(admissions, "list_nodes_ever", lambda cluster: [Node(8, 1)])
    a = admission(1, 1, listener=listener)
    [first] = started(a)
    listener.open = True
    a.on_trial_complete(first.trial_id)
    assert not started(a) and a.is_finished() and a.waits  # Tune ends, and gives back the actor's GPU
    listener.open = False
    a.add_configurations([SimpleNamespace(spec={"storage": None})])
    assert not a.is_finished() and len(started(a)) == 1


def test_what_waits_for_a_node_is_said(nodes: list[Node]) -> None:
    nodes.clear()
    listener = Listener()
    assert started(admission(8, listener=listener))
    assert "waits for a node that holds 8 workers of 1 CPU and 1 GPU" in listener.messages[0]


def test_a_trial_that_tune_gave_up_comes_again_until_it_has_failed_too_often() -> None:
    a = admission(1, max_failures=2)
    again = []
    for _ in range(3):
        [trial] = started(a)
        a.on_trial_complete(trial.trial_id, error=True)
        again.append(a.put_back(trial))
    assert again == [True, True, False] and a.is_finished()
    b = admission(1, max_failures=2)
    [trial] = started(b)
    trial.run_metadata.num_failures = 3
    assert not b.put_back(trial)


def test_trials_that_other_sweeps_train_are_put_aside_until_it_is_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    name = {i: f"{i:016}" for i in range(4)}
    listener.turns = {name[0]: "wait", name[1]: "take"}
    a = admission(1, 1, 1, 1, listener=listener, max_concurrent=1)
    first = a.next_trial()
    assert first and first.config["job"]["digest"] == name[2]
    assert [job["digest"] for job in a.aside] == [name[0]]
    a.on_trial_complete(first.trial_id)
    listener.turns = {}
    monkeypatch.setattr(admissions, "LOOK_AGAIN_S", -1)
    monkeypatch.setattr(a, "_find_without_place", lambda: None)
    assert not a.is_finished() and not a.aside
    second = a.next_trial()
    assert second and second.config["job"]["digest"] == name[3] and a.next_trial() is None
    a.on_trial_complete(second.trial_id)
    assert [trial.config["job"]["digest"] for trial in started(a)] == [name[0]]


def test_what_is_left_to_other_sweeps_alone_is_no_reason_to_go_on() -> None:
    listener = Listener()
    listener.turns = {f"{0:016}": "wait"}
    a = admission(1, listener=listener)
    assert a.next_trial() is None and a.is_finished() and len(a.aside) == 1
