"""The graph of a sweep whose trials start from others: who waits for whom, as a figure."""

from collections.abc import Mapping
from typing import Any

from orchestrator.experiment.metrics import head_metric
from orchestrator.experiment.starts import shorten_slot
from orchestrator.output.figures import Palette, Plot
from orchestrator.output.findings import Report
from orchestrator.state.rows import Row
from workers.layout import RowId

MOST = 60  # trials: more are not seen
LONGEST = 34  # of a name, in letters


def draw_graph(report: Report) -> list[Plot]:
    """Every trial, to the right of all that it starts from, with what that is to it; nothing where none starts from
    another, or where there are more than can be seen."""
    starts, rows = report.kept.starts, {row.digest: row for row in (*report.needed, *report.rows)}
    if not starts or len(rows) > MOST:
        return []
    places = _place(list(filter(rows.__contains__, report.kept.trials)), starts)
    columns, lines = (max(place[k] for place in places.values()) + 1 for k in (0, 1))

    def draw(axes: Any, palette: Palette) -> None:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "none", "edgecolor": palette.series[0], "linewidth": 1.2}
        of = {"ha": "center", "fontsize": 8}
        boxes = {
            row: axes.text(x, -y, _describe(rows[row], report.kept.metric), va="center", bbox=box, **of)
            for row, (x, y) in places.items()
        }
        for row, (x, y) in places.items():
            for slot, start in starts.get(row, {}).items():
                ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[row].get_bbox_patch()}
                at = places[start]
                arrow = {"arrowstyle": "->", "color": palette.ink, **ends}
                axes.annotate("", xy=(x, -y), xytext=(at[0], -at[1]), arrowprops=arrow)
                axes.text((x + at[0]) / 2, -(y + at[1]) / 2, shorten_slot(slot), va="bottom", **of)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(0.6 - lines, 0.4))
        axes.set_axis_off()

    return [Plot("graph", (max(6.4, 3.2 * columns), 0.75 * lines + 0.4), draw)]


def _place(rows: list[RowId], starts: Mapping[RowId, Mapping[str, RowId]]) -> dict[RowId, tuple[int, int]]:
    """(column, line) of each row: a column further than the last of those that it starts from, lines in their order."""
    found: dict[RowId, tuple[int, int]] = {}
    while left := [row for row in rows if row not in found]:
        ready = [row for row in left if all(start in found for start in starts.get(row, {}).values())]
        assert ready, "trials that start from each other in a circle are refused"
        for row in ready:
            column = max((found[start][0] + 1 for start in starts.get(row, {}).values()), default=0)
            found[row] = column, sum(place[0] == column for place in found.values())
    return found


def _describe(row: Row, metric: str) -> str:
    """Which trial it is, and how it stands."""
    name = row.variant.role or " ".join(part for part in row.name.split() if not part.endswith("=None"))
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    value = row.metrics.get(metric)
    stands = row.state if value is None else f"{head_metric(metric)} {value:.3f}"
    return f"{row.digest[:8]} {short}\n{stands}"
