"""The examples of code of one's own run, and what an edit of their files makes again."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, run

from orchestrator.execution.session import open_session
from orchestrator.sweep import main
from workers.noise import make_generator

# The edit of a file that computes something else, and how often it makes what again.
EDITS = {
    "format": (
        "my_formats.py",
        "return values",
        "return largest - values",
        (1, 1, 1),
        "is trained again: my_formats.py has changed",
    ),
    "weighting": (
        "my_losses.py",
        "snr.sqrt()",
        "snr.pow(0.4)",
        (1, 1, 1),
        "is trained again: my_losses.py has changed",
    ),
    "schedule": (
        "my_schedules.py",
        "float64) ** power",
        "float64) ** power * 0.99",
        (1, 1, 1),
        "is trained again: my_schedules.py has changed",
    ),
    "sampler": (
        "deis.py",
        "leggauss(16)",
        "leggauss(2)",
        (0, 1, 1),
        "has its samples drawn again: deis.py has changed",
    ),
    "metric": ("my_metrics.py", "32, 0", "32, 1", (0, 0, 1), "is measured again: my_metrics.py has changed"),
    "features": (
        "convolutions.py",
        "EPOCHS, BATCH = 32, 5",
        "EPOCHS, BATCH = 32, 6",
        (0, 0, 2),
        "is measured again: convolutions.py has changed",
    ),
    "variance": (
        "my_variances.py",
        "head.exp()",
        "(2 * head).exp()",
        (1, 1, 1),
        "is trained again: my_variances.py has changed",
    ),
}
SLOWER = {
    "schedule",
    "weighting",
    "variance",
    "format",
    "features",
    "sampler",
}  # of which the others are like enough for each change of the program
SMALL = {  # beside the file's own `smoke`
    "format": ["training.steps=4", "search.space.loss.weighting.grid=[simple]"],
    "weighting": ["training.steps=4"],
    "schedule": ["training.steps=4", "search.space.diffusion.schedule.power.grid=[2]"],
    "sampler": ["training.steps=4", "search.space.evaluation.fid.sampler.grid=[{kind: 'my_samplers:DEIS', steps: 5}]"],
    "features": [
        "training.steps=4",
        "search.space.evaluation.fid.features.grid=['my_features:RANDOM', 'my_features:TAUGHT']",
    ],
    "variance": ["training.steps=4", "search.space.diffusion.variance.grid=['my_variances:ABOVE_SMALL']"],
    "metric": ["training.steps=4", "search.space.evaluation.fid.sampler.grid=[{kind: ddim, steps: 5}]"],
}


class Made(NamedTuple):
    """What a storage holds: trials, sets of samples, and summaries of evaluations."""

    trials: int
    samples: int
    summaries: int


def count(storage: Path) -> Made:
    samples = [path for path in storage.glob("evaluations/*/samples-*") if path.name.count("-") == 1]
    trials = list(storage.glob("trials/*/status.json"))
    return Made(len(trials), len(samples), len(list(storage.glob("evaluations/*/summary-*.json"))))


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """A Ray of this process for all of them: their code is one after the other in the same workers."""
    with open_session(None):
        yield


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.faults] * (name in SLOWER)) for name in EDITS])
def test_an_edit_makes_again_what_depends_on_it(
    name: str, tmp_path: Path, one_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, storage = shutil.copytree(ROOT / "examples" / name, tmp_path / name), tmp_path / "runs"

    def sweep(*more: str) -> str:
        data = [f"data.source={folder / 'digits'}"] * (name == "format")
        words = [folder / "experiment.yaml", "--smoke", "--storage", storage, *SMALL[name], *data, *more]
        assert main(list(map(str, words))) == 0, capsys.readouterr()
        return capsys.readouterr().out

    if name == "format":
        load(folder / "write_digits.py").write(folder / "digits")
    sweep()
    first = count(storage)
    file, old, new, again, why = EDITS[name]
    text = (folder / file).read_text()
    assert old in text
    if name == "weighting":  # of the others test_own_code looks at the ids
        (folder / file).write_text('"""Other words."""\n# A comment.\n' + text.partition("\n")[2])
        (folder / "nobody_imports.py").write_text("this is no Python")
        assert "again:" not in sweep("--dry-run")
        sweep()
        assert count(storage) == first
    (folder / file).write_text(text.replace(old, new))
    assert why in sweep("--dry-run")
    sweep()
    made = tuple(after - before for before, after in zip(first, count(storage), strict=True))
    assert made == again, (first, made)
    status = json.loads(run("orchestrator.status", f"own_{name}-smoke", "--json", "--storage", storage).stdout)
    pinned = [name for trial in status["sweeps"][0]["trials"] for names in trial["code"].values() for name in names]
    [digest] = {name.partition("@")[2] for name in pinned}
    kept = (storage / "code" / digest / file).read_text()
    assert new in kept and len(list((storage / "code").iterdir())) == 2


def load(path: Path) -> Any:
    spec = util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_weights_of_the_sampler_are_those_of_diffusers(order: int) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    weigh: Callable[..., list[float]] = load(ROOT / "examples/sampler/deis.py").weigh
    scheduler = schedulers.DEISMultistepScheduler(solver_order=order)
    sigma = [9.0, 5.0, 2.0, 0.7]
    scheduler.sigmas, scheduler._step_index = torch.tensor(sigma, dtype=torch.float64), 2
    y, *eps = torch.randn(4, 8, generator=make_generator("deis"), dtype=torch.float64)
    step = [
        lambda **given: scheduler.deis_first_order_update(eps[0], **given),
        lambda **given: scheduler.multistep_deis_second_order_update(eps[1::-1], **given),
        lambda **given: scheduler.multistep_deis_third_order_update(eps[2::-1], **given),
    ][order - 1]
    theirs = step(sample=y / (1 + sigma[2] ** 2) ** 0.5) * (1 + sigma[3] ** 2) ** 0.5
    weights = weigh(sigma[2::-1][:order], sigma[2], sigma[3])
    ours = y + sum(weight * each for weight, each in zip(weights, eps, strict=False))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
