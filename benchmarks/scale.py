"""What the driver takes for sweeps of 10 to 10,000 trials: planning, MLflow, results, report, status; without training.

    python benchmarks/scale.py [--trials 10 100 1000 10000] [--budget 1200] [--images 1300000]

The storage is filled as a sweep leaves it whose trials have all been trained and measured, but that nobody has shipped
to MLflow yet: sealed statuses, journals with images, manifests, summaries. One trial is really trained, since the best
of them is registered as a model. Then each command runs as a user's does. Of each it prints the seconds on the clock,
the seconds of a core that it used, both also a trial, and the memory it held at most. `page` is MLflow's answer to the
query of its own page: the best 100 of the sweep. A size that is not reached within the budget is left out and named.
With --images a data set of so many black images of 64x64 is opened, too: first, when it is read and decoded, and again
in another process, from the cache. It takes 12.3 kB an image of the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.experiment.load import load
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.state.saved import keep_sweep
from orchestrator.sweep import list_trials
from workers.config import DataConfig, Measurement
from workers.data.dataset import prepare
from workers.data.pixels import draw_grid
from workers.data.sources import Source
from workers.evaluation.blocks import Images, make_protocol_key
from workers.journal import Journal
from workers.kinds import DENOISER
from workers.layout import RowId, name_checkpoints_folder, name_status_file, name_summary_file, name_trial_folder
from workers.network import manifest
from workers.storage import Storage
from workers.training import train

ROOT = Path(__file__).parent.parent
STEPS = 2
CONTENT: dict[str, Any] = {
    "name": "scale",
    "data": {"source": "digits"},
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": []},
    "diffusion": {"T": 20, "schedule": {"kind": "linear", "scale": "per_1000", "beta_end": 0.015}},
    "training": {"steps": STEPS, "batch_size": 8, "ema": 0.9, "precision": "float32", "workers": 1, "cpus": 1},
    "evaluation": {"nll": {"images": 100}, "fid": {"samples": 100}},
}
WEIGHTINGS = ["simple", "vlb"]


def write_experiment(trials: int, file: Path) -> None:
    rates = [round(1e-5 * (1 + i), 8) for i in range(-(-trials // len(WEIGHTINGS)))]
    space = {"training.lr": {"grid": rates}, "loss.weighting": {"grid": WEIGHTINGS}}
    file.write_text(yaml.safe_dump({**CONTENT, "search": {"space": space}}))


# ---- A storage as a sweep leaves it ------------------------------------------------------------------------------


def fill(
    storage: Storage, experiment: Experiment, rows: dict[RowId, Variant], sources: dict[DataConfig, Source]
) -> None:
    import torch

    keep_sweep(storage, experiment, rows, sources)
    [(config, source)] = sources.items()
    picture = draw_grid(torch.zeros(16, 8, 8, 1, dtype=torch.uint8), 17)
    for number, (row, variant) in enumerate(rows.items()):
        if number == 0:  # the best
            for _ in train(variant.trial, prepare(config), storage, name_trial_folder(row), also_keep=[STEPS]):
                pass
        else:
            leave_as_trained(storage, row, number, picture)
        checkpoint = manifest.find_at_step(storage, name_checkpoints_folder(row), STEPS)
        assert checkpoint
        key = make_protocol_key(Measurement.of(variant.trial), Images.of(source))
        storage.write_sealed(name_summary_file(checkpoint.digest, key), summary(number, experiment.trial.diffusion.T))


def leave_as_trained(storage: Storage, row: RowId, number: int, picture: bytes) -> None:
    """Writes the files of a trial without training it."""
    journal, nll_bpd = Journal(storage, name_trial_folder(row)), 3.0 + number * 1e-4
    for step in (0, STEPS):
        journal.add_metrics(step, {"valid/nll_bpd": nll_bpd, "valid/nll_bpd_se": 0.1, "train/images_per_s": 40.0})
        journal.add_image(step, "samples", picture)
    journal.flush()
    path = f"{name_checkpoints_folder(row)}/{manifest.name_step(STEPS)}"
    names = (manifest.INDEX, *manifest.EVALUATED[DENOISER], manifest.STATE, manifest.PROGRESS)
    manifest.write_manifest(storage, path, STEPS, {name: f"{row} {name}" for name in names}, kept=True)
    status = {"state": "finished", "step": STEPS, "steps": STEPS, "images_per_s": 40.0, "detail": "", "host": "a",
              "checkpoint": manifest.open_committed(storage, path).digest, "valid_nll_bpd": nll_bpd,
              "updated_ms": time.time_ns() // 1_000_000}  # fmt: skip
    storage.write_sealed(name_status_file(row), status)


def summary(number: int, T: int) -> dict[str, Any]:
    per_image = [2.0 + number * 1e-4 + i * 1e-3 for i in range(100)]
    mean = sum(per_image) / len(per_image)
    parts = {"eval/nll_prior_bpd": 0.01, "eval/nll_diffusion_bpd": mean - 0.41, "eval/nll_decoder_bpd": 0.4}
    distance = {"eval/fd_classifier": 9.0 - number % 7, "eval/fd_classifier_se": 0.1}
    return {
        "metrics": {"eval/nll_bpd": mean, "eval/nll_bpd_se": 0.03, **parts, **distance},
        "passports": {"nll": {"protocol": {"timesteps": "all"}}, "samples": {"protocol": {"features": "classifier"}}},
        "nll_per_image": per_image,
        "nll_by_t": [mean / T] * T + [0.01],
        "hash": f"{number:016x}",
    }


# ---- Measuring ---------------------------------------------------------------------------------------------------


def measure(command: list[str]) -> dict[str, float]:
    """What a command takes. Raises RuntimeError with the end of its output where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process, memory_mb = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT), 0.0
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            memory_mb = max(memory_mb, memory_of(process.pid))
            time.sleep(0.05)
        _, status, used = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ends with {process.returncode}: {output.read().decode()[-2000:]}")
    seconds = {"wall_s": time.monotonic() - began, "core_s": used.ru_utime + used.ru_stime}
    return {**seconds, "memory_mb": memory_mb}


def memory_of(pid: int) -> float:
    """The MB that a process held at most. What the system says at its end counts what its parent held, too."""
    for held in Path(f"/proc/{pid}/status").read_text().splitlines():
        if held.startswith("VmHWM"):
            return int(held.split()[1]) / 1024
    return 0.0  # it has just ended


def ask_page(storage: Path) -> dict[str, float]:
    """MLflow's answer to its page's query, from the database itself."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == CONTENT["name"]]
    began, used = time.monotonic(), time.process_time()
    order = ["metrics.`eval/nll_bpd` ASC"]
    parent = client.search_runs([experiment.experiment_id], "tags.`orchestrator.row` = 'sweep'", max_results=1)
    of = f"tags.`mlflow.parentRunId` = '{parent[0].info.run_id}'" if parent else ""
    best = client.search_runs([experiment.experiment_id], of, order_by=order, max_results=100)
    assert best and best[0].data.metrics["eval/nll_bpd"] == min(r.data.metrics["eval/nll_bpd"] for r in best)
    return {"wall_s": time.monotonic() - began, "core_s": time.process_time() - used, "memory_mb": 0.0}


def open_images(count: int) -> dict[str, dict[str, float]]:
    """What opening a data set of so many images takes, as a process does that is to read it."""
    with tempfile.TemporaryDirectory() as folder:
        np.lib.format.open_memmap(f"{folder}/images.npy", "w+", np.uint8, (count, 64, 64, 3)).flush()  # with holes
        code = (
            "import sys, time; from workers.data.dataset import prepare; from workers.config import DataConfig\n"
            "from pathlib import Path; began = time.monotonic(), time.process_time()\n"
            "found = prepare(DataConfig(source=sys.argv[1]), Path(sys.argv[2]))\n"
            "found.train[[0, len(found.train) // 2, -1]].sum()\n"
            "print(time.monotonic() - began[0], time.process_time() - began[1])"
        )
        found = {}
        for name in ("decode", "open"):
            command = [sys.executable, "-c", code, f"{folder}/images.npy", f"{folder}/cache"]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
            found[name] = {"wall_s": float(said[0]), "core_s": float(said[1])}
        return found


def parts_of(file: Path, storage: Path) -> dict[str, Callable[[], dict[str, float]]]:
    def verb(name: str, *arguments: str) -> Callable[[], dict[str, float]]:
        return lambda: measure([sys.executable, "-m", f"orchestrator.{name}", *arguments, "--storage", str(storage)])

    return {
        "dry run": verb("sweep", str(file), "--dry-run"),
        "ship": verb("sweep", str(file), "--quiet"),
        "again": verb("sweep", str(file), "--quiet"),
        "status": verb("status", "scale"),
        "report": verb("report", "scale"),
        "page": lambda: ask_page(storage),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    parser.add_argument("--budget", type=float, default=1200, help="seconds; larger sizes are left out after it")
    parser.add_argument("--images", type=int, help="open a data set of so many images of 64x64, too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.images:
        for name, used in open_images(options.images).items():
            print(f"{options.images:,} images  {name:<6} {used['wall_s']:8.2f} s  {used['core_s']:8.2f} s of a core")
    found: dict[int, dict[str, dict[str, float]]] = {}
    began = time.monotonic()
    for trials in options.trials:
        if time.monotonic() - began > options.budget:
            print(f"{trials} trials: left out, the budget of {options.budget:g} s is used", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            file, storage = Path(folder, "scale.yaml"), Path(folder, "runs")
            write_experiment(trials, file)
            experiment = load(file, [])
            rows, sources, _ = list_trials(experiment)
            assert len(rows) == trials, len(rows)
            fill(Storage(str(storage)), experiment, rows, sources)
            found[trials] = {}
            for name, part in parts_of(file, storage).items():
                found[trials][name] = part()
                if not options.json:
                    print(line(trials, name, found[trials][name]), flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


def line(trials: int, name: str, used: dict[str, float]) -> str:
    a_trial = 1000 * used["core_s"] / trials
    return (
        f"{trials:>6} trials  {name:<8} {used['wall_s']:8.2f} s  {used['core_s']:8.2f} s of a core, "
        f"{a_trial:8.2f} ms a trial  {used['memory_mb']:6.0f} MB"
    )


if __name__ == "__main__":
    main()
