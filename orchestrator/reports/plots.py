"""The curves of a report, as SVG that takes its colours and its font from the page: readable in light and in dark.

Every function takes plain data and gives the text of an <svg>. Colours are names of the page's style sheet: a
series is drawn in `var(--c0)`, `var(--c1)`, ..., and in `var(--rest)` beyond the palette.
"""

import html
import io
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

PALETTE = 8
POINTS = 240  # of a curve: more are not seen
# Colours that stand for names of the style sheet until the SVG is written.
INK, FAINT, REST = "#010203", "#010204", "#010205"
NAMES = {INK: "var(--ink-2)", FAINT: "var(--line)", REST: "var(--rest)"} | {
    f"#0102{0x10 + i:02x}": f"var(--c{i})" for i in range(PALETTE)
}


@dataclass(frozen=True)
class Series:
    """A curve or a point by its label; `rank` chooses its colour, `low` and `high` bound its error band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    rank: int = 0
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())


def colour(rank: int) -> str:
    """The page's colour of the series at that place."""
    return f"var(--c{rank})" if rank < PALETTE else "var(--rest)"


def curves(
    name: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
    legend: bool = False,
    size: tuple[float, float] = (6.4, 3.5),
) -> str:
    """Curves of y against x, the best-ranked on top; `name` is of the page's own choosing, and unique on it."""

    def draw(axes: Any) -> None:
        for s in reversed(series):
            keep = _thinned(len(s.x))
            x, y = np.asarray(s.x, float)[keep], np.asarray(s.y, float)[keep]
            [line] = axes.plot(x, y, color=_placeholder(s.rank), linewidth=1.6 if s.rank < PALETTE else 0.8,
                               marker="o" if markers else None, markersize=3.5, label=s.label)  # fmt: skip
            line.set_gid(_gid(s.label))
            if len(s.low) and s.rank < PALETTE:
                low, high = np.asarray(s.low, float)[keep], np.asarray(s.high, float)[keep]
                axes.fill_between(x, low, high, color=_placeholder(s.rank), alpha=0.15, linewidth=0)
        _axes(axes, x_label, y_label, log_x, log_y)
        places = sorted({x for s in series for x in s.x})
        if markers and log_x and len(places) < 12:
            axes.set_xticks(places, [f"{x:g}" for x in places])
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, labelcolor=INK)

    return _svg(name, size, draw)


def scatter(
    name: str,
    points: Sequence[tuple[Series, float, float]],
    front: Sequence[tuple[float, ...]],
    x_label: str,
    y_label: str,
    log_y: bool,
    hollow: Collection[str] = (),
) -> str:
    """Points with their standard errors in x and y, those of the `hollow` labels not filled, and the front of those
    that none is better than in both."""

    def draw(axes: Any) -> None:
        if len(front) > 1:
            x, y = zip(*front, strict=True)
            axes.step(x, y, where="post", color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for s, x_error, y_error in reversed(points):
            bars = axes.errorbar(s.x, s.y, xerr=x_error or None, yerr=y_error or None, fmt="o", markersize=7,
                                 color=_placeholder(s.rank), elinewidth=1.2, capsize=0,
                                 fillstyle="none" if s.label in hollow else "full")  # fmt: skip
            bars[0].set_gid(_gid(s.label))
        _axes(axes, x_label, y_label, False, log_y)

    return _svg(name, (6.4, 3.9), draw)


def _thinned(n: int) -> np.ndarray:
    """The rows of a curve that are drawn: both ends, and of a long one as many at its start as in the rest."""
    if n <= POINTS:
        return np.arange(n)
    even = np.linspace(0, n - 1, POINTS // 2)
    early = np.geomspace(1, n, POINTS // 2) - 1
    return np.unique(np.concatenate([even, early]).astype(int))


def _placeholder(rank: int) -> str:
    return f"#0102{0x10 + rank:02x}" if rank < PALETTE else REST


def _gid(label: str) -> str:
    return f"series:{label}"


def _axes(axes: Any, x_label: str, y_label: str, log_x: bool, log_y: bool) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0)
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            low, high = axis.get_view_interval()
            few = high / max(low, 1e-30) < 5
            axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:.3g}") if few else NullFormatter())


def _svg(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "axes.formatter.useoffset": False,
    }  # fmt: skip
    stream = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _of_the_page(stream.getvalue(), name)


def _of_the_page(svg: str, name: str) -> str:
    """matplotlib's file as a part of a page: its colours and font are the page's, its series have their names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = rf'<svg class="plot" viewBox="\1" role="img" aria-label="{name}">'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', head, svg, count=1, flags=re.DOTALL)
    for placeholder, variable in NAMES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(
        r'<g id="series:([^"]*)">',
        lambda found: f'<g class="series"><title>{html.escape(html.unescape(found[1]))}</title>',
        svg,
    )
    # The ids that something refers to are made unique on the page; the others are not needed.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    return re.sub(r"\n\s*", "\n", svg)


def pareto(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The points that no other is at least as good as in all and better in one, lower being better; by the first."""
    distinct = sorted(set(points))
    return [p for p in distinct if not any(q != p and all(map(operator.le, q, p)) for q in distinct)]
