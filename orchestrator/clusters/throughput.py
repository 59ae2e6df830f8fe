"""`--dry-run --calibrate`: a few real steps and evaluations of each distinct model here, so that a plan has speeds."""

import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from orchestrator.clusters.cost import learn
from orchestrator.experiment.records import Variant
from workers.calibration import measure_speed
from workers.config import DataConfig
from workers.data.dataset import prepare
from workers.data.sources import Source
from workers.layout import RowId
from workers.speed import add_spent, count_cores, make_model_key, name_training_kind
from workers.storage import Storage


def calibrate(trials: Mapping[RowId, Variant], sources: Mapping[DataConfig, Source], storage: Storage) -> None:
    """Measures every network, batch and feature space once, on as many cores at once as a sweep uses here."""
    distinct = {}
    for variant in trials.values():
        trial, fid = variant.trial, variant.trial.evaluation.fid
        shape, precision = sources[trial.data].diffused, trial.evaluation.precision
        key = make_model_key(trial.model, trial.training, shape, precision), name_training_kind(trial.training)
        distinct[key, fid and fid.features] = trial
    for config in sources:
        prepare(config)
    for trial in distinct.values():
        at_once = max(1, count_cores() // trial.training.cpus)
        print(f"calibrating {name_training_kind(trial.training)}, {at_once} at once ...", file=sys.stderr)
        with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
            measured = list(pool.map(measure_speed, [trial] * at_once, [storage.root] * at_once))
        hardware, spent = measured[0]
        for _, other in measured[1:]:
            spent = add_spent(spent, other)
        learn(storage, trial, sources[trial.data], hardware, spent, said_by="a calibration")
