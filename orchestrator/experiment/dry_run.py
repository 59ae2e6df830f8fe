"""The table that a dry run prints: what is searched, where the chains of its trials end, and what they cost."""

from collections.abc import Mapping, Sequence

from orchestrator.experiment.effort import Cost, count_costs
from orchestrator.experiment.expand import find_starting_rows
from orchestrator.experiment.preflight import measure_chain
from orchestrator.experiment.records import Variant
from orchestrator.experiment.settings import show
from orchestrator.experiment.starts import list_ancestors, shorten_slot
from workers.config import DataConfig, Trial
from workers.data.sources import Source
from workers.layout import RowId, get_trial_of_row


def format_dry_run(trials: Mapping[RowId, Variant], sources: Mapping[DataConfig, Source]) -> str:
    """A table of the trials by digest: what is searched, where their chains end, what they cost, and the totals."""
    prices = count_costs(trials, sources)
    searched = list(next(iter(trials.values())).params) if trials else []
    starts = find_starting_rows(trials, lambda config: sources[config].digest)
    head = ["trial", *searched, *["starts from"] * bool(starts), "alpha_bar_T", "L_T <=", "log SNR"]
    head += ["training", "validation", "nll", "sampling", "ode_nll"]
    rows = [
        [digest, *(_format_cell(v) for v in variant.params.values())]
        + [_describe_starts(starts.get(digest, {}), trials) or variant.role or "-"] * bool(starts)
        + _describe_ends(variant.trial)
        + [format_count(n) for n in price.parts]
        for (digest, variant), price in zip(trials.items(), prices, strict=True)
    ]
    trained = len({get_trial_of_row(row) for row in trials})
    one = f"{trained} trial" + "s" * (trained != 1) + f", {len(trials)} rows" * (len(trials) != trained)
    total = [one, *[""] * (len(searched) + bool(starts) + 3), *(format_count(n) for n in sum(prices, Cost()).parts)]
    if not any(price.ode_nll_evaluations for price in prices):
        head, rows, total = head[:-1], [row[:-1] for row in rows], total[:-1]
    return "\n".join(
        [
            *_align([head, *rows, total]),
            "",
            "L_T: the prior gap in bits/dim at E[x_0^2] = 1; log SNR: of t = 1 and T, or of the ends that a continuous",
            "process is measured at. The columns after it count evaluations of the network, an image at a time; one of",
            "training is a forward and a backward.",
            *_describe_sharing(trials, sum(prices, Cost()), starts),
            *_describe_kept(trials),
        ]
    )


def _describe_starts(starts: Mapping[str, RowId], trials: Mapping[RowId, Variant]) -> str:
    """The trials that one starts from, each with what it is to it, and at which step."""
    at = {slot: f"{start[:8]} at {trials[start].trial.training.steps}" for slot, start in starts.items()}
    return ", ".join(f"{shorten_slot(slot)} {text}" for slot, text in at.items())


def _describe_ends(trial: Trial) -> list[str]:
    """Where its chain ends; a network that is no denoiser has none."""
    if not trial.diffuses:
        return ["-"] * 3
    end = measure_chain(trial.diffusion)
    return [f"{end.alpha_bar_T:.1e}", f"{end.prior_bpd:.2g}", f"{end.log_snr_1:.1f}..{end.log_snr_T:.1f}"]


def _describe_sharing(
    trials: Mapping[RowId, Variant], total: Cost, starts: Mapping[RowId, Mapping[str, RowId]]
) -> list[str]:
    """What training costs beside that of the same trials, each by itself."""
    if not starts:
        return []
    own = {
        row: (v.trial.training.steps - v.trial.training.trunk_steps) * v.trial.training.batch_size
        for row, v in trials.items()
    }
    asked = [row for row, variant in trials.items() if not variant.role]
    alone = sum(own[each] for row in asked for each in (row, *list_ancestors(row, starts)))
    return [
        f"Trained each by itself, the trials would take {format_count(alone)} evaluations of training in place of "
        f"{format_count(total.training_evaluations)}."
    ]


def _describe_kept(trials: Mapping[RowId, Variant]) -> list[str]:
    """What `training.posthoc` takes of the storage."""
    trainings = (variant.trial.training for variant in trials.values())
    kept = [t.steps // t.posthoc.every * len(t.posthoc.widths) for t in trainings if t.posthoc]
    return [f"training.posthoc keeps as much as {max(kept):,} networks of a trial, in float32."] if kept else []


def _format_cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_format_cell(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else show(value)


def format_count(n: int) -> str:
    """A count in three or four characters: 850, 1.2k, 512k, 1.2M, 34G."""
    for unit, size in (("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12)):
        x = n / size
        if float(f"{x:.2g}" if x < 10 else f"{x:.0f}") < 1000:
            return f"{n}" if not unit else f"{x:.2g}{unit}" if x < 9.95 else f"{x:.0f}{unit}"
    return f"{n / 10**12:,.0f}T"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right; a rule under the head and the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
