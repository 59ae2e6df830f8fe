"""The contract of a network of one's own: what breaks it is told, and how."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from orchestrator.conform import main
from orchestrator.experiment.load import open_code
from workers import conformity
from workers.config import ModelConfig
from workers.conformity import check_network

SIDES = (4, 4)
# A network that keeps all, with one line of it to be changed.
PLAIN = """
import torch
from torch import nn
from workers.kinds import NetworkEntry
from workers.network.unet import Dropout

class Plain(nn.Module):
    def __init__(self, settings, of):
        super().__init__()
        self.first, self.time = nn.Conv2d(of.channels, 8, 3, padding=1), nn.Linear(1, 8)
        self.last, self.dropout = nn.Conv2d(8, of.outputs, 3, padding=1), Dropout(0.1)

    def forward(self, x, t):
        h = torch.relu(self.first(x) + self.time(t[:, None].float() / 50)[:, :, None, None])
        return self.last(self.dropout(h))

NETWORK = NetworkEntry(function=Plain, about="plain")
"""
DRAWN = "self.last.weight.data.copy_(torch.randn(self.last.weight.shape, generator=torch.Generator().manual_seed("
CASES = {
    "shapes": ("self.last(self.dropout(h))", "self.last(self.dropout(h))[:, :, 1:]", r"returns \(2, 1, 3, 4\)"),
    "shapes, raised": ("torch.relu(self.first", "torch.relu(self.frist", r"no attribute 'frist' \(.*plain.py:14\)"),
    "shapes, state": ("Dropout(0.1)\n", "nn.BatchNorm2d(8)\n", "num_batches_tracked, which is no floating-point"),
    "seed": ("Dropout(0.1)\n", f"Dropout(0.1); import time; {DRAWN}time.time_ns())))\n", "begin with other weights"),
    "noise": ("Dropout(0.1)\n", "nn.Dropout(0.1)\n", "take workers.network.unet.Dropout"),
    "shapes, idle": ("nn.Linear(1, 8)\n", "nn.Linear(1, 8); self.spare = nn.Linear(2, 2)\n", "change: spare.weight"),
    "gradient": ("+ self.time(t", "+ 0 * self.time(t", "time.bias, time.weight never"),
    "state": ("Dropout(0.1)\n", "Dropout(0.1); self.shift = torch.rand(1)\n", "register all that it learns"),
    "batch": ("torch.relu(self.first(x)", "torch.relu(self.first(x - x.mean())", "on the others of its batch"),
    "time": ("t[:, None].float() / 50", "torch.ones(len(x), 1)", "the same at any t"),
    "learning": ("return self.last(", "return 1e-3 * self.last(", "is the least: is the output as large as the noise"),
}  # fmt: skip


def write_network(folder: Path, old: str = "", new: str = "") -> ModelConfig:
    assert old in PLAIN
    text = PLAIN.replace(old, new) if old else PLAIN
    if "self.shift" in text:
        text = text.replace("return self.last(", "return self.shift + self.last(")
    (folder / "plain.py").write_text(text)
    assert open_code(["."], folder, "plain:NETWORK") == []
    return ModelConfig(kind="plain:NETWORK")


def test_all_is_kept_by_a_plain_network(tmp_path: Path) -> None:
    laws = list(check_network(write_network(tmp_path), SIDES, 1))
    assert [law.broken for law in laws] == [""] * 8 and str(laws[0]) == "shapes    kept"


OF_SIDES = """
class Sided(nn.Module):
    def __init__(self, settings, of):
        super().__init__()
        self.sides, kind = of.sides, {1: nn.Conv1d, 3: nn.Conv3d}[len(of.sides)]
        self.first, self.last = kind(of.channels, 8, 3, padding=1), kind(8, of.outputs, 3, padding=1)
        self.time, self.vectors = nn.Linear(1, 8), nn.Linear(of.vectors[1], 8)

    def forward(self, x, t, vectors):
        assert x.shape[2:] == self.sides and vectors.shape[1:] == (3, 4) or len(vectors) == 2
        told = self.time(t[:, None].float() / 50) + READ
        return self.last(torch.relu(self.first(x) + told.reshape(*told.shape, *[1] * len(self.sides))))

SIDED = NetworkEntry(function=Sided, about="of signals and volumes, which is told vectors")
"""


@pytest.mark.parametrize("sides", [(12,), (3, 2, 4)])
@pytest.mark.parametrize("reads", [True, False])
def test_of_signals_and_volumes_and_of_vectors(
    sides: tuple[int, ...], reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformity, "STEPS", 40)
    told = "self.vectors(vectors.mean(1))" if reads else "self.vectors(0 * vectors.mean(1))"
    (tmp_path / "plain.py").write_text(PLAIN + OF_SIDES.replace("READ", told))
    assert open_code(["."], tmp_path, "plain:SIDED") == []
    model = ModelConfig(kind="plain:SIDED", conditions="vectors")
    laws = {law.name: law.broken for law in check_network(model, sides, 1)}
    assert set(laws) == {"shapes", "seed", "noise", "gradient", "state", "batch", "time", "vectors", "learning"}
    assert bool(laws["vectors"]) is not reads
    assert {name for name, broken in laws.items() if broken} <= {
        "learning",
        *(() if reads else ("vectors", "gradient")),
    }


@pytest.mark.parametrize("case", CASES)
def test_what_is_broken_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case != "learning":
        monkeypatch.setattr(conformity, "STEPS", 40)
    old, new, words = CASES[case]
    laws = {law.name: law.broken for law in check_network(write_network(tmp_path, old, new), SIDES, 1)}
    name = case.partition(",")[0]
    assert re.search(words, laws[name]), laws
    also = {"learning"} | ({"time"} if name == "gradient" else set())  # 40 steps teach little, and t has no gradient
    assert {name for name, broken in laws.items() if broken} <= {name, *also}, laws


def test_the_command_says_it_and_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_network(tmp_path, *CASES["noise"][:2])
    assert main(["plain:NETWORK", "--code", str(tmp_path), "--shape", "4x4x1"]) == 3
    assert "noise     BROKEN: in training" in capsys.readouterr().out
    assert main(["my_networks:DIT", "wdth=8", "--code", str(ROOT / "examples/dit")]) == 2
    assert "did you mean 'width'?" in capsys.readouterr().err
    for shape, words in (("8", "32x32x3"), ("16x1", "the U-Net is of images"), ("2x2x2x2x1", "of volumes depth")):
        assert main(["unet", "--shape", shape]) == 2 and words in capsys.readouterr().err
    assert main(["unet", "--code", str(tmp_path / "no")]) == 2 and "is no folder" in capsys.readouterr().err
