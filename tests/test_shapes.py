"""Annotations of shapes are checked in tests, at every door, and cost a run nothing."""

import subprocess
import sys
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import environment

from workers.config import DiffusionConfig
from workers.diffusion.bound import prior_term
from workers.diffusion.process import Prediction, Process
from workers.evaluation.frechet import Moments
from workers.network.unet import TimeEmbedding

PROCESS = Process.of(DiffusionConfig(T=4))
X_0, T = torch.zeros(2, 3, 4, 4), torch.tensor([1, 4])


def test_a_wrong_shape_fails_where_it_enters() -> None:
    PROCESS.q_sample(X_0, T, X_0)
    for wrong in ((X_0[0], T, X_0), (X_0, T, X_0[:, :1]), (X_0, T[:1], X_0), (X_0, T[:, None], X_0)):
        with pytest.raises(jaxtyping.TypeCheckError, match="q_sample"):
            PROCESS.q_sample(*wrong)


def test_a_wrong_type_fails_where_it_enters() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="q_sample"):
        PROCESS.q_sample(X_0, T.int(), X_0)
    with pytest.raises(jaxtyping.TypeCheckError, match="prior_term"):
        prior_term(PROCESS, torch.ones(2), 48)  # float32 would lose the digits of a short term


def test_a_record_is_of_one_batch_and_a_process_of_one_length() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="Prediction"):
        Prediction(X_0, X_0[:1])
    with pytest.raises(jaxtyping.TypeCheckError, match="Process"):
        replace(PROCESS, times=PROCESS.times[:-1])


def test_every_package_is_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="Moments"):
        Moments(2, np.zeros(3), np.zeros((3, 4)))
    with pytest.raises(jaxtyping.TypeCheckError, match="TimeEmbedding"):
        TimeEmbedding(8, {"freq_shift": 1, "flip_sin_to_cos": False})(T[:, None])


def test_a_run_checks_nothing() -> None:
    code = """
import sys, torch
from workers.config import DiffusionConfig
from workers.diffusion.process import Process
from workers.evaluation import summary
from workers.network import checkpoint
x_0 = torch.zeros(2, 3, 4, 4)
x_t = Process.of(DiffusionConfig(T=4)).q_sample(x_0, torch.tensor([4]), x_0)  # one t, that goes to both by chance
print(tuple(x_t.shape), sorted({"beartype", "jax"} & set(sys.modules)), hasattr(Process.kept, "__wrapped__"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(""))
    assert done.stdout.strip() == "(2, 3, 4, 4) [] False", done.stderr
