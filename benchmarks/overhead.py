"""What a sweep takes beside its bare work: many short trials by the command, and the same trials without it.

    python benchmarks/overhead.py --trials 12 --seconds 20

The bare work is training and evaluation of the same trials, called as functions, in as many processes at once as there
are cores; what they take is the ideal time of the sweep. It is measured before the sweep and after it, as the speed of
a machine changes, and taken as the mean. The sweep is the command as a user calls it, with MLflow and the report. It
prints both, their ratio, the seconds of a core that a trial costs above its bare work, and how long after the command
the first trial began.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.state.events import read_events
from workers.config import Trial
from workers.speed import count_cores
from workers.storage import Storage

ROOT = Path(__file__).parent.parent
CONTENT: dict[str, dict[str, Any]] = {
    "data": {"source": "digits"},
    "model": {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "diffusion": {"T": 100, "schedule": {"kind": "linear", "scale": "per_1000"}},
    "training": {"batch_size": 64, "lr": 1e-3, "ema": 0.99, "precision": "float32", "workers": 1, "cpus": 1},
    "evaluation": {"nll": {"images": 50}, "fid": {"samples": 200, "sampler": {"kind": "ddim", "steps": 10}}},
}


def content(steps: int) -> dict[str, object]:
    training = {**CONTENT["training"], "steps": steps, "validate_every": steps, "checkpoint_every": steps}
    return {**CONTENT, "training": training}


def bare(steps: int, seeds: list[int], root: str) -> list[float]:
    """Seconds of each trial's training and evaluation, in this process."""
    import torch

    from workers.config import Measurement
    from workers.data.dataset import prepare
    from workers.evaluation.blocks import Images, list_blocks
    from workers.evaluation.make import Bench, make
    from workers.evaluation.summary import summarise
    from workers.network import manifest
    from workers.training import train

    torch.set_num_threads(1)
    storage, found = Storage(root), []
    for seed in seeds:
        began = time.monotonic()
        trial = Trial.model_validate({**content(steps), "seed": seed})
        dataset, folder = prepare(trial.data), f"bare/{steps}-{seed}"
        for _ in train(trial, dataset, storage, folder):
            pass
        checkpoint = manifest.find_newest(storage, f"{folder}/checkpoints")
        assert checkpoint
        bench = Bench(storage, Measurement.of(trial), dataset, checkpoint, torch.device("cpu"))
        for block in list_blocks(bench.m, checkpoint.digest, Images.of(dataset)):
            make(bench, block)
        summarise(storage, bench.m, dataset, bench.model.process, checkpoint.digest, space=bench.space)
        found.append(time.monotonic() - began)
    return found


def both(steps: int, seeds: range, root: str) -> list[float]:
    """The same, on all cores at once, without each process's first trial, which loads what all need."""
    with ProcessPoolExecutor(count_cores(), mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(bare, steps, [10**6 + i, *seeds[i :: count_cores()]], root) for i in range(count_cores())]
        return [seconds for task in tasks for seconds in task.result()[1:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=20, help="of a trial's bare work")
    parser.add_argument("--output", type=Path, help="write what was measured there as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        probe = 100
        seconds = statistics.median(both(probe, range(2 * count_cores()), f"{scratch}/bare"))
        longer = statistics.median(both(3 * probe, range(2 * count_cores()), f"{scratch}/bare"))
        each = (longer - seconds) / (2 * probe)
        steps = max(1, round(probe + (options.seconds - seconds) / each))
        before = statistics.mean(both(steps, range(2 * count_cores()), f"{scratch}/bare"))
        file, storage = Path(scratch, "overhead.yaml"), Path(scratch, "runs")
        seeds = {"search": {"space": {"seed": {"grid": list(range(options.trials))}}}}
        file.write_text(yaml.safe_dump({"name": "overhead", **content(steps), **seeds}))
        command = [sys.executable, "-m", "orchestrator.sweep", str(file), "--storage", str(storage)]
        began, began_at = time.monotonic(), time.time()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        took = time.monotonic() - began
        after = statistics.mean(both(steps, range(2 * count_cores()), f"{scratch}/again"))
        first = min(
            event["time_ms"] for event in read_events(Storage(storage), "overhead") if event["event"] == "began"
        )
    trial = (before + after) / 2
    ideal = trial * options.trials / count_cores()
    found = {
        "trials": options.trials, "before_s": before, "after_s": after, "steps": steps,
        "ideal_s": ideal, "sweep_s": took, "ratio": took / ideal,
        "above_a_trial_s": (took - ideal) * count_cores() / options.trials,
        "first_trial_after_s": first / 1000 - began_at,
    }  # fmt: skip
    print(
        f"{options.trials} trials of {trial:.1f} s ({before:.1f} before the sweep, {after:.1f} after it) on "
        f"{count_cores()} cores: ideal {ideal:.1f} s, the sweep "
        f"{took:.1f} s, {took / ideal:.2f} times as long; {found['above_a_trial_s']:.2f} s of a core a "
        f"trial above its bare work; the first trial began {found['first_trial_after_s']:.1f} s after the command"
    )
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
