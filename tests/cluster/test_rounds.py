"""An adaptive search for real: two rounds on a local Ray, killed in the second, resumed to the very same trials."""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import Started, runs, state_of, sweep

from orchestrator import report, status
from orchestrator.experiment.load import load
from orchestrator.experiment.records import Variant
from orchestrator.planning.search import HeardTrial, make_heard, suggest_round
from orchestrator.state.saved import open_sweep, read_asked, read_rows
from workers.data.sources import describe
from workers.storage import Storage

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]

SEARCH = """
search:
  space:
    training.lr: {choice: [1.0e-3, 4.0e-3, 1.0e+30]}
    model.dropout: {uniform: [0.0, 0.3]}
    diffusion.T: {int_uniform: [30, 60]}
  algorithm: optuna
  samples: 6
  batch: 3
  also: [eval/fd_classifier]
"""


def test_a_search_that_is_killed_in_its_second_round_resumes_to_the_same_trials(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_text(tiny.read_text().partition("search:")[0] + SEARCH)
    root, e = tmp_path / "runs", load(tiny)
    storage, record = Storage(root), root / "sweeps/tiny/asked.json"
    started = Started(tiny, "--storage", root)
    try:
        started.wait_until(record.exists)
        started.kill()
    finally:
        started.end()
    assert "asks for 3 trials after 3 of 6, by what 3 of them say" in started.read_output()
    before, asked = read_asked(storage, e), record.read_text()
    assert len(before) == 6 and len(open_sweep(storage, "tiny").trials) in (3, 6)

    resumed = sweep(tiny, "--storage", root)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert record.read_text() == asked and "asks for" not in resumed.stdout and "Traceback" not in resumed.stdout
    states = [state for state, _ in state_of(root).values()]
    assert len(states) == 6 and set(states) == {"finished", "diverged"}, "a third of the learning rates diverges"

    # The second round is what the measured numbers of the first, whatever their order, ask for.
    kept = open_sweep(storage, "tiny")
    rows = {str(row.variant): row for row in reversed(read_rows(storage, kept))}
    assert sorted(str(v) for v in kept.trials.values()) == sorted(map(str, before))

    def hear(variant: Variant) -> HeardTrial | None:
        row = rows[str(variant)]
        return make_heard(e.search, row.variant, row.state, row.metrics)

    assert suggest_round(e, before[:3], hear, describe) == before[3:]

    # Every reader knows the trials of both rounds, and the front of the search's objectives.
    frame = pd.read_parquet(root / "sweeps/tiny/results.parquet")
    assert len(frame) == 6 and len(runs(root)[1]) == 6
    done = frame[frame["state"] == "done"][["trial", "eval/nll_bpd", "eval/fd_classifier"]].set_index("trial")
    front = {a for a, p in done.iterrows() if not any((q <= p).all() and (q < p).any() for _, q in done.iterrows())}
    shown = [run.data.tags for run in runs(root)[1]]
    assert {tags["trial.digest"] for tags in shown if tags.get("pareto") == "front"} == front
    page = (root / "sweeps/tiny/report.html").read_text()
    assert all(address[:8] in page for address in frame["trial"]) and "The front of NLL bits/dim, fd_classifier" in page
    assert status.main(["tiny", "--storage", str(root), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sweeps"][0]["trials"]) == 6
    assert report.main(["tiny", "--storage", str(root), "--markdown"]) == 0
    assert ("Front of NLL bits/dim, fd_classifier" in capsys.readouterr().out) == (len(front) > 1)

    again = sweep(tiny, "--storage", root)
    assert again.returncode == 0 and again.stdout == resumed.stdout[resumed.stdout.index("trial ") :]
