"""The classifier's feature space: what it tells apart, and that it is trained once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from workers.config import DataConfig
from workers.data.dataset import Dataset, prepare
from workers.evaluation import features
from workers.evaluation.features import Classifier, load_feature_space, train_classifier
from workers.evaluation.frechet import Moments, compute_distance
from workers.storage import Storage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Dataset:
    return prepare(DataConfig(source="digits"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def space(digits) -> Classifier:
    return train_classifier(digits)


def test_the_classifier_knows_held_out_digits(digits, space):
    assert space.accuracy > 0.9
    found = space.compute_features(digits.train)
    assert found.shape == (len(digits.train), 64) and (found >= 0).all()


def test_the_distance_tells_digits_from_noise(digits, space):
    noise = np.random.RandomState(0).randint(0, 17, digits.held_out.shape).astype(np.uint8)
    train, held_out, other = (Moments.of(space.compute_features(i)) for i in (digits.train, digits.held_out, noise))
    assert 0 < compute_distance(held_out, train) < compute_distance(other, train) / 10


def test_features_do_not_depend_on_how_many_images_a_call_has(digits, space):
    """Up to the order in which a matrix product sums."""
    one_by_one = np.concatenate([space.compute_features(digits.held_out[k : k + 1]) for k in range(20)])
    np.testing.assert_allclose(one_by_one, space.compute_features(digits.held_out)[:20], rtol=1e-10, atol=1e-12)


def test_the_space_is_made_once_and_read_back_equal(digits, tmp_path, monkeypatch):
    """Training it again gives the same network; a second call reads the file and trains nothing."""
    few = replace(digits, train=digits.train[:200], train_labels=digits.train_labels[:200])
    made = load_feature_space(Storage(tmp_path), few, "classifier", CPU)
    again = train_classifier(few)
    monkeypatch.setattr(features, "train_classifier", None)
    read = load_feature_space(Storage(tmp_path), few, "classifier", CPU)
    assert isinstance(made, Classifier) and isinstance(read, Classifier)
    for other in (again, read):
        assert (other.weights == made.weights).all() and (other.bias == made.bias).all()
        assert (other.levels, other.accuracy, other.digest) == (17, made.accuracy, made.digest)


def test_the_digest_follows_the_weights(space):
    assert (
        replace(space, weights=space.weights * 2).digest != space.digest != replace(space, bias=space.bias + 1).digest
    )


def test_without_labels_there_is_no_classifier(digits):
    with pytest.raises(ValueError, match=r"evaluation\.fid\.features.*labels"):
        train_classifier(replace(digits, train_labels=None))
