"""The registered model of a sweep: MLflow's copy of its best checkpoint, ready to give images.

A version is a checkpoint and the way its images are drawn where nobody asks otherwise: the sampler and the variance
that were measured. It is made once; the alias `candidate` is moved to that of the best row. Its tags say what it is:

    orchestrator.trial        the trial's id
    orchestrator.checkpoint   the digest of the checkpoint
    orchestrator.path         its folder, relative to the root of the storage
    orchestrator.storage      the storage, with its host where it is a local folder
    orchestrator.draws        its sampler, quantisation, variance and precision, as JSON

What lies in it is code (`model_code`, and the package `workers` as it is today), the checkpoint as diffusers keeps it,
and texts; `mlflow.pyfunc.load_model` opens it without a pickle.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import workers
from workers.bundles import keep_code
from workers.classes import Vectors
from workers.config import FIDConfig
from workers.data.decoding import choose_type
from workers.data.ranges import Span
from workers.identity import describe_sampler
from workers.layout import get_trial_of_row
from workers.network import checkpoint as checkpoints
from workers.network.manifest import Checkpoint
from workers.storage import Storage

CANDIDATE = "candidate"
TRIAL, CHECKPOINT, PATH, STORAGE, DRAWS = (
    f"orchestrator.{name}" for name in ("trial", "checkpoint", "path", "storage", "draws")
)
USE = """```python
model = mlflow.pyfunc.load_model("models:/%s@candidate")
images = model.predict(pandas.DataFrame({"n": [16], "seed": [0]}))  # (16, H, W, C), as the data are
```"""
# What `model_code` and the modules of `workers` below it import.
REQUIRED = ("jaxtyping", "mlflow", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "safetensors", "torch")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The best trial of a sweep: its checkpoint, and how its evaluation draws images."""

    trial: str  # its id, or that of a row of the sweep that measures it
    checkpoint: Checkpoint
    levels: int | None
    fid: FIDConfig
    span: Span | None = None  # of data that are not discrete: what is [-1, 1] for the network
    variance: str | None = None  # of p_theta as it is measured; None: the checkpoint's own
    precision: str = "float32"  # that the network computes in
    description: str = ""  # for a person

    @property
    def draws(self) -> str:
        """All that its images depend on besides the checkpoint, the number and the seed, as JSON."""
        sampler = describe_sampler(self.fid.sampler)
        own = {"variance": self.variance, "precision": self.precision}
        return json.dumps({"sampler": sampler, "quantise": self.fid.quantise, **own})


def save(candidate: Candidate, folder: Path, record: Any = None) -> None:
    """Writes the MLflow model to `folder`; `record` is what MLflow knows of it already (mlflow.models.Model).

    Raises CheckpointError where the checkpoint is damaged.
    """
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    inputs = [ColSpec(DataType.long, "n"), ColSpec(DataType.long, "seed")]
    inputs += [ColSpec(DataType.string, "sampler", required=False), ColSpec(DataType.long, "steps", required=False)]
    described = checkpoints.describe(candidate.checkpoint)
    if described.classes:
        inputs += [ColSpec(DataType.string, "label", required=False)]
    example: dict[str, Any] = {"n": [4], "seed": [0]}
    if isinstance(described.told, Vectors):
        inputs += [ColSpec(Array(Array(DataType.double)), "vectors")]
        example["vectors"] = [np.zeros((described.told.length or 1, described.told.width)).tolist()]
    if described.takes_no_label:
        inputs += [ColSpec(DataType.double, "guidance", required=False)]
    outputs = [TensorSpec(np.dtype(choose_type(candidate.levels)), (-1, *described.shape))]
    drawing = FIDConfig(sampler=candidate.fid.sampler, quantise=candidate.fid.quantise)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints.export(candidate.checkpoint, Path(temporary, "diffusers"))
        keep_code(Storage(Path(temporary, "diffusers")), (candidate.fid.sampler.kind, candidate.variance))
        save_model(
            str(folder),
            mlflow_model=record,
            python_model=str(Path(__file__).with_name("model_code.py")),
            code_paths=[str(Path(workers.__file__).parent)],
            artifacts={"diffusers": str(Path(temporary, "diffusers"))},
            model_config={
                "checkpoint": candidate.checkpoint.digest,
                "levels": candidate.levels,
                "span": list(candidate.span) if candidate.span else None,
                "fid": drawing.model_dump(mode="json"),
                "variance": candidate.variance,
                "precision": candidate.precision,
            },
            signature=ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs)),
            input_example=pd.DataFrame(example),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED],
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def register(client: Any, experiment_id: str, name: str, run_id: str, *, candidate: Candidate, origin: str) -> None:
    """Makes the candidate a version of the registered model `name`, once, and moves the alias to it.

    It can be cut off anywhere and made again. `run_id` is the trial's run, `origin` the storage.
    """
    tags = make_tags(candidate, origin)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"The best trial of the sweep `{name}`.\n\n{USE % name}")
    version = _find_version(client, experiment_id, name, tags)
    if version is None:
        # By its place: MLflow would look up `models:/<id>` at the process's own tracking URI and not at the client's.
        model = _log_model(client, experiment_id, name, run_id, candidate=candidate, tags=tags)
        place, text = model.artifact_location, candidate.description
        version = client.create_model_version(name, place, run_id, tags, description=text, model_id=model.model_id)
        linked = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": linked})  # the page's link to it
    if str(client.get_registered_model(name).aliases.get(CANDIDATE)) != str(version.version):
        client.set_registered_model_alias(name, CANDIDATE, version.version)


def is_registered(client: Any, experiment_id: str, name: str, candidate: Candidate, origin: str) -> bool:
    """Whether the alias leads to the candidate's version, and that to its files."""
    found = client.search_registered_models(f"name = '{name}'")
    version = _find_version(client, experiment_id, name, make_tags(candidate, origin)) if found else None
    return version is not None and str(found[0].aliases.get(CANDIDATE)) == str(version.version)


def make_tags(candidate: Candidate, origin: str) -> dict[str, str]:
    """The tags of the candidate's version."""
    tags = {TRIAL: get_trial_of_row(candidate.trial), CHECKPOINT: candidate.checkpoint.digest}
    return tags | {PATH: candidate.checkpoint.path, STORAGE: origin, DRAWS: candidate.draws}


def _find_version(client: Any, experiment_id: str, name: str, tags: dict[str, str]) -> Any | None:
    """The version that has these tags, and whose files are there."""
    places = {m.artifact_location for m in _find_models(client, experiment_id, tags) if _is_whole(client, m)}
    found = client.search_model_versions(f"name = '{name}'")
    return next((v for v in found if tags.items() <= v.tags.items() and v.source in places), None)


def _find_models(client: Any, experiment_id: str, tags: dict[str, str]) -> list[Any]:
    """The models in the experiment (LoggedModels) that have these tags."""
    found = client.search_logged_models([experiment_id], f"tags.`{CHECKPOINT}` = '{tags[CHECKPOINT]}'")
    return [model for model in found if tags.items() <= model.tags.items()]


def _is_whole(client: Any, model: Any) -> bool:
    from mlflow.entities import LoggedModelStatus

    return model.status == LoggedModelStatus.READY and bool(client.list_logged_model_artifacts(model.model_id))


def _log_model(
    client: Any, experiment_id: str, name: str, run_id: str, *, candidate: Candidate, tags: dict[str, str]
) -> Any:
    """The candidate's model in the experiment (a LoggedModel), with all its files; one that was cut off is removed."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    for found in _find_models(client, experiment_id, tags):
        if _is_whole(client, found):
            return found
        client.delete_logged_model(found.model_id)
    logged = client.create_logged_model(experiment_id, name, run_id, tags, model_type="diffusion")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=candidate.checkpoint.step or 0)])
    record = Model(
        artifact_path=logged.artifact_location, model_uuid=logged.model_id, model_id=logged.model_id, run_id=run_id
    )
    with tempfile.TemporaryDirectory() as temporary:
        save(candidate, Path(temporary, "model"), record)
        client.log_model_artifacts(logged.model_id, str(Path(temporary, "model")))
    return client.finalize_logged_model(logged.model_id, "READY")
