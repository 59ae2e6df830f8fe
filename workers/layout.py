"""Where everything lies under a storage root, and the ids that it lies under. No other module makes such a path.

    trials/<trial>/            trial.yaml, status.json, journal.jsonl, samples/, checkpoints/step-00002000/
    evaluations/<checkpoint>/  <what>-<how>/block-00007.parquet, summary-<how>.json
    starts/<digest>/           weights from outside that trials start from
    references/                feature spaces, and moments of features of data
    code/<digest>/             modules from outside that names are pinned to, and modules.json
    sweeps/<name>/             sweep.json, asked.json, events.jsonl, results.parquet, report.html, ...
    nightly/<suite>/<day>/     result.json, report.html; locks/, speeds/, shares/, pictures/, canaries/

An id is a digest of what it stands for (`workers.identity.compute_digest`). Types keep the kinds of ids apart.
"""

from typing import NewType

TrialId = NewType("TrialId", str)  # of a trial: the digest of all that changes its weights
RowId = NewType("RowId", str)  # of a row of a sweep: the trial's id, and a suffix where several rows measure that trial
CheckpointId = NewType("CheckpointId", str)  # of weights, by their content

TRIALS, SWEEPS, EVALUATIONS, SPEEDS, REFERENCES = "trials", "sweeps", "evaluations", "speeds", "references"
CANARY_FOLDER, SHARES = "canaries", "shares"


def get_trial_of_row(row: str) -> TrialId:
    """The trial that a row of a sweep measures."""
    return TrialId(row.partition("-")[0])


def make_row_id(trial: TrialId, suffix: str) -> RowId:
    return RowId(f"{trial}-{suffix}" if suffix else trial)


def name_trial_folder(trial: str) -> str:
    return f"{TRIALS}/{trial}"


def name_trial_file(trial: str, name: str) -> str:
    return f"{name_trial_folder(trial)}/{name}"


def name_status_file(trial: str) -> str:
    return name_trial_file(trial, "status.json")


def name_checkpoints_folder(trial: str) -> str:
    return name_trial_file(trial, "checkpoints")


def name_trial_lock(trial: str) -> str:
    """What the process holds that trains a trial: sweeps may share it, and one trains it at a time."""
    return f"locks/{trial}"


def name_start_folder(pin: str) -> str:
    """Of the weights that trials start from, from outside of their sweep."""
    return f"starts/{pin}"


def name_sweep_folder(sweep: str) -> str:
    return f"{SWEEPS}/{sweep}"


def name_sweep_file(sweep: str, name: str) -> str:
    return f"{name_sweep_folder(sweep)}/{name}"


def name_report_file(sweep: str) -> str:
    return name_sweep_file(sweep, "report.html")


def name_published_file(sweep: str) -> str:
    """What says that all of a sweep is done and shipped."""
    return name_sweep_file(sweep, "published.json")


def name_sweep_lock(sweep: str) -> str:
    return name_sweep_file(sweep, "lock")


def name_evaluation_folder(checkpoint: str) -> str:
    """Of all measurements of a checkpoint."""
    return f"{EVALUATIONS}/{checkpoint}"


def name_summary_file(checkpoint: str, protocol: str) -> str:
    return f"{name_evaluation_folder(checkpoint)}/summary-{protocol}.json"


def name_speed_file(model: str) -> str:
    return f"{SPEEDS}/{model}.json"


def name_peak_file(of: str) -> str:
    """Of a kind of hardware, in a precision and with a number of threads."""
    return f"{SPEEDS}/peak-{of}.json"


def name_share_file(model: str, batch_size: int) -> str:
    """What part of a GPU trials of that network and batch need."""
    return f"{SHARES}/{model}-{batch_size}.json"


def name_reference_file(name: str) -> str:
    return f"{REFERENCES}/{name}"


def name_code_file(digest: str, name: str) -> str:
    return f"code/{digest}/{name}"


def name_pictures_folder(checkpoint: str) -> str:
    return f"pictures/{checkpoint}"


def name_nights_folder(suite: str) -> str:
    return f"nightly/{suite}"
