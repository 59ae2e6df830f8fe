"""Kinds of an installed package of one's own (`tests/outside`): named in a file, they are as those of ours."""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, run

from orchestrator.state.events import read_events
from workers.kinds import POINTS
from workers.storage import Storage

OUTSIDE = ROOT / "tests/outside"
SETTINGS = (
    "model={kind: plain, width: 8}",
    "diffusion.schedule={kind: cubic, beta_end: 0.2, scale: absolute}", "diffusion.prediction=minus_v",
    "training.timesteps=late", "search.space.loss.weighting.grid=[root_snr]",
    "evaluation.fid.sampler={kind: adams_bashforth, steps: 5, order: 1}", "evaluation.fid.also=[energy]",
    "search.metric=eval/energy_classifier",
)  # fmt: skip


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{OUTSIDE}")


def run_command(*arguments: object) -> tuple[int, str]:
    done = run("orchestrator.sweep", *arguments)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.faults
def test_a_sweep_names_one_of_each(tiny: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"

    def begun() -> int:
        return sum(event["event"] == "began" for event in read_events(Storage(storage), "tiny"))

    status, text = run_command(tiny, "--storage", storage, *SETTINGS)
    assert status == 0, text
    [row] = pd.read_parquet(storage / "sweeps/tiny/results.parquet").to_dict("records")
    assert row["state"] == "done" and row["eval/network_evaluations"] == 5 and 0 < row["eval/energy_classifier"] < 100
    status, text = run_command(tiny, "--storage", storage, *SETTINGS)
    assert status == 0 and begun() == 1, text
    again = [*SETTINGS[:5], "evaluation.fid.sampler={kind: adams_bashforth, steps: 5, order: 2}", *SETTINGS[6:]]
    status, text = run_command(tiny, "--storage", storage, *again)
    [other] = pd.read_parquet(storage / "sweeps/tiny/results.parquet").to_dict("records")
    assert status == 0 and begun() == 1 and other["eval/nll_bpd"] == row["eval/nll_bpd"]
    assert other["eval/energy_classifier"] != row["eval/energy_classifier"]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("evaluation.fid.sampler.kind=adams_bashfort", "did you mean 'adams_bashforth'?"),
        (
            "evaluation.fid.sampler={kind: adams_bashforth, order: 3}",
            "3 is not a whole number of at least 1 and at most 2",
        ),
        ("evaluation.fid.sampler.order=1", "without effect on kind: ddim"),
        ("diffusion.schedule.kind=cubic", "scale: per_1000 is without effect on kind: cubic, which reads beta_start"),
        ("search.metric=eval/energy", "these settings of evaluation.fid make eval/fd_classifier and"),
        ("diffusion.schedule.kind=cubi", "one of linear,"),
    ],
)
def test_mistakes_with_them_are_told_as_with_ours(tiny: Path, setting: str, wanted: str) -> None:
    status, text = run_command(tiny, "--dry-run", setting)
    assert status == 2 and wanted in text and "Traceback" not in text, text


def test_schema_and_tables_know_them() -> None:
    schema = run("orchestrator.schema").stdout
    assert "adams_bashforth" in json.loads(schema)["$defs"]["SamplerConfig"]["properties"]["kind"]["anyOf"][0]["enum"]
    table = run("orchestrator.schema", "--markdown").stdout
    assert "| `evaluation.fid.sampler.order` | a whole number of at least 1 and at most 2 | `2` |" in table
    assert "| `adams_bashforth` | the flow by the rule of Adams and Bashforth | `steps`, `order` |" in table


def test_the_page_shows_this_package() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    for name in ("samplers.py", "kinds.py"):
        code = (OUTSIDE / "mine" / name).read_text().split('"""', 2)[2].strip()
        assert f"```python\n{code}\n```" in page, name
    assert POINTS in page and f"[{POINTS}]" in (OUTSIDE / "mine-1.0.dist-info/entry_points.txt").read_text()
