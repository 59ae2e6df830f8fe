"""What a sweep of four trials leaves in its storage, and a page as a browser reads it."""

from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from conftest import commit

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse
from orchestrator.experiment.records import Experiment
from orchestrator.state.saved import keep_sweep
from workers.config import DataConfig, Measurement
from workers.data.sources import Source
from workers.evaluation.blocks import Images, make_protocol_key
from workers.layout import RowId
from workers.seals import seal_lines
from workers.storage import Storage

SOURCE = Source("d1", "digits", "digits", 1497, 300, True, 17, (8, 8, 1))
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000 3a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


def experiment(**search: Any) -> Experiment:
    axes = {"diffusion.T": {"grid": [20, 50]}, "loss.weighting": {"grid": ["simple", "vlb"]}}
    schedule = {"scale": "per_1000", "beta_end": 0.015}
    return parse(
        {
            "name": "small",
            "data": {"source": "digits"},
            "diffusion": {"schedule": schedule},
            "training": {"steps": 10, "batch_size": 8},
            "search": {"space": axes, **search},
        }
    )


def stored(root: Path, nll: Mapping[int, list[float]], **search: Any) -> tuple[Storage, list[str]]:
    """A storage as a sweep of four trials leaves it; `nll` has the bits/dim of each image, by the trial's number."""
    storage, of = Storage(root), experiment(**search)
    trials = {RowId(f"{i}{'abcdef012345678'}"): v for i, v in enumerate(expand(of))}
    keep_sweep(storage, of, trials, {DataConfig(source="digits"): SOURCE})
    for i, (address, v) in enumerate(trials.items()):
        if i not in nll:
            continue
        point = {"step": 10, "time_ms": 5_000, "metrics": {"valid/nll_bpd": 3.0 + i, "valid/nll_bpd_se": 0.1}}
        picture = f"trials/{address}/samples/step-10.png"
        image = {"step": 10, "time_ms": 5_000, "image": "samples", "path": picture}
        storage.write(picture, PIXEL)
        lines = [{**point, "step": 0}, point, image]
        journal = f"trials/{address}/journal.jsonl"
        storage.write(journal, seal_lines(lines, journal))
        checkpoint = commit(storage, address, v.trial.training.steps)
        state = {"state": "finished", "step": 10, "steps": 10, "images_per_s": 40.0, "checkpoint": checkpoint,
                 "valid_nll_bpd": 3.0 + i, "updated_ms": 6_000, "host": "<b>here</b>", "detail": ""}  # fmt: skip
        storage.write_sealed(f"trials/{address}/status.json", state)
        key = make_protocol_key(Measurement.of(v.trial), Images.of(SOURCE))
        storage.write_sealed(
            f"evaluations/{checkpoint}/summary-{key}.json", summary(nll[i], v.trial.diffusion.T, 2.0 - i / 10)
        )
    return storage, list(trials)


def summary(per_image: list[float], T: int, distance: float) -> dict[str, Any]:
    mean = sum(per_image) / len(per_image)
    parts = {"eval/nll_prior_bpd": 0.01, "eval/nll_diffusion_bpd": mean - 0.41, "eval/nll_decoder_bpd": 0.4}
    return {
        "metrics": {"eval/nll_bpd": mean, "eval/nll_bpd_se": 0.05, **parts, "eval/fd_classifier": distance,
                    "eval/fd_classifier_se": 0.1},
        "passports": {"nll": {"protocol": {"data": "d1", "timesteps": "all"}, "subject": {"T": T}},
                      "samples": {"protocol": {"features": "classifier"}, "also": {"kid": "100 subsets"},
                                  "warnings": ["few samples"]}},
        "nll_per_image": per_image,
        "nll_by_t": [mean / T] * T + [0.01],
        "rate_distortion": {"rate_bpd": [0.1 * t for t in range(T)], "rmse_255": [100.0 / (t + 1) for t in range(T)]},
        "ledger": {"optimal": [{"steps": s, "bpd": mean + 20 / s, "bpd_se": 0.05} for s in (T, 10)]},
        "hash": "h",
    }  # fmt: skip


FOUR = {0: [2.0, 2.4, 2.8], 1: [2.1, 2.35, 2.84], 2: [2.5, 2.91, 3.3], 3: [3.0, 3.41, 3.8]}


class Page(HTMLParser):
    """What a page would load, its tags in balance, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.loads += [str(v) for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") for name in names), names
        if tag not in ("meta", "br", "img", "path", "use", "rect", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
