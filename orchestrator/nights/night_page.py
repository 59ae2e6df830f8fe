"""A night's report: what it says, as headings, paragraphs and tables, and that as Markdown and as one HTML file."""

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.measuring.differences import BY_IMAGE
from orchestrator.nights.decisions import ModelComparison, ModelNumbers, Night
from orchestrator.state.rows import is_distance

STATUS = {
    0: "fine",
    1: "incomplete: something could not be measured",
    3: "alarm",
}
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
"""


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """`items` are paragraphs (text), lists (a tuple of texts) and tables."""

    heading: str
    items: tuple[str | tuple[str, ...] | Table, ...]


def format_title(night: Night) -> str:
    return f"Night of {night.day}, suite {night.suite}: {STATUS[night.status]}"


def format_headline(night: Night) -> str:
    """The night in a line."""
    alarms = [str(finding) for finding in night.findings if finding.alarm]
    if alarms:
        return f"{format_title(night)}. {alarms[0]}" + (f" (and {len(alarms) - 1} more)" if len(alarms) > 1 else "")
    measured = [entry for entry in night.entries if not entry.failed]
    return f"{format_title(night)}. {len(measured)} of {len(night.entries)} models measured."


def make_sections(night: Night) -> list[Section]:
    summary: list[str | tuple[str, ...] | Table] = [
        f"The night of {night.day}, due at {night.schedule}. Times are of the zone {night.zone}: "
        f"begun {night.started}, ended {night.ended or 'not yet'}."
    ]
    if night.missed:
        summary.append(
            f"It covers {len(night.missed)} missed night{'s' * (len(night.missed) > 1)} as well: {night.missed[0]}"
            + (f" to {night.missed[-1]}." if len(night.missed) > 1 else ".")
        )
    summary.append(f"Compared with the night of {night.previous}." if night.previous else "There is no earlier night.")
    if night.state == "not believed":
        summary.append("A canary is off: what is known beforehand was measured otherwise. So no model was measured.")
    found = [Section("", tuple(summary))]
    if night.findings:
        found.append(Section("Findings", (tuple(str(finding) for finding in night.findings),)))
    if night.entries:
        found.append(Section("Models", (_make_models(night),)))
    if night.comparisons:
        found.append(Section("Comparisons", (f"A regression: {'; '.join(night.rules)}.", _make_comparisons(night))))
    if night.promotions:
        told = [
            f"{p.sweep}, version {p.version}: {'promoted to champion' if p.promoted else 'not promoted'}: {p.why}"
            for p in night.promotions
        ]
        found.append(Section("Promotion", (tuple(told),)))
    off = [c for c in night.canaries if not c.passed]
    canaries = [f"{len(night.canaries) - len(off)} of {len(night.canaries)} are as expected."]
    canaries += [f"{c.name}: {c.measured}, expected {c.expected:.10g} ± {c.tolerance:.2g}" for c in off]
    found.append(Section("Canaries", (tuple(canaries),)))
    protocols = _list_protocols(night.entries)
    versions = ", ".join(f"{name} {version}" for name, version in night.versions.items())
    return [*found, Section("How it was measured", (*([protocols] if protocols else []), f"Versions: {versions}."))]


def _make_models(night: Night) -> Table:
    names = list(dict.fromkeys(n for e in night.entries for n in e.metrics if n in BY_IMAGE or is_distance(n)))
    header = ("model", "version", "checkpoint", *(name.removeprefix("eval/") for name in names), "hash", "measured")
    rows = tuple(
        (
            entry.name,
            "-" if entry.version is None else str(entry.version),
            entry.checkpoint[:8],
            *(format_with_error(name, entry) for name in names),
            entry.hash[:8],
            entry.failed or (f"tonight, {entry.blocks_run} blocks" if entry.blocks_run else "before"),
        )
        for entry in night.entries
    )
    return Table(header, rows)


def format_with_error(name: str, entry: ModelNumbers) -> str:
    value, error = entry.metrics.get(name), entry.metrics.get(f"{name}_se")
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _make_comparisons(night: Night) -> Table:
    def make_row(c: ModelComparison) -> tuple[str, ...]:
        return c.model, c.against, c.metric.removeprefix("eval/"), c.why, c.verdict

    return Table(("model", "against", "metric", "difference", "verdict"), tuple(map(make_row, night.comparisons)))


def _list_protocols(entries: Sequence[ModelNumbers]) -> tuple[str, ...]:
    """Each protocol once."""
    found: dict[str, None] = {}
    for entry in entries:
        for kind, passport in entry.passports.items():
            protocol = ", ".join(f"{key} {value}" for key, value in passport["protocol"].items())
            found[f"{kind}: {protocol}"] = None
            found |= {f"warning: {text}": None for text in passport.get("warnings", ())}
    return tuple(found)


# ---- Renderings ------------------------------------------------------------------------------------------------


def to_markdown(night: Night) -> str:
    lines = [f"# {format_title(night)}", ""]
    for section in make_sections(night):
        lines += [f"## {section.heading}", ""] if section.heading else []
        for item in section.items:
            if isinstance(item, str):
                lines += [item, ""]
            elif isinstance(item, Table):
                cells = [item.header, ("---",) * len(item.header), *item.rows]
                lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
                lines.append("")
            else:
                lines += [*(f"- {text}" for text in item), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def to_html(night: Night, history: Sequence[Night]) -> str:
    """One file with nothing beside it; `history` are the earlier nights, for the trends."""
    escape = html.escape
    parts = [HEAD.format(title=escape(format_title(night))), f"<h1>{escape(format_title(night))}</h1>"]
    for section in make_sections(night):
        parts += [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
        for item in section.items:
            if isinstance(item, str):
                parts.append(f"<p>{escape(item)}</p>")
            elif isinstance(item, Table):
                head = "".join(f"<th>{escape(cell)}</th>" for cell in item.header)
                rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in item.rows]
                parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            else:
                parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in item)}</ul>")
        if section.heading == "Models" and (plot := draw_trend([*history, night])):
            parts += ["<h2>Trend</h2>", plot]
    return "\n".join([*parts, "</body></html>\n"])


def draw_trend(nights: Sequence[Night]) -> str:
    """Each model's metrics by date with their standard errors, as SVG; empty where only one night has any."""
    nights = sorted((n for n in nights if n.state != "not believed"), key=lambda n: n.day)
    names = list(
        dict.fromkeys(m for n in nights for e in n.entries for m in e.metrics if m in BY_IMAGE or is_distance(m))
    )
    if len(nights) < 2 or not names:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        for model in dict.fromkeys(entry.name for night in nights for entry in night.entries):
            points = [
                (night.day, entry.metrics[name], entry.metrics.get(f"{name}_se", 0.0))
                for night in nights
                for entry in night.entries
                if entry.name == model and math.isfinite(entry.metrics.get(name, math.nan))
            ]
            if points:
                days, values, errors = zip(*points, strict=True)
                axes.errorbar(days, values, yerr=errors, marker="o", capsize=3, label=model)
        axes.set(ylabel=name.removeprefix("eval/"), xticks=[night.day for night in nights])
        axes.tick_params(axis="x", rotation=45)
        axes.legend(fontsize=8)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()[stream.getvalue().index("<svg") :]
