"""What a terminal shows: the live table at any size, plain lines elsewhere, and no libraries in between."""

import io
import logging
import re
import warnings
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.output.terminal import (
    Display,
    Line,
    choose_fitting,
    estimate_time_left,
    format_clock,
    format_counts,
    show_messages,
)

LINES = {
    "aaaaaaaa11": Line("T=50 weighting=simple", 300, 128, "done", 300, 2.598, 1011.0),
    "bbbbbbbb22": Line("T=100 weighting=simple", 300, 128, "evaluating", 300, 2.6, 720.0, blocks=12, blocks_left=5),
    "cccccccc33": Line("T=50 weighting=vlb", 300, 128, "training", 150, 2.9, 640.0),
    "dddddddd44": Line("T=100 weighting=vlb", 300, 128),
}


def shown(lines: dict[str, Line], width: int = 120, height: int = 24, **options: bool) -> str:
    """The screen after one refresh in a terminal of that size."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, height=height, color_system=None)
    display = Display(lines, console, **options)
    display.cluster = "2.9 of 3 CPUs busy"
    with display:
        display.refresh(force=True)
    return text.getvalue()


def test_the_live_table_says_how_each_trial_stands() -> None:
    text = shown(LINES)
    for message in ("1 training, 1 evaluating, 1 waiting, 1 done", "training ends in about 1:13", "2.9 of 3 CPUs busy",
                 "aaaaaaaa", "evaluating 7/12", "150/300", "2.900", "1,011", "0:30"):  # fmt: skip
        assert message in text, message


def test_more_trials_than_the_window_is_high_leave_out_those_that_rest() -> None:
    lines = {f"{i:08}": Line(f"lr={i}", 100, 8, "done" if i < 30 else "waiting") for i in range(60)}
    lines |= {"busy0000": Line("lr=7", 100, 8, "training", 3), "lost0000": Line("lr=8", 100, 8, "failed")}
    text = shown(lines, height=20)
    assert "busy0000" in text and "lost0000" in text and "and 17 waiting, 30 done" in text
    some, rest = choose_fitting(lines, 15)
    assert len(some) == 14 and not set(some) & set(rest) and len(some) + len(rest) == len(lines)
    assert some == [digest for digest in lines if digest in some], "the order of the experiment stays"


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_a_narrow_window_breaks_no_line(width: int) -> None:
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(LINES, width=width)).split("trial ")[1].splitlines()
    assert [row.split()[0] for row in screen[1:5]] == [digest[:8] for digest in LINES]
    assert all(
        state in row for row, state in zip(screen[1:5], ("done", "evaluating 7/12", "training", "waiting"), strict=True)
    )
    assert all(len(row) <= width for row in screen)


@pytest.mark.parametrize(("width", "gone"), [(120, ()), (80, ("progress",)), (60, ("progress", "left", "images/s"))])
def test_what_was_searched_is_seen_whole_and_other_columns_give_way(width: int, gone: tuple[str, ...]) -> None:
    lines = {
        digest: replace(line, params=dict(word.split("=") for word in line.name.split()))
        for digest, line in LINES.items()
    }
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(lines, width=width)).splitlines()
    [heads, *_] = [row.split() for row in screen if row.startswith("trial")]
    every = ["trial", "T", "weighting", "state", "progress", "step", "validation", "images/s", "left"]
    assert heads == [head for head in every if head not in gone]
    assert [row.split()[1:3] for row in screen if row[:8] in {digest[:8] for digest in LINES}][:4] == [
        ["50", "simple"], ["100", "simple"], ["50", "vlb"], ["100", "vlb"]
    ]  # fmt: skip
    assert all(len(row) <= width for row in screen)


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    display = Display(LINES, Console(file=text, width=200))
    with display:
        display.say("cccccccc  train  new")
        display.say("aaaaaaaa  nothing  done", detail=True)
        display.show_change("cccccccc33")
        display.refresh(force=True)
    first, second = text.getvalue().splitlines()
    assert first == "cccccccc  train  new"
    assert second.startswith("cccccccc  training    step 150/300  valid/nll_bpd 2.900  640 images/s")


@pytest.mark.parametrize(("quiet", "verbose", "lines"), [(True, False, 0), (False, False, 1), (False, True, 2)])
def test_three_loudnesses(quiet: bool, verbose: bool, lines: int) -> None:
    text = io.StringIO()
    display = Display(LINES, Console(file=text, width=200), quiet, verbose)
    display.say("a decision")
    display.say("a detail", detail=True)
    assert len(text.getvalue().splitlines()) == lines


@pytest.mark.parametrize(("verbose", "expected"), [(False, ["warning: ours", "error: lib: broken"]), (True, None)])
def test_libraries_are_heard_where_it_matters(verbose: bool, expected: list[str] | None) -> None:
    text = io.StringIO()
    before = list(logging.getLogger().handlers)
    with show_messages(Console(file=text, width=200), verbose=verbose):
        logging.getLogger("orchestrator.tracking.tracker").warning("ours")
        logging.getLogger("somelibrary.runtime").warning("a library's")
        logging.getLogger("lib.loop").error("broken")
        warnings.warn("deprecated", UserWarning, stacklevel=1)
    message = text.getvalue().splitlines()
    if expected is not None:
        assert message == expected
    else:
        assert "warning: somelibrary: a library's" in message and any("deprecated" in line for line in message)
    assert logging.getLogger().handlers == before, "afterwards all is as it was"


def test_times_and_counts() -> None:
    assert [format_clock(s) for s in (5, 65, 3700, 200_000)] == ["0:05", "1:05", "1:01:40", "2 d 7:33"]
    assert format_counts(LINES.values()) == "1 training, 1 evaluating, 1 waiting, 1 done"
    assert estimate_time_left([Line("a", 10, 8)], 1) == "", "nothing is known before a trial has run"
    ran, waits = Line("a", 100, 10, "done", 100, images_per_s=50), Line("b", 100, 10)
    assert estimate_time_left([ran, waits, waits], 2) == "training ends in about 0:20"
    assert estimate_time_left([ran, waits], 2) == "training ends in about 0:20", "one trial runs in one place"


def test_while_a_trial_is_not_heard_no_time_is_promised() -> None:
    lines = [
        Line("a", 100, 10, "training", 50, images_per_s=10.0),
        Line("b", 100, 10, "training", 50, images_per_s=10.0),
    ]
    assert "training ends" in estimate_time_left(lines, 2) and lines[0].left == "0:50"
    lines[0].silent_s = 75.0
    assert estimate_time_left(lines, 2) == "" and lines[0].left == "not heard for 1:15" and lines[1].left == "0:50"
