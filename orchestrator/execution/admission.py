"""Which trial Tune gets next: the next of those that fit, whatever their sizes, or none for now."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import SearchAlgorithm

from orchestrator.clusters.cluster import Cluster
from orchestrator.execution.session import is_on_this_machine, list_gpu_types, list_nodes_ever, list_nodes_now
from orchestrator.experiment.records import SearchConfig
from orchestrator.planning.decide import Turn
from orchestrator.planning.packing import line_up
from orchestrator.planning.place import Queue, Size, admit, can_hold, fits_one_node, reserve_spare
from workers.jobs import Job
from workers.layout import TrialId
from workers.sharing import read_share
from workers.storage import Storage

LOOK_AGAIN_S = 1.0  # at the nodes, at the placements that wait for room, and at trials that others train
LOOKS_AT_ASIDE = 8  # at most so many of those at once: on a remote storage each takes a request or more


class Events(Protocol):
    """What a sweep wants to know of its training."""

    def begin_trial(self, trial: TrialId) -> None: ...
    def note_progress(self, trial: TrialId, result: dict[str, Any]) -> None: ...
    def end_training(self, trial: TrialId, result: dict[str, Any]) -> None: ...
    def restart_trial(self, trial: TrialId, why: str) -> None: ...
    def fail_trial(self, trial: TrialId, why: str) -> None: ...
    def resize_trial(self, trial: TrialId, result: dict[str, Any]) -> None: ...
    def pause_trial(self, trial: TrialId, result: dict[str, Any]) -> None: ...
    def tick(self, wait_s: float = 0) -> None: ...
    def say(self, text: str) -> None: ...
    def is_evaluating(self) -> bool: ...
    def is_halting(self) -> bool: ...  # whether no trial is begun any more
    def decide_turn(self, trial: TrialId) -> Turn: ...


def get_trial_id(trial: Any) -> TrialId:
    return TrialId(trial.config["job"]["digest"])


class Admission(SearchAlgorithm):
    """Hands Tune its next trial as soon as `place.admit` finds room for it.

    So the drivers that exist are those that fit, whatever the sizes. Tune keeps the actor of a trial that has ended
    for the next one until it hears that there is no next one: see `is_finished`.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        sizes: Mapping[str, Size],
        search: SearchConfig,
        events: Events,
        *,
        cluster: Cluster | None,
        scratch: str,
    ) -> None:
        self._jobs, self._sizes = {TrialId(job["digest"]): job for job in jobs}, dict(sizes)
        self._search, self._events, self._cluster, self._scratch = search, events, cluster, scratch
        self._running: dict[str, Size] = {}  # by Tune's id of the trial
        self.aside: deque[Job] = deque()  # what other sweeps train
        self._nodes, self._looked = list_nodes_ever(cluster), time.monotonic()
        # What part of a GPU trials need, by where that is noted; what is being measured, by Tune's id of the trial.
        self._shares: dict[str, float] = {}
        self._measuring: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._waiting, self._held = Queue[Job](), list(jobs)  # the latter wait for one of their kind to be measured
        self._root = jobs[0]["storage"]
        self._learn_shares(job["share"] for job in jobs)
        self._line_up()
        self._stuck: Size | None = None
        self._again: Counter[str] = Counter()
        self._choice: Size | None = None
        self._chosen = False  # whether `_choice` is still that of the present state

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as for `trials._Relay`

    def add_configurations(self, experiments: Any) -> None:
        self._storage = experiments[0].spec["storage"]
        self._chosen = False  # evaluation may have had its turn

    @property
    def waits(self) -> bool:
        """Whether something is left to be trained here."""
        return bool(self._waiting or self._held)

    @property
    def total_samples(self) -> int:
        return len(self._sizes)

    def next_trial(self) -> Trial | None:
        while (size := self._choose_next()) is not None:
            job, self._chosen = self._waiting.take(size), False
            turn = self._events.decide_turn(job["digest"])
            if turn == "train":
                return self._make_trial(job, size)
            if turn == "wait":
                self.aside.append(job)
            if self._held:
                self._line_up()  # another one of its kind is to be measured, if this one was
        return None

    def _line_up(self) -> None:
        """Puts what waits into the queue, by what is known now of how much of a GPU each needs."""
        jobs, self._chosen = [*self._waiting.take_all(), *self._held], False
        of_kinds = [job for job in jobs if job["share"]]
        kinds = [job["share"] for job in of_kinds]
        starts = line_up(kinds, self._shares, self._measuring.values(), self._given_up)
        self._held = [job for job, start in zip(of_kinds, starts, strict=True) if start.gpus is None]
        held = {job["share"] for job in self._held}
        for job, start in zip(of_kinds, starts, strict=True):
            gpus = job["gpus"] if start.gpus is None else start.gpus
            job |= {"gpus": gpus, "measures": start.measures, "makes_room": job["share"] in held}
        waits = {job["digest"] for job in self._held}
        for job in jobs:
            if job["digest"] not in waits:
                self._sizes[job["digest"]] = size = replace(self._sizes[job["digest"]], gpus=job["gpus"])
                self._waiting.add(size, job)

    def _learn_shares(self, kinds: Iterable[str]) -> bool:
        """Reads what the storage notes of these kinds of trials, where it is not known. Returns whether it is now."""
        unknown = {kind for kind in kinds if kind and kind not in self._shares}
        types = list_gpu_types() if unknown else set()
        found = {kind: share for kind in unknown if (share := read_share(Storage(self._root), kind, types)) is not None}
        self._shares |= found
        return bool(found)

    def _make_trial(self, job: Job, size: Size) -> Trial:
        if not self._running and not can_hold(size, list_nodes_now()):
            self._events.say(f"placement  {job['digest'][:8]} waits for a node that holds {size}")
        config: dict[str, Any] = {"job": job}
        if size.workers > 1:
            strategy = "STRICT_PACK" if fits_one_node(size, self._nodes) else "PACK"
            config |= {
                "scratch": self._scratch,
                "one_machine": is_on_this_machine(),
                "max_failures": self._search.max_failures,
                "strategy": strategy,
            }
        trial = Trial(
            "data_parallel" if size.workers > 1 else "one_worker",
            config=config,
            storage=self._storage,
            max_failures=self._search.max_failures,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            trial_name_creator=get_trial_id,
            trial_dirname_creator=get_trial_id,
        )
        self._running[trial.trial_id], self._chosen = size, False
        if job["share"] and job["measures"]:
            self._measuring[trial.trial_id] = job["share"]
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.pop(trial_id, None)
        self._chosen = False
        if self.aside:  # some may have waited for it
            self._looked = -math.inf
        if kind := self._measuring.pop(trial_id, ""):
            if not self._learn_shares([kind]):
                self._given_up.add(kind)
            self._line_up()

    def resize(self, trial: Trial, gpus: float) -> None:
        """The trial goes on with another part of a GPU, and others of its kind take as much."""
        job = self._jobs[get_trial_id(trial)]
        if kind := job["share"]:
            self._shares[kind] = max(gpus, self._shares.get(kind, 0.0))
        job["gpus"] = gpus
        self._held.append(job)
        self._line_up()

    def put_back(self, trial: Trial) -> bool:
        """Puts a trial that Tune gave up back into the queue. Returns False where it has failed too often for that.

        Tune does not retry a trial whose actor dies as it is handed over from another trial.
        """
        job, most = trial.config["job"], self._search.max_failures
        self._again[job["digest"]] += 1
        if trial.run_metadata.num_failures > most or self._again[job["digest"]] > most:
            return False
        self._waiting.add(self._sizes[job["digest"]], job)
        self._chosen = False
        return True

    def put_aside(self, trial: Trial) -> None:
        """Another sweep began to train the trial in the same moment."""
        self.aside.append(trial.config["job"])

    def is_finished(self) -> bool:
        """Whether no trial comes now, none ever or none before a running one ends, or an evaluation.

        Tune asks again at each of its steps, and until then gives back the resources of actors that it kept: an
        evaluation may need them, or a trial whose node was lost. It ends where nothing runs.
        """
        self._look_again()
        return not self._waiting or self._choose_next() is None

    def _choose_next(self) -> Size | None:
        """The size of the trial that starts next."""
        if self._events.is_halting():
            return None
        self._look_again()
        if not self._chosen:
            kinds = self._waiting.sizes
            i = admit(
                kinds,
                list(self._running.values()),
                self._nodes,
                spare=reserve_spare(self._nodes, self._events.is_evaluating()),
                most=None if self._search.max_concurrent == "auto" else self._search.max_concurrent,
                stuck=self._stuck,
            )
            self._choice, self._chosen = None if i is None else kinds[i], True
        return self._choice

    def _look_again(self) -> None:
        if time.monotonic() - self._looked <= LOOK_AGAIN_S:
            return
        self._nodes, self._stuck = list_nodes_ever(self._cluster), self._find_without_place()
        known = self._learn_shares(self._measuring.values())
        for _ in range(min(len(self.aside), LOOKS_AT_ASIDE)):
            job = self.aside.popleft()
            turn = self._events.decide_turn(job["digest"])
            if turn == "train":
                self._held.append(job)
                known = True
            elif turn == "wait":
                self.aside.append(job)
        if known:
            self._line_up()
        self._looked, self._chosen = time.monotonic(), False

    def _find_without_place(self) -> Size | None:
        """The biggest of the running trials that Ray has no room for now, and would have on the nodes of now."""
        if not self._waiting:
            return None
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] in ("PENDING", "RESCHEDULING")]
        bundles = [list(group["bundles"].values()) for group in groups]
        sizes = {Size(len(b), b[0].get("CPU", 0), b[0].get("GPU", 0)) for b in bundles} & set(self._running.values())
        now = list_nodes_now() if sizes else []
        return max((size for size in sizes if can_hold(size, now)), key=lambda size: size.order, default=None)
