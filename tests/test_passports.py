"""Passports tell protocols apart, and the hash is of what went in."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_evaluation
import torch
from small_evaluation import (
    IMAGES,
    LEVELS,
    SIDE,
    SPACE,
    D,
    T,
    bench,
    blocks_of,
    evaluated,
    make_all,
    measurement,
    small_blocks,
    summary_of,
)

from orchestrator.measuring.differences import list_protocol_differences
from workers.config import Mistake, SamplerConfig
from workers.evaluation.blocks import list_sample_blocks
from workers.evaluation.make import Bench, read_block
from workers.seals import seal_parquet

few_rows_a_block = pytest.fixture(autouse=True)(small_blocks)
root = small_evaluation.root


# ---- Passports -------------------------------------------------------------------------------------------------


def passports(root: Path, weights: str = "a", **settings: Any) -> dict[str, dict[str, Any]]:
    return evaluated(root, measurement(**settings), weights)["passports"]


def test_two_checkpoints_have_one_protocol_and_two_subjects(root):
    one, other = passports(root), passports(root, "b")
    for kind in ("nll", "samples"):
        assert one[kind]["protocol"] == other[kind]["protocol"]
        checkpoints = [p[kind]["subject"].pop("checkpoint") for p in (one, other)]
        assert len(set(checkpoints)) == 2 and one[kind]["subject"] == other[kind]["subject"]
    assert one["nll"]["subject"] == {"ema": 0.99, "T": T, "variance": "fixed_large", "seed": 0}
    assert one["samples"]["subject"] == {**one["nll"]["subject"], "network_evaluations": 3}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"samples": 14}, {"samples"}),
        ({"sampler": SamplerConfig(kind="ddim", steps=4)}, {"samples"}),
        ({"sampler": SamplerConfig(kind="ancestral", steps=3)}, {"samples"}),
        ({"quantise": "truncate"}, {"samples"}),
        ({"reference": "held_out"}, {"samples"}),
        ({"reference_images": 20}, {"samples"}),
        ({"images": 7}, {"nll"}),
        ({"timesteps": 8}, {"nll"}),
        ({"timesteps": 8, "proposal": "uniform"}, {"nll"}),
        ({"also": ()}, set()),
        ({"precision": "bf16"}, {"nll", "samples"}),
    ],
)
def test_a_protocol_is_another_where_the_way_of_measuring_is(root, settings, changed):
    here, there = passports(root), passports(root, **settings)
    assert {kind for kind in here if here[kind]["protocol"] != there[kind]["protocol"]} == changed


def test_another_precision_has_blocks_of_its_own_and_nearly_the_same_numbers(root):
    float32, bf16 = (evaluated(root, measurement(precision=precision)) for precision in ("float32", "bf16"))
    names = ("eval/nll_bpd", "eval/fd_classifier")
    for name in names:
        here, there = float32["metrics"][name], bf16["metrics"][name]
        assert abs(here - there) < 0.02 * here, name
    assert float32["nll_per_image"] != bf16["nll_per_image"]
    assert bf16["passports"]["nll"]["protocol"]["precision"] == "bf16"
    assert [text for text in list_protocol_differences(float32, bf16, "nll") if "precision" in text]


def test_a_network_computes_in_the_precision_that_is_asked_for(root, monkeypatch):
    """And in no other: its heaviest products are seen, here by the dtype of a convolution's input."""
    seen = set()
    right = torch.nn.functional.conv2d

    def conv2d(x, *rest):
        seen.add(x.dtype if not torch.is_autocast_enabled("cpu") else torch.get_autocast_dtype("cpu"))
        return right(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        b = bench(root, measurement(precision=precision))
        x_t, t = torch.zeros(2, 1, SIDE, SIDE), torch.tensor([1, T])
        assert b.model.predict(x_t, t).eps.dtype == torch.float32 and seen == {dtype}


def test_tf32_is_refused_where_there_is_none(root):
    with pytest.raises(Mistake, match="tf32 is not known to cpu; take float32 or bf16"):
        bench(root, measurement(precision="tf32")).model.predict(torch.zeros(1, 1, SIDE, SIDE), torch.tensor([1]))


def test_the_proposal_is_part_of_the_protocol_where_timesteps_are_sampled(root):
    uniform, log_uniform = (passports(root, timesteps=8, proposal=p)["nll"] for p in ("uniform", "log_uniform"))
    assert uniform["protocol"] != log_uniform["protocol"]
    assert passports(root)["nll"] == passports(root, proposal="uniform")["nll"]


def test_a_passport_says_what_a_number_depends_on(root):
    """Extractor and digest, data and split, n, levels, sampler, quantisation, clipping, and that none was left out."""
    here = passports(root)
    nll, samples = here["nll"]["protocol"], here["samples"]["protocol"]
    assert (nll["data"], nll["split"], nll["levels"], nll["timesteps"]) == ("d1", "held_out", LEVELS, "all")
    assert samples["features"] == "classifier" and samples["features_digest"] == SPACE.digest
    assert samples["dimensions"] == D and samples["quantised"] == "round to 17 levels"
    assert samples["sampler"] == {"kind": "ddim", "steps": 3, "eta": 0}
    for protocol in (nll, samples):
        assert protocol["dropped"] == 0 and protocol["x_0_hat"] == "clipped to [-1, 1]"


def test_a_summary_is_json(root):
    summary = evaluated(root, measurement(samples=31))
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again["metrics"] == summary["metrics"] and again["passports"] == summary["passports"]


# ---- The hash --------------------------------------------------------------------------------------------------


def changed(table: pa.Table, name: str) -> pa.Table:
    """`table` with the last bit of the first number in the column `name` changed."""
    values = table[name].to_pylist()
    first = values[0]
    values[0] = [np.nextafter(first[0], np.inf), *first[1:]] if isinstance(first, list) else np.nextafter(first, np.inf)
    place = table.column_names.index(name)
    return table.set_column(place, table.field(name), pa.array(values, table.field(name).type))


def write(b: Bench, path: str, table: pa.Table, **how: Any) -> None:
    stream = io.BytesIO()
    pq.write_table(table, stream, **how)
    b.storage.write(path, seal_parquet(stream.getvalue(), path))


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("nll", "squared_error"),
        ("nll", "weight"),
        ("nll", "decoder_nats"),
        ("features", "features"),
        ("reference", "features"),
    ],
)
def test_the_hash_is_of_the_values_and_of_nothing_else(tmp_path, kind, column):
    """Written to Parquet in another way they have the same; with the last bit of one changed, another."""
    b = bench(tmp_path, measurement())
    make_all(b, blocks_of(b))
    expected = summary_of(b)["hash"]
    assert len(expected) == 16 and int(expected, 16)
    [block, *_] = [block for block in blocks_of(b) if block.kind == kind]
    content, table = b.storage.read(block.path), read_block(b.storage, block)
    write(b, block.path, table, compression="none", row_group_size=3, use_dictionary=False)
    assert b.storage.read(block.path) != content and summary_of(b)["hash"] == expected
    write(b, block.path, changed(table, column))
    assert summary_of(b)["hash"] != expected


def test_the_hash_is_the_same_in_any_making_order(tmp_path, root):
    b = bench(tmp_path, measurement())
    make_all(b, reversed(blocks_of(b)))
    assert summary_of(b) == evaluated(root, measurement())


def test_other_weights_or_noise_are_another_hash(root):
    hashes = {evaluated(root, m, w)["hash"] for m in (measurement(), measurement(seed=1)) for w in ("a", "b")}
    assert len(hashes) == 4


# ---- How much was computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [SamplerConfig(kind="heun", steps=4), SamplerConfig(kind="ode", tolerance=0.1)])
def test_the_passport_counts_the_network_s_evaluations(tmp_path, sampler):
    """Known beforehand, or, of a solver with error control, the mean of what the blocks counted for each sample."""
    b = bench(tmp_path, measurement(sampler=sampler, samples=13))
    make_all(b, blocks_of(b))
    summary = summary_of(b)
    count = summary["passports"]["samples"]["subject"]["network_evaluations"]
    protocol = summary["passports"]["samples"]["protocol"]
    tables = [read_block(b.storage, block) for block in list_sample_blocks(b.m, b.checkpoint.digest, IMAGES)]
    if sampler.kind == "heun":
        assert count == 7 and tables[0].column_names == ["sample", "image"]
        assert protocol["sampler"] == {"kind": "heun", "steps": 4} and "nearest trained" in protocol["times"]
    else:
        counted = np.concatenate([table["evaluations"].to_numpy() for table in tables])
        assert count == counted[:13].mean() and counted.min() > 5
        assert protocol["sampler"] == {"kind": "ode", "tolerance": 0.1} and "real t" in protocol["times"]
    assert summary["metrics"]["eval/network_evaluations"] == count and protocol["x_0_hat"] == "not clipped"
