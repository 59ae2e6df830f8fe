"""`python -m orchestrator.sweep FILE`: make everything that an experiment file implies and that is not there yet.

After a lost Ray or an interrupt the same command resumes. A Ray of this machine that dies is started again, up to three
times. With --submit or --slurm the sweep runs as a job of a cluster, its exit status is the job's, and an interrupt
leaves the job running; the same command then joins it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from orchestrator import cli
from orchestrator.clusters import slurm
from orchestrator.clusters.allocation import find_allocation
from orchestrator.clusters.cluster import Cluster, read_cluster
from orchestrator.clusters.cost import describe_cost, estimate_checkpoint_s, read_prices
from orchestrator.command import Command
from orchestrator.experiment.dry_run import format_dry_run
from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import load
from orchestrator.experiment.needs import list_named
from orchestrator.experiment.preflight import check_before_start, describe_data
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.origins import pin_starts
from orchestrator.planning.changes import list_changes
from orchestrator.planning.decide import decide, make_scheduler_key
from orchestrator.planning.search import describe_rounds, group_round_by_row
from orchestrator.state.saved import find, read_code
from workers.bundles import collect_bundles
from workers.config import DataConfig, Measurement, Mistake
from workers.data.sources import Source, describe
from workers.evaluation.blocks import Images, make_protocol_key
from workers.layout import TRIALS, RowId, get_trial_of_row, name_published_file, name_status_file
from workers.speed import count_cores
from workers.storage import Storage

EXAMPLES = (
    "experiments/beta_schedule.yaml --dry-run",
    "experiments/beta_schedule.yaml name=longer training.steps=2500",
    "experiments/beta_schedule.yaml 'search.space.diffusion.T.grid=[100, 1000]' --smoke",
    "FILE --submit --address http://127.0.0.1:8265 --storage s3://BUCKET/runs",
    "FILE --slurm '--nodes=2 --gpus-per-node=4 --time=08:00:00'",
)
MORE = """Run it again to resume what was cut off; it does nothing where all is there, and trains only new trials after
an edit of the file."""


def make_parser() -> argparse.ArgumentParser:
    endings = {
        cli.DONE: "all is done",
        cli.SOME_FAILED: "some trial failed, and the others are done",
        cli.CLUSTER_LOST: "Ray was lost; the same command resumes",
        cli.INTERRUPTED: "interrupted (ctrl-C, SIGTERM, SIGHUP); the same command resumes",
    }
    result = cli.make_parser("sweep", "FILE [a.b=value ...]", EXAMPLES, more=MORE, endings=endings)
    result.add_argument("file", type=Path, metavar="FILE", help="the experiment file (YAML)")
    cli.add_overrides(result, "settings that replace the file's")
    result.add_argument(
        "--smoke", action="store_true", help="run it small, by the overrides of the file's own section `smoke`"
    )
    result.add_argument("--dry-run", action="store_true", help="print the trials and what they cost, and stop")
    result.add_argument(
        "--calibrate", action="store_true", help="with --dry-run: measure this machine's throughput first, in seconds"
    )
    result.add_argument(
        "--fresh", action="store_true", help="forget what is there of these trials and start them again"
    )
    cli.add_ray_address(
        result, "a Ray cluster: auto or HOST:PORT on a node of it; its Jobs API, http://HEAD:8265, with --submit"
    )
    result.add_argument("--submit", action="store_true", help="run as a job of the cluster, or join it where it runs")
    result.add_argument(
        "--slurm", metavar="OPTIONS", help="run as a job on Slurm with these options of sbatch, or join it where it is"
    )
    result.add_argument("--cluster", type=Path, help="its file for `ray up`: what the cluster can grow to, and cost")
    result.add_argument("--prices", type=Path, help="prices of its machines; default: prices.yaml beside that file")
    cli.add_storage(result)
    cli.add_tracking_uri(result, "the file's, or a database in the storage")
    cli.add_verbosity(result, "what is left alone, and libraries' warnings")
    return result


def list_trials(experiment: Experiment) -> tuple[dict[RowId, Variant], dict[DataConfig, Source], list[str]]:
    """Rows by id (of an adaptive search, its first round), the data they use, and warnings. What the experiment
    starts from is pinned. Raises Mistake."""
    variants = expand(experiment)
    needed = [Variant(params={}, trial=trial, role=name) for name, trial in list_named(experiment).items()]
    sources = {config: describe(config) for config in dict.fromkeys(v.trial.data for v in (*variants, *needed))}
    warnings = check_before_start(experiment, [*variants, *needed], sources)
    trials, repeats = group_round_by_row(experiment, variants, sources.__getitem__)
    return trials, sources, warnings + repeats


def _find_missing(
    storage: Storage, experiment: Experiment, trials: Mapping[RowId, Variant], sources: Mapping[DataConfig, Source]
) -> dict[RowId, Variant]:
    """The rows of which something is still to be made, as their files stand."""
    there, missing = set(storage.list(TRIALS)), dict[RowId, Variant]()
    scheduler = make_scheduler_key(experiment.search.scheduler)
    for row, variant in trials.items():
        if (of := get_trial_of_row(row)) in there:
            protocol = make_protocol_key(Measurement.of(variant.trial), Images.of(sources[variant.trial.data]))
            found = find(storage, row, variant.trial, protocol, storage.read_sealed(name_status_file(of)))
            if decide(found, scheduler).action == "nothing":
                continue
        missing[row] = variant
    return missing


def _describe_cost(
    options: argparse.Namespace,
    experiment: Experiment,
    trials: dict[RowId, Variant],
    sources: dict[DataConfig, Source],
    cluster: Cluster | None,
) -> str:
    """What the sweep takes in hours and money, after a calibration where it is asked for."""
    storage = Storage(options.storage)
    prices = options.prices or (options.cluster.with_name("prices.yaml") if options.cluster else None)
    if options.calibrate:
        from orchestrator.clusters.throughput import calibrate  # torch loads here, as for a run

        calibrate(trials, sources, storage)
    known = read_prices(prices) if prices and (options.prices or prices.exists()) else None
    return describe_cost(trials, sources, storage, experiment.search, cluster=cluster, prices=known)


def _describe_changes(experiment: Experiment, trials: dict[RowId, Variant], storage: str) -> list[str]:
    """What is made again as code from outside is another than when the sweep was begun last, and which."""
    if not (bundles := collect_bundles(variant.trial for variant in trials.values())):
        return []
    files = {digest: bundle.digests for digest, bundle in bundles.items()}
    changes = list_changes(trials, files, read_code(Storage(storage), experiment.name))
    return [f"{row[:8]} {change.made}: {change}" for row, change in changes.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, _joined(sys.argv[1:] if arguments is None else arguments))


def _joined(words: Sequence[str]) -> list[str]:
    """The words with --slurm and what follows it as one: argparse takes `--nodes=2` for an option of ours."""
    found = list(words)
    if "--slurm" in found[:-1]:
        at = found.index("--slurm")
        found[at : at + 2] = [f"--slurm={found[at + 1]}"]
    return found


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    overrides = add_tracking(options.overrides, options.tracking_uri)
    if options.submit and not options.ray_address:
        raise Mistake("--submit needs the cluster's Jobs API: --address http://HEAD:8265")
    if options.slurm is not None and (options.submit or options.ray_address or options.cluster):
        raise Mistake("--slurm goes without --submit, --address and --cluster: the job has a Ray of its own")
    if options.submit and options.cluster and not options.dry_run:
        raise Mistake("--cluster goes without --submit: the job finds the head's own copy of the file")
    experiment = load(options.file, overrides, options.smoke)
    if (options.submit or options.slurm is not None) and not options.dry_run:
        return _send(options, experiment, overrides)
    if allocation := find_allocation():
        experiment = load(options.file, [*overrides, f"name={allocation.name(experiment.name)}"], options.smoke)
    experiment = pin_starts(experiment, options.storage)
    trials, sources, warnings = list_trials(experiment)
    cluster = read_cluster(options.cluster) if options.cluster else None
    if cluster and not (options.dry_run or options.ray_address):
        raise Mistake(f"--cluster {options.cluster}: goes with --address or --dry-run; this sweep would run here")
    cli.tell(describe_data(sources.values()), warnings, quiet=options.quiet)
    if options.dry_run:
        print(format_dry_run(trials, sources))
        for line in _describe_changes(experiment, trials, options.storage):
            print(line)
        print()
        missing = trials if options.fresh else _find_missing(Storage(options.storage), experiment, trials, sources)
        if len(missing) < len(trials):
            print(f"Of {len(trials) - len(missing)} of {len(trials)} rows nothing is left to make.")
        print(_describe_cost(options, experiment, missing, sources, cluster) if missing else "Nothing would be made.")
        if more := describe_rounds(experiment.search):
            print(more)
        return cli.DONE
    if not options.ray_address:
        _check_cores(trials)
    command = Command(
        storage=options.storage,
        ray_address=options.ray_address,
        cluster=cluster,
        fresh=options.fresh,
        quiet=options.quiet,
        verbose=options.verbose,
    )
    return make(experiment, trials, sources, command)


def _check_cores(trials: Mapping[RowId, Variant]) -> None:
    """Raises Mistake where a trial asks for more cores than this machine has, on which it would run."""
    asked, cores = max(variant.trial.training.cpus for variant in trials.values()), count_cores()
    if asked > cores:
        raise Mistake(
            f"training.cpus: {asked} for a worker, and this machine has {cores}; lower it, or name a cluster by "
            "--address"
        )


def _send(options: argparse.Namespace, experiment: Experiment, overrides: Sequence[str]) -> int:
    """Has the sweep run as a job elsewhere, and follows it. Raises Mistake."""
    variants = expand(experiment)  # what the data must be asked for is checked where they are
    flags = [f"--{name}" for name in ("smoke", "fresh", "quiet", "verbose") if getattr(options, name)]
    if options.submit:
        from orchestrator.clusters import submission  # Ray loads here

        sent = submission.make_command_job(experiment, options.file, overrides, options.storage, flags)
        return submission.submit(options.ray_address, sent)
    wish = slurm.read_wish(options.slurm)
    batch = slurm.make_batch(experiment, options.file, overrides, options.storage, flags)
    storage, trials = Storage(options.storage), [variant.trial for variant in variants]
    units = [estimate_checkpoint_s(storage, trial, describe(trial.data)) for trial in trials]
    return slurm.submit(batch, wish, max((s for s in units if s is not None), default=None))


def add_tracking(overrides: Sequence[str], tracking_uri: str | None) -> list[str]:
    """The overrides, the last of them the tracking server that was given beside them."""
    return [*overrides, *([f"tracking.uri={tracking_uri}"] if tracking_uri else [])]


def make(
    experiment: Experiment,
    trials: Mapping[RowId, Variant],
    sources: Mapping[DataConfig, Source],
    command: Command,
) -> int:
    """Makes what is missing of a sweep, and returns the exit status. Raises Mistake, and ClusterLost."""
    from orchestrator.execution import local_ray  # Ray loads here: a dry run does without

    if command.ray_address:
        from orchestrator.clusters.attaching import check_attachable

        check_attachable(command.ray_address)
    was_published = Storage(command.storage).exists(name_published_file(experiment.name))
    needs_ray = not command.ray_address and (command.fresh or not was_published)
    with local_ray.start_early() if needs_ray else nullcontext():
        from orchestrator import controller  # torch, Ray Tune and MLflow load here

        return controller.run(experiment, trials, sources, command)


if __name__ == "__main__":
    sys.exit(cli.call("sweep", main))
