"""A network in whose features samples are compared with images, as it is built or after it has learned labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.data.dataset import Dataset
from workers.data.pixels import to_model

WIDTH, EPOCHS, BATCH = 32, 5, 100


class Convolutions(nn.Module):
    """float32 (n, channels, height, width) on [-1, 1] -> (n, WIDTH). Its weights come of PyTorch's global generator."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return features


def teach(network: nn.Module, dataset: Dataset) -> None:
    """Some epochs of Adam on the labels of the training images, by a linear layer that is thrown away afterwards."""
    assert dataset.train_labels is not None
    x, y = to_model(torch.from_numpy(dataset.train), dataset.levels), torch.from_numpy(dataset.train_labels).long()
    last = nn.Linear(WIDTH, int(y.max()) + 1)
    optimiser = torch.optim.Adam([*network.parameters(), *last.parameters()], lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(last(network(x[rows])), y[rows]).backward()
            optimiser.step()
