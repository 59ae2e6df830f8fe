"""Averages of the weights of any width, made after the training: their formulas, and that nothing of it is lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_files import digests, experiment, problems, search

from orchestrator.experiment.dry_run import format_dry_run
from orchestrator.experiment.effort import count_costs
from orchestrator.experiment.expand import expand
from orchestrator.experiment.measured_weights import describe_average
from orchestrator.experiment.preflight import check_trial
from orchestrator.measuring import subjects
from orchestrator.state.saved import keep_trial
from workers.config import Trial
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.identity import compute_trial_id
from workers.learner import Learner
from workers.network import averages, manifest
from workers.network import checkpoint as checkpoints
from workers.network.manifest import Checkpoint, CheckpointError, choose_width
from workers.posthoc import (
    PosthocConfig,
    Profile,
    combine,
    compute_decay,
    compute_gamma,
    compute_products,
    compute_width,
)
from workers.storage import Storage
from workers.training import train
from workers.warm_start import TRUNK
from workers.world import World

SMALL = {
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}},
    "training": {
        "steps": 24, "batch_size": 32, "lr": 2e-3, "ema": 0.9, "precision": "float32", "validate_every": 24,
        "checkpoint_every": 5, "posthoc": {"every": 3, "widths": [0.06, 0.2]},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def measure_profile(profile: Profile, points: int = 400_000) -> tuple[np.ndarray, np.ndarray]:
    """tau and p(tau), at the middles of even intervals of 0..step."""
    tau = (np.arange(points) + 0.5) * profile.step / points
    gamma = compute_gamma(profile.width)
    return tau, (gamma + 1) / profile.step * (tau / profile.step) ** gamma


# ---- The formulas


@pytest.mark.parametrize("width", [0.005, 0.03, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_the_standard_deviation_of_the_profile(width: float) -> None:
    tau, p = measure_profile(Profile(7, width))
    mean = (tau * p).mean() * 7
    assert p.mean() * 7 == pytest.approx(1, rel=1e-4)
    assert np.sqrt(((tau - mean) ** 2 * p).mean() * 7) / 7 == pytest.approx(width, rel=1e-4)
    assert compute_width(compute_gamma(width)) == pytest.approx(width, rel=1e-9)


def test_the_known_exponents() -> None:
    """Those of Karras et al. 2024, section 3.1: widths of 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert compute_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert compute_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert compute_width(0) == pytest.approx(12**-0.5)


def test_products_are_integrals_of_profiles() -> None:
    profiles = [Profile(4, 0.05), Profile(10, 0.1), Profile(10, 0.05), Profile(7, 0.25)]
    products = compute_products(profiles, profiles)
    for i, one in enumerate(profiles):
        for j, other in enumerate(profiles):
            last = min(one.step, other.step)
            tau = (np.arange(400_000) + 0.5) * last / 400_000
            p, q = ((g + 1) / f.step * (tau / f.step) ** g for f in (one, other) for g in [compute_gamma(f.width)])
            assert products[i, j] == pytest.approx((p * q).mean() * last, rel=1e-6)


def test_what_the_recursion_weighs_is_the_profile_over_a_step() -> None:
    """The weight of theta(tau) after t steps is (tau^(gamma+1) - (tau-1)^(gamma+1)) / t^(gamma+1)."""
    gamma, steps = compute_gamma(0.1), 12
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = compute_decay(gamma, step)
        weights *= decay
        weights[step - 1] += 1 - decay
    ends = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert weights == pytest.approx(np.diff(ends), rel=1e-9) and weights.sum() == pytest.approx(1)


# ---- Combinations


def test_a_kept_average_is_made_of_itself_alone() -> None:
    kept = PosthocConfig(every=30).list_profiles(400)
    for place in (0, 5, len(kept) - 1):
        made = combine(kept, kept[place])
        assert made.coefficients == pytest.approx(np.eye(len(kept))[place], abs=1e-6) and made.error < 1e-6


@pytest.mark.parametrize("width", [0.01, 0.07, 0.15, 0.25])
def test_coefficients_add_up_to_one_and_the_error_is_that_of_the_profile(width: float) -> None:
    """So weights that do not change stay as they are, however little was kept."""
    kept, wanted = PosthocConfig(every=25).list_profiles(100), Profile(100, width)
    made = combine(kept, wanted)
    assert sum(made.coefficients) == pytest.approx(1, abs=1e-9)
    tau, p = measure_profile(wanted)
    q = np.zeros_like(p)
    for x, profile in zip(made.coefficients, kept, strict=True):
        gamma = compute_gamma(profile.width)
        q += x * np.where(tau < profile.step, (gamma + 1) / profile.step * (tau / profile.step) ** gamma, 0)
    assert made.error == pytest.approx(np.sqrt(((p - q) ** 2).mean() / (p**2).mean()), rel=1e-3)


def test_the_more_is_kept_the_nearer_is_what_is_made() -> None:
    errors = [
        combine(PosthocConfig(every=every).list_profiles(480), Profile(480, 0.075)).error for every in (120, 60, 30)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


# ---- Training


def run(
    storage: Storage, trial: Trial, folder: str = "trials/a", stop_after: int | None = None, **more: Any
) -> Checkpoint:
    """Trains until its end, or until so many progresses were told; the newest checkpoint."""
    loop: Any = train(trial, prepare(trial.data), storage, folder, **more)
    for count, _ in enumerate(loop, 1):
        if count == stop_after:
            loop.close()
            break
    found = manifest.find_newest(storage, f"{folder}/checkpoints")
    assert found
    return found


def small(**training: Any) -> Trial:
    return experiment(**{**SMALL, "training": {**SMALL["training"], **training}}).trial  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a training of three widths."""
    torch.set_num_threads(1)
    trial = small(posthoc={"every": 3, "widths": [0.06, 0.1, 0.2]}, averages=[0.1])  # a decay that is a width, too
    return run(Storage(tmp_path_factory.mktemp("whole")), trial)


def read(checkpoint: Checkpoint, width: float) -> dict[str, torch.Tensor]:
    return averages.load_widths(checkpoint, [width])[width]


def test_averages_are_those_of_the_weights_of_each_step() -> None:
    trial = small(steps=5)
    learner = Learner(trial, prepare(trial.data), World())
    seen = []
    for _ in range(5):
        learner.train_step()
        seen.append({name: w.clone().double() for name, w in learner.module.state_dict().items()})
    for width, weights in learner.widths.items():
        share = np.diff((np.arange(6) / 5) ** (compute_gamma(width) + 1))
        for name, tensor in weights.items():
            expected = sum(float(x) * each[name] for x, each in zip(share, seen, strict=True))
            assert torch.allclose(tensor.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-7)


def test_an_average_that_is_made_equals_the_stored_one(whole: Checkpoint) -> None:
    """One of the widths that are kept bit for bit where it is chosen, and up to rounding where it is combined."""
    for width in (0.06, 0.1, 0.2):
        stored, made = read(whole, width), averages.make_average(whole, width)
        model, _ = checkpoints.load(choose_width(whole, width))
        for name, tensor in model.network.state_dict().items():
            assert torch.equal(tensor, stored[name])
            assert torch.allclose(made[name], stored[name], rtol=1e-5, atol=1e-6)


def test_a_width_between_comes_near_to_the_one_that_was_stored(whole: Checkpoint) -> None:
    """0.1 made of 0.06 and 0.2: its error is a small part of what lies between the widths, and so is it told."""
    found = averages.measure_error(whole, 0.11)
    assert (found["stored_width"], found["other_width"], found["times_kept"]) == (0.1, 0.06, 8)
    assert 0 < found["stored_error"] < 0.1 * found["other_apart"]
    without = replace(whole, sums=tuple((name, sha) for name, sha in whole.sums if name != "widths/0.1.safetensors"))
    made, stored = averages.make_average(without, 0.1), read(whole, 0.1)
    assert describe_average(found).startswith("0.11, made of averages that were kept 8 times: its profile is off by ")
    apart = sum(float((made[name] - w).double().square().sum()) for name, w in stored.items())
    length = sum(float(w.double().square().sum()) for w in stored.values())
    assert found["stored_error"] == pytest.approx((apart / length) ** 0.5, rel=1e-6)


def test_a_training_that_was_cut_off_keeps_the_same(tmp_path: Path, whole: Checkpoint) -> None:
    """After a step that no checkpoint is of; what was kept beyond the last checkpoint is made again."""
    trial = small(posthoc={"every": 3, "widths": [0.06, 0.1, 0.2]}, averages=[0.1], validate_every=14)
    storage = Storage(tmp_path)
    cut = run(storage, trial, stop_after=2)
    assert cut.step == 10 and [manifest.get_step_of_kept(path) for path, _ in cut.posthoc] == [3, 6, 9]
    assert len(storage.list("trials/a/posthoc")) == 4
    again = run(storage, trial)
    assert again.posthoc == whole.posthoc and dict(again.sums).keys() == dict(whole.sums).keys()
    for width in (0.06, 0.15, 0.2):
        assert choose_width(again, width).digest == choose_width(whole, width).digest
    assert sorted(storage.list("trials/a/posthoc")) == [path.rpartition("/")[2] for path, _ in whole.posthoc]


def test_a_width_is_a_model_of_its_own(whole: Checkpoint, tmp_path: Path) -> None:
    """With its own digest, weights and folder for diffusers; the checkpoint itself is what it is without."""
    made = choose_width(whole, 0.08)
    plain = run(Storage(tmp_path / "plain"), small(posthoc=None))
    assert plain.digest == whole.digest != made.digest != choose_width(whole, 0.09).digest
    assert not plain.posthoc and b"posthoc" not in Storage(plain.root).read(f"{plain.path}/manifest.json")
    model, _ = checkpoints.load(made)
    expected = averages.make_average(whole, 0.08)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())
    checkpoints.export(made, tmp_path / "exported")
    exported, _ = checkpoints.load(checkpoints.open_folder(tmp_path / "exported"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.network.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no averages that evaluation\.ema_width = 0\.08 could be made of"):
        choose_width(plain, 0.08)


def test_any_width_of_a_trial_is_measured_by_its_id_or_its_folder(tmp_path: Path) -> None:
    """With a warning where too little was kept for it."""
    storage, trial = Storage(tmp_path), small(steps=12)
    checkpoint = run(storage, trial, "trials/abcdef")
    keep_trial(storage, "abcdef", trial)
    for target in (storage.find_url("trials/abcdef"), storage.find_url(checkpoint.path)):
        [subject] = subjects.find(target, storage, ["evaluation.ema_width=0.1"], None)
        assert subject.checkpoint.width == 0.1 and subject.checkpoint.root == storage.root
        assert subject.checkpoint.digest == choose_width(checkpoint, 0.1).digest
        checkpoints.load(subject.checkpoint)
        assert not subjects.check([subject])[1]
    [subject] = subjects.find(storage.find_url("trials/abcdef"), storage, ["evaluation.ema_width=0.005"], None)
    [warning] = subjects.check([subject])[1]
    assert warning.startswith(
        "evaluation.ema_width: 0.005 after 12 steps can't be made well of averages of widths 0.06, 0.2"
    )


def test_a_branch_has_the_averages_of_the_whole_training(tmp_path: Path) -> None:
    storage, branch = Storage(tmp_path), small(cooldown=6)
    alone = run(storage, branch, "trials/alone")
    trunk = run(storage, small(steps=18), "trials/trunk")
    made = run(storage, branch, "trials/branch", starts={TRUNK: trunk.path})
    assert [sha for _, sha in made.posthoc] == [sha for _, sha in alone.posthoc]
    assert [path.split("/")[1] for path, _ in made.posthoc] == ["trunk"] * 6 + ["branch"] * 2
    one, other = (averages.make_average(each, 0.12) for each in (alone, made))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("damage", "match"), [("flipped", "is damaged: its sha256 differs"), ("gone", "is missing")])
def test_damage_to_what_was_kept_is_told(tmp_path: Path, damage: str, match: str) -> None:
    checkpoint = run(Storage(tmp_path), small(steps=6))
    path, _ = checkpoint.posthoc[0]
    content = bytearray((tmp_path / path).read_bytes())
    content[-1] ^= 1
    (tmp_path / path).write_bytes(content) if damage == "flipped" else (tmp_path / path).unlink()
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(choose_width(checkpoint, 0.1))
    checkpoints.load(checkpoint)  # the trial's own average is whole


@pytest.mark.parametrize(
    "path", ["trials/../posthoc/step-00000003-0123456789abcdef.safetensors", "/etc/passwd", "trials/a/posthoc/x", ""]
)
def test_a_manifest_names_what_was_kept_and_no_other_files(tmp_path: Path, path: str) -> None:
    storage = Storage(tmp_path)
    checkpoint = run(storage, small(steps=6))
    sums = dict(checkpoint.sums)
    manifest.write_manifest(storage, checkpoint.path, 6, sums, False, posthoc={path: "0" * 64})
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manifest.open_committed(storage, checkpoint.path)


# ---- The file


def test_what_is_kept_is_in_the_id_and_nothing_is_by_default() -> None:
    plain, kept, more = (compute_trial_id(small(posthoc=p), "d") for p in (None, {"every": 3}, {"every": 6}))
    assert len({plain, kept, more}) == 3
    assert plain == compute_trial_id(small(posthoc=None, averages=[]), "d")


def test_widths_are_rows_of_one_trial() -> None:
    e = experiment(
        training={"steps": 100, "posthoc": {"every": 5}},
        search=search({"evaluation.ema_width": {"grid": [None, 0.05, 0.08]}}),
    )
    rows, warnings = digests(expand(e))
    assert len(rows) == 3 and not warnings and len({row.partition("-")[0] for row in rows}) == 1
    costs = count_costs(rows, {e.data: describe(e.data)})
    assert all(cost.nll_evaluations and cost.sampling_evaluations for cost in costs)
    assert [cost.training_evaluations > 0 for cost in costs] == [True, False, False]
    assert "keeps as much as 40 networks of a trial" in format_dry_run(rows, {e.data: describe(e.data)})


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"evaluation": {"ema_width": 0.08}},
            "training.posthoc keeps, and that is null; set training.posthoc: {every: 1}",
        ),
        (
            {"evaluation": {"ema_width": 0.08, "ema": 0.9999}, "training": {"posthoc": {"every": 5}}},
            "evaluation.ema_width: 0.08 and evaluation.ema: 0.9999 are two averages",
        ),
        ({"training": {"steps": 10_000, "posthoc": {"every": 2}}}, "keeps averages 5,000 times"),
        ({"training": {"posthoc": {"every": 2, "widths": [0.1, 0.11]}}}, "has widths that say nearly the same"),
        ({"training": {"posthoc": {"every": 2, "widths": [0.1]}}}, "training.posthoc.widths"),
        ({"evaluation": {"ema_width": 0.4}, "training": {"posthoc": {"every": 2}}}, "evaluation.ema_width: 0.4"),
    ],
)
def test_what_does_not_go_together_is_told(sections: dict[str, Any], expected: str) -> None:
    assert any(expected in text for text in problems(**sections)), problems(**sections)


def test_a_width_for_which_too_little_is_kept_is_warned_of() -> None:
    def warn(width: float) -> list[str]:
        e = experiment(training={"steps": 500, "posthoc": {"every": 50}}, evaluation={"ema_width": width})
        return [f.text for f in check_trial(e, e.trial, describe(e.data)) if "ema_width" in f.text]

    assert warn(0.07) == []
    [text] = warn(0.01)
    assert "kept 10 times: its profile is off by 48% of itself; keep them more often" in text
