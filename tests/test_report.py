"""What a sweep's storage keeps of it, and the report and status that are made of that: no Ray, no torch."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from stored_sweep import FOUR, SOURCE, Page, experiment, stored

from orchestrator import report as verb
from orchestrator import status
from orchestrator.experiment.expand import expand
from orchestrator.experiment.records import Variant
from orchestrator.output import curves, figures, findings, page
from orchestrator.output.importance import compute_importance
from orchestrator.output.markdown import write_markdown
from orchestrator.state.events import Driver, EventLog, find_driver, list_failures, measure_use, read_events
from orchestrator.state.rows import Found, Row
from orchestrator.state.saved import keep_sweep, open_sweep
from workers.config import DataConfig
from workers.layout import RowId
from workers.locks import lock
from workers.storage import Storage


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    storage, addresses = stored(tmp_path, FOUR)
    events = EventLog(storage, "small")
    events.add("started", host="h", pid=1, trials=4)
    events.add("restarted", addresses[0], step=5, why="<script>alert(1)</script> died; it starts again")
    events.add("retried", addresses[1], piece="samples-1/block-00007.parquet", why="its process died")
    events.add("ended")
    events.flush()
    content = page.render_report(findings.gather(storage, "small"))
    read = Page(content)
    text = " ".join(" ".join(read.text).split())
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in read.loads)
    assert not re.search(r"url\((?!#)", content) and "@import" not in content
    for address in addresses:
        assert address[:8] in text
    for message in ("Trials", "What matters", "NLL against distance", "Where the bits go", "Noise schedules",
                 "Rate and distortion", "Fewer steps", "Validation while training", "Samples", "Cost",
                 "Faults and retries", "How it was measured", "few samples", "2.400 ± 0.050", "≈ best"):  # fmt: skip
        assert message in text, message
    assert content.count("<svg") == len(curves.PLOTS) - 5 and content.count("data:image/png") == 4
    assert "samples-1/block-00007.parquet; its process died" in text
    assert "<script" not in content and "&lt;script&gt;alert(1)" in content
    identifiers = re.findall(r'\bid="([^"]+)"', content)
    assert len(identifiers) == len(set(identifiers)), "two drawings of a page must not share their ids"
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", content))
    assert used <= set(identifiers)


def test_a_page_can_be_made_at_any_moment_of_a_sweep(tmp_path: Path) -> None:
    for some in ({}, {0: FOUR[0]}, {0: FOUR[0], 3: FOUR[3]}):
        storage, _ = stored(tmp_path / str(len(some)), some)
        made = findings.gather(storage, "small")
        Page(page.render_report(made))
        assert f"{len(some)} / 4" in page.render_report(made)
        assert ("Best of" in findings.write_verdict(made)) == bool(some)
        assert write_markdown(made).count("| ") > 4


def test_the_same_storage_gives_the_same_page(tmp_path: Path) -> None:
    storage, _ = stored(tmp_path, FOUR)
    first, second = (page.render_report(findings.gather(storage, "small")) for _ in range(2))
    assert [line for line in first.splitlines() if "as of" not in line] == [
        line for line in second.splitlines() if "as of" not in line
    ]


def test_marks_what_cannot_be_told_from_the_best(tmp_path: Path) -> None:
    storage, _ = stored(tmp_path, FOUR)
    table = page.list_entries(findings.gather(storage, "small"))
    assert [entry.mark for entry in table] == ["best", "same", "", ""]
    whiskers = [entry.whisker for entry in table if entry.whisker]
    assert min(w.low for w in whiskers) == 0 and abs(max(w.high for w in whiskers) - 100) < 1e-9
    assert "cannot be told from one other" in findings.write_verdict(findings.gather(storage, "small"))


def test_markdown_is_for_a_pull_request(tmp_path: Path) -> None:
    storage, _ = stored(tmp_path, FOUR)
    text = write_markdown(findings.gather(storage, "small"))
    assert text.startswith("## Sweep `small`") and text.count("| done |") == 4
    assert "explained by each setting" in text and "<details>" in text and "Faults and retries: none" in text


def test_a_sweep_that_is_not_there_is_a_mistake_that_names_those_that_are(tmp_path: Path, capsys: Any) -> None:
    stored(tmp_path, {})
    for command in (verb, status):
        assert command.main(["smal", "--storage", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert "did you mean 'small'" in message and "Sweeps there: small" in message
        assert command.main(["../small", "--storage", str(tmp_path)]) == 2
    assert status.main(["--storage", str(tmp_path / "nothing")]) == 2
    assert not (tmp_path / "nothing").exists()


def test_trials_and_settings_stay_in_the_order_of_the_experiment(tmp_path: Path) -> None:
    of = experiment(space={"loss.weighting": {"grid": ["vlb", "simple"]}, "diffusion.T": {"grid": [50, 20]}})
    trials = {RowId(f"{9 - i}{'abcdef012345678'}"): v for i, v in enumerate(expand(of))}
    keep_sweep(Storage(tmp_path), of, trials, {DataConfig(source="digits"): SOURCE})
    kept = open_sweep(Storage(tmp_path), "small")
    assert list(kept.trials.items()) == list(trials.items())
    assert [list(v.params) for v in kept.trials.values()] == [["loss.weighting", "diffusion.T"]] * 4


def test_a_sweep_of_an_older_version_is_told_with_what_to_do(tmp_path: Path, capsys: Any) -> None:
    storage = Storage(tmp_path)
    storage.write("sweeps/early/results.parquet", b"")
    storage.write("sweeps/locked/lock", b"")  # of a sweep that only begins
    for command in (verb, status):
        assert command.main(["early", "--storage", str(tmp_path)]) == 2
        assert (
            "older version" in (message := capsys.readouterr().err) and "Run the sweep command with --fresh" in message
        )
        assert command.main(["locked", "--storage", str(tmp_path)]) == 2
        assert "Sweeps there: early" in capsys.readouterr().err
    assert status.main(["--storage", str(tmp_path)]) == 0
    assert "early: made by an older version" in capsys.readouterr().out
    stored(tmp_path, {})
    assert status.main(["--storage", str(tmp_path)]) == 0
    message = capsys.readouterr().out
    assert "early: made by an older version" in message and "4 not begun" in message and "locked" not in message


# ---- What matters ----------------------------------------------------------------------------------------------


def test_shares_of_a_full_grid_without_interplay_add_up_to_one() -> None:
    params: list[dict[str, Any]] = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]
    values = [10 * p["a"] + "xyz".index(p["b"]) for p in params]
    a, b = compute_importance(params, values)
    assert (a.name, b.name) == ("a", "b") and abs(a.share + b.share - 1) < 1e-12
    # Sums of squares by hand: 6 x 5^2 between the a, 2 x (1 + 0 + 1) between the b.
    assert abs(a.share - 150 / 154) < 1e-12 and abs(b.share - 4 / 154) < 1e-12
    assert (a.chance, b.chance) == (1 / 5, 2 / 5)
    assert [(level.label, level.mean, level.trials) for level in a.levels] == [("1", 11.0, 3), ("2", 21.0, 3)]


def test_an_interplay_belongs_to_no_setting() -> None:
    params: list[dict[str, Any]] = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    assert [s.share for s in compute_importance(params, [p["a"] ^ p["b"] for p in params])] == [0, 0]


def test_numbers_that_were_drawn_are_put_into_ranges() -> None:
    [lr] = compute_importance([{"lr": x / 100} for x in range(40)], [float(x // 10) for x in range(40)])
    assert abs(lr.share - 1) < 1e-12 and [level.trials for level in lr.levels] == [10] * 4


def test_says_nothing_of_too_few_trials_or_of_no_difference() -> None:
    assert compute_importance([{"a": 1}, {"a": 2}, {"a": 3}], [1.0, 2.0, 3.0]) == []
    assert compute_importance([{"a": i} for i in range(5)], [1.0] * 5) == []


def test_the_front_is_of_the_objectives_of_the_search(tmp_path: Path) -> None:
    """Trial 0 is the best by both bounds, and the distance falls from trial to trial."""
    texts = {}
    for also, members in ((["valid/nll_bpd"], 1), (["eval/fd_classifier", "valid/nll_bpd"], 4)):
        storage, addresses = stored(tmp_path / str(len(also)), FOUR, also=also)
        found = findings.gather(storage, "small")
        assert [row.digest for row in found.front] == addresses[:members]
        texts[len(also)] = page.render_report(found)
        assert texts[len(also)].count("<svg") == len(curves.PLOTS) + len(also) - 6
        assert ("Front of NLL bits/dim, " in write_markdown(found)) == (members > 1)
    assert "The front of NLL bits/dim, validation bits/dim" in texts[1] and "is the best in both" in texts[1]
    assert "The front of NLL bits/dim, fd_classifier, validation bits/dim" in texts[2]
    assert "no other beats in all (4 of 4)" in texts[2]


def test_where_settings_were_drawn_a_forest_says_what_matters(tmp_path: Path) -> None:
    space = {"training.lr": {"uniform": [0.001, 0.002]}, "model.dropout": {"uniform": [0.0, 0.5]}}
    drawn = {"space": space, "algorithm": "random", "samples": 24}
    lrs = [v.trial.training.lr for v in expand(experiment(**drawn))]
    storage, _ = stored(tmp_path, {i: [2.0 + 500 * lr, 2.1 + 500 * lr] for i, lr in enumerate(lrs)}, **drawn)
    found = findings.gather(storage, "small")
    grown = findings.grow_trees(found)
    assert grown and grown.explained > 0.8 and list(grown.weights) == ["lr", "dropout"]
    assert f"A random forest explains {grown.explained:.0%}" in " ".join(Page(page.render_report(found)).text)
    assert "What it loses of that when one is shuffled" in write_markdown(found)
    few = stored(tmp_path / "few", FOUR, **drawn)[0]
    assert findings.grow_trees(findings.gather(few, "small")) is None


def test_of_many_trials_the_best_have_curves_and_all_have_points(tmp_path: Path) -> None:
    """The last is the best by both objectives."""
    n, space = 120, {"training.lr": {"grid": [i / 1e5 for i in range(1, 121)]}}
    storage, addresses = stored(tmp_path, {i: [3.0 - i / 100] for i in range(n)}, space=space)
    found = findings.gather(storage, "small")
    best = addresses[: n - findings.CURVES - 1 : -1]
    assert [row.digest for row in found.with_curves] == best == list(found.journals)
    for draw in (curves.draw_bits, curves.draw_rates, curves.draw_chains, curves.draw_validation, curves.draw_front):
        [plot] = draw(found)
        assert figures.to_svg(plot).count("<title>") == findings.CURVES
    [front] = curves.draw_front(found)
    axes = Figure().subplots()
    front.draw(axes, figures.LIGHT)
    assert sum(line.get_xydata().shape[0] for line in axes.lines) == n
    assert "Of 120 trials the best 100 have curves" in " ".join(Page(page.render_report(found)).text)


# ---- What happened ---------------------------------------------------------------------------------------------


def happened(*events: tuple[float, str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"time_ms": int(1000 * second), "event": event, **({"trial": trial} if trial else {}), **what}
        for second, event, trial, what in events
    ]


def test_use_counts_what_trials_held_of_the_cluster_over_all_commands() -> None:
    one, block = {"cpus": 1, "gpus": 0}, {"core_s": 4.0, "gpu_s": 0.0}
    use = measure_use(
        happened(
            (0, "started", "", {}),
            (10, "cluster", "", {"cpus": 4.0, "gpus": 0.0}),
            (20, "began", "a", one),
            (30, "restarted", "a", {}),
            (35, "began", "a", one),
            (50, "trained", "a", {"state": "finished"}),
            (60, "measured", "a", block),
            # The command is killed, and another one goes on where it stopped.
            (1000, "started", "", {}),
            (1000, "cluster", "", {"cpus": 4.0, "gpus": 0.0}),
            (1010, "began", "b", {"cpus": 2, "gpus": 0}),
            (1030, "interrupted", "", {}),
        )
    )
    assert use.wall_s == 50 + 30 and use.capacity == 4 * 80
    assert use.by_trial == {("a", "training"): 10 + 15, ("a", "evaluation"): 4, ("b", "training"): 40}
    assert use.utilisation == 69 / 320 and use.slot == "core"


def test_a_cluster_with_gpus_is_counted_in_them() -> None:
    use = measure_use(
        happened(
            (0, "started", "", {}),
            (0, "cluster", "", {"cpus": 64.0, "gpus": 8.0}),
            (0, "began", "a", {"cpus": 4, "gpus": 4}),
            (100, "trained", "a", {"state": "finished"}),
            (200, "measured", "a", {"core_s": 9.0, "gpu_s": 100.0}),
        )
    )
    assert (use.slot, use.busy, use.capacity) == ("GPU", 500, 1600)


def test_failures_are_those_of_the_last_command() -> None:
    first = [(0, "started", "", {}), (1, "failed", "a", {"why": "memory"}), (1, "failed", "b", {"why": "disk"})]
    assert list_failures(happened(*first)) == {"a": "memory", "b": "disk"}
    assert list_failures(happened(*first, (2, "started", "", {}), (3, "failed", "b", {"why": "x"}))) == {"b": "x"}


@pytest.mark.parametrize(
    ("last", "locked", "age_s", "expected"),
    [
        ("began", True, 1, "running"),
        ("began", False, 1, "gone"),  # killed: a lock is freed by the system
        ("ended", False, 1, "ended"),
        ("interrupted", False, 1, "interrupted"),
        ("began", None, 5, "running"),  # a remote storage has no locks: the last sign decides
        ("began", None, 3600, "silent"),
    ],
)
def test_whether_a_command_is_at_work(last: str, locked: bool | None, age_s: float, expected: str) -> None:
    events = happened((0, "started", "", {"host": "h", "pid": 7}), (10, last, "", {}))
    found = find_driver(events, locked, [], 10_000 + int(1000 * age_s))
    assert (found.state, found.host, found.pid, found.heard_ms) == (expected, "h", 7, 10_000)


def test_events_are_kept_over_commands_and_never_half(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for started in range(2):
        events = EventLog(storage, "small")
        events.add("started", pid=started)
        for _ in range(3):
            events.add("began", "a", step=1)
        events.flush()
    found = read_events(storage, "small")
    assert [e["event"] for e in found] == ["started", "began", "began", "began"] * 2
    assert [e["pid"] for e in found if "pid" in e] == [0, 1] and all(e["time_ms"] > 0 for e in found)


# ---- Status ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "at_work", "last", "expected"),
    [
        (None, "running", "decided", "waiting"),
        (None, "running", "began", "training"),
        (None, "gone", "began", "not begun"),
        ("running", "running", "began", "training"),
        ("running", "gone", "began", "cut off"),
        ("finished", "running", "evaluating", "evaluating"),
        ("finished", "gone", "evaluating", "trained"),
        ("diverged", "ended", "trained", "diverged"),
        ("pruned", "running", "trained", "pruned"),
    ],
)
def test_the_state_of_a_trial(state: str | None, at_work: str, last: str, expected: str) -> None:
    variant = expand(experiment())[0]
    found = Found({"state": state, "step": 5} if state else None, "c" if state == "finished" else None, steps=10)
    row = Row(RowId("a"), variant, found)
    assert status.describe_standing(row, Driver(at_work), {"event": last}) == expected


def test_status_shows_sweeps_and_trials(tmp_path: Path, capsys: Any) -> None:
    storage, addresses = stored(tmp_path, {0: FOUR[0]})
    events = EventLog(storage, "small")
    events.add("started", host="h", pid=1, trials=4)
    events.add("restarted", addresses[0], step=5, why="its process died")
    for _ in range(2):
        events.add("retried", addresses[0], piece="a block", why="it was damaged")
    events.flush()
    with lock(storage, "sweeps/small/lock"):
        assert status.main(["--storage", str(tmp_path)]) == 0
        message = capsys.readouterr().out
        assert "small" in message and "1 done, 3 waiting" in message and "runs on h (process 1)" in message
    assert status.main(["small", "--storage", str(tmp_path)]) == 0
    message = capsys.readouterr().out
    assert (
        "1 + 2 blocks" in message and "10/10" in message and "0/10" in message and "the same command resumes" in message
    )
    assert all(address[:8] in message for address in addresses)
    assert status.main(["small", "--json", "--storage", str(tmp_path)]) == 0
    [sweep] = json.loads(capsys.readouterr().out)["sweeps"]
    assert [t["state"] for t in sweep["trials"]] == ["done", "not begun", "not begun", "not begun"]
    assert sweep["driver"]["state"] == "gone" and sweep["trials"][0]["metrics"]["eval/nll_bpd"] == pytest.approx(2.4)
    assert status.main(["small", "--watch", "--storage", str(tmp_path)]) == 0  # nothing runs: it ends by itself


def test_status_and_report_import_neither_torch_nor_ray_nor_mlflow(tmp_path: Path) -> None:
    stored(tmp_path, FOUR)
    code = (
        "import sys; from orchestrator import status, report; "
        f"assert status.main(['small', '--storage', {str(tmp_path)!r}]) == 0; "
        f"assert report.main(['small', '--storage', {str(tmp_path)!r}]) == 0; "
        "print(sorted({'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr
    assert (tmp_path / "sweeps/small/report.html").stat().st_size > 20_000


def test_several_training_steps_are_curves_of_the_bound_and_of_the_distance(tmp_path: Path) -> None:
    """A line for each other setting; MLflow has them as files."""
    space = {"training.steps": {"grid": [10, 20]}, "loss.weighting": {"grid": ["simple", "vlb"]}}
    stored(tmp_path, FOUR, space=space)
    report = findings.gather(Storage(tmp_path), "small")
    bound, distance = curves.draw_training_steps(report)
    assert [bound.name, distance.name] == ["training-steps-nll_bpd", "training-steps-fd_classifier"]
    assert page.render_report(report).count("Over training") == 1
    assert {"training-steps-nll_bpd.png", "training-steps-fd_classifier.png"} <= curves.draw_png_files(report).keys()


def test_averages_made_afterwards_are_drawn_by_their_width_and_held_against_stored_ones(tmp_path: Path) -> None:
    stored(tmp_path, FOUR)
    report = findings.gather(Storage(tmp_path), "small")
    error = {"profile_error": 0.007, "times_kept": 20, "stored_width": 0.1, "stored_profile_error": 0.0091}
    error |= {"stored_error": 1.2e-4, "other_width": 0.05, "other_apart": 0.034}

    def measure(row: Row, width: float) -> Row:
        trial = row.variant.trial
        evaluation = trial.evaluation.model_copy(update={"ema_width": width})
        variant = Variant(
            params={"evaluation.ema_width": width}, trial=trial.model_copy(update={"evaluation": evaluation})
        )
        summary = {**(row.found.summary or {}), "average": {"width": width, **error}}
        return replace(row, variant=variant, found=replace(row.found, summary=summary))

    made = replace(report, rows=[measure(row, w) for row, w in zip(report.rows, (0.03, 0.05, 0.08, 0.2), strict=True)])
    bound, distance = curves.draw_widths(made)
    assert [bound.name, distance.name] == ["widths-nll_bpd", "widths-fd_classifier"]
    assert {"widths-nll_bpd.png", "widths-fd_classifier.png"} <= curves.draw_png_files(made).keys()
    told = "width 0.08, made of averages that were kept 20 times: its profile is off by 0.007 of its norm. The"
    for text in (" ".join(Page(page.render_report(made)).text), write_markdown(made)):
        assert told in text and "is off by 0.00012 of its norm; from that of width 0.05 it is 0.034 away" in text
    assert "Averages made afterwards" not in page.render_report(report)
