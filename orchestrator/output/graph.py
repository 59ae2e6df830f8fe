"""The graph of a sweep whose trials start from others: who waits for whom, as a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.experiment.metrics import head_metric
from orchestrator.experiment.starts import shorten_slot
from orchestrator.output.figures import Palette, Plot
from orchestrator.output.findings import Report
from orchestrator.state.rows import Row
from workers.layout import TrialId, get_trial_of_row

MOST = 60  # trials: more are not seen
LONGEST = 34  # of a name, in letters


def draw_graph(report: Report) -> list[Plot]:
    """Every trial, to the right of all that it starts from, with what that is to it; nothing where none starts from
    another, or where there are more than can be seen."""
    rows: dict[TrialId, list[Row]] = {}
    for row in (*report.needed, *report.rows):
        rows.setdefault(get_trial_of_row(row.digest), []).append(row)
    if not report.kept.starts or len(rows) > MOST:
        return []
    starts = {
        get_trial_of_row(row): {slot: get_trial_of_row(start) for slot, start in of.items()}
        for row, of in report.kept.starts.items()
    }
    trials = dict.fromkeys(map(get_trial_of_row, report.kept.trials))
    places = _place([trial for trial in trials if trial in rows], starts)
    columns, lines = (max(place[k] for place in places.values()) + 1 for k in (0, 1))

    def draw(axes: Any, palette: Palette) -> None:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "none", "edgecolor": palette.series[0], "linewidth": 1.2}
        of = {"ha": "center", "fontsize": 8}
        boxes = {
            trial: axes.text(x, -y, _describe(rows[trial], report.kept.metric), va="center", bbox=box, **of)
            for trial, (x, y) in places.items()
        }
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(0.6 - lines, 0.4))
        axes.set_axis_off()
        axes.figure.draw_without_rendering()  # after which the boxes have a size
        seen = {trial: box.get_bbox_patch().get_window_extent() for trial, box in boxes.items()}
        edges = {trial: extent.transformed(axes.transData.inverted()) for trial, extent in seen.items()}
        arrow = {"arrowstyle": "->", "color": palette.ink, "shrinkA": 0, "shrinkB": 0}
        for trial, (_, y) in places.items():
            for slot, start in starts.get(trial, {}).items():
                begin, end = (edges[start].x1, -places[start][1]), (edges[trial].x0, -y)
                axes.annotate("", xy=end, xytext=begin, arrowprops=arrow)
                axes.text((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2, shorten_slot(slot), va="bottom", **of)

    return [Plot("graph", (max(6.4, 3.2 * columns), 0.75 * lines + 0.4), draw)]


def _place(trials: list[TrialId], starts: Mapping[TrialId, Mapping[str, TrialId]]) -> dict[TrialId, tuple[int, int]]:
    """(column, line) of each: a column further than the last of those that it starts from, lines in their order."""
    found: dict[TrialId, tuple[int, int]] = {}
    while left := [trial for trial in trials if trial not in found]:
        ready = [trial for trial in left if all(start in found for start in starts.get(trial, {}).values())]
        assert ready, "trials that start from each other in a circle are refused"
        for trial in ready:
            column = max((found[start][0] + 1 for start in starts.get(trial, {}).values()), default=0)
            found[trial] = column, sum(place[0] == column for place in found.values())
    return found


def _describe(rows: Sequence[Row], metric: str) -> str:
    """Which trial it is that these rows measure, and how it stands."""
    row = rows[0]
    name = row.variant.role or " ".join(part for part in row.name.split() if not part.endswith("=None"))
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    value = row.metrics.get(metric)
    stands = row.state if value is None else f"{head_metric(metric)} {value:.3f}"
    stands = f"{len(rows)} measurements" if len(rows) > 1 else stands
    return f"{row.digest[:8]} {short}\n{stands}"
