"""`from orchestrator import ...`: what the sweep's command can `run_sweep` can, and what it warns of is a warning."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import orchestrator
from orchestrator import Mistake, api, cli, load_results, open_model, preview, run_sweep, sweep

ODD = ["data.held_out=0.2", "training.batch_size=2000"]  # one of the data, one of preflight


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the controller is asked to run; it runs nothing."""
    from orchestrator import controller

    calls: list[dict[str, Any]] = []

    def run(experiment: Any, trials: Any, sources: Any, command: Any) -> int:
        calls.append({"experiment": experiment, "trials": trials, **vars(command)})
        return cli.DONE

    monkeypatch.setattr(controller, "run", run)
    monkeypatch.setattr("orchestrator.clusters.attaching.check_attachable", lambda ray_address: None)
    return calls


def test_what_the_command_can_the_function_can() -> None:
    """All but what only prints, and sending a job to another machine."""
    options = {action.dest for action in sweep.make_parser()._actions} - {"help"}
    assert set(inspect.signature(run_sweep).parameters) == options - {
        "dry_run",
        "calibrate",
        "prices",
        "submit",
        "slurm",
    }


@pytest.mark.parametrize(
    "function", [preview, run_sweep, load_results, open_model, api.DiffusionModel.sample, api.DiffusionModel.__call__]
)
def test_beyond_two_all_arguments_have_names(function: Any) -> None:
    kinds = [p.kind for name, p in inspect.signature(function).parameters.items() if name != "self"]
    assert sum(kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 2


def test_the_function_runs_what_the_command_runs(tiny: Path, asked: list[dict[str, Any]]) -> None:
    cluster = ROOT / "cluster.yaml"
    words = ["--address", "auto", "--cluster", str(cluster), "--storage", "s", "--fresh", "-v"]
    assert sweep.main([str(tiny), "seed=3", *words, "--tracking-uri", "http://127.0.0.1:1"]) == cli.DONE
    done = run_sweep(
        tiny, "seed=3", storage="s", ray_address="auto", cluster=cluster, tracking_uri="http://127.0.0.1:1",
        fresh=True, quiet=False, verbose=True,
    )  # fmt: skip
    assert done.ok and asked[0] == asked[1] and asked[0]["experiment"].tracking.uri == "http://127.0.0.1:1"
    assert asked[0]["ray_address"] == "auto" and asked[0]["fresh"] and asked[0]["verbose"] and asked[0]["cluster"]


def test_it_is_refused_what_the_command_is_refused(tiny: Path) -> None:
    with pytest.raises(Mistake, match="goes with ray_address"):
        run_sweep(tiny, cluster=ROOT / "cluster.yaml")
    with pytest.raises(Mistake, match="--address http://head:8265"):
        run_sweep(tiny, ray_address="http://head:8265")


def test_what_the_command_warns_of_is_a_warning_at_the_callers_line(
    tiny: Path, tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(tiny), *ODD, "--quiet", "--storage", str(tmp_path)]) == cli.DONE
    told = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]
    assert len(told) == 2
    for function in (preview, run_sweep):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(tiny, *ODD)
        assert [str(warning.message) for warning in caught] == told
        assert {warning.filename for warning in caught} == {__file__}
        assert capsys.readouterr() == ("", "")
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="held_out"):
            warnings.simplefilter("error")
            function(tiny, *ODD)
    run_sweep(tiny, quiet=False)
    assert capsys.readouterr().err.startswith("data   ")


def test_a_mistake_can_be_caught_without_loading_torch(tiny: Path) -> None:
    code = (
        "import sys\n"
        "from orchestrator import Mistake, run_sweep\n"
        "try:\n"
        f"    run_sweep({str(tiny)!r}, 'training.stepz=1')\n"
        "except Mistake as mistake:\n"
        "    print('training.steps' in str(mistake), sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "True []\n", result.stderr
    assert set(orchestrator.__all__) <= set(dir(orchestrator))
