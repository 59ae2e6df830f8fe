"""A registered model gives the images that the evaluation measured, wherever it is loaded, and holds no pickle."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import saved_model
import small_evaluation as small
import torch
from conftest import ROOT
from diffusers import DDPMPipeline
from saved_model import SAMPLER, asked, candidate

from orchestrator.experiment.load import open_code
from orchestrator.tracking import models
from workers.config import FIDConfig, Mistake, SamplerConfig
from workers.evaluation import blocks
from workers.evaluation.make import read_block
from workers.storage import Storage

nowhere_else = saved_model.nowhere_else
saved = saved_model.saved
loaded = saved_model.loaded


def test_the_images_are_those_of_the_evaluation(loaded: Any, tmp_path: Path) -> None:
    """For the same seed and sampler, of whole blocks and of a part of one."""
    torch.set_num_threads(1)
    for sampler in (SAMPLER, SamplerConfig(kind="ancestral"), SamplerConfig(kind="ddim", steps=7)):
        m = small.measurement(seed=5, samples=150, sampler=sampler)
        bench = small.bench(tmp_path, m)
        wanted = blocks.list_sample_blocks(m, bench.checkpoint.digest, small.IMAGES)
        small.make_all(bench, wanted)
        images = [row for block in wanted for row in read_block(bench.storage, block)["image"].to_pylist()]
        measured = np.stack([np.frombuffer(image, np.uint8) for image in images]).reshape(-1, small.SIDE, small.SIDE, 1)
        request = asked(n=200, seed=5, sampler=sampler.kind, steps=sampler.steps or small.T)
        given = loaded.predict(request)
        assert given.dtype == np.uint8 and np.array_equal(given, measured)
        assert np.array_equal(loaded.predict(request.assign(n=130)), measured[:130])


def test_the_variance_is_the_one_that_is_measured(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    m = small.measurement(seed=5, samples=100, sampler=SamplerConfig(kind="ancestral"))
    m = m.model_copy(update={"evaluation": m.evaluation.model_copy(update={"variance": "fixed_small"})})
    bench = small.bench(tmp_path, m)
    assert bench.model.process.variance == "fixed_large"
    [block] = blocks.list_sample_blocks(m, bench.checkpoint.digest, small.IMAGES)
    small.make_all(bench, [block])
    measured = [np.frombuffer(image, np.uint8) for image in read_block(bench.storage, block)["image"].to_pylist()]
    models.save(replace(candidate(bench.storage), variance="fixed_small"), tmp_path / "model")
    given = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(
        asked(n=100, seed=5, sampler="ancestral", steps=small.T)
    )
    assert np.array_equal(given.reshape(100, -1), np.stack(measured)[:100])


PREDICTS = """
import sys, mlflow, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
mine, named, ours = (model.predict(pd.DataFrame({"n": [2], "seed": [0], **more})) for more in (
    {}, {"sampler": ["my_samplers:DEIS"]}, {"sampler": ["ddim"]}))
print(np.array_equal(mine, named), np.array_equal(mine, ours), mine.shape)
"""


def test_it_brings_the_code_of_its_sampler(tmp_path: Path) -> None:
    open_code([str(ROOT / "examples/sampler")], tmp_path, "my_samplers:DEIS")
    fid = FIDConfig(sampler=SamplerConfig(kind="my_samplers:DEIS", steps=4))
    models.save(replace(candidate(Storage(tmp_path / "runs")), fid=fid), tmp_path / "model")
    kept = {path.name for path in (tmp_path / "model").glob("artifacts/diffusers/code/*/*.py")}
    assert kept == {"my_samplers.py", "deis.py"}

    def predict(**environment: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", PREDICTS, str(tmp_path / "model")]
        cache = {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")}
        return subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path / "model", env={**os.environ, **cache, **environment}
        )

    refused = predict()
    assert refused.returncode and "was never run from this machine" in refused.stderr
    served = predict(ORCHESTRATOR_TRUST_CODE="1")
    assert served.stdout.splitlines()[-1:] == ["True False (2, 4, 4, 1)"], served.stderr


def test_a_row_is_a_request(loaded: Any) -> None:
    """The rows' images follow each other; the evaluation's sampler and steps are those of a row without."""
    two = loaded.predict(pd.DataFrame({"n": [2, 3], "seed": [0, 1]}))
    assert two.shape == (5, small.SIDE, small.SIDE, 1) and two.max() < small.LEVELS
    assert np.array_equal(two[2:], loaded.predict(asked(n=3, seed=1)))
    assert np.array_equal(two[:2], loaded.predict(asked(n=2, seed=0, sampler="ddim", steps=3)))
    assert not np.array_equal(two[:2], loaded.predict(asked(n=2, seed=0, sampler="ddim", steps=9)))
    assert loaded.predict(asked(n=0, seed=0)).shape == (0, small.SIDE, small.SIDE, 1)


@pytest.mark.parametrize(
    "columns",
    [
        {"n": 1},
        {"n": 1.5, "seed": 0},
        {"n": -1, "seed": 0},
        {"n": 1, "seed": 0, "sampler": "magic"},
        {"n": 1, "seed": 0, "steps": 0},
        {"n": 1, "seed": 0, "steps": small.T + 1},
    ],
)
def test_a_request_that_means_nothing_is_refused(loaded: Any, columns: dict[str, Any]) -> None:
    with pytest.raises((ValueError, mlflow.MlflowException)):
        loaded.predict(asked(**columns))


def test_what_lies_in_it(saved: Path, loaded: Any) -> None:
    of_loading = "__pycache__"  # what a test before this one may have left; `saved` has looked for it
    files = {str(p.relative_to(saved)): p for p in saved.rglob("*") if p.is_file() and of_loading not in p.parts}
    assert {Path(name).suffix for name in files} <= {".py", ".typed", ".json", ".yaml", ".txt", ".safetensors", ""}
    assert not [name for name, path in files.items() if path.read_bytes()[:1] == b"\x80"]  # as a pickle begins
    assert "model_code.py" in files and "code/workers/network/unet.py" in files
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["n", "seed", "sampler", "steps"]
    assert signature.inputs.required_input_names() == ["n", "seed"]
    assert signature.outputs.inputs[0].shape == (-1, small.SIDE, small.SIDE, 1)
    example = loaded.metadata.load_input_example(str(saved))
    assert len(loaded.predict(example)) == example["n"][0]


def test_diffusers_opens_its_folder(saved: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(saved / "artifacts/diffusers")
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, small.SIDE, small.SIDE, 1)


def test_a_damaged_model_is_refused(saved: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    other = candidate(storage, "b")
    models.save(replace(other, checkpoint=replace(other.checkpoint, digest="0" * 16)), tmp_path / "model")
    with pytest.raises(Mistake, match="is damaged"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


LOAD = """
import json, sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
images = model.predict(pd.DataFrame({"n": [3], "seed": [0]}))
print(json.dumps({"images": images.tolist(),
                  "workers": {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "workers"},
                  "unused": [n for n in ("ray", "sklearn", "orchestrator") if n in sys.modules]}))
"""


def test_it_brings_its_own_code_and_names_all_that_it_imports(saved: Path, loaded: Any, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(saved)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout.splitlines()[-1])
    assert np.array_equal(np.array(output["images"], np.uint8), loaded.predict(asked(n=3, seed=0)))
    assert output["unused"] == []
    files = [Path(file) for file in output["workers"].values() if file]
    assert files and all(file.is_relative_to(saved / "code") for file in files)
    imported = {name for file in [*files, saved / "model_code.py"] for name in _imported_at_once(file)}
    named = {line.partition("==")[0] for line in (saved / "requirements.txt").read_text().splitlines()}
    packages = {"PIL": "pillow", "pydantic_core": "pydantic"}  # each pydantic takes one version of its core
    assert {packages.get(name, name) for name in imported - sys.stdlib_module_names - {"workers"}} <= named


def _imported_at_once(file: Path) -> set[str]:
    """The top-level names that a file imports when it is imported itself."""
    nodes = ast.parse(file.read_text()).body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("n", [-1, 100_001, 10**12])
def test_a_request_for_more_images_than_can_be_sent_is_refused(n: int) -> None:
    from orchestrator.tracking.model_code import ImageModel

    model = ImageModel()
    model.shape, model.fid = (8, 8, 1), FIDConfig()
    model.model = SimpleNamespace(process=SimpleNamespace(T=10))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"n = {n} images were asked for; give 0 to 100,000"):
        model.predict(None, pd.DataFrame({"n": [n], "seed": [0]}))
