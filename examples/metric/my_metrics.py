"""A metric of samples of one's own: the Fréchet distance in features of a fixed random network."""

import numpy as np

from workers.evaluation.features import FeatureSpace
from workers.evaluation.frechet import Moments, compute_distance
from workers.evaluation.summary import Blocks, Found
from workers.kinds import MeasureEntry
from workers.shapes import Features

WIDTH, SEED = 32, 0  # of the network's one layer


def look(features: Features) -> Features:
    """max(W x, 0) of the features x that the experiment measures in, with W random and fixed."""
    weights = np.random.default_rng(SEED).standard_normal((features.shape[1], WIDTH)) / np.sqrt(features.shape[1])
    return np.maximum(features.astype(np.float64) @ weights, 0)


def fd_random(space: FeatureSpace, samples: Features, real: Blocks) -> Found:
    """It also sees what is not Gaussian of the features, to which their own Fréchet distance is blind."""
    ours, theirs = Moments.of(look(samples)), Moments.of(look(np.concatenate(real)))
    return {"fd_random": (compute_distance(ours, theirs), None)}, f"a random layer of {WIDTH} units, seed {SEED}"


RANDOM = MeasureEntry(function=fd_random, about="the Fréchet distance in random features", lower=("fd_random",))
