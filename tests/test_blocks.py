"""Which blocks an evaluation has and where they lie: what a setting moves, and what it leaves where it is."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_evaluation import DATASET, HELD_OUT, IMAGES, TRAIN, T, measurement, small_blocks

from workers.config import DataConfig, EvaluationConfig, FIDConfig, ODENLLConfig, SamplerConfig
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.evaluation.blocks import (
    VERSION,
    Images,
    list_blocks,
    list_feature_blocks,
    list_nll_blocks,
    list_ode_nll_blocks,
    list_reference_blocks,
    list_sample_blocks,
    name_distance,
    name_summary,
)
from workers.kinds import SAMPLERS

few_rows_a_block = pytest.fixture(autouse=True)(small_blocks)


def folders(m: Any, checkpoint: str = "c", images: Images = IMAGES) -> dict[str, str]:
    """Where each kind of block lies."""
    found = {
        kind: {b.folder for b in group} for kind, group in groupby(list_blocks(m, checkpoint, images), lambda b: b.kind)
    }
    return {kind: folder for kind, [folder] in found.items()}


def moved(here: dict[str, str], there: dict[str, str]) -> set[str]:
    return {kind for kind in here if here[kind] != there[kind]}


@pytest.mark.parametrize("images", [1, 4, 7, 8, 10, 99, "all"])
@pytest.mark.parametrize(("timesteps", "columns"), [("all", 3), (5, 1)])
def test_more_images_only_add_blocks(images, timesteps, columns):
    some, all_ = (list_nll_blocks(measurement(n, timesteps), "c", IMAGES) for n in (images, "all"))
    n = HELD_OUT if images == "all" else min(images, HELD_OUT)
    assert some == all_[: -(-n // 4) * columns]
    assert len({block.path for block in all_}) == len(all_) == 3 * columns


def test_more_samples_and_their_features_only_add_blocks():
    for blocks_of in (list_sample_blocks, list_feature_blocks):
        few, many = (blocks_of(measurement(samples=n), "c", IMAGES) for n in (15, 31))
        assert (len(few), len(many)) == (2, 4) and few == many[:2]


@pytest.mark.parametrize(("images", "count"), [(1, 1), (16, 1), (17, 2), (TRAIN, 3), (10**6, 3), ("all", 3)])
def test_more_reference_images_only_add_blocks(images, count):
    some, all_ = (list_reference_blocks(measurement(reference_images=n), IMAGES) for n in (images, "all"))
    assert some == all_[:count]


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        ({"seed": 1}, {"nll", "samples", "features"}),
        ({"timesteps": 5}, {"nll"}),
        ({"sampler": SamplerConfig(kind="ddim", steps=4)}, {"samples", "features"}),
        ({"sampler": SamplerConfig(kind="ddim", steps=3, eta=0.5)}, {"samples", "features"}),
        ({"sampler": SamplerConfig()}, {"samples", "features"}),
        ({"quantise": "truncate"}, {"samples", "features"}),
        ({"features": "inception"}, {"features", "reference"}),
        ({"reference": "held_out"}, {"reference"}),
        ({"reference_images": 20}, set()),
        ({"samples": 31}, set()),
        ({"images": 3}, set()),
        ({"also": ()}, set()),
        ({"sampler": SamplerConfig(kind="heun", steps=3)}, {"samples", "features"}),
        ({"variance": "fixed_small"}, set()),
        ({"variance": "fixed_small", "sampler": SamplerConfig()}, {"samples", "features"}),
    ],
)
def test_a_setting_moves_what_it_changes_and_nothing_else(other, kinds):
    here, there = measurement(), measurement(**other)
    assert moved(folders(here), folders(there)) == kinds
    assert name_summary(here, "c", IMAGES) != name_summary(there, "c", IMAGES)


def test_the_proposal_counts_where_timesteps_are_sampled():
    assert not moved(folders(measurement()), folders(measurement(proposal="uniform")))
    sampled = (folders(measurement(timesteps=5, proposal=proposal)) for proposal in ("log_uniform", "uniform"))
    assert moved(*sampled) == {"nll"}


def test_checkpoints_share_their_references_and_nothing_else():
    assert moved(folders(measurement(), "c"), folders(measurement(), "other")) == {"nll", "samples", "features"}
    assert name_summary(measurement(), "c", IMAGES) != name_summary(measurement(), "other", IMAGES)


def test_of_other_data_only_the_samples_stay():
    """And Inception's features of them; the classifier belongs to the data that it was trained on."""
    other = IMAGES._replace(digest="d2")
    for features, moving in (("classifier", {"nll", "features", "reference"}), ("inception", {"nll", "reference"})):
        m = measurement(features=features)
        assert moved(folders(m), folders(m, images=other)) == moving
        assert name_summary(m, "c", IMAGES) != name_summary(m, "c", other)


def test_a_block_comes_after_those_that_it_needs():
    wanted = list_blocks(measurement(), "c", IMAGES)
    assert len({block.path for block in wanted}) == len(wanted) == 9 + 3 + 2 + 2
    for k, block in enumerate(wanted):
        assert set(block.needs) <= set(wanted[:k])
        [*needed] = ((need.kind, need.number) for need in block.needs)
        assert needed == ([("samples", block.number)] if block.kind == "features" else [])


@pytest.mark.parametrize("timesteps", [T, T + 1, 10**6])
def test_as_many_timesteps_as_there_are_is_all_of_them(timesteps):
    assert list_nll_blocks(measurement(timesteps=timesteps), "c", IMAGES) == list_nll_blocks(measurement(), "c", IMAGES)


def test_nothing_asked_is_no_blocks():
    m = measurement()
    assert list_blocks(m.model_copy(update={"evaluation": EvaluationConfig(nll=None, fid=None)}), "c", IMAGES) == []
    for part in ("nll", "fid"):
        without = m.model_copy(update={"evaluation": m.evaluation.model_copy(update={part: None})})
        kinds = {"nll"} if part == "fid" else {"samples", "features", "reference"}
        assert {block.kind for block in list_blocks(without, "c", IMAGES)} == kinds


def test_a_path_tells_the_place_in_the_storage():
    [block, *_] = list_sample_blocks(measurement(), "c", IMAGES)[1:]
    assert Path(block.path).parent.parent == Path("evaluations/c") and block.name == "block-00001.parquet"
    assert (
        list_reference_blocks(measurement(), IMAGES)[2].path
        == f"references/d1-train-classifier-v{VERSION}/block-00002.parquet"
    )


def test_a_data_set_counts_alike_before_and_after_it_is_decoded(tmp_path):
    config = DataConfig(source="digits")
    assert Images.of(describe(config, tmp_path)) == Images.of(prepare(config, tmp_path))
    assert Images.of(DATASET) == IMAGES and np.array_equal(DATASET.held_out.shape, (HELD_OUT, 4, 4, 1))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"features": "inception"}, "fid"),
        ({"features": "inception", "reference_images": 10_000}, "fd_inception"),
        ({"features": "inception", "reference": "held_out"}, "fd_inception_held_out"),
        ({"features": "inception", "quantise": "truncate", "samples": 50_000}, "fid"),
        ({}, "fd_classifier"),
        ({"reference": "held_out"}, "fd_classifier_held_out"),
    ],
)
def test_fid_is_inception_against_all_of_train_and_nothing_else(settings, name):
    assert name_distance(FIDConfig(**settings)) == name


@pytest.mark.parametrize(
    ("sampler", "samples", "summary"),
    [
        (SamplerConfig(), "94a08f781c6a1012", "e1f162c08595baaa"),
        (SamplerConfig(kind="ddim", steps=4, eta=0.5), "cbfef7cf9d969747", "058aba03ad8ec7f4"),
    ],
)
def test_ids_of_measurements_stay_what_they_are(sampler, samples, summary):
    """Recorded: what was measured with this VERSION is not measured again."""
    m = measurement(sampler=sampler)
    assert folders(m)["samples"] == f"evaluations/c/samples-{samples}"
    assert folders(m)["nll"] == "evaluations/c/nll-f9ca37cbd1a63a94"
    assert name_summary(m, "c", IMAGES) == f"evaluations/c/summary-{summary}.json"


@pytest.mark.parametrize("kind", SAMPLERS)
def test_settings_that_a_sampler_does_not_read_move_nothing(kind):
    unread: dict[str, Any] = {"eta": 0.5, "repeats": 2, "step_size": 0.1, "tolerance": 0.01, "steps": 4}
    here = folders(measurement(sampler=SamplerConfig(kind=kind)))
    for name, value in unread.items():
        there = folders(measurement(sampler=SamplerConfig(kind=kind, **{name: value})))
        assert (here != there) == (name in SAMPLERS[kind].reads), name


def test_the_ode_s_likelihood_has_blocks_of_its_own():
    def of(**ode: Any) -> set[str]:
        return {b.path for b in list_ode_nll_blocks(measurement(ode_nll=ODENLLConfig(**ode)), "c", IMAGES)}

    assert list_ode_nll_blocks(measurement(), "c", IMAGES) == []
    assert len(of()) == 3 and of(images=4) < of(images=5) < of()
    assert not of() & of(probes=2) and not of() & of(tolerance=1e-3)
    assert folders(measurement(ode_nll=ODENLLConfig())) == folders(measurement()) | {
        "ode_nll": next(iter(of())).rpartition("/")[0]
    }
