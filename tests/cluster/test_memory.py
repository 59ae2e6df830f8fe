"""A machine that runs out of memory: Ray ends a trial's process, and that costs the sweep one restart and no more."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import tune

from orchestrator.execution.session import open_session
from orchestrator.execution.trials import train
from orchestrator.experiment.records import SearchConfig
from orchestrator.planning.decide import Turn
from workers.config import DataConfig, TrainingConfig, Trial

pytestmark = pytest.mark.faults
ROOM_GB, HUNGER_GB = 2, 5


class Hungry(tune.Trainable):
    """Hosts a trial that takes more memory than there is the first time, and little the second."""

    def setup(self, config: dict[str, Any]) -> None:
        self.folder = Path(config["job"]["storage"])
        self.eats("setup")

    def step(self) -> dict[str, Any]:
        self.eats("step")
        return {"step": 1, "state": "finished", "detail": "", "validation_bpd": 1.0, "images_per_s": 0.0, "done": True}

    def eats(self, where: str) -> None:
        if (self.folder / where).exists():
            (self.folder / where).unlink()
            eaten = [np.ones(2**27) for _ in range(HUNGER_GB)]  # 1 GiB each, touched
            while eaten:
                pass


class Told:
    """`training.Events`, kept."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin_trial(self, digest: str) -> None:
        self.events.append(("begins", ""))

    def note_progress(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def end_training(self, digest: str, result: dict[str, Any]) -> None:
        self.events.append(("trained", result["state"]))

    def restart_trial(self, digest: str, why: str) -> None:
        self.events.append(("restarted", why))

    def fail_trial(self, digest: str, why: str) -> None:
        self.events.append(("failed", why))

    def resize_trial(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def pause_trial(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def is_halting(self) -> bool:
        return False

    def tick(self, wait_s: float = 0) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def is_evaluating(self) -> bool:
        return False

    def decide_turn(self, digest: str) -> Turn:
        return "train"


@pytest.mark.parametrize("where", ["setup", "step"])
def test_a_trial_that_fills_its_machine_starts_again(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name: int(value) for name, value, *_ in lines}
    available, total = kib["MemAvailable:"] * 2**10, kib["MemTotal:"] * 2**10
    if available < 2 * HUNGER_GB * 2**30:
        pytest.skip(f"needs {2 * HUNGER_GB} GB of free memory")
    threshold = 1 - (available - ROOM_GB * 2**30) / total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    trial = Trial(data=DataConfig(source="digits"), training=TrainingConfig(steps=1))
    job: Any = {"storage": str(tmp_path), "digest": "0" * 16, "trial": trial.model_dump_json(), "gpus": 0, "share": ""}
    (tmp_path / where).touch()
    told = Told()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import tests
    with open_session(None, cpus=2):
        train([job], SearchConfig(), told, hosts={"one_worker": Hungry})
    names = [name for name, _ in told.events]
    assert names == ["begins", "restarted", "begins", "trained"][-len(names) :] and "restarted" in names, told.events
    [why] = [why for name, why in told.events if name == "restarted"]
    assert "memory" in why
