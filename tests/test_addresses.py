"""The address of a trial counts what changes its weights, and nothing else."""

from typing import Any

import pytest
from experiment_files import content, digests

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse
from orchestrator.experiment.settings import merge, put
from workers.config import Trial
from workers.identity import compute_trial_id


def test_the_address_counts_only_what_changes_the_weights() -> None:
    base = content(training={"steps": 10, "workers": 1})
    (address,) = digests(expand(parse(base)))[0]
    for path, value in {
        "name": "other",
        "training.workers": 2,
        "training.gpus": 1,
        "training.steps": 11,
        "training.validate_every": 3,
        "evaluation.fid": None,
        "search.max_concurrent": 2,
        "tracking.uri": "http://host",
        "data.source": "another/path",
    }.items():
        assert list(digests(expand(parse(put(base, path.split("."), value))))[0]) == [address], path
    for path, value in {"seed": 1, "training.decay": "cosine", "diffusion.T": 9, "data.flip": True}.items():
        assert list(digests(expand(parse(put(base, path.split("."), value))))[0]) != [address], path
    assert list(digests(expand(parse(base)), data="other bytes")[0]) != [address]


# By id: where one changes, the serializer or a default has, and TRAINING_VERSION is to be raised.
RECORDED: dict[str, dict[str, Any]] = {
    "091ab5392ead318b": {},
    "27309ec98f0e46c3": {"diffusion": {"T": 50, "schedule": {"kind": "cosine"}}},
    "4e1315d3d8760a81": {"diffusion": {"schedule": {"kind": "constant", "scale": "per_1000"}}},
    "5062ac261c5d5f1e": {
        "diffusion": {"schedule": {"kind": "quadratic"}, "variance": "fixed_small"},
        "loss": {"weighting": "min_snr", "gamma": 4.0},
    },
    "f5fb13bac89bc0f2": {"loss": {"weighting": "vlb"}, "seed": 3},
    "5f7fb2f8aca455fb": {"training": {"steps": 7, "decay": "cosine"}},
}


@pytest.mark.parametrize("recorded", RECORDED)
def test_ids_stay_what_they_are(recorded: str) -> None:
    """Settings that came later, or that nothing reads, leave the ids of trials that do not set them."""
    settings = {"data": {"source": "digits"}, "training": {"steps": 1}}
    assert compute_trial_id(Trial.model_validate({**settings, **RECORDED[recorded]}), "d" * 16) == recorded


def address_of(**sections: Any) -> str:
    settings = {"data": {"source": "digits"}, "training": {"steps": 1}}
    return compute_trial_id(Trial.model_validate(merge(settings, sections)), "d" * 16)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("linear", {"beta_start", "beta_end", "scale"}),
        ("quadratic", {"beta_start", "beta_end", "scale"}),
        ("warmup10", {"beta_start", "beta_end", "scale"}),
        ("warmup50", {"beta_start", "beta_end", "scale"}),
        ("sigmoid", {"beta_start", "beta_end", "scale"}),
        ("constant", {"beta_end", "scale"}),
        ("cosine", set()),
        ("jsd", set()),
        ("list", {"betas"}),
        ("log_snr", {"log_snr_start", "log_snr_end"}),
    ],
)
def test_what_a_schedule_reads_counts_and_nothing_else(kind, read):
    other = {"beta_start": 2e-4, "beta_end": 0.03, "scale": "per_1000", "betas": [0.1] * 1000}
    other |= {"log_snr_start": 8.0, "log_snr_end": -8.0}
    plain = address_of(diffusion={"schedule": {"kind": kind}})
    for name, value in other.items():
        changed = address_of(diffusion={"schedule": {"kind": kind, name: value}})
        assert (changed != plain) == (name in read), name


def test_what_an_objective_reads_counts_and_nothing_else():
    assert address_of(loss={"p2_gamma": 0.5, "p2_k": 2.0, "vlb_weight": 0.1}) == address_of()
    p2 = {"weighting": "p2"}
    assert (
        len({address_of(loss=p2), address_of(loss={**p2, "p2_gamma": 0.5}), address_of(loss={**p2, "p2_k": 2.0})}) == 3
    )
    learned = {"variance": "learned_range"}
    one, other = (address_of(diffusion=learned, loss={"objective": "hybrid", "vlb_weight": w}) for w in (0.001, 0.01))
    kl = address_of(diffusion=learned, loss={"objective": "kl", "vlb_weight": 0.01})
    assert (
        len(
            {
                one,
                other,
                kl,
                address_of(diffusion={"prediction": "v"}),
                address_of(training={"timesteps": "stratified"}),
            }
        )
        == 5
    )
    assert address_of(training={"timesteps": "uniform"}) == address_of()
