"""What the user sees while a sweep runs: a live table in a terminal, plain lines anywhere else."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table


@dataclass
class Line:
    """One trial, as it stands."""

    name: str
    steps: int
    batch_size: int
    state: str = "waiting"  # waiting, training, evaluating, done, diverged, pruned, failed
    step: int = 0
    nll_bpd: float | None = None
    images_per_s: float = 0.0
    blocks: int = 0  # of the evaluation
    blocks_left: int = 0
    shares: bool = False  # the trial of a line before it, whose training is told and counted there

    @property
    def images_left(self) -> int:
        training = self.state in ("waiting", "training") and not self.shares
        return (self.steps - self.step) * self.batch_size if training else 0


class Display:
    """Shows `lines` by digest. Use as a context; call `changed` after a trial's line has changed."""

    def __init__(self, lines: dict[str, Line], console: Console, quiet: bool = False) -> None:
        self.lines, self.console, self.quiet = lines, console, quiet
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._refreshed = 0.0

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays: a decision with its reason."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def changed(self, digest: str) -> None:
        """Tells of a trial's new line, once a call where there is no terminal."""
        line = self.lines[digest]
        if self._live:
            self.refresh(force=True)
        else:
            nll = "" if line.nll_bpd is None else f"  valid/nll_bpd {line.nll_bpd:.3f}"
            rate = f"  {line.images_per_s:,.0f} images/s" if line.images_per_s else ""
            self.say(
                f"{digest[:8]}  {line.state:<10}  step {line.step}/{line.steps}{nll}{rate}  {line.name}{self.left()}"
            )

    def refresh(self, force: bool = False) -> None:
        if self._live and (force or time.monotonic() - self._refreshed > 0.5):
            self._refreshed = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def left(self) -> str:
        """The time that the training still takes at the rate of the trials that run; empty before there is one."""
        left = sum(line.images_left for line in self.lines.values())
        rate = sum(line.images_per_s for line in self.lines.values() if line.state == "training" and not line.shares)
        return f"  training ends in about {clock(left / rate)}" if left and rate else ""

    def _table(self) -> Table:
        counts = ", ".join(f"{n} {state}" for state, n in _counts(self.lines.values()))
        table = Table(box=None, pad_edge=False, title=f"{counts}{self.left()}", title_justify="left", title_style="")
        for name in ("trial", "", "state", "step", "valid NLL bits/dim", "images/s"):
            table.add_column(name, justify="left" if name in ("trial", "", "state") else "right")
        for digest, line in self.lines.items():
            blocks = f" {line.blocks - line.blocks_left}/{line.blocks}" if line.state == "evaluating" else ""
            table.add_row(
                digest[:8],
                line.name,
                line.state + blocks,
                f"{line.step}/{line.steps}",
                "" if line.nll_bpd is None else f"{line.nll_bpd:.3f}",
                f"{line.images_per_s:,.0f}" if line.images_per_s else "",
            )
        return table


def clock(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _counts(lines: Iterable[Line]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    return list(counts.items())
