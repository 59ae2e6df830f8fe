"""`python -m orchestrator.nightly FILE`: measure the suite's models, hold them against last night and the champion.

A night has a date, that of its time of day in the suite's zone, and is done once: run again, it says so and does
nothing. Without --date it is the newest night that has begun, whatever was missed before it. Everything about it is in
nightly/<suite>/<date>/ of the storage: report.md, report.html, result.json. They are kept
before anybody is told: a hook that fails is a line in the report.

On a cluster's head, cron asks every five minutes whether a night is due, and submits it as the Ray job nightly-<date>
(nightly-<suite>-<date> where the suite has another name than that); Ray refuses a second one of that id. One that ended
without being done is followed by nightly-<date>-2 and -3. To install:

    python -m orchestrator.nightly experiments/nightly.yaml --storage S --tracking-uri U --install-cron > crontab.txt
    crontab crontab.txt

The first prints the user's crontab with the entry in it and changes nothing. `ray start` on the head needs the
environment that the hooks need. On a laptop --serve sleeps until the next night, runs it, and so on.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import cli, interrupts
from orchestrator.experiment.records import ExperimentError
from orchestrator.nights import hooks
from orchestrator.nights.calendar import find_last_night, find_next_run, parse_date, say, write_crontab
from orchestrator.nights.suite import Suite, load
from workers.config import Mistake, hide_secrets
from workers.layout import name_nights_folder

JOBS = "http://127.0.0.1:8265"  # Ray's dashboard on the head, which takes jobs
ATTEMPTS = 3  # jobs that a night gets, where it ends without being done
PASSED_ON = (  # of the environment, into the crontab: cron gives none. Secrets stay out of it
    "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",
)  # fmt: skip
EXAMPLES = (
    "experiments/nightly.yaml --date 2026-11-23",
    "experiments/nightly.yaml schedule.at=04:15 --serve",
    "experiments/nightly.yaml --storage s3://bucket/runs --install-cron",
)


def make_parser() -> argparse.ArgumentParser:
    endings = {
        cli.DONE: "all models are measured, and none is worse",
        cli.SOME_FAILED: "something could not be measured; the same command goes on with that",
        cli.ALARM: "a regression, numbers that moved by themselves, or a canary that is off",
        cli.CLUSTER_LOST: "",
        cli.INTERRUPTED: "",
    }
    result = cli.make_parser("nightly", "FILE [a.b=value ...]", EXAMPLES, endings=endings)
    result.add_argument("file", type=Path, metavar="FILE", help="the nightly file (YAML)")
    cli.add_overrides(result, "settings that replace the file's")
    when = result.add_mutually_exclusive_group()
    when.add_argument("--date", help="the night's date; default: the newest night that has begun")
    when.add_argument("--serve", action="store_true", help="sleep until the next night, run it, and so on")
    when.add_argument("--submit", nargs="?", const=JOBS, metavar="URL", help=f"run it as a Ray job (default: {JOBS})")
    when.add_argument("--install-cron", action="store_true", help="print the crontab that submits every night")
    result.add_argument("--promote", action="store_true", help="move `champion` to a candidate that is clearly better")
    cli.add_ray_address(result)
    cli.add_storage(result)
    cli.add_trust(result)
    cli.add_tracking_uri(result, "the file's, or a database in the storage")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="The same night goes on where this one stopped.")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    overrides = [*options.overrides, *["promote=true"][: options.promote]]
    if options.tracking_uri:
        overrides.append(f"tracking.uri={options.tracking_uri}")
    suite = load(options.file, overrides)
    if options.install_cron:
        print(write_crontab(_read_crontab(), suite.label, _make_cron_command(options, suite)), end="")
        return cli.DONE
    if options.submit:
        return submit(options, suite)
    if problems := hooks.find_missing(suite.hooks, os.environ):
        raise ExperimentError(problems, str(options.file))
    if options.serve:
        return serve(options, suite)
    now = datetime.now(UTC)
    day = parse_date(options.date, now, suite.schedule) if options.date else find_last_night(now, suite.schedule)
    from orchestrator.nights import shift  # torch, ray and MLflow load here: a slip is told without

    return shift.run(suite, day, options.storage, options.ray_address)


# ---- When ------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, suite: Suite) -> int:
    """Runs every night until ctrl-C; first the newest that has begun, if nobody did."""
    from orchestrator.nights import shift

    interrupts.arm()
    while True:
        try:
            shift.run(suite, find_last_night(datetime.now(UTC), suite.schedule), options.storage, options.ray_address)
        except Mistake as mistake:  # may be another tomorrow: an alias, a server, another process at it
            say(suite.schedule, str(mistake))
        due = find_next_run(datetime.now(UTC), suite.schedule)
        local = due.astimezone(suite.schedule.tz)
        say(
            suite.schedule,
            f"the next night begins at {local:%Y-%m-%d %H:%M %Z} ({suite.schedule.zone}); ctrl-C ends it",
        )
        try:
            while (left := (due - datetime.now(UTC)).total_seconds()) > 0:
                time.sleep(min(left, 60))  # in short naps: a laptop that was closed wakes up late
        except KeyboardInterrupt:
            return cli.DONE


def submit(options: argparse.Namespace, suite: Suite) -> int:
    """Hands the newest night that has begun to a cluster as a Ray job, unless it is done or at work.

    One that ended without being done, as its machine was lost or something could not be measured, gets ATTEMPTS in all.
    Raises Mistake where the cluster does not answer.
    """
    from orchestrator.clusters.sending import list_code
    from orchestrator.clusters.submission import CODE, submit_again
    from workers.storage import Storage

    day = find_last_night(datetime.now(UTC), suite.schedule)
    result = Storage(options.storage).read_sealed(
        f"{name_nights_folder(suite.name)}/{day}/result.json", "the night is run again"
    )
    if result and result["state"] == "complete" and result["recorded"] and result.get("told", True):
        return cli.DONE
    name, code = f"{suite.label}-{day}", list_code([suite])
    words = ["python", "-m", "orchestrator.nightly", options.file.name, *_repeat_words(options)]
    words += [f"code=[{CODE}]"] if code else []
    words += ["--date", str(day), "--address", options.ray_address or "auto"]
    if job := submit_again(options.submit, name, options.file, words, ATTEMPTS, code=code):
        say(suite.schedule, f"submitted the job {job}; ray job logs {job} shows it")
    else:
        say(suite.schedule, f"nothing to submit: a job of {name} is at work, or {ATTEMPTS} have ended")
    return cli.DONE


def _repeat_words(options: argparse.Namespace) -> list[str]:
    """The words of this command after its file, for a process that starts in another folder."""
    from workers.storage import Storage

    words = [*options.overrides, "--storage", Storage(options.storage).root]
    words += ["--tracking-uri", options.tracking_uri] if options.tracking_uri else []
    return words + ["--promote"] * options.promote + ["--trust-code"] * options.trust_code


def _make_cron_command(options: argparse.Namespace, suite: Suite) -> str:
    given = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
    if shown := [word for word in [*given, *_repeat_words(options)] if hide_secrets(word) != word]:
        raise Mistake(f"{', '.join(shown)}: holds a secret, which the crontab would show; leave it out")
    words = ["env", *given] if given else []
    words += [sys.executable, "-m", "orchestrator.nightly", str(options.file.absolute()), *_repeat_words(options)]
    words += ["--submit"] + (["--address", options.ray_address] if options.ray_address else [])
    return f'{shlex.join(words)} >> "$HOME"/{shlex.quote(suite.label)}.log 2>&1'


def _read_crontab() -> str:
    """The user's crontab; empty where there is none. Raises Mistake where it cannot be read."""
    try:
        done = subprocess.run(["crontab", "-l"], capture_output=True, text=True, errors="surrogateescape", check=False)
    except FileNotFoundError:
        print("There is no crontab program here: this is the entry alone.", file=sys.stderr)
        return ""
    if done.returncode and "no crontab" not in done.stderr:
        raise Mistake(f"crontab -l: {done.stderr.strip()}; not printed, as installing it would lose what is there")
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(cli.call("nightly", main))
