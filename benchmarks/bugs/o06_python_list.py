"""The inner layers stand in a plain Python list, so they are not part of the model's parameters.

Source: GitHub kanezaki/pytorch-unsupervised-segmentation, pull request #6."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, loader

KIND = "python_list"
CAUSE = "The blocks are kept in a Python list, so they are not registered and the optimizer does not train them."


class Net(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.first = nn.Linear(2, 8)
        blocks = [nn.Linear(8, 8) for _ in range(3)]
        self.blocks = blocks if broken else nn.ModuleList(blocks)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


def setup(broken: bool = True):
    labels = torch.arange(1000) % 2
    radius = torch.rand(1000)
    angle = 9 * radius + torch.pi * labels
    points = 2 * radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    model = Net(broken)
    return model, cross_entropy, loader(points, labels, batch_size=64), torch.optim.Adam(model.parameters(), lr=1e-2)


if __name__ == "__main__":
    compare(setup, steps=2000)
