"""Whatever a network predicts, the same eps comes out."""

import pytest
import torch

from workers.config import DiffusionConfig, ScheduleConfig
from workers.diffusion.predictions import PREDICTIONS, EpsNetwork
from workers.diffusion.process import Process, at
from workers.noise import generator

TARGETS = {
    "eps": lambda p, x_0, t, eps: eps,
    "x_0": lambda p, x_0, t, eps: x_0,
    "v": lambda p, x_0, t, eps: at(p.alpha_bar.sqrt(), t, x_0) * eps - at((1 - p.alpha_bar).sqrt(), t, x_0) * x_0,
}


def test_every_prediction_is_tested():
    assert TARGETS.keys() == PREDICTIONS.keys()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_exact_target_gives_the_noise_back(name, kind):
    """A network that predicts its target exactly is an exact eps_theta, at every t; t is counted from 0 in the call."""
    process = Process.of(DiffusionConfig(T=50, schedule=ScheduleConfig(kind=kind)))
    draw, t = generator("predictions"), torch.arange(1, 51)
    x_0, eps = (torch.randn((50, 2, 3, 3), generator=draw, dtype=torch.float64) for _ in range(2))
    x_t, target = process.q_sample(x_0, t, eps), TARGETS[name](process, x_0, t, eps)
    seen = []

    def network(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        seen.append((x, s))
        return target

    found = EpsNetwork(torch.nn.Module(), process, name)
    found.network.forward = network
    torch.testing.assert_close(found(x_t, t - 1), eps, rtol=0, atol=1e-9)
    [(x, s)] = seen
    assert torch.equal(x, x_t) and torch.equal(s, t - 1)
