"""The minimax game of a network that makes images and a discriminator of them (Goodfellow et al. 2014, section 3).

The discriminator D gives a real number for each patch, whose sigmoid is the probability that the patch is real.

    hinge            D: E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat));   the other: -E D(x_hat)   (Lim & Ye 2017)
    non_saturating   D: E softplus(-D(x)) + E softplus(D(x_hat));      the other: E softplus(-D(x_hat))

The second is the game of Goodfellow et al. with -log D in place of log(1 - D) for the network that makes images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import LossConfig
from workers.network.discriminator import Discriminator
from workers.noise import make_generator
from workers.world import World

BETAS = 0.5, 0.9  # of the discriminator's Adam, as in LDM's code
LEAST, MOST_WEIGHT = 1e-4, 1e4  # what is added to the norm below, and the most that an adversarial term counts


@dataclass(frozen=True)
class Game:
    """Losses by what the discriminator says of patches."""

    of_real: Callable[[Tensor], Tensor]  # the discriminator's, of real images
    of_made: Callable[[Tensor], Tensor]  # the discriminator's, of made ones
    of_maker: Callable[[Tensor], Tensor]  # the other network's


GAMES = {
    "hinge": Game(lambda d: F.relu(1 - d), lambda d: F.relu(1 + d), lambda d: -d),
    "non_saturating": Game(lambda d: F.softplus(-d), F.softplus, lambda d: F.softplus(-d)),
}


def find_weight(distortion: Tensor, adversarial: Tensor, last_layer: nn.Parameter, world: World) -> Tensor:
    """|grad distortion| / (|grad adversarial| + 1e-4), both at the decoder's last layer (Esser et al. 2021, eq. 7).

    The losses are means over this worker's images; the gradients are those of the whole batch.
    """
    norms = []
    for loss in (distortion, adversarial):
        [gradient] = torch.autograd.grad(loss, last_layer, retain_graph=True)
        if world.size > 1:
            torch.distributed.all_reduce(gradient)
            gradient /= world.size
        norms.append(gradient.norm())
    return (norms[0] / (norms[1] + LEAST)).clamp(max=MOST_WEIGHT).detach()


class Critic:
    """A discriminator in training: its weights, its optimizer, and its side of the game."""

    def __init__(self, loss: LossConfig, channels: int, seed: int, world: World) -> None:
        self.game, self.world, self.r1 = GAMES[loss.game], world, loss.r1
        of = channels, loss.discriminator_channels, loss.discriminator_layers
        self.network = Discriminator(*of, make_generator(seed, "discriminator")).to(world.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=BETAS, fused=True)
        self.loss = torch.zeros((), device=world.device)  # of its last step

    def judge(self, made: Tensor) -> Tensor:
        """(n,): the loss of the network that makes these images; the discriminator's weights learn nothing of it."""
        self.network.requires_grad_(False)
        return self.game.of_maker(self.network(made)).flatten(1).mean(1)

    def learn(self, real: Tensor, made: Tensor, rate: float) -> Tensor:
        """A step of the discriminator's on the whole batch, of which these are this worker's; returns its loss.

        With r1 it has r1 / 2 |grad D(x)|^2 at real images as well (Mescheder et al. 2018, eq. 9).
        """
        self.network.requires_grad_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        real = real.detach().requires_grad_(self.r1 > 0)
        of_real = self.network(real)
        loss = self.game.of_real(of_real).mean() + self.game.of_made(self.network(made.detach())).mean()
        whole = loss
        if self.r1:
            [gradient] = torch.autograd.grad(of_real.flatten(1).mean(1).sum(), real, create_graph=True)
            whole = loss + self.r1 / 2 * gradient.flatten(1).square().sum(1).mean()
        whole.backward()
        if self.world.size > 1:
            for weights in self.network.parameters():
                assert weights.grad is not None
                torch.distributed.all_reduce(weights.grad)
                weights.grad.div_(self.world.size)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        if self.world.size > 1:
            torch.distributed.all_reduce(self.loss)
            self.loss /= self.world.size
        return self.loss

    def collect_state(self) -> dict[str, Tensor]:
        """Weights, and moments from its first step on."""
        state = {f"discriminator.weights.{name}": p for name, p in self.network.state_dict().items()}
        state["discriminator.loss"] = self.loss
        moments = self.optimizer.state_dict()["state"]
        for (name, _), values in zip(self.network.named_parameters(), moments.values(), strict=False):
            state |= {f"discriminator.{key}.{name}": value for key, value in values.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        names = [name for name, _ in self.network.named_parameters()]
        self.network.load_state_dict({name: state[f"discriminator.weights.{name}"] for name in names})
        self.loss = state["discriminator.loss"].to(self.loss)
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"discriminator.step.{names[0]}" in state:
            moments = {i: {key: state[f"discriminator.{key}.{name}"] for key in keys} for i, name in enumerate(names)}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
