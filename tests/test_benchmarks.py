"""The benchmark of speeds: what its ratios are of, and that one part's failure leaves the others."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import peers
import speed

from workers.config import ModelConfig

CPU = torch.device("cpu")


def test_a_ratio_is_of_one_round_and_a_rate_is_the_median() -> None:
    ours = speed.Contender("ours", lambda: None, 10, ours=True, rates=[20, 40, 10])
    peer = speed.Contender("peer", lambda: None, 10, rates=[10, 10, 10])
    own, other = speed.lines_of("part", "images/s", [ours, peer], flops=5, peak=400)
    assert (own.rate, own.of_peak, own.ratios) == (20, 0.25, {})
    assert (other.rate, other.ratios) == (10, {"ours": (2, 1, 4)})
    assert "ours is 2.00 times as fast (1.00 to 4.00)" in speed.text_of(other)


def test_rounds_take_turns() -> None:
    seen: list[str] = []
    contenders = [speed.Contender(name, lambda name=name: seen.append(name), 1) for name in ("a", "b")]  # type: ignore[misc]
    speed.race(contenders, CPU, budget_s=60)
    assert seen == ["a", "b"] * (1 + speed.ROUNDS) and all(len(c.rates) == speed.ROUNDS for c in contenders)


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(setting: speed.Setting) -> Iterator[speed.Line]:
        raise RuntimeError("no kernel image")

    def works(setting: speed.Setting) -> Iterator[speed.Line]:
        yield speed.Line("works", "ours", "images/s", 1.0, {}, None, None)

    monkeypatch.setattr(speed, "parts", lambda device: {"broken": broken, "works": works})
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", "--output", str(tmp_path / "speed.json")])
    assert speed.main() == 1
    written, output = json.loads((tmp_path / "speed.json").read_text()), capsys.readouterr()
    assert written["failed"] == ["broken"] and [line["part"] for line in written["lines"]] == ["works"]
    assert "no kernel image" in output.err and "failed: broken" in output.out


def test_peers_have_our_weights() -> None:
    """So that what is timed is the same work: the networks' outputs agree."""
    pytest.importorskip("diffusers")
    model = ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(16,), dropout=0.0)
    ours, theirs = peers.unet(model, CPU).eval(), peers.diffusers_unet(model, CPU).eval()
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-5)
        assert ours(x, t).abs().mean() > 1e-3  # no layer is left at zero
