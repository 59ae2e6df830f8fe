"""Measurements of checkpoints outside a sweep: make the blocks that are missing, and give the summaries."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import plan
from orchestrator.clusters.cluster import cluster_of_the_head
from orchestrator.execution import session
from orchestrator.execution.evaluations import Evaluations
from orchestrator.subjects import Subject
from orchestrator.terminal import Display, Line
from workers import tasks
from workers.blocks import Images, blocks, summary_path
from workers.config import DataConfig
from workers.data import Source, prepare
from workers.features import check_spaces
from workers.storage import Storage


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
    display: Display,
    address: str | None,
    at_once: int | None,
) -> list[Measured]:
    """Measures the subjects, `at_once` blocks at a time where Ray is this machine's own.

    Starts no Ray where everything is there. Raises Mistake where the Inception weights or the cluster are missing.
    """
    work = []
    for subject in subjects:
        images, digest = Images.of(sources[subject.m.data]), subject.checkpoint.digest
        planned, path = blocks(subject.m, digest, images), summary_path(subject.m, digest, images)
        work.append((subject, planned, plan.missing(planned, storage.list), path))
    to_do = {path: (subject, planned, missing) for subject, planned, missing, path in work
             if missing or storage.read_sealed(path) is None}  # fmt: skip
    failed: dict[str, str] = {}
    if to_do:
        check_spaces(s.m.evaluation.fid for s in subjects)
        for config in sources:
            prepare(config)
        lines = {path: Line(s.name, 0, 1, "evaluating", blocks=len(p), blocks_left=len(m))
                 for path, (s, p, m) in to_do.items()}  # fmt: skip
        display.lines |= {f"{to_do[path][0].checkpoint.digest}-{path}": line for path, line in lines.items()}
        with display, session.session(address, at_once):
            session.check_seen(storage)
            cluster = cluster_of_the_head() if address else None
            evaluations, gpus = Evaluations(), int(any(n.gpus for n in session.nodes_ever(cluster)))
            for path, (subject, planned, missing) in to_do.items():
                evaluations.submit(
                    path, tasks.make_order(storage, subject.m, subject.checkpoint, gpus), planned, missing
                )
            while evaluations:
                for path, why in evaluations.poll(0.2):
                    failed[path] = why
                    lines[path].state = "failed" if why else "done"
                for path, piece, why in evaluations.take_retried():
                    display.say(f"{lines[path].name}  {piece}: {why}")
                for path, line in lines.items():
                    line.blocks_left = evaluations.left(path)
                display.refresh()
    return [
        Measured(subject, _kinds(planned), _kinds(missing), storage.read_sealed(path), failed.get(path, ""))
        for subject, planned, missing, path in work
    ]


def _kinds(of: Sequence[Any]) -> Counter[str]:
    return Counter(block.kind for block in of)
