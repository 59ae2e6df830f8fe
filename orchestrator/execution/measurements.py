"""Measurements of checkpoints outside a sweep: make the blocks that are missing, and give the summaries."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator.clusters.cluster import find_cluster_of_head
from orchestrator.execution import local_ray, session
from orchestrator.execution.evaluations import Evaluations
from orchestrator.execution.loss import repeat_where_lost
from orchestrator.experiment.measured_weights import describe_average
from orchestrator.measuring.subjects import Subject
from orchestrator.output.table import format_metric, format_value
from orchestrator.output.terminal import Display, Line
from orchestrator.planning.decide import find_missing_blocks
from workers.bundles import check_code, keep_bundle
from workers.config import DataConfig
from workers.consent import remember
from workers.data.dataset import prepare
from workers.data.sources import Source
from workers.evaluation.blocks import Images, list_blocks, name_summary
from workers.evaluation.features import check_spaces
from workers.network import manifest
from workers.storage import Storage
from workers.tasks import make_order


@dataclass(frozen=True)
class Measured:
    """A subject's summary, and how many blocks of each kind there are, and were missing."""

    subject: Subject
    planned: Counter[str]
    missing: Counter[str]
    summary: Mapping[str, Any] | None
    failed: str = ""


def measure(
    subjects: Sequence[Subject],
    sources: Mapping[DataConfig, Source],
    storage: Storage,
    *,
    display: Display,
    ray_address: str | None,
    at_once: int | None = None,
) -> list[Measured]:
    """Measures the subjects, `at_once` blocks at a time where Ray is this machine's own.

    Starts no Ray where everything is there, and starts its own again where it dies. A trial that is still training
    removes its checkpoints one after the other: where that of a subject is gone before it is measured, the newest is.
    Raises Mistake where the Inception weights or the cluster are missing, Unwritable, and ClusterLost.
    """

    def work() -> list[Measured]:
        with ExitStack() as opened:
            as_they_are = partial(
                _measure, sources=sources, storage=storage, display=display,
                ray_address=ray_address, at_once=at_once, opened=opened,
            )  # fmt: skip
            measured = as_they_are(subjects)
            while later := {i: s for i, m in enumerate(measured) if m.failed and (s := _find_later(m.subject))}:
                for subject in later.values():
                    step = subject.checkpoint.step
                    text = f"has gone on training; its checkpoint of step {step} is measured instead"
                    display.say(f"{subject.name}  {text}")
                again = as_they_are(list(later.values()))
                for i, found in zip(later, again, strict=True):
                    measured[i] = found
        return measured

    return repeat_where_lost(work, display.say, may=ray_address is None and not session.is_open())


def _find_later(subject: Subject) -> Subject | None:
    """The subject with the newest checkpoint of its trial; None where its own is still there, or there is none."""
    own = subject.checkpoint
    folder, storage = own.path.rpartition("/")[0], Storage(own.root)
    if not folder or storage.exists(f"{own.path}/{manifest.MANIFEST}"):
        return None
    newest = manifest.find_newest(storage, folder)
    return replace(subject, checkpoint=manifest.choose_weights(newest, subject.m.evaluation)) if newest else None


def _measure(
    subjects: Sequence[Subject],
    sources: Mapping[DataConfig, Source],
    storage: Storage,
    *,
    display: Display,
    ray_address: str | None,
    at_once: int | None,
    opened: ExitStack,
) -> list[Measured]:
    """Measures the subjects' checkpoints as they are; brings up Ray in `opened` if it has to."""
    work = []
    for subject in subjects:
        images, digest = Images.of(sources[subject.m.data]), subject.checkpoint.digest
        planned, path = list_blocks(subject.m, digest, images), name_summary(subject.m, digest, images)
        work.append((subject, planned, find_missing_blocks(planned, storage.list), path))
    to_do = {path: (subject, planned, missing) for subject, planned, missing, path in work
             if missing or storage.read_sealed(path) is None}  # fmt: skip
    failed: dict[str, str] = {}
    if to_do:
        for bundle in check_code(s.m for s in subjects):
            keep_bundle(storage, bundle)
            remember([bundle.digest])
        check_spaces(s.m.evaluation.fid for s in subjects)
        for config in sources:
            prepare(config)
        lines = {path: Line(s.name, 0, 1, "evaluating", blocks=len(p), blocks_left=len(m))
                 for path, (s, p, m) in to_do.items()}  # fmt: skip
        display.lines.update({f"{to_do[path][0].checkpoint.digest}-{path}": line for path, line in lines.items()})
        watchdog = opened.enter_context(session.open_session(ray_address, cpus=at_once))
        with display:
            session.check_seen(storage)
            cluster = find_cluster_of_head() if ray_address else None
            evaluations, nodes = Evaluations(cluster), session.list_nodes_ever(cluster)
            gpus = int(any(n.gpus for n in nodes))
            for path, (subject, planned, missing) in to_do.items():
                session.check_precision(subject.m.evaluation, nodes)
                evaluations.submit(path, make_order(storage, subject.m, subject.checkpoint, gpus), planned, missing)
            while evaluations:
                local_ray.check_room()
                session.check()
                for path, why in evaluations.poll(0.2):
                    failed[path] = why
                    lines[path].state = "failed" if why else "done"
                for _, why in watchdog.take():
                    display.say(why)
                for path, piece, why in evaluations.take_retried():
                    display.say(f"{lines[path].name}  {piece}: {why}")
                for path, line in lines.items():
                    line.blocks_left = evaluations.count_left(path)
                display.refresh()
    return [
        Measured(subject, _count_kinds(planned), _count_kinds(missing), storage.read_sealed(path), failed.get(path, ""))
        for subject, planned, missing, path in work
    ]


def describe_measured(measured: Measured) -> dict[str, Any]:
    """All that is known of a measurement, in plain types."""
    subject = measured.subject
    return {
        "name": subject.name,
        "trial": subject.trial,
        "checkpoint": subject.checkpoint.url,
        "blocks": dict(measured.planned),
        "blocks_run": dict(measured.missing),
        "failed": measured.failed,
        **(measured.summary or {}),
    }


def format_measured(measured: Measured) -> str:
    """A measurement for a person: each number with its error, then what the numbers are."""
    subject, summary = measured.subject, measured.summary
    ran = ", ".join(f"{measured.missing[k]} of {n} {k}" for k, n in measured.planned.items())
    lines = [f"{subject.name}  {subject.checkpoint.url}", f"  blocks run      {ran}; the others were there"]
    if measured.failed or summary is None:
        return "\n".join([*lines, f"  failed          {measured.failed}", ""])
    metrics = summary["metrics"]
    lines += [
        f"  {name.removeprefix('eval/'):<28} {format_metric(name, metrics, digits=4)}"
        for name in metrics
        if not name.endswith("_se")
    ]
    for variance, chains in summary.get("ledger", {}).items():
        each = ({"bpd": c["bpd"]} | ({} if c["bpd_se"] is None else {"bpd_se": c["bpd_se"]}) for c in chains)
        values = zip((c["steps"] for c in chains), each, strict=True)
        told = ", ".join(f"{steps}: {format_metric('bpd', value)}" for steps, value in values)
        lines.append(f"  bits/dim by steps, {variance:<12} {told}")
    if "average" in summary:
        lines.append(f"  average          width {describe_average(summary['average'])}")
    for kind, passport in summary["passports"].items():
        protocol = ", ".join(f"{name} {format_value(value)}" for name, value in passport["protocol"].items())
        lines.append(f"  {kind + ' protocol':<16} {protocol}")
        lines += [f"  warning         {text}" for text in passport.get("warnings", ())]
    return "\n".join([*lines, f"  hash            {summary['hash']}", ""])


def _count_kinds(of: Sequence[Any]) -> Counter[str]:
    return Counter(block.kind for block in of)
