"""Curves and scatters: each a `Plot` that is made once of plain data, and drawn as SVG or as PNG.

As SVG it takes its colours and its font from the page, readable in light and in dark: a series is drawn in
`var(--c0)`, `var(--c1)`, ..., and in `var(--rest)` beyond the palette. As PNG, for MLflow, it has the page's light
colours and a legend of its own.
"""

import html
import io
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
PNG_SIZE, PNG_DPI = (9.0, 4.5), 110  # inches, with room for a legend at the side


@dataclass(frozen=True)
class Palette:
    ink: str
    faint: str
    rest: str  # of the series beyond the first PALETTE
    series: tuple[str, ...]

    def __getitem__(self, rank: int) -> str:
        return self.series[rank] if rank < PALETTE else self.rest


# Colours that stand for names of the style sheet until the SVG is written, those names, and what templates/base.html
# says that they are in light.
PLACEHOLDERS = Palette("#010203", "#010204", "#010205", tuple(f"#0102{0x10 + i:02x}" for i in range(PALETTE)))
NAMES = Palette("var(--ink-2)", "var(--line)", "var(--rest)", tuple(f"var(--c{i})" for i in range(PALETTE)))
LIGHT = Palette(
    "#5b6066", "#e4e5e2", "#b3b7bb",
    ("#2457c5", "#d9691a", "#1d8a50", "#8b3fc4", "#c9302c", "#0e8ba3", "#a67c00", "#c9367f"),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A curve or a point by its label; `rank` chooses its colour, `low` and `high` bound its error band.

    Series of one colour that stand for one thing have a `group`, which is what a legend calls them.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    rank: int = 0
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    group: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure that is still to be drawn; `name` is of the page's own choosing, and unique on it."""

    name: str
    size: tuple[float, float]  # inches, of the SVG
    draw: Callable[[Any, Palette], None]  # into matplotlib's axes


def name_colour(rank: int) -> str:
    """The page's colour of the series at that place."""
    return NAMES[rank]


def draw_curves(
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
) -> Plot:
    """Curves of y against x, the best-ranked on top."""

    def draw(axes: Any, palette: Palette) -> None:
        for s in reversed(series):
            keep = _thin_out(len(s.x))
            x, y = np.asarray(s.x, float)[keep], np.asarray(s.y, float)[keep]
            [line] = axes.plot(x, y, color=palette[s.rank], linewidth=1.6 if s.rank < PALETTE else 0.8,
                               marker="o" if markers else None, markersize=3.5,
                               label=s.label if legend else _make_legend_label(s))  # fmt: skip
            line.set_gid(_make_gid(s.label))
            if len(s.low) and s.rank < PALETTE:
                low, high = np.asarray(s.low, float)[keep], np.asarray(s.high, float)[keep]
                axes.fill_between(x, low, high, color=palette[s.rank], alpha=0.15, linewidth=0)
        _set_axes(axes, palette, x_label, y_label, log_x=log_x, log_y=log_y)
        places = sorted({x for s in series for x in s.x})
        if markers and log_x and len(places) < 12:
            axes.set_xticks(places, [f"{x:g}" for x in places])
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1)} if len(series) > 4 else {}
            axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, labelcolor=palette.ink, **above)

    return Plot(name, size, draw)


def draw_scatter(
    name: str,
    points: Sequence[tuple[Series, float, float]],
    front: Sequence[tuple[float, ...]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool,
    named: int,
    hollow: Collection[str] = (),
) -> Plot:
    """Points with their standard errors in x and y, those of the `hollow` labels not filled, and the front of those
    that none is better than in both.

    Those beyond the first `named` have no names, colours or bars.
    """

    def draw(axes: Any, palette: Palette) -> None:
        for is_hollow in (False, True):
            if others := [s for s, *_ in points[named:] if (s.label in hollow) == is_hollow]:
                axes.plot([x for s in others for x in s.x], [y for s in others for y in s.y], "o", markersize=4,
                          color=palette.rest, fillstyle="none" if is_hollow else "full", label="_")  # fmt: skip
        if len(front) > 1:
            x, y = zip(*front, strict=True)
            axes.step(x, y, where="post", color=palette.ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for s, x_error, y_error in reversed(points[:named]):
            bars = axes.errorbar(s.x, s.y, xerr=x_error or None, yerr=y_error or None, fmt="o", markersize=7,
                                 color=palette[s.rank], elinewidth=1.2, capsize=0, label=_make_legend_label(s),
                                 fillstyle="none" if s.label in hollow else "full")  # fmt: skip
            bars[0].set_gid(_make_gid(s.label))
        _set_axes(axes, palette, x_label, y_label, log_x=False, log_y=log_y)

    return Plot(name, (6.4, 3.9), draw)


def _make_legend_label(s: Series) -> str:
    """What a legend beside the figure calls a series; matplotlib leaves out what begins with an underscore."""
    return (s.group or s.label) if s.rank < PALETTE else "_"


def _thin_out(n: int) -> np.ndarray:
    """The rows of a curve that are drawn: both ends, and of a long one as many at its start as in the rest."""
    if n <= POINTS:
        return np.arange(n)
    even = np.linspace(0, n - 1, POINTS // 2)
    early = np.geomspace(1, n, POINTS // 2) - 1
    return np.unique(np.concatenate([even, early]).astype(int))


def _make_gid(label: str) -> str:
    return f"series:{label}"


def _set_axes(axes: Any, palette: Palette, x_label: str, y_label: str, *, log_x: bool, log_y: bool) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.grid(True, color=palette.faint, linewidth=0.8)
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


def to_svg(plot: Plot) -> str:
    """The text of an <svg> whose colours are names of the page's style sheet."""
    stream = io.StringIO()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": plot.name}
    with rc_context({**_set_style(PLACEHOLDERS), **style}):
        figure = Figure(figsize=plot.size, layout="constrained")
        plot.draw(figure.subplots(), PLACEHOLDERS)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _fit_into_page(stream.getvalue(), plot.name)


def to_png(plot: Plot) -> bytes:
    """On white, with a legend beside the axes unless it has one inside."""
    stream = io.BytesIO()
    with rc_context(_set_style(LIGHT)):
        width, height = (max(sides) for sides in zip(PNG_SIZE, plot.size, strict=True))
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        plot.draw(axes, LIGHT)
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels[::-1], handles[::-1], strict=True))  # one for all series of a group
        if entries and axes.get_legend() is None:
            axes.legend(list(entries.values()), list(entries), frameon=False, fontsize=8, labelcolor=LIGHT.ink,
                        loc="center left", bbox_to_anchor=(1, 0.5))  # fmt: skip
        figure.savefig(stream, format="png", dpi=PNG_DPI)
    return stream.getvalue()


def _set_style(palette: Palette) -> Any:
    ink = palette.ink
    return {
        "font.size": 10, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": palette.faint,
        "xtick.color": ink, "ytick.color": ink, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "axes.formatter.useoffset": False,
    }  # fmt: skip


def _list_colours(palette: Palette) -> tuple[str, ...]:
    return palette.ink, palette.faint, palette.rest, *palette.series


def _fit_into_page(svg: str, name: str) -> str:
    """matplotlib's file as a part of a page: its colours and font are the page's, its series have their names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = rf'<svg class="plot" viewBox="\1" role="img" aria-label="{name}">'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', head, svg, count=1, flags=re.DOTALL)
    pairs = zip(_list_colours(PLACEHOLDERS), _list_colours(NAMES), strict=True)
    for placeholder, variable in pairs:
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
