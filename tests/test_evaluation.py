"""Making blocks: what they hold, that their order and makers do not matter, and that damage is noticed."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_evaluation import (
    CPU,
    DATASET,
    HELD_OUT,
    IMAGES,
    LEVELS,
    SIDE,
    SPACE,
    T,
    bench,
    blocks_of,
    evaluated,
    make_all,
    measurement,
    small_blocks,
    summary_of,
)

from workers.config import ODENLLConfig
from workers.diffusion.ledger import Ledger
from workers.evaluation import make as evaluation
from workers.evaluation.blocks import (
    Block,
    list_feature_blocks,
    list_nll_blocks,
    list_reference_blocks,
    list_sample_blocks,
)
from workers.evaluation.make import KINDS, Bench, DamagedBlock, find_unusable, make, read_block
from workers.noise import make_generator
from workers.seals import seal_parquet
from workers.storage import Storage

few_rows_a_block = pytest.fixture(autouse=True)(small_blocks)


@pytest.fixture
def whole(tmp_path) -> Bench:
    """A bench with all its blocks made, of every kind."""
    b = bench(tmp_path / "whole", measurement(ode_nll=ODENLLConfig(images=6, tolerance=1e-2)))
    make_all(b, blocks_of(b))
    return b


def contents(storage: Storage, wanted: list[Block]) -> dict[str, bytes]:
    return {block.path: storage.read(block.path) for block in wanted}


def features(storage: Storage, block: Block) -> np.ndarray:
    return np.array(read_block(storage, block)["features"].to_pylist())


# ---- What they hold --------------------------------------------------------------------------------------------


def test_the_blocks_hold_each_pair_of_image_and_timestep_once(whole):
    parts = [
        Ledger.from_table(read_block(whole.storage, b))
        for b in list_nll_blocks(whole.m, whole.checkpoint.digest, IMAGES)
    ]
    ledger = Ledger.join(parts)
    assert list(zip(ledger.image, ledger.t, strict=True)) == [(i, t) for i in range(HELD_OUT) for t in range(1, T + 1)]
    assert (ledger.weight == 1).all() and (ledger.squared_error > 0).all() and len(ledger.decoder_nats) == HELD_OUT
    assert [len(part.t) for part in parts] == [40, 40, 12, 40, 40, 12, 20, 20, 6]


def test_no_two_blocks_draw_from_one_address(tmp_path, monkeypatch):
    """Neither timesteps, nor noise, nor samples; nor does another seed."""
    drawn: list[tuple[int | str, ...]] = []

    def recorded(*where: int | str, device: torch.device) -> torch.Generator:
        drawn.append(where)
        return make_generator(*where, device=device)

    monkeypatch.setattr(evaluation, "make_generator", partial(recorded, device=CPU))
    for seed, timesteps in ((0, "all"), (1, "all"), (2, 5)):
        b = bench(tmp_path, measurement(seed=seed, timesteps=timesteps))
        make_all(b, blocks_of(b))
    assert len(drawn) == len(set(drawn)) == (9 + 2) + (9 + 2) + (3 + 3 + 2)


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_sampled_timesteps_are_the_first_and_one_a_stratum(tmp_path, proposal):
    b = bench(tmp_path, measurement(timesteps=5, proposal=proposal))
    wanted = list_nll_blocks(b.m, b.checkpoint.digest, IMAGES)
    make_all(b, wanted)
    ledger = Ledger.join([Ledger.from_table(read_block(b.storage, block)) for block in wanted])
    assert (np.bincount(ledger.image) == 5).all() and ledger.images == HELD_OUT
    assert len(set(ledger.t)) > 8 and ledger.t.max() <= T
    assert np.unique(ledger.weight[ledger.t > 1]).size == 1 if proposal == "uniform" else ledger.weight.max() > 10


@pytest.mark.parametrize("quantise", ["round", "truncate"])
def test_samples_are_quantised_before_their_features_are_taken(tmp_path, quantise):
    b = bench(tmp_path, measurement(quantise=quantise))
    wanted = list_feature_blocks(b.m, b.checkpoint.digest, IMAGES)
    make_all(b, wanted)
    samples, images = [], []
    for block in wanted:
        rows = read_block(b.storage, block.needs[0]).to_pydict()
        pixels = np.stack([np.frombuffer(row, np.uint8) for row in rows["image"]]).reshape(-1, SIDE, SIDE, 1)
        assert pixels.max() < LEVELS and len(pixels) == 10
        np.testing.assert_array_equal(features(b.storage, block), SPACE.compute_features(pixels))
        samples.extend(rows["sample"])
        images.extend(rows["image"])
    assert samples == list(range(20)) and len(set(images)) == 20


def test_both_quantisations_are_of_the_same_samples(tmp_path):
    """Truncated pixels are the rounded ones, or one less."""
    pixels = []
    for quantise in ("round", "truncate"):
        b = bench(tmp_path, measurement(quantise=quantise))
        block = list_sample_blocks(b.m, b.checkpoint.digest, IMAGES)[0]
        make(b, block)
        pixels.append(np.frombuffer(b"".join(read_block(b.storage, block)["image"].to_pylist()), np.uint8).astype(int))
    less = pixels[0] - pixels[1]
    assert set(less) == {0, 1}


@pytest.mark.parametrize("reference", ["train", "held_out"])
def test_the_reference_is_the_split_in_its_order(tmp_path, reference):
    b = bench(tmp_path, measurement(reference=reference))
    wanted = list_reference_blocks(b.m, IMAGES)
    make_all(b, wanted)
    found = np.concatenate([features(b.storage, block) for block in wanted])
    np.testing.assert_allclose(found, SPACE.compute_features(getattr(DATASET, reference)), rtol=1e-12)


# ---- Making them -----------------------------------------------------------------------------------------------


def test_a_block_that_is_there_is_not_made_again(whole, monkeypatch):
    """Nothing is computed, and no byte of what is there is touched."""
    before = contents(whole.storage, blocks_of(whole))
    monkeypatch.setattr("workers.evaluation.make.KINDS", {})
    for block in blocks_of(whole):
        make(whole, block)
    assert contents(whole.storage, blocks_of(whole)) == before


@pytest.mark.parametrize("timesteps", ["all", 5])
def test_order_and_maker_of_the_blocks_change_nothing(tmp_path, timesteps):
    """In reverse, and each by a process of its own as far as objects go: a network loaded anew. Bit for bit."""
    m = measurement(timesteps=timesteps)
    first, second = bench(tmp_path / "a", m), bench(tmp_path / "b", m)
    assert first.checkpoint.digest == second.checkpoint.digest
    make_all(first, blocks_of(first))
    for block in reversed(blocks_of(second)):
        make_all(bench(tmp_path / "b", m), [block])
    assert contents(second.storage, blocks_of(second)) == contents(first.storage, blocks_of(first))
    assert summary_of(second) == summary_of(first)


def test_asking_for_more_later_is_asking_for_it_at_once(tmp_path):
    evaluated(tmp_path / "a", measurement(images=3, samples=5, reference_images=10))
    assert evaluated(tmp_path / "a", measurement()) == evaluated(tmp_path / "b", measurement())


def test_a_missing_block_is_an_error(whole):
    block = blocks_of(whole)[4]
    whole.storage.delete(block.path)
    for read in (lambda: read_block(whole.storage, block), lambda: summary_of(whole)):
        with pytest.raises(FileNotFoundError):
            read()


def test_features_whose_samples_are_gone_make_them_and_say_so(tmp_path):
    b = bench(tmp_path, measurement())
    features = list_feature_blocks(b.m, b.checkpoint.digest, IMAGES)[0]
    [(samples, why)] = make(b, features).items()
    assert samples in features.needs and "is not there" in why and b.storage.exists(features.path)


def test_a_bench_takes_only_what_its_blocks_need(tmp_path):
    """Real images' features take no model: a checkpoint whose files are gone is no hindrance."""
    b = bench(tmp_path, measurement())
    b.storage.delete(b.checkpoint.path)
    make_all(Bench(b.storage, b.m, DATASET, b.checkpoint, CPU), list_reference_blocks(b.m, IMAGES))


# ---- Damage ----------------------------------------------------------------------------------------------------


def one_of_each(b: Bench) -> list[Block]:
    return list({block.kind: block for block in blocks_of(b)}.values())


def test_any_damage_to_a_block_is_noticed(whole):
    """A changed bit at many places, the whole of both ends among them; a file cut off, or with more at its end."""
    assert {block.kind for block in one_of_each(whole)} == KINDS.keys() - {"latents"}  # of a first stage
    for block in one_of_each(whole):
        content = whole.storage.read(block.path)
        places = {*range(0, len(content), 17), *range(8), *range(len(content) - 12, len(content))}
        damaged = [
            content[:k] + bytes([content[k] ^ mask]) + content[k + 1 :] for k in places for mask in (1, 128, 255)
        ]
        damaged += [content[:k] for k in (0, 1, 7, 8, 40, len(content) // 2, len(content) - 1)]
        damaged += [content + b"\0", content + content, bytes(len(content))]
        file = Path(whole.storage.find_url(block.path))
        for k, bad in enumerate(damaged):
            file.write_bytes(bad)
            with pytest.raises(DamagedBlock, match=block.name):
                read_block(whole.storage, block)
                pytest.fail(f"{block.kind}: damage {k} was not noticed")
        file.write_bytes(content)
        assert read_block(whole.storage, block).num_rows > 0


def test_any_reader_of_parquet_opens_a_block(whole):
    for block in one_of_each(whole):
        frame = pd.read_parquet(io.BytesIO(whole.storage.read(block.path)))
        assert frame.columns.tolist() == read_block(whole.storage, block).column_names and len(frame) > 0


def test_a_seal_is_32_bytes_and_leaves_the_file_s_ends_as_they_are(whole):
    content = whole.storage.read(blocks_of(whole)[0].path)
    assert content[:4] == content[-4:] == b"PAR1"
    again = seal_parquet(content, "a")
    assert len(again) == len(content) + 32 and (again[:4], again[-8:]) == (content[:4], content[-8:])


def test_what_is_damaged_or_missing_is_listed_and_can_be_made_again(whole):
    wanted = blocks_of(whole)
    before, summary = contents(whole.storage, wanted), summary_of(whole)
    assert find_unusable(whole.storage, wanted, whole.space) == {}
    missing, *damaged = wanted[2], wanted[5], wanted[10], wanted[-1]
    for block in damaged:
        content = before[block.path]
        whole.storage.write(block.path, content[:100] + b"\0" + content[101:-1])
    with pytest.raises(DamagedBlock):
        summary_of(whole)
    whole.storage.delete(missing.path)
    found = find_unusable(whole.storage, wanted, whole.space)
    assert list(found) == [missing, *damaged] and all(block.path in why for block, why in found.items())
    assert [("is not there" in why, "is damaged" in why) for why in found.values()] == [
        (True, False),
        *[(False, True)] * 3,
    ]
    assert not any(whole.storage.exists(block.path) for block in damaged)
    make_all(whole, wanted)
    assert contents(whole.storage, wanted) == before and summary_of(whole) == summary


def test_features_of_another_space_are_no_use_and_are_removed(whole):
    wanted = blocks_of(whole)
    featurised = [block for block in wanted if block.kind in ("features", "reference")]

    other = replace(whole.space, bias=whole.space.bias + 1)
    assert other.digest != whole.space.digest
    assert featurised and list(find_unusable(whole.storage, wanted, other)) == featurised


def test_damaged_samples_are_made_again_where_their_features_are_asked_for(whole):
    features = next(block for block in blocks_of(whole) if block.kind == "features")
    [samples] = features.needs
    before = contents(whole.storage, [samples, features])
    whole.storage.write(samples.path, before[samples.path][:-1] + b"\0")
    whole.storage.delete(features.path)
    [(block, why)] = make(whole, features).items()
    assert block == samples and "is damaged" in why
    assert contents(whole.storage, [samples, features]) == before
