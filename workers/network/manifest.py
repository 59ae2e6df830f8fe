"""What a checkpoint consists of, by its manifest of sha256 sums: without torch.

A checkpoint is a folder that commits by its manifest, which is written last; `checkpoint` writes and loads it.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from workers import seals
from workers.config import EvaluationConfig, Mistake
from workers.identity import compute_digest
from workers.kinds import AUTOENCODER, DENOISER, GENERATOR
from workers.posthoc import NARROWEST, WIDEST
from workers.storage import Storage

UNET, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, INDEX, MANIFEST = "scheduler/scheduler_config.json", "model_index.json", "manifest.json"
STATE, PROGRESS, JOURNAL = "state/training.safetensors", "state/progress.json", "state/journal.jsonl"
AVERAGES, WIDTHS, SAFE = "averages/", "widths/", ".safetensors"
# What an evaluation reads of a checkpoint, by the family of its network: its config.json and its weights first.
EVALUATED = {
    DENOISER: (UNET, WEIGHTS, SCHEDULER),
    AUTOENCODER: ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    GENERATOR: ("generator/config.json", "generator/diffusion_pytorch_model.safetensors"),
}
# A file of `workers.network.averages`.
KEPT = re.compile(r"trials/[\w-]+/posthoc/step-(\d{8,})-[0-9a-f]{16}\.safetensors")
COMBINING = 1  # version of how averages are combined: raise it where the same files would give other weights
# The autoencoder of a model of latents, which is a checkpoint within it, where diffusers' LDMPipeline looks for one.
STAGE = "vqvae"
STAGE_FILES = (f"{STAGE}/config.json", f"{STAGE}/diffusion_pytorch_model.safetensors")
MOST_JSON = 2**26  # bytes


class CheckpointError(Mistake):
    """A checkpoint is incomplete, its bytes are not those that were written, or it is of another kind of model."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: all that another process needs to load it, and to notice that it changed.

    `digest` addresses what an evaluation sees: weights, network and process. The same files have the same digest
    wherever they lie.
    """

    root: str  # of the storage
    path: str  # relative to the root; empty where the root is the checkpoint's folder
    step: int | None  # None where a folder that we did not write does not say
    digest: str
    sums: tuple[tuple[str, str], ...]  # (file below path, sha256 in hex), of every file that is read
    weights: str = WEIGHTS  # the file that is loaded, or the index of several
    family: str = DENOISER  # of its network
    kept: bool = field(default=False, compare=False)  # whether a row of a sweep asks for it
    posthoc: tuple[tuple[str, str], ...] = ()  # (file below root, sha256) of averages that were kept up to this step
    width: float | None = None  # of the average that is made of these when the weights are loaded

    @property
    def url(self) -> str:
        """Where a person finds it."""
        return Storage(self.root).find_url(self.path)

    @property
    def config(self) -> str:
        """The config.json of its network."""
        return EVALUATED[self.family][0]


def name_step(step: int) -> str:
    """The name of a checkpoint's folder; names sort as steps do."""
    return f"step-{step:08}"


def find_newest(storage: Storage, folder: str, up_to: int | None = None) -> Checkpoint | None:
    """The complete checkpoint of the highest step in `folder`, or of the highest `up_to` a step.

    One without a manifest does not count.

    Raises CheckpointError where its manifest is damaged.
    """
    for name in reversed(storage.list(folder)):
        if up_to is not None and name > name_step(up_to):
            continue
        if found := _open_unless_gone(storage, f"{folder}/{name}"):
            return found
    return None


def find_at_step(storage: Storage, folder: str, step: int) -> Checkpoint | None:
    """The complete checkpoint of that step; None where there is none. Raises CheckpointError as `find_newest` does."""
    return _open_unless_gone(storage, f"{folder}/{name_step(step)}")


def _open_unless_gone(storage: Storage, path: str) -> Checkpoint | None:
    if not storage.exists(f"{path}/{MANIFEST}"):
        return None
    try:
        return open_committed(storage, path)
    except CheckpointError:
        if storage.exists(f"{path}/{MANIFEST}"):
            raise
        return None  # the training went on to another one, and removed this


def write_manifest(
    storage: Storage,
    path: str,
    step: int,
    sums: Mapping[str, str],
    kept: bool,
    *,
    posthoc: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Commits the checkpoint. The manifest's seal is of no place: a folder may be moved."""
    more = {"posthoc": dict(posthoc)} if posthoc else {}
    content = seals.seal_json({"step": step, "sha256": dict(sums), "kept": kept, **more}, MANIFEST)
    storage.write(f"{path}/{MANIFEST}", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def is_kept(storage: Storage, path: str) -> bool:
    """Whether a row of a sweep asks for the checkpoint, or nobody can say; a folder without a manifest is none."""
    if not storage.exists(f"{path}/{MANIFEST}"):
        return False
    try:
        return bool(_read_manifest(storage, path).get("kept"))
    except CheckpointError:  # whoever needs it is told
        return True


def keep(storage: Storage, checkpoint: Checkpoint) -> None:
    """From here on the checkpoint stays, however far its trial is trained."""
    if not checkpoint.kept:
        assert checkpoint.step is not None
        of = checkpoint.path, checkpoint.step, dict(checkpoint.sums)
        write_manifest(storage, *of, kept=True, posthoc=dict(checkpoint.posthoc))


def choose_weights(checkpoint: Checkpoint, evaluation: EvaluationConfig) -> Checkpoint:
    """The same checkpoint with the weights to be loaded that are measured. Raises CheckpointError where it has none."""
    return choose_width(choose_average(checkpoint, evaluation.ema), evaluation.ema_width)


def choose_width(checkpoint: Checkpoint, width: float | None) -> Checkpoint:
    """The same checkpoint with the average of a width to be loaded, which is one of its own or made of what was kept:
    another model, with a digest of its own. None is the checkpoint as it is.

    Raises CheckpointError where nothing was kept.
    """
    if width is None:
        return checkpoint
    sums, own = dict(checkpoint.sums), list_widths(checkpoint)
    if not own:
        raise CheckpointError(
            f"{checkpoint.url} holds no averages that evaluation.ema_width = {width} could be made of; train with "
            "training.posthoc, or leave it out"
        )
    files, usual, weights = _list_beside_weights(checkpoint), EVALUATED[checkpoint.family][1], name_width(width)
    if width in own:
        return replace(checkpoint, digest=compute_digest(files | {usual: sums[weights]}), weights=weights)
    made_of = [sums[name_width(each)] for each in own] + [sha for _, sha in list_kept(checkpoint)]
    return replace(checkpoint, digest=compute_digest([COMBINING, files, width, made_of]), width=width)


def list_widths(checkpoint: Checkpoint) -> list[float]:
    """Of the averages of the checkpoint's own step that others can be made of, rising."""
    return sorted(_read_number(name, WIDTHS) for name, _ in checkpoint.sums if name.startswith(WIDTHS))


def list_kept(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The files, with their sha256, of averages that were kept before the checkpoint's step."""
    assert checkpoint.step is not None
    return [(path, sha) for path, sha in checkpoint.posthoc if get_step_of_kept(path) < checkpoint.step]


def get_step_of_kept(path: str) -> int:
    """Raises ValueError where it is the path of no such file."""
    if (found := KEPT.fullmatch(path)) is None:
        raise ValueError(f"{path!r} is no average that was kept")
    return int(found[1])


def choose_average(checkpoint: Checkpoint, ema: float | None) -> Checkpoint:
    """The same checkpoint with another of its averages to be loaded: another model, with a digest of its own.

    None is the average that the checkpoint was written for. Raises CheckpointError where it holds no such average.
    """
    if ema is None:
        return checkpoint
    sums = dict(checkpoint.sums)
    if name_average(ema) not in sums:
        held = ", ".join(name.removeprefix(AVERAGES).removesuffix(SAFE) for name in sums if name.startswith(AVERAGES))
        raise CheckpointError(f"{checkpoint.url} holds no average of evaluation.ema = {ema}; it has {held or 'none'}")
    usual = EVALUATED[checkpoint.family][1]
    files = _list_beside_weights(checkpoint) | {usual: sums[name_average(ema)]}
    return replace(checkpoint, digest=compute_digest(files), weights=name_average(ema))


def _list_beside_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """What an evaluation reads beside the network's weights, with its sha256."""
    sums, (config, _, *more) = dict(checkpoint.sums), EVALUATED[checkpoint.family]
    files = {name: sums[find_name(sums, name)] for name in (config, *more)}
    return files | {name: sums[name] for name in STAGE_FILES if name in sums}


def open_stage(checkpoint: Checkpoint) -> Checkpoint | None:
    """The autoencoder that a checkpoint of a model of latents holds; None of one of pixels."""
    sums = dict(checkpoint.sums)
    if STAGE_FILES[0] not in sums:
        return None
    own = {name.removeprefix(f"{STAGE}/"): sums[name] for name in STAGE_FILES}
    where = join(checkpoint.path, STAGE)
    return make_checkpoint(
        checkpoint.root, where, checkpoint.step, own, PurePosixPath(WEIGHTS).name, family=AUTOENCODER
    )


def list_models(checkpoint: Checkpoint, more: Iterable[float] = ()) -> list[Checkpoint]:
    """The checkpoint, and what each average that it stores makes of it, and those of `more` widths."""
    decays = [_read_number(name, AVERAGES) for name, _ in checkpoint.sums if name.startswith(AVERAGES)]
    widths = (choose_width(checkpoint, width) for width in (*list_widths(checkpoint), *more))
    return [checkpoint, *(choose_average(checkpoint, decay) for decay in decays), *widths]


def name_average(decay: float) -> str:
    return f"{AVERAGES}{decay}{SAFE}"


def name_width(width: float) -> str:
    return f"{WIDTHS}{width}{SAFE}"


def _read_number(name: str, folder: str) -> float:
    """What an average's file is named by, as a manifest has it. Raises ValueError for any other file."""
    number = float(name.removeprefix(folder).removesuffix(SAFE))
    if name != f"{folder}{number}{SAFE}":
        raise ValueError(f"{name!r} is no average")
    return number


def load_journal(checkpoint: Checkpoint) -> bytes | None:
    """The trial's journal as it was at this step; None where the checkpoint is of a version that kept none.

    Raises CheckpointError where it is damaged.
    """
    return read_file(checkpoint, JOURNAL) if JOURNAL in dict(checkpoint.sums) else None


def open_committed(storage: Storage, path: str) -> Checkpoint:
    """The checkpoint of ours at `path`, from its manifest. Raises CheckpointError."""
    manifest = _read_manifest(storage, path)
    try:
        given = manifest["sha256"]
        family = next((f for f, (config, *_) in EVALUATED.items() if config in given), DENOISER)
        sums = {name: str(given[name]) for name in (INDEX, *EVALUATED[family], STATE, PROGRESS)}
        more = {name: str(sha) for name, sha in given.items() if name.startswith((AVERAGES, WIDTHS))}
        for name in more:
            number = _read_number(name, f"{name.partition('/')[0]}/")
            if name.startswith(WIDTHS) and not NARROWEST <= number <= WIDEST:
                raise ValueError(f"{name!r} is no average of a width of {NARROWEST} to {WIDEST}")
        more |= {name: str(given[name]) for name in (JOURNAL, *STAGE_FILES) if name in given}
        posthoc = {path: str(sha) for path, sha in manifest.get("posthoc", {}).items() if get_step_of_kept(path)}
        of, kept = (storage.root, path, int(manifest["step"]), sums | more), manifest.get("kept") is True
        return make_checkpoint(*of, family=family, kept=kept, posthoc=posthoc)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _make_error(storage, path, error) from error


def _read_manifest(storage: Storage, path: str) -> dict[str, Any]:
    where = join(path, MANIFEST)
    content = read_bytes(storage, where)
    try:
        return (
            read_object(content, storage.find_url(where))
            if _is_unsealed(content)
            else seals.open_json(content, MANIFEST)
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _make_error(storage, path, error) from error


def _make_error(storage: Storage, path: str, error: Exception) -> CheckpointError:
    where = storage.find_url(join(path, MANIFEST))
    return CheckpointError(f"{where} is damaged ({error}): restore or delete the folder")


def _is_unsealed(manifest: bytes) -> bool:
    """Whether it is one of a version that did not seal it."""
    try:
        return set(json.loads(manifest)) == {"step", "sha256"}
    except (ValueError, RecursionError, TypeError):
        return False


def make_checkpoint(
    root: str,
    path: str,
    step: int | None,
    sums: dict[str, str],
    weights: str = "",
    *,
    family: str = DENOISER,
    kept: bool = False,
    posthoc: Mapping[str, str] = MappingProxyType({}),
) -> Checkpoint:
    """`weights` is the file that is loaded where it is not the usual one."""
    names, usual = EVALUATED[family], EVALUATED[family][1]
    weights = weights or usual
    files = {name: sums[find_name(sums, weights if name == usual else name)] for name in names}
    files |= {name: sums[name] for name in STAGE_FILES if name in sums}
    if weights.endswith(".json"):
        files |= {PurePosixPath(name).name: sha for name, sha in sums.items() if name.endswith(SAFE)}
    of = root, path, step, compute_digest(files), tuple(sorted(sums.items())), weights, family, kept
    return Checkpoint(*of, tuple(sorted(posthoc.items(), key=lambda one: get_step_of_kept(one[0]))))


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """A file's content, checked against its sum before anything is made of it."""
    sums = dict(checkpoint.sums)
    content = read_bytes(Storage(checkpoint.root), join(checkpoint.path, find_name(sums, name)))
    if hash_bytes(content) != sums[find_name(sums, name)]:
        raise CheckpointError(
            f"{find_url(checkpoint, name)} is damaged: its sha256 differs from "
            + (
                "that of the moment it was opened; run the command again when nothing writes to it"
                if checkpoint.step is None
                else "the manifest's; restore the file, or delete the folder and train again"
            )
        )
    return content


def find_damage(storage: Storage, path: str) -> str:
    """What is wrong with the checkpoint at `path`, all of whose files are read; empty where nothing is, or where there
    is none."""
    if not storage.exists(f"{path}/{MANIFEST}"):
        return ""
    try:
        checkpoint = open_committed(storage, path)
        for name, _ in checkpoint.sums:
            read_file(checkpoint, name)
    except CheckpointError as error:
        return str(error)
    return ""


def find_name(names: Collection[str], name: str) -> str:
    """Which of `names` is our `name`; of diffusers' layouts, some have the same files without folders."""
    there = list(names)
    if name in there:
        return name
    [found] = [n for n in there if PurePosixPath(n).name == PurePosixPath(name).name]
    return found


def find_url(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.url}/{find_name(dict(checkpoint.sums), name)}"


def join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def get_most_bytes() -> int:
    """Half of this machine's memory: the most that is taken at once."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def read_bytes(storage: Storage, path: str) -> bytes:
    most = MOST_JSON if path.endswith(".json") else get_most_bytes()
    try:
        if (size := storage.get_size(path)) > most:
            raise CheckpointError(
                f"{storage.find_url(path)} has {size:,} bytes, more than the {most:,} that can be read here"
            )
        return storage.read(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{storage.find_url(path)} is missing: restore it, or delete the folder") from error
    except OSError as error:
        raise CheckpointError(f"{storage.find_url(path)} cannot be read: {error}") from error


def read_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is not JSON ({error}); restore or delete the folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is damaged: it holds no JSON object; restore or delete the folder")
    return found


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
