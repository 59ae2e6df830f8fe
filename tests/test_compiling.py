"""A compiled network: the numbers of one that is not, in one graph; its parts; and what is told where it can't be."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from orchestrator.execution.session import check_compiler
from orchestrator.output.speed_table import describe_uncompiled
from workers import compiling
from workers.compiling import HEAVY, CannotCompile, compile_network, must_compile
from workers.config import Mistake, ModelConfig, TrainingConfig, Trial
from workers.data.dataset import Dataset, prepare
from workers.journal import read_points
from workers.learner import Learner
from workers.network import manifest
from workers.network.attention import GroupNorm
from workers.network.build import Masks, hand_noise
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.storage import Storage
from workers.training import train
from workers.world import World

TRIAL = Trial.model_validate(
    {
        "data": {"source": "digits"},
        "model": {"channels": 8, "multipliers": [1], "blocks": 1, "attention": [], "dropout": 0.2},
        "diffusion": {"T": 50, "schedule": {"scale": "per_1000"}},
        "training": {
            "steps": 4, "batch_size": 16, "lr": 2e-3, "ema": 0.9, "precision": "float32", "compile": "always",
            "validate_every": 4, "checkpoint_every": 2,
        },
    }
)  # fmt: skip
FAST = "aot_eager_decomp_partition"  # the graphs that the compiler gets, without the minutes that its code takes


@pytest.fixture(autouse=True)
def as_without_tests() -> Iterator[None]:
    """One thread, and no checks of shapes, which are there in tests alone and are no code that a compiler reads."""
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def changed(**training: Any) -> Trial:
    return TRIAL.model_copy(update={"training": TRIAL.training.model_copy(update=training)})


def trained(trial: Trial, folder: Path) -> tuple[Storage, str]:
    """Trains to the end; gives the storage and the digest of the last checkpoint."""
    storage = Storage(folder)
    states = [progress.state for progress in train(trial, prepare(trial.data), storage, "t")]
    assert states[-1] == "finished"
    newest = manifest.find_newest(storage, "t/checkpoints")
    assert newest
    return storage, newest.digest


def losses(learner: Learner, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        learner.train_step()
        found.append(float(learner.sums[0]))
    return found


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return prepare(TRIAL.data)


# ---- What is compiled ----------------------------------------------------------------------------------------------


def check_steps(trial: Trial, digits: Dataset, steps: int, tolerance: float) -> None:
    """The losses and the weights of some steps are those without compiling, up to rounding."""
    never = trial.model_copy(update={"training": trial.training.model_copy(update={"compile": "never"})})
    eager, compiled = Learner(never, digits, World()), Learner(trial, digits, World())
    assert losses(compiled, steps) == pytest.approx(losses(eager, steps), rel=tolerance)
    assert not compiled.uncompiled and compiled.network is not compiled.module and eager.network is eager.module
    for weights, expected in zip(compiled.raw, eager.raw, strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=20 * tolerance)


def test_a_compiled_step_is_the_step_up_to_rounding(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same masks of dropout, drawn beforehand; and the network is traced once, for all steps."""
    monkeypatch.setattr(compiling, "BACKEND", FAST)
    torch._dynamo.utils.counters.clear()
    check_steps(TRIAL, digits, 4, 2e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.faults  # minutes of a C++ compiler
def test_the_compiler_s_code_computes_it_too_in_fewer_pieces(digits: Dataset) -> None:
    import torch._inductor.metrics as metrics

    metrics.reset()
    model = TRIAL.model.model_copy(update={"multipliers": (1, 2), "attention": (4,)})
    check_steps(TRIAL.model_copy(update={"model": model}), digits, 3, 2e-5)
    assert 0 < metrics.generated_kernel_count < 0.7 * metrics.ir_nodes_pre_fusion


def test_a_compiled_trial_ends_in_the_same_bits_when_it_is_cut_off_or_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", FAST)
    whole, expected = trained(TRIAL, tmp_path / "whole")
    status = whole.read_sealed("t/status.json")
    assert status and status["seconds"]["compiling"] > 0 and "uncompiled" not in status
    assert status["spent"]["compiling"][0] == 1
    trained(changed(steps=2), tmp_path / "parts")
    assert trained(TRIAL, tmp_path / "parts")[1] == expected
    assert read_points(whole, "t")


def test_the_next_trial_of_a_shape_is_not_compiled_again(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", FAST)
    losses(Learner(changed(lr=1e-3), digits, World()), 1)
    torch._dynamo.utils.counters.clear()
    losses(Learner(TRIAL, digits, World()), 2)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses(Learner(changed(batch_size=8), digits, World()), 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    compiling.BACKEND = FAST
    store = FileStore(f"{folder}/store", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    trial = changed(workers=size, steps=2, validate_every=2)
    learner = Learner(trial, prepare(trial.data), World(rank, size))
    found = losses(learner, 2)
    if rank == 0:
        torch.save([found, learner.uncompiled, *learner.raw], f"{folder}/weights")
    torch.distributed.destroy_process_group()


@pytest.mark.faults  # half a minute of two processes that compile
def test_workers_that_compile_train_as_one_that_does_not(tmp_path: Path, digits: Dataset) -> None:
    spawn(_worker, (2, str(tmp_path)), nprocs=2)
    _, uncompiled, *weights = torch.load(tmp_path / "weights")
    eager = Learner(changed(compile="never"), digits, World())
    losses(eager, 2)
    assert not uncompiled
    for found, expected in zip(weights, eager.raw, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-5)


# ---- Its parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_by_reductions_is_group_norm(dtype: torch.dtype) -> None:
    """And it keeps the images in the order of channels_last, which the convolutions around it want."""
    draw = make_generator("norm")
    norm = GroupNorm(4, 12, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12, generator=draw))
        norm.bias.copy_(torch.randn(12, generator=draw))
    x = (3 + torch.randn(5, 12, 6, 4, generator=draw)).to(dtype).contiguous(memory_format=torch.channels_last)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        norm.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        y = function(given)
        assert y.dtype == dtype
        (y.float() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        gradients = (given.grad, norm.weight.grad, norm.bias.grad)
        return [y.detach().float(), *(gradient.float() for gradient in gradients if gradient is not None)]

    found, expected = run(norm.reduce), run(norm)
    assert norm.reduce(x).is_contiguous(memory_format=torch.channels_last)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_masks_drawn_at_once_are_those_drawn_layer_by_layer() -> None:
    config = make_unet_config(TRIAL.model, image_channels=1, resolution=8)
    network = UNet(config, make_generator(0)).train()
    with torch.no_grad():
        for weights in network.parameters():  # some are zero at the start, behind which no mask shows
            weights.add_(0.1)
    x, t = torch.randn(4, 1, 8, 8, generator=make_generator("x")), torch.arange(4)

    def draws() -> list[torch.Generator]:
        return [make_generator("masks", part) for part in range(2)]

    def call() -> torch.Tensor:
        y: torch.Tensor = network(x, t)
        return y

    hand_noise(network, draws())
    expected = call()
    hand_noise(network, draws())
    masks = Masks.of(network, call, 2)
    assert masks and len(masks.dropouts) == 5
    masks.hand(draws(), x.device)
    assert torch.equal(call(), expected)
    hand_noise(network, [make_generator("others", part) for part in range(2)])
    assert not torch.equal(call(), expected)


def test_a_dropout_that_is_called_twice_has_no_place_for_its_masks() -> None:
    config = make_unet_config(TRIAL.model, image_channels=1, resolution=8)
    network = UNet(config, make_generator(0)).train()
    hand_noise(network, [make_generator(0)])
    x, t = torch.zeros(2, 1, 8, 8), torch.arange(2)
    assert Masks.of(network, lambda: [network(x, t), network(x, t)], 1) is None


# ---- Whether, and what is told where it can't be ---------------------------------------------------------------------


def test_auto_compiles_large_steps_on_a_gpu_alone() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    auto, always, never = (changed(compile=how) for how in ("auto", "always", "never"))

    def count(trial: Trial, device: torch.device, operations: float) -> bool:
        return must_compile(trial, device, lambda: int(operations))

    assert count(auto, cuda, HEAVY) and not count(auto, cuda, HEAVY - 1) and not count(auto, cpu, 10 * HEAVY)
    assert count(always, cpu, 1) and count(always, cuda, 1)
    assert not count(never, cuda, 10 * HEAVY)


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def test_always_fails_where_no_compiler_is_and_says_what_to_do(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_compiler(monkeypatch, tmp_path)
    with pytest.raises(
        CannotCompile, match=r"training\.compile: always, but .* install g\+\+.* set it to auto or never"
    ):
        Learner(TRIAL, digits, World()).train_step()


def test_a_sweep_of_this_machine_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_compiler([changed(compile="always").training])
    without_compiler(monkeypatch, tmp_path)
    check_compiler([changed(compile=how).training for how in ("auto", "never")])
    with pytest.raises(
        Mistake, match=r"training\.compile: always, but there is no compiler .* set it to auto or never"
    ):
        check_compiler([changed(compile=how).training for how in ("auto", "always")])


def test_auto_goes_on_without_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same bits as a trial that is never compiled."""
    without_compiler(monkeypatch, tmp_path)
    monkeypatch.setattr("workers.learner.must_compile", lambda *_: True)
    storage, digest = trained(changed(compile="auto"), tmp_path / "auto")
    status = storage.read_sealed("t/status.json")
    assert status and "no compiler of C++" in status["uncompiled"]
    rows = [SimpleNamespace(digest=f"{trial:016x}", found=SimpleNamespace(status=status)) for trial in range(2)]
    [line] = describe_uncompiled(rows)  # type: ignore[arg-type]
    assert line.startswith("2 trials trained without torch.compile: there is no compiler of C++")
    monkeypatch.undo()
    assert trained(changed(compile="never"), tmp_path / "never")[1] == digest


class Branching(nn.Module):
    """Chooses by a value of its output, which no single graph can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        y: torch.Tensor = self.last(h * 2 if h.sum() > 0 else h)
        return y


@pytest.mark.parametrize("foreign", [True, False])
def test_a_network_of_one_s_own_need_not_be_one_graph(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", FAST)
    monkeypatch.setattr("workers.learner.is_foreign", lambda config: foreign)
    learner = Learner(changed(batch_size=8 if foreign else 24), digits, World())
    network = learner.module = Branching(4)
    learner.optimizer = torch.optim.Adam(network.parameters())
    learner.raw = list(network.state_dict().values())
    learner.ema = {name: weights.clone() for name, weights in network.state_dict().items()}
    if foreign:
        assert all(loss > 0 for loss in losses(learner, 2)) and not learner.uncompiled
    else:
        with pytest.raises(CannotCompile, match=r"torch\.compile fails"):
            learner.train_step()


def test_what_is_asked_counts_in_the_id_and_in_the_speed() -> None:
    from workers.identity import compute_trial_id
    from workers.speed import make_model_key

    ids = {compute_trial_id(changed(compile=how), "data") for how in ("auto", "always", "never")}
    keys = {make_model_key(ModelConfig(), changed(compile=how).training, (8, 8, 1)) for how in ("auto", "always")}
    assert len(ids) == 3 and len(keys) == 2
    assert TrainingConfig(steps=1).compile == "auto"


@pytest.mark.parametrize("own", ["", "/somewhere/else"])
def test_processes_share_what_is_compiled_by_our_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str
) -> None:
    """Unless the user has named another folder."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setenv(compiling.CACHE, own or default_cache_dir())
    compile_network(nn.Linear(1, 1), torch.device("cpu"), "another shape", whole=True)
    assert os.environ[compiling.CACHE] == (own or f"{tmp_path}/compiled")
