"""500 trials of 1, 2, 4 and 8 GPUs on 256 GPUs that are only numbers: what admission, Tune and placement make of it.

    python benchmarks/simulated_cluster.py [--nodes 32] [--trials 500] [--seconds 50] [--lose-a-node] [--json]

The nodes are raylets of this machine with 8 logical GPUs each. A trial trains nothing: its host takes the same way as
a real one (admission, a Tune actor, and for several workers a placement group of its own) and sleeps in its place.
Drivers are handed from trial to trial, which real ones are not: two cores cannot start as many processes at once.
Every twentieth trial that ends leaves four evaluation tasks of a quarter of a GPU. It prints how much of the GPUs' time
was used while trials waited, what scheduling cost, and how much memory all of it took.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

sys.path.insert(0, str(Path(__file__).parents[1]))
GPUS, CPUS = 8, 10  # of a node
SIZES = (8, 4, 8, 2, 8, 4, 1)  # workers of a GPU each, in turn
MOST = 96  # trials at once: a process each, of 0.1 GB
STEPS = 2  # results of a trial
BLOCKS, EVERY, BLOCK_S = 4, 20, 2.0


# ---- What takes the places of training and evaluation. No module of the project is imported here: it would load torch.


def report(job: dict[str, Any], step: int, started: float, nodes: int) -> dict[str, Any]:
    """What a trial tells Tune, with when and over how many nodes it held its GPUs."""
    return {
        "step": step, "state": "finished" if step == STEPS else "running", "detail": "", "validation_bpd": 1.0,
        "images_per_s": 0.0, "held": [started, time.time()], "nodes": nodes,
    }  # fmt: skip


class Asleep(tune.Trainable):
    """Of one worker, as `workers.hosts.OneWorker`."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"CPU": 1, "GPU": config["job"]["gpus"]}])

    def setup(self, config: dict[str, Any]) -> None:
        self.job, self.steps, self.started = config["job"], 0, time.time()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(self.job["seconds"] / STEPS)
        self.steps += 1
        return {**report(self.job, self.steps, self.started, 1), "done": self.steps == STEPS}


def asleep_together(config: dict[str, Any]) -> None:
    """Of several workers, as `workers.hosts.data_parallel` with Ray Train's placement group."""
    job = config["job"]
    group = placement_group([{"CPU": 1, "GPU": job["gpus"]}] * job["workers"], strategy=config["strategy"])
    try:
        while not group.wait(60):
            continue
        started = time.time()
        nodes = len(set(placement_group_table(group)["bundles_to_node_id"].values()))
        for step in range(1, STEPS + 1):
            time.sleep(job["seconds"] / STEPS)
            tune.report(report(job, step, started, nodes))
    finally:
        remove_placement_group(group)


@ray.remote(max_retries=3)
def block() -> tuple[float, float]:
    """An evaluation task: when it started and ended."""
    started = time.time()
    time.sleep(BLOCK_S)
    return started, time.time()


# ---- The driver ------------------------------------------------------------------------------------------------


class Watch:
    """`training.Events` of a sweep without a storage."""

    def __init__(self, cluster: Cluster, trials: int, lose_a_node: bool) -> None:
        self.cluster, self.trials, self.lose = cluster, trials, lose_a_node
        self.ended: dict[str, dict[str, Any]] = {}
        self.restarts, self.failures, self.messages = 0, [], []  # type: ignore[var-annotated]
        self.blocks: list[Any] = []
        self.block_times: list[tuple[float, float]] = []
        self.memory_gb, self.looked = 0.0, 0.0

    def begin_trial(self, digest: str) -> None:
        pass

    def note_progress(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def end_training(self, digest: str, result: dict[str, Any]) -> None:
        from orchestrator.execution.evaluations import BLOCK_CPUS
        from workers.config import BLOCK_GPUS

        self.ended[digest] = result
        if len(self.ended) % EVERY == 0:
            needs = {"num_cpus": BLOCK_CPUS, "num_gpus": BLOCK_GPUS}
            self.blocks += [block.options(**needs).remote() for _ in range(BLOCKS)]

    def restart_trial(self, digest: str, why: str) -> None:
        self.restarts += 1

    def resize_trial(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def pause_trial(self, digest: str, result: dict[str, Any]) -> None:
        pass

    def is_halting(self) -> bool:
        return False

    def fail_trial(self, digest: str, why: str) -> None:
        self.failures.append(f"{digest}: {why}")

    def say(self, text: str) -> None:
        self.messages.append(text)

    def is_evaluating(self) -> bool:
        return bool(self.blocks)

    def decide_turn(self, digest: str) -> Literal["train", "wait", "take"]:
        return "train"

    def tick(self, wait_s: float = 0) -> None:
        if self.blocks:
            ready, self.blocks = ray.wait(self.blocks, num_returns=len(self.blocks), timeout=wait_s)
            self.block_times += ray.get(ready)
        if time.monotonic() - self.looked > 30:  # it takes a second
            self.memory_gb, self.looked = max(self.memory_gb, memory_gb()), time.monotonic()
            print(f"{len(self.ended)} of {self.trials} trials, {self.memory_gb:.1f} GB", file=sys.stderr)
        if self.lose and len(self.ended) >= self.trials // 4:
            self.lose = False
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)


def memory_gb() -> float:
    """Of this process and all that came of it: pages that processes share are counted once (PSS)."""
    mark, total = f"SIMULATED_CLUSTER={os.getpid()}".encode(), 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry.name == str(os.getpid()) or mark in (entry / "environ").read_bytes()):
                total += int((entry / "smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):
            continue  # it has ended
    return total / 2**20


def start(nodes: int) -> Cluster:
    head = {
        "num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20,
        "_system_config": {
            "prestart_worker_first_driver": False, "enable_worker_prestart": False, "num_workers_soft_limit": 1,
        },
    }  # fmt: skip
    # Their agents serve pages and jobs, for which nobody asks here: without them a node takes less memory.
    ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not needed")
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(wait=False, num_cpus=CPUS, num_gpus=GPUS, object_store_memory=78 * 2**20)
    cluster.wait_for_nodes(300)
    return cluster


def jobs(trials: int, seconds: float) -> list[dict[str, Any]]:
    """In turn of each size; each holds its GPUs for 0.5 to 1.5 times `seconds`."""
    from workers.config import DataConfig, TrainingConfig, Trial

    made = []
    for i in range(trials):
        workers = SIZES[i % len(SIZES)]
        trial = Trial(seed=i, data=DataConfig(source="digits"), training=TrainingConfig(steps=STEPS, workers=workers))
        made.append(
            {
                "storage": "",
                "digest": f"{i:016x}",
                "trial": trial.model_dump_json(),
                "gpus": 1,
                "share": "",
                "workers": workers,
                "seconds": seconds * (0.5 + i * 37 % 100 / 100),
            }
        )
    return made


def measure(nodes: int, trials: int, seconds: float, lose_a_node: bool) -> dict[str, Any]:
    os.environ["SIMULATED_CLUSTER"] = str(os.getpid())
    from orchestrator.execution.session import open_session
    from orchestrator.execution.trials import train
    from orchestrator.experiment.records import SearchConfig
    from workers.config import DRIVER_CPUS

    began = time.monotonic()
    cluster = start(nodes)
    try:
        with open_session(cluster.address):
            up_s = time.monotonic() - began
            watch, work = Watch(cluster, trials, lose_a_node), jobs(trials, seconds)
            hosts = {
                "one_worker": Asleep,
                "data_parallel": tune.with_resources(asleep_together, {"CPU": DRIVER_CPUS}),
            }
            wall, cpu = time.time(), time.process_time()
            train(work, SearchConfig(max_concurrent=MOST), watch, hosts=hosts)
            took_s, cpu_s = time.time() - wall, time.process_time() - cpu
            gpus = len(cluster.worker_nodes) * GPUS
            while watch.blocks:
                watch.tick(1)
    finally:
        cluster.shutdown()
    return {"nodes": nodes, "gpus": gpus, "start_s": up_s, "wall_s": took_s, **figures(watch, work, wall, cpu_s, gpus)}


def figures(watch: Watch, work: list[dict[str, Any]], wall: float, cpu_s: float, there: int) -> dict[str, Any]:
    gpus = {job["digest"]: job["workers"] * job["gpus"] for job in work}
    held = {digest: result["held"] for digest, result in watch.ended.items()}
    waiting_until = max(start for start, _ in held.values())  # from then on there is no trial left that waits
    used = sum(gpus[d] * max(0.0, min(end, waiting_until) - max(start, wall)) for d, (start, end) in held.items())
    at_once = [[d for d, (s, e) in held.items() if s <= start < e] for start, _ in held.values()]
    among = [any(s < a and b < e for s, e in held.values()) for a, b in watch.block_times]
    return {
        "trials": len(work),
        "ended": len(watch.ended),
        "failures": watch.failures,
        "restarts": watch.restarts,
        "waiting_s": waiting_until - wall,
        "gpu_seconds": sum(gpus[job["digest"]] * job["seconds"] for job in work),
        "utilisation": used / (there * (waiting_until - wall)),
        "driver_cpu_s_a_trial": cpu_s / len(work),
        "most_gpus_at_once": max(sum(gpus[d] for d in each) for each in at_once),
        "most_trials_at_once": max(map(len, at_once)),
        "sizes_at_once": max(len({gpus[d] for d in each}) for each in at_once),
        "driver_processes": len({result["pid"] for result in watch.ended.values()}),
        "most_nodes_a_trial": max(result["nodes"] for result in watch.ended.values()),
        "blocks": len(watch.block_times),
        "blocks_while_others_train": sum(among),
        "memory_gb": watch.memory_gb,
        "messages": watch.messages,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="A sweep of no-op trials on a simulated cluster of 8-GPU nodes.")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=50, help="that a trial holds its GPUs, on average")
    parser.add_argument("--lose-a-node", action="store_true", help="after a quarter of the trials")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.nodes, options.trials, options.seconds, options.lose_a_node)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<28} {value:.4g}" if isinstance(value, float) else f"{name:<28} {value}")
    return 0 if result["ended"] == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
