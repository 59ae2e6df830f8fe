"""An autoencoder of which all is known: x = A z + scale * eps for z of N(0, I), with its exact posterior.

This is probabilistic PCA (Tipping & Bishop 1999): q(z | x) = p(z | x) = N(M^-1 A' x, scale^2 M^-1), where M = A'A +
scale^2 I, and log p(x) is that of N(0, A A' + scale^2 I). Columns of A are orthogonal, so that M is diagonal.
"""

import math

import torch
from torch import Tensor, nn

from workers.network.autoencoder import FirstStage, Posterior


class LinearStage(FirstStage):
    """`columns` is A, (dimensions, latents); latents have the shape `latent` = (channels, height, width)."""

    law = "gaussian"

    def __init__(self, columns: Tensor, scale: float, image: tuple[int, ...], latent: tuple[int, ...]) -> None:
        super().__init__()
        self.image, self.latent = image, latent
        self.columns = nn.Parameter(columns.double(), requires_grad=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64), requires_grad=False)
        self.eval()

    def encode(self, x: Tensor) -> Posterior:
        A, variance = self.columns, (2 * self.log_scale).exp()
        M = A.square().sum(0) + variance
        mean = x.double().flatten(1) @ A / M
        log_variance = (variance / M).log().expand_as(mean)
        shape = (len(x), *self.latent)
        return Posterior(mean.reshape(shape).float(), log_variance.reshape(shape).float())

    def decode(self, z: Tensor) -> Tensor:
        x_hat: Tensor = z.double().flatten(1) @ self.columns.T
        return x_hat.reshape(len(z), *self.image).float()

    def compute_exact(self, x: Tensor) -> Tensor:
        """-log p(x) in nats, float64 (n,)."""
        A = self.columns
        covariance = A @ A.T + (2 * self.log_scale).exp() * torch.eye(len(A), dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(torch.zeros(len(A), dtype=torch.float64), covariance)
        return -law.log_prob(x.double().flatten(1))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Images of its own law, float32 (n, *image)."""
        z = torch.randn(n, self.columns.shape[1], generator=generator, dtype=torch.float64)
        eps = torch.randn(n, len(self.columns), generator=generator, dtype=torch.float64)
        return (z @ self.columns.T + self.log_scale.exp() * eps).reshape(n, *self.image).float()


def make_stage(latents: int, scale: float = 0.1) -> LinearStage:
    """Of 4x4 images, with `latents` 1x1 channels."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    lengths = torch.linspace(0.5, 0.1, latents, dtype=torch.float64)
    return LinearStage(basis[:, :latents] * lengths, scale, (1, 4, 4), (latents, 1, 1))


def make_identity() -> LinearStage:
    """z = x, of 4x4 images, but for noise of a millionth."""
    return LinearStage(torch.eye(16), 1e-6, (1, 4, 4), (1, 4, 4))
