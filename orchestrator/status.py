"""`python -m orchestrator.status [SWEEP]`: how the sweeps of a storage stand, from any terminal, at any time.

It reads files alone: no Ray, no torch, and nothing is written. Exit status: 0, or 2 for the user's mistake.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.reports import archive, results
from orchestrator.reports.archive import Driver, Event, Kept
from orchestrator.reports.results import Row
from orchestrator.terminal import COLOURS, clock, columns
from workers.config import Mistake
from workers.storage import Storage

EPILOG = """examples:
  python -m orchestrator.status
  python -m orchestrator.status beta_schedule --watch
  python -m orchestrator.status beta_schedule --storage s3://bucket/runs --json"""
WATCH_S = 2.0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m orchestrator.status",
        description="How the sweeps of a storage stand, or the trials of one: read from files, without Ray.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("sweep", nargs="?", help="the sweep whose trials to show; default: all sweeps")
    result.add_argument("--watch", action="store_true", help="show it again and again, until nothing runs or ctrl-C")
    result.add_argument("--json", action="store_true", help="print it as JSON")
    result.add_argument("--storage", default="runs", help="folder or URI that keeps everything (default: ./runs)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        storage = Storage(options.storage)
        if options.watch and not options.json:
            return _watch(storage, options.sweep)
        found = look(storage, options.sweep)
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            console = _console()
            console.print(view(found, bool(options.sweep), console.width), soft_wrap=True)
        return 0
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 200)


def _watch(storage: Storage, sweep: str | None) -> int:
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = look(storage, sweep)
            live.update(view(found, bool(sweep), console.width), refresh=True)
            if all(one["driver"]["state"] != "running" for one in found["sweeps"]):
                return 0
            time.sleep(WATCH_S)


# ---- What is known ---------------------------------------------------------------------------------------------


def look(storage: Storage, sweep: str | None) -> dict[str, Any]:
    """All that there is to say, in plain types. Raises Mistake where there is no such sweep."""
    older = [] if sweep else archive.older(storage)
    if sweep is None and not (there := archive.names(storage)) and not older:
        raise Mistake(
            f"{storage.root} has no sweep yet: run one (python -m orchestrator.sweep FILE), or give its --storage"
        )
    sweeps = [_sweep(storage, archive.open_sweep(storage, name)) for name in ([sweep] if sweep else there)]
    return {"storage": storage.root, "sweeps": sweeps, "older": older}


def _sweep(storage: Storage, kept: Kept) -> dict[str, Any]:
    happened = archive.events(storage, kept.name)
    rows, now_ms = archive.rows(storage, kept, happened), time.time_ns() // 1_000_000
    locked = storage.locked(f"{kept.folder}/lock")
    driver = archive.driver(happened, locked, [r.found.status or {} for r in rows], now_ms)
    last = {event["trial"]: event for event in happened if "trial" in event}
    restarted, retried = (archive.times(happened, name) for name in ("restarted", "retried"))
    return {
        "name": kept.name,
        "metric": kept.metric,
        "now_ms": now_ms,
        "driver": asdict(driver),
        "trials": [
            {
                "trial": row.digest,
                "params": results.short_params(row.variant),
                "state": standing(row, driver, last.get(row.digest)),
                "step": (row.found.status or {}).get("step", 0),
                "steps": row.variant.trial.training.steps,
                "images_per_s": row.images_per_s,
                "metrics": row.metrics,
                "restarts": restarted[row.digest],
                "retried_blocks": retried[row.digest],
                "host": (row.found.status or {}).get("host"),
                "updated_ms": (row.found.status or {}).get("updated_ms"),
                "detail": row.error or (row.found.status or {}).get("detail") or "",
            }
            for row in results.ranked(rows, kept.metric, kept.mode)
        ],
    }


def standing(row: Row, driver: Driver, last: Event | None) -> str:
    """The state of a trial in the terminal's words; `last` is the last that happened to it.

    What the files call running is only so while a command works on it.
    """
    at_work, event = driver.state == "running", str((last or {}).get("event"))
    match row.state:
        case "new":
            return "training" if at_work and event in ("began", "restarted") else "waiting" if at_work else "not begun"
        case "running":
            return "training" if at_work else "cut off"
        case "finished":
            return "evaluating" if at_work and event == "evaluating" else "trained"
        case "failed" if at_work and event in ("began", "restarted"):
            return "training"
    return row.state


# ---- What is shown ---------------------------------------------------------------------------------------------


def view(found: Mapping[str, Any], one: bool, width: int) -> RenderableType:
    """All sweeps or the `one` that was asked for, in a window of that width."""
    older = [Text(archive.how_to_open(name)) for name in found["older"]]
    return _trials(found["sweeps"][0], width) if one else Group(_sweeps(found, width), *older)


def _sweeps(found: Mapping[str, Any], width: int) -> Table:
    rows = []
    for sweep in found["sweeps"]:
        best = next((t["metrics"][sweep["metric"]] for t in sweep["trials"] if sweep["metric"] in t["metrics"]), None)
        rows.append(
            {
                "sweep": sweep["name"],
                "trials": str(len(sweep["trials"])),
                "best": "-" if best is None else f"{best:.3f} {sweep['metric']}",
                "states": _counts(sweep["trials"]),
                "driver": _driver(sweep),
            }
        )
    return columns(rows, width, spare=("trials", "best"), left=("sweep", "states", "driver"))


def _trials(sweep: Mapping[str, Any], width: int) -> Group:
    names = list(dict.fromkeys(name for trial in sweep["trials"] for name in trial["params"]))
    measured = results.HEADS.get(sweep["metric"], sweep["metric"].removeprefix("eval/"))
    rows: list[dict[str, RenderableType]] = []
    for trial in sweep["trials"]:
        metrics, rate = trial["metrics"], trial["images_per_s"]
        rows.append(
            {
                "trial": trial["trial"][:8],
                **{name: trial["params"].get(name, "-") for name in names},
                "state": Text(trial["state"], style=COLOURS.get(trial["state"], "")),
                "step": f"{trial['step']:,}/{trial['steps']:,}",
                "images/s": f"{rate:,.0f}" if rate else "-",
                "valid NLL": f"{metrics['valid/nll_bpd']:.3f}" if "valid/nll_bpd" in metrics else "-",
                **({measured: results.with_error(sweep["metric"], metrics)} if measured != "valid/nll_bpd" else {}),
                "retries": _retries(trial),
                "heard": _ago(sweep["now_ms"], trial["updated_ms"]),
            }
        )
    quiet = ["retries"] if all(row["retries"] == "-" for row in rows) else []
    table = columns(rows, width, spare=(*quiet, "heard", "images/s", "valid NLL"))
    details = [Text(f"{t['trial'][:8]}  {t['detail']}") for t in sweep["trials"] if t["detail"]]
    return Group(Text(f"{sweep['name']}: {_counts(sweep['trials'])}; {_driver(sweep)}", style="bold"), table, *details)


def _retries(trial: Mapping[str, Any]) -> str:
    """Of the training and of blocks of the evaluation: `1 + 2 blocks`."""
    blocks = trial["retried_blocks"]
    told = [str(trial["restarts"])] if trial["restarts"] else []
    return " + ".join([*told, f"{blocks} block{'s' * (blocks > 1)}"] if blocks else told) or "-"


def _driver(sweep: Mapping[str, Any]) -> str:
    driver, ago = sweep["driver"], _ago(sweep["now_ms"], sweep["driver"]["heard_ms"])
    where = f"{driver['host']} (process {driver['pid']})" if driver["host"] else "somewhere"
    said = {
        "running": f"runs on {where}, heard {ago}",
        "ended": f"ended {ago}",
        "interrupted": f"interrupted {ago}; the same command resumes it",
        "gone": f"its command is gone, heard last {ago}; the same command resumes it",
        "silent": f"{where} was heard last {ago}: too long ago to be at work",
    }
    return said[driver["state"]]


def _counts(trials: Sequence[Mapping[str, Any]]) -> str:
    states = [trial["state"] for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _ago(now_ms: int, then_ms: int | None) -> str:
    if then_ms is None:
        return "-"
    seconds = max(0, now_ms - then_ms) / 1000
    return f"{seconds:.0f} s ago" if seconds < 60 else f"{clock(seconds)} ago"


if __name__ == "__main__":
    sys.exit(main())
