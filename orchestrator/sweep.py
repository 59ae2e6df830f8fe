"""`python -m orchestrator.sweep FILE`: make everything that an experiment file implies and that is not there yet.

Exit status: 0 all done, 1 some trial failed (the others finished), 2 the user's mistake, told before Ray starts,
130 interrupted; the same command then resumes. With --submit the sweep runs as a job of a cluster, its exit status is
the job's, and 130 leaves the job running; the same command then joins it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.clusters.cluster import Cluster, read_cluster
from orchestrator.clusters.cost import cost_text, read_prices
from orchestrator.experiment import Experiment, Variant, expand, load
from orchestrator.preflight import dry_run_text, preflight
from orchestrator.search import rounds_text, rows_of
from workers.config import DataConfig, Mistake
from workers.data import Source, describe
from workers.storage import Storage

EPILOG = """examples:
  python -m orchestrator.sweep experiments/beta_schedule.yaml --dry-run
  python -m orchestrator.sweep experiments/beta_schedule.yaml
  python -m orchestrator.sweep experiments/beta_schedule.yaml --smoke
  python -m orchestrator.sweep experiments/beta_schedule.yaml name=longer training.steps=2500
  python -m orchestrator.sweep experiments/beta_schedule.yaml 'search.space.diffusion.T.grid=[100, 1000]'
  python -m orchestrator.sweep FILE --submit --address http://127.0.0.1:8265 --storage s3://BUCKET/runs

Run it again to resume what was cut off; it does nothing where all is there, and trains only new trials
after an edit of the file."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.sweep",
        description="Train, measure and record every trial of an experiment file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("file", type=Path, help="the experiment file (YAML)")
    result.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the file's")
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
    result.add_argument(
        "--address", help="a Ray cluster: auto or HOST:PORT on a node of it; http://HEAD:8265 with --submit"
    )
    result.add_argument("--submit", action="store_true", help="run as a job of the cluster, or join it where it runs")
    result.add_argument("--cluster", type=Path, help="its file for `ray up`: what the cluster can grow to, and cost")
    result.add_argument("--prices", type=Path, help="prices of its machines; default: prices.yaml beside that file")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    result.add_argument("--tracking-uri", help="an MLflow server; default: the file's, or a database in the storage")
    result.add_argument("-q", "--quiet", action="store_true", help="print the result only")
    result.add_argument("-v", "--verbose", action="store_true", help="also what is left alone, and libraries' warnings")
    return result


def trials_of(experiment: Experiment) -> tuple[dict[str, Variant], dict[DataConfig, Source], list[str]]:
    """Trials by address (of an adaptive search, its first round), the data they use, and warnings. Raises Mistake."""
    variants = expand(experiment)
    sources = {config: describe(config) for config in dict.fromkeys(v.trial.data for v in variants)}
    warnings = preflight(experiment, variants, sources)
    trials, repeats = rows_of(experiment, variants, sources.__getitem__)
    return trials, sources, warnings + repeats


def _cost_text(
    options: argparse.Namespace,
    experiment: Experiment,
    trials: dict[str, Variant],
    sources: dict[DataConfig, Source],
    cluster: Cluster | None,
) -> str:
    """What the sweep takes in hours and money, after a calibration where it is asked for."""
    storage = Storage(options.storage)
    prices = options.prices or (options.cluster.with_name("prices.yaml") if options.cluster else None)
    if options.calibrate:
        from orchestrator.clusters.calibration import calibrate  # torch loads here, as for a run

        calibrate(trials, sources, storage)
    known = read_prices(prices) if prices and (options.prices or prices.exists()) else None
    return cost_text(trials, sources, storage, experiment.search, cluster, known)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    overrides = list(options.overrides)
    if options.tracking_uri:
        overrides.append(f"tracking.uri={options.tracking_uri}")
    try:
        if options.submit and not options.address:
            raise Mistake("--submit needs the cluster's Jobs API: --address http://HEAD:8265")
        if options.submit and options.cluster and not options.dry_run:
            raise Mistake("--cluster goes without --submit: the job finds the head's own copy of the file")
        experiment = load(options.file, overrides, options.smoke)
        if options.submit and not options.dry_run:
            from orchestrator.clusters.submission import job, submit

            expand(experiment)  # what the data must be asked for is checked where they are
            flags = [f"--{name}" for name in ("smoke", "fresh", "quiet", "verbose") if getattr(options, name)]
            sent = job(experiment, options.file, overrides, options.storage, flags)
            return submit(options.address, sent)
        trials, sources, warnings = trials_of(experiment)
        cluster = read_cluster(options.cluster) if options.cluster else None
        if cluster and not (options.dry_run or options.address):
            raise Mistake(f"--cluster {options.cluster}: goes with --address or --dry-run; this sweep would run here")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if options.dry_run:
            print(dry_run_text(trials, sources))
            print()
            print(_cost_text(options, experiment, trials, sources, cluster))
            if more := rounds_text(experiment.search):
                print(more)
            return 0
        from orchestrator.clusters.submission import check_attachable
        from orchestrator.controller import run  # torch, ray and MLflow load here: a dry run does without

        if options.address:
            check_attachable(options.address)
        where = options.storage, options.address
        return run(experiment, trials, sources, *where, options.fresh, options.quiet, cluster, options.verbose)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
