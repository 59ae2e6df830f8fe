"""`python -m orchestrator.status [SWEEP]`: how the sweeps of a storage stand, from any terminal, at any time.

It reads files alone: no Ray, no torch, and nothing is written. Exit status: 0, or 2 for the user's mistake.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator import cli, streams
from orchestrator.clusters.slurm import QueuedJob, list_jobs
from orchestrator.experiment.metrics import head_metric
from orchestrator.experiment.starts import shorten_slot
from orchestrator.measuring.seeds import are_over_seeds, group_rows
from orchestrator.measuring.slowness import SlowTrial, find_slow_trials
from orchestrator.output.speed_table import describe_peaks, format_share
from orchestrator.output.table import OVER_SEEDS, format_mean, format_metric
from orchestrator.output.terminal import COLOURS, format_clock, make_columns_table
from orchestrator.state.events import Driver, Event, count_events, find_driver, read_events
from orchestrator.state.rows import Row, rank_rows, shorten_params
from orchestrator.state.saved import SavedSweep, explain_opening, list_older, list_sweeps, open_sweep, read_rows
from workers.bits import VALIDATIONS, find_validation
from workers.config import Mistake
from workers.identity import list_outside
from workers.layout import name_sweep_folder, name_sweep_lock
from workers.locks import is_locked
from workers.storage import Storage

EXAMPLES = ("beta_schedule --watch", "beta_schedule --storage s3://bucket/runs --json")
WATCH_S = 2.0


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("status", "[SWEEP]", EXAMPLES)
    result.add_argument("sweep", nargs="?", metavar="SWEEP", help="the sweep whose trials to show; default: all sweeps")
    result.add_argument("--watch", action="store_true", help="show it again and again, until nothing runs or ctrl-C")
    result.add_argument(
        "--rows", action="store_true", help="show every row, also of those that differ in the seed alone"
    )
    result.add_argument("--json", action="store_true", help="print it as JSON")
    cli.add_storage(result)
    cli.add_trust(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    storage = Storage(options.storage)
    if options.watch and not options.json:
        with suppress(KeyboardInterrupt):
            _watch(storage, options.sweep, options.rows)
        return cli.DONE
    found = look(storage, options.sweep, options.rows)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        console = _make_console()
        console.print(make_view(found, options.sweep is not None, console.width), soft_wrap=True)
    return cli.DONE


def _make_console() -> Console:
    return Console(width=None if Console().is_terminal else 200)


def _watch(storage: Storage, sweep: str | None, each: bool) -> None:
    console = _make_console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = look(storage, sweep, each)
            live.update(make_view(found, sweep is not None, console.width), refresh=True)
            if not streams.is_read() or all(one["driver"]["state"] != "running" for one in found["sweeps"]):
                return
            time.sleep(WATCH_S)


# ---- What is known ---------------------------------------------------------------------------------------------


def look(storage: Storage, sweep: str | None, each: bool = False) -> dict[str, Any]:
    """All that there is to say, in plain types. Raises Mistake where there is no such sweep.

    Where seeds were searched a sweep also has `settings`, the trials that differ in the seed alone as one, unless
    `each` trial is asked for.
    """
    older = [] if sweep is not None else list_older(storage)
    queue = list_jobs()
    if sweep is not None and sweep not in list_sweeps(storage) and (jobs := _choose_jobs(queue, storage, sweep)):
        raise Mistake(f"{sweep} has not begun yet; " + "; ".join(map(str, jobs)))
    if sweep is None and not (there := list_sweeps(storage)) and not older:
        raise Mistake(
            f"{storage.root} has no sweep yet: run one (python -m orchestrator.sweep FILE), or give its --storage"
        )
    sweeps, damaged = [], []
    for name in [sweep] if sweep is not None else [name for name in there if name not in older]:
        try:
            sweeps.append(_describe_sweep(storage, open_sweep(storage, name), queue, each))
        except Mistake as mistake:  # one that cannot be read hides no other
            if sweep is not None:
                raise
            damaged.append(str(mistake))
    return {"storage": storage.root, "sweeps": sweeps, "older": older, "damaged": damaged}


def _describe_sweep(storage: Storage, kept: SavedSweep, queue: Sequence[QueuedJob], each: bool) -> dict[str, Any]:
    happened = read_events(storage, kept.name)
    rows, now_ms = read_rows(storage, kept, happened), time.time_ns() // 1_000_000
    locked = is_locked(storage, name_sweep_lock(kept.name))
    driver = find_driver(happened, locked, [r.found.status or {} for r in rows], now_ms)
    last = {event["trial"]: event for event in happened if "trial" in event}
    restarted, retried = (count_events(happened, name) for name in ("restarted", "retried"))
    ranked = rank_rows(rows, kept.metric, each)
    trials = [
        {
            "trial": row.digest,
            "role": row.variant.role,
            "starts_from": kept.starts.get(row.digest, {}),
            "params": shorten_params(row.variant),
            "state": describe_standing(row, driver, last.get(row.digest)),
            "step": row.found.step,
            "steps": row.variant.trial.training.steps,
            "images_per_s": row.images_per_s,
            "of_peak": row.of_peak,
            "seconds": row.seconds,
            "metrics": row.metrics,
            "restarts": restarted[row.digest],
            "retried_blocks": retried[row.digest],
            "host": (row.found.status or {}).get("host"),
            "updated_ms": (row.found.status or {}).get("updated_ms"),
            "code": list_outside(row.variant.trial),
            "detail": row.error or (row.found.status or {}).get("detail") or "",
        }
        for row in ranked
    ]
    settings = {"settings": found} if (found := _join_trials(ranked, trials, kept.metric, each)) else {}
    head = {"name": kept.name, "metric": kept.metric, "now_ms": now_ms, "driver": asdict(driver)}
    if jobs := _choose_jobs(queue, storage, kept.name, happened):
        head["jobs"] = [asdict(job) for job in jobs]
    slow = [asdict(slow) for slow in find_slow_trials(rows)]
    head["starts"] = dict(kept.starts)
    return {**head, "trials": trials, **settings, "peaks": describe_peaks(rows), "slow": slow}


def _choose_jobs(
    queue: Sequence[QueuedJob], storage: Storage, sweep: str, happened: Sequence[Event] = ()
) -> list[QueuedJob]:
    """The jobs in Slurm's queue that make the sweep: those sent for it, and the one that its last command ran in."""
    last = next((event["slurm_job"] for event in reversed(happened) if "slurm_job" in event), "")
    return [job for job in queue if job.of == storage.find_url(name_sweep_folder(sweep)) or job.id == last]


def _join_trials(
    rows: Sequence[Row], trials: Sequence[Mapping[str, Any]], metric: str, each: bool
) -> list[dict[str, Any]]:
    """The trials of those `rows` that differ in the seed alone as one: the sums of what is counted, the means of what
    is measured. Empty where there are none."""
    groups, told = group_rows(rows, each), {trial["trial"]: trial for trial in trials}
    if not are_over_seeds(groups):
        return []
    found = []
    for group in groups:
        own = [told[row.digest] for row in group.rows]
        heard = [trial["updated_ms"] for trial in own if trial["updated_ms"] is not None]
        found.append(
            {
                "trials": [trial["trial"] for trial in own],
                "role": group.variant.role,
                "starts_from": None,
                "params": shorten_params(group.variant),
                "seeds": group.count_seeds(metric),
                "state": own[0]["state"] if len({trial["state"] for trial in own}) == 1 else _format_counts(own),
                **{name: sum(trial[name] for trial in own) for name in ("step", "steps", "restarts", "retried_blocks")},
                "images_per_s": group.images_per_s,
                "of_peak": group.of_peak,
                "metrics": dict(group.metrics),
                "standard_errors_over_seeds": dict(group.seed_errors),
                "updated_ms": max(heard, default=None),
            }
        )
    return found


def describe_standing(row: Row, driver: Driver, last: Event | None) -> str:
    """The state of a trial in the terminal's words; `last` is the last that happened to it.

    What the files call running is only so while a command works on it.
    """
    at_work, event = driver.state == "running", str((last or {}).get("event"))
    match row.state:
        case "new":
            return "training" if at_work and event in ("began", "restarted") else "waiting" if at_work else "not begun"
        case "running":
            return ("waiting" if event == "resized" else "training") if at_work else "cut off"
        case "paused" if at_work:
            return "training" if event in ("began", "restarted") else "waiting"
        case "finished":
            return "evaluating" if at_work and event == "evaluating" else "trained"
        case "failed" if at_work and event in ("began", "restarted"):
            return "training"
    return row.state


# ---- What is shown ---------------------------------------------------------------------------------------------


def make_view(found: Mapping[str, Any], one: bool, width: int) -> RenderableType:
    """All sweeps or the `one` that was asked for, in a window of that width."""
    others = [Text(text) for text in (*map(explain_opening, found["older"]), *found["damaged"])]
    return _make_trials_table(found["sweeps"][0], width) if one else Group(_make_sweeps_table(found, width), *others)


def _make_sweeps_table(found: Mapping[str, Any], width: int) -> Table:
    rows = []
    for sweep in found["sweeps"]:
        lines = sweep.get("settings") or sweep["trials"]
        best = next((line["metrics"][sweep["metric"]] for line in lines if sweep["metric"] in line["metrics"]), None)
        rows.append(
            {
                "sweep": sweep["name"],
                "trials": str(len(sweep["trials"])),
                "best": "-" if best is None else f"{best:.3f} {sweep['metric']}",
                "states": _format_counts(sweep["trials"]),
                "driver": _describe_driver(sweep),
            }
        )
    return make_columns_table(rows, width, spare=("trials", "best"), left=("sweep", "states", "driver"))


def _make_trials_table(sweep: Mapping[str, Any], width: int) -> Group:
    """A line a trial, or one for those that differ in the seed alone."""
    settings = sweep.get("settings", ())
    lines = settings or sweep["trials"]
    names = list(dict.fromkeys(name for line in lines for name in line["params"]))
    metric, rows = sweep["metric"], list[dict[str, RenderableType]]()
    for line in lines:
        metrics, rate = line["metrics"], line["images_per_s"]
        rows.append(
            {
                **({} if settings else {"trial": line["trial"][:8]}),
                **({"starts from": _describe_start(line)} if sweep["starts"] else {}),
                **{name: line["params"].get(name, "-") for name in names},
                **({"seeds": line["seeds"]} if settings else {}),
                "state": Text(line["state"], style=COLOURS.get(line["state"], "")),
                "step": f"{line['step']:,}/{line['steps']:,}",
                "images/s": f"{rate:,.0f}" if rate else "-",
                **({"of peak": format_share(line["of_peak"])} if sweep["peaks"] else {}),
                "validation": f"{metrics[valid]:.3f}" if (valid := find_validation(metrics)) else "-",
                **({head_metric(metric): _format(line, metric)} if metric not in VALIDATIONS else {}),
                "retries": _format_retries(line),
                "heard": _format_ago(sweep["now_ms"], line["updated_ms"]),
            }
        )
    quiet = ["retries"] if all(row["retries"] == "-" for row in rows) else []
    table = make_columns_table(rows, width, spare=(*quiet, "of peak", "heard", "images/s", "validation"))
    details = [Text(f"{t['trial'][:8]}  {t['detail']}") for t in sweep["trials"] if t["detail"]]
    notes = [Text(OVER_SEEDS, style="dim")] if settings else []
    notes += [Text(f"peak: {text}", style="dim") for text in sweep["peaks"]]
    notes += [Text(f"slow: {SlowTrial(**slow)}", style="yellow") for slow in sweep["slow"]]
    head = Text(f"{sweep['name']}: {_format_counts(sweep['trials'])}; {_describe_driver(sweep)}", style="bold")
    jobs = [Text(str(QueuedJob(**job))) for job in sweep.get("jobs", ())]
    return Group(head, *jobs, table, *notes, *details)


def _describe_start(line: Mapping[str, Any]) -> str:
    """What a trial starts from, or what it is to those that start from it."""
    starts = [f"{shorten_slot(slot)} {start[:8]}" for slot, start in line["starts_from"].items()]
    return ", ".join(starts) or line["role"] or "-"


def _format(line: Mapping[str, Any], metric: str) -> str:
    """A metric of a trial or of the mean of several, with its errors."""
    errors = line.get("standard_errors_over_seeds")
    return format_metric(metric, line["metrics"]) if errors is None else format_mean(metric, line["metrics"], errors)


def _format_retries(trial: Mapping[str, Any]) -> str:
    """Of the training and of blocks of the evaluation: `1 + 2 blocks`."""
    blocks = trial["retried_blocks"]
    told = [str(trial["restarts"])] if trial["restarts"] else []
    return " + ".join([*told, f"{blocks} block{'s' * (blocks > 1)}"] if blocks else told) or "-"


def _describe_driver(sweep: Mapping[str, Any]) -> str:
    driver, ago = sweep["driver"], _format_ago(sweep["now_ms"], sweep["driver"]["heard_ms"])
    where = f"{driver['host']} (process {driver['pid']})" if driver["host"] else "somewhere"
    by_state = {
        "running": f"runs on {where}, heard {ago}",
        "ended": f"ended {ago}",
        "interrupted": f"interrupted {ago}; the same command resumes it",
        "refused": f"refused {ago} for a mistake that its command has named",
        "gone": f"its command is gone, heard last {ago}; the same command resumes it",
        "silent": f"{where} was heard last {ago}: too long ago to be at work",
        "unknown": "no command is known to have worked on it: all of it was there, or its events are gone",
    }
    return by_state[driver["state"]]


def _format_counts(trials: Sequence[Mapping[str, Any]]) -> str:
    states = [trial["state"] for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _format_ago(now_ms: int, then_ms: int | None) -> str:
    if then_ms is None:
        return "-"
    seconds = max(0, now_ms - then_ms) / 1000
    return f"{seconds:.0f} s ago" if seconds < 60 else f"{format_clock(seconds)} ago"


if __name__ == "__main__":
    sys.exit(cli.call("status", main))
