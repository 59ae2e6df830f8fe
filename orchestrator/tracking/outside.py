"""What is measured or drawn outside of a sweep, in MLflow: on the run of its trial, or in an experiment of its own."""

import json
from collections.abc import Mapping, Sequence

from orchestrator.execution.measurements import Measured
from orchestrator.measuring.subjects import Subject
from orchestrator.state.saved import list_sharing, open_sweep
from orchestrator.tracking.provenance import collect_provenance
from orchestrator.tracking.runs import FLUSH_S, flatten_params
from orchestrator.tracking.tracker import Tracker
from workers.config import DataConfig
from workers.data.sources import Source
from workers.evaluation.blocks import Images, make_protocol_key
from workers.layout import SWEEPS, get_trial_of_row, name_sweep_file
from workers.storage import Storage

ELSEWHERE = "evaluations"  # the experiment of checkpoints that come from elsewhere


def record_measurement(
    storage: Storage, uri: str | None, measured: Sequence[Measured], sources: Mapping[DataConfig, Source]
) -> str:
    """Measurements made outside of a sweep: on the run of their trial, or else in the experiment `evaluations`.

    What is measured by another protocol than the trial's own gets names of its own, `eval.<key>/...`, so that no two
    protocols share an axis. Returns what MLflow did not take, in words. Raises Mistake where it cannot be reached.
    """
    trackers: dict[str, Tracker] = {}
    for m in measured:
        subject, source, summary = m.subject, sources[m.subject.m.data], m.summary
        if summary is None:
            continue
        sweep, own_uri = _find_sweep(storage, subject.trial)
        if uri is not None and uri != own_uri:  # the run of the trial is not there
            sweep, own_uri = ELSEWHERE, uri
        if sweep not in trackers:
            tracker = trackers[sweep] = Tracker(storage, sweep, own_uri)
            tracker.check()
            if sweep == ELSEWHERE:
                tracker.open_sweep({}, collect_provenance(), "Checkpoints that no sweep of this storage has trained.")
        tracker = trackers[sweep]
        key = make_protocol_key(subject.m, Images.of(source))
        tags = {f"protocol.{key}": json.dumps(summary["passports"]), f"hash.{key}": summary["hash"]}
        if subject.trial and sweep != ELSEWHERE:
            row_id, prefix = subject.trial, "eval" if subject.m == subject.own else f"eval.{key}"
            tracker.open_trial(row_id, subject.name, {}, tags)
        else:  # a run for each protocol
            row_id, prefix = f"{subject.checkpoint.digest}-{key}", "eval"
            tracker.open_trial(row_id, subject.name, flatten_params(subject.m.model_dump(mode="json")), tags)
        metrics = {f"{prefix}/{name.removeprefix('eval/')}": value for name, value in summary["metrics"].items()}
        tracker.log_metrics(row_id, metrics, subject.checkpoint.step or 0)
        tracker.log_artifact(row_id, json.dumps(summary, indent=2).encode(), f"evaluation-{key}.json")
        if sweep == ELSEWHERE:
            tracker.close_trial(row_id, "FINISHED")
    for sweep, tracker in trackers.items():
        if sweep == ELSEWHERE:
            tracker.close_sweep("FINISHED")
    left = [tracker.flush(FLUSH_S) for tracker in trackers.values()]
    return "\n".join(str(shipment) for shipment in left if not shipment.complete)


def record_pictures(storage: Storage, uri: str | None, subject: Subject, paths: Mapping[str, str]) -> str:
    """Pictures of a checkpoint, PNG files of the storage by name, on its trial's run or in `evaluations`.

    Returns what MLflow did not take, in words. Raises Mistake where it cannot be reached.
    """
    sweep, own_uri = _find_sweep(storage, subject.trial)
    if uri is not None and uri != own_uri:
        sweep, own_uri = ELSEWHERE, uri
    tracker = Tracker(storage, sweep, own_uri)
    tracker.check()
    row_id = subject.trial if subject.trial and sweep != ELSEWHERE else f"{subject.checkpoint.digest}-pictures"
    if sweep == ELSEWHERE:
        tracker.open_sweep({}, collect_provenance(), "Checkpoints that no sweep of this storage has trained.")
    tracker.open_trial(row_id, subject.name, {}, {})
    for name, path in paths.items():
        tracker.log_image(row_id, f"pictures/{name}", path, subject.checkpoint.step or 0)
    tracker.close_trial(row_id, "FINISHED")
    if sweep == ELSEWHERE:
        tracker.close_sweep("FINISHED")
    shipment = tracker.flush(FLUSH_S)
    return "" if shipment.complete else str(shipment)


def _find_sweep(storage: Storage, trial: str | None) -> tuple[str, str | None]:
    """The sweep in whose MLflow experiment the trial has a run, and the tracking URI of that."""
    for name in storage.list(SWEEPS) if trial else []:
        for key, runs in (storage.read_sealed(name_sweep_file(name, "mlflow.json")) or {}).items():
            if trial in runs or any(get_trial_of_row(run) == trial for run in runs):
                return name, None if key == "mlflow.db" else str(key)
    for name in list_sharing(storage, "").get(trial or "", ()):  # its map of runs is lost; their tags are not
        return name, open_sweep(storage, name).experiment["tracking"]["uri"]
    return ELSEWHERE, None
