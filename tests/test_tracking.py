"""MLflow holds what the journals hold, as what a person looks for."""

import base64
import json
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import tracked_sweep
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from PIL import Image
from tracked_sweep import PARAMS, START_MS, client_of, history_of, image_files, points_of, runs_of, write_journal

from orchestrator.tracking.provenance import collect_provenance
from orchestrator.tracking.server import resolve_uri
from orchestrator.tracking.shipment import format_param
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import ComparisonView
from workers.storage import Storage

storage = tracked_sweep.storage
done = tracked_sweep.done


def test_a_sweep_is_a_parent_and_its_trials_children(done: Any) -> None:
    tracker, _ = done
    runs = runs_of(tracker)
    assert sorted(runs) == ["d0", "d1", "sweep"] and all(len(same) == 1 for same in runs.values())
    (sweep,) = runs.pop("sweep")
    assert sweep.info.run_name == "done" and sweep.info.status == "FINISHED"
    for (run,) in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.note.content"] == "**3.25** bits/dim"
    assert client_of(tracker).get_experiment_by_name("done").tags["mlflow.note.content"] == "# A sweep"


def test_params_are_texts_that_a_chart_reads_as_numbers(done: Any) -> None:
    (run,) = runs_of(done[0])["d0"]
    assert run.data.params == {
        "diffusion.T": "50",
        "training.lr": "0.0001",
        "model.multipliers": "[1, 2]",
        "loss.weighting": "simple",
    }
    assert [format_param(value) for value in (1e-5, True, None, 0.1 + 0.2)] == [
        "1e-05",
        "true",
        "null",
        "0.30000000000000004",
    ]


def test_metrics_are_those_of_the_journal(done: Any) -> None:
    tracker, lines = done
    for digest, expected in lines.items():
        (run,) = runs_of(tracker)[digest]
        for key in ("train/loss_simple", "valid/nll_bpd"):
            assert history_of(tracker, run, key) == points_of(expected, key)
        assert run.info.start_time == START_MS + ord("a")


def test_images_lie_at_their_steps_under_the_names_of_log_image(done: Any) -> None:
    tracker, lines = done
    (run,) = runs_of(tracker)["d0"]
    files = image_files(tracker, run)
    steps = [line["step"] for line in lines["d0"] if "image" in line]
    for kind in (".png", "+compressed.webp"):
        # Compared with what MLflow writes itself: images/<key>+step+<n>+timestamp+<ms>+<uuid>[+compressed].<ext>
        parts = [file.removesuffix(kind).split("+") for file in files if file.endswith(kind)]
        assert sorted(int(part[2]) for part in parts) == steps
        assert {(part[0], part[1], part[3], len(part[5])) for part in parts} == {
            ("images/eval~samples", "step", "timestamp", 36)
        }
    assert run.data.tags["mlflow.loggedImages"] == "True"
    scratch = client_of(tracker).create_run(run.info.experiment_id)
    client_of(tracker).log_image(scratch.info.run_id, Image.new("RGB", (300, 200)), key="eval/samples", step=6)
    client_of(tracker).set_terminated(scratch.info.run_id)
    theirs = [file.split("+") for file in image_files(tracker, scratch)]
    client_of(tracker).delete_run(scratch.info.run_id)
    ours = [file.split("+") for file in files if "+step+6+" in file]
    assert [[len(p), p[:4], p[6:]] for p in ours] == [[len(p), p[:4], p[6:]] for p in theirs]


def test_the_data_set_is_an_input_of_the_run(done: Any) -> None:
    (run,) = runs_of(done[0])["d0"]
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", "d" * 36)
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}
    assert json.loads(used.dataset.profile) == {"training": 1617}
    assert "[-1, 8, 8, 1]" in json.loads(used.dataset.schema)["mlflow_tensorspec"]["features"]


def test_what_mlflow_would_spoil_is_kept_in_other_ways(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    storage.write(
        "trials/n0/journal.jsonl",
        b'{"step": 7, "time_ms": 1764000000000, "metrics": {"train/loss_simple": Infinity, "valid/nll_bpd": 3.0}}\n'
        b'{"step": 8, "time_ms": 1764000000001, "metrics": {"train/loss_simple": NaN}}\n',
    )
    tracker = Tracker(storage, "spoiled")
    tracker.open_sweep({}, {})
    tracker.open_trial("n0", "n0", {"T": 50, "long": "x" * 7000}, {})
    tracker.log_artifact("n0", b"a report", "reports/report.txt")
    tracker.close_trial("n0", "FAILED", "y" * 9000)
    assert tracker.flush(120).complete
    (run,) = runs_of(tracker)["n0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["nonfinite.train/loss_simple"] == "inf at step 7"
    assert list(run.data.metrics) == ["valid/nll_bpd"] and all(map(math.isfinite, run.data.metrics.values()))
    client = client_of(tracker)
    for path, text in (
        ("long/long.txt", "x" * 7000),
        ("long/mlflow.note.content.txt", "y" * 9000),
        ("reports/report.txt", "a report"),
    ):
        assert Path(client.download_artifacts(run.info.run_id, path)).read_text() == text
    assert "artifact long/long.txt" in run.data.params["long"] and len(run.data.params["long"]) < 200
    assert len(run.data.tags["mlflow.note.content"]) <= 8000

    again = Tracker(storage, "spoiled")
    again.open_sweep({}, {})
    again.open_trial("n0", "n0", {"T": 200}, {})
    again.close_sweep("FINISHED")
    assert again.flush(120).complete
    (run,) = runs_of(tracker)["n0"]
    assert run.data.params["T"] == "50" and run.data.tags["changed.T"] == "200"
    assert "MLflow keeps T=50; it is now 200" in caplog.text


def test_params_of_any_type_and_metrics_that_are_not_finite(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """As a search over `evaluation.nll.timesteps` of [all, 10] has them: another type in each trial."""
    values: list[Any] = [
        "all",
        10,
        None,
        True,
        [1, "a"],
        {"b": None},
        1e-5,
        math.inf,
        math.nan,
        "x" * 6001,
        ["y" * 6000],
        "é" * 6000,
    ]
    for _ in range(2):
        tracker = Tracker(storage, "mixed")
        tracker.open_sweep({}, {})
        for number, value in enumerate(values):
            tracker.open_trial(f"t{number}", f"t{number}", {"evaluation.nll.timesteps": value}, {})
            odd = {"eval/a": math.inf, "eval/b": -math.inf, "eval/c": math.nan, "eval/d": 1.5}
            tracker.log_metrics(f"t{number}", odd, step=3)
            tracker.close_trial(f"t{number}", "FINISHED")
        tracker.close_sweep("FINISHED")
        left = tracker.flush(120)
        assert left.complete, str(left)
    runs = runs_of(tracker)
    texts = {
        address: run.data.params["evaluation.nll.timesteps"] for address, [run] in runs.items() if address != "sweep"
    }
    assert [texts[f"t{n}"] for n in range(9)] == [format_param(value) for value in values[:9]]
    assert (
        all("artifact long/evaluation.nll.timesteps.txt" in texts[f"t{n}"] for n in (9, 10))
        and texts["t11"] == values[11]
    )
    for [run] in (same for address, same in runs.items() if address != "sweep"):
        assert run.data.metrics == {"eval/d": 1.5} and len(history_of(tracker, run, "eval/d")) == 1
        tags = {key: text for key, text in run.data.tags.items() if key.startswith(("nonfinite", "changed"))}
        assert tags == {
            "nonfinite.eval/a": "inf at step 3",
            "nonfinite.eval/b": "-inf at step 3",
            "nonfinite.eval/c": "nan at step 3",
        }
    assert "MLflow keeps" not in caplog.text


def test_a_refused_call_is_told_and_the_others_go_on(storage: Storage) -> None:
    tracker = Tracker(storage, "refused")
    tracker.open_sweep({}, {})
    tracker.log_metrics(None, {"a#b": 1.0})  # not a name that MLflow takes
    tracker.log_metrics(None, {"good": 2.0})
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert not left.complete and left.calls == 0
    assert "is without metrics a#b" in str(left)
    (run,) = runs_of(tracker)["sweep"]
    assert run.data.metrics == {"good": 2.0} and run.info.status == "FINISHED"


def test_a_server_that_refuses_all_is_told_in_a_few_lines(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    tracker = Tracker(storage, "forbidden")
    monkeypatch.setattr(MlflowClient, "create_run", refuse)
    tracker.open_sweep({}, {})
    for number in range(20):
        tracker.open_trial(f"p{number}", f"p{number}", PARAMS, {})
    left = tracker.flush(120)
    assert left.calls == 0 and len(left.refused) > 20
    assert "opening the sweep: MlflowException: Permission denied" in str(left).splitlines()[0]
    assert len(str(left).splitlines()) == 5
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "is without" in r.getMessage()]) == 3


def test_a_missing_image_is_told_and_holds_nothing_back(storage: Storage) -> None:
    lines = write_journal(storage, "m0", 5)
    storage.delete("trials/m0/samples/step-00000000.png")
    tracker = Tracker(storage, "missing")
    tracker.open_sweep({}, {})
    tracker.open_trial("m0", "m0", {}, {})
    tracker.close_sweep("FINISHED")
    left = tracker.flush(120)
    assert not left.complete and "image trials/m0/samples/step-00000000.png: it is gone or damaged" in str(left)
    (run,) = runs_of(tracker)["m0"]
    assert history_of(tracker, run, "valid/nll_bpd") == points_of(lines, "valid/nll_bpd")
    assert len(image_files(tracker, run)) == 2


def test_where_runs_go(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert resolve_uri(storage, None) == (f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "mlartifacts").as_uri())
    assert resolve_uri(storage, "http://host:5000/") == ("http://host:5000", None)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        resolve_uri(storage, "https://me:secret@host")
    storage.is_local = False
    with pytest.raises(ValueError, match=r"tracking\.uri=http"):
        resolve_uri(storage, None)


def test_the_link_shows_the_trials_of_the_sweep_side_by_side(done: Any) -> None:
    tracker, _ = done
    page, _, query = tracker.find_link().partition("?")
    experiment = client_of(tracker).get_experiment_by_name("done")
    assert page == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    options = {key: value for key, (value,) in parse_qs(query).items()}
    assert options["workflowType"] == "machine_learning" and options["compareRunsMode"] == "CHART"
    children = client_of(tracker).search_runs([experiment.experiment_id], unquote(options["searchFilter"]))
    assert sorted(run.data.tags["orchestrator.row"] for run in children) == ["d0", "d1"]


def views_of(tracker: Tracker) -> dict[str, Any]:
    """The states of the shared views by their titles."""
    tags = client_of(tracker).get_experiment_by_name(tracker.name).tags
    found = (json.loads(text) for key, text in tags.items() if key.startswith("mlflow.sharedViewState."))
    return {
        view["name"]: json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
        for view in found
    }


def test_the_ready_made_comparison_goes_along_with_the_sweep(storage: Storage) -> None:
    """Its link is the same from the beginning; the step of the images and the best trial are those of the moment."""
    compare = ComparisonView(
        params=("diffusion.T",), metrics=("eval/nll_bpd", "eval/fd_classifier"), images=("eval/samples",)
    )
    tracker = Tracker(storage, "compared")
    tracker.open_sweep({}, {}, "# A sweep", compare)
    link = tracker.find_link()
    assert tracker.is_open and tracker.flush(120).complete
    options = parse_qs(link.partition("?")[2])
    assert "searchFilter" not in options  # it would switch the shared view off
    experiment = client_of(tracker).get_experiment_by_name("compared")
    assert f"mlflow.sharedViewState.{options['viewStateShareKey'][0]}" in experiment.tags
    note = experiment.tags["mlflow.note.content"]
    assert note.startswith("# A sweep") and f"(#{link.partition('#')[2]})" in note

    def image_step() -> int:
        state = views_of(tracker)["compared: all trials"]
        [image] = [chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"]
        return int(image["step"])

    assert image_step() == 0
    for name, steps in (("c0", 7), ("c1", 4)):
        write_journal(storage, name, steps)
        tracker.open_trial(name, name, {}, {})
    assert tracker.flush(120).complete
    assert image_step() == 3  # c0 has images of 0, 3 and 6
    write_journal(storage, "c1", 7)
    tracker.close_trial("c1", "FINISHED")
    tracker.show(replace(compare, best="c1"))
    assert tracker.flush(120).complete
    assert image_step() == 6 and tracker.find_link() == link
    state = views_of(tracker)["compared: all trials"]
    [difference] = [chart for chart in state["compareRunCharts"] if chart["type"] == "DIFFERENCE"]
    (best,) = runs_of(tracker)["c1"]
    assert difference["baselineColumnUuid"] == best.info.run_id
    children = client_of(tracker).search_runs([experiment.experiment_id], state["searchFilter"])
    assert len(children) == 2


def test_provenance_says_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "orchestrator.sweep", "--storage", "s3://key:secret@bucket"])
    tags = collect_provenance()
    assert tags["command"] == "-m orchestrator.sweep --storage s3://***@bucket"
    assert tags["mlflow.source.name"] == "orchestrator.sweep"
    assert {"mlflow.user", "host", "hardware.cpu", "hardware.cores", "version.python", "version.mlflow"} <= tags.keys()
    assert all(isinstance(value, str) for value in tags.values())
