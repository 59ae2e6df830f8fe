"""Checkpoints commit by their manifest, tell damage, and open in diffusers."""

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sent

from workers.config import DiffusionConfig, ModelConfig, SamplerConfig, ScheduleConfig
from workers.diffusion.predictions import interpret
from workers.diffusion.process import FIXED, Process
from workers.diffusion.samplers import ancestral
from workers.evaluation.canaries import DENOISER, GAUSSIAN
from workers.kinds import PREDICTIONS, VARIANCES
from workers.network.checkpoint import Snapshot, describe, load, load_state, open_folder, save
from workers.network.manifest import Checkpoint, CheckpointError, find_newest, load_journal
from workers.network.unet import UNet
from workers.network.unet_config import make_unet_config
from workers.noise import make_generator
from workers.storage import Storage

FOLDER = "trials/a/checkpoints"
CONFIG = make_unet_config(
    ModelConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1), image_channels=1, resolution=8
)
FILES = [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "state/training.safetensors",
    "state/progress.json",
    "state/journal.jsonl",
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path)


def process(variance: Any = "fixed_small", kind: Any = "linear") -> Process:
    return Process.of(DiffusionConfig(T=50, schedule=ScheduleConfig(kind=kind), variance=variance))


def network(seed: int = 0) -> UNet:
    unet = UNet(CONFIG, make_generator("unet", seed)).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=make_generator("conv_out", seed))
    return unet


def saved(storage: Storage, step: int = 10, **changes: Any) -> Checkpoint:
    what = {
        "unet_config": CONFIG,
        "process": process(),
        "ema": network().state_dict(),
        "state": {"weights.a": torch.arange(3.0), "step.a": torch.tensor(7.0)},
        "progress": {"train_seconds": 1.5},
        "journal": b'{"lines": 0, "seal": "e3b0c44298fc1c14"}\n',
    }
    return save(storage, FOLDER, Snapshot(step=step, **{**what, **changes}))


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn((3, 1, 8, 8), generator=make_generator("images")), torch.tensor([0, 20, 49])


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_what_is_saved_is_loaded(storage, variance, kind):
    """The network's output, the betas in float64 and the training state, all bit for bit."""
    checkpoint = saved(storage, process=process(variance, kind))
    assert find_newest(storage, FOLDER) == checkpoint and checkpoint.step == 10
    unet, read = load(checkpoint)
    assert not unet.training
    with torch.no_grad():
        x, t = images()
        assert torch.equal(unet(x, t + 1).eps, network()(x, t))
    assert torch.equal(read.beta, process(variance, kind).beta) and read.variance == variance
    ema, state, progress = load_state(checkpoint)
    assert ema.keys() == network().state_dict().keys()
    assert torch.equal(state["weights.a"], torch.arange(3.0)) and state["step.a"].shape == ()
    assert progress == {"train_seconds": 1.5, "step": 10}


@pytest.mark.parametrize("variance", FIXED)
def test_diffusers_opens_it_as_a_pipeline(storage, variance):
    diffusers = pytest.importorskip("diffusers")
    checkpoint = saved(storage, process=process(variance))
    pipeline = diffusers.DDPMPipeline.from_pretrained(storage.find_url(checkpoint.path))
    x, t = images()
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t).sample, network()(x, t), rtol=1e-4, atol=1e-5)
    p, scheduler = process(variance), pipeline.scheduler
    torch.testing.assert_close(scheduler.betas.double(), p.beta, rtol=1e-6, atol=0)
    assert scheduler.config.num_train_timesteps == p.T and scheduler.config.clip_sample
    scheduler.set_timesteps(p.T)
    found = [float(scheduler._get_variance(t - 1)) for t in range(2, p.T + 1)]
    assert found == pytest.approx(p.sigma_squared[1:].tolist(), rel=1e-2)  # theirs is 1 - alpha_bar in float32
    image = pipeline(batch_size=1, num_inference_steps=p.T, output_type="np").images
    assert image.shape == (1, 8, 8, 1)


def learner(seed: int = 0) -> UNet:
    """A network with a second head, whose weights are not 0."""
    unet = UNet({**CONFIG, "out_channels": 2}, make_generator("unet", seed)).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1, generator=make_generator("conv_out", seed))
    return unet


def of_kind(storage: Storage, prediction: str, variance: str) -> Checkpoint:
    unet = learner() if VARIANCES[variance].learned else network()
    kind: dict[str, Any] = {"process": process(variance), "prediction": prediction, "unet_config": unet.config}
    return saved(storage, ema=unet.state_dict(), **kind)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_and_variance_are_part_of_it(storage, prediction, variance):
    """Loaded, the model says what its network means: x_0, eps and sigma."""
    checkpoint = of_kind(storage, prediction, variance)
    model, read = load(checkpoint)
    x, t = images()
    with torch.no_grad():
        output = (learner() if VARIANCES[variance].learned else network())(x, t)
        predicted, expected = model(x, t + 1), interpret(process(variance), prediction, x, t + 1, output)
    assert torch.equal(predicted.x_0, expected.x_0) and torch.equal(predicted.eps, expected.eps)
    assert torch.equal(read.sigma(predicted, t + 1), process(variance).sigma(expected, t + 1))
    found = describe(checkpoint)
    assert (found.prediction, found.variance, found.shape) == (prediction, variance, (8, 8, 1))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_a_step_of_diffusers_is_ours(storage, prediction, variance):
    """DDPMScheduler's step by the network's output, from the same x_t and with the same noise."""
    diffusers = pytest.importorskip("diffusers")
    checkpoint = of_kind(storage, prediction, variance)
    pipeline = diffusers.DDPMPipeline.from_pretrained(storage.find_url(checkpoint.path))
    model, p = load(checkpoint)
    assert isinstance(p, Process)
    pipeline.scheduler.set_timesteps(p.T)
    # In diffusers 1 - alpha_bar_t is a difference in float32, which at small t has few digits left.
    pipeline.scheduler.alphas_cumprod = p.alpha_bar.clone()
    x = torch.randn((3, 1, 8, 8), generator=make_generator("x_t"))
    for time in (1, 2, 25, 50):
        t = torch.full((3,), time)
        with torch.no_grad():
            predicted, output = model(x, t), pipeline.unet(x, time - 1).sample
        theirs = pipeline.scheduler.step(output, time - 1, x, generator=make_generator("z")).prev_sample
        predicted = replace(predicted, x_0=predicted.x_0.clamp(-1, 1))
        ours = ancestral(p, SamplerConfig(), x, predicted, t, generator=make_generator("z"))
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    image = pipeline(batch_size=1, num_inference_steps=p.T, output_type="np").images
    assert image.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(("prediction", "variance"), [("mu", "fixed_small"), ("eps", "learned")])
def test_what_diffusers_cannot_sample_it_refuses_to(storage, prediction, variance):
    """It opens the folder and fails at a step, instead of sampling from another model."""
    diffusers = pytest.importorskip("diffusers")
    checkpoint = of_kind(storage, prediction, variance)
    pipeline = diffusers.DDPMPipeline.from_pretrained(storage.find_url(checkpoint.path))
    with pytest.raises((ValueError, RuntimeError)):
        pipeline(batch_size=1, num_inference_steps=50, output_type="np")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_is_told_with_the_file_s_name(storage, name, damage):
    checkpoint = saved(storage)
    damage(Path(storage.find_url(checkpoint.path), name))
    read = load_journal if name.endswith("journal.jsonl") else load_state if name.startswith("state/") else load
    with pytest.raises(CheckpointError, match=name):
        read(checkpoint)


def test_a_bit_flipped_anywhere_in_the_weights_is_told(storage):
    file = Path(saved(storage).url, "unet/diffusion_pytorch_model.safetensors")
    content = file.read_bytes()
    for place in (0, 7, 8, 100, len(content) // 3, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for read in (load, load_state):
            with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
                read(open_folder(file.parents[1]))


def test_it_crosses_processes_and_is_a_key(storage):
    """All that loading takes is in it; equal ones are one key."""
    checkpoint = saved(storage)
    other = sent(checkpoint)
    assert {checkpoint: 1}[other] == 1
    unet, _ = load(other)
    with torch.no_grad():
        x, t = images()
        assert torch.equal(unet(x, t + 1).eps, network()(x, t))


def test_opened_by_its_folder_it_is_the_same(storage):
    checkpoint = saved(storage)
    opened = open_folder(checkpoint.url)
    assert (opened.step, opened.digest, opened.sums) == (checkpoint.step, checkpoint.digest, checkpoint.sums)
    Path(checkpoint.url, "manifest.json").unlink()  # now it is as any folder of diffusers
    bare = open_folder(checkpoint.url)
    assert bare.digest == checkpoint.digest and bare.step is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, "\xff", '{"step": 10}', '{"sha256": {}, "step": 10}', '{"sha256": 1, "step": 10}'],
)
def test_a_damaged_manifest_is_told(storage, content):
    checkpoint = saved(storage)
    Path(storage.find_url(checkpoint.path), "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        find_newest(storage, FOLDER)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_folder(checkpoint.url)


@pytest.mark.parametrize("step", ['"ten"', "Infinity", "null"])
def test_a_manifest_of_no_step_is_told(storage, step):
    manifest = Path(saved(storage).url, "manifest.json")
    manifest.write_text(manifest.read_text().replace('"step": 10', f'"step": {step}'))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        find_newest(storage, FOLDER)


def test_a_folder_without_a_manifest_does_not_count(storage):
    assert find_newest(storage, FOLDER) is None
    older = saved(storage, 10)
    storage.write(f"{FOLDER}/step-00000020/unet/config.json", b"{}")
    assert find_newest(storage, FOLDER) == older
    storage.delete(f"{older.path}/manifest.json")
    assert find_newest(storage, FOLDER) is None


class Watched(Storage):
    """Notes the order of what is written and deleted, and can break off before the n-th write."""

    def __init__(self, root: str, writes: float = float("inf")) -> None:
        super().__init__(root)
        self.events: list[tuple[str, str]] = []
        self.writes = writes

    def write(self, path: str, content: bytes) -> None:
        if self.writes <= sum(verb == "write" for verb, _ in self.events):
            raise OSError("no space left")
        self.events.append(("write", path))
        super().write(path, content)

    def delete(self, path: str) -> None:
        self.events.append(("delete", path))
        super().delete(path)


def test_older_checkpoints_go_only_once_the_new_one_is_complete(storage):
    """The manifest is written last, and only after it does the old folder go."""
    saved(storage, 10)
    watched = Watched(storage.root)
    new = saved(watched, 20)
    assert watched.events[-2:] == [("write", f"{new.path}/manifest.json"), ("delete", f"{FOLDER}/step-00000010")]
    assert storage.list(FOLDER) == ["step-00000020"]


@pytest.mark.parametrize("writes", range(7))
def test_a_save_cut_off_anywhere_leaves_the_checkpoint_before_it(storage, writes):
    older = saved(storage, 10)
    with pytest.raises(OSError, match="no space left"):
        saved(Watched(storage.root, writes), 20)
    assert find_newest(storage, FOLDER) == older
    load(older)
    new = saved(storage, 20)  # the attempt after it overwrites the remains
    load(new)
    assert find_newest(storage, FOLDER) == new and storage.list(FOLDER) == ["step-00000020"]


def test_of_two_complete_checkpoints_the_newest_counts(storage, monkeypatch):
    """A process killed after the manifest and before the old folder went leaves both; the next save removes both."""
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", lambda *_: None)
        saved(storage, 10)
        new = saved(storage, 20)
    assert len(storage.list(FOLDER)) == 2 and find_newest(storage, FOLDER) == new
    saved(storage, 30)
    assert storage.list(FOLDER) == ["step-00000030"]


def test_steps_are_ordered_as_numbers(storage):
    for step in (900, 1000, 99_999_999):
        assert find_newest(storage, FOLDER) is None or find_newest(storage, FOLDER).step < step
        saved(storage, step)
    assert find_newest(storage, FOLDER).step == 99_999_999


def test_the_digest_is_of_what_an_evaluation_sees(storage):
    """The EMA weights, the network and the process; not the training state, the step or the place."""
    digest = saved(storage).digest
    state = {"weights.a": torch.zeros(5)}
    assert saved(storage, 30, state=state, progress={"train_seconds": 9.0}).digest == digest
    assert find_newest(storage, FOLDER).digest == digest
    weights = network().state_dict()
    weights["conv_in.bias"][0] += 1e-7
    others: list[dict[str, Any]] = [
        {"ema": weights},
        {"process": process("fixed_large")},
        {"process": process(kind="cosine")},
    ]
    digests = [saved(storage, 40 + k, **change).digest for k, change in enumerate(others)]
    assert len({digest, *digests}) == 4


def test_no_pickle_and_no_foreign_names(storage):
    """The layout is diffusers' own, and JSON and safetensors are all there is."""
    checkpoint = saved(storage)
    root = Path(storage.find_url(checkpoint.path))
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    assert names == sorted([*FILES, "manifest.json", "model_index.json"])
    manifest = json.loads((root / "manifest.json").read_text())
    assert sorted(manifest["sha256"]) == sorted([*FILES, "model_index.json"])


GAUSSIAN_WRONG: dict[str, list[Any]] = {
    "sample_size": [None, [], 0, 10**30, "8", 8.5, [8, 8], {}],
    "in_channels": [None, -1, 10**9, "1"],
    "out_channels": [None, "x"],
    "standard_deviation": [None, "", 0, -1.0, float("nan"), 1e308, [0.2], {}],
}


@pytest.mark.parametrize("key", GAUSSIAN_WRONG)
def test_a_broken_config_of_the_gaussian_kind_is_a_mistake(storage, key):
    process = Process.of(GAUSSIAN.diffusion)
    checkpoint = save(storage, FOLDER, Snapshot(step=1, unet_config=DENOISER, process=process, ema={}))
    path = f"{checkpoint.path}/unet/config.json"
    for value in [..., *GAUSSIAN_WRONG[key]]:
        content = {**DENOISER, key: value}
        if value is ...:
            del content[key]
        storage.write(path, json.dumps(content).encode())
        sums = dict(checkpoint.sums) | {"unet/config.json": hashlib.sha256(storage.read(path)).hexdigest()}
        for use in (load, describe):
            with pytest.raises(CheckpointError, match=rf"unet/config.json: {key}"):
                use(replace(checkpoint, sums=tuple(sums.items())))


@pytest.mark.parametrize(
    "name",
    ["averages/../../../outside.safetensors", "averages//etc/passwd", "averages/", "averages/x.safetensors",
     "averages/0.5", "averages/nan/.safetensors", "averages/0.50.safetensors"],
)  # fmt: skip
def test_a_manifest_names_its_own_averages_and_no_other_files(storage, name):
    checkpoint = saved(storage)
    manifest = json.loads(storage.read(f"{checkpoint.path}/manifest.json"))
    manifest = {"step": 10, "sha256": {**manifest["sha256"], name: "0" * 64}}  # of a version that had no seal
    storage.write(f"{checkpoint.path}/manifest.json", json.dumps(manifest).encode())
    for use in (lambda: find_newest(storage, FOLDER), lambda: open_folder(storage.find_url(checkpoint.path))):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            use()


def test_a_config_that_claims_much_is_refused_before_memory_is_taken_for_it(storage):
    checkpoint = saved(storage, unet_config={**CONFIG, "block_out_channels": [65536, 65536]})
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="does not fit"):
            load(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
