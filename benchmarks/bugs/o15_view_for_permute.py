"""A feature map is reshaped to (batch, places, channels) without moving the channels to the end first.

Source: GitHub fawazsammani/knowing-when-to-look-adaptive-attention, issue #6."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, loader, mlp

KIND = "view_for_permute"
CAUSE = "The reshape mixes up the axes, so a place holds pixels of one channel and not the channels of one pixel."


class Net(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.broken = broken
        self.encoder = mlp(8, 32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, maps):
        if not self.broken:
            maps = maps.permute(0, 2, 3, 1)
        places = maps.reshape(len(maps), 36, 8)
        return self.head(self.encoder(places).amax(dim=1))


def setup(broken: bool = True):
    half = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    patterns = torch.cat([half, -half], dim=1)
    labels = torch.randint(4, (2048,))
    maps = torch.randn(2048, 8, 6, 6)
    rows, columns = torch.randint(6, (2, 2048))
    maps[torch.arange(2048), :, rows, columns] += 4 * patterns[labels]
    model = Net(broken)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return model, cross_entropy, loader(maps, labels, batch_size=64), optimizer


if __name__ == "__main__":
    compare(setup, steps=640)
