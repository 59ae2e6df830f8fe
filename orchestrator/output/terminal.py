"""What the user sees while a sweep runs: a live table in a terminal, plain lines anywhere else.

Three loudnesses: quiet prints the result alone; the usual one also decisions with their reasons; verbose also what was
left alone and why, and whatever the libraries have to say, which is otherwise kept out of the way.
"""

import logging
import os
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workers.bits import VALIDATIONS

REFRESH_S = 0.5
# What is under way comes first where the window is too low for all trials.
STATES = ("failed", "evaluating", "training", "diverged", "paused", "waiting", "pruned", "done")
COLOURS = {
    "training": "cyan", "evaluating": "magenta", "done": "green", "pruned": "yellow", "diverged": "yellow",
    "failed": "bold red", "waiting": "dim", "paused": "yellow",
}  # fmt: skip

SPARE = ("progress", "left", "images/s")  # columns that a narrow window does without, the first of them first
BAR = 12  # the width of a bar of progress


@dataclass
class Line:
    """One trial, as it stands."""

    name: str  # the searched values, in short
    steps: int
    batch_size: int
    state: str = "waiting"  # a name in STATES
    step: int = 0
    valid_bpd: float | None = None  # the last validation
    images_per_s: float = 0.0
    blocks: int = 0  # of the evaluation
    blocks_left: int = 0
    shares: bool = False  # the trial of a line before it, whose training is told and counted there
    silent_s: float = 0.0  # its processes, or one of them, have not been heard for so long
    validation: str = VALIDATIONS[0]  # the name of `valid_bpd`
    params: Mapping[str, str] = field(default_factory=dict)  # the searched values by name: a column each

    @property
    def images_left(self) -> int:
        training = self.state in ("waiting", "training") and not self.shares
        return (self.steps - self.step) * self.batch_size if training else 0

    @property
    def left(self) -> str:
        """The time that its training still takes; empty where nothing is known."""
        if self.silent_s and self.state == "training":
            return f"not heard for {format_clock(self.silent_s)}"
        training = self.state == "training" and self.images_per_s
        return format_clock(self.images_left / self.images_per_s) if training else ""


class Display:
    """Shows `lines` by digest. Use as a context; call `show_change` after a trial's line has changed."""

    def __init__(
        self, lines: MutableMapping[Any, Line], console: Console, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.lines, self.console, self.quiet, self.verbose = lines, console, quiet, verbose
        self.cluster = ""  # what the cluster is at, in words
        live = console.is_terminal and not quiet
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self._refreshed, self._most = 0.0, 1

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, detail: bool = False) -> None:
        """A line that stays: a decision with its reason. A `detail` is for the verbose alone."""
        if self.verbose or not (self.quiet or detail):
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show_change(self, digest: str) -> None:
        """Tells of a trial's new line, once a call where there is no terminal."""
        line = self.lines[digest]
        if self._live:
            self.refresh(force=True)
        else:
            valid = "" if line.valid_bpd is None else f"  {line.validation} {line.valid_bpd:.3f}"
            rate = f"  {line.images_per_s:,.0f} images/s" if line.images_per_s else ""
            left = estimate_time_left(self.lines.values(), self._estimate_at_once())
            self.say(
                f"{digest[:8]}  {line.state:<10}  step {line.step}/{line.steps}{valid}{rate}  {line.name}"
                + f"  {left}" * bool(left)
            )

    def _estimate_at_once(self) -> int:
        """How many trials have been in training at the same time: between two, a place is free for a moment only."""
        self._most = max(self._most, sum(line.state == "training" for line in self.lines.values()))
        return self._most

    @property
    def due(self) -> bool:
        """Whether a `refresh` would show something new."""
        return self._live is not None and time.monotonic() - self._refreshed > REFRESH_S

    def refresh(self, force: bool = False) -> None:
        if self._live and (force or self.due):
            self._refreshed = time.monotonic()
            self._live.update(self._make_view(), refresh=True)

    def _make_view(self) -> Group:
        told = [
            format_counts(self.lines.values()),
            estimate_time_left(self.lines.values(), self._estimate_at_once()),
            self.cluster,
        ]
        shown, rest = choose_fitting(self.lines, self.console.height - 4)
        lines = {digest: self.lines[digest] for digest in shown}
        names = list(dict.fromkeys(name for line in lines.values() for name in line.params))
        rows = [_make_cells(digest, line, names) for digest, line in lines.items()]
        if names and not is_fitting(rows, self.console.width, SPARE):
            rows = [
                _make_cells(digest, line, []) for digest, line in lines.items()
            ]  # the values in one column, cut short
        table = make_columns_table(
            rows, self.console.width, SPARE, left=("trial", "", "state", "progress"), style="dim"
        )
        head = Text("  ·  ".join(filter(None, told)), style="bold", no_wrap=True, overflow="ellipsis")
        parts: list[Table | Text] = [head, table]
        if rest:
            parts.append(Text(f"and {format_counts(self.lines[digest] for digest in rest)}", style="dim"))
        return Group(Text(""), *parts)


def _make_cells(digest: str, line: Line, names: Sequence[str]) -> dict[str, RenderableType]:
    """A row of the live table: the searched values under their `names`, or all in one column without a head."""
    blocks = f" {line.blocks - line.blocks_left}/{line.blocks}" if line.state == "evaluating" else ""
    return {
        "trial": digest[:8],
        **(
            {name: line.params.get(name, "-") for name in names}
            or {"": Text(line.name, no_wrap=True, overflow="ellipsis")}
        ),
        "state": Text(line.state + blocks, style=COLOURS.get(line.state, "")),
        "progress": ProgressBar(total=line.steps, completed=line.step, width=BAR) if line.steps else "",
        "step": f"{line.step:,}/{line.steps:,}" if line.steps else "",
        "validation": "" if line.valid_bpd is None else f"{line.valid_bpd:.3f}",
        "images/s": f"{line.images_per_s:,.0f}" if line.images_per_s else "",
        "left": line.left,
    }


def make_columns_table(
    rows: Sequence[Mapping[str, RenderableType]],
    width: int | None = None,
    spare: Sequence[str] = (),
    left: Collection[str] = ("trial", "state"),
    style: str = "bold",
) -> Table:
    """A table of rows that have the same columns by their heads; those in `left` are set on the left.

    In a window too narrow for them the columns move closer, then the `spare` ones are left out, in their order.
    """
    widths = _measure_widths(rows)
    heads, gap = (list(widths), 2) if width is None else fit_columns(widths, width, spare)
    table = Table(box=None, pad_edge=False, header_style=style, collapse_padding=gap == 1)
    for head in heads:
        justify: Literal["left", "right"] = "left" if head in left else "right"
        table.add_column(head, justify=justify, no_wrap=bool(head))  # one without a head gives way
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    return table


def is_fitting(rows: Sequence[Mapping[str, RenderableType]], width: int, spare: Sequence[str]) -> bool:
    """Whether the columns that are not `spare` are seen whole in a window of that width."""
    widths = {head: needed for head, needed in _measure_widths(rows).items() if head not in spare}
    return sum(widths.values()) + len(widths) - 1 <= width


def fit_columns(widths: Mapping[str, int], width: int, spare: Sequence[str]) -> tuple[list[str], int]:
    """The columns that a window shows, and the gap between them."""
    shown = dict(widths)
    for gap, without in [(2, ""), (1, ""), *((1, name) for name in spare)]:
        if without:
            shown.pop(without, None)
        if sum(shown.values()) + gap * (len(shown) - 1) <= width:
            break
    return list(shown), gap


def _measure_widths(rows: Sequence[Mapping[str, RenderableType]]) -> dict[str, int]:
    """What each column takes."""
    return {head: max(cell_len(head), *(_measure_width(row[head]) for row in rows)) for head in rows[0]} if rows else {}


def _measure_width(cell: RenderableType) -> int:
    return BAR if isinstance(cell, ProgressBar) else cell_len(str(cell))


def choose_fitting(lines: Mapping[str, Line], room: int) -> tuple[list[str], list[str]]:
    """The trials that a table of `room` lines shows, in their order, and those that it leaves out."""
    if len(lines) <= max(1, room):
        return list(lines), []
    first = sorted(lines, key=lambda digest: STATES.index(lines[digest].state))[: max(1, room - 1)]
    return [d for d in lines if d in first], [d for d in lines if d not in first]


def format_counts(lines: Iterable[Line]) -> str:
    """How many trials are in which state: `2 training, 5 waiting, 1 done`."""
    found: dict[str, int] = {}
    for line in lines:
        found[line.state] = found.get(line.state, 0) + 1
    order = ("training", "evaluating", "waiting", "done")
    return ", ".join(
        f"{found[state]} {state}" for state in sorted(found, key=lambda s: order.index(s) if s in order else len(order))
    )


def estimate_time_left(lines: Iterable[Line], at_once: int) -> str:
    """The time that the training still takes where `at_once` trials run, each at the mean rate of those known."""
    lines = list(lines)
    left = [line.images_left for line in lines if line.images_left]
    rates = [line.images_per_s for line in lines if line.images_per_s]
    if not left or not rates or any(line.silent_s for line in lines):
        return ""
    rate = sum(rates) / len(rates) * min(at_once, len(left))
    return f"training ends in about {format_clock(sum(left) / rate)}"


def format_clock(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40, 200000 -> 2 d 7:33."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# ---- What libraries say ----------------------------------------------------------------------------------------

OURS = ("orchestrator", "workers")


class _Messages(logging.Handler):
    """Log records as lines of the console, above the live table."""

    def __init__(self, console: Console, quiet: bool, verbose: bool) -> None:
        super().__init__(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
        self.console, self.verbose = console, verbose

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.split(".")[0] in OURS
        if ours or self.verbose or record.levelno >= logging.ERROR:
            source = "" if ours or record.name == "py.warnings" else f"{record.name.split('.')[0]}: "
            text = f"{record.levelname.lower()}: {source}{record.getMessage().strip()}"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def show_messages(console: Console, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """What is logged or warned of meanwhile goes to `console`: of libraries errors alone, unless `verbose`."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # it would write to stderr by itself
    root, messages = logging.getLogger(), _Messages(console, quiet, verbose)
    levels = {name: logging.getLogger(name).level for name in OURS}
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        root.addHandler(messages)
        if verbose:
            warnings.simplefilter("default")
            for name in OURS:
                logging.getLogger(name).setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(messages)
            logging.captureWarnings(False)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
