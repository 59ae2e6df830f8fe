"""`python -m orchestrator.canary`: measure what is known beforehand, before any other number is believed."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator import cli
from workers.config import DataConfig, Measurement, Mistake
from workers.layout import CANARY_FOLDER, name_evaluation_folder

if TYPE_CHECKING:  # these take seconds: --help does without
    from orchestrator.output.terminal import Display
    from workers.evaluation import canaries
    from workers.storage import Storage

EXAMPLES = ("", "--address auto --storage /shared/runs")
MORE = """It measures a Gaussian data set whose bound and samples are known exactly, and recorded numbers that an update
of a library would change: in this process, and once more through Ray."""
THROUGH_RAY = "gaussian/nll_bpd_through_ray"


def make_parser() -> argparse.ArgumentParser:
    endings = {cli.DONE: "all is as expected", cli.ALARM: "some number is another", cli.CLUSTER_LOST: ""}
    result = cli.make_parser("canary", "", EXAMPLES, more=MORE, endings=endings)
    cli.add_ray_address(result)
    cli.add_storage(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="The same command measures anew.")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake where storage or cluster cannot be reached."""
    from rich.console import Console

    from orchestrator.experiment.preflight import describe_data
    from orchestrator.output.terminal import Display
    from workers.data.sources import describe
    from workers.storage import Storage

    cli.tell(describe_data(describe(DataConfig(source=name)) for name in ("gaussian", "digits")), ())
    storage = Storage(options.storage)
    storage.check_writable()
    found = judge_canaries(storage, Display({}, Console(stderr=True), quiet=True), options.ray_address)
    print("\n".join(map(str, found)))
    return cli.DONE if all(verdict.passed for verdict in found) else cli.ALARM


def judge_canaries(
    storage: "Storage", display: "Display", ray_address: str | None, *, through_ray: bool = True
) -> list["canaries.Verdict"]:
    """What the canaries say today; all of them `through_ray`, else those that this process measures by itself.

    Raises Mistake where storage or cluster cannot be reached.
    """
    from workers.evaluation import canaries

    measured = canaries.measure()
    if through_ray:
        measured[THROUGH_RAY] = _measure_through_ray(storage, display, ray_address)
    return [v for v in canaries.judge(measured) if through_ray or v.canary.name != THROUGH_RAY]


def _measure_through_ray(storage: "Storage", display: "Display", ray_address: str | None) -> float:
    """The bound of the Gaussian pixels in bits/dim, by the blocks of an evaluation."""
    from orchestrator.execution.measurements import measure
    from orchestrator.measuring.subjects import Subject
    from workers.data.sources import describe
    from workers.diffusion.process import Process
    from workers.evaluation import canaries
    from workers.locks import lock
    from workers.network import checkpoint as checkpoints

    m, process = Measurement.of(canaries.GAUSSIAN), Process.of(canaries.GAUSSIAN.diffusion)
    with lock(storage, f"{CANARY_FOLDER}/lock"):
        storage.remove_leftovers(CANARY_FOLDER)
        snapshot = checkpoints.Snapshot(step=0, unet_config=canaries.DENOISER, process=process, ema={})
        checkpoint = checkpoints.save(storage, f"{CANARY_FOLDER}/gaussian", snapshot)
        # Measured anew each time: what a block cached says nothing of today's libraries.
        storage.delete(name_evaluation_folder(checkpoint.digest))
        subject = Subject("gaussian", m, checkpoint)
        sources = {m.data: describe(m.data)}
        [found] = measure([subject], sources, storage, display=display, ray_address=ray_address)
    if found.summary is None:
        raise Mistake(f"the canaries could not be measured through Ray: {found.failed}")
    return float(found.summary["metrics"]["eval/nll_bpd"])


if __name__ == "__main__":
    sys.exit(cli.call("canary", main))
