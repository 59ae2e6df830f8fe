"""How the rows of a sweep stand: what the storage holds of each, and which of them share a trial.

A row is a trial at a step, measured in one way. Rows that differ in no more than the step and the measurement share a
trial, which is trained once, as far as the furthest of them asks. Neither Ray nor MLflow is imported here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from orchestrator.experiment.expand import find_starting_rows
from orchestrator.experiment.records import Experiment, Variant
from orchestrator.experiment.starts import list_slots, shorten_slot
from orchestrator.planning.changes import CodeChange, list_changes
from orchestrator.planning.decide import Decision, decide, make_scheduler_key
from orchestrator.state.events import EVENTS
from orchestrator.state.rows import Found, Row, rank_rows
from orchestrator.state.saved import find, forget_asked, list_sharing, read_code
from workers.bundles import collect_bundles
from workers.config import DataConfig, Measurement, Trial
from workers.data.sources import Source, describe
from workers.evaluation.blocks import Images, make_protocol_key
from workers.journal import find_validated_steps, is_whole, restore
from workers.layout import (
    RowId,
    TrialId,
    get_trial_of_row,
    name_checkpoints_folder,
    name_evaluation_folder,
    name_start_folder,
    name_status_file,
    name_sweep_file,
    name_sweep_folder,
    name_trial_folder,
    name_trial_lock,
)
from workers.locks import Leases
from workers.network import manifest
from workers.network.manifest import Checkpoint, CheckpointError
from workers.storage import Storage
from workers.warm_start import BEGINNINGS, split_pin


def explain_absent(slot: str, start: RowId, why: str) -> str:
    """Why a trial cannot be made that starts from a row."""
    return f"it starts from {start[:8]} ({shorten_slot(slot)}), which is not there: {why}"


@dataclass
class Standing:
    """The rows of a sweep in order, and what was found of them when they were looked at last."""

    experiment: Experiment
    sources: dict[DataConfig, Source]
    storage: Storage
    say: Callable[[str], None]
    variants: dict[RowId, Variant] = field(default_factory=dict)
    found: dict[RowId, Found] = field(default_factory=dict)
    errors: dict[RowId, str] = field(default_factory=dict)  # why this command could not make a row
    sharing: dict[TrialId, list[RowId]] = field(default_factory=dict)
    starts: dict[RowId, dict[str, RowId]] = field(default_factory=dict)  # the rows that each starts from, by slot
    changes: dict[RowId, CodeChange] = field(default_factory=dict)  # of code from outside, since the command before
    evaluation_s: dict[str, dict[str, float]] = field(default_factory=dict)  # what blocks used, as events tell

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler_key(self.experiment.search.scheduler)
        self.leases = Leases(self.storage)
        self.owner = f"sweep {self.experiment.name}"
        self.code_before = read_code(self.storage, self.experiment.name)

    def add(self, variants: Mapping[RowId, Variant]) -> list[RowId]:
        """Takes in the rows that are not there yet. Returns their ids."""
        new = [row for row in variants if row not in self.variants]
        files = {
            digest: bundle.digests for digest, bundle in collect_bundles(v.trial for v in variants.values()).items()
        }
        self.changes |= list_changes({row: variants[row] for row in new}, files, self.code_before)
        for row in new:
            self.variants[row] = variants[row]
            self.sharing.setdefault(get_trial_of_row(row), []).append(row)
        self.starts = find_starting_rows(self.variants, lambda config: self.get_source(config).digest)
        for row in new:
            self.look(row)
        return new

    def get_source(self, config: DataConfig) -> Source:
        if config not in self.sources:
            self.sources[config] = describe(config)
        return self.sources[config]

    def get_trial(self, row: RowId) -> Trial:
        return self.variants[row].trial

    def make_row(self, row: RowId) -> Row:
        of = self.variants[row], self.found[row], self.errors.get(row, "")
        return Row(row, *of, self.evaluation_s.get(row, {}))

    def make_rows(self) -> list[Row]:
        return [self.make_row(row) for row in self.variants]

    def rank_rows(self) -> list[Row]:
        return rank_rows(self.make_rows(), self.experiment.search.metric)

    def decide(self, row: RowId) -> Decision:
        decision = decide(self.found[row], self.scheduler, str(self.changes.get(row, "")))
        why = self.explain_stuck(row) if decision.action == "train" else ""
        return Decision("nothing", why) if why else decision

    def explain_stuck(self, row: RowId) -> str:
        """Why the row cannot be made: what it starts from is not there, and will not be. Empty where it can."""
        starts = self.starts.get(row)
        if not starts or self.found[row].checkpoint:
            return ""
        gone_by = BEGINNINGS if self._has_begun(row) else ()
        for slot, start in starts.items():
            decision = self.decide(start)
            if decision.action == "nothing" and not self.found[start].checkpoint and slot not in gone_by:
                return explain_absent(slot, start, decision.why)
        return ""

    def list_users(self, row: RowId) -> list[tuple[RowId, str]]:
        """The rows that start from one, each with the slot that it fills."""
        return [(user, slot) for user, starts in self.starts.items() for slot, at in starts.items() if at == row]

    def count_shared_steps(self, row: RowId) -> int:
        """The steps that what the row's trial starts from has made for it."""
        return self.get_trial(row).training.trunk_steps

    def _has_begun(self, row: RowId) -> bool:
        return bool(self.storage.list(name_checkpoints_folder(get_trial_of_row(row))))

    def find_start_folders(self, row: RowId) -> dict[str, str]:
        """The folder of the checkpoint, below the root, of each slot of what the row's trial starts from."""
        found = {}
        for slot, source in list_slots(self.get_trial(row)).items():
            if start := self.starts.get(row, {}).get(slot):
                step = manifest.name_step(self.get_trial(start).training.steps)
                found[slot] = f"{name_checkpoints_folder(get_trial_of_row(start))}/{step}"
            else:
                found[slot] = f"{name_start_folder(split_pin(source)[1])}/{manifest.name_step(0)}"
        return found

    def mend_starts(self, rows: Iterable[RowId]) -> None:
        """Removes each damaged checkpoint that one of the rows is still to start from, so that it is made again."""
        needing = [row for row in rows if decide(self.found[row], self.scheduler).action == "train"]
        for start in dict.fromkeys(start for row in needing for start in self.starts.get(row, {}).values()):
            step = manifest.name_step(self.get_trial(start).training.steps)
            path = f"{name_checkpoints_folder(get_trial_of_row(start))}/{step}"
            if damage := manifest.find_damage(self.storage, path):
                self.say(f"{start[:8]}  {damage}. Others start from it: it is removed, and made again")
                self.storage.delete(path)
                for row in self.sharing[get_trial_of_row(start)]:
                    self.look(row)

    # What the storage holds.

    def look(self, row: RowId) -> Found:
        """Looks at a row anew."""
        self.found[row] = self._look(row)
        return self.found[row]

    def look_at_all(self) -> None:
        for row in self.variants:
            self.look(row)

    def _look(self, row: RowId) -> Found:
        of, trial = get_trial_of_row(row), self.get_trial(row)
        status = self.storage.read_sealed(name_status_file(of), "its trial goes on from its last checkpoint")
        protocol = make_protocol_key(Measurement.of(trial), Images.of(self.get_source(trial.data)))
        found = find(self.storage, row, trial, protocol, status)
        if found.unread:
            return found
        newest = None
        if not is_whole(self.storage, name_trial_folder(of)) or status is None:
            try:
                newest = manifest.find_newest(self.storage, name_checkpoints_folder(of))
            except CheckpointError as error:
                return Found(status, unread=str(error), steps=found.steps)
            if (status or newest) and not is_whole(self.storage, name_trial_folder(of)):
                self._restore_journal(of, newest)
        unfinished = bool(found.checkpoint) and found.steps not in find_validated_steps(
            self.storage, name_trial_folder(of)
        )
        return replace(found, unfinished=unfinished)

    def _restore_journal(self, trial: TrialId, newest: Checkpoint | None) -> None:
        copy = None
        try:
            copy = manifest.load_journal(newest) if newest else None
        except CheckpointError as error:  # then what is whole of the journal is all there is
            self.say(f"{trial[:8]}  {error}")
        self.say(f"{trial[:8]}  {restore(self.storage, name_trial_folder(trial), copy)}")

    def open_checkpoint(self, row: RowId) -> Checkpoint:
        """The checkpoint at the row's step, which is there."""
        steps = self.get_trial(row).training.steps
        found = manifest.find_at_step(self.storage, name_checkpoints_folder(get_trial_of_row(row)), steps)
        assert found, row
        return found

    def keep_checkpoints(self, rows: Iterable[RowId]) -> None:
        """The checkpoints that the rows name stay, however far their trials are trained."""
        for row in rows:
            if self.found[row].checkpoint and not self.found[row].is_kept:
                manifest.keep(self.storage, self.open_checkpoint(row))

    # Forgetting.

    def forget(self) -> None:
        """Removes what the storage holds of these trials and of the measurements of their checkpoints."""
        shared = list_sharing(self.storage, self.experiment.name)
        for trial in self.sharing:
            if kept := self._explain_kept(trial, shared):
                self.say(f"fresh      keeps {trial[:8]}: {kept}")
                continue
            asked = {self.get_trial(row).evaluation.ema_width for row in self.sharing[trial]}
            widths = [width for width in asked if width is not None]
            for name in self.storage.list(name_checkpoints_folder(trial)):
                with suppress(CheckpointError):  # a damaged one goes as well; what it was measured at stays
                    path = f"{name_checkpoints_folder(trial)}/{name}"
                    checkpoint = manifest.open_committed(self.storage, path)
                    for model in manifest.list_models(checkpoint, widths):
                        self.storage.delete(name_evaluation_folder(model.digest))
            self.storage.delete(name_trial_folder(trial))
        self.storage.delete(name_sweep_file(self.experiment.name, EVENTS))
        forget_asked(self.storage, self.experiment)
        self.look_at_all()

    def _explain_kept(self, trial: TrialId, shared: Mapping[str, Sequence[str]]) -> str:
        """Why --fresh does not remove a trial; empty where it does."""
        if holder := self.leases.find_holder(name_trial_lock(trial), self.owner):
            return f"it is being trained by {holder}"
        if sweeps := shared.get(trial):
            names = ", ".join(self.storage.find_url(name_sweep_folder(name)) for name in sweeps)
            return f"other sweeps share it; remove {names} first to train it again"
        return ""

    def find_holder(self, trial: TrialId) -> str:
        """The other sweep that trains the trial just now; empty where none does."""
        return self.leases.find_holder(name_trial_lock(trial), self.owner)

    def list_further_steps(self, trial: TrialId) -> list[int]:
        """The steps whose checkpoints the sweep's rows name, of one trial."""
        return sorted({self.get_trial(row).training.steps for row in self.sharing[trial]})

    def find_furthest(self, trial: TrialId) -> RowId:
        """The row whose step is the last of the trial."""
        return max(self.sharing[trial], key=lambda row: self.get_trial(row).training.steps)
