"""The report of a sweep as Markdown, for a pull request."""

from orchestrator.experiment.metrics import head_metric
from orchestrator.measuring.slowness import find_slow_trials
from orchestrator.output.findings import (
    Report,
    compute_shares,
    describe_forest,
    format_hours,
    format_utc,
    grow_trees,
    list_averages,
    list_faults,
    list_protocols,
    list_starts,
    tell_event,
    write_verdict,
)
from orchestrator.output.importance import Share
from orchestrator.output.speed_table import describe_peaks, list_kinds, list_speed_lines
from orchestrator.output.table import format_value, make_footnote, make_markdown
from orchestrator.output.terminal import format_clock


def write_markdown(report: Report) -> str:
    """For a pull request: the verdict, the table, what matters, cost, speed, faults, how it was measured."""
    use, lines = report.use, [f"## Sweep `{report.kept.name}`", "", write_verdict(report), ""]
    lines.append(make_markdown(report.rows, report.kept.metric, report.each))
    if note := make_footnote(report.rows, report.kept.metric, report.each):
        lines += ["", note.replace("\n", "  \n")]
    if report.over_seeds:
        table = make_markdown(report.rows, report.kept.metric, each=True)
        lines += ["", "<details><summary>Each seed by itself</summary>", "", table, "", "</details>"]
    if found := compute_shares(report):
        what, n = head_metric(report.kept.metric), len(report.measured)
        lines += [
            "",
            f"Variance of {what} over {n} trials explained by each setting alone (in brackets, by chance):",
            "",
        ]
        lines += [f"- `{s.name}` {s.share:.0%} ({s.chance:.0%}): " + _format_levels(s) for s in found]
    if grown := grow_trees(report):
        lines += ["", f"{describe_forest(grown)} What it loses of that when one is shuffled:", ""]
        lines += [f"- `{name}` {round(100 * weight)}%" for name, weight in grown.weights.items()]
    if len(best := report.front) > 1:
        names = "; ".join(
            f"{group.name} ({', '.join(f'{group.metrics[name]:.4g}' for name in report.objectives)})" for group in best
        )
        lines += ["", f"Front of {', '.join(map(head_metric, report.objectives))}: {names}."]
    if use.capacity:
        lines += ["", f"Cost: {format_hours(use.busy)} {use.slot}-hours in {format_clock(use.wall_s)}; "
                  f"{use.utilisation:.0%} of {use.slots:g} {use.slot}s held."]  # fmt: skip
    if starts := list_starts(report):
        lines += ["", "What starts from what:", ""]
        uses = [(row, "; ".join(f"{slot} of {other.name}" for slot, other in others)) for row, others in starts]
        lines += [f"- {row.name} ({row.state}): {use}" for row, use in uses]
    lines += _write_speed(report)
    wrong = [tell_event(event) for event in list_faults(report.happened)]
    lines += ["", f"Faults and retries: {len(wrong) or 'none'}.", ""]
    lines += [f"- {format_utc(e.time_ms)} {e.trial} {e.event}: {e.text}".replace("  ", " ") for e in wrong]
    if averages := list_averages(report.rows):
        lines += ["Averages made afterwards:", "", *(f"- {text}" for text in averages), ""]
    lines += ["<details><summary>How it was measured</summary>", ""]
    for kind, how, rows in list_protocols(report.rows):
        told = ", ".join(f"{name} {format_value(value)}" for name, value in how.items())
        lines.append(f"- **{kind}** of {len(rows)} trials: {told}")
    return "\n".join([*lines, "", "</details>", ""])


def _write_speed(report: Report) -> list[str]:
    """A small table, folded; what is slow stands before it."""
    heads = ["trial", "images/s", "of peak", *list_kinds(report.rows)]
    cells = [
        [line.group.name, line.images_per_s, line.of_peak, *line.seconds] for line in list_speed_lines(report.groups)
    ]
    lines = [*(f"- slow: {slow}" for slow in find_slow_trials(report.rows))]
    lines = ["", *lines] if lines else []
    lines += ["", "<details><summary>Speed</summary>", ""]
    lines += ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *cells)]
    return [*lines, "", *(f"Peak: {text}.  " for text in describe_peaks(report.rows)), "", "</details>"]


def _format_levels(share: Share) -> str:
    return ", ".join(f"{level.label}: {level.mean:.3f}" for level in share.levels)
